"""The matrix of side effects: what each trait's vector does to every measured trait."""

from collections.abc import Sequence

from pydantic import JsonValue

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.report.cost_difference import Change
from steered_lm.report.figures import Figure, Json, height_for, label, style_axis, style_layout
from steered_lm.report.wording import signed

_SIDES: list[JsonValue] = [[0.0, "#B35806"], [0.25, "#F1A340"], [0.5, "#F7F7F7"], [0.75, "#998EC3"], [1.0, "#542788"]]


def side_effects(data: CostData, analysis: CostAnalysis) -> Figure | None:
    """Return the matrix as a heat map: rows are the traits whose vectors were added, columns what was measured. None where nothing can be drawn."""
    arms, measures = matrix_axes(data)
    cells = [[analysis.change(arm.name, measure.name) for measure in measures] for arm in arms]
    values = [change.of_100 for row in cells for change in row if change is not None and change.of_100 is not None]
    if not values:
        return None
    end = max(1.0, *(abs(value) for value in values))
    columns, names = [label(name, 14) for name in side_names(measures)], [label(name, 18) for name in side_names(arms)]
    heat: Json = {
        "type": "heatmap",
        "x": list(columns),
        "y": list(names),
        "z": [[None if change is None else change.of_100 for change in row] for row in cells],
        "text": [[_cell(change) for change in row] for row in cells],
        "hovertext": [[_cell_hover(change) for change in row] for row in cells],
        "zmin": -end,
        "zmax": end,
        "colorscale": _SIDES,
        "texttemplate": "%{text}",
        "hoverongaps": False,
        "xgap": 3,
        "ygap": 3,
        "hovertemplate": "vector %{y}, measured %{x}: %{hovertext}<extra></extra>",
        "colorbar": {"orientation": "h", "thickness": 10, "y": 1.02, "yanchor": "bottom", "tickformat": ".0f"},
    }
    missing: list[JsonValue] = [
        {"x": column, "y": row, "text": "missing", "showarrow": False, "font": {"color": "#8F3306", "size": 11}, "textangle": 0}
        for row, line in zip(names, cells, strict=True)
        for column, change in zip(columns, line, strict=True)
        if change is None or change.of_100 is None
    ]
    x = style_axis(autotickangles=[0, 90], tickfont={"size": 12}, showgrid=False)
    y = style_axis(autorange="reversed", showgrid=False) | {"title": {"text": "vector added", "font": {"size": 13}, "standoff": 18}}
    layout = style_layout(height_for(names) + 110, x=x, y=y) | {"annotations": missing}
    what = "Change of each measured trait (columns) under each trait's vector (rows), in hundredths of the scale"
    alt = f"{what}; * is established after Holm's correction."
    return Figure(name="side", alt=alt, data=[heat], layout=layout)


def matrix_axes(data: CostData) -> tuple[list[CostArm], list[Measure]]:
    """Return the rows of the matrix of side effects, and its columns; rows follow the columns, so that effects on the own trait are a diagonal."""
    arms = [arm for arm in data.arms if arm.trait is not None]
    measures = [m for m in data.measures if m.trait is not None and any(arm.name in m.values for arm in arms)]
    columns = [m.trait for m in measures]
    return sorted(arms, key=lambda arm: columns.index(arm.trait) if arm.trait in columns else len(columns)), measures


def side_names(found: Sequence[CostArm] | Sequence[Measure]) -> list[str]:
    """Return their traits, or their own names where a trait occurs twice: what has the same name would share a row."""
    traits = [one.trait for one in found]
    return [one.trait if one.trait is not None and traits.count(one.trait) == 1 else one.name for one in found]


def _cell(change: Change | None) -> str:
    if change is None or change.of_100 is None:
        return ""
    return signed(change.of_100, 0) + ("*" if change.established else "")


def _cell_hover(change: Change | None) -> str:
    if change is None or change.shown is None:
        return ""
    shown = change.shown
    return signed(shown.value, 1) + (" (no interval)" if shown.low is None else f" ({signed(shown.low, 1)} to {signed(shown.high, 1)})")
