"""One arm against another on one measure, paired by item, in the unit in which a reader sees it."""

import math
from typing import Literal

from steered_lm.config import Config
from steered_lm.measure.means import TokenMean
from steered_lm.report.cost_data import UNSTEERED, CostData, Measure
from steered_lm.report.cost_reach import ratio, width
from steered_lm.stats import Estimate, PairedDifference, mcnemar_paired, paired_difference

Unit = Literal["points", "times", "nats a token", ""]


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

    @property
    def direction(self) -> int:
        """1 for an established rise, -1 for an established fall, 0 where neither is established."""
        d = self.difference
        if not self.established or d.mean is None or d.low is None:
            return 0
        return 1 if d.mean > 0.0 else -1


def difference_of(measure: Measure, arm: str, data: CostData, baseline: str = UNSTEERED) -> PairedDifference:
    """Return an arm minus another one on a measure, paired by item."""
    if measure.kind == "tokens":
        return token_mean(measure, arm).minus(token_mean(measure, baseline), confidence=data.confidence, seed=data.seed)
    steered, other = measure.values[arm], measure.values[baseline]
    if measure.kind == "accuracy":
        return mcnemar_paired(steered, other, confidence=data.confidence)
    return paired_difference(steered, other, confidence=data.confidence, seed=data.seed)


def change_of(measure: Measure, arm: str, difference: PairedDifference, p_holm: float | None) -> Change:
    """Return a difference on a measure with what a reader needs."""
    scale = width(measure)
    of_100 = None if scale is None or difference.mean is None else 100.0 * difference.mean / scale
    return Change(arm=arm, measure=measure.name, difference=difference, p_holm=p_holm, shown=shown(measure, difference), of_100=of_100)


def shown(measure: Measure, difference: PairedDifference) -> Shown | None:
    """Return a difference in the unit in which a reader sees it; None where there is none, or a perplexity's ratio is too large to write."""
    if difference.mean is None:
        return None
    unit = unit_of(measure)
    value, low, high = (None if end is None else in_unit(measure, unit, end) for end in (difference.mean, difference.low, difference.high))
    if value is None or math.isinf(value) or (high is not None and math.isinf(high)):
        return None
    return Shown(value=value, low=low, high=high, unit=unit)


def in_unit(measure: Measure, unit: Unit, difference: float) -> float:
    """Return a difference in the unit in which it is shown."""
    if unit == "times":
        return ratio(difference)
    return 100.0 * difference if unit == "points" and width(measure) == 1.0 else difference


def unit_of(measure: Measure) -> Unit:
    """Return the unit in which a measure's changes are shown."""
    if measure.kind == "tokens":
        return "times" if measure.exponentiate else "nats a token"
    return "points" if measure.kind == "accuracy" or measure.scale in ((0.0, 1.0), (0.0, 100.0)) else ""


def token_mean(measure: Measure, arm: str) -> TokenMean:
    """Return an arm's mean over tokens."""
    return TokenMean(items=measure.items, totals=measure.values[arm], tokens=measure.tokens)
