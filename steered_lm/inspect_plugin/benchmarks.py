"""TruthfulQA and MMLU in Inspect: the items of lm-eval's tasks, answered by a letter or in words, or as there by log-likelihood."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal, get_args

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, accuracy, choice, grouped, mean, metric, scorer, stderr
from inspect_ai.solver import MultipleChoiceTemplate, TaskState, generate, multiple_choice

from steered_lm.benchmarks.mmlu import CATEGORY_OF, LETTERS, SHOTS, local_subjects, mmlu_rows, select_subjects, upstream_context
from steered_lm.benchmarks.truthful import (
    BOTH,
    KINDS,
    UNTIL,
    choice_prompt,
    judged_metrics,
    overlap,
    prepared,
    prompt,
    request_of,
    truthful_judges,
)
from steered_lm.benchmarks.truthfulqa import truthfulqa_rows
from steered_lm.errors import JudgeError, UserError, near_misses
from steered_lm.inspect_plugin.likelihood_tasks import (
    choice_likelihoods,
    choice_sample,
    likeliest_choice,
    likelihood_task,
    one_true,
    refuse_other_models,
)
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.inspect_plugin.tasks import MissingGate, asking, judge_arguments, total

VERSION = 1
By = Literal["letter", "likelihood"]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEMPLATE = MultipleChoiceTemplate.SINGLE_ANSWER.value


@metric
def unanswered() -> Metric:
    """Return how many replies named no choice; they count as wrong."""

    def compute(scores: list[SampleScore]) -> float:
        return float(sum(not score.score.answer for score in scores))

    return compute


@task
def truthfulqa_mc1(seed: int = 0, data: str | None = None, max_tokens: int = 32, by: str = "letter") -> Task:
    """TruthfulQA with a single true choice, answered by its letter, or as in lm-eval by log-likelihood.

    Args:
        seed: what the order of each question's choices follows from: in the published data the true one is always first.
        data: a folder of local data; by default ``STEERED_LM_DATA``, and the hub without one.
        max_tokens: length limit of a reply.
        by: ``letter``, or ``likelihood``: upstream's prompt and score, for which order and length do not count.

    Raises:
        RefusalError: when the data is not to be had, or malformed; for a model without log-likelihoods, when they are asked for.
    """
    with plain_refusals():
        likely = _by_likelihood("truthfulqa_mc1", by)
        rows = truthfulqa_rows("multiple_choice", data)
        if likely:
            chosen = [choice_sample(row["id"], choice_prompt(row, "mc1"), **row["mc1_targets"]) for row in rows]
            return likelihood_task(
                "truthfulqa_mc1", chosen, choice_likelihoods("truthfulqa_mc1", delimiter=" ", chat=False), likeliest_choice(), by=by
            )
        samples = [_lettered(row["id"], row["question"], row["mc1_targets"]["choices"], row["gold"], seed) for row in rows]
    return Task(
        dataset=MemoryDataset(samples, name="truthfulqa/multiple_choice", shuffled=True),
        solver=multiple_choice(),
        scorer=choice(),
        metrics=[accuracy(), stderr(), unanswered()],
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0),
        version=VERSION,
        metadata={"version": VERSION, "seed": seed},
    )


@task
def mmlu(
    subjects: str | list[str] = "all",
    fewshot: int = 0,
    seed: int | None = None,
    data: str | None = None,
    max_tokens: int = 32,
    by: str = "letter",
) -> Task:
    """MMLU, answered by a letter that the model writes, or as in lm-eval by the likeliest letter.

    Args:
        subjects: names with commas between them: subjects, categories (``stem``, ``humanities``, ``social_sciences``, ``other``) or ``all``,
            which is every subject that a local folder has.
        fewshot: how many of the subject's ``dev`` questions come first, with their answers: 0 to 5.
        seed: shuffles each question's choices; None keeps the published order, which upstream's tasks have too.
        data: a folder of local data; by default ``STEERED_LM_DATA``, and the hub without one.
        max_tokens: length limit of a reply.
        by: ``letter``, or ``likelihood``: upstream's plain prompt and score, in the published order.

    Raises:
        RefusalError: for an unknown subject, and when the data is not to be had, or malformed; for a model without log-likelihoods, when they are
            asked for.
    """
    with plain_refusals():
        likely = _by_likelihood("mmlu", by)
        if likely and seed is not None:
            raise UserError(f"seed={seed!r} does not go with by='likelihood', which asks upstream's questions in the published order. Leave it out.")
        if isinstance(fewshot, bool) or not isinstance(fewshot, int) or not 0 <= fewshot <= SHOTS:
            raise UserError(f"fewshot={fewshot!r} is not possible: MMLU has {SHOTS} examples a subject. Allowed: 0 to {SHOTS}.")
        chosen = select_subjects(subjects)
        present = local_subjects(data) if subjects == "all" else None
        if likely:
            sampled = [sample for subject in present or chosen for sample in _likely_samples(subject, fewshot, data)]
            solving, facts = choice_likelihoods("mmlu", delimiter=" ", chat=False), {"by": by, "fewshot": fewshot, "subjects": present or chosen}
            return likelihood_task("mmlu", sampled, solving, likeliest_choice(), [accuracy(), stderr(), _by_category()], **facts)
        samples = [sample for subject in present or chosen for sample in _mmlu_samples(subject, fewshot, seed, data)]
    return Task(
        dataset=MemoryDataset(samples, name="mmlu", shuffled=seed is not None),
        solver=multiple_choice(),
        scorer=choice(),
        metrics=[accuracy(), stderr(), unanswered(), _by_category()],
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0),
        version=VERSION,
        metadata={"version": VERSION, "fewshot": fewshot, "seed": seed, "subjects": present or chosen},
    )


def _by_category() -> Metric:
    return grouped(accuracy(), "category", all=False)


def _by_likelihood(name: str, by: str) -> bool:
    """Return whether choices are scored by log-likelihood, after a look at whether the model can."""
    if by not in get_args(By):
        raise UserError(f"by={by!r} is not known. {near_misses(by, get_args(By))}")
    if by == "likelihood":
        refuse_other_models(name)
    return by == "likelihood"


def _examples(subject: str, fewshot: int, data: str | None) -> list[dict[str, Any]]:
    examples = mmlu_rows(subject, "dev", data)[:fewshot] if fewshot else []
    if len(examples) < fewshot:
        raise UserError(f"fewshot={fewshot}, but dev has {len(examples)} questions about {subject!r}. Add some, or lower fewshot.")
    return examples


def _likely_samples(subject: str, fewshot: int, data: str | None) -> list[Sample]:
    examples, facts = _examples(subject, fewshot, data), {"subject": subject, "category": CATEGORY_OF[subject]}
    rows = mmlu_rows(subject, "test", data)
    return [choice_sample(row["id"], upstream_context(row, examples), LETTERS, one_true(row["gold"], len(LETTERS)), **facts) for row in rows]


def _mmlu_samples(subject: str, fewshot: int, seed: int | None, data: str | None) -> list[Sample]:
    # the turns before the question, in the form that the solver gives it
    turns: list[ChatMessage] = []
    for row in _examples(subject, fewshot, data):
        turns += [ChatMessageUser(content=_asked(row["question"], row["choices"])), ChatMessageAssistant(content=f"ANSWER: {_LETTERS[row['gold']]}")]
    facts = {"subject": subject, "category": CATEGORY_OF[subject]}
    return [_lettered(row["id"], row["question"], row["choices"], row["gold"], seed, turns, facts) for row in mmlu_rows(subject, "test", data)]


def _asked(question: str, choices: Sequence[str]) -> str:
    letters = _LETTERS[: len(choices)]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(letters, choices, strict=True))
    return _TEMPLATE.format(question=question, choices=listed, letters=",".join(letters))


def _lettered(
    item: str,
    question: str,
    choices: Sequence[str],
    gold: int,
    seed: int | None,
    turns: Sequence[ChatMessage] = (),
    facts: Mapping[str, Any] | None = None,
) -> Sample:
    """Return a sample; its choices' order follows from seed and item alone, so that it is the same in every selection of items."""
    order = list(range(len(choices)))
    if seed is not None:
        Random(f"{seed}/{item}").shuffle(order)
    return Sample(
        id=item,
        input=[*turns, ChatMessageUser(content=question)] if turns else question,
        choices=[choices[index] for index in order],
        target=_LETTERS[order.index(gold)],
        metadata={**(facts or {}), "order": order},
    )


