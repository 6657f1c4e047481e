"""Steered against trained against prompted, where each shows a trait about equally strongly: what does it cost each of them?"""

from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.report.cost_difference import Change, change_of, difference_of
from steered_lm.stats import holm

NEAR = 0.05
"""How far apart two scores of a trait may be, as a share of its scale, to be called about equal."""


class Match(Config):
    """An arm that is not steered (trained, or prompted), and the steered arm whose score of a trait is nearest to its own.

    Attributes:
        benefit: the score by which they are matched.
        arm: the arm that is not steered.
        steered: the nearest steered arm of a series, or the unsteered model where that is nearer.
        near: whether the two means are at most 5 % of the scale apart.
        gap: steered minus ``arm`` on that score.
        costs: steered minus ``arm`` on every cost that both have; corrected over all matches.
    """

    benefit: str
    arm: str
    steered: str
    near: bool
    gap: Change
    costs: tuple[Change, ...]


def matches(data: CostData) -> list[Match]:
    """Return a match for every benefit, every arm that is not steered and every series of steered ones.

    Items are paired as everywhere: both arms answered the same ones.
    """
    others = [arm for arm in data.arms if arm.series is not None and not arm.steered]
    series = {name: arms for name, arms in data.series.items() if all(arm.steered for arm in arms)}
    costs = [measure for measure in data.measures if measure.role == "cost"]
    found = []
    unsteered = data.arms[0]
    for benefit in (measure for measure in data.measures if measure.role == "benefit" and measure.scale is not None):
        for other in (arm for arm in others if arm.name in benefit.values):
            for arms in series.values():
                nearest = _nearest(data, benefit, other, [unsteered, *arms])
                if nearest is not None:
                    found.append(_match(data, benefit, other, nearest, costs))
    corrected = iter(holm([change.difference.p_value for match in found for change in match.costs]))
    return [
        match.model_copy(update={"costs": tuple(change.model_copy(update={"p_holm": next(corrected)}) for change in match.costs)}) for match in found
    ]


def _nearest(data: CostData, benefit: Measure, other: CostArm, arms: Sequence[CostArm]) -> CostArm | None:
    gaps = {arm.name: difference_of(benefit, arm.name, data, other.name).mean for arm in arms if arm.name in benefit.values}
    known = [arm for arm in arms if gaps.get(arm.name) is not None]
    return min(known, key=lambda arm: abs(gaps[arm.name] or 0.0)) if known else None


def _match(data: CostData, benefit: Measure, other: CostArm, steered: CostArm, costs: Sequence[Measure]) -> Match:
    gap = change_of(benefit, steered.name, difference_of(benefit, steered.name, data, other.name), None)
    assert benefit.scale is not None
    width = benefit.scale[1] - benefit.scale[0]
    near = gap.difference.mean is not None and abs(gap.difference.mean) <= NEAR * width
    changes = [
        change_of(measure, steered.name, difference_of(measure, steered.name, data, other.name), None)
        for measure in costs
        if {other.name, steered.name} <= set(measure.values)
    ]
    return Match(benefit=benefit.name, arm=other.name, steered=steered.name, near=near, gap=gap, costs=tuple(changes))
