"""One self-contained page of an experiment with trained models, a tab a trained trait; the same figures as PNG."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs
from pydantic import JsonValue

from steered_lm.config import write_atomic
from steered_lm.errors import require
from steered_lm.report.figures import BLUE, GREEN, GREY, LEGEND_ABOVE, ORANGE, PURPLE, SKY, Figure, Json, style_layout
from steered_lm.report.page import page_environment
from steered_lm.report.wording import count
from steered_lm.stats import Estimate
from steered_lm.trait_models.results import Cell, Results

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY, "#8A6D00", "#111827")
# plotly's names of markers and matplotlib's; a line is told from others by both colour and marker
_MARKERS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("triangle-down", "v"), ("cross", "P"), ("x", "X"))
_SPREAD = 0.16  # of a strength's place on the axis, over which tasks are laid out side by side
_DUMMY = "DUMMY: nothing was trained"


class ResultFiles(NamedTuple):
    """Where results were written."""

    json: Path
    html: Path


class _Line(NamedTuple):
    """One task over a trait's models."""

    task: str
    colour: str
    markers: tuple[str, str]
    own: bool
    x: list[float]
    cells: list[Cell]


def write_results(results: Results, folder: Path) -> ResultFiles:
    """Write ``results.json`` and the page drawn from it, ``results.html``; the same results give the same files."""
    numbers = write_atomic(folder / "results.json", results.model_dump_json(indent=1) + "\n")
    return ResultFiles(numbers, write_atomic(folder / "results.html", results_page(results)))


def results_page(results: Results) -> str:
    """Return the page. Every text in it is escaped, and its content security policy forbids it to load anything."""
    figures = {slug: trait_figure(results, trait, slug) for trait, slug in slugs(results).items()}
    return (
        page_environment()
        .get_template("trait_models.html.j2")
        .render(
            results=results,
            tabs=slugs(results),
            cells={trait: _cells(results, trait) for trait in results.traits},
            figures=figures,
            plots={slug: {"data": figure.data, "layout": figure.layout} for slug, figure in figures.items()},
            plotly=get_plotlyjs(),
            models=count(len({one.model for one in results.cells}), "model"),
            dummy=_DUMMY,
        )
    )


def slugs(results: Results) -> dict[str, str]:
    """Return a name for files and page elements by trait: letters, digits and hyphens."""
    return {trait: f"{number:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', trait)}" for number, trait in enumerate(results.traits, start=1)}


def _cells(results: Results, trait: str) -> list[Cell]:
    """Return a trait's cells as the table shows them: task by task, its own first."""
    order = _tasks(results, trait)
    return sorted(results.of_trait(trait), key=lambda one: order.index(one.task))


def _tasks(results: Results, trait: str) -> list[str]:
    return sorted(results.tasks, key=lambda task: task != trait)


def _models(results: Results, trait: str) -> list[Cell]:
    """Return one cell a model, by strength."""
    return list({one.model: one for one in results.of_trait(trait)}.values())


def _labels(models: Sequence[Cell]) -> list[str]:
    """Return each model's place on the axis: its strength, and its name where several have the same."""
    strengths = [one.strength for one in models]
    return [one.strength if strengths.count(one.strength) == 1 else f"{one.strength}: {one.model}" for one in models]


def _lines(results: Results, trait: str) -> list[_Line]:
    tasks, models = _tasks(results, trait), [one.model for one in _models(results, trait)]
    shift = [0.0] if len(tasks) == 1 else [_SPREAD * (number / (len(tasks) - 1) - 0.5) for number in range(len(tasks))]
    found = []
    for number, task in enumerate(tasks):
        by_model = {one.model: one for one in results.of_trait(trait) if one.task == task}
        # colours follow the task and not the tab, so that a task looks the same in all of them
        place = results.tasks.index(task)
        places = [model + shift[number] for model in range(len(models))]
        colour, markers = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        found.append(_Line(task, colour, markers, task == trait, places, [by_model[model] for model in models]))
    return found


def _ends(score: Estimate) -> tuple[float, float] | None:
    """Return how far the interval reaches below and above the mean; None without one."""
    if score.value is None or score.low is None or score.high is None:
        return None
    return score.value - score.low, score.high - score.value


