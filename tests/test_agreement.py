"""Agreement among raters: published examples, other implementations, intervals that cover, and what cannot be said."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from steered_lm.cli import app
from steered_lm.errors import JudgeError, UserError
from steered_lm.judges.agreement import Agreement, agreement, bootstrap_interval
from steered_lm.judges.base import PREFERENCE, JudgeRequest, Usage, Verdict
from steered_lm.judges.panel import combine
from steered_lm.judges.verdicts import metric_of, read_verdicts

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", part C: four observers, twelve units, missing data
KRIPPENDORFF = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}
# the same paper, part A: two observers, ten units, binary; alpha = 0.095
BINARY = {"Meg": [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], "Owen": [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]}
# part B: two observers, twelve units, five nominal values; alpha = 0.692
NOMINAL = {"Ben": "aabbdcccedda", "Gerry": "babbbccceddd"}
# Cohen 1960's form with counts by hand: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no; kappa = (0.7 - 0.5) / 0.5
GRANTS = ([1.0] * 25 + [0.0] * 25, [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)


def names(n: int) -> list[str]:
    return [f"item {k}" for k in range(n)]


def agree(ratings: dict[str, Any], metric: Any = "ordinal", seed: int = 0) -> Agreement:
    return agreement(ratings, metric=metric, items=names(len(next(iter(ratings.values())))), seed=seed)


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorffs_on_his_own_data(metric: str, published: float) -> None:
    found = agree(KRIPPENDORFF, metric)
    assert round(found.alpha.value or 0, 3) == published
    assert (found.alpha.n, found.alpha.missing) == (11, 1)
    assert found.missing == {"A": 3, "B": 1, "C": 2, "D": 1}
    assert found.alpha.low is not None and found.alpha.high is not None and found.alpha.low < published < found.alpha.high


def test_alpha_of_binary_data_is_krippendorffs() -> None:
    assert round(agree(BINARY, "nominal").alpha.value or 0, 3) == 0.095
    # with two values every metric is the same
    assert agree(BINARY, "ordinal").alpha.value == pytest.approx(agree(BINARY, "interval").alpha.value) == pytest.approx(0.0952, abs=1e-3)


def test_alpha_of_nominal_data_is_krippendorffs() -> None:
    codes = {rater: [float("abcde".index(letter)) for letter in letters] for rater, letters in NOMINAL.items()}
    assert round(agree(codes, "nominal").alpha.value or 0, 3) == 0.692


def test_unweighted_kappa_is_the_textbooks() -> None:
    (pair,) = agree({"a": GRANTS[0], "b": GRANTS[1]}, "nominal").pairs
    assert pair.kappa.value == pytest.approx(0.4)
    assert pair.spearman is None and pair.gap is None
    assert pair.kappa.low is not None and pair.kappa.high is not None and pair.kappa.low < 0.4 < pair.kappa.high


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(1, 6, (2, 40)).astype(float)
    b[:20] = a[:20]
    (ordinal,) = agree({"a": a, "b": b}).pairs
    (nominal,) = agree({"a": a, "b": b}, "nominal").pairs
    assert ordinal.kappa.value == pytest.approx(cohen_kappa_score(a, b, labels=[1, 2, 3, 4, 5], weights="quadratic"), abs=1e-12)
    assert nominal.kappa.value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)


def test_quadratic_kappa_of_continuous_scores_is_lins_concordance() -> None:
    x, noise = np.random.default_rng(1).normal(size=(2, 60))
    y = 0.8 * x + 0.4 * noise + 10
    (pair,) = agree({"x": x, "y": y}, "interval").pairs
    by_hand = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert pair.kappa.value == pytest.approx(by_hand)
    assert pair.gap == pytest.approx(float((x - y).mean()))
    assert pair.spearman is not None and pair.spearman.value is not None and pair.spearman.value > 0.8


def test_pairs_are_compared_on_the_items_that_both_have() -> None:
    pairs = {(p.a, p.b): p for p in agree(KRIPPENDORFF).pairs}
    assert len(pairs) == 6
    assert (pairs["A", "C"].kappa.n, pairs["A", "C"].kappa.missing) == (8, 4)
    assert pairs["A", "C"].kappa.low is None
    assert pairs["A", "C"].kappa.reason == "8 items are too few for a bootstrap interval; 10 are needed"


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)

    truth = 1 / (1 + 0.7**2)  # the share of the items in a rater's variance, which is what alpha of exchangeable raters estimates
    hits = 0
    for seed in range(60):
        items = rng.normal(size=60)
        alpha = agree({str(k): items + 0.7 * rng.normal(size=60) for k in range(2)}, "interval", seed).alpha
        assert alpha.low is not None and alpha.high is not None
        hits += alpha.low <= truth <= alpha.high
    assert 51 <= hits <= 60


def test_the_same_seed_gives_the_same_interval_and_another_one_a_near_one() -> None:
    a, b = np.random.default_rng(3).integers(1, 6, (2, 50)).astype(float)
    b[:30] = a[:30]
    first, again, other = (agree({"a": a, "b": b}, seed=seed).alpha for seed in (0, 0, 1))
    assert first == again
    assert first.low != other.low
    assert first.low == pytest.approx(other.low, abs=0.05)


def test_raters_that_never_differ_have_no_alpha_and_a_reason() -> None:
    found = agree({"a": [3] * 20, "b": [3] * 20})
    assert found.alpha.value is None and found.alpha.reason == "alpha needs items with two scores, and scores that differ"
    assert found.pairs[0].kappa.value is None
    assert found.disagreements == ()
    nothing = agree({"a": [1, None], "b": [None, 2]})
    assert nothing.alpha.value is None and nothing.alpha.n == 0 and nothing.pairs[0].kappa.value is None


def test_perfect_agreement_is_one_without_an_interval() -> None:
    scores = [1.0, 2, 3, 4, 5] * 6
    found = agree({"a": scores, "b": scores})
    assert found.alpha.value == found.pairs[0].kappa.value == 1.0
    assert found.alpha.reason == "every resample gives the same value, which leaves no spread"


def test_scores_that_hardly_vary_have_a_reason_in_place_of_an_interval() -> None:
    found = agree({"a": [1.0] * 29 + [2.0], "b": [1.0] * 30}, "nominal")
    assert found.alpha.value is not None
    assert found.alpha.low is None and "nothing differs" in (found.alpha.reason or "")


def test_an_interval_lies_around_its_mean_for_a_plain_mean() -> None:
    x = np.random.default_rng(5).normal(size=100)
    found = bootstrap_interval(lambda weights: weights @ x / weights.sum(axis=1), 100, seed=0)
    assert not isinstance(found, str)
    half = 1.96 * x.std() / 10
    assert found == pytest.approx((x.mean() - half, x.mean() + half), abs=0.04)


def test_disagreements_are_listed_by_spread_with_every_raters_score() -> None:
    found = agree({"a": [1, 5, 3, None], "b": [2, 1, 3, 4], "c": [1, None, 3, 2]}, "interval")
    assert [(d.item, d.spread) for d in found.disagreements] == [("item 1", 4), ("item 3", 2), ("item 0", 1)]
    assert found.disagreements[0].scores == {"a": 5, "b": 1, "c": None}
    (choice,) = agree({"a": [0, 1], "b": [0, 2], "c": [0, 2]}, "nominal").disagreements
    assert choice.spread == pytest.approx(2 / 3)


def test_the_result_is_json() -> None:
    found = agree(KRIPPENDORFF)
    assert Agreement.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("ratings", "items", "metric", "said"),
    [
        ({"a": [1]}, ["x"], "ordinal", r"ratings are by 1 rater \(a\)"),
        ({"a": [1], "b": [1, 2]}, ["x"], "ordinal", r"ratings\['b'\] has 2 scores for 1 items"),
        ({"a": [1, 2], "b": [1, 2]}, ["x", "x"], "ordinal", "items repeat a name"),
        ({"a": [1, math.inf], "b": [1, 2]}, ["x", "y"], "ordinal", r"ratings\['a'\]\[1\] is infinite"),
        ({"a": [1, 2], "b": [1, 2]}, ["x", "y"], "ratio", "metric='ratio' is none. Allowed: interval, nominal, ordinal"),
    ],
)
def test_what_cannot_be_compared_is_refused(ratings: dict[str, Any], items: list[str], metric: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        agreement(ratings, metric=metric, items=items, seed=0)


def line(item: int, verdict: Verdict, *, rubric: str = "persona_fit@2", text: str = "It is.", other: str | None = None) -> str:
    request = JudgeRequest(prompt=f"What is {item}?", response=text, other=other)
    facts = {"file": "samples_x.jsonl", "id": str(item), "repeat": 0, **request.model_dump(mode="json", exclude_defaults=True)}
    return json.dumps(facts | {"judge": verdict.judge, "rubric": rubric, "about": "walt", "verdict": verdict.record()}) + "\n"


def said(judge: str, score: float | None, **facts: Any) -> Verdict:
    return Verdict(score=score, missing="HTTP 500" if score is None else None, judge=judge, usage=Usage(requests=1, input_tokens=100), **facts)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["judge", "agreement", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_shows_agreement_and_what_each_judge_took(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).integers(1, 6, (2, 30)).astype(float)
    scores[1, :20] = scores[0, :20]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(line(i, said("openai:a", None if i == 29 else score)) for i, score in enumerate(scores[0])))
    two.write_text("".join(line(i, said("openai:b", score, cached=i < 10)) for i, score in enumerate(scores[1])))
    done = invoke(one, two, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    a, b = report["judges"]
    assert (a["missing"], a["usage"]["requests"], a["usage"]["input_tokens"]) == ({"HTTP 500": 1}, 30, 3000)
    assert (b["cached"], b["usage"]["requests"]) == (10, 20)
    assert report["agreement"]["metric"] == "ordinal" and report["agreement"]["alpha"]["n"] == 29
    expected = cohen_kappa_score(scores[0, :29], scores[1, :29], labels=[1, 2, 3, 4, 5], weights="quadratic")
    assert report["agreement"]["pairs"][0]["kappa"]["value"] == pytest.approx(expected)
    assert f"{expected:.3f}" in done.output and "far apart: samples_x.jsonl:" in done.output and "1 x HTTP 500" in done.output


def test_a_panels_members_are_compared_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    verdicts = [
        combine([said("openai:a", 1 + i % 5), said("hf:b", 5 - i % 3), said("hf:b", 3)], "mean", quorum=2, judge="panel:trio") for i in range(12)
    ]
    path.write_text("".join(line(i, verdict) for i, verdict in enumerate(verdicts)))
    found = read_verdicts([path])
    assert list(found.judges) == ["panel:trio"]
    assert list(found.raters()) == ["openai:a", "hf:b", "hf:b #2"]
    done = invoke(path, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["agreement"]["raters"] == ["openai:a", "hf:b", "hf:b #2"]
    assert [(j["judge"], j["panel"], j["usage"]["requests"]) for j in report["judges"]] == [
        ("panel:trio", None, 36),
        ("openai:a", "panel:trio", 12),
        ("hf:b", "panel:trio", 12),
        ("hf:b #2", "panel:trio", 12),
    ]


def test_two_judges_of_one_name_that_differ_are_refused_and_never_mixed(tmp_path: Path) -> None:
    panel, single = tmp_path / "panel.jsonl", tmp_path / "single.jsonl"
    panel.write_text(line(0, combine([said("openai:a", 1), said("hf:b", 5)], "mean", quorum=2, judge="panel:duo")))
    single.write_text(line(0, said("openai:a", 1)))
    assert list(read_verdicts([panel, single]).raters()) == ["openai:a", "hf:b"]
    single.write_text(line(0, said("openai:a", 4)))
    with pytest.raises(JudgeError, match="two judges are called openai:a, a member of panel:duo one of them, and they differ on"):
        read_verdicts([panel, single]).raters()


def test_choices_are_compared_as_such(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    choices = ["A", "B", "tie"] * 5
    preference = {"A": 1.0, "B": -0.4, "tie": 0.0}
    lines = [
        line(i, Verdict(score=preference[c], scale=PREFERENCE, choice=c, judge=judge), other="No.")
        for judge in ("x", "y")
        for i, c in enumerate(choices if judge == "x" else [*choices[:10], "A", "A", "A", "A", "A"])
    ]
    path.write_text("".join(lines))
    found = read_verdicts([path])
    assert metric_of(found.raters()) == "nominal"
    done = invoke(path, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["codes"] == {"A": 1, "tie": 0, "B": -1}
    assert "x B, y A" in done.output or "x tie, y A" in done.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [line(0, said("a", 3)), line(1, said("a", 3), rubric="coherence@1")],
            "line 2, is about coherence@1 of walt, and",
        ),
        ([line(0, said("a", 3)), line(0, said("b", 3), text="Other.")], "line 2, has other texts for samples_x.jsonl:0"),
        ([line(0, said("a", 3)), line(0, said("a", 4))], "line 2, is a second verdict of a on samples_x.jsonl:0"),
        ([line(0, said("a", 3)), "{"], "line 2, is not JSON"),
        (['{"file": "x", "id": "1"}\n'], "line 1, lacks prompt, response, verdict"),
        ([line(0, said("a", 3)).replace('"score": 3', '"score": 30')], "line 1, has a verdict that is none"),
        ([""], "there is no verdict in it"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(JudgeError, match=message):
        read_verdicts([path])


def test_one_judge_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text(line(0, said("a", 3)))
    assert "Agreement takes two judges" in str(invoke(path).exception)
    assert "--metric 'ratio'. Allowed: auto" in str(invoke(path, "--metric", "ratio").exception)
