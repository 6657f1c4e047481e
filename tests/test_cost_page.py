"""The page of ``steered-lm cost``: every number from its JSON, nothing from outside, and honest words."""

import csv
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from cost_pages import ALPHAS, SUBJECTS, accuracy, small, swept
from html_page import Page, numbers_in
from plotly.offline import get_plotlyjs

from steered_lm.errors import RunError
from steered_lm.report import load_cost, render_cost
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_figures import cost_figures
from steered_lm.report.cost_page import COLUMNS, CostFiles, CostReport, build_cost, cost_csv, cost_html
from steered_lm.report.data import ModelInfo, Reply, Sample

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }},;"'
PAGES = {"alpha": swept(), "none": swept(None), "layer": swept("layer"), "bare": small()}


def known_numbers(report: CostReport) -> set[float]:
    return numbers_in(json.loads(report.model_dump_json()))


def page(data: CostData) -> Page:
    """The page as a reader's browser parses it, without the megabytes of plotly, which ``rendered`` keeps."""
    return Page(cost_html(build_cost(data)).replace(get_plotlyjs(), ""))


@cache
def built(which: str) -> CostReport:
    return build_cost(PAGES[which])


@cache
def parsed(which: str) -> Page:
    return page(PAGES[which])


def words(data: CostData) -> str:
    said = build_cost(data).headline
    return " ".join([said.title, *(s.text for s in said.sentences)])


def table(files: CostFiles) -> list[dict[str, str]]:
    with files.csv.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CostFiles:
    return render_cost(PAGES["alpha"], tmp_path_factory.mktemp("cost") / "deep")


@pytest.fixture(scope="module")
def rendered(files: CostFiles) -> Page:
    return Page(files.html.read_text(encoding="utf-8"))


def test_three_files_are_written_and_the_json_reads_back(files: CostFiles) -> None:
    assert sorted(p.name for p in files.html.parent.iterdir()) == ["cost.csv", "cost.html", "cost.json"]
    assert load_cost(files.json) == PAGES["alpha"]
    assert CostReport.model_validate_json(files.json.read_text(encoding="utf-8")) == build_cost(PAGES["alpha"])


def test_bare_data_read_back_too_and_what_is_no_cost_page_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "bare.json"
    bare.write_text(PAGES["none"].model_dump_json(), encoding="utf-8")
    assert load_cost(bare) == PAGES["none"]
    for content, said in (("{", "is not JSON"), ('{"data": {"title": 1}}', "not a valid CostData"), ("[]", "not a valid CostData")):
        bare.write_text(content, encoding="utf-8")
        with pytest.raises(RunError, match=said):
            load_cost(bare)
    with pytest.raises(RunError, match="cannot be read"):
        load_cost(tmp_path / "nowhere.json")


def test_the_same_data_give_the_same_bytes(files: CostFiles, tmp_path: Path) -> None:
    again = render_cost(PAGES["alpha"], tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in files]


def test_the_page_loads_nothing_and_forbids_itself_to(files: CostFiles, rendered: Page) -> None:
    text = files.html.read_text(encoding="utf-8")
    assert rendered.fetched == []
    assert rendered.links == ["cost.json", "cost.csv"]
    assert "link" not in rendered.tags
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert rendered.tags.count("script") == 3


@pytest.mark.parametrize("which", PAGES)
def test_every_number_that_a_figure_draws_is_in_the_json(which: str) -> None:
    report = built(which)
    # no change is drawn at 0, or for a ratio at 1; lines across span the figure from 0 to 1
    known = known_numbers(report) | {0.0, 1.0}
    for figure in cost_figures(report.data, report.analysis).every:
        for drawn in figure.data:
            assert numbers_in({k: drawn[k] for k in ("x", "y", "z") if k in drawn}) <= known, figure.name
        for shape in figure.layout.get("shapes", []):  # type: ignore[union-attr]
            assert numbers_in({k: v for k, v in shape.items() if k in ("x0", "x1", "y0", "y1")}) <= known, figure.name  # type: ignore[union-attr]


