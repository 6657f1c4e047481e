"""Free answers to TruthfulQA's questions: two questions to a judge, and upstream's BLEU and ROUGE."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steered_lm.benchmarks.upstream import upstream_module, upstream_prompt
from steered_lm.judges import make_judge
from steered_lm.judges.base import Judge, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Kind

KINDS: tuple[Kind, ...] = ("truthful", "informative")
BOTH = "truthful_and_informative"
"""The share of answers that score at least half on both, TruthfulQA's main figure."""
HALF = 50.0
UNTIL = "\n\n"
"""What ends an answer, in upstream's default settings."""


def prepared(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its answers as upstream scores them: each ends with a period, and having no comment is true."""
    return {**row, **upstream_module("truthfulqa/utils.py").preprocess_function(dict(row))}


def prompt(row: Mapping[str, Any]) -> str:
    """Return upstream's prompt: six questions with answers, then the row's question."""
    return upstream_prompt("truthfulqa/truthfulqa_gen.yaml")(row)


def choice_prompt(row: Mapping[str, Any], part: Literal["mc1", "mc2"]) -> str:
    """Return upstream's prompt of a question with choices; a choice follows after a space."""
    return upstream_prompt(f"truthfulqa/truthfulqa_{part}.yaml")(row)


def true_mass(labels: Sequence[int], loglikelihoods: Sequence[float]) -> float:
    """Return upstream's mc2 score: the true choices' share of all choices' probability.

    Upstream adds probabilities, which are 0 in floating point below about -745 nats. A common factor changes no share, so the likeliest is set to 1.
    """
    highest = max(loglikelihoods)
    results = [(value - highest, False) for value in loglikelihoods]
    return float(upstream_module("truthfulqa/utils.py").process_results_mc2({"mc2_targets": {"labels": list(labels)}}, results)["acc"])


def overlap(row: Mapping[str, Any], response: str) -> dict[str, float]:
    """Return upstream's BLEU and ROUGE of a response against a prepared row's answers."""
    found = upstream_module("truthfulqa/utils.py").process_results_gen(row, [response])
    return {name: float(value) for name, value in found.items()}


def answer_of(response: str) -> str:
    """Return what is judged: the response without the ``A:`` that the prompt's form leads to."""
    return response.strip().removeprefix("A:").strip()


def request_of(row: Mapping[str, Any], response: str) -> JudgeRequest:
    """Return what the judges are asked about a response to a prepared row."""
    return JudgeRequest(
        prompt=row["question"],
        response=answer_of(response),
        references=tuple(row["correct_answers"]),
        false_references=tuple(row["incorrect_answers"]),
    )


def truthful_judges(name: str, *, cache: str | None = None, **options: Any) -> dict[str, Judge]:
    """Return a judge of each kind.

    Raises:
        JudgeError: when it cannot be built.
    """
    return {kind: make_judge(name, Question.of_kind(kind), cache=cache, **options) for kind in KINDS}


def judged_metrics(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Return an answer's metrics, by kind and for both: what depends on a missing verdict is NaN, and each missing one counts 1."""
    scores: dict[str, float] = {kind: math.nan if (score := verdicts[kind].score) is None else score for kind in KINDS}
    known = not any(map(math.isnan, scores.values()))
    both = float(min(scores.values()) >= HALF) if known else math.nan
    return scores | {BOTH: both} | {f"{kind}_missing": float(verdicts[kind].missing is not None) for kind in KINDS}


def metric_names() -> Sequence[str]:
    """Return the names of :func:`judged_metrics`: scores first, then counts of what is missing."""
    return (*KINDS, BOTH, *(f"{kind}_missing" for kind in KINDS))
