"""Numbers of a cost page in words, each with its unit: levels, changes, accepted and possible losses, and what is missing."""

from collections.abc import Sequence

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import SYSTEM, UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_difference import Change, Shown, unit_of
from steered_lm.report.cost_reach import ALL, Reach, limit_of
from steered_lm.report.wording import count, p_value, percent, plain, signed

_LISTED = 6


def limit_words(data: CostData, measure: Measure) -> str:
    """Return the loss that is accepted of a measure in words, ``2 points`` or ``5% growth``."""
    limit = limit_of(data, measure)
    if unit_of(measure) == "times":
        return f"{number(100.0 * limit)}% growth"
    if unit_of(measure) == "nats a token":
        return f"{number(limit)} nats a token"
    return f"{number(100.0 * limit)} points" if unit_of(measure) == "points" else f"{number(100.0 * limit)}% of the scale"


def loss_words(measure: Measure, loss: float | None) -> str:
    """Return a bound on a loss in the words of its tolerance; a dash for None."""
    if loss is None:
        return plain(None)
    unit = unit_of(measure)
    if unit == "nats a token":
        return f"{plain(loss, 3)} nats a token"
    return plain(100.0 * loss, 1 if abs(loss) < 10.0 else 0) + {"points": " points", "times": "% growth"}.get(unit, "% of the scale")


def change_words(change: Change | Shown | None) -> str:
    """Return a change with its interval, ``+31.0 (+27.0 to +35.0)`` or ``×1.12 (×1.08 to ×1.16)``; the number alone when it has none."""
    shown = change.shown if isinstance(change, Change) else change
    if shown is None:
        return plain(None)
    digits = {"points": 1, "times": 3, "nats a token": 3, "": 2}[shown.unit]
    ends = [f"×{_ratio(v)}" if shown.unit == "times" else signed(v, digits) for v in (shown.value, shown.low, shown.high)]
    return f"{ends[0]} (no interval)" if shown.low is None else f"{ends[0]} ({ends[1]} to {ends[2]})"


def _ratio(value: float | None) -> str:
    """Return a ratio with three digits near one, and with fewer where they would say nothing."""
    return plain(value, 3 if value is None or value < 10.0 else 1)


def against_words(change: Change) -> str:
    """Return a change with its unit, its number of items and its p-value."""
    unit = {"points": " points", "nats a token": " nats a token"}.get(change.shown.unit if change.shown else "", "")
    text = p_value(change.p_holm)
    p = f"corrected p {text if text.startswith('<') else f'= {text}'}"
    return f"{change_words(change)}{unit} against unsteered on {count(change.difference.n, 'item')}, {p}"


def write_level(measure: Measure, value: float | None) -> str:
    """Return a level as a reader sees it: shares as per cent, scores of 0-100 with one digit, others with two or three."""
    if value is None:
        return plain(None)
    if measure.kind == "accuracy" or measure.scale == (0.0, 1.0):
        return percent(value, 1)
    if measure.kind == "tokens":
        return plain(value, 3 if value < 10.0 else 1)
    return plain(value, 1 if measure.scale == (0.0, 100.0) else 2)


def level_words(data: CostData, analysis: CostAnalysis, arm: str, measure: Measure) -> str:
    """Return an arm's level without its interval, with its scale where it is no share."""
    level = analysis.level(arm, measure.name)
    return f"{write_level(measure, None if level is None else level.value)}{scale_words(measure)}"


def role_words(measure: Measure) -> str:
    """Return what a measure is to the reader: of a trait nobody says whether more of it is better."""
    if measure.role == "benefit" and measure.higher_is_better is None:
        return "trait: whether more or less of it is wanted, you know"
    return measure.role + (", lower is better" if measure.higher_is_better is False else "")


def scale_words(measure: Measure) -> str:
    """Return `` on its scale of 0 to 100``; nothing for shares and what has no scale."""
    if measure.scale is None or measure.scale == (0.0, 1.0):
        return ""
    return f" on its scale of {plain(measure.scale[0], 0)} to {plain(measure.scale[1], 0)}"


def why_words(data: CostData, analysis: CostAnalysis, reach: Reach) -> str:
    """Return why a series goes no further for one measure, with the numbers that decided it."""
    if reach.stopped_at is None or reach.stopped_arm is None:
        return "the sweep ends there"
    if reach.measure == ALL:
        return f"because of {', '.join(reach.blockers)}"
    measure = data.measure(reach.measure)
    change = analysis.change(reach.stopped_arm, measure.name)
    seen = "" if change is None else f"{noun(measure)} {change_words(change)}"
    if reach.why == "lost":
        return f"a loss was measured there: {seen}"
    if reach.why == "missing":
        if measure.kind == "tokens":
            missing = 0 if change is None else change.difference.missing
            return f"{count(missing, 'item')} missing there, and no worst value can be assumed of them ({seen} without them)"
        missing = lost_items(measure, reach.stopped_arm)
        worst = "" if reach.stopped_loss is None else f", up to {loss_words(measure, reach.stopped_loss)} may be lost"
        return f"{count(missing, 'item')} missing there, and with the worst assumed of them{worst} ({seen} without them)"
    if reach.why == "unmeasured":
        return "it was not measured there"
    if reach.why == "no interval":
        reason = "" if change is None else change.difference.reason or ""
        return f"there is no interval ({reason})"
    n = 0 if change is None else change.difference.n
    return f"{count(n, 'item')} are too few to exclude a loss beyond {limit_words(data, measure)}: {seen}"


def side_words(reach: Reach, reaches: Sequence[Reach]) -> str:
    """Return ``positive`` or ``negative`` where a series was swept to both sides of zero and one of them does not even begin; else nothing."""
    both = any((other.series, other.measure) == (reach.series, reach.measure) and other is not reach for other in reaches)
    return "" if not both or reach.stopped_at == 0.0 else "negative " if (reach.stopped_at or 0.0) < 0.0 else "positive "


def lost_items(measure: Measure, arm: str) -> int:
    """Return how many items an arm made missing: those that have a value under the unsteered model."""
    return sum(value is None and before is not None for value, before in zip(measure.values[arm], measure.values[UNSTEERED], strict=True))


def noun(measure: Measure) -> str:
    """Return what a number of change is called: of a perplexity it is a ratio."""
    return "perplexity" if measure.exponentiate else "change"


def missing_words(measure: Measure, arm: str) -> list[str]:
    """Return which items of an arm's row are missing and why, and how many values of its single responses are."""
    values, unsteered = measure.values[arm], measure.values[UNSTEERED]
    own = [value is None for value in values]
    others = sum(value is None and not gone for value, gone in zip(unsteered, own, strict=True))
    found = [f"{count(items, 'item')} ({reason})" for reason, items in measure.reasons.get(arm, {}).items()]
    if others and arm != UNSTEERED:
        found += [f"{count(others, 'item')} under unsteered alone"]
    judged = measure.judged.get(arm)
    if judged is not None and judged.missing:
        found.append(f"the values of {judged.missing} of {count(judged.responses, 'response')}")
    return found


def absent_words(measure: Measure, arm: CostArm) -> str:
    """Return why an arm has no values on a measure."""
    if measure.kind == "tokens" and not measure.exponentiate and not arm.steered:
        return "not measured: it is the distance that steering moves the model, and this arm is not steered"
    if measure.kind == "tokens" and SYSTEM in arm.settings:
        return "not measured: a plain text has no prompt that the system turn could be part of; a file of prompts and responses has"
    return "not measured"


def some(names: list[str]) -> str:
    """Return the first of several names, and how many more there are."""
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def number(value: float) -> str:
    """Return a number with no more digits than it needs."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
