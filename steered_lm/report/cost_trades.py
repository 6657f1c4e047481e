"""What is gained on one measure against what is lost on another, as figures of a cost page."""

import html
import math
from collections.abc import Sequence

from pydantic import JsonValue

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_axes import SOLE_HEIGHT, across, change_axis, changes_span, colours, margin_lines, nothing, spaced
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.report.cost_difference import Shown
from steered_lm.report.cost_reach import ordered, width
from steered_lm.report.figures import CYCLE, GREY, Figure, Json, style_layout
from steered_lm.report.wording import setting

MOST = 4
"""So many benefits are drawn against the costs at most."""
_BESIDE = {"top right": (1, 1), "bottom right": (1, -1), "top left": (-1, 1), "bottom left": (-1, -1)}


def trades(data: CostData, analysis: CostAnalysis) -> list[Figure]:
    """Return each benefit that is drawn against each cost; a cost that is judged of one benefit's responses, against that one alone."""
    shown = drawn_benefits(data, analysis)
    found = [
        _trade(f"trade-{i}-{j}", data, analysis, benefit, cost)
        for i, benefit in enumerate(data.measures)
        if benefit in shown
        for j, cost in enumerate(data.measures)
        if cost.role == "cost" and cost.beside in (None, benefit.name)
    ]
    return [figure for figure in found if figure is not None]


def drawn_benefits(data: CostData, analysis: CostAnalysis) -> list[Measure]:
    """Return the benefits that are drawn against costs: all, or of many those that moved most, established changes before others."""
    benefits = data.of_role("benefit")
    if len(benefits) <= MOST:
        return benefits
    return sorted(benefits, key=lambda measure: moved(analysis, measure), reverse=True)[:MOST]


def moved(analysis: CostAnalysis, measure: Measure) -> tuple[bool, float]:
    """Return whether any change of a measure is established, and how large the largest such one is (else: the largest), in widths of its scale."""
    changes = [change for change in analysis.changes if change.measure == measure.name]
    clear = [change for change in changes if change.direction]
    return bool(clear), max((abs(c.difference.mean or 0.0) / (width(measure) or 1.0) for c in clear or changes), default=0.0)


def _trade(name: str, data: CostData, analysis: CostAnalysis, benefit: Measure, cost: Measure) -> Figure | None:
    """Draw what is gained on one measure against what is lost on another, joined in order of the swept setting."""
    drawn: list[Json] = []
    every: list[tuple[Shown, Shown]] = []
    paths: list[tuple[str, list[tuple[CostArm, Shown, Shown]], str]] = []
    series = data.series
    for (title, arms), colour in zip(series.items(), colours(series), strict=True):
        points = [(arm, *_both(analysis, arm, benefit, cost)) for arm in arms]
        known = [(arm, gain, loss) for arm, gain, loss in points if gain is not None and loss is not None]
        if known:
            every += [(gain, loss) for _, gain, loss in known]
            drawn += _crosses(every[-len(known) :], colour)
            paths.append((title, known, colour))
    if not paths:
        return None
    x = change_axis(benefit) | changes_span(analysis, benefit, [gain for gain, _ in every])
    y = change_axis(cost) | changes_span(analysis, cost, [loss for _, loss in every], reverse=not cost.higher_is_better)
    drawn += [_path(title, known, colour, _corners(known, x, y, colour), joined=ordered(data.axis)) for title, known, colour in paths]
    origin: Json = {"type": "scatter", "mode": "markers", "x": [nothing(benefit)], "y": [nothing(cost)], "name": "unsteered"}
    drawn.append(origin | {"marker": {"color": GREY, "size": 10, "symbol": "diamond"}, "hovertemplate": "unsteered<extra></extra>"})
    layout = style_layout(SOLE_HEIGHT + 60 + 20 * len(series), x=x, y=y)
    layout |= {"shapes": [*margin_lines(analysis, cost, "y"), *_unit_lines(benefit, cost)]}
    labelled = f"each point is labelled with its {data.axis}" if data.axis else "one point a spec"
    alt = (
        f"Change of {spaced(cost.name)} against change of {spaced(benefit.name)}, {labelled}, lines are {data.confidence:.0%} intervals; "
        "further up is better, and dashed green is the loss that is accepted."
    )
    return Figure(name=name, alt=alt, data=drawn, layout=layout)


