"""How far a sweep can go before a measure may have lost more than is accepted."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from steered_lm.config import Config
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.stats import PairedDifference

ORDERED = ("alpha", "kl", "weight")
"""Swept settings whose distance from zero is how strongly a model is steered, by the first word of their names."""
ALL = "all of them"
Why = Literal["lost", "missing", "unmeasured", "no interval", "unclear"]


class Reach(Config):
    """How far a sweep can go before a measure may have lost more than is accepted.

    Attributes:
        measure: its name, or ``all of them``.
        x: the furthest value that is still within the tolerance, and so is every value before it; 0 when not even the first one is.
        stopped_at: the value where that ended; None when the sweep ended first.
        measured: whether a real loss was seen there: the interval of what was observed lies on the side of loss. If not, ``why`` says what else.
        loss: the bound on the loss at ``x``, in the tolerance's own unit; None at 0, and for ``all of them``.
        limit: the tolerance.
        arm: the arm at ``x``; None at 0.
        stopped_arm: the arm at ``stopped_at``.
        blockers: the measures that may have lost too much there.
        why: ``lost`` (measured); ``missing`` (what is there is within the tolerance, and the worst is assumed of what is missing);
            ``unmeasured`` (no item to compare); ``no interval``; ``unclear`` (the interval neither excludes zero nor a loss beyond the tolerance).
        stopped_loss: the bound on the loss at ``stopped_at``; None where there is none, and for ``all of them``.
    """

    series: str
    measure: str
    x: float
    stopped_at: float | None
    measured: bool
    loss: float | None
    limit: float
    arm: str | None = None
    stopped_arm: str | None = None
    blockers: tuple[str, ...] = ()
    why: Why | None = None
    stopped_loss: float | None = None


class Seen(NamedTuple):
    """A difference as it was observed, and with the worst value in place of each that steering made missing."""

    observed: PairedDifference
    filled: PairedDifference


def ordered(axis: str | None) -> bool:
    """Return whether a swept setting's distance from zero is how strongly the model is steered."""
    return axis is not None and axis.partition(" ")[0] in ORDERED


def reaches(data: CostData, series: str, arms: Sequence[CostArm], found: Mapping[tuple[str, str], Seen]) -> list[Reach]:
    """Return how far the series reaches on each side of zero, for each cost and for all of them together.

    Values are tested in order of their distance from zero, up to the first that fails. Such a fixed sequence needs no correction (Maurer,
    Hothorn & Lehmacher 1995), and that all costs are within their tolerances at once is an intersection-union test, which needs none either
    (Berger 1982, Technometrics 24:295). The bound is one end of the two-sided interval.
    """
    if data.axis is None or not ordered(data.axis):
        return []
    costs = [m for m in data.measures if m.role == "cost"]
    far = []
    for sign in (1.0, -1.0):
        way = sorted((arm for arm in arms if arm.x is not None and arm.x * sign > 0), key=lambda arm: abs(arm.x or 0.0))
        if way:
            # A weight of zero leaves other traits' weights where they are, and a clamp to zero still clamps: steps like any other.
            way = [arm for arm in arms if arm.x == 0.0 and (data.axis.startswith("weight") or arm.settings.get("operation") == "clamp")] + way
            own = [_reach(data, series, way, [measure], found) for measure in costs]
            far += [*own, *([_reach(data, series, way, costs, found)] if len(costs) > 1 else [])]
    return far


def _reach(data: CostData, series: str, way: Sequence[CostArm], costs: Sequence[Measure], found: Mapping[tuple[str, str], Seen]) -> Reach:
    alone = len(costs) == 1
    reach = Reach(
        series=series,
        measure=costs[0].name if alone else ALL,
        x=0.0,
        stopped_at=None,
        measured=False,
        loss=None,
        limit=limit_of(data, costs[0]) if alone else data.tolerance,
    )
    for arm in way:
        seen = [(measure, found.get((arm.name, measure.name))) for measure in costs]
        bounds = [loss_bound(measure, one and one.filled) for measure, one in seen]
        failed = [one for one, bound in zip(seen, bounds, strict=True) if bound is None or bound > limit_of(data, one[0])]
        bound = bounds[0] if alone else None
        if failed:
            whys = [_why(data, measure, one) for measure, one in failed]
            stop = {
                "stopped_at": arm.x,
                "stopped_arm": arm.name,
                "blockers": tuple(measure.name for measure, _ in failed),
                "why": next(why for why in ("lost", "missing", "unmeasured", "no interval", "unclear") if why in whys),
                "measured": "lost" in whys,
                "stopped_loss": None if bound is None or math.isinf(bound) else bound,
            }
            return reach.model_copy(update=stop)
        reach = reach.model_copy(update={"x": arm.x, "arm": arm.name, "loss": bound})
    return reach


def limit_of(data: CostData, measure: Measure) -> float:
    """Return the loss that is accepted of a measure, in its tolerance's own unit."""
    return data.perplexity_tolerance if measure.exponentiate else data.tolerance


def _why(data: CostData, measure: Measure, seen: Seen | None) -> Why:
    if seen is None or seen.observed.mean is None:
        return "unmeasured"
    bound = _bound(measure, seen.observed)
    if bound is not None and bound <= limit_of(data, measure):
        return "missing"
    if bound is None:
        return "no interval"
    low, high = seen.observed.low, seen.observed.high
    assert low is not None
    assert high is not None
    return "lost" if (high < 0.0 if measure.higher_is_better else low > 0.0) else "unclear"


def loss_bound(measure: Measure, difference: PairedDifference | None) -> float | None:
    """Return the most that may have been lost, by the interval: a share of the scale, of a perplexity its relative growth; None where nobody knows.

    Where all items changed by the same amount there is no interval, and that amount is the bound only when it is zero for every item, and
    there are as many items as an interval needs. A mean over tokens with missing items has no bound: there is no worst value to assume.
    """
    if difference is None or (difference.missing and measure.kind == "tokens"):
        return None
    return _bound(measure, difference)


def _bound(measure: Measure, difference: PairedDifference) -> float | None:
    low, high = difference.low, difference.high
    if low is None or high is None:
        enough = 2.0 / 2.0**difference.n <= 1.0 - difference.confidence + 1e-12
        return 0.0 if difference.mean == 0.0 and enough else None
    worst = -low if measure.higher_is_better else high
    if measure.kind == "tokens":
        return ratio(worst) - 1.0 if measure.exponentiate else worst
    return worst / (width(measure) or 1.0)


def width(measure: Measure) -> float | None:
    """Return how wide a measure's scale is; None where it has no ends."""
    if measure.kind == "accuracy":
        return 1.0
    return None if measure.scale is None or measure.kind == "tokens" else measure.scale[1] - measure.scale[0]


def ratio(nats: float) -> float:
    """Return ``exp(nats)``, infinite where it overflows."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
