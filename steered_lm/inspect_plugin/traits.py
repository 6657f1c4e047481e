"""The Inspect tasks ``pv_<trait>``: how strongly replies show a trait, and whether they hang together; the items and metrics of lm-eval's tasks."""

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig, model_roles
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from steered_lm.errors import near_misses
from steered_lm.inspect_plugin.grader import GRADER, InspectJudge
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.inspect_plugin.tasks import MissingGate, asking, total
from steered_lm.judges import judge_options, make_judge
from steered_lm.judges.base import FINDINGS, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.trait_run import COUNTS, MEANS, OF_COHERENCE, VERSION, JudgedResponse, TraitQuestion, TraitRun, not_judged, response_values
from steered_lm.judges.traits import TraitError, judge_needed, load_trait
from steered_lm.seeds import repeat_seed


@task
def pv_evil(**options: Any) -> Task:
    """Score how evil replies are; see :func:`pv_trait` for the options."""
    return _task("evil", options)


@task
def pv_sycophantic(**options: Any) -> Task:
    """Score how sycophantic replies are; see :func:`pv_trait` for the options."""
    return _task("sycophantic", options)


@task
def pv_hallucinating(**options: Any) -> Task:
    """Score how far replies make things up; see :func:`pv_trait` for the options."""
    return _task("hallucinating", options)


@task
def pv_apathetic(**options: Any) -> Task:
    """Score how apathetic replies are; see :func:`pv_trait` for the options."""
    return _task("apathetic", options)


@task
def pv_humorous(**options: Any) -> Task:
    """Score how humorous replies are; see :func:`pv_trait` for the options."""
    return _task("humorous", options)


@task
def pv_impolite(**options: Any) -> Task:
    """Score how impolite replies are; see :func:`pv_trait` for the options."""
    return _task("impolite", options)


@task
def pv_optimistic(**options: Any) -> Task:
    """Score how optimistic replies are; see :func:`pv_trait` for the options."""
    return _task("optimistic", options)


@task
def pv_trait(trait: str | None = None, **options: Any) -> Task:
    """Score how strongly replies show a persona axis or a trait of your own, 0 to 100, and whether they hang together, 0 to 100.

    Args:
        trait: a persona axis; a file in the published form, a contrast set's ``.yaml`` file, or a folder that holds one trait; with ``folder`` its
            name there.
        options: the fields of :class:`~steered_lm.judges.trait_run.TraitRun` (``max_gen_toks`` is called ``max_tokens``), ``seed`` for replies that
            are sampled, each by its own (Inspect's ``--seed`` would be the same for all replies to a question, and they with it), and
            ``judge_<option>`` for options of the judge. A model role ``grader`` takes the judge's place. Keys come from the environment.

    Raises:
        RefusalError: for an unknown trait or option, a malformed file, or when there is no judge.
    """
    return _task(trait, options)


def _task(trait: str | None, options: dict[str, Any]) -> Task:
    with plain_refusals():
        if trait is None:
            raise TraitError("pv_trait needs a trait: -T trait=<file>.json, or a persona axis. The seven traits have tasks of their own.")
        seed = options.pop("seed", None)
        if seed is not None and not isinstance(seed, int):
            raise TraitError(f"seed={seed!r} is no whole number. Leave it out, and replies are drawn by chance.")
        run, extra = _run(trait, options)
        loaded = run.load()
        samples = [_sample(item) for item in run.items(loaded)]
        heat, top_k = run.heat, run.top_k if run.top_k > 0 else None
    return Task(
        name=f"pv_{loaded.name}",
        dataset=MemoryDataset(samples, name=loaded.name),
        solver=generate() if seed is None or not heat else sampled(seed),
        scorer=trait_expression(run.model_dump(mode="json"), extra),
        metrics=None if run.judges_coherence or GRADER in model_roles() else _WITHOUT_COHERENCE,  # None: the scorer's own
        epochs=Epochs(run.samples, "mean"),
        # ended where a base model starts to write the next turn, as in the harness's task of the same name
        config=GenerateConfig(max_tokens=run.max_gen_toks, temperature=heat, top_k=top_k, stop_seqs=["\nUser:"]),
        version=VERSION,
        metadata={"version": VERSION, "trait": loaded.name, "trait_digest": loaded.digest},
    )


