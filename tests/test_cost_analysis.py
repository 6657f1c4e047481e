"""The analysis of a cost page against numbers that were worked out by hand."""

import math
from typing import Any

import pytest
from cost_pages import accuracy, small
from pydantic import ValidationError
from scipy.stats import norm

from steered_lm.report.cost_analysis import CostAnalysis, analyse_cost
from steered_lm.report.cost_data import ADAPTER, SYSTEM, UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.cost_headline import cost_headline
from steered_lm.report.cost_reach import ALL, Reach
from steered_lm.report.data import ModelInfo

Z = float(norm.ppf(0.975))


def right(n: int) -> tuple[float | None, ...]:
    return (1.0,) * n


def lost(k: int, n: int) -> tuple[float | None, ...]:
    """All right but for the first ``k``."""
    return (0.0,) * k + (1.0,) * (n - k)


def gone(k: int, n: int) -> tuple[float | None, ...]:
    """All right but for the first ``k``, which are missing."""
    return (None,) * k + (1.0,) * (n - k)


def wald(change: int, flips: int, n: int) -> tuple[float, float]:
    """Agresti and Min's interval, written out."""
    centre, half = change / (n + 2), Z * math.sqrt(flips + 1 - change**2 / (n + 2)) / (n + 2)
    return centre - half, centre + half


def reach(data: CostData, measure: str = "mmlu", side: float = 1.0) -> Reach:
    found = [r for r in analyse_cost(data).reaches if r.measure == measure and (r.x or r.stopped_at or 0.0) * side > 0.0]
    assert len(found) == 1
    return found[0]


def scored(values: dict[str, tuple[float | None, ...]], **more: Any) -> Measure:
    base: dict[str, Any] = {"name": "fit", "role": "cost", "kind": "score", "scale": (1.0, 5.0)}
    return Measure(**base | {"items": tuple(str(i) for i in range(len(values[UNSTEERED]))), "values": values} | more)


def perplexity(steered: tuple[float | None, ...], *, tokens: int = 10) -> Measure:
    """Texts of equal length at 2 nats a token unsteered; ``steered`` are nats a token too."""
    n = len(steered)
    values = {UNSTEERED: (2.0 * tokens,) * n, "a 1": tuple(None if v is None else v * tokens for v in steered)}
    named: dict[str, Any] = {"name": "perplexity", "role": "cost", "kind": "tokens", "higher_is_better": False, "exponentiate": True}
    return Measure(**named, items=tuple(str(i) for i in range(n)), tokens=(tokens,) * n, values=values)


def matrix(*measures: Measure, traits: tuple[str, ...] = ("evil", "formality")) -> CostAnalysis:
    arms = (CostArm(name=UNSTEERED), *(CostArm(name=f"vector {t}", trait=t) for t in traits))
    return analyse_cost(CostData(title="t", model=ModelInfo(name="m"), arms=arms, measures=measures))


def test_an_accuracy_is_compared_by_mcnemars_exact_test() -> None:
    change = analyse_cost(small(accuracy(unsteered=(*right(8), 0.0, 0.0), a_1=(*lost(5, 8), 0.0, 0.0)))).change("a 1", "mmlu")
    assert change is not None
    d = change.difference
    assert (d.mean, d.n, d.missing) == (-0.5, 10, 0)
    assert d.p_value == pytest.approx(2 * 0.5**5)
    assert (d.low, d.high) == pytest.approx(wald(-5, 5, 10))
    assert change.shown is not None
    assert (change.shown.value, change.shown.low, change.shown.unit) == (-50.0, pytest.approx(100 * (d.low or 0)), "points")
    assert change.bound == pytest.approx(-wald(-5, 5, 10)[0])


def test_levels_of_accuracies_have_wilsons_interval_and_count_what_is_missing() -> None:
    level = analyse_cost(small(accuracy(unsteered=right(20), a_1=(*gone(4, 12), *lost(4, 8))))).level("a 1", "mmlu")
    assert level is not None
    n, p = 16, 12 / 16
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    assert (level.value, level.n, level.missing) == (0.75, 16, 4)
    assert (level.low, level.high) == pytest.approx((centre - half, centre + half))


