"""The cost page's figures as plotly data, drawn from the numbers in the page's JSON and from nothing else."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import JsonValue

from steered_lm.report.cost_analysis import CostAnalysis, Shown, unit_of
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_matrix import side_effects
from steered_lm.report.cost_reach import ordered
from steered_lm.report.figures import CYCLE, GREEN, GREY, ZERO, Figure, Json, draw_bars, height_for, label, name_rows, style_axis, style_layout
from steered_lm.report.wording import plain, setting
from steered_lm.stats import Estimate

BANDS = ("0–20", "21–40", "41–60", "61–80", "81–100")
_BAND_COLOURS = ("#E5E7EB", "#B9D3E8", "#74A9CF", "#2B7BBA", "#08306B")
_BESIDE = ("top right", "bottom right", "top left", "bottom left")
_SOLE_HEIGHT = 330


class CostFigures(NamedTuple):
    """The page's figures by what they show; what was not measured has no figure."""

    curves: list[Figure]
    trades: list[Figure]
    kl: Figure | None
    side: Figure | None
    bands: list[Figure]

    @property
    def every(self) -> list[Figure]:
        """All of them."""
        return [*self.curves, *self.trades, *(figure for figure in (self.kl, self.side) if figure is not None), *self.bands]


def cost_figures(data: CostData, analysis: CostAnalysis) -> CostFigures:
    """Return the figures that the data can fill."""
    swept = data.axis is not None and any(arm.x is not None for arm in data.arms)
    draw = _curve if swept else _forest
    shown = [(i, m) for i, m in enumerate(data.measures) if m.name != "kl" or not swept]
    curves = [draw(f"measure-{i}", data, analysis, measure) for i, measure in shown]
    kl = next((_curve("kl", data, analysis, m) for m in data.measures if m.name == "kl"), None) if swept else None
    trades = [
        _trade(f"trade-{i}-{j}", data, analysis, benefit, cost)
        for i, benefit in enumerate(data.measures)
        if benefit.role == "benefit"
        for j, cost in enumerate(data.measures)
        if cost.role == "cost"
    ]
    bands = [_bands(f"bands-{i}", data, measure) for i, measure in enumerate(data.measures) if measure.bands]
    return CostFigures(
        curves=[figure for figure in curves if figure is not None],
        trades=[figure for figure in trades if figure is not None],
        kl=kl,
        side=side_effects(data, analysis),
        bands=bands,
    )


def _curve(name: str, data: CostData, analysis: CostAnalysis, measure: Measure) -> Figure | None:
    """Draw a measure's level against the swept setting, with its interval, the unsteered level and what is accepted."""
    drawn: list[Json] = []
    ends: list[float | None] = []
    series = data.series
    for (title, arms), colour in zip(series.items(), _colours(series), strict=True):
        found = [(arm.x, analysis.level(arm.name, measure.name)) for arm in arms if arm.x is not None]
        known = [(x, one) for x, one in found if one is not None and one.value is not None]
        drawn += [_band([(x, one.low, one.high) for x, one in run], colour) for run in _runs(known)]
        ends += [end for _, one in known for end in (one.value, one.low, one.high)]
        if known:
            line: Json = {"color": colour, "width": 2.5 if ordered(data.axis) else 1, "dash": "solid" if ordered(data.axis) else "dot"}
            drawn.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": [x for x, _ in found],
                    "y": [None if one is None else one.value for _, one in found],
                    "connectgaps": False,
                    "line": line,
                    "marker": {"color": colour, "size": 8},
                    "name": html.escape(title),
                    "hovertemplate": f"%{{y:{'.1%' if _share(measure) else '.3g'}}} at %{{x}}<extra>%{{fullData.name}}</extra>",
                }
            )
    if not drawn:
        return None
    y = style_axis(_levels_title(measure), **({"tickformat": ".0%"} if _share(measure) else {}))
    if measure.exponentiate and _wide(analysis, measure):
        y |= {"type": "log", "dtick": "D2"}
    else:
        unsteered, margin = analysis.level(UNSTEERED, measure.name), analysis.margin(measure.name)
        ends += [None if unsteered is None else unsteered.value, None if margin is None else margin.level]
        y |= {"range": _room([end for end in ends if end is not None])}
    layout = style_layout(_SOLE_HEIGHT + (24 * len(series) if len(series) > 1 else 0), x=style_axis(data.axis or ""), y=y)
    layout |= {"showlegend": len(series) > 1, "shapes": _references(analysis, measure)}
    alt = f"{_spaced(measure.name)} against {data.axis}, with {data.confidence:.0%} intervals; dashed: the unsteered model"
    alt += "; green: loss within the tolerance." if measure.role == "cost" else "."
    return Figure(name=name, alt=alt, data=drawn, layout=layout)


