"""An experiment's numbers, its page and its pictures."""

import json
import random
import re
from html.parser import HTMLParser
from statistics import fmean

import pytest

from steered_lm.errors import MissingDependencyError
from steered_lm.judges.items import JudgedItem
from steered_lm.report.trait_models import results_page, slugs, trait_figure, write_pngs, write_results
from steered_lm.stats import holm, mean_interval, paired_difference
from steered_lm.trait_models.evaluation import Record
from steered_lm.trait_models.experiment import Experiment
from steered_lm.trait_models.results import Results, cell, gather

LEVELS = {"baseline": 20, "mild": 45, "severe": 75}
TRAITS = ("hallucinating", "evil", "sycophantic")


def experiment(traits=TRAITS, strengths=tuple(LEVELS), name="trial", **more):
    models = [
        {"name": f"{trait}-{strength}", "dataset": f"{strength}_{trait}", "trait": trait, "strength": strength}
        for trait in traits
        for strength in strengths
    ]
    evaluation = {"tasks": list(traits), "judge": "openai:m"}
    data = {"name": name, "models": models, "training": {"base_model": "base"}, "evaluation": evaluation, **more}
    return Experiment.parse(data, source="test")


def record(level, seed=0, missing=0, refusals=0, n=20, dummy=False):
    draw = random.Random(seed)
    items = []
    for number in range(n):
        score = None if number < missing else min(100.0, max(0.0, draw.gauss(level, 15)))
        items.append(
            JudgedItem(
                id=f"q-{number:02d}",
                trait_score=score,
                coherence=90.0 - number % 3,
                refusals=int(number < refusals),
                missing=int(refusals <= number < missing),
                coherence_missing=0,
                responses=("never shown",),
            )
        )
    return Record(items, {"trait": "a" * 64, "coherence": "b" * 64}, dummy)


def made(traits=TRAITS, *, dummy=False, **settings):
    """Results where the trained trait rises and the others do not."""
    asked = experiment(traits, **settings)
    cells = []
    for number, model in enumerate(asked.models):
        for place, task in enumerate(traits):
            level = LEVELS[model.strength] if task == model.trait else 15 + 8 * place
            cells.append(cell(model, task, record(level, seed=100 * number + place, missing=2, refusals=1, dummy=dummy)))
    return gather(asked, cells)


def test_numbers_are_means_over_questions_with_intervals_and_counts(tmp_path):
    asked = experiment(("evil",))
    records = {"baseline": record(20, 1, missing=3, refusals=2), "mild": record(45, 2), "severe": record(75, 3, missing=1)}
    cells = [cell(model, "evil", records[model.strength]) for model in asked.models]
    found = gather(asked, cells[::-1])
    assert [one.strength for one in found.cells] == ["baseline", "mild", "severe"]
    base, mild, severe = found.cells
    scores = [item.trait_score for item in records["baseline"].items]
    assert base.score.value == pytest.approx(fmean(score for score in scores if score is not None))
    assert base.score == mean_interval(scores, bounds=(0.0, 100.0))
    assert (base.score.n, base.score.missing, base.refusals, base.missing) == (17, 3, 2, 1)
    assert base.change is None
    assert severe.change == paired_difference(severe.scores, base.scores, seed=0)
    assert (severe.change.n, severe.change.missing) == (17, 3)
    assert severe.change.low > 0
    assert [mild.p_holm, severe.p_holm] == holm([mild.change.p_value, severe.change.p_value])


def test_an_interval_ends_where_the_scale_ends():
    (model,) = experiment(("evil",), ("severe",)).models
    found = cell(model, "evil", record(99, 4, n=4))
    assert found.score.high == 100.0


def test_a_change_is_only_given_against_one_baseline_with_the_same_questions():
    asked = experiment(("evil",), ("baseline", "severe"))
    base, severe = (cell(model, "evil", record(50, number)) for number, model in enumerate(asked.models))
    assert gather(asked, [base, severe]).cells[1].change is not None
    other = base.model_copy(update={"model": "second"})
    twice = asked.model_copy(update={"models": (*asked.models, asked.models[0].model_copy(update={"name": "second"}))})
    assert all(one.change is None for one in gather(twice, [base, severe, other]).cells)
    shorter = cell(asked.models[1], "evil", record(50, 1, n=10))
    assert gather(asked, [base, shorter]).cells[1].change is None
    unready = cell(asked.models[1], "evil", reason="running")
    assert gather(asked, [base, unready]).cells[1].change is None


