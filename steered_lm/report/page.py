"""One HTML file that needs nothing else to be read, and beside it the JSON that it was drawn from."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from steered_lm.config import Config, write_atomic
from steered_lm.report import wording
from steered_lm.report.analysis import Analysis, analyse
from steered_lm.report.data import ReportData, Sample
from steered_lm.report.figures import figures, trait_names
from steered_lm.report.headline import Headline, headline

TINY = 100_000_000


class Report(Config):
    """What the JSON file holds: the raw data, everything that was computed from it, and the verdict in words."""

    data: ReportData
    analysis: Analysis
    headline: Headline


class ReportFiles(NamedTuple):
    """Where a report was written."""

    html: Path
    json: Path


def build_report(data: ReportData) -> Report:
    """Return data, statistics and verdict; the same data give the same report."""
    analysis = analyse(data)
    return Report(data=data, analysis=analysis, headline=headline(data, analysis))


def render(data: ReportData, out: Path) -> ReportFiles:
    """Write the report as one self-contained HTML page and the JSON it was drawn from beside it.

    Args:
        data: what to show.
        out: the page's own name when it ends in ``.html``, else a folder that gets ``report.html`` and ``report.json``.
    """
    page = out if out.suffix == ".html" else out / "report.html"
    report = build_report(data)
    numbers = write_atomic(page.with_suffix(".json"), report.model_dump_json(indent=1) + "\n")
    return ReportFiles(html=write_atomic(page, page_html(report, json_name=numbers.name)), json=numbers)


def page_html(report: Report, *, json_name: str = "report.json") -> str:
    """Return the page. Every text in it is escaped, and its content security policy forbids it to load anything."""
    data = report.data
    drawn = figures(data, report.analysis)
    return (
        page_environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            analysis=report.analysis,
            headline=report.headline,
            figures=drawn,
            plots={name: {"data": f.data, "layout": f.layout} for name, f in drawn.items()},
            plotly=get_plotlyjs(),
            traits=trait_names(data),
            checks=list(zip(data.vectors, report.analysis.vectors, strict=True)),
            methods=sorted({m for v in data.vectors for m in v.cosines}),
            pairs=list(zip(data.arms, report.analysis.arms, strict=True)),
            sample_groups=_sample_groups(data.samples),
            tiny=data.model.parameters is not None and data.model.parameters < TINY,
            json_name=json_name,
        )
    )


def _sample_groups(samples: tuple[Sample, ...]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split samples into those that are open and those that a reader unfolds."""
    return samples[:3], samples[3:]


@cache
def page_environment() -> Environment:
    """Return the templates of this folder, which escape every text, with the filters that write numbers as ``wording`` says."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = ("plain", "signed", "percent", "points", "p_value", "span", "estimate", "difference", "count")
    filters: dict[str, Any] = {name: getattr(wording, name) for name in names}
    environment.filters |= filters | {"words": lambda text: text.replace("_", " ")}
    return environment