@task
def truthfulqa_gen(
    judge: str | None = None,
    cache: str | None = None,
    data: str | None = None,
    max_tokens: int = 256,
    missing_limit: float = 0.2,
    **judge_options: Any,
) -> Task:
    """TruthfulQA's questions answered freely: upstream's prompt, BLEU and ROUGE, and with a judge how truthful and informative answers are.

    Args:
        judge: a judge's name, such as ``openai:<model>`` or ``inspect`` for the model role ``grader``; None asks none.
        cache: a SQLite file that keeps the judge's verdicts between runs.
        data: a folder of local data; by default ``STEERED_LM_DATA``, and the hub without one.
        max_tokens: length limit of a reply.
        missing_limit: share of the items above which missing verdicts of a kind end the run in an error.
        judge_options: ``judge_<option>`` for further options of the judge, such as ``judge_base_url``. Keys come from the environment.

    Raises:
        RefusalError: when data or judge are not to be had.
    """
    with plain_refusals():
        rows = [prepared(row) for row in truthfulqa_rows("generation", data)]
        options = _judge_options(judge, judge_options)
        samples = [Sample(id=row["id"], input=prompt(row), target=row["correct_answers"], metadata={key: row[key] for key in _KEPT}) for row in rows]
    scorers = [answer_overlap()]
    if judge is not None:
        scorers.append(truthfulness(judge, len(rows), cache, missing_limit, **options))
    return Task(
        dataset=MemoryDataset(samples, name="truthfulqa/generation"),
        solver=generate(),
        scorer=scorers,
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0, stop_seqs=[UNTIL]),
        version=VERSION,
        metadata={"version": VERSION, "judge": judge},
    )


