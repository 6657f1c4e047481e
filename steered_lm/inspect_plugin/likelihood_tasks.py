"""The Inspect tasks scored by log-likelihood: perplexity, TruthfulQA's mc2, our two tiny sets; items and scores are those of lm-eval's tasks."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, GenerateConfig, ModelOutput, get_model
from inspect_ai.model._generate_config import active_generate_config
from inspect_ai.model._model import active_model
from inspect_ai.scorer import CORRECT, INCORRECT, Metric, SampleScore, Score, Scorer, Target, accuracy, mean, metric, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from steered_lm.benchmarks.choices import read_choices
from steered_lm.benchmarks.truthful import choice_prompt, true_mass
from steered_lm.benchmarks.truthfulqa import truthfulqa_rows
from steered_lm.content import content_dir
from steered_lm.errors import UserError
from steered_lm.inspect_plugin.likelihoods import LOGLIKELIHOODS, Likelihood, LikelihoodRequest, likelihood_api
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.measure.texts import ENGLISH, PerplexityOptions, sizes

VERSION = 1
# How many samples ask at the same time, and so share a batch, unless --max-connections or --max-samples says otherwise; Inspect alone would start
# with 20, and the engine cuts a batch to its memory budget by itself.
_AT_ONCE = 128
# our tasks by their names in lm-eval
_TWINS = {
    "mmlu": "steered_mmlu",
    "perplexity": "steered_perplexity",
    "truthfulqa_mc1": "steered_truthfulqa_mc1",
    "truthfulqa_mc2": "steered_truthfulqa_mc2",
    "tiny_knowledge": "tiny_knowledge",
    "tiny_truth": "tiny_truth",
}


@task
def perplexity(text: str = ENGLISH, split: str = "paragraph") -> Task:
    """How well a model predicts a text, by lm-eval's rolling log-likelihood of each document.

    Args:
        text: a text file, JSONL with ``text`` in each line, or a text of ours: ``english``, ``tiny_talk``.
        split: where a document of a text file ends: ``paragraph``, ``line`` or ``file``.

    Raises:
        RefusalError: when the text is not to be had, or the model gives no log-likelihoods.
    """
    with plain_refusals():
        refuse_other_models("perplexity")
        options = PerplexityOptions.parse({"text": text, "split": split}, source="-T of perplexity")
        samples = [Sample(id=number, input=document) for number, document in enumerate(options.documents(), start=1)]
    return likelihood_task("perplexity", samples, text_likelihood(), predicted_text(), **options.model_dump())


@task
def truthfulqa_mc2(data: str | None = None) -> Task:
    """TruthfulQA with several true choices: their share of all choices' probability, after upstream's prompt.

    Args:
        data: a folder of local data; by default ``STEERED_LM_DATA``, and the hub without one.

    Raises:
        RefusalError: when the data is not to be had, or malformed, or the model gives no log-likelihoods.
    """
    with plain_refusals():
        refuse_other_models("truthfulqa_mc2")
        rows = truthfulqa_rows("multiple_choice", data)
        samples = [choice_sample(row["id"], choice_prompt(row, "mc2"), **row["mc2_targets"]) for row in rows]
    return likelihood_task("truthfulqa_mc2", samples, choice_likelihoods("truthfulqa_mc2", delimiter=" ", chat=False), true_probability())


@task
def tiny_knowledge() -> Task:
    """Questions of general knowledge for the tiny chat model, by the likeliest choice.

    Raises:
        RefusalError: when the model gives no log-likelihoods.
    """
    return _tiny("tiny_knowledge")


@task
def tiny_truth() -> Task:
    """Common misconceptions for the tiny chat model, by the likeliest choice.

    Raises:
        RefusalError: when the model gives no log-likelihoods.
    """
    return _tiny("tiny_truth")


def _tiny(name: str) -> Task:
    with plain_refusals():
        refuse_other_models(name)
        rows = read_choices(content_dir("tasks") / name / "items.jsonl", name)
        samples = [choice_sample(row["id"], row["question"], row["choices"], one_true(row["gold"], len(row["choices"]))) for row in rows]
    return likelihood_task(name, samples, choice_likelihoods(name), likeliest_choice())


def choice_sample(item: str, prompt: str, choices: Sequence[str], labels: Sequence[int], **facts: Any) -> Sample:
    """Return a sample whose target is its true choices; ``labels`` says of each choice whether it is true, 1 or 0."""
    true = [choice for choice, label in zip(choices, labels, strict=True) if label]
    return Sample(id=item, input=prompt, choices=list(choices), target=true, metadata={"labels": list(labels), **facts})


def one_true(gold: int, count: int) -> list[int]:
    """Return the labels of choices of which one is true."""
    return [int(number == gold) for number in range(count)]


def likelihood_task(
    name: str,
    samples: Sequence[Sample],
    solving: Solver,
    scoring: Scorer,
    metrics: list[Metric | dict[str, list[Metric]]] | None = None,
    **facts: Any,
) -> Task:
    """Return a task by log-likelihood; without ``metrics`` the scorer's own count, and ``facts`` go into the log."""
    return Task(
        dataset=MemoryDataset(list(samples), name=name),
        solver=solving,
        scorer=scoring,
        metrics=metrics,
        config=GenerateConfig(max_connections=_AT_ONCE),
        version=VERSION,
        metadata={"version": VERSION, **facts},
    )


