"""The cost page's figures as plotly data, drawn from the numbers in the page's JSON and from nothing else."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import JsonValue

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_axes import SOLE_HEIGHT, change_axis, changes_span, colours, margin_lines, spaced, span
from steered_lm.report.cost_data import UNSTEERED, CostData, Measure
from steered_lm.report.cost_difference import unit_of
from steered_lm.report.cost_matrix import side_effects
from steered_lm.report.cost_reach import ordered
from steered_lm.report.cost_trades import MOST, moved, trades
from steered_lm.report.figures import CYCLE, GREEN, Figure, Json, draw_bars, height_for, label, name_rows, style_axis, style_layout
from steered_lm.report.wording import plain
from steered_lm.stats import Estimate

BANDS = ("0–20", "21–40", "41–60", "61–80", "81–100")
_BAND_COLOURS = ("#E5E7EB", "#B9D3E8", "#74A9CF", "#2B7BBA", "#08306B")
_ORDER = ("benefit", "cost", "note")


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
    curves = [draw(f"measure-{i}", data, analysis, m) for i, m in sorted(shown, key=lambda one: _place(data, analysis, one[1]))]
    kl = next((_curve("kl", data, analysis, m) for m in data.measures if m.name == "kl"), None) if swept else None
    bands = [_bands(f"bands-{i}", data, measure) for i, measure in enumerate(data.measures) if measure.bands]
    return CostFigures(
        curves=[figure for figure in curves if figure is not None],
        trades=trades(data, analysis),
        kl=kl,
        side=side_effects(data, analysis),
        bands=bands,
    )


def _place(data: CostData, analysis: CostAnalysis, measure: Measure) -> tuple[int, bool]:
    """Return where a measure is drawn: benefits, costs, notes; of many benefits those that did not move come after the costs."""
    still = not moved(analysis, measure)[0]
    if len(data.of_role("benefit")) <= MOST or measure.role == "note":
        return 3 * _ORDER.index(measure.role), False
    return (2 if still else 0, False) if measure.role == "benefit" else (1, still)


def _curve(name: str, data: CostData, analysis: CostAnalysis, measure: Measure) -> Figure | None:
    """Draw a measure's level against the swept setting, with its interval, the unsteered level and what is accepted."""
    drawn: list[Json] = []
    ends: list[float | None] = []
    series = data.series
    for (title, arms), colour in zip(series.items(), colours(series), strict=True):
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
    unsteered, margin = analysis.level(UNSTEERED, measure.name), analysis.margin(measure.name)
    ends += [None if unsteered is None else unsteered.value, None if margin is None else margin.level]
    y |= span(measure, [end for end in ends if end is not None])
    layout = style_layout(SOLE_HEIGHT + (24 * len(series) if len(series) > 1 else 0), x=style_axis(data.axis or ""), y=y)
    layout |= {"showlegend": len(series) > 1, "shapes": _references(analysis, measure)}
    alt = f"{spaced(measure.name)} against {data.axis}, with {data.confidence:.0%} intervals; dashed: the unsteered model"
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
    x = change_axis(measure) | changes_span(analysis, measure, [shown for _, shown in known])
    rows = name_rows([row for row, _ in known]) | {"autorange": False, "range": [len(known) - 0.5, -0.5]}
    layout = style_layout(height_for([row for row, _ in known]), x=x, y=rows)
    layout |= {"showlegend": False, "shapes": margin_lines(analysis, measure, "x")}
    alt = f"Change of {spaced(measure.name)} by each spec, with {data.confidence:.0%} intervals"
    alt += "; dashed green: the loss that is accepted." if measure.role == "cost" else "."
    return Figure(name=name, alt=alt, data=[draw_bars([(row, one.low, one.high) for row, one in known], colour), dots], layout=layout)


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
    x = style_axis(f"share of scored responses, {measure.name}", tickformat=".0%", range=[0, 1])
    layout = style_layout(height_for(rows), x=x, y=name_rows(rows)) | {"barmode": "stack", "bargap": 0.3}
    layout |= {
        "margin": {"l": 8, "r": 12, "t": 34, "b": 14},
        "legend": {"traceorder": "normal", "orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom"},
    }
    return Figure(name=name, alt=f"Bands of the scores of {spaced(measure.name)}, from 0–20 (light) to 81–100 (dark).", data=drawn, layout=layout)


def _share(measure: Measure) -> bool:
    return unit_of(measure) == "points" and (measure.kind == "accuracy" or measure.scale == (0.0, 1.0))


def _levels_title(measure: Measure) -> str:
    if measure.kind == "tokens" and not measure.exponentiate:
        return f"{measure.name}, nats a token"
    return (
        measure.name if measure.scale is None or _share(measure) else f"{measure.name} ({plain(measure.scale[0], 0)} to {plain(measure.scale[1], 0)})"
    )
