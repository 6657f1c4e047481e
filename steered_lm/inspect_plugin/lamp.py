"""The Inspect tasks ``lamp_1`` to ``lamp_7``: the items and metrics of the harness's tasks of the same names."""

import math
from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, model_roles
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate

from steered_lm.inspect_plugin.grader import GRADER, InspectJudge
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.inspect_plugin.tasks import MissingGate, asking, judge_arguments, total
from steered_lm.judges import make_judge
from steered_lm.lamp.author import author_question, author_request, refuse_stylometric
from steered_lm.lamp.items import STOP, LampOptions, make_items, parse_options
from steered_lm.lamp.metrics import Labelled, root_mean, score_answer
from steered_lm.lamp.metrics import macro_f1 as macro_f1_of
from steered_lm.lamp.task import task_named

VERSION = 1
_JUDGED_ARGUMENTS = (*(name for name in LampOptions.model_fields if name != "max_gen_toks"), "max_tokens", "judge", "cache")


def _make_task(name: str, options: dict[str, Any], judging: Sequence[Any] = ()) -> Task:
    with plain_refusals():
        lamp = task_named(name)
        chosen = parse_options(options, source=f"-T of {name}")
        items = make_items(lamp, chosen)
    documents = [(item, item.document(lamp)) for item in items]
    samples = [Sample(input=item.prompt, target=item.reference, id=item.id, metadata=document) for item, document in documents]
    scorers = {"labels": lamp_labels, "rating": lamp_rating, "text": lamp_rouge}
    extra = [] if not judging else [lamp_author_fit(len(samples), *judging[:-1], **judging[-1])]
    return Task(
        dataset=MemoryDataset(samples, name=f"{lamp.name}/{chosen.split}"),
        solver=generate(),
        scorer=[scorers[lamp.metric](), *extra],
        config=GenerateConfig(max_tokens=chosen.answer_length(lamp), temperature=0.0, stop_seqs=list(STOP)),
        version=VERSION,
        metadata={"version": VERSION, "task": lamp.name, **chosen.model_dump()},
    )


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments under the names that both harnesses' options have."""
    return {"max_gen_toks" if name == "max_tokens" else name: value for name, value in given.items()}


@task
def lamp_1(**options: Any) -> Task:
    """Which of two papers an author cites (LaMP_1); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_1", _options(options))


@task
def lamp_2(**options: Any) -> Task:
    """A movie's tag (LaMP_2); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_2", _options(options))


@task
def lamp_3(**options: Any) -> Task:
    """A review's rating (LaMP_3); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_3", _options(options))


@task
def lamp_4(**options: Any) -> Task:
    """A headline (LaMP_4); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_4", _options(options))


@task
def lamp_5(**options: Any) -> Task:
    """A paper's title (LaMP_5); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_5", _options(options))


@task
def lamp_6(**options: Any) -> Task:
    """An email's subject (LaMP_6, whose data needs a licence); the options are those of :func:`lamp_7`, but for the judge."""
    return _make_task("lamp_6", _options(options))


@task
def lamp_7(
    data: str | None = None,
    split: str = "dev",
    retrieval: str = "bm25",
    k: int = 4,
    seed: int = 0,
    item_words: int | None = None,
    max_tokens: int | None = None,
    judge: str | None = None,
    cache: str | None = None,
    missing_limit: float = 0.2,
    **judge_options: Any,
) -> Task:
    """A tweet in its author's manner (LaMP_7), and how well it fits the author when there is a judge.

    Args:
        data: the folder with the files, by default ``STEERED_LM_DATA``.
        split: ``dev``, ``train``, ….
        retrieval: ``bm25``, ``recency``, ``random`` or ``none``.
        k: how many of the author's tweets go into the prompt.
        seed: of ``random``.
        item_words: how many words of each of them are shown; by default all.
        max_tokens: length limit of an answer.
        judge: ``openai:<model>``, ``hf:<model>``, …; a model role ``grader`` takes its place. Without either nobody is asked.
        cache: a SQLite file that keeps the judge's verdicts between runs.
        missing_limit: share of missing verdicts above which the run ends in an error.
        judge_options: ``judge_<option>`` for further options of the judge. Keys come from the environment.
    """
    with plain_refusals():  # a misspelt argument also lands among them, judge or none
        judge_arguments(judge_options, task="lamp_7", known=_JUDGED_ARGUMENTS)
    judged = judge is not None or GRADER in model_roles()
    options = {"data": data, "split": split, "retrieval": retrieval, "k": k, "seed": seed, "item_words": item_words, "max_gen_toks": max_tokens}
    return _make_task("lamp_7", options | {"missing_limit": missing_limit}, (judge, cache, missing_limit, judge_options) if judged else ())


