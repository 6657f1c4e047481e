"""Audits: a good judge passes, and each kind of bad judge is caught by the part that is made for it."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer, fault, guesses
from scipy import stats
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import JudgeError
from steered_lm.judges import make_judge
from steered_lm.judges.audit import audit, audit_requests, beside_cache, estimate_usage
from steered_lm.judges.audit_gate import FILE_NAME, check_judge
from steered_lm.judges.audit_items import audit_items, load_anchors
from steered_lm.judges.audit_report import AuditReport
from steered_lm.judges.base import JudgeRequest, Usage, Verdict
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge
from steered_lm.judges.detectable import auc_interval, detectable_difference, noise_sd, prompts_needed
from steered_lm.judges.pairwise import BothOrders
from steered_lm.judges.panel import Panel
from steered_lm.judges.question import Question, trait_descriptions
from steered_lm.persona.load import list_personas, load_persona

Rule = Callable[[JudgeRequest], float | None]
EDMUND = load_persona("edmund")
FIT = Question.of_persona(EDMUND)
PAIRS = Question.of_persona(EDMUND, "pairwise")
LEVELS = {anchor.response: anchor.level for trait in trait_descriptions() for anchor in load_anchors(Path(f"tasks/rubrics/anchors/{trait}.jsonl"))}
OWN = [text for split in ("build", "tune", "validate", "test") for text in EDMUND.utterances(split)]


class Ruled:
    """A judge whose scores a test decides, cut to the scale; it counts what it was asked."""

    def __init__(self, question: Question, rule: Rule, *, name: str = "ruled", sd: float = 0.0, seed: int = 0) -> None:
        self.name = self.identity = name
        self.asked = 0
        self._question, self._rule, self._sd = question, rule, sd
        self._noise = np.random.default_rng(seed)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.asked += len(requests)
        low, high = self._question.bounds
        scores = [self._rule(r) for r in requests]
        noise = self._noise.normal(0.0, self._sd, len(requests))
        return [
            Verdict(missing="HTTP 500", scale=(low, high), judge=self.name)
            if score is None
            else Verdict(score=float(np.clip(score + error, low, high)), scale=(low, high), judge=self.name, usage=Usage(requests=1, input_tokens=5))
            for score, error in zip(scores, noise, strict=True)
        ]


def fits(request: JudgeRequest) -> float:
    """4 for the persona's own replies, whole and at any length, 2 for others and for broken ones."""
    return 4.0 if any(text in request.response for text in OWN) else 2.0


def prefers(request: JudgeRequest) -> float:
    own, other = (any(text in response for text in OWN) for response in (request.response, request.other or ""))
    return float(own) - float(other)


def audited(rule: Rule, *, sd: float = 0.0, count: int = 12, **settings: float) -> AuditReport:
    judge = Ruled(FIT, rule, sd=sd)
    return audit(judge, FIT, audit_items(FIT, count=count), **{"effect": 0.5, "prompts": 50, **settings})


def audited_pairs(rule: Rule, sd: float = 0.0) -> AuditReport:
    return audit(BothOrders(Ruled(PAIRS, rule, sd=sd)), PAIRS, audit_items(PAIRS))


def outcomes(report: AuditReport) -> dict[str, str]:
    return {part.name: part.outcome for part in report.parts}


def failed(report: AuditReport) -> list[str]:
    return [part.name for part in report.failures]


# Good judges


def test_a_good_judge_passes_every_part() -> None:
    report = audited(fits, sd=0.1)
    assert outcomes(report) == dict.fromkeys(("missing", "retest", "null", "length", "anchors", "broken", "noise"), "pass") | {"order": "n/a"}
    assert report.trusted
    assert report.conclusion() == "judge ruled is trusted for a difference of 0.5 at 50 prompts"
    assert report.items == {"high": 12, "low": 12, "longer": 12, "shuffled": 6, "repeated": 6}
    assert report.judgements == 48 + 24
    assert report.usage == Usage(requests=72, input_tokens=360)
    assert AuditReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("trait", sorted(trait_descriptions()))