def test_holms_correction_is_made_within_each_role_and_notes_are_not_tested() -> None:
    measures = (
        accuracy("first", unsteered=right(20), a_1=lost(5, 20)),
        accuracy("second", unsteered=right(20), a_1=lost(8, 20)),
        accuracy("gain", "benefit", unsteered=lost(6, 20), a_1=right(20)),
        accuracy("aside", "note", unsteered=right(20), a_1=lost(20, 20)),
    )
    analysis = analyse_cost(small(*measures))
    found = {one.measure: one.p_holm for one in analysis.changes}
    assert found == {"first": pytest.approx(2 / 2**5), "second": pytest.approx(2 * 2 / 2**8), "gain": pytest.approx(2 / 2**6)}
    assert {one.measure for one in analysis.changes if one.established} == {"second", "gain"}
    assert analysis.level("a 1", "aside") is not None


def test_a_reach_ends_before_the_first_value_that_may_cost_too_much_whatever_comes_after() -> None:
    n = 1000
    measure = accuracy(unsteered=right(n), a_1=right(n), a_2=lost(5, n), a_3=lost(100, n), a_4=right(n))
    found = reach(small(measure, xs=(1.0, 2.0, 3.0, 4.0)))
    assert (found.x, found.arm, found.stopped_at, found.stopped_arm) == (2.0, "a 2", 3.0, "a 3")
    assert (found.measured, found.why, found.blockers) == (True, "lost", ("mmlu",))
    assert found.loss == pytest.approx(-wald(-5, 5, n)[0])
    assert found.stopped_loss == pytest.approx(-wald(-100, 100, n)[0])
    assert found.limit == 0.02


def test_negative_values_are_a_way_of_their_own_from_zero_outwards() -> None:
    n = 1000
    values = {UNSTEERED: right(n), "a -2": lost(90, n), "a -1": right(n), "a 0": right(n), "a 1": lost(80, n), "a 2": right(n)}
    measure = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple(str(i) for i in range(n)), values=values)
    data = small(measure, xs=(2.0, -2.0, 1.0, 0.0, -1.0))
    down, up = reach(data, side=-1.0), reach(data)
    assert (down.x, down.stopped_at) == (-1.0, -2.0)
    assert (up.x, up.arm, up.stopped_at) == (0.0, None, 1.0)
    assert len(analyse_cost(data).reaches) == 2


def test_a_sweep_that_never_fails_reaches_its_end() -> None:
    found = reach(small(accuracy(unsteered=right(500), a_1=right(500), a_2=right(500)), xs=(1.0, 2.0)))
    assert (found.x, found.stopped_at, found.why, found.measured) == (2.0, None, None, False)
    assert found.loss == pytest.approx(Z / 502)


def test_too_few_items_are_told_from_a_measured_loss() -> None:
    found = reach(small(accuracy(unsteered=right(60), a_1=right(60))))
    assert (found.arm, found.measured, found.why) == (None, False, "unclear")
    assert found.stopped_loss == pytest.approx(Z / 62)


def test_what_steering_made_missing_counts_as_lost_for_the_tolerance_alone() -> None:
    data = small(accuracy(unsteered=right(1000), a_1=gone(50, 1000)))
    change = analyse_cost(data).change("a 1", "mmlu")
    assert change is not None
    assert (change.difference.mean, change.difference.n, change.difference.missing) == (0.0, 950, 50)
    assert change.bound == pytest.approx(-wald(-50, 50, 1000)[0])
    found = reach(data)
    assert (found.arm, found.why, found.measured) == (None, "missing", False)
    assert found.stopped_loss == change.bound


def test_what_was_missing_before_steering_is_nobodys_loss() -> None:
    found = reach(small(accuracy(unsteered=gone(50, 1000), a_1=gone(50, 1000))))
    assert (found.x, found.loss) == (1.0, pytest.approx(Z / 952))


@pytest.mark.parametrize(("higher", "worst"), [(True, 1.0), (False, 5.0)])
def test_the_worst_of_a_score_is_the_end_of_its_scale_on_the_side_of_loss(higher: bool, worst: float) -> None:
    measure = scored({UNSTEERED: (3.0,) * 4 + (2.0, 4.0), "a 1": (None, *(3.0,) * 3, 2.0, 4.0)}, higher_is_better=higher)
    filled = scored({UNSTEERED: (3.0,) * 4 + (2.0, 4.0), "a 1": (worst, *(3.0,) * 3, 2.0, 4.0)}, higher_is_better=higher)
    mine, theirs = (analyse_cost(small(one)).change("a 1", "fit") for one in (measure, filled))
    assert mine is not None
    assert theirs is not None
    # of six differences the interval's ends are the extreme ones: two of four steps of the scale
    assert mine.bound == theirs.bound == pytest.approx(0.5)
    assert mine.difference.mean == 0.0