@metric(scores="unreduced")
def macro_f1() -> Metric:
    """Return the unweighted mean of all labels' F1, over the answers of every epoch; NaN while there are none."""

    def compute(scores: list[SampleScore]) -> float:
        return macro_f1_of([Labelled(*(score.score.metadata or {})["labelled"]) for score in scores]) if scores else math.nan

    return compute


@metric(scores="unreduced")
def root() -> Metric:
    """Return the root of the mean squared error, over the answers of every epoch; NaN while there are none."""

    def compute(scores: list[SampleScore]) -> float:
        return root_mean([score.score.as_float() for score in scores]) if scores else math.nan

    return compute


@scorer(metrics={"accuracy": [mean(), stderr()], "f1_macro": [macro_f1()]})
def lamp_labels() -> Scorer:
    """Score a classification: right or wrong, and what macro-F1 needs; an answer that is no label is wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        found = _scored(state, target)
        pair = found["f1_macro"]
        value = {"accuracy": found["accuracy"], "f1_macro": float(pair.predicted)}
        return Score(value=value, answer=state.output.completion.strip(), metadata={"labelled": list(pair)})

    return score


@scorer(metrics={"mae": [mean(), stderr()], "rmse": [root()]})
def lamp_rating() -> Scorer:
    """Score a rating by its error and its squared error; what is no number counts as the worst one."""

    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=_scored(state, target), answer=state.output.completion.strip())

    return score


@scorer(metrics={"rouge1": [mean(), stderr()], "rougeL": [mean(), stderr()]})
def lamp_rouge() -> Scorer:
    """Score a text by ROUGE-1 and ROUGE-L."""

    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=_scored(state, target), answer=state.output.completion.strip())

    return score


def _scored(state: TaskState, target: Target) -> dict[str, Any]:
    return score_answer(task_named(state.metadata["task"]), state.output.completion, target.text)


@scorer(metrics={"persona_fit": [mean(), stderr()], "missing": [total()]})
def lamp_author_fit(items: int, judge: str | None = None, cache: str | None = None, missing_limit: float = 0.2, **judge_options: Any) -> Scorer:
    """Score how well an answer fits the author of the row's profile, 1 to 5; a missing verdict is NaN and counted.

    Raises:
        RefusalError: when the judge cannot be had.
    """
    with plain_refusals():
        refuse_stylometric(judge or "")
        question = author_question()
        options = judge_arguments(judge_options)
        gate = MissingGate(items, missing_limit)
        role = InspectJudge.for_question(question, **(options if judge == "inspect" else {}))
        asker = None if judge is None or GRADER in model_roles() else asking(make_judge(judge, question, cache=cache, **options))

    async def score(state: TaskState, target: Target) -> Score:
        request = author_request(state.metadata["input"], state.output.completion, state.metadata["lines"])
        with plain_refusals():
            verdict = await (role.grade(request) if asker is None else asker(request))
            gate.note(f"{state.model}/{state.epoch}", state.sample_id, verdict)
        return Score(
            value={"persona_fit": math.nan if verdict.score is None else verdict.score, "missing": int(verdict.missing is not None)},
            answer=request.response,
            explanation=verdict.missing if verdict.missing is not None else verdict.explanation,
            metadata=verdict.record(),
        )

    return score