@pytest.mark.parametrize("which", PAGES)
def test_plotly_accepts_every_figure_and_each_has_a_place_and_words(which: str) -> None:
    report = built(which)
    every = cost_figures(report.data, report.analysis).every
    for figure in every:
        go.Figure(data=figure.data, layout=figure.layout)
    assert parsed(which).plots == {f"plot-{figure.name}": figure.alt for figure in every}
    assert all(figure.alt for figure in every)
    assert len({figure.name for figure in every}) == len(every)


def test_a_full_page_has_every_kind_of_figure() -> None:
    report = built("alpha")
    figures = cost_figures(report.data, report.analysis)
    assert [f.name for f in figures.curves] == ["measure-0", "measure-1", "measure-2", "measure-3"]
    assert [f.name for f in figures.trades] == ["trade-0-1", "trade-0-2", "trade-0-3"]
    assert (figures.kl is not None, figures.side is not None, len(figures.bands)) == (True, True, 1)


@pytest.mark.parametrize("which", PAGES)
def test_every_decimal_of_the_page_is_a_number_of_the_json(which: str) -> None:
    report = built(which)
    known = known_numbers(report) | {report.data.model.parameters / 1e6 if report.data.model.parameters else 0.0}
    # what a loss grows to is shown as growth, and shares in hundredths
    values = known | {100.0 * v for v in known}
    written = {f"{abs(v):.{digits}f}" for v in values for digits in (1, 2, 3)} | {f"{v:g}" for v in values}
    text = parsed(which).words
    found = re.findall(r"(?<![\w.:-])\d+\.\d+(?![\w.])", text)
    assert set(found) <= written
    assert len(found) >= (0 if which == "bare" else 200)


def test_the_table_has_every_arm_of_every_measure_with_its_change(rendered: Page) -> None:
    report = built("alpha")
    rows = [[" ".join(cell.split()) for cell in row] for row in rendered.rows]
    change = report.analysis.change("alpha 2", "mmlu")
    assert change is not None
    assert change.shown is not None
    assert change.shown.low is not None
    own = next(row for row in rows if row[:2] == ["alpha 2", "2"] and row[2].endswith("%)"))
    text = f"{change.shown.value:.1f} ({change.shown.low:.1f} to ".replace("-", "\N{MINUS SIGN}")
    assert own[3].startswith(text)
    assert own[3].endswith("*") is change.established
    assert own[-1].startswith(f"{change.difference.n}{change.difference.missing} missing")
    # four compared measures and KL, the unsteered arm and six of the sweep each
    assert sum(row[0] == UNSTEERED for row in rows if row) == 5 + 1
    assert sum(row[0] == "alpha 0.3" for row in rows if row) == 5 + 1


def test_the_csv_has_a_row_an_arm_and_measure_and_one_a_subject_with_the_jsons_numbers(files: CostFiles) -> None:
    rows = table(files)
    report = built("alpha")
    assert tuple(rows[0]) == COLUMNS
    assert len([row for row in rows if not row["group"]]) == sum(len(m.values) for m in report.data.measures)
    assert {row["group"] for row in rows if row["arm"] == "alpha 1"} == {"", *SUBJECTS}
    known = known_numbers(report)
    numbers = [row[c] for row in rows for c in COLUMNS if c in COLUMNS[COLUMNS.index("n") : COLUMNS.index("method")] or c.startswith("ratio")]
    assert {float(cell) for cell in numbers if cell} <= known
    by = {(row["arm"], row["measure"], row["group"]): row for row in rows}
    change = report.analysis.change("alpha 1.5", "perplexity")
    assert change is not None
    assert change.shown is not None
    own = by["alpha 1.5", "perplexity", ""]
    assert (float(own["difference"]), float(own["ratio"]), float(own["p_holm"])) == (change.difference.mean, change.shown.value, change.p_holm)
    assert (own["series"], own["axis"], float(own["x"]), own["role"]) == ("formal", "alpha", 1.5, "cost")
    subject = report.analysis.group("alpha 3", "mmlu", "marketing")
    assert subject is not None
    assert float(by["alpha 3", "mmlu", "marketing"]["low"]) == subject.difference.low
    assert by["vector evil", "trait evil", ""]["vector_trait"] == "evil"
    assert by[UNSTEERED, "mmlu", ""]["difference"] == ""


