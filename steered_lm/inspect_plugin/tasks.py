"""The Inspect task ``persona_judge``: how well replies fit a persona, by a judge of ours or by the model role ``grader``."""

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, model_roles
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate

from steered_lm.errors import JudgeError, PersonaError, near_misses
from steered_lm.inspect_plugin.batcher import Batcher
from steered_lm.inspect_plugin.grader import GRADER, InspectJudge
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.judges import judge_options as options_among
from steered_lm.judges import make_judge
from steered_lm.judges.base import Judge, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.persona import SPLITS, list_personas, load_persona

VERSION = 2


@task
def persona_judge(
    persona: str | None = None,
    split: str = "test",
    judge: str = "stylometric",
    cache: str | None = None,
    max_tokens: int = 64,
    missing_limit: float = 0.2,
    **judge_options: Any,
) -> Task:
    """Score persona fit, 1 (not this persona) to 5 (unmistakably this persona), of one reply a prompt.

    Args:
        persona: the name of one of ours, or a persona folder; by default the alphabetically first of ours.
        split: ``test``, ``validate``, ``tune`` or ``build``; only ``test`` is for reporting.
        judge: ``stylometric``, ``openai:<model>``, ``inspect:<model>``, ``hf:<model>``, …. A model role ``grader`` takes its place.
        cache: a SQLite file that keeps the judge's verdicts between runs.
        max_tokens: length limit of a reply.
        missing_limit: share of the split's items above which missing verdicts end the run in an error.
        judge_options: ``judge_<option>`` for further options of the judge, such as ``judge_base_url``. Keys come from the environment.

    Raises:
        RefusalError: for an unknown persona, split or judge.
    """
    with plain_refusals():
        loaded = load_persona(persona if persona is not None else list_personas()[0])
        if split not in SPLITS:
            raise PersonaError(f"split={split!r} does not exist. {near_misses(split, SPLITS)}")
        samples = [Sample(input=item.prompt, target=item.reference, id=item.item) for item in loaded.items(split)]
        if not samples:
            raise PersonaError(f"persona {loaded.name!r} has no items in split={split!r}. Choose another split, or add conversations.")
    return Task(
        dataset=MemoryDataset(samples, name=f"{loaded.name}/{split}"),
        solver=generate(),
        scorer=persona_fit(persona or loaded.name, split, judge, cache, missing_limit, **judge_options),
        # greedy, and ended where a base model starts to write the next turn, as in the harness's task of the same name
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0, stop_seqs=["\nUser:"]),
        version=VERSION,
        metadata={"version": VERSION, "persona": loaded.name, "persona_digest": loaded.digest, "split": split},
    )


@metric(scores="unreduced")
def total() -> Metric:
    """Return the sum over all replies, of every epoch."""

    def compute(scores: list[SampleScore]) -> float:
        return float(sum(score.score.as_float() for score in scores))

    return compute


@scorer(metrics={"persona_fit": [mean(), stderr()], "missing": [total()], "response_length": [mean()]})
def persona_fit(
    persona: str,
    split: str = "test",
    judge: str = "stylometric",
    cache: str | None = None,
    missing_limit: float = 0.2,
    **judge_options: Any,
) -> Scorer:
    """Score a reply's persona fit; a missing verdict is NaN, which Inspect leaves out of mean and standard error, and is counted.

    The values of a score are ``persona_fit`` (1 to 5 or NaN), ``missing`` (0 or 1) and ``response_length`` in words.

    Raises:
        RefusalError: when the persona or the judge cannot be had.
    """
    with plain_refusals():
        loaded = load_persona(persona)
        options = judge_arguments(judge_options)
        gate = MissingGate(len(loaded.items(split)), missing_limit)
        role = InspectJudge.for_question(Question.of_persona(loaded), **(options if judge == "inspect" else {}))
        asker = None if GRADER in model_roles() else asking(make_judge(judge, loaded, cache=cache, **options))

    async def score(state: TaskState, target: Target) -> Score:
        nonlocal asker
        request = JudgeRequest(prompt=state.input_text, response=state.output.completion.strip())
        with plain_refusals():
            if GRADER in model_roles():
                verdict = await role.grade(request)
            else:
                asker = asker or asking(make_judge(judge, loaded, cache=cache, **options))
                verdict = await asker(request)
            gate.note(f"{state.model}/{state.epoch}", state.sample_id, verdict)
        return _as_score(verdict, request.response)

    return score


class MissingGate:
    """Ends a run in which too many verdicts are missing, as soon as that is certain."""

    def __init__(self, items: int, limit: float) -> None:
        if not 0 <= limit <= 1:
            raise JudgeError(f"missing_limit={limit!r} is not a share. Allowed: 0 (none may be missing) to 1.")
        self._most = limit * items
        self._items = items
        self._limit = limit
        self._missing: dict[str, dict[int | str, str]] = {}

    def note(self, run: str, sample: int | str, verdict: Verdict) -> None:
        """Count a verdict of one pass over the items; a sample that is judged again counts once."""
        missing = self._missing.setdefault(run, {})
        missing.pop(sample, None)
        if verdict.missing is not None:
            missing[sample] = verdict.missing
        if len(missing) > self._most:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(missing.values()).most_common(3))
            raise JudgeError(
                f"{len(missing)} of {self._items} verdicts are missing, and missing_limit={self._limit:g}. Commonest reasons: {reasons}. "
                "Mend the judge, or set missing_limit=1 to see the scores that there are."
            )


_ARGUMENTS = ("persona", "split", "judge", "cache", "max_tokens", "missing_limit")


def judge_arguments(given: Mapping[str, Any], *, task: str = "persona_judge", known: Sequence[str] = _ARGUMENTS) -> dict[str, Any]:
    """Return the options of the judge out of what is left of a task's arguments.

    Raises:
        JudgeError: for an argument that is none of the task's, or a key.
    """
    for name in given:
        if not name.startswith("judge_"):
            raise JudgeError(f"{task} has no argument {name!r}. {near_misses(name, known)} Options of the judge are written judge_<option>.")
    return options_among(given)


def asking(judge: Judge) -> Callable[[JudgeRequest], Awaitable[Verdict]]:
    """Return what asks a judge without holding up the evaluation."""
    # a model of Inspect's is asked sample by sample, so that each one's log and limits count its own calls
    if isinstance(judge, InspectJudge):
        return judge.grade
    return Batcher[JudgeRequest, Verdict](lambda requests, deliver: judge.judge(requests), max_size=64).submit


def _as_score(verdict: Verdict, response: str) -> Score:
    return Score(
        value={
            "persona_fit": math.nan if verdict.score is None else verdict.score,
            "missing": int(verdict.missing is not None),
            "response_length": len(response.split()),
        },
        answer=response,
        explanation=verdict.missing if verdict.missing is not None else verdict.explanation,
        metadata={"judge": verdict.judge, "missing": verdict.missing, "cached": verdict.cached, "mode": verdict.mode, "mass": verdict.mass},
    )