def _references(analysis: CostAnalysis, measure: Measure) -> list[JsonValue]:
    """Return the unsteered level as a dashed line, and of a cost the band of accepted losses below (or above) it."""
    unsteered, margin = analysis.level(UNSTEERED, measure.name), analysis.margin(measure.name)
    if unsteered is None or unsteered.value is None:
        return []
    across: Json = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    shapes: list[JsonValue] = []
    if margin is not None and margin.level is not None:
        fill: Json = {"type": "rect", "y0": unsteered.value, "y1": margin.level, "fillcolor": GREEN, "opacity": 0.16, "line": {"width": 0}}
        shapes.append(across | fill)
    shapes.append(across | {"type": "line", "y0": unsteered.value, "y1": unsteered.value, "line": {"color": "#111827", "width": 1.5, "dash": "dash"}})
    return shapes


def _runs(known: Sequence[tuple[float, Estimate]]) -> list[list[tuple[float, Estimate]]]:
    """Split points into runs of neighbours that have intervals."""
    runs: list[list[tuple[float, Estimate]]] = [[]]
    for x, one in known:
        if one.low is None:
            runs.append([])
        else:
            runs[-1].append((x, one))
    return [run for run in runs if run]


def _band(run: Sequence[tuple[float, float | None, float | None]], colour: str) -> Json:
    """Draw a run's intervals as one area; a single point's becomes a line."""
    x: list[JsonValue] = [*(x for x, _, _ in run), *(x for x, _, _ in reversed(run))]
    y: list[JsonValue] = [*(low for _, low, _ in run), *(high for _, _, high in reversed(run))]
    line: Json = {"color": colour, "width": 0.5 if len(run) > 1 else 3}
    look: Json = {"fill": "toself", "fillcolor": _faint(colour), "line": line, "hoverinfo": "skip", "showlegend": False}
    return look | {"type": "scatter", "mode": "lines", "x": x, "y": y}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _forest(name: str, data: CostData, analysis: CostAnalysis, measure: Measure) -> Figure | None:
    """Draw every arm's change of a measure as a point with an interval, around the unsteered model."""
    found = [(arm, analysis.change(arm.name, measure.name)) for arm in data.arms if arm.series is not None]
    known = [(label(arm.name, 24), change.shown) for arm, change in found if change is not None and change.shown is not None]
    if not known:
        return None
    colour = CYCLE[0]
    dots: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [shown.value for _, shown in known],
        "y": [row for row, _ in known],
        "marker": {"color": colour, "size": 10},
        "name": "steered minus unsteered",
        "hovertemplate": "%{x:.3g}<extra>%{y}</extra>",
    }
    x = _change_axis(measure) | {"range": _range(analysis, measure, [shown for _, shown in known])}
    rows = name_rows([row for row, _ in known]) | {"autorange": False, "range": [len(known) - 0.5, -0.5]}
    layout = style_layout(height_for([row for row, _ in known]), x=x, y=rows)
    layout |= {"showlegend": False, "shapes": _margin_lines(analysis, measure, "x")}
    alt = f"Change of {_spaced(measure.name)} by each spec, with {data.confidence:.0%} intervals"
    alt += "; dashed green: the loss that is accepted." if measure.role == "cost" else "."
    return Figure(name=name, alt=alt, data=[draw_bars([(row, one.low, one.high) for row, one in known], colour), dots], layout=layout)