def test_the_headline_says_how_far_one_can_go_with_gain_and_bounds() -> None:
    report = built("alpha")
    joint = next(r for r in report.analysis.reaches if r.measure == "all of them")
    assert report.headline.title == f"Up to alpha {joint.x:g}, every cost is shown to stay within its tolerance."
    assert report.headline.tone == "good"
    text = words(PAGES["alpha"])
    change = report.analysis.change(joint.arm or "", "trait formality")
    assert change is not None
    assert change.shown is not None
    assert f"trait formality is 83.3 on its scale of 0 to 100, +{change.shown.value:.1f}" in text
    for part in (
        "mmlu stays within 10 points",
        "so it grows by at most",
        "9 of 60 items of trait formality are missing under alpha 3 (empty reply: 9)",
    ):
        assert part in text


def test_a_measured_loss_at_the_smallest_value_and_too_few_items_are_told_apart() -> None:
    right, wrong = (1.0,) * 400, (0.0,) * 80 + (1.0,) * 320
    lost = build_cost(small(accuracy(unsteered=right, a_1=wrong))).headline
    assert (lost.tone, lost.title) == ("bad", "No alpha of the sweep is shown to keep mmlu within its tolerance.")
    assert "a loss was measured there: change −20.0 (−23.8 to −16.0)" in " ".join(s.text for s in lost.sentences)
    few = build_cost(small(accuracy(unsteered=right[:60], a_1=right[:60]))).headline
    assert (few.tone, few.title) == ("unclear", lost.title)
    said = " ".join(s.text for s in few.sentences)
    assert "60 items are too few to exclude a loss beyond 2 points: change 0.0 (−3.2 to +3.2)" in said
    assert "a loss was measured" not in said


def test_where_no_value_keeps_every_cost_the_gain_and_each_cost_alone_are_still_told() -> None:
    right, wrong = (1.0,) * 1000, (0.0,) * 200 + (1.0,) * 800
    measures = (
        accuracy("fit", "benefit", unsteered=wrong, a_1=right, a_2=right),
        accuracy("mmlu", unsteered=right, a_1=right, a_2=wrong),
        accuracy("truthful", unsteered=right, a_1=wrong, a_2=wrong),
    )
    said = build_cost(small(*measures, xs=(1.0, 2.0))).headline
    assert (said.tone, said.title) == ("bad", "No alpha of the sweep is shown to keep every cost within its tolerance.")
    texts = [s.text for s in said.sentences]
    assert texts[0].startswith("fit: +20.0 (")
    assert texts[0].endswith("a gain is established under 2 of 2 steered arms; a loss is established under 0 of 2 steered arms.")
    assert texts[1].startswith("No alpha is shown to keep truthful within 2 points; at 1, a loss was measured there: change −20.0")
    assert texts[2] == "Taken alone, costs stay within their tolerances further: mmlu up to alpha 1."


def test_a_perplexity_that_explodes_is_drawn_on_a_logarithmic_axis_with_full_labels() -> None:
    nats = {UNSTEERED: (20.0, 21.0, 22.0, 23.0, 24.0, 25.0)}
    nats |= {
        "a 1": tuple(v + 0.5 for v in (20.0, 21.5, 22.0, 23.0, 24.0, 25.0)),
        "a 2": tuple(v + 40.0 for v in (20.0, 21.5, 22.0, 23.0, 24.0, 25.0)),
    }
    named: dict[str, Any] = {"name": "perplexity", "role": "cost", "kind": "tokens", "higher_is_better": False, "exponentiate": True}
    measure = Measure(**named, items=tuple("abcdef"), tokens=(10,) * 6, values=nats)
    report = build_cost(small(measure, accuracy("fit", "benefit", unsteered=(0.0,) * 9, a_1=(1.0,) * 9, a_2=(1.0,) * 9), xs=(1.0, 2.0)))
    figures = cost_figures(report.data, report.analysis)
    curve, trade = figures.curves[1].layout["yaxis"], figures.trades[0].layout["yaxis"]
    assert (curve["type"], trade["type"]) == ("log", "log")  # type: ignore[index,call-overload]
    assert {10.0, 20.0, 50.0, 100.0} <= set(curve["tickvals"])  # type: ignore[index,call-overload,arg-type]
    # up is better: the ratio of a perplexity is drawn downwards
    assert trade["range"][0] > trade["range"][1]  # type: ignore[index,call-overload,operator]
    assert curve["range"][0] < curve["range"][1]  # type: ignore[index,call-overload,operator]