def test_every_trait_of_ours_has_six_high_and_six_low_anchors_that_say_the_same_at_greater_length(trait: str) -> None:
    question = Question.of_trait(trait)
    items = audit_items(question)
    assert [sum(item.sort == sort for item in items) for sort in ("high", "low", "longer")] == [6, 6, 6]
    assert len({item.request.response for item in items}) == len(items)
    longer = {item.request.response: items[item.of].request for item in items if item.sort == "longer" and item.of is not None}

    def level(request: JudgeRequest) -> float:
        short = longer.get(request.response, request)
        assert short.prompt == request.prompt
        return 90.0 if LEVELS[short.response] == "high" else 5.0

    assert audit(Ruled(question, level), question, items).trusted


@pytest.mark.parametrize("kind", ["coherence", "truthful", "informative", "instruction"])
def test_other_kinds_have_anchors_too_and_a_judge_of_the_wrong_way_round_fails_on_them(kind: str) -> None:
    question = Question.of_kind(kind)
    items = audit_items(question)
    assert all(sum(item.sort == sort for item in items) >= 6 for sort in ("high", "low"))
    assert any(item.sort == "longer" for item in items)
    assert kind != "truthful" or all(item.request.references and item.request.false_references for item in items)
    low = {item.request.response for item in items if item.sort == "low"}
    assert audit(Ruled(question, lambda r: 0.0 if r.response in low else 100.0), question, items).trusted
    assert "anchors" in failed(audit(Ruled(question, lambda r: 100.0 if r.response in low else 0.0), question, items))


@pytest.mark.parametrize("name", list_personas())
def test_the_stylometric_judge_is_trusted_for_every_persona_of_ours(name: str, tmp_path: Path) -> None:
    question = Question.of_persona(load_persona(name))
    report = check_judge(make_judge("stylometric", question), question, tmp_path, effect=0.5, prompts=9)
    assert report.trusted
    assert report.judgements == 48
    assert outcomes(report)["broken"] == "warn"  # it does not read the order of words, and says so
    assert "shuffled" in report.part("broken").sentence


def test_a_deterministic_judge_has_no_noise_found_and_an_honest_bound() -> None:
    report = audited(fits)
    noise = report.part("retest").estimate
    assert noise is not None
    assert (noise.value, noise.low, noise.high) == (0.0, None, None)
    assert "none found in 2 repeats: no score changed on 24 items; up to 12% of items may still change" in report.part("retest").sentence
    assert report.detectable[0].noise == 0.0


# Bad judges


def test_a_noisy_judges_standard_deviation_is_found_and_is_too_large_for_the_effect() -> None:
    report = audit(Ruled(FIT, lambda r: 3.5 if fits(r) == 4.0 else 2.5, sd=0.6), FIT, audit_items(FIT, count=18), effect=0.3, prompts=50, repeats=4)
    noise = report.part("retest").estimate
    assert noise is not None and noise.value is not None and noise.low is not None and noise.high is not None
    assert noise.low < 0.6 < noise.high
    assert noise.value == pytest.approx(0.6, rel=0.15)
    assert "noise" in failed(report)
    assert "sought is 0.3" in report.part("noise").sentence
    assert "prompts are needed by noise alone" in report.part("noise").sentence
    assert report.needed_noise == prompts_needed(noise.value * 2**0.5, 0.3) > 50
    assert next(row.noise for row in report.detectable if row.prompts == 50) == pytest.approx(detectable_difference(noise.value * 2**0.5, 50))


def test_the_scatter_between_replies_is_never_said_to_be_less_than_the_judges_noise() -> None:
    for seed in range(5):
        report = audit(Ruled(FIT, fits, sd=0.4, seed=seed), FIT, audit_items(FIT))
        assert all(row.noise is not None and row.replies is not None and row.noise <= row.replies for row in report.detectable)


def test_noise_that_may_be_too_large_is_a_warning() -> None:
    report = audit(Ruled(FIT, fits, sd=0.5), FIT, audit_items(FIT, count=8), effect=0.5, prompts=20)
    least = report.part("noise").estimate
    assert least is not None and least.value is not None and least.high is not None
    assert least.value <= 0.5 < least.high
    assert outcomes(report)["noise"] == "warn"


def test_a_constant_judge_cannot_tell_high_from_low() -> None:
    report = audited(lambda r: 3.0)
    assert failed(report) == ["anchors"]
    auc = report.part("anchors").estimate
    assert auc is not None and auc.value == 0.5
    assert outcomes(report)["retest"] == "warn"  # equal scores have no ranks that could repeat
    assert "not trusted for a difference of 0.5 at 50 prompts: anchors:" in report.conclusion()


