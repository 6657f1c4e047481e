"""The page's figures as plotly data, drawn from the numbers in the report's JSON and from nothing else."""

import html
import textwrap
from typing import Any

from pydantic import JsonValue

from steered_lm.config import Config
from steered_lm.report.analysis import Analysis, Comparison
from steered_lm.report.data import ReportData, SearchTrace
from steered_lm.report.wording import count
from steered_lm.stats import PairedDifference

Json = dict[str, JsonValue]

# Okabe & Ito's palette: told apart by readers with any common kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#007A5A", "#B2528F", "#2E86C1", "#6B7280"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
LEGEND_ABOVE: Json = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0}
ZERO: Json = {"zeroline": True, "zerolinecolor": "#111827", "zerolinewidth": 1.5}


class Figure(Config):
    """One plotly figure: ``data`` and ``layout`` go to ``Plotly.newPlot`` as they are; ``alt`` says in words what it shows."""

    name: str
    alt: str
    data: list[Json]
    layout: Json

    @property
    def height(self) -> int:
        """Height in pixels."""
        height = self.layout["height"]
        assert isinstance(height, int)
        return height


def figures(data: ReportData, analysis: Analysis) -> dict[str, Figure]:
    """Return the figures that the data can fill, by name; what was not measured has no figure."""
    found = [_convergence(data), _levels(data, analysis), _differences(data, analysis), _traits(data, analysis), _capability(analysis)]
    return {figure.name: figure for figure in found if figure is not None}


def label(text: str, width: int = 20) -> str:
    """Return text for an axis: escaped, because plotly reads a subset of HTML, and broken into short lines for narrow screens."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text.replace("_", " "), width)) or " "


def _convergence(data: ReportData) -> Figure | None:
    traces = [t for t in data.searches if t.generations]
    if not traces:
        return None
    drawn = [line for i, trace in enumerate(traces) for line in _search_lines(trace, CYCLE[i % len(CYCLE)], _trace_name(trace, traces))]
    layout = style_layout(380 + 24 * len(drawn), x=style_axis("candidates evaluated"), y=style_axis("judge score on tuning prompts"))
    alt = "Best score so far and generation mean against the number of candidates evaluated, one colour for each search."
    return Figure(name="convergence", alt=alt, data=drawn, layout=layout)


def _trace_name(trace: SearchTrace, traces: list[SearchTrace]) -> str:
    repeated = sum(t.optimizer == trace.optimizer for t in traces) > 1
    return trace.optimizer + (f" (seed {trace.seed})" if repeated and trace.seed is not None else "")


def _search_lines(trace: SearchTrace, colour: str, name: str) -> list[Json]:
    x: list[JsonValue] = [g.evaluations for g in trace.generations]
    shared: Json = {"type": "scatter", "x": x, "connectgaps": False, "hovertemplate": "%{y:.2f} after %{x} candidates"}
    best: Json = {"name": html.escape(f"{name}: best so far"), "mode": "lines+markers", "line": {"color": colour, "width": 2.5, "shape": "hv"}}
    mean: Json = {
        "name": html.escape(f"{name}: generation mean"),
        "mode": "lines+markers",
        "line": {"color": colour, "width": 1.2, "dash": "dot"},
        "marker": {"color": colour, "size": 6, "symbol": "circle-open"},
    }
    return [shared | best | {"y": [g.best for g in trace.generations]}, shared | mean | {"y": [g.mean for g in trace.generations]}]


def _levels(data: ReportData, analysis: Analysis) -> Figure | None:
    arms = [(a, s) for a, s in zip(data.arms, analysis.arms, strict=True) if s.score.value is not None]
    if not arms:
        return None
    names = [label(f"{a.name} ({a.missing} missing)" if a.missing else a.name) for a, _ in arms]
    dots: list[tuple[JsonValue, JsonValue]] = [(s, name) for name, (a, _) in zip(names, arms, strict=True) for s in a.scores if s is not None]
    drawn: list[Json] = [
        draw_points([x for x, _ in dots], [y for _, y in dots], GREY, name="one prompt", size=7, opacity=0.4),
        draw_bars([(name, s.score.low, s.score.high) for name, (_, s) in zip(names, arms, strict=True)], BLUE),
        draw_points([s.score.value for _, s in arms], list(names), BLUE, name=f"mean and {data.confidence:.0%} interval", size=11),
    ]
    low, high = data.judge.scale
    margin = 0.03 * (high - low)
    x = style_axis(f"judge score ({low:g} to {high:g})", range=[low - margin, high + margin])
    layout = style_layout(height_for(names), x=x, y=name_rows(names))
    return Figure(name="levels", alt="Judge scores of every arm: one dot a prompt, the mean and its interval.", data=drawn, layout=layout)


def _differences(data: ReportData, analysis: Analysis) -> Figure | None:
    groups = {
        "against unsteered": (BLUE, [c for c in analysis.comparisons if c.question == "unsteered"]),
        "head to head": (ORANGE, [c for c in analysis.comparisons if c.question != "unsteered"]),
        "null: a system against itself": (GREY, list(analysis.null)),
    }
    rows = [(name, colour, [(_versus(c), c.difference) for c in found]) for name, (colour, found) in groups.items()]
    x = style_axis(f"difference in judge score ({data.confidence:.0%} interval)", **ZERO)
    return _forest("differences", rows, x=x, alt="Paired differences between arms with intervals; an interval across zero shows no effect.")


def _versus(c: Comparison) -> str:
    dropped = f" ({count(c.difference.missing, 'pair')} missing)" if c.difference.missing else ""
    return label(f"{c.arm} vs {c.baseline}{dropped}", 24)


def _capability(analysis: Analysis) -> Figure | None:
    shares = [c for c in analysis.capability if c.metric == "accuracy"]
    rows = [("steered minus unsteered", BLUE, [(label(f"{c.task}: {c.arm}", 24), c.difference) for c in shares])]
    x = style_axis("change in accuracy, paired interval", tickformat=".0%", **ZERO)
    return _forest("capability", rows, x=x, alt="Change in accuracy by steering for each task, with intervals.")


def _forest(name: str, groups: list[tuple[str, str, list[tuple[str, PairedDifference]]]], *, x: Json, alt: str) -> Figure | None:
    """Draw differences as points with intervals, one row each, around a line at zero."""
    groups = [(title, colour, [(row, d) for row, d in rows if d.mean is not None]) for title, colour, rows in groups]
    names = [row for _, _, rows in groups for row, _ in rows]
    if not names:
        return None
    drawn = []
    for title, colour, rows in groups:
        if rows:
            drawn.append(draw_bars([(row, d.low, d.high) for row, d in rows], colour))
            drawn.append(draw_points([d.mean for _, d in rows], [row for row, _ in rows], colour, name=title, size=10))
    layout = style_layout(height_for(names), x=x | {"range": _range([d for _, _, rows in groups for _, d in rows])}, y=name_rows(names))
    return Figure(name=name, alt=alt, data=drawn, layout=layout | {"showlegend": len(drawn) > 2})


def _range(differences: list[PairedDifference]) -> list[JsonValue]:
    """Return an axis range with zero in it and room around the longest interval."""
    ends = [0.0, *(v for d in differences for v in (d.mean, d.low, d.high) if v is not None)]
    room = 0.06 * ((max(ends) - min(ends)) or 1.0)
    return [min(ends) - room, max(ends) + room]


def _traits(data: ReportData, analysis: Analysis) -> Figure | None:
    names = trait_names(data)
    targets = {t.name: t.target for t in data.persona.traits}
    rows: list[tuple[str, list[JsonValue]]] = [(label(f"persona {data.persona.name}"), [targets.get(t) for t in names])]
    for arm in analysis.arms:
        if arm.traits:
            rows.append((label(arm.name), [arm.traits[t].value if t in arm.traits else None for t in names]))
    if not names or len(rows) == 1:
        return None
    low, high = data.trait_scale
    heat: Json = {
        "type": "heatmap",
        "x": [label(t, 60) for t in names],
        "y": [row for row, _ in rows],
        "z": [values for _, values in rows],
        "zmin": low,
        "zmax": high,
        "colorscale": [[0.0, "#B35806"], [0.25, "#F1A340"], [0.5, "#F7F7F7"], [0.75, "#998EC3"], [1.0, "#542788"]],
        "texttemplate": "%{z:.2f}",
        "hoverongaps": False,
        "xgap": 3,
        "ygap": 3,
        "hovertemplate": "%{y}, %{x}: %{z:.2f}<extra></extra>",
        "colorbar": {"orientation": "h", "thickness": 10, "y": 1.02, "yanchor": "bottom", "tickvals": [low, (low + high) / 2.0, high]},
    }
    columns = style_axis(autotickangles=[0, 90], tickfont={"size": 12}, showgrid=False)
    layout = style_layout(height_for([row for row, _ in rows]) + 70, x=columns, y=style_axis(autorange="reversed", showgrid=False))
    alt = "Mean trait level of every arm's replies; the first row is what the persona asks for."
    return Figure(name="traits", alt=alt, data=[heat], layout=layout)


def trait_names(data: ReportData) -> list[str]:
    """Return all traits of the report, the persona's own first and in its order."""
    measured = [t for arm in data.arms for t in arm.traits]
    return list(dict.fromkeys([t.name for t in data.persona.traits] + measured))