def test_what_was_assumed_of_missing_items_is_said() -> None:
    right = (1.0,) * 1000
    text = words(small(accuracy(unsteered=right, a_1=(None,) * 50 + right[50:])))
    assert "50 items missing there, and with the worst assumed of them, up to 6.4 points may be lost (change 0.0 (−0.2 to +0.2) without them)" in text


def test_both_directions_and_several_series_are_told_in_one_line() -> None:
    right, wrong = (1.0,) * 1000, (0.0,) * 200 + (1.0,) * 800
    values = {UNSTEERED: right, "a 1": right, "a -1": wrong}
    measure = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple(str(i) for i in range(1000)), values=values)
    assert words(small(measure, xs=(1.0, -1.0))).startswith("Within the tolerance on mmlu: up to alpha 1; at no negative alpha.")
    other = CostArm(name="a -1", series="b", x=-1.0)
    data = small(measure, arms=(CostArm(name=UNSTEERED), CostArm(name="a 1", series="a", x=1.0), other))
    assert words(data).startswith("Within the tolerance on mmlu: a up to alpha 1; b at no alpha.")


def test_nothing_swept_is_a_forest_of_specs_and_says_so() -> None:
    report = built("none")
    text = words(PAGES["none"])
    assert "Nothing was swept" in text
    assert report.analysis.reaches == ()
    figures = cost_figures(report.data, report.analysis)
    assert figures.kl is None
    assert [str(y) for y in figures.curves[1].data[1]["y"]] == ["mild", "strong", "other vectors"]  # type: ignore[union-attr]
    found = parsed("none")
    assert "How far one can go" not in found.words
    assert "Every spec against the unsteered model" in found.words


def test_a_sweep_without_an_order_has_no_largest_value_and_no_solid_line() -> None:
    report = built("layer")
    assert "A larger layer is not more steering" in words(PAGES["layer"])
    assert report.analysis.reaches == ()
    lines = [d["line"] for f in cost_figures(report.data, report.analysis).curves for d in f.data if d["mode"] == "lines+markers"]
    assert {line["dash"] for line in lines} == {"dot"}  # type: ignore[index,call-overload]


def test_many_specs_are_told_by_measure() -> None:
    right = (1.0,) * 300
    values = {UNSTEERED: right} | {f"a {i}": (0.0,) * (20 * i) + right[20 * i :] for i in range(6)}
    measure = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple(str(i) for i in range(300)), values=values)
    arms = (CostArm(name=UNSTEERED), *(CostArm(name=f"a {i}", series=f"a {i}") for i in range(6)))
    said = build_cost(small(measure, arms=arms, axis=None)).headline
    assert said.title == "A loss was measured under 5 of 6 steered arms."
    assert said.sentences[0].text.startswith("mmlu: from −33.3 (")
    assert "a gain is established under 0 of 6 steered arms; a loss is established under 5 of 6 steered arms" in said.sentences[0].text


def test_a_page_without_benefits_or_without_costs_says_what_it_cannot_say() -> None:
    right = (1.0,) * 900
    assert "not what it buys" in words(small(accuracy(unsteered=right, a_1=right)))
    gains = small(accuracy("fit", "benefit", unsteered=right, a_1=right))
    assert "not what it costs" in words(gains)
    assert "What steering costs was not measured." in words(gains)
    assert "Nothing was compared" in words(small(accuracy(unsteered=right)))


def test_a_gain_that_is_none_and_one_the_wrong_way_are_told_as_that() -> None:
    fine = accuracy(unsteered=(1.0,) * 900, a_1=(1.0,) * 900)
    flat = accuracy("fit", "benefit", unsteered=(1.0, 0.0) * 20, a_1=(1.0, 0.0) * 20)
    worse = accuracy("fit", "benefit", unsteered=(1.0,) * 40, a_1=(0.0,) * 30 + (1.0,) * 10)
    assert "no gain is shown" in words(small(fine, flat))
    assert "it went the wrong way" in words(small(fine, worse))