def test_a_judge_that_separates_anchors_by_less_than_the_effect_is_caught() -> None:
    assert failed(audited(lambda r: 2.8 + 0.1 * fits(r))) == ["anchors"]


def test_a_judge_that_never_answers_is_caught_and_no_number_is_made_up() -> None:
    report = audited(lambda r: None)
    assert {"missing", "retest", "null", "length", "anchors", "noise"} <= set(failed(report))
    assert report.reasons == {"HTTP 500": 72}
    assert all(part.estimate is None or part.estimate.value is None for part in report.parts if part.name != "missing")
    assert all(row.noise is None and row.replies is None for row in report.detectable)
    assert report.needed_noise is report.needed_replies is None


def test_some_missing_verdicts_are_a_warning_and_more_than_the_limit_a_failure() -> None:
    dropped = {item.request.response for item in audit_items(FIT)[:3]}
    report = audited(lambda r: None if r.response in dropped else fits(r))
    assert outcomes(report)["missing"] == "warn"
    assert report.trusted
    assert report.reasons == {"HTTP 500": 6}
    assert failed(audited(lambda r: None if r.response in dropped else fits(r), missing_limit=0.05)) == ["missing"]


def test_a_judge_that_rewards_length_is_caught_with_its_size_for_twice_the_words() -> None:
    report = audited(lambda r: fits(r) - 1.0 + 0.8 * np.log2(len(r.response.split()) / 30))
    assert failed(report) == ["length"]
    change = report.part("length").estimate
    assert change is not None and change.value == pytest.approx(0.8, abs=0.01)
    assert report.part("length").further["Spearman with words"].value == pytest.approx(1.0, abs=0.1)


def test_a_judge_that_drifts_between_two_looks_is_caught_by_the_null_arm() -> None:
    judge = Ruled(FIT, lambda r: fits(r) - (0.0 if judge.asked <= 48 else 0.8))
    report = audit(judge, FIT, audit_items(FIT), effect=0.5)
    assert "null" in failed(report)
    gap = report.part("null").estimate
    assert gap is not None and gap.value == pytest.approx(0.8)


def test_a_judge_that_does_not_see_broken_text_is_warned_about_and_trusted() -> None:
    own = {word for text in OWN for word in text.split()}
    report = audited(lambda r: 4.0 if sum(word in own for word in r.response.split()) > 0.9 * len(r.response.split()) else 2.0)
    assert outcomes(report)["broken"] == "warn"
    assert "shuffled and repeated" in report.part("broken").sentence


# Pairs


def test_a_good_judge_of_pairs_passes() -> None:
    report = audited_pairs(prefers, sd=0.05)
    assert report.trusted, report.conclusion()
    assert outcomes(report)["order"] in ("pass", "warn")  # between equals noise decides, and turns with the order
    right = report.part("anchors").estimate
    assert right is not None and right.value == 1.0


def test_an_order_biased_judge_is_caught_and_its_bias_cancels_on_the_null_arm() -> None:
    report = audited_pairs(lambda r: 1.0)
    assert {"order", "anchors"} <= set(failed(report))
    order, null = report.part("order"), report.part("null")
    assert order.estimate is not None and order.estimate.value == 1.0
    assert order.further["consistent"].value == 0.0
    assert order.further["first place where inconsistent"].value == 1.0
    assert null.estimate is not None and null.estimate.value == 0.0  # no system wins once the order is swapped
    assert null.further["first place"].value == 1.0
    assert null.outcome == "warn"
    assert "24 wins of the first place, 0 of the second" in null.sentence


def test_a_judge_that_takes_the_first_of_equals_is_warned_about_and_trusted_in_both_orders() -> None:
    report = audited_pairs(lambda r: prefers(r) or (1.0 if r.response == r.other else 0.0))
    assert outcomes(report)["null"] == "warn"
    assert report.trusted
    null = report.part("null").estimate
    assert null is not None and null.value == 0.0


def test_a_coin_has_no_winner_on_the_null_arm_and_fails_on_the_anchors() -> None:
    coin = np.random.default_rng(3)
    report = audited_pairs(lambda r: float(coin.choice([-1.0, 1.0])))
    assert outcomes(report)["null"] != "fail"
    assert {"anchors", "noise"} <= set(failed(report))


