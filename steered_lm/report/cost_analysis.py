"""What steering buys and costs, paired by item: levels, differences, how far one can go, and side effects."""

import math
from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.measure.means import TokenMean, exponentiated
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.stats import Estimate, PairedDifference, holm, mcnemar_paired, mean_interval, paired_difference, share_interval

ORDERED = ("alpha", "kl", "weight")
"""Swept settings whose distance from zero is how strongly a model is steered, by the first word of their names."""
ALL = "all of them"


class Level(Config):
    """One arm's level on one measure; of a perplexity, the perplexity."""

    arm: str
    measure: str
    level: Estimate


class Change(Config):
    """One arm minus the unsteered model on one measure.

    Attributes:
        difference: of means; of measures of kind ``tokens`` in nats a token.
        p_holm: corrected over all changes of measures of the same role; of the matrix, over the matrix.
    """

    arm: str
    measure: str
    difference: PairedDifference
    p_holm: float | None


class Reach(Config):
    """How far a sweep can go before a measure may have lost more than is accepted.

    Attributes:
        measure: its name, or ``all of them``.
        x: the furthest value that is still within the tolerance, and so is every value before it; 0 when not even the first one is.
        stopped_at: the value where that ended; None when the sweep ended first.
        measured: whether a real loss was seen there: the interval lies below zero. If not, there may simply be too few items.
        loss: the bound on the loss at ``x``, in the tolerance's own unit; None at 0.
        limit: the tolerance.
    """

    series: str
    measure: str
    x: float
    stopped_at: float | None
    measured: bool
    loss: float | None
    limit: float


class CostAnalysis(Config):
    """Everything that is computed from the data."""

    levels: tuple[Level, ...]
    changes: tuple[Change, ...]
    matrix: tuple[Change, ...]
    reaches: tuple[Reach, ...]

    def level(self, arm: str, measure: str) -> Estimate | None:
        """Return an arm's level on a measure, None where it was not measured."""
        return next((one.level for one in self.levels if (one.arm, one.measure) == (arm, measure)), None)

    def change(self, arm: str, measure: str) -> Change | None:
        """Return an arm's change on a measure, None where there is none."""
        return next((one for one in (*self.changes, *self.matrix) if (one.arm, one.measure) == (arm, measure)), None)


def analyse_cost(data: CostData) -> CostAnalysis:
    """Return levels, paired differences with Holm's correction within each role, reaches, and the matrix of side effects.

    Accuracies are compared by McNemar's exact test, scores by the sign-flip test, means over tokens by the sign-flip test of linearised values.
    """
    levels = [
        Level(arm=arm, measure=measure.name, level=_level(measure, arm, data.confidence)) for measure in data.measures for arm in measure.values
    ]
    main, side = [a for a in data.arms if a.series is not None], [a for a in data.arms if a.trait is not None]
    changes = [change for role in ("benefit", "cost") for change in _changes(data, [m for m in data.measures if m.role == role], main)]
    matrix = _changes(data, [m for m in data.measures if m.trait is not None], side)
    found = {(change.arm, change.measure): _worst_case(data, change) for change in changes}
    reaches = [reach for series, arms in data.series.items() for reach in _reaches(data, series, arms, found)]
    return CostAnalysis(levels=tuple(levels), changes=tuple(changes), matrix=tuple(matrix), reaches=tuple(reaches))


def token_mean(measure: Measure, arm: str) -> TokenMean:
    """Return an arm's mean over tokens."""
    return TokenMean(items=measure.items, totals=measure.values[arm], tokens=measure.tokens)


def _level(measure: Measure, arm: str, confidence: float) -> Estimate:
    values = measure.values[arm]
    if measure.kind == "tokens":
        found = token_mean(measure, arm).estimate(confidence=confidence)
        return exponentiated(found) if measure.exponentiate else found
    if measure.kind == "accuracy":
        known = [value for value in values if value is not None]
        return share_interval(round(sum(known)), len(known), confidence=confidence).model_copy(update={"missing": len(values) - len(known)})
    return mean_interval(values, confidence=confidence, bounds=measure.scale)


def _changes(data: CostData, measures: Sequence[Measure], arms: Sequence[CostArm]) -> list[Change]:
    pairs = [(arm.name, measure) for measure in measures for arm in arms if arm.name in measure.values]
    found = [_difference(measure, arm, data) for arm, measure in pairs]
    corrected = holm([difference.p_value for difference in found])
    return [
        Change(arm=arm, measure=measure.name, difference=difference, p_holm=p)
        for (arm, measure), difference, p in zip(pairs, found, corrected, strict=True)
    ]