def draw_points(x: list[Any], y: list[Any], colour: str, *, name: str, size: int, opacity: float = 1.0) -> Json:
    """Return markers."""
    marker: Json = {"color": colour, "size": size, "opacity": opacity}
    hover = "%{x:.2f}<extra>%{y}</extra>"
    return {"type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker, "name": html.escape(name), "hovertemplate": hover}


def draw_bars(intervals: list[tuple[str, float | None, float | None]], colour: str) -> Json:
    """Draw intervals as lines between their own ends, so that the figure holds the very numbers of the JSON; None breaks the line."""
    known = [(row, low, high) for row, low, high in intervals if low is not None and high is not None]
    x: list[JsonValue] = [value for _, low, high in known for value in (low, high, None)]
    y: list[JsonValue] = [value for row, _, _ in known for value in (row, row, None)]
    line: Json = {"color": colour, "width": 3}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "showlegend": False, "hoverinfo": "skip"}


def name_rows(names: list[str]) -> Json:
    """Return an axis of names, the first one on top."""
    return style_axis(categoryorder="array", categoryarray=list(names), autorange="reversed")


def style_axis(title: str = "", **settings: JsonValue) -> Json:
    """Return an axis in the page's style."""
    base: Json = {
        "gridcolor": "#E5E7EB",
        "automargin": True,
        "fixedrange": True,
        "zeroline": False,
        "title": {"text": label(title, 30), "font": {"size": 13}},
    }
    return base | settings


def height_for(rows: list[str]) -> int:
    """Return a height in pixels that has room for these rows."""
    lines = max(row.count("<br>") + 1 for row in rows)
    return 130 + len(rows) * (16 * max(lines, 2) + 12)


def style_layout(height: int, *, x: Json, y: Json) -> Json:
    """Return a layout in the page's style."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 14},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1F2937"},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "dragmode": False,
        "hovermode": "closest",
        "legend": {"orientation": "h", "xref": "container", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0.0},
        "xaxis": x,
        "yaxis": y,
    }