def test_a_judge_of_pairs_that_prefers_the_longer_one_is_caught() -> None:
    report = audited_pairs(lambda r: float(np.sign(len(r.response) - len(r.other or ""))) if prefers(r) == 0 else prefers(r))
    assert failed(report) == ["length"]
    change = report.part("length").estimate
    assert change is not None and change.value is not None and change.value > 0.5


def test_a_single_order_judge_of_pairs_is_asked_in_both_orders_all_the_same() -> None:
    judge = Ruled(PAIRS, prefers)
    report = audit(judge, PAIRS, audit_items(PAIRS))
    assert judge.asked == 2 * report.judgements == 2 * len(audit_requests(audit_items(PAIRS), 2))
    assert report.usage == Usage(requests=judge.asked, input_tokens=5 * judge.asked)


def test_a_panel_of_pairs_is_audited_by_its_members_orders() -> None:
    members = [BothOrders(Ruled(PAIRS, lambda r: 1.0, name=name)) for name in "ab"]
    report = audit(Panel(members), PAIRS, audit_items(PAIRS))
    order = report.part("order").estimate
    assert order is not None and order.value == 1.0
    assert "order" in failed(report)


# Retests go beside the cache


def test_the_same_item_is_judged_again_beside_the_cache(tmp_path: Path) -> None:
    inner = Ruled(FIT, fits, sd=0.3)
    judge = CachedJudge(inner, JudgeCache(tmp_path / "c.sqlite"))
    items = audit_items(FIT)
    report = audit(judge, FIT, items)
    noise = report.part("retest").estimate
    assert noise is not None and noise.value == pytest.approx(0.3, rel=0.5)
    assert inner.asked == 72
    audit(judge, FIT, items)
    assert inner.asked == 72 + 24  # first looks are in the cache by now, second looks never are


def test_every_judge_is_taken_out_of_its_cache(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "c.sqlite")
    inner = [Ruled(PAIRS, prefers, name=name) for name in "ab"]
    panel = Panel([BothOrders(CachedJudge(judge, cache)) for judge in inner], "mean", quorum=2)
    bare = beside_cache(panel)
    assert isinstance(bare, Panel)
    assert [member.inner for member in bare.members if isinstance(member, BothOrders)] == inner
    assert (bare.identity, bare.name) == (panel.identity, panel.name)


def test_estimates_double_for_pairs_and_add_up_for_panels() -> None:
    class Priced(Ruled):
        def estimate(self, requests: Sequence[JudgeRequest]) -> Usage:
            return Usage(requests=len(requests), dollars=0.5 * len(requests))

    pair = JudgeRequest(prompt="", response="a", other="b")
    both = BothOrders(Priced(PAIRS, prefers))
    assert estimate_usage(both, [pair, pair]) == Usage(requests=4, dollars=2.0)
    panel = Panel([both, BothOrders(Ruled(PAIRS, prefers, name="free"))])
    assert estimate_usage(panel, [pair]) == Usage(requests=2, dollars=1.0)
    assert estimate_usage(Ruled(FIT, fits), [pair]) is None


# Figures


def test_the_detectable_difference_has_the_power_that_it_promises() -> None:
    generator = np.random.default_rng(5)
    for prompts, sd in ((10, 0.7), (50, 1.3)):
        least = detectable_difference(sd, prompts)
        tests = stats.ttest_1samp(generator.normal(least, sd, (20_000, prompts)), 0.0, axis=1)
        assert np.mean(tests.pvalue < 0.05) == pytest.approx(0.8, abs=0.015)
    assert prompts_needed(1.0, 0.5) == 34  # the textbook's paired t test with a standardised effect of 0.5
    assert detectable_difference(1.0, 34) <= 0.5 < detectable_difference(1.0, 33)
    assert prompts_needed(1e6, 1e-3) is None


def test_the_noise_interval_covers_the_true_standard_deviation() -> None:
    generator = np.random.default_rng(7)
    found = [noise_sd((generator.uniform(1, 5, 16)[:, None] + generator.normal(0, 0.4, (16, 2))).tolist()) for _ in range(400)]
    covered = np.mean([e.low < 0.4 < e.high for e in found if e.low is not None and e.high is not None])
    assert 0.93 <= covered <= 0.99
    assert np.mean([e.value**2 for e in found if e.value is not None]) == pytest.approx(0.16, rel=0.05)


