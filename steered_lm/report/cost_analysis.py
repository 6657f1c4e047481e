"""What steering buys and costs, paired by item: levels, differences, how far one can go, and side effects."""

import math
from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.measure.means import exponentiated
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_difference import Change, change_of, difference_of, in_unit, token_mean, unit_of
from steered_lm.report.cost_match import Match, matches
from steered_lm.report.cost_reach import Reach, Seen, limit_of, loss_bound, reaches, width
from steered_lm.stats import Estimate, PairedDifference, holm, mean_interval, share_interval


class Level(Config):
    """One arm's level on one measure; of a perplexity, the perplexity."""

    arm: str
    measure: str
    level: Estimate


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
    matches: tuple[Match, ...] = ()

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
        matches=tuple(matches(data)),
    )


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
    found = [difference_of(measure, arm, data) for arm, measure in pairs]
    corrected = holm([difference.p_value for difference in found])
    return [change_of(measure, arm, difference, p) for (arm, measure), difference, p in zip(pairs, found, corrected, strict=True)]


def _group_changes(data: CostData, measure: Measure, arms: Sequence[CostArm]) -> list[Change]:
    parts = {group: _only(measure, group) for group in dict.fromkeys(measure.groups)}
    pairs = [(arm.name, group) for arm in arms if arm.name in measure.values for group in parts]
    found = [difference_of(parts[group], arm, data) for arm, group in pairs]
    corrected = holm([difference.p_value for difference in found])
    return [
        change_of(parts[group], arm, d, p).model_copy(update={"group": group, "level": _level(parts[group], arm, data.confidence)})
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


def _bounded(data: CostData, change: Change, seen: Seen) -> Change:
    measure = next(m for m in data.measures if m.name == change.measure)
    bound = loss_bound(measure, seen.filled) if measure.role == "cost" else None
    return change.model_copy(update={"bound": None if bound is None or math.isinf(bound) else bound})


def _margin(data: CostData, measure: Measure, unsteered: float | None) -> Margin:
    limit, worse = limit_of(data, measure), -1.0 if measure.higher_is_better else 1.0
    loss = worse * limit * (width(measure) or 1.0)
    level = None if unsteered is None else unsteered * (1.0 + limit) if measure.exponentiate else unsteered + loss
    return Margin(
        measure=measure.name, limit=limit, level=level, shown=1.0 + limit if measure.exponentiate else in_unit(measure, unit_of(measure), loss)
    )


def _worst_case(data: CostData, change: Change) -> PairedDifference:
    """Return the difference with the worst value in place of each that steering made missing; what has no worst value stays missing."""
    measure = next(m for m in data.measures if m.name == change.measure)
    if measure.role != "cost" or measure.kind == "tokens" or not change.difference.missing:
        return change.difference
    low, high = measure.scale or (0.0, 1.0)
    worst = low if measure.higher_is_better else high
    filled = tuple(worst if value is None else value for value in measure.values[change.arm])
    return difference_of(measure.model_copy(update={"values": measure.values | {change.arm: filled}}), change.arm, data)
