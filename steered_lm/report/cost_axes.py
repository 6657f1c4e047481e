"""Axes of a cost page's figures: what they show, how far they reach, and the lines across them."""

import math
from collections.abc import Sequence

from pydantic import JsonValue

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import CostArm, Measure
from steered_lm.report.cost_difference import Shown, unit_of
from steered_lm.report.figures import CYCLE, GREEN, ZERO, Json, style_axis

SOLE_HEIGHT = 330
_WIDE = 8.0


def margin_lines(analysis: CostAnalysis, measure: Measure, axis: str) -> list[JsonValue]:
    """Return what is accepted of a measure as a dashed line across an axis; none for what is no cost."""
    margin = analysis.margin(measure.name)
    return [] if margin is None else [across(axis, margin.shown, {"color": GREEN, "width": 2, "dash": "dash"})]


def across(axis: str, at: float, line: Json) -> Json:
    """Return a line across a figure at a value of an axis, ``x`` or ``y``."""
    other = "y" if axis == "x" else "x"
    return {"type": "line", f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1, f"{axis}0": at, f"{axis}1": at, "line": line}


def nothing(measure: Measure) -> float:
    """Return how no change is shown."""
    return 1.0 if measure.exponentiate else 0.0


def changes_span(analysis: CostAnalysis, measure: Measure, changes: Sequence[Shown], *, reverse: bool = False) -> Json:
    """Return an axis' extent with no change in it, what is accepted, and room around the longest interval."""
    margin = analysis.margin(measure.name)
    ends = [nothing(measure), *(v for one in changes for v in (one.value, one.low, one.high) if v is not None)]
    return span(measure, ends + ([] if margin is None else [margin.shown]), reverse=reverse)


def span(measure: Measure, ends: Sequence[float], *, reverse: bool = False) -> Json:
    """Return an axis' extent with room around what it shows; perplexities that differ much get a logarithmic one."""
    logarithmic = measure.exponentiate and min(ends) > 0.0 and max(ends) > _WIDE * min(ends)
    low, high = (math.log10(end) if logarithmic else end for end in (min(ends), max(ends)))
    room = 0.07 * ((high - low) or 1.0)
    extent: list[JsonValue] = [high + room, low - room] if reverse else [low - room, high + room]
    if not logarithmic:
        return {"range": extent}
    # plotly's own labels leave out the zeros between powers of ten
    decades = range(math.floor(low), math.ceil(high) + 1)
    return {
        "range": extent,
        "type": "log",
        "zeroline": False,
        "tickvals": [step * 10.0**k for k in decades for step in (1, 2, 5)],
        "tickformat": "~g",
    }


def change_axis(measure: Measure) -> Json:
    """Return the axis of a measure's changes, with their unit."""
    unit = unit_of(measure)
    said = {"points": "points", "times": "times the unsteered one", "nats a token": "nats a token", "": "on its own scale"}[unit]
    title = f"{measure.name}, {said}" if unit == "times" else f"change of {measure.name}, {said}"
    return style_axis(title, **({} if measure.exponentiate else ZERO))


def colours(series: dict[str, list[CostArm]]) -> list[str]:
    """Return a colour a series."""
    return [CYCLE[i % len(CYCLE)] for i in range(len(series))]


def spaced(name: str) -> str:
    """Return a name as captions write it."""
    return name.replace("_", " ")