def test_items_with_one_score_are_missing_from_the_noise() -> None:
    found = noise_sd([[1.0, 3.0], [2.0], [], [4.0, 4.0]])
    assert (found.value, found.n, found.missing) == (1.0, 2, 2)
    assert noise_sd([[1.0]]).value is None
    assert noise_sd([[1.0, 2.0]]).reason == "one item is too few for an interval"


def test_the_auc_counts_ties_half_and_has_an_interval_under_perfect_separation() -> None:
    assert auc_interval([1.0, 3.0], [2.0]).value == 0.5
    assert auc_interval([2.0, 3.0], [2.0]).value == 0.75
    perfect = auc_interval([2.0] * 8, [1.0] * 8)
    assert perfect.low is not None and (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.7 < perfect.low < 0.8
    worst = auc_interval([1.0] * 8, [2.0] * 8)
    assert worst.high == pytest.approx(1 - perfect.low)
    assert auc_interval([], [1.0]).value is None


# Items


def test_a_personas_items_come_from_neither_the_build_nor_the_test_split() -> None:
    items = audit_items(FIT, count=100)
    high, low = ([item.request.response for item in items if item.sort == sort] for sort in ("high", "low"))
    held_out = EDMUND.utterances("tune") + EDMUND.utterances("validate")
    assert sorted(high) == sorted(held_out)
    forbidden = {text for name in list_personas() for split in ("build", "test") for text in load_persona(name).utterances(split)}
    assert not forbidden & {*high, *low}
    assert not set(low) & set(OWN)
    shuffled = [item for item in items if item.sort == "shuffled"]
    assert all(sorted(item.request.response.split()) == sorted(high[item.of or 0].split()) for item in shuffled)


def test_items_follow_the_seed() -> None:
    assert audit_items(FIT, count=4, seed=1) == audit_items(FIT, count=4, seed=1) != audit_items(FIT, count=4, seed=2)


def test_a_trait_of_ones_own_needs_an_anchors_file(tmp_path: Path) -> None:
    question = Question.of_trait("nautical", "talks like a sailor")
    with pytest.raises(JudgeError, match="no anchors of ours for 'nautical'.*--anchors"):
        audit_items(question)
    file = tmp_path / "a.jsonl"
    lines = [{"prompt": "Hi", "response": f"{level} {i}", "level": level} for level in ("high", "low") for i in range(3)]
    file.write_text("\n".join(map(json.dumps, lines)))
    items = audit_items(question, anchors=file)
    report = audit(Ruled(question, lambda r: 100.0 if "high" in r.response else 0.0), question, items)
    assert outcomes(report)["length"] == outcomes(report)["broken"] == "n/a"
    file.write_text(json.dumps(lines[0] | {"level": "middling"}))
    with pytest.raises(JudgeError, match=r"a\.jsonl line 1 .*level"):
        load_anchors(file)
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(JudgeError, match="fewer than two anchors of level 'high'"):
        load_anchors(file)
    with pytest.raises(JudgeError, match="does not exist"):
        load_anchors(tmp_path / "none.jsonl")


def test_settings_that_tell_nothing_are_refused() -> None:
    for settings, message in (({"repeats": 1}, "repeats=1"), ({"effect": 0.0}, "effect=0.0"), ({"prompts": 1}, "prompts=1")):
        with pytest.raises(JudgeError, match=message):
            audited(fits, **settings)
    with pytest.raises(JudgeError, match="items=1"):
        audit_items(FIT, count=1)


def test_a_judge_of_another_scale_is_refused() -> None:
    question = Question.of_trait("humorous")
    with pytest.raises(JudgeError, match=r"scores on \(1\.0, 5\.0\), and the question's scale is \(0\.0, 100\.0\)"):
        audit(Ruled(FIT, lambda r: 3.0), question, audit_items(question))


# The gate before a run


def check(judge: Ruled, folder: Path, **settings: bool | float) -> AuditReport:
    return check_judge(judge, FIT, folder, **{"effect": 0.5, "prompts": 9, **settings})


def test_a_run_that_is_started_again_asks_nothing_again(tmp_path: Path) -> None:
    judge = Ruled(FIT, fits)
    first = check(judge, tmp_path)
    asked = judge.asked
    assert asked == 48
    before = (tmp_path / FILE_NAME).read_bytes()
    assert check(judge, tmp_path) == first
    assert check(judge, tmp_path / "other", known=first) == first
    assert judge.asked == asked
    assert (tmp_path / FILE_NAME).read_bytes() == (tmp_path / "other" / FILE_NAME).read_bytes() == before
    check(judge, tmp_path, effect=0.6)
    assert judge.asked == 2 * asked
    (tmp_path / FILE_NAME).write_text("{")
    check(judge, tmp_path)
    assert judge.asked == 3 * asked


def test_an_untrusted_judge_is_refused_with_figures_and_remedies_and_asked_again_once_mended(tmp_path: Path) -> None:
    judge = Ruled(FIT, lambda r: 3.0)
    with pytest.raises(
        JudgeError, match=r"not trusted for a difference of 0.5 at 9 prompts: anchors: .*50%.*audit\.json.*stronger judge.*--audit warn"
    ):
        check(judge, tmp_path)
    stored = AuditReport.model_validate_json((tmp_path / FILE_NAME).read_text())
    assert not stored.trusted
    with pytest.raises(JudgeError, match="not trusted"):
        check(judge, tmp_path)
    assert judge.asked == 96


def test_a_warning_is_logged_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = Ruled(FIT, lambda r: 3.0)
    with caplog.at_level(logging.WARNING):
        report = check(judge, tmp_path, refuse=False)
    assert not report.trusted
    assert "not trusted" in caplog.text
    check(judge, tmp_path, refuse=False)
    assert judge.asked == 48


# The command


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["judge", "audit", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_command_prints_tables_and_a_verdict_and_writes_the_report(tmp_path: Path) -> None:
    status, shown = run("--judge", "stylometric", "--persona", "edmund", "--out", tmp_path / "audit.json", "--items", 6)
    assert status == 0, shown
    assert "judge stylometric is trusted for a difference of 0.5 at 50 prompts" in shown
    assert "Smallest detectable difference" in shown
    (report,) = [AuditReport.model_validate(data) for data in json.loads((tmp_path / "audit.json").read_text())]
    assert report.trusted and report.items["high"] == 6


def test_the_command_fails_when_a_judge_is_not_trusted_for_the_effect() -> None:
    status, shown = run("--judge", "stylometric", "--persona", "edmund", "--effect", 3.5, "--items", 4)
    assert status == 1
    assert "not trusted for a difference of 3.5" in shown


def test_a_dry_run_asks_nothing_and_says_what_would_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    endpoint = ["--judge-option", "base_url=http://127.0.0.1:9/v1", "--judge-option", "input_price=1", "--judge-option", "output_price=2"]
    status, shown = run("--judge", "openai:x:free", "--kind", "trait", "--trait", "humorous", *endpoint, "--dry-run")
    assert status == 0, shown
    assert "openai:x:free: 30 verdicts on 18 items; about 30 requests" in shown
    assert "dollars" in shown


def test_an_audit_with_a_cache_pays_its_first_round_once_and_the_dry_run_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FaultServer(lambda number, body, headers: guesses({str(30 + len(body["messages"][1]["content"]) % 60): -0.01}, usage=(10, 1)))
    endpoint = ["--judge-option", f"base_url={server.url}", "--cache", tmp_path / "c.sqlite"]
    asked = ["--judge", "openai:x", "--kind", "trait", "--trait", "humorous", *endpoint]
    try:
        status, shown = run(*asked, "--dry-run")
        assert (status, "about 30 requests" in shown) == (0, True)
        status, _ = run(*asked, "--judge-option", "max_requests=18")
        assert (status, len(server.bodies)) == (1, 18)
        status, shown = run(*asked, "--dry-run")
        assert (status, "about 12 requests" in shown) == (0, True)
        run(*asked)
        assert len(server.bodies) == 30
        server.script = lambda *_: fault(400, "the model was retired")
        _, shown = run(*asked[:-2])
        assert "30 x HTTP 400. What came, for example: 'the model was retired'" in shown
    finally:
        server.close()