def _trade(name: str, data: CostData, analysis: CostAnalysis, benefit: Measure, cost: Measure) -> Figure | None:
    """Draw what is gained on one measure against what is lost on another, joined in order of the swept setting."""
    drawn: list[Json] = []
    every: list[tuple[Shown, Shown]] = []
    series = data.series
    for (title, arms), colour in zip(series.items(), _colours(series), strict=True):
        points = [(arm, *_both(analysis, arm, benefit, cost)) for arm in arms]
        known = [(arm, gain, loss) for arm, gain, loss in points if gain is not None and loss is not None]
        if known:
            every += [(gain, loss) for _, gain, loss in known]
            drawn += [*_crosses(every[-len(known) :], colour), _path(title, known, colour, joined=ordered(data.axis))]
    if not drawn:
        return None
    origin: Json = {"type": "scatter", "mode": "markers", "x": [_nothing(benefit)], "y": [_nothing(cost)], "name": "unsteered"}
    drawn.append(origin | {"marker": {"color": GREY, "size": 10, "symbol": "diamond"}, "hovertemplate": "unsteered<extra></extra>"})
    x = _change_axis(benefit) | {"range": _range(analysis, benefit, [gain for gain, _ in every])}
    span = _range(analysis, cost, [loss for _, loss in every])
    y = _change_axis(cost) | {"range": span if cost.higher_is_better else span[::-1]}
    layout = style_layout(_SOLE_HEIGHT + 60 + 20 * len(series), x=x, y=y)
    layout |= {"shapes": [*_margin_lines(analysis, cost, "y"), *_unit_lines(benefit, cost)]}
    labelled = f"each point is labelled with its {data.axis}" if data.axis else "one point a spec"
    alt = (
        f"Change of {_spaced(cost.name)} against change of {_spaced(benefit.name)}, {labelled}, lines are {data.confidence:.0%} intervals; "
        "further up is better, and dashed green is the loss that is accepted."
    )
    return Figure(name=name, alt=alt, data=drawn, layout=layout)


def _both(analysis: CostAnalysis, arm: CostArm, benefit: Measure, cost: Measure) -> tuple[Shown | None, Shown | None]:
    gain, loss = analysis.change(arm.name, benefit.name), analysis.change(arm.name, cost.name)
    return None if gain is None else gain.shown, None if loss is None else loss.shown


def _crosses(known: Sequence[tuple[Shown, Shown]], colour: str) -> list[Json]:
    """Draw the intervals in both directions through each point; None breaks the line."""
    found: list[Json] = []
    for across in (True, False):
        x: list[JsonValue] = []
        y: list[JsonValue] = []
        for gain, loss in known:
            own = gain if across else loss
            if own.low is not None and own.high is not None:
                x += [own.low, own.high, None] if across else [gain.value, gain.value, None]
                y += [loss.value, loss.value, None] if across else [own.low, own.high, None]
        line: Json = {"color": colour, "width": 1.2}
        found.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "opacity": 0.55, "showlegend": False, "hoverinfo": "skip"})
    return found


def _path(title: str, known: Sequence[tuple[CostArm, Shown, Shown]], colour: str, *, joined: bool) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "x": [gain.value for _, gain, _ in known],
        "y": [loss.value for _, _, loss in known],
        "text": [setting(arm.x) for arm, _, _ in known],
        "textposition": _BESIDE[CYCLE.index(colour) % len(_BESIDE)],
        "textfont": {"size": 12, "color": colour},
        "cliponaxis": False,
        "line": {"color": colour, "width": 2 if joined else 1, "dash": "solid" if joined else "dot"},
        "marker": {"color": colour, "size": 8},
        "name": html.escape(title),
        "hovertext": [html.escape(arm.name) for arm, _, _ in known],
        "hovertemplate": "%{hovertext}: %{x:.3g}, %{y:.3g}<extra></extra>",
    }


def _margin_lines(analysis: CostAnalysis, measure: Measure, axis: str) -> list[JsonValue]:
    margin = analysis.margin(measure.name)
    return [] if margin is None else [_across(axis, margin.shown, {"color": GREEN, "width": 2, "dash": "dash"})]


