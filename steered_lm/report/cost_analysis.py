"""What steering buys and costs, paired by item: levels, differences, how far one can go, and side effects."""

import math
from collections.abc import Sequence
from typing import Literal

from steered_lm.config import Config
from steered_lm.measure.means import TokenMean, exponentiated
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_reach import Reach, Seen, limit_of, loss_bound, ratio, reaches, width
from steered_lm.stats import Estimate, PairedDifference, holm, mcnemar_paired, mean_interval, paired_difference, share_interval

Unit = Literal["points", "times", "nats a token", ""]


class Level(Config):
    """One arm's level on one measure; of a perplexity, the perplexity."""

    arm: str
    measure: str
    level: Estimate


class Shown(Config):
    """A difference as a reader sees it.

    Attributes:
        unit: ``points`` of a hundred (shares, and scales of 0-1 and 0-100), ``times`` the unsteered perplexity, ``nats a token``, or the score's own.
    """

    value: float
    low: float | None
    high: float | None
    unit: Unit


class Change(Config):
    """One arm minus the unsteered model on one measure.

    Attributes:
        difference: of means; of measures of kind ``tokens`` in nats a token.
        p_holm: corrected over all changes of measures of the same role; of the matrix, over the matrix; of subjects, over the measure's.
        shown: the difference in a reader's unit; None where there is none.
        of_100: the mean difference in hundredths of the measure's scale; None where there is no scale.
        bound: of costs, the most that may have been lost, in the tolerance's own unit and with the worst assumed of what steering made missing;
            None where nobody knows.
        group: the subject that it is about alone; None for the whole measure.
        level: of a subject, the arm's level on it; else None, and ``CostAnalysis.levels`` has it.
    """

    arm: str
    measure: str
    difference: PairedDifference
    p_holm: float | None
    shown: Shown | None
    of_100: float | None
    bound: float | None = None
    group: str | None = None
    level: Estimate | None = None

    @property
    def established(self) -> bool:
        """Whether there is a change by its corrected p-value, at the page's level."""
        return self.p_holm is not None and self.p_holm <= 1.0 - self.difference.confidence + 1e-12


class GroupLevel(Config):
    """The unsteered model's level on one subject of a measure."""

    measure: str
    group: str
    level: Estimate


class Margin(Config):
    """How much of a cost is accepted.

    Attributes:
        limit: the tolerance, in its own unit.
        level: where the loss equals the tolerance; None where the unsteered model has no level.
        shown: that loss as a change in the unit that changes are shown in.
    """

    measure: str
    limit: float
    level: float | None
    shown: float


class CostAnalysis(Config):
    """Everything that is computed from the data."""

    levels: tuple[Level, ...]
    changes: tuple[Change, ...]
    matrix: tuple[Change, ...]
    reaches: tuple[Reach, ...]
    margins: tuple[Margin, ...] = ()
    groups: tuple[Change, ...] = ()
    group_levels: tuple[GroupLevel, ...] = ()

    def level(self, arm: str, measure: str) -> Estimate | None:
        """Return an arm's level on a measure, None where it was not measured."""
        return next((one.level for one in self.levels if (one.arm, one.measure) == (arm, measure)), None)

    def change(self, arm: str, measure: str) -> Change | None:
        """Return an arm's change on a measure, None where there is none."""
        return next((one for one in (*self.changes, *self.matrix) if (one.arm, one.measure) == (arm, measure)), None)

    def group(self, arm: str, measure: str, group: str) -> Change | None:
        """Return an arm's change on one subject of a measure, None where there is none."""
        return next((one for one in self.groups if (one.arm, one.measure, one.group) == (arm, measure, group)), None)

    def margin(self, measure: str) -> Margin | None:
        """Return what is accepted of a cost, None for what is no cost."""
        return next((one for one in self.margins if one.measure == measure), None)


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
    found = {(change.arm, change.measure): Seen(change.difference, _worst_case(data, change)) for change in changes}
    changes = [_bounded(data, change, found[change.arm, change.measure]) for change in changes]
    unsteered = {one.measure: one.level.value for one in levels if one.arm == UNSTEERED}
    grouped = [m for m in data.measures if m.groups and m.role != "note"]
    return CostAnalysis(
        levels=tuple(levels),
        changes=tuple(changes),
        matrix=tuple(matrix),
        reaches=tuple(reach for series, arms in data.series.items() for reach in reaches(data, series, arms, found)),
        margins=tuple(_margin(data, m, unsteered[m.name]) for m in data.measures if m.role == "cost"),
        groups=tuple(change for measure in grouped for change in _group_changes(data, measure, main)),
        group_levels=tuple(
            GroupLevel(measure=m.name, group=g, level=_level(_only(m, g), UNSTEERED, data.confidence))
            for m in grouped
            for g in dict.fromkeys(m.groups)
        ),
    )


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
    return [_change(measure, arm, difference, p) for (arm, measure), difference, p in zip(pairs, found, corrected, strict=True)]


