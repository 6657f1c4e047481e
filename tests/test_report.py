"""The report: raw scores in, statistics, figures, one self-contained page and its JSON out."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from html_page import Page, numbers_in
from report_data import TARGET, TRAITS, minimal, null_result, realistic, scored, with_missing

from steered_lm.errors import RunError
from steered_lm.report import Report, ReportData, build_report, load_report, render
from steered_lm.report.analysis import analyse
from steered_lm.report.data import Arm, CapabilityTask, JudgeInfo, PersonaInfo, Reply, Sample, SearchTrace, TraitInfo
from steered_lm.report.figures import figures


def words(data: ReportData) -> str:
    said = build_report(data).headline
    return " ".join([said.title, *(s.text for s in said.sentences)])


def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(realistic(), tmp_path_factory.mktemp("report")).html


def test_the_page_loads_nothing_and_forbids_itself_to(rendered: Path) -> None:
    page = parsed(rendered)
    assert page.fetched == []
    assert page.links == ["report.json"]
    assert "link" not in page.tags
    text = rendered.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_inlined_plotly_stays_inside_its_script_tag(rendered: Path) -> None:
    assert parsed(rendered).tags.count("script") == 3


def test_the_json_beside_the_page_reads_back_to_the_same_report(rendered: Path) -> None:
    file = rendered.with_suffix(".json")
    assert load_report(file) == realistic()
    assert Report.model_validate_json(file.read_text(encoding="utf-8")) == build_report(realistic())


def test_bare_report_data_survives_a_json_round_trip(tmp_path: Path) -> None:
    data = realistic()
    assert ReportData.model_validate_json(data.model_dump_json()) == data
    (tmp_path / "bare.json").write_text(data.model_dump_json(), encoding="utf-8")
    assert load_report(tmp_path / "bare.json") == data


def test_a_file_name_ending_in_html_names_the_page(tmp_path: Path) -> None:
    files = render(minimal(), tmp_path / "deep" / "ada.html")
    assert (files.html.name, files.json.name) == ("ada.html", "ada.json")
    assert parsed(files.html).links == ["ada.json"]
    assert sorted(p.name for p in files.html.parent.iterdir()) == ["ada.html", "ada.json"]


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = render(realistic(), tmp_path / "one"), render(realistic(), tmp_path / "two")
    assert one.html.read_bytes() == two.html.read_bytes()
    assert one.json.read_bytes() == two.json.read_bytes()


@pytest.mark.parametrize("make", [realistic, null_result, minimal])
def test_every_number_that_a_figure_draws_is_in_the_json(make: Any) -> None:
    report = build_report(make())
    known = numbers_in(json.loads(report.model_dump_json()))
    for figure in figures(report.data, report.analysis).values():
        for drawn in figure.data:
            assert numbers_in({k: drawn[k] for k in ("x", "y", "z") if k in drawn}) <= known, figure.name


@pytest.mark.parametrize("make", [realistic, null_result, minimal])
def test_plotly_accepts_every_figure(make: Any) -> None:
    report = build_report(make())
    for figure in figures(report.data, report.analysis).values():
        go.Figure(data=figure.data, layout=figure.layout)


def test_a_full_report_has_all_five_figures() -> None:
    report = build_report(realistic())
    assert set(figures(report.data, report.analysis)) == {"convergence", "levels", "differences", "traits", "capability"}


def test_a_shown_effect_is_told_with_its_interval_items_and_corrected_p() -> None:
    report = build_report(realistic())
    effect = report.analysis.against("CMA-ES", "unsteered")
    assert effect is not None
    assert effect.outcome == "higher"
    assert report.headline.tone == "good"
    text = words(realistic())
    for part in (
        "on 12 held-out prompts",
        "95% interval +1.50 to +2.34",
        "corrected for 8 comparisons",
        "A system prompt (prompted persona) reaches",
    ):
        assert part in text


def test_a_null_result_is_not_told_as_a_success() -> None:
    report = build_report(null_result())
    assert report.headline.tone == "unclear"
    assert report.headline.title == "No effect of steering on the persona fit could be shown."
    assert "The interval includes zero" in report.headline.sentences[0].text
    assert not any(s.tone == "good" for s in report.headline.sentences)
    assert "raised" not in words(null_result())


def test_a_harmful_effect_is_told_as_harm() -> None:
    said = build_report(realistic(effect=-0.9)).headline
    assert (said.tone, said.title) == ("bad", "Steering lowered the persona fit.")


def test_an_interval_without_zero_that_fails_the_correction_is_only_a_hint() -> None:
    n = 6
    steered = Arm(name="steered", kind="optimized", scores=(2.5, 2.6, 2.7, 2.8, 2.9, 3.0))
    base = Arm(name="unsteered", kind="unsteered", scores=(2.0,) * n)
    others = tuple(Arm(name=f"other {i}", kind="other", scores=(2.0, 2.1, 1.9, 2.0, 2.05, 1.95)) for i in range(3))
    data = minimal(items=tuple("abcdef"), arms=(base, steered, *others))
    report = build_report(data)
    effect = report.analysis.against("steered", "unsteered")
    assert effect is not None
    assert effect.difference.excludes_zero
    assert effect.p_holm == pytest.approx(4 * 2 / 2**6)
    assert effect.outcome == "uncorrected"
    assert report.headline.tone == "unclear"
    assert "too few items" in words(data)


def test_a_null_arm_that_differs_takes_the_verdict_back() -> None:
    report = build_report(realistic(null_shift=1.0))
    assert report.analysis.null[0].outcome == "higher"
    assert report.headline.tone == "warning"
    assert "failed its own checks" in report.headline.title


def test_the_null_arm_does_not_count_into_the_correction() -> None:
    analysis = build_report(realistic()).analysis
    assert analysis.family == len(analysis.comparisons) == 8
    assert [c.arm for c in analysis.null] == ["unsteered again"]
    assert analysis.null[0].p_holm is None


def test_a_judge_at_chance_takes_the_verdict_back() -> None:
    data = realistic().model_copy(update={"judge": JudgeInfo(name="stylometric", auc=0.55, auc_low=0.44, auc_high=0.66)})
    report = build_report(data)
    assert report.headline.tone == "warning"
    assert "so its scores mean nothing" in words(data)


def test_an_unvalidated_judge_and_an_unmeasured_cost_are_said_aloud() -> None:
    data = realistic().model_copy(update={"judge": JudgeInfo(name="stylometric"), "capability": ()})
    assert "was not validated" in words(data)
    assert "What steering costs in capability was not measured." in words(data)


def test_missing_verdicts_are_dropped_pairwise_counted_and_visible(rendered: Path) -> None:
    analysis = build_report(realistic()).analysis
    prompted = analysis.against("prompted persona", "unsteered")
    assert prompted is not None
    assert (prompted.difference.n, prompted.difference.missing) == (11, 1)
    text = parsed(rendered).words
    assert "prompted persona 1," in text
    assert "empty reply: 1" in text


def test_an_arm_that_misses_many_verdicts_brings_a_warning() -> None:
    data = realistic()
    arms = tuple(a.model_copy(update={"scores": with_missing(a.scores, 0, 1, 2)}) if a.name == "CMA-ES" else a for a in data.arms)
    assert "3 of 12 verdicts of CMA-ES are missing, more than 10%" in words(data.model_copy(update={"arms": arms}))


def test_an_arm_without_any_verdict_is_reported_and_not_drawn(tmp_path: Path) -> None:
    data = realistic()
    arms = tuple(a.model_copy(update={"scores": (None,) * 12}) if a.name == "CMA-ES" else a for a in data.arms)
    data = data.model_copy(update={"arms": arms})
    report = build_report(data)
    assert report.headline.title == "Steering could not be compared: no item has a score on both sides."
    assert not any("CMA-ES vs" in str(d["y"]) for d in figures(data, report.analysis)["differences"].data)
    render(data, tmp_path)


def test_a_trait_that_an_arm_lacks_is_an_empty_cell_not_a_zero() -> None:
    report = build_report(realistic())
    heat = figures(report.data, report.analysis)["traits"].data[0]
    row, column = heat["y"].index("equal weights"), TRAITS.index("narrative_mode")  # type: ignore[union-attr]
    assert heat["z"][row][column] is None  # type: ignore[index,call-overload]
    assert heat["z"][0] == list(TARGET.values())  # type: ignore[index,call-overload]


def test_a_direction_no_better_than_chance_is_named() -> None:
    report = build_report(realistic())
    assert [v.separates for v in report.analysis.vectors] == [True, True, True, False, True]
    assert "no better than chance: narrative_mode at layer 4" in words(realistic())


@pytest.mark.parametrize(("wrong", "says", "tone"), [(0, "No loss is shown", "unclear"), (40, "larger than chance explains", "bad")])
def test_the_capability_cost_is_worded_by_its_interval(wrong: int, says: str, tone: str) -> None:
    task = CapabilityTask(name="facts", arm="CMA-ES", unsteered=(1.0,) * 60, steered=(0.0,) * wrong + (1.0,) * (60 - wrong))
    report = build_report(realistic().model_copy(update={"capability": (task,)}))
    cost = next(s for s in report.headline.sentences if s.text.startswith("Cost: facts"))
    assert (says in cost.text, cost.tone) == (True, tone)


def test_lower_is_better_scores_are_judged_the_right_way_round() -> None:
    rng = np.random.default_rng(0)
    task = CapabilityTask(
        name="perplexity", arm="CMA-ES", metric="score", higher_is_better=False, unsteered=scored(rng, 2.0, 20), steered=scored(rng, 4.0, 20)
    )
    report = build_report(realistic().model_copy(update={"capability": (task,)}))
    assert next(s for s in report.headline.sentences if "perplexity" in s.text).tone == "bad"


def test_the_optimism_gap_compares_tuning_with_the_held_out_scores() -> None:
    data = realistic()
    gap = next(g for g in build_report(data).analysis.gaps if g.arm == "CMA-ES")
    main = data.main_arm
    assert main is not None
    assert gap.test.value == pytest.approx(np.mean([s for s in main.scores if s is not None]))
    assert gap.gap.value == pytest.approx(np.mean([s for s in main.tuning if s is not None]) - (gap.test.value or math.nan))


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
    base = minimal(title=evil, persona=PersonaInfo(name=evil, description=evil, traits=(TraitInfo(name=evil, target=0.1),)))
    arms = (
        Arm(name="unsteered", kind="unsteered", scores=(2.0, 3.0), missing_reasons={evil: 1}),
        Arm(name=evil, kind="optimized", scores=(3.0, 5.0), traits={evil: (0.1, None)}, note=evil),
    )
    sample = Sample(prompt=evil, replies=(Reply(arm=evil, text=evil, missing=evil),))
    more = {
        "arms": arms,
        "samples": (sample,),
        "settings": {evil: evil},
        "notes": (evil,),
        "searches": (SearchTrace(optimizer=evil, generations=()),),
    }
    page = render(base.model_copy(update=more), tmp_path).html
    found = parsed(page)
    assert found.tags.count("script") == 3
    assert "img" not in found.tags
    assert evil in "".join(found.text)


def test_the_least_report_still_renders_and_says_what_is_not_there(tmp_path: Path) -> None:
    text = parsed(render(minimal(), tmp_path).html).words
    for part in (
        "there is no verdict on steering",
        "there is nothing to compare",
        "No search was recorded",
        "Trait levels were not measured",
        "The capability cost was not measured",
        "There is no null arm",
    ):
        assert part in text


@pytest.mark.parametrize("score", [1.0, 5.0])
def test_scores_stuck_at_an_end_of_the_scale_get_no_interval_and_no_success(score: float, tmp_path: Path) -> None:
    arms = (Arm(name="unsteered", kind="unsteered", scores=(1.0,) * 8), Arm(name="steered", kind="optimized", scores=(score,) * 8))
    data = minimal(items=tuple("abcdefgh"), arms=arms)
    assert "no interval: all 8 differences are equal" in words(data)
    assert build_report(data).headline.tone == "unclear"
    render(data, tmp_path)


def test_a_thousand_items_and_long_names_render(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    name = "a_very_long_arm_name_" * 6
    arms = (
        Arm(name="unsteered", kind="unsteered", scores=scored(rng, 2.0, 1000)),
        Arm(name=name, kind="optimized", scores=scored(rng, 3.0, 1000)),
    )
    data = minimal(items=tuple(str(i) for i in range(1000)), arms=arms)
    assert build_report(data).headline.tone == "good"
    assert render(data, tmp_path).html.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": ("a", "b", "c")}, "scores has 2 values for 3 items; give one an item, None for missing"),
        ({"arms": (Arm(name="x", kind="other", scores=(1.0, 2.0)),)}, "exactly one arm of kind 'unsteered'"),
        ({"arms": (Arm(name="x", kind="unsteered", scores=(1.0, 2.0)), Arm(name="x", kind="other", scores=(1.0, 2.0)))}, "arms repeat a name"),
        ({"arms": (Arm(name="x", kind="unsteered", scores=(1.0, 7.0)),)}, "score 7.0 is off the judge's scale 1 to 5"),
        ({"main": "nobody"}, "main names arm 'nobody'. Allowed: unsteered"),
        ({"samples": (Sample(prompt="p", replies=(Reply(arm="nobody", text="hi"),)),)}, "names arm 'nobody'"),
        ({"capability": (CapabilityTask(name="f", arm="unsteered", unsteered=(1.0,), steered=()),)}, "give both the same"),
        ({"capability": (CapabilityTask(name="f", arm="unsteered", unsteered=(0.5,), steered=(1.0,)),)}, "neither 0, 1 nor None"),
        ({"confidence": 1.0}, "less than 1"),
    ],
)
def test_inconsistent_data_are_refused_with_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        minimal(**change)


def test_a_score_that_is_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Arm(name="x", kind="other", scores=(math.nan,))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "neither valid YAML nor JSON"), ("{}", "title: Field required"), ('{"data": 3}', "not a valid ReportData")]
)
def test_a_file_that_holds_no_report_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=re.escape(message)):
        load_report(tmp_path / "r.json")


def test_a_missing_report_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        load_report(tmp_path / "none.json")


def test_a_null_arm_may_repeat_another_arm_which_is_then_compared_with_nothing_else() -> None:
    data = realistic()
    null = next(a for a in data.arms if a.kind == "null")
    sampled = null.model_copy(update={"name": "sampled", "kind": "other", "note": ""})
    arms = (*(a for a in data.arms if a.kind != "null"), sampled, null.model_copy(update={"reference": "sampled"}))
    analysis = analyse(data.model_copy(update={"arms": arms}))
    assert [(c.arm, c.baseline) for c in analysis.null] == [(null.name, "sampled")]
    assert not [c for c in analysis.comparisons if "sampled" in (c.arm, c.baseline)]
    with pytest.raises(ValueError, match="reference of arm"):
        ReportData.model_validate({**data.model_dump(), "arms": [a.model_copy(update={"reference": "nobody"}).model_dump() for a in arms]})