def test_a_perplexity_is_bounded_by_its_relative_growth() -> None:
    # six texts: the 95 % interval of the sign-flip test goes from the smallest difference to the largest
    measure = perplexity((2.01, 2.02, 2.03, 2.00, 2.01, 2.02))
    change = analyse_cost(small(measure)).change("a 1", "perplexity")
    assert change is not None
    assert change.difference.mean == pytest.approx(0.015)
    assert (change.difference.low, change.difference.high) == pytest.approx((0.0, 0.03))
    assert change.shown is not None
    assert (change.shown.value, change.shown.high, change.shown.unit) == (pytest.approx(math.exp(0.015)), pytest.approx(math.exp(0.03)), "times")
    assert change.bound == pytest.approx(math.exp(0.03) - 1)
    level = analyse_cost(small(measure)).level("a 1", "perplexity")
    assert level is not None
    assert level.value == pytest.approx(math.exp(2.015))
    assert reach(small(measure), "perplexity").x == 1.0
    strict = reach(small(measure, perplexity_tolerance=0.03), "perplexity")
    assert (strict.arm, strict.limit, strict.why) == (None, 0.03, "unclear")


def test_a_perplexity_with_a_missing_text_has_no_bound() -> None:
    eight = (2.0, 2.0, 2.01, 2.0, 2.0, 2.0, 2.01, 2.0)
    assert reach(small(perplexity(eight)), "perplexity").x == 1.0
    found = reach(small(perplexity((*eight[:7], None))), "perplexity")
    assert (found.arm, found.why, found.stopped_loss) == (None, "missing", None)


def test_a_perplexity_beyond_all_numbers_is_shown_without_one() -> None:
    change = analyse_cost(small(perplexity((900.0, 901.0, 902.0, 903.0, 904.0, 905.0)))).change("a 1", "perplexity")
    assert change is not None
    assert (change.shown, change.bound, change.difference.mean) == (None, None, pytest.approx(900.5))


@pytest.mark.parametrize(("n", "within"), [(5, False), (6, True)])
def test_scores_that_did_not_change_are_within_the_tolerance_once_there_are_enough_for_an_interval(n: int, within: bool) -> None:
    found = reach(small(scored({UNSTEERED: (3.0,) * n, "a 1": (3.0,) * n})), "fit")
    assert (found.arm is not None) is within
    assert found.why == (None if within else "no interval")


def test_scores_that_all_changed_alike_have_no_interval_and_no_bound() -> None:
    found = reach(small(scored({UNSTEERED: (3.0,) * 9, "a 1": (2.5,) * 9})), "fit")
    assert (found.arm, found.why, found.measured) == (None, "no interval", False)


def test_all_costs_together_reach_as_far_as_the_first_to_fail() -> None:
    n = 1000
    one = accuracy("one", unsteered=right(n), a_1=right(n), a_2=right(n), a_3=lost(100, n))
    two = accuracy("two", unsteered=right(n), a_1=right(n), a_2=lost(100, n), a_3=lost(100, n))
    found = reach(small(one, two, xs=(1.0, 2.0, 3.0)), ALL)
    assert (found.x, found.stopped_at, found.blockers, found.loss) == (1.0, 2.0, ("two",), None)


def test_an_arm_that_was_left_out_of_a_measure_ends_the_reach_as_unmeasured() -> None:
    found = reach(small(accuracy(unsteered=right(1000), a_1=right(1000)), xs=(1.0, 2.0)))
    assert (found.x, found.stopped_at, found.why) == (1.0, 2.0, "unmeasured")


def test_a_weight_of_zero_is_a_step_of_the_sweep_and_an_alpha_of_zero_is_not() -> None:
    n = 1000
    values = {UNSTEERED: right(n), "a 0": lost(100, n), "a 1": right(n)}
    measure = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple(str(i) for i in range(n)), values=values)
    weights = analyse_cost(small(measure, xs=(0.0, 1.0), axis="weight of formality")).reaches
    assert [(r.arm, r.stopped_at) for r in weights] == [(None, 0.0)]
    assert reach(small(measure, xs=(0.0, 1.0))).x == 1.0