def _group_changes(data: CostData, measure: Measure, arms: Sequence[CostArm]) -> list[Change]:
    parts = {group: _only(measure, group) for group in dict.fromkeys(measure.groups)}
    pairs = [(arm.name, group) for arm in arms if arm.name in measure.values for group in parts]
    found = [_difference(parts[group], arm, data) for arm, group in pairs]
    corrected = holm([difference.p_value for difference in found])
    return [
        _change(parts[group], arm, d, p).model_copy(update={"group": group, "level": _level(parts[group], arm, data.confidence)})
        for (arm, group), d, p in zip(pairs, found, corrected, strict=True)
    ]


def _only(measure: Measure, group: str) -> Measure:
    """Return the measure with one subject's items alone."""
    own = [i for i, name in enumerate(measure.groups) if name == group]
    return measure.model_copy(
        update={
            "items": tuple(measure.items[i] for i in own),
            "groups": (group,) * len(own),
            "tokens": tuple(measure.tokens[i] for i in own) if measure.tokens else (),
            "values": {arm: tuple(values[i] for i in own) for arm, values in measure.values.items()},
        }
    )


def _change(measure: Measure, arm: str, difference: PairedDifference, p_holm: float | None) -> Change:
    scale = width(measure)
    of_100 = None if scale is None or difference.mean is None else 100.0 * difference.mean / scale
    return Change(arm=arm, measure=measure.name, difference=difference, p_holm=p_holm, shown=shown(measure, difference), of_100=of_100)


def _bounded(data: CostData, change: Change, seen: Seen) -> Change:
    measure = next(m for m in data.measures if m.name == change.measure)
    bound = loss_bound(measure, seen.filled) if measure.role == "cost" else None
    return change.model_copy(update={"bound": None if bound is None or math.isinf(bound) else bound})


def shown(measure: Measure, difference: PairedDifference) -> Shown | None:
    """Return a difference in the unit in which a reader sees it; None where there is none, or a perplexity's ratio is too large to write."""
    if difference.mean is None:
        return None
    unit = unit_of(measure)
    value, low, high = (None if end is None else _in_unit(measure, unit, end) for end in (difference.mean, difference.low, difference.high))
    if value is None or math.isinf(value) or (high is not None and math.isinf(high)):
        return None
    return Shown(value=value, low=low, high=high, unit=unit)


def _in_unit(measure: Measure, unit: Unit, difference: float) -> float:
    if unit == "times":
        return ratio(difference)
    return 100.0 * difference if unit == "points" and width(measure) == 1.0 else difference


def unit_of(measure: Measure) -> Unit:
    """Return the unit in which a measure's changes are shown."""
    if measure.kind == "tokens":
        return "times" if measure.exponentiate else "nats a token"
    return "points" if measure.kind == "accuracy" or measure.scale in ((0.0, 1.0), (0.0, 100.0)) else ""


def _margin(data: CostData, measure: Measure, unsteered: float | None) -> Margin:
    limit, worse = limit_of(data, measure), -1.0 if measure.higher_is_better else 1.0
    loss = worse * limit * (width(measure) or 1.0)
    level = None if unsteered is None else unsteered * (1.0 + limit) if measure.exponentiate else unsteered + loss
    return Margin(
        measure=measure.name, limit=limit, level=level, shown=1.0 + limit if measure.exponentiate else _in_unit(measure, unit_of(measure), loss)
    )


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