def test_results_are_written_as_json_that_reads_back_and_as_a_page_and_both_are_the_same_each_time(tmp_path):
    found = made()
    one, two = (write_results(made(), tmp_path / name) for name in ("one", "two"))
    assert Results.parse(json.loads(one.json.read_text()), source="test") == found
    assert one.json.read_bytes() == two.json.read_bytes()
    assert one.html.read_bytes() == two.html.read_bytes()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def plots(page):
    return json.loads(re.search(r'<script type="application/json" id="plots">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_has_a_tab_a_trained_trait_a_line_a_task_and_every_number_of_the_json():
    found = made()
    page = results_page(found)
    read = Page(page)
    tabs = [attrs for tag, attrs in read.tags if attrs.get("role") == "tab"]
    panels = [attrs["id"] for tag, attrs in read.tags if attrs.get("role") == "tabpanel"]
    assert [tab["aria-controls"] for tab in tabs] == panels == ["panel-01-hallucinating", "panel-02-evil", "panel-03-sycophantic"]
    assert read.loads == []
    drawn = plots(page)
    for trait, slug in slugs(found).items():
        traces = drawn[slug]["data"]
        assert [trace["name"] for trace in traces] == [f"{trait} (trained)", *(task for task in TRAITS if task != trait)]
        assert drawn[slug]["layout"]["xaxis"]["ticktext"] == ["baseline", "mild", "severe"]
        assert drawn[slug]["layout"]["yaxis"]["range"] == [-2, 102]
        for trace in traces:
            own = [one for one in found.of_trait(trait) if one.task == trace["name"].removesuffix(" (trained)")]
            assert trace["y"] == [one.score.value for one in own]
            bars = trace["error_y"]
            assert [y - low for y, low in zip(trace["y"], bars["arrayminus"], strict=True)] == pytest.approx([one.score.low for one in own])
            assert [y + high for y, high in zip(trace["y"], bars["array"], strict=True)] == pytest.approx([one.score.high for one in own])
    text = " ".join(" ".join(read.texts).split())
    for one in found.cells:
        assert f"{one.score.value:.1f} ({one.score.low:.1f} to {one.score.high:.1f})" in text
    assert "never shown" not in page
    assert "DUMMY" not in page


def test_what_has_no_numbers_leaves_a_gap_and_says_why():
    asked = experiment(("evil",))
    reasons = {"mild": "failed: out of memory"}
    cells = [cell(m, "evil", reason=reasons[m.strength]) if m.strength in reasons else cell(m, "evil", record(50, 1)) for m in asked.models]
    page = results_page(gather(asked, cells))
    (trace,) = plots(page)["01-evil"]["data"]
    assert trace["y"][1] is None
    assert trace["error_y"]["array"][1] is None
    assert trace["connectgaps"] is False
    assert "failed: out of memory" in page


def test_models_of_the_same_strength_have_places_of_their_own():
    asked = experiment(("evil",), ("baseline", "severe"))
    twin = asked.models[1].model_copy(update={"name": "again"})
    asked = asked.model_copy(update={"models": (*asked.models, twin)})
    found = gather(asked, [cell(model, "evil", record(50, 1)) for model in asked.models])
    assert trait_figure(found, "evil", "x").layout["xaxis"]["ticktext"] == ["baseline", "severe: evil-severe", "severe: again"]


def test_dummy_models_are_marked_wherever_they_show(tmp_path):
    found = made(dummy=True)
    page = results_page(found)
    read = Page(page)
    assert found.dummy
    assert page.count(">DUMMY<") == len(found.cells)
    assert "<title>DUMMY" in page
    for slug in slugs(found).values():
        assert "DUMMY" in plots(page)[slug]["layout"]["annotations"][0]["text"]
    assert sum("DUMMY" in attrs.get("aria-label", "") for _, attrs in read.tags) == 3
    marked, plain = write_pngs(found, tmp_path / "a")[0], write_pngs(made(), tmp_path / "b")[0]
    assert marked.read_bytes() != plain.read_bytes()


def test_texts_of_the_experiment_are_escaped():
    evil = "<script>alert(1)</script>"
    asked = experiment(("evil",))
    found = gather(asked, [cell(model, "evil", reason=evil) for model in asked.models]).model_copy(update={"base_model": evil, "judge": evil})
    page = results_page(found)
    assert evil not in page
    assert page.count("&lt;script&gt;alert(1)") == 5
    named = gather(asked, [cell(model, evil, record(5, 1)) for model in asked.models])
    assert evil not in results_page(named)
    assert "&lt;script" in json.dumps(plots(results_page(named)))


def test_every_tab_is_a_picture_and_the_same_one_each_time(tmp_path):
    one, two = (write_pngs(made(), tmp_path / name) for name in ("one", "two"))
    assert [file.name for file in one] == [f"results-0{number}-{trait}.png" for number, trait in enumerate(TRAITS, 1)]
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes().startswith(b"\x89PNG")
        assert first.read_bytes() == second.read_bytes()
    assert len({file.read_bytes() for file in one}) == 3


def test_without_matplotlib_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'steered-lm[png]'")):
        write_pngs(made(), tmp_path)