def _both(analysis: CostAnalysis, arm: CostArm, benefit: Measure, cost: Measure) -> tuple[Shown | None, Shown | None]:
    gain, loss = analysis.change(arm.name, benefit.name), analysis.change(arm.name, cost.name)
    return None if gain is None else gain.shown, None if loss is None else loss.shown


def _crosses(known: Sequence[tuple[Shown, Shown]], colour: str) -> list[Json]:
    """Draw the intervals in both directions through each point; None breaks the line."""
    found: list[Json] = []
    for sideways in (True, False):
        x: list[JsonValue] = []
        y: list[JsonValue] = []
        for gain, loss in known:
            own = gain if sideways else loss
            if own.low is not None and own.high is not None:
                x += [own.low, own.high, None] if sideways else [gain.value, gain.value, None]
                y += [loss.value, loss.value, None] if sideways else [own.low, own.high, None]
        line: Json = {"color": colour, "width": 1.2}
        found.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "opacity": 0.55, "showlegend": False, "hoverinfo": "skip"})
    return found


def _corners(known: Sequence[tuple[CostArm, Shown, Shown]], x: Json, y: Json, colour: str) -> list[JsonValue]:
    """Return on which side of each point its label is out of the way of the lines to its neighbours."""
    places = [(_place(gain.value, x), _place(loss.value, y)) for _, gain, loss in known]
    first = CYCLE.index(colour) % len(_BESIDE)
    order = [*_BESIDE.items()][first:] + [*_BESIDE.items()][:first]
    found: list[JsonValue] = []
    for here, before, after in zip(places, [None, *places], [*places[1:], None], strict=False):
        ways = [(other[0] - here[0], other[1] - here[1]) for other in (before, after) if other is not None and other != here]
        inwards = {name: max([(right * dx + up * dy) / math.hypot(dx, dy) for dx, dy in ways], default=0.0) for name, (right, up) in order}
        found.append(min(inwards, key=lambda name: round(inwards[name], 6)))
    return found


def _place(value: float, axis: Json) -> float:
    """Return where a value lies on an axis, 0 at its beginning and 1 at its end."""
    ends = axis["range"]
    assert isinstance(ends, list)
    start, end = (float(str(end)) for end in ends)
    at = math.log10(value) if axis.get("type") == "log" else value
    return (at - start) / (end - start)


def _path(title: str, known: Sequence[tuple[CostArm, Shown, Shown]], colour: str, corners: list[JsonValue], *, joined: bool) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "x": [gain.value for _, gain, _ in known],
        "y": [loss.value for _, _, loss in known],
        "text": [setting(arm.x) for arm, _, _ in known],
        "textposition": corners,
        "textfont": {"size": 12, "color": colour},
        "cliponaxis": False,
        "line": {"color": colour, "width": 2 if joined else 1, "dash": "solid" if joined else "dot"},
        "marker": {"color": colour, "size": 8},
        "name": html.escape(title),
        "hovertext": [html.escape(arm.name) for arm, _, _ in known],
        "hovertemplate": "%{hovertext}: %{x:.3g}, %{y:.3g}<extra></extra>",
    }


def _unit_lines(benefit: Measure, cost: Measure) -> list[JsonValue]:
    """Return the line of no change for ratios, whose axis is not drawn at zero."""
    ratios = [axis for axis, measure in (("x", benefit), ("y", cost)) if measure.exponentiate]
    return [across(axis, 1.0, {"color": "#111827", "width": 1.5}) for axis in ratios]
