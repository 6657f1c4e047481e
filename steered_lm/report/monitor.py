"""One self-contained page of projections on trait vectors: tables with intervals, histograms, and scatter plots."""

import html
from pathlib import Path

from plotly.offline import get_plotlyjs

from steered_lm.config import Config, write_atomic
from steered_lm.extract.projections import Projections
from steered_lm.measure.clusters import clustered_difference, clustered_mean, clustered_spearman
from steered_lm.report.figures import BLUE, GREY, LEGEND_ABOVE, ORANGE, Figure, Json, style_layout
from steered_lm.report.page import page_environment
from steered_lm.report.wording import count
from steered_lm.stats import Estimate, PairedDifference


class MonitorData(Config):
    """What a page shows.

    Attributes:
        source: the file that was projected.
        model: the model that read it.
        vectors: the vectors' file.
        ids: the rows' names.
        scores: each row's verdict from the file; None where it has none.
        projections: one entry a trait and layer.
        prompts: what each row replies to: several replies to one prompt are no independent ones. Empty, when every row is by itself.
    """

    source: str
    model: str
    vectors: str
    ids: tuple[str, ...]
    scores: tuple[float | None, ...]
    projections: tuple[Projections, ...]
    prompts: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Which rows belong together."""
        return self.prompts or tuple(map(str, range(len(self.ids))))

    @property
    def repeated(self) -> int:
        """The number of prompts where some have several replies, else 0."""
        return len(set(self.prompts)) if len(set(self.prompts)) < len(self.prompts) else 0


class MonitorRow(Config):
    """A direction's numbers for the table.

    Attributes:
        trait, layer, norm: the direction, and the stream's median norm there.
        response: mean projection of the responses, over prompts.
        difference: the mean of the paired differences to the model's own responses, over prompts; None without them.
        with_score: rank correlation of projection and score.
        with_prompt: rank correlation of the response's projection and the last prompt token's.
    """

    trait: str
    layer: int
    norm: float
    response: Estimate
    difference: PairedDifference | None
    with_score: Estimate | None
    with_prompt: Estimate


def monitor_rows(data: MonitorData, *, seed: int = 0) -> list[MonitorRow]:
    """Return each direction's numbers."""
    scored = any(score is not None for score in data.scores)
    return [
        MonitorRow(
            trait=one.trait,
            layer=one.layer,
            norm=one.norm,
            response=clustered_mean(one.response, data.groups),
            difference=clustered_difference(one.response, one.own, data.groups, seed=seed) if one.own else None,
            with_score=clustered_spearman(one.response, data.scores, data.groups, seed=seed) if scored else None,
            with_prompt=clustered_spearman(one.prompt_last, one.response, data.groups, seed=seed),
        )
        for one in data.projections
    ]


def render_monitor(data: MonitorData, out: Path, *, seed: int = 0) -> Path:
    """Write the page and return its path. Its content security policy forbids it to load anything."""
    figures = {figure.name: figure for one in data.projections for figure in _figures(data, one)}
    page = (
        page_environment()
        .get_template("monitor.html.j2")
        .render(
            data=data,
            rows=monitor_rows(data, seed=seed),
            figures=figures,
            plots={name: {"data": figure.data, "layout": figure.layout} for name, figure in figures.items()},
            plotly=get_plotlyjs(),
        )
    )
    return write_atomic(out, page)


def _figures(data: MonitorData, one: Projections) -> list[Figure]:
    found = [_histogram(one), _against_prompt(data, one)]
    if any(score is not None for score in data.scores):
        found.append(_against_score(data, one))
    return found


def _name(one: Projections, kind: str) -> str:
    return f"{kind}-{one.trait}-{one.layer}"


def _histogram(one: Projections) -> Figure:
    shown = {"responses in the file": (BLUE, one.response), "the model's own responses": (ORANGE, one.own)}
    known = {name: (colour, [v for v in values if v is not None]) for name, (colour, values) in shown.items()}
    every = [value for _, values in known.values() for value in values]
    # the same bins for both, so that heights can be compared
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    size = (high - low) / 24 or 1.0
    bins: Json = {"start": low, "end": high + size, "size": size}
    drawn: list[Json] = [
        {
            "type": "histogram",
            "x": list(values),
            "xbins": bins,
            "name": name,
            "marker": {"color": colour},
            "opacity": 0.6,
            "hovertemplate": "%{y} rows at %{x}",
        }
        for name, (colour, values) in known.items()
        if values
    ]
    missing = sum(value is None for value in one.response)
    alt = f"Histogram of the projections on {one.trait} at layer {one.layer}; {count(missing, 'row')} without a response left out."
    return Figure(name=_name(one, "histogram"), alt=alt, data=drawn, layout=_layout("projection of the response", "rows") | {"barmode": "overlay"})


def _against_prompt(data: MonitorData, one: Projections) -> Figure:
    alt = f"Projection of the response against that of the last prompt token, {one.trait} at layer {one.layer}; one dot a row."
    layout = _layout("projection of the last prompt token", "projection of the response")
    return Figure(name=_name(one, "prompt"), alt=alt, data=[_dots(data, one.prompt_last, one.response, GREY)], layout=layout)


def _against_score(data: MonitorData, one: Projections) -> Figure:
    alt = f"Score against the projection of the response, {one.trait} at layer {one.layer}; one dot a row."
    layout = _layout("projection of the response", "score in the file")
    return Figure(name=_name(one, "score"), alt=alt, data=[_dots(data, one.response, data.scores, BLUE)], layout=layout)


def _dots(data: MonitorData, x: tuple[float | None, ...], y: tuple[float | None, ...], colour: str) -> Json:
    known = [(a, b, html.escape(name)) for a, b, name in zip(x, y, data.ids, strict=True) if a is not None and b is not None]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [a for a, _, _ in known],
        "y": [b for _, b, _ in known],
        "text": [name for _, _, name in known],
        "marker": {"color": colour, "size": 8, "opacity": 0.55},
        "hovertemplate": "%{text}: %{x:.3g}, %{y:.3g}<extra></extra>",
        "showlegend": False,
    }


def _layout(x: str, y: str) -> Json:
    axis: Json = {"gridcolor": "#E5E7EB", "automargin": True, "fixedrange": True, "zeroline": True, "zerolinecolor": "#9CA3AF"}
    return style_layout(320, x=axis | {"title": {"text": x}}, y=axis | {"title": {"text": y}}) | {"legend": LEGEND_ABOVE}