@pytest.mark.parametrize("axis", ["layer", None, ""])
def test_without_an_order_there_is_no_reach(axis: str | None) -> None:
    assert analyse_cost(small(accuracy(unsteered=right(900), a_1=right(900)), axis=axis)).reaches == ()


def test_the_matrix_has_its_own_holm_family_and_no_number_for_what_was_not_measured() -> None:
    evil = {UNSTEERED: (10.0,) * 6, "vector evil": (60.0, 61.0, 62.0, 63.0, 64.0, 65.0)}
    formal = {UNSTEERED: (2.0,) * 6, "vector evil": (2.0, 2.1, 1.9, 2.0, 2.2, 1.8), "vector formality": (4.0, 4.1, 4.2, 4.3, 4.4, 4.5)}
    own: dict[str, Any] = {"role": "note"}
    analysis = matrix(
        scored(evil, name="trait evil", trait="evil", scale=(0.0, 100.0), **own),
        scored(formal, name="trait formality", trait="formality", **own),
        scored({UNSTEERED: (1.0,) * 6, "vector evil": (2.0,) * 6}, name="no trait", **own),
    )
    assert {(c.arm, c.measure) for c in analysis.matrix} == {
        ("vector evil", "trait evil"),
        ("vector evil", "trait formality"),
        ("vector formality", "trait formality"),
    }
    struck, aside = analysis.change("vector evil", "trait evil"), analysis.change("vector evil", "trait formality")
    other = analysis.change("vector formality", "trait formality")
    assert struck is not None
    assert aside is not None
    assert other is not None
    assert (struck.difference.mean, struck.of_100) == (52.5, 52.5)
    assert other.of_100 == pytest.approx(100 * 2.25 / 4)
    # 2 of the 64 sign patterns are as extreme, and three cells share the correction
    assert struck.p_holm == other.p_holm == pytest.approx(3 * 2 / 64)
    assert (aside.p_holm, aside.established) == (1.0, False)
    assert analysis.change("vector formality", "trait evil") is None
    assert analysis.changes == ()


def test_subjects_are_compared_one_by_one_with_a_family_of_their_own() -> None:
    base = accuracy(unsteered=right(20), a_1=(*lost(8, 10), *right(9), None))
    measure = base.model_copy(update={"groups": ("law",) * 10 + ("art",) * 10})
    analysis = analyse_cost(small(measure))
    law, art = analysis.group("a 1", "mmlu", "law"), analysis.group("a 1", "mmlu", "art")
    assert law is not None
    assert art is not None
    assert (law.difference.mean, law.difference.n, law.p_holm) == (-0.8, 10, pytest.approx(2 * 2 / 2**8))
    assert (art.difference.mean, art.difference.n, art.difference.missing) == (0.0, 9, 1)
    assert law.level is not None
    assert law.level.value == pytest.approx(0.2)
    assert [(g.group, g.level.value) for g in analysis.group_levels] == [("law", 1.0), ("art", 1.0)]


def test_a_margin_is_the_level_at_which_the_loss_equals_the_tolerance() -> None:
    data = small(
        accuracy(unsteered=lost(5, 20), a_1=right(20)),
        scored({UNSTEERED: (2.0, 3.0), "a 1": (2.0, 3.0)}, higher_is_better=False),
        perplexity((2.0,) * 6),
    )
    margins = {m.measure: (m.level, m.shown) for m in analyse_cost(data).margins}
    assert margins["mmlu"] == (pytest.approx(0.73), pytest.approx(-2.0))
    assert margins["fit"] == (pytest.approx(2.58), pytest.approx(0.08))
    assert margins["perplexity"] == (pytest.approx(1.05 * math.exp(2.0)), pytest.approx(1.05))


def test_the_same_data_give_the_same_analysis() -> None:
    values = {UNSTEERED: tuple(1.0 + i / 10 for i in range(30)), "a 1": tuple(1.0 + (i * 7 % 30) / 10 for i in range(30))}
    assert analyse_cost(small(scored(values))) == analyse_cost(small(scored(values)))


def test_a_perplexity_of_which_more_is_better_is_refused() -> None:
    with pytest.raises(ValidationError, match="lower is better"):
        Measure(name="p", role="cost", kind="tokens", exponentiate=True, items=("a",), tokens=(3,), values={UNSTEERED: (2.0,)})