def refuse_other_models(name: str) -> None:
    """Refuse a model without log-likelihoods before anything runs; without an evaluation under way, the solver does."""
    model = active_model()
    if model is not None:
        likelihood_api(model, name, _TWINS[name])


@solver
def choice_likelihoods(task: str, delimiter: str = "", chat: bool = True) -> Solver:
    """Ask for the log-likelihood of each choice, and answer by the likeliest.

    Args:
        task: which task asks, for messages.
        delimiter: what stands between prompt and choice.
        chat: whether the prompt is a user's turn and a choice the reply to it; else both are plain text.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        context = tuple(_with_system(state.messages)) if chat else _plain(state, task)
        choices = [choice.value for choice in state.choices]
        found = await _ask(task, [LikelihoodRequest(f"{delimiter}{choice}", context) for choice in choices])
        likeliest = max(range(len(found)), key=lambda number: found[number].loglikelihood)
        state.output = _output(choices[likeliest], found)
        state.messages.append(state.output.message)
        return state

    return solve


@solver
def text_likelihood() -> Solver:
    """Ask for the log-likelihood of the input, all of it."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = _output("", await _ask("perplexity", [LikelihoodRequest(_plain(state, "perplexity"))]))
        return state

    return solve


async def _ask(task: str, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
    model = get_model()
    with plain_refusals():
        api = likelihood_api(model, task, _TWINS[task])
    return await api.loglikelihoods(requests, _settings())


def _settings() -> GenerateConfig:
    return get_model().config.merge(active_generate_config())


def _with_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    system = _settings().system_message
    return [ChatMessageSystem(content=system), *messages] if system else list(messages)


def _plain(state: TaskState, task: str) -> str:
    if _settings().system_message:
        with plain_refusals():
            raise UserError(f"--system-message is not taken by steered_lm/{task}: its prompts are plain text, without turns. Leave it out.")
    return state.input_text


def _output(answer: str, found: Sequence[Likelihood]) -> ModelOutput:
    output = ModelOutput.from_content(str(get_model()), answer)
    names = {LOGLIKELIHOODS: "loglikelihood", "tokens": "tokens", "greedy": "is_greedy"}
    output.metadata = {name: [getattr(one, field) for one in found] for name, field in names.items()}
    return output


@scorer(metrics=[accuracy(), stderr()])
def likeliest_choice() -> Scorer:
    """Score whether the likeliest choice is the true one; the score's metadata holds each choice's log-likelihood."""

    async def score(state: TaskState, target: Target) -> Score:
        values = _found(state)[LOGLIKELIHOODS]
        return _score(state, CORRECT if state.metadata["labels"][values.index(max(values))] else INCORRECT)

    return score


@scorer(metrics=[mean(), stderr()])
def true_probability() -> Scorer:
    """Score the true choices' share of all choices' probability, mc2; the score's metadata holds each choice's log-likelihood."""

    async def score(state: TaskState, target: Target) -> Score:
        return _score(state, true_mass(state.metadata["labels"], _found(state)[LOGLIKELIHOODS]))

    return score


@metric
def word_perplexity() -> Metric:
    """Return ``exp(-sum of log-likelihoods / sum of words)``, over all texts."""

    def compute(scores: list[SampleScore]) -> float:
        return _exp(_rate(scores, "words"))

    return compute


@metric
def byte_perplexity() -> Metric:
    """Return ``exp(-sum of log-likelihoods / sum of bytes)``, over all texts."""

    def compute(scores: list[SampleScore]) -> float:
        return _exp(_rate(scores, "bytes"))

    return compute


@metric
def bits_per_byte() -> Metric:
    """Return ``-sum of log-likelihoods / sum of bytes`` in bits, over all texts."""

    def compute(scores: list[SampleScore]) -> float:
        return _rate(scores, "bytes") / math.log(2)

    return compute


@metric
def token_perplexity() -> Metric:
    """Return ``exp(-sum of log-likelihoods / sum of tokens)``, over all texts; the tokens are the model's own."""

    def compute(scores: list[SampleScore]) -> float:
        return _exp(_rate(scores, "tokens"))

    return compute


def _rate(scores: Sequence[SampleScore], unit: str) -> float:
    """Return ``-sum of log-likelihoods / sum of unit``; NaN of no texts, which is what Inspect asks for while none is done."""
    if not scores:
        return math.nan
    values: list[dict[str, Any]] = [dict(one.score.as_dict()) for one in scores]
    return -math.fsum(value["loglikelihood"] for value in values) / math.fsum(value[unit] for value in values)


def _exp(value: float) -> float:
    return math.inf if value >= math.log(sys.float_info.max) else math.exp(value)


@scorer(metrics=[word_perplexity(), byte_perplexity(), bits_per_byte(), token_perplexity()])
def predicted_text() -> Scorer:
    """Score a text by its log-likelihood, and how many words, bytes and tokens it is of."""

    async def score(state: TaskState, target: Target) -> Score:
        found = _found(state)
        return _score(state, {"loglikelihood": found[LOGLIKELIHOODS][0], "tokens": found["tokens"][0], **sizes(state.input_text)._asdict()})

    return score


def _found(state: TaskState) -> dict[str, Any]:
    return state.output.metadata or {}


def _score(state: TaskState, value: Any) -> Score:
    return Score(value=value, answer=state.output.completion or None, metadata=_found(state))