def test_too_few_items_for_the_correction_are_said() -> None:
    xs = tuple(float(i) for i in range(1, 9))
    values = {UNSTEERED: (0.0,) * 6} | {f"a {x:g}": (1.0,) * 6 for x in xs}
    measure = Measure(name="fit", role="benefit", kind="accuracy", items=tuple("abcdef"), values=values)
    assert "6 items are too few for the 8 comparisons of the benefits" in words(small(measure, xs=xs))


def test_missing_cells_are_shown_as_missing_and_never_as_zero() -> None:
    report = built("alpha")
    side = cost_figures(report.data, report.analysis).side
    assert side is not None
    heat = side.data[0]
    row, column = heat["y"].index("formality"), heat["x"].index("evil")  # type: ignore[union-attr]
    assert heat["z"][row][column] is None  # type: ignore[index,call-overload]
    assert heat["text"][row][column] == ""  # type: ignore[index,call-overload]
    assert [(a["x"], a["y"], a["text"]) for a in side.layout["annotations"]] == [("evil", "formality", "missing")]  # type: ignore[union-attr,index,call-overload]
    assert heat["zmin"] == -heat["zmax"]  # type: ignore[operator]
    rows = [[" ".join(cell.split()) for cell in row] for row in parsed("alpha").rows]
    head = rows.index(["vector added", "formality", "evil", "sycophantic"])
    assert next(row for row in rows[head:] if row[0] == "formality")[2] == "not measured"


def test_an_arm_that_was_left_out_of_a_measure_breaks_the_line_and_is_named() -> None:
    data = PAGES["alpha"]
    measures = tuple(
        m.model_copy(update={"values": {k: v for k, v in m.values.items() if k != "alpha 1"}}) if m.name == "mmlu" else m for m in data.measures
    )
    data = data.model_copy(update={"measures": measures})
    report = build_cost(data)
    line = next(d for d in cost_figures(data, report.analysis).curves[1].data if d["mode"] == "lines+markers")
    assert (line["x"], line["y"][2], line["connectgaps"]) == (list(ALPHAS), None, False)  # type: ignore[index,call-overload]
    assert "Not measured: mmlu under alpha 1." in words(data)
    assert "not measured" in page(data).words


def test_an_arm_whose_every_value_is_missing_renders_without_a_number() -> None:
    data = small(accuracy(unsteered=(1.0,) * 30, a_1=(None,) * 30), accuracy("fit", "benefit", unsteered=(1.0,) * 30, a_1=(None,) * 30))
    text = words(data)
    assert "30 of 30 items of mmlu are missing under a 1" in text
    assert "it was not measured there" in text
    assert "–" in page(data).words


def test_a_benefit_that_never_varies_is_shown_without_an_interval() -> None:
    scores = {UNSTEERED: (20.0,) * 9, "a 1": (60.0,) * 9}
    fit = Measure(name="fit", role="benefit", kind="score", scale=(0.0, 100.0), items=tuple("abcdefghi"), values=scores)
    data = small(accuracy(unsteered=(1.0,) * 900, a_1=(1.0,) * 900), fit)
    assert "fit is 60.0 on its scale of 0 to 100, +40.0 (no interval)" in words(data)
    assert "all 9 differences are equal" in page(data).words