def _difference(measure: Measure, arm: str, data: CostData) -> PairedDifference:
    if measure.kind == "tokens":
        return token_mean(measure, arm).minus(token_mean(measure, UNSTEERED), confidence=data.confidence, seed=data.seed)
    steered, unsteered = measure.values[arm], measure.values[UNSTEERED]
    if measure.kind == "accuracy":
        return mcnemar_paired(steered, unsteered, confidence=data.confidence)
    return paired_difference(steered, unsteered, confidence=data.confidence, seed=data.seed)


def _worst_case(data: CostData, change: Change) -> PairedDifference:
    """Return the difference with the worst value in place of each that steering made missing; what has no worst value stays missing."""
    measure = next(m for m in data.measures if m.name == change.measure)
    if measure.role != "cost" or measure.kind == "tokens" or not change.difference.missing:
        return change.difference
    low, high = measure.scale or (0.0, 1.0)
    worst = low if measure.higher_is_better else high
    filled = tuple(worst if value is None else value for value in measure.values[change.arm])
    return _difference(measure.model_copy(update={"values": measure.values | {change.arm: filled}}), change.arm, data)


def _reaches(data: CostData, series: str, arms: Sequence[CostArm], found: dict[tuple[str, str], PairedDifference]) -> list[Reach]:
    """Return how far the series reaches on each side of zero, for each cost and for all of them together.

    Values are tested in order of their distance from zero, up to the first that fails. Such a fixed sequence needs no correction (Maurer,
    Hothorn & Lehmacher 1995), and that all costs are within their tolerances at once is an intersection-union test, which needs none either
    (Berger 1982, Technometrics 24:295). The bound is one end of the two-sided interval.
    """
    if data.axis is None or data.axis.split()[0] not in ORDERED:
        return []
    costs = [m for m in data.measures if m.role == "cost"]
    reaches = []
    for sign in (1.0, -1.0):
        way = sorted((arm for arm in arms if arm.x is not None and arm.x * sign > 0), key=lambda arm: abs(arm.x or 0.0))
        if way:
            own = [_reach(data, series, way, [measure], found) for measure in costs]
            reaches += [*own, *([_reach(data, series, way, costs, found)] if len(costs) > 1 else [])]
    return reaches


def _reach(data: CostData, series: str, way: Sequence[CostArm], costs: Sequence[Measure], found: dict[tuple[str, str], PairedDifference]) -> Reach:
    name = costs[0].name if len(costs) == 1 else ALL
    limit = data.perplexity_tolerance if len(costs) == 1 and costs[0].exponentiate else data.tolerance
    x, loss = 0.0, None
    for arm in way:
        assert arm.x is not None
        bounds = [(measure, loss_bound(measure, found.get((arm.name, measure.name)))) for measure in costs]
        failed = [measure for measure, bound in bounds if bound is None or bound > _limit(data, measure)]
        if failed:
            measured = any(_worse(measure, found.get((arm.name, measure.name))) for measure in failed)
            return Reach(series=series, measure=name, x=x, stopped_at=arm.x, measured=measured, loss=loss, limit=limit)
        x, loss = arm.x, bounds[0][1] if len(costs) == 1 else None
    return Reach(series=series, measure=name, x=x, stopped_at=None, measured=False, loss=loss, limit=limit)


def _limit(data: CostData, measure: Measure) -> float:
    return data.perplexity_tolerance if measure.exponentiate else data.tolerance


def loss_bound(measure: Measure, difference: PairedDifference | None) -> float | None:
    """Return the most that may have been lost, by the interval: a share of the scale, of a perplexity its relative growth; None where nobody knows.

    Where all items changed by the same amount there is no interval, and that amount is the bound only when it is zero for every item.
    """
    if difference is None or difference.mean is None or (difference.missing and measure.kind == "tokens"):
        return None
    low, high = difference.low, difference.high
    if low is None or high is None:
        return 0.0 if difference.mean == 0.0 and "equal" in (difference.reason or "") else None
    worst = -low if measure.higher_is_better else high
    if measure.kind == "tokens":
        return math.expm1(worst) if measure.exponentiate else worst
    width = 1.0 if measure.scale is None else measure.scale[1] - measure.scale[0]
    return worst / width


def _worse(measure: Measure, difference: PairedDifference | None) -> bool:
    if difference is None or difference.low is None or difference.high is None:
        return False
    return difference.high < 0.0 if measure.higher_is_better else difference.low > 0.0