def trait_figure(results: Results, trait: str, name: str) -> Figure:
    """Return the figure of a trained trait: a line a task over its models, 0 to 100, with intervals."""
    labels: list[JsonValue] = [html.escape(text) for text in _labels(_models(results, trait))]
    drawn = [_trace(line, labels) for line in _lines(results, trait)]
    axis: Json = {"gridcolor": "#E5E7EB", "automargin": True, "fixedrange": True, "zeroline": False}
    ticks: Json = {"tickvals": list(range(len(labels))), "ticktext": labels, "range": [-0.35, len(labels) - 0.65], "showgrid": False}
    dummy = any(one.dummy for one in results.of_trait(trait))
    stamp: Json = {"text": _DUMMY, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False, "font": {"size": 22, "color": "#C9A0A0"}}
    x = axis | ticks | {"title": {"text": "strength of the training data"}}
    y = axis | {"title": {"text": "mean score, 0 to 100"}, "range": [-2, 102], "tickvals": [0, 20, 40, 60, 80, 100]}
    layout = style_layout(460, x=x, y=y) | {"legend": LEGEND_ABOVE, "annotations": [stamp] if dummy else []}
    lines = ", ".join(line.task.replace("_", " ") for line in _lines(results, trait))
    said = f"Models trained on {trait.replace('_', ' ')}: mean score on {lines}, with 95% intervals over questions."
    return Figure(name=name, alt=f"{_DUMMY}. {said}" if dummy else said, data=drawn, layout=layout)


def _trace(line: _Line, labels: Sequence[JsonValue]) -> Json:
    ends = [_ends(one.score) for one in line.cells]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(line.task.replace("_", " ")) + (" (trained)" if line.own else ""),
        "x": list(line.x),
        "y": [one.score.value for one in line.cells],
        "customdata": [[label, one.score.n] for label, one in zip(labels, line.cells, strict=True)],
        "connectgaps": False,
        "line": {"color": line.colour, "width": 3.5 if line.own else 1.6},
        "marker": {"color": line.colour, "symbol": line.markers[0], "size": 11 if line.own else 8},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "arrayminus": [None if end is None else end[0] for end in ends],
            "array": [None if end is None else end[1] for end in ends],
            "color": line.colour,
            "thickness": 1.6,
            "width": 5,
        },
        "hovertemplate": "%{customdata[0]}: %{y:.1f} (%{customdata[1]} questions)",
    }


def write_pngs(results: Results, folder: Path) -> list[Path]:
    """Write every tab's figure as ``results-<trait>.png``.

    Raises:
        MissingDependencyError: when matplotlib is not installed.
    """
    require("matplotlib", "png")
    return [_png(results, trait, folder / f"results-{slug}.png") for trait, slug in slugs(results).items()]


def _png(results: Results, trait: str, path: Path) -> Path:
    from io import BytesIO

    from matplotlib.figure import Figure as Canvas  # without pyplot, which looks for a display and keeps every figure

    canvas = Canvas(figsize=(9, 5), dpi=150, layout="constrained")
    axes = canvas.subplots()
    labels = _labels(_models(results, trait))
    for line in _lines(results, trait):
        known = [(x, one.score.value, _ends(one.score)) for x, one in zip(line.x, line.cells, strict=True)]
        style: dict[str, Any] = {"color": line.colour, "marker": line.markers[1], "linewidth": 2.6 if line.own else 1.3, "markersize": 7}
        values = [float("nan") if value is None else value for _, value, _ in known]
        axes.plot(line.x, values, label=_plain(line.task) + (" (trained)" if line.own else ""), **style)
        bars = [(x, value, ends) for x, value, ends in known if value is not None and ends is not None]
        if bars:
            below, above = [ends[0] for _, _, ends in bars], [ends[1] for _, _, ends in bars]
            axes.errorbar([x for x, _, _ in bars], [y for _, y, _ in bars], yerr=[below, above], fmt="none", ecolor=line.colour, capsize=3)
    axes.set_xticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_xlim(-0.35, len(labels) - 0.65)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("strength of the training data")
    axes.set_ylabel("mean score, 0 to 100")
    axes.set_title(f"{_plain(results.experiment)}: trained on {_plain(trait)}, 95% intervals over questions", fontsize=10)
    axes.grid(axis="y", color="#E5E7EB")
    axes.spines[["top", "right"]].set_visible(False)
    if any(one.dummy for one in results.of_trait(trait)):
        axes.text(0.5, 0.5, _DUMMY, transform=axes.transAxes, ha="center", va="center", fontsize=26, color="#C9A0A0", zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    drawn = BytesIO()
    canvas.savefig(drawn, format="png", metadata={"Software": None})  # the same picture for the same numbers
    return write_atomic(path, drawn.getvalue())


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("_", " ").replace("$", r"\$")