def test_hostile_text_is_shown_and_never_run() -> None:
    values = {UNSTEERED: (1.0, 0.0, 1.0), EVIL: (1.0, None, 0.0), "v": (1.0, 0.0, 0.0)}
    measures = tuple(
        Measure(
            name=f"{role}{EVIL}",
            role=role,
            kind="accuracy",
            trait=EVIL,
            items=(EVIL, "b", "c"),
            groups=(EVIL, EVIL, "g"),
            values=values,
            reasons={EVIL: {EVIL: 1}},
            bands={EVIL: (0.2,) * 5},
            about=EVIL,
            chance=0.25,
        )
        for role in ("benefit", "cost")
    )
    data = CostData(
        title=EVIL,
        model=ModelInfo(name=EVIL, fingerprint=EVIL),
        axis=f"alpha {EVIL}",
        arms=(CostArm(name=UNSTEERED), CostArm(name=EVIL, series=EVIL, x=1.0, digest=EVIL, settings={EVIL: EVIL}), CostArm(name="v", trait=EVIL)),
        measures=measures,
        samples=(Sample(prompt=EVIL, replies=(Reply(arm=EVIL, text=EVIL, missing=EVIL),)),),
        settings={EVIL: EVIL},
        notes=(EVIL,),
    )
    found = page(data)
    assert found.tags.count("script") == 3
    assert "img" not in found.tags
    assert EVIL in "".join(found.text)
    assert "49" not in found.words
    report = build_cost(data)
    for figure in cost_figures(data, report.analysis).every:
        drawn = json.dumps([figure.data, figure.layout])
        # plotly reads a subset of HTML in names, labels and hover texts
        assert "<script" not in drawn
        assert "<img" not in drawn
    rows = list(csv.DictReader(cost_csv(report).splitlines()))
    assert {row["arm"] for row in rows} == {UNSTEERED, EVIL, "v"}


def traits(levels: dict[str, float], **more: Any) -> Measure:
    """Scores of a trait whose means are these, of which nobody says which way is better."""
    values = {arm: tuple(mean + (i % 5 if arm == UNSTEERED else i % 3) for i in range(20)) for arm, mean in levels.items()}
    named: dict[str, Any] = {
        "name": "trait evil",
        "role": "benefit",
        "kind": "score",
        "higher_is_better": None,
        "trait": "evil",
    }
    return Measure(**named, scale=(0.0, 100.0), items=tuple(map(str, range(20))), values=values, **more)


def test_a_trait_that_rises_or_falls_is_told_without_saying_which_is_better() -> None:
    fine = accuracy(unsteered=(1.0,) * 900, a_1=(1.0,) * 900)
    assert "no change is shown" in words(small(fine, traits({UNSTEERED: 50.0, "a 1": 51.0})))
    risen = build_cost(small(fine, traits({UNSTEERED: 50.0, "a 1": 80.0}))).headline.sentences[0]
    assert (risen.tone, "shown" in risen.text) == ("good", False)
    bad = accuracy(unsteered=(1.0,) * 900, a_1=(0.0,) * 900, a_2=(0.0,) * 900, a_3=(0.0,) * 900)
    levels = {UNSTEERED: 50.0, "a 1": 80.0, "a 2": 90.0, "a 3": 20.0}
    said = build_cost(small(bad, traits(levels), xs=(1.0, 2.0, 3.0))).headline.sentences[0]
    assert "a rise is established under 2 of 3 steered arms; a fall is established under 1 of 3 steered arms" in said.text
    assert said.tone == "good"


def test_a_benefit_is_told_once_where_neither_side_of_zero_reaches_anything() -> None:
    bad = accuracy(unsteered=(1.0,) * 900, **{"a_-1": (0.0,) * 900, "a_1": (0.0,) * 900})  # type: ignore[arg-type]
    said = build_cost(small(bad, traits({UNSTEERED: 50.0, "a -1": 80.0, "a 1": 80.0}), xs=(-1.0, 1.0))).headline
    assert [s.text.startswith("trait evil: +28.9") for s in said.sentences].count(True) == 1
    assert "under a -1, and the same under every other one of 2; a rise is established under 2 of 2" in said.sentences[0].text


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@sum", "\tx"])
def test_a_name_is_no_formula_to_a_spreadsheet_and_numbers_keep_their_signs(name: str) -> None:
    measure = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple("abcdefgh"), values={UNSTEERED: (1.0,) * 8, name: (0.0,) * 8})
    data = small(measure, arms=(CostArm(name=UNSTEERED), CostArm(name=name, series=name, x=-0.5)))
    row = list(csv.DictReader(cost_csv(build_cost(data)).splitlines()))[1]
    assert (row["arm"], row["series"]) == (f"'{name}", f"'{name}")
    assert (float(row["x"]), float(row["difference"])) == (-0.5, -1.0)
