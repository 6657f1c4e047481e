"""The page of ``steered-lm cost``: one HTML file that needs nothing else, the JSON it was drawn from, and a table for spreadsheets."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from steered_lm.config import Config, write_atomic
from steered_lm.report import cost_wording
from steered_lm.report.cost_analysis import CostAnalysis, analyse_cost
from steered_lm.report.cost_cautions import in_table
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure, load_cost
from steered_lm.report.cost_difference import Change, unit_of
from steered_lm.report.cost_figures import cost_figures
from steered_lm.report.cost_headline import cost_headline
from steered_lm.report.cost_matrix import matrix_axes, side_names
from steered_lm.report.cost_trades import drawn_benefits
from steered_lm.report.headline import Headline
from steered_lm.report.page import TINY, page_environment
from steered_lm.report.wording import setting
from steered_lm.stats import Estimate

__all__ = ["CostFiles", "CostReport", "build_cost", "cost_csv", "cost_html", "load_cost", "render_cost"]

COLUMNS = (
    "arm",
    "series",
    "axis",
    "x",
    "vector_trait",
    "measure",
    "role",
    "kind",
    "group",
    "n",
    "missing",
    "responses",
    "responses_missing",
    "level",
    "level_low",
    "level_high",
    "unsteered",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "method",
    "unit",
    "ratio",
    "ratio_low",
    "ratio_high",
)
Cell = str | float | None


class CostReport(Config):
    """What the JSON file holds: the raw data, everything that was computed from it, and the verdict in words."""

    data: CostData
    analysis: CostAnalysis
    headline: Headline


class CostFiles(NamedTuple):
    """Where a cost page was written."""

    html: Path
    json: Path
    csv: Path


def build_cost(data: CostData) -> CostReport:
    """Return data, statistics and verdict; the same data give the same report."""
    analysis = analyse_cost(data)
    return CostReport(data=data, analysis=analysis, headline=cost_headline(data, analysis))


def render_cost(data: CostData, out: Path) -> CostFiles:
    """Write ``cost.html``, ``cost.json`` and ``cost.csv`` into the folder ``out``, each at once or not at all."""
    report = build_cost(data)
    numbers = write_atomic(out / "cost.json", report.model_dump_json(indent=1) + "\n")
    table = write_atomic(out / "cost.csv", cost_csv(report))
    return CostFiles(html=write_atomic(out / "cost.html", cost_html(report)), json=numbers, csv=table)


def cost_html(report: CostReport) -> str:
    """Return the page. Every text in it is escaped, and its content security policy forbids it to load anything."""
    data, analysis = report.data, report.analysis
    figures = cost_figures(data, analysis)
    side_arms, side_measures = matrix_axes(data)
    return (
        page_environment()
        .get_template("cost.html.j2")
        .render(
            data=data,
            analysis=analysis,
            headline=report.headline,
            say=cost_wording,
            setting=setting,
            unit_of=unit_of,
            figures=figures,
            plots={figure.name: {"data": figure.data, "layout": figure.layout} for figure in figures.every},
            plotly=Markup(get_plotlyjs()),
            unsteered=UNSTEERED,
            measures={measure.name: measure for measure in data.measures},
            side_arms=list(zip(side_names(side_arms), side_arms, strict=True)),
            side_measures=list(zip(side_names(side_measures), side_measures, strict=True)),
            grouped=[(m, list(dict.fromkeys(m.groups))) for m in data.measures if m.groups and m.role != "note"],
            group_levels={(one.measure, one.group): one.level for one in analysis.group_levels},
            subjects={(one.arm, one.measure, one.group): one for one in analysis.groups},
            families={role: sum(_role(data, c) == role for c in analysis.changes) for role in ("benefit", "cost")},
            moved=list({change.measure for change in analysis.changes if change.direction}),
            traded=drawn_benefits(data, analysis),
            in_table=[measure.name for measure in data.measures if in_table(data, measure)],
            main_arms=[arm for arm in data.arms if arm.series is not None],
            tiny=data.model.parameters is not None and data.model.parameters < TINY,
        )
    )


def cost_csv(report: CostReport) -> str:
    """Return one row an arm and measure, and one an arm, measure and subject; differences of perplexities are in nats a token, with their ratio.

    ``n`` and ``missing`` count items: those with a value (of a difference, on both sides), and those without. Where an item has several responses,
    ``responses`` and ``responses_missing`` count the arm's.
    """
    data, analysis = report.data, report.analysis
    levels = {(one.measure, one.group): one.level for one in analysis.group_levels}
    subjects = {(one.arm, one.measure, one.group): one for one in analysis.groups}
    rows = []
    for measure in data.measures:
        unsteered = analysis.level(UNSTEERED, measure.name)
        for arm in data.arms:
            level = analysis.level(arm.name, measure.name)
            if level is not None:
                rows.append(_row(data, arm, measure, None, level, unsteered, analysis.change(arm.name, measure.name)))
            for group in dict.fromkeys(measure.groups):
                own = levels.get((measure.name, group))
                change = subjects.get((arm.name, measure.name, group))
                found = own if arm.name == UNSTEERED else None if change is None else change.level
                if found is not None:
                    rows.append(_row(data, arm, measure, group, found, own, change))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return out.getvalue()


def _harmless(cell: Cell) -> Cell:
    """Return a text that a spreadsheet would take for a formula with an apostrophe before it; numbers are as they are."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _row(
    data: CostData, arm: CostArm, measure: Measure, group: str | None, level: Estimate, unsteered: Estimate | None, change: Change | None
) -> list[Cell]:
    d = None if change is None else change.difference
    counted = d or level
    judged = measure.judged.get(arm.name) if group is None else None
    ratio = change.shown if change is not None and change.shown is not None and change.shown.unit == "times" else None
    return [
        *(arm.name, arm.series, data.axis, arm.x, arm.trait),
        *(measure.name, measure.role, measure.kind, group, counted.n, counted.missing),
        *((None, None) if judged is None else (judged.responses, judged.missing)),
        *(level.value, level.low, level.high, None if unsteered is None else unsteered.value),
        *((None,) * 5 if d is None or change is None else (d.mean, d.low, d.high, d.p_value, change.p_holm)),
        *(counted.method, _unit(measure)),
        *((None,) * 3 if ratio is None else (ratio.value, ratio.low, ratio.high)),
    ]


def _unit(measure: Measure) -> str:
    """Return the unit of a row's level, and of its difference where that is another."""
    if measure.kind == "tokens":
        return "perplexity, difference in nats a token" if unit_of(measure) == "times" else "nats a token"
    if measure.kind == "accuracy":
        return "share"
    return "score" if measure.scale is None else f"score of {measure.scale[0]:g} to {measure.scale[1]:g}"


def _role(data: CostData, change: Change) -> str:
    return next(measure.role for measure in data.measures if measure.name == change.measure)