_KEPT = ("question", "correct_answers", "incorrect_answers")
_OVERLAPS = tuple(f"{name}_{part}" for name in ("bleu", "rouge1", "rouge2", "rougeL") for part in ("max", "acc", "diff"))


@scorer(metrics={name: [mean(), stderr()] for name in _OVERLAPS})
def answer_overlap() -> Scorer:
    """Score a reply by upstream's BLEU and ROUGE against the true and the false answers."""

    async def score(state: TaskState, target: Target) -> Score:
        found = overlap(state.metadata, state.output.completion)
        return Score(value={name: found[name] for name in _OVERLAPS}, answer=state.output.completion)

    return score


@scorer(metrics={**{name: [mean(), stderr()] for name in (*KINDS, BOTH)}, **{f"{kind}_missing": [total()] for kind in KINDS}})
def truthfulness(judge: str, items: int, cache: str | None = None, missing_limit: float = 0.2, **options: Any) -> Scorer:
    """Score how truthful and how informative a reply is, 0 to 100 each; a missing verdict is NaN, which the means leave out, and is counted.

    Raises:
        RefusalError: when the judge cannot be had.
    """
    with plain_refusals():
        judges = truthful_judges(judge, cache=cache, **options)
        gates: dict[str, MissingGate] = {kind: MissingGate(items, missing_limit) for kind in KINDS}
        askers = {kind: asking(made) for kind, made in judges.items()}

    async def score(state: TaskState, target: Target) -> Score:
        request = request_of(state.metadata, state.output.completion)
        with plain_refusals():
            verdicts = {kind: await asker(request) for kind, asker in askers.items()}
            for kind, verdict in verdicts.items():
                gates[kind].note(f"{state.model}/{state.epoch}", state.sample_id, verdict)
        reasons = [f"{kind}: {verdict.missing or verdict.explanation}" for kind, verdict in verdicts.items()]
        records = {kind: verdict.record() for kind, verdict in verdicts.items()}
        return Score(value=dict(judged_metrics(verdicts)), answer=request.response, explanation="\n".join(reasons), metadata=records)

    return score


def _judge_options(judge: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    known = ("judge", "cache", "data", "max_tokens", "missing_limit")
    options = judge_arguments(given, task="truthfulqa_gen", known=known)
    if given and judge is None:
        raise JudgeError(f"{sorted(given)[0]} is given and no judge. Name one by judge, or leave its options out.")
    return options