def test_two_arms_of_one_value_and_measures_of_one_name_are_refused() -> None:
    arms = (CostArm(name=UNSTEERED), CostArm(name="b", series="a", x=1.0), CostArm(name="c", series="a", x=1.0))
    with pytest.raises(ValidationError, match="two arms of one value; got 1, 1"):
        small(arms=arms)
    with pytest.raises(ValidationError, match="names of their own"):
        small(accuracy(unsteered=right(3)), accuracy(unsteered=right(3)))
    with pytest.raises(ValidationError, match="matrix of side effects"):
        small(arms=(CostArm(name=UNSTEERED), CostArm(name="b", series="a", trait="evil")))


# ------------------------------------------------------------------------------------------------ at equal strength of a trait


def with_others() -> CostData:
    """Three steered arms with trait scores 20, 50, 80, and two that are not steered with 52 and 99."""
    steered = [CostArm(name=f"a{x}", series="s", x=x, digest="0") for x in (1.0, 2.0, 3.0)]
    others = [CostArm(name=n, series=n, settings={s: "x"}) for n, s in (("trained", ADAPTER), ("prompted", SYSTEM))]
    means = {UNSTEERED: 10.0, "a1.0": 20.0, "a2.0": 50.0, "a3.0": 80.0, "trained": 52.0, "prompted": 99.0}
    spread = (-1.0, 0.0, 1.0) * 4
    right = {UNSTEERED: 20, "a1.0": 20, "a2.0": 14, "a3.0": 6, "trained": 20, "prompted": 18}
    nats = {name: tuple(10.0 + i * 0.1 + extra for i in range(8)) for name, extra in {UNSTEERED: 0.0, "a2.0": 5.0, "trained": 1.0}.items()}
    measures = (
        Measure(
            name="trait", role="benefit", kind="score", higher_is_better=None, scale=(0.0, 100.0), trait="t", items=tuple("abcdefghijkl"),
            values={name: tuple(mean + d for d in spread) for name, mean in means.items()},
        ),
        Measure(
            name="knowledge", role="cost", kind="accuracy", items=tuple(map(str, range(20))),
            values={name: tuple(float(i < count) for i in range(20)) for name, count in right.items()},
        ),
        Measure(
            name="perplexity", role="cost", kind="tokens", higher_is_better=False, exponentiate=True,
            items=tuple(map(str, range(8))), tokens=(10,) * 8,
            values=nats,
        ),
    )  # fmt: skip
    return CostData(title="t", model=ModelInfo(name="m"), axis="alpha", arms=(CostArm(name=UNSTEERED), *steered, *others), measures=measures)


def test_what_is_not_steered_is_compared_at_the_nearest_score_of_the_trait():
    trained, prompted = analyse_cost(with_others()).matches
    assert (trained.arm, trained.steered, trained.near, trained.gap.difference.mean) == ("trained", "a2.0", True, pytest.approx(-2.0))
    assert (prompted.arm, prompted.steered, prompted.near) == ("prompted", "a3.0", False), "80 is no equal of 99"
    knowledge, perplexity = trained.costs
    assert knowledge.difference.mean == pytest.approx(-6 / 20)
    assert knowledge.difference.p_value == pytest.approx(2 * 0.5**6), "six answers were lost and none gained"
    assert perplexity.shown.value == pytest.approx(math.exp(0.4))
    assert [change.measure for change in prompted.costs] == ["knowledge"], "a text has no system turn"
    p_values = sorted(change.difference.p_value for match in (trained, prompted) for change in match.costs)
    smallest = min((change for match in (trained, prompted) for change in match.costs), key=lambda change: change.difference.p_value)
    assert smallest.p_holm == pytest.approx(min(1.0, 3 * p_values[0]))


def test_without_arms_that_are_not_steered_there_is_nothing_to_match():
    data = with_others()
    alone = data.model_copy(update={"arms": data.arms[:4]})
    assert analyse_cost(alone).matches == ()


def test_arms_that_are_not_steered_are_not_counted_as_steered_ones():
    data = with_others()
    assert [arm.steered for arm in data.arms] == [False, True, True, True, False, False]
    unswept = data.model_copy(
        update={"axis": None, "arms": tuple(arm.model_copy(update={"x": None, "series": arm.series and arm.name}) for arm in data.arms)}
    )
    said = " ".join([cost_headline(unswept, analyse_cost(unswept)).title, *(s.text for s in cost_headline(unswept, analyse_cost(unswept)).sentences)])
    assert "of 5 arms" in said
    assert "steered arms" not in said