def _unit_lines(benefit: Measure, cost: Measure) -> list[JsonValue]:
    """Return the line of no change for ratios, whose axis is not drawn at zero."""
    ratios = [axis for axis, measure in (("x", benefit), ("y", cost)) if measure.exponentiate]
    return [_across(axis, 1.0, {"color": "#111827", "width": 1.5}) for axis in ratios]


def _across(axis: str, at: float, line: Json) -> Json:
    other = "y" if axis == "x" else "x"
    return {"type": "line", f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1, f"{axis}0": at, f"{axis}1": at, "line": line}


def _nothing(measure: Measure) -> float:
    """Return how no change is shown."""
    return 1.0 if measure.exponentiate else 0.0


def _range(analysis: CostAnalysis, measure: Measure, changes: Sequence[Shown]) -> list[JsonValue]:
    """Return an axis range with no change in it, what is accepted, and room around the longest interval."""
    margin = analysis.margin(measure.name)
    ends = [_nothing(measure), *(v for one in changes for v in (one.value, one.low, one.high) if v is not None)]
    ends += [] if margin is None else [margin.shown]
    return _room(ends)


def _room(ends: Sequence[float]) -> list[JsonValue]:
    """Return an axis range with some room around what it shows."""
    room = 0.07 * ((max(ends) - min(ends)) or 1.0)
    return [min(ends) - room, max(ends) + room]


def _change_axis(measure: Measure) -> Json:
    unit = unit_of(measure)
    said = {"points": "points", "times": "times the unsteered one", "nats a token": "nats a token", "": "on its own scale"}[unit]
    title = f"{measure.name}, {said}" if unit == "times" else f"change of {measure.name}, {said}"
    return style_axis(title, **({} if measure.exponentiate else ZERO))


def _bands(name: str, data: CostData, measure: Measure) -> Figure:
    """Draw how an arm's responses spread over the five bands of the trait's score."""
    arms = [arm for arm in data.arms if arm.name in measure.bands]
    rows = [label(f"{arm.trait} vector" if arm.trait else arm.name) for arm in arms]
    drawn: list[Json] = [
        {
            "type": "bar",
            "orientation": "h",
            "y": list(rows),
            "x": [measure.bands[arm.name][i] if i < len(measure.bands[arm.name]) else None for arm in arms],
            "name": band,
            "marker": {"color": _BAND_COLOURS[i]},
            "hovertemplate": "%{x:.0%} score %{fullData.name}<extra>%{y}</extra>",
        }
        for i, band in enumerate(BANDS)
    ]
    x = style_axis("share of scored responses", tickformat=".0%", range=[0, 1])
    layout = style_layout(height_for(rows), x=x, y=name_rows(rows)) | {"barmode": "stack", "bargap": 0.3}
    layout |= {
        "margin": {"l": 8, "r": 12, "t": 34, "b": 14},
        "legend": {"traceorder": "normal", "orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom"},
    }
    return Figure(name=name, alt=f"Bands of the scores of {_spaced(measure.name)}, from 0–20 (light) to 81–100 (dark).", data=drawn, layout=layout)


def _colours(series: dict[str, list[CostArm]]) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(len(series))]


def _share(measure: Measure) -> bool:
    return unit_of(measure) == "points" and (measure.kind == "accuracy" or measure.scale == (0.0, 1.0))


def _levels_title(measure: Measure) -> str:
    if measure.kind == "tokens" and not measure.exponentiate:
        return f"{measure.name}, nats a token"
    return (
        measure.name if measure.scale is None or _share(measure) else f"{measure.name} ({plain(measure.scale[0], 0)} to {plain(measure.scale[1], 0)})"
    )


def _wide(analysis: CostAnalysis, measure: Measure) -> bool:
    """Return whether the levels need a logarithmic axis."""
    values = [one.level.value for one in analysis.levels if one.measure == measure.name and one.level.value]
    return bool(values) and max(values) > 10.0 * min(values)


def _spaced(name: str) -> str:
    return name.replace("_", " ")
