"""LaMP's metrics, by its evaluation code: what one answer scores, and how scores become the number of a task."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

from steered_lm.errors import UserError
from steered_lm.lamp.task import LampTask

_LOWEST, _HIGHEST = 1.0, 5.0


class Labelled(NamedTuple):
    """A classification: the places of answer (-1: no label) and right answer among the labels, and how many labels there are."""

    predicted: int
    gold: int
    labels: int


def score_answer(task: LampTask, answer: str, gold: str) -> dict[str, Any]:
    """Return what one answer adds to each metric of the task; outer white space of both texts does not count.

    ``accuracy`` is 0 or 1 and ``f1_macro`` a :class:`Labelled`; ``mae`` is the error and ``rmse`` its square; ``rouge1`` and ``rougeL`` are
    F-measures of ``rouge_score``, without stemming. :data:`AGGREGATIONS` make numbers of many.
    """
    if task.metric == "labels":
        pair = Labelled(task.label(answer), task.label(gold), len(task.labels))
        return {"accuracy": float(pair.predicted == pair.gold), "f1_macro": pair}
    if task.metric == "rating":
        error = abs(rating(answer, float(gold)) - float(gold))
        return {"mae": error, "rmse": error**2}
    found = _rouge().score(gold.strip(), answer.strip())
    return {name: float(found[name].fmeasure) for name in ("rouge1", "rougeL")}


def rating(answer: str, gold: float) -> float:
    """Return the number that an answer is; what is none counts as 1 or 5, whichever is further from the right one (5 when both are)."""
    try:
        number = float(answer.strip())
    except ValueError:
        number = math.nan
    if math.isfinite(number):  # Python reads "nan" and "inf" too, for which there is no error
        return number
    return _LOWEST if abs(_LOWEST - gold) > abs(_HIGHEST - gold) else _HIGHEST


def macro_f1(pairs: Sequence[Sequence[int]]) -> float:
    """Return the unweighted mean of all labels' F1 from :class:`Labelled`; one that is neither right nor given counts as 0, as in scikit-learn."""
    from sklearn.metrics import f1_score

    predicted, golds, counts = zip(*pairs, strict=True)
    return float(f1_score(golds, predicted, labels=list(range(counts[0])), average="macro", zero_division=0))


def root_mean(squares: Sequence[float]) -> float:
    """Return the root of the mean of squared errors."""
    return math.sqrt(fmean(squares))


AGGREGATIONS: dict[str, Callable[[Sequence[Any]], float]] = {
    "accuracy": fmean,
    "f1_macro": macro_f1,
    "mae": fmean,
    "rmse": root_mean,
    "rouge1": fmean,
    "rougeL": fmean,
}


def evaluate(task: LampTask, answers: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, float]:
    """Return the task's metrics for answers by id.

    The official ROUGE is the median of bootstrapped means, which differs from run to run around the mean that this returns.

    Raises:
        UserError: when the ids differ, or there are none.
    """
    if set(answers) != set(golds) or not golds:
        raise UserError(f"the ids of {len(answers)} answers are not those of {len(golds)} right answers. Give one answer to each.")
    scores = [score_answer(task, answers[one], golds[one]) for one in golds]
    return {name: AGGREGATIONS[name]([score[name] for score in scores]) for name in scores[0]}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