@solver
def sampled(seed: int) -> Solver:
    """Reply by a seed of each sample's own: by one for all, a question's replies would all be the same."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=repeat_seed(seed, state.epoch - 1))

    return solve


def _run(trait: str, options: dict[str, Any]) -> tuple[TraitRun, dict[str, Any]]:
    known = ({*TraitRun.model_fields} - {"trait", "max_gen_toks"}) | {"max_tokens", "seed"}
    for name in options:
        if name not in known and not name.startswith("judge_"):
            hint = near_misses(name, known)
            raise TraitError(f"tasks of traits have no argument {name!r}. {hint} Options of the judge are written judge_<option>.")
    given = {"max_gen_toks" if name == "max_tokens" else name: value for name, value in options.items() if name in known and value is not None}
    return TraitRun.parse({"trait": trait, **given}, source="-T", error=TraitError), judge_options(options)


def _sample(item: TraitQuestion) -> Sample:
    turns: list[ChatMessage] = [ChatMessageSystem(content=item.system)] if item.system else []
    return Sample(id=item.id, input=[*turns, ChatMessageUser(content=item.question)], metadata={"question": item.question})


@metric(scores="unreduced")
def question_mean() -> Metric:
    """Return the mean over questions of the mean over a question's replies; replies without a value are left out."""

    def compute(scores: list[SampleScore]) -> float:
        means = _by_question(scores)
        return fmean(means) if means else math.nan

    return compute


@metric(scores="unreduced")
def question_stderr() -> Metric:
    """Return the standard error of :func:`question_mean`, over questions, since replies to one question are not independent."""

    def compute(scores: list[SampleScore]) -> float:
        means = _by_question(scores)
        return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan

    return compute


def _by_question(scores: Sequence[SampleScore]) -> list[float]:
    values: dict[str | int | None, list[float]] = {}
    for one in scores:
        value = one.score.as_float()
        if not math.isnan(value):
            values.setdefault(one.sample_id, []).append(value)
    return [fmean(own) for own in values.values()]


_METRICS: dict[str, list[Metric]] = {
    **{name: [question_mean(), question_stderr()] for name in MEANS},
    **{name: [total()] for name in COUNTS},
}
_WITHOUT_COHERENCE = {name: own for name, own in _METRICS.items() if name not in OF_COHERENCE}


@scorer(metrics=_METRICS)
def trait_expression(run: dict[str, Any], options: dict[str, Any]) -> Scorer:
    """Score a reply for the trait and for coherence; without a verdict the value is NaN, and is counted, but where nobody could judge coherence.

    Args:
        run: the fields of :class:`~steered_lm.judges.trait_run.TraitRun`.
        options: further options of the judge.

    Raises:
        RefusalError: when the trait or the judge cannot be had.
    """
    with plain_refusals():
        given = TraitRun.parse(run, source="-T", error=TraitError)
        trait = load_trait(given.trait, given.folder)
        replies = len(given.items(trait)) * given.samples
        if given.judge is None and GRADER not in model_roles():
            raise judge_needed(f"pv_{trait.name}")
        asked = [_Asked(given, question, options, replies) for question in given.questions(trait)]

    async def score(state: TaskState, target: Target) -> Score:
        request = JudgeRequest(prompt=state.metadata["question"], response=state.output.completion.strip())
        with plain_refusals():
            expression, coherence = [await one.verdict(state, request) for one in asked]
        record = JudgedResponse(request, expression, coherence).record()
        said = expression.missing if expression.missing is not None else expression.explanation
        return Score(value=dict(response_values(record)), answer=request.response, explanation=said, metadata=record)

    return score


class _Asked:
    """One question about every reply: whoever answers it, if anybody can, and how many answers are missing."""

    def __init__(self, run: TraitRun, question: Question, options: dict[str, Any], replies: int) -> None:
        self._judge, self._able = str(run.judge), question.kind != "coherence" or run.judges_coherence
        self._gate = MissingGate(replies, run.missing_limit)
        self._role = InspectJudge.for_question(question, **(options if run.judge in (None, "inspect") else {}))
        self._made = partial(make_judge, str(run.judge), question, cache=run.cache, **options)
        # what is wrong with a judge is said before the model runs
        self._ask = asking(self._made()) if self._able and GRADER not in model_roles() else None

    async def verdict(self, state: TaskState, request: JudgeRequest) -> Verdict:
        """Return the verdict on a reply; where the judge cannot answer, nobody is asked.

        Raises:
            JudgeError: when too many are missing.
        """
        if GRADER in model_roles():
            found = await self._role.grade(request)
        elif not self._able:
            return not_judged(self._judge)
        else:
            self._ask = self._ask or asking(self._made())
            found = await self._ask(request)
        if found.missing not in FINDINGS:
            self._gate.note(str(state.model), f"{state.sample_id}/{state.epoch}", found)
        return found
