"""The report's statistics, against hand-worked values, scipy, statsmodels, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from steered_lm.errors import UserError
from steered_lm.stats import (
    holm,
    mcnemar_paired,
    mean_gap,
    mean_interval,
    paired_difference,
    share_interval,
    spearman_interval,
)

NONE: tuple[float | None, ...] = (None,) * 3


def zeros(values: object) -> list[float | None]:
    return [0.0] * len(values)  # type: ignore[arg-type]


def test_a_paired_difference_worked_by_hand() -> None:
    # Six differences 1..6: every subset mean is positive, so both tails hold the empty subset alone: p = 2/64. The interval's ends are the
    # smallest and largest subset means, those of {1} and {6}.
    found = paired_difference([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 6, seed=0)
    assert (found.mean, found.low, found.high, found.n, found.missing) == (3.5, 1.0, 6.0, 6, 0)
    assert found.p_value == 2 / 64
    assert (found.mean_a, found.mean_b) == (4.5, 1.0)
    assert found.excludes_zero


@pytest.mark.parametrize("n", [2, 5, 6, 9, 12, 15])
def test_the_exact_p_value_is_scipys_permutation_test(n: int) -> None:
    d = np.random.default_rng(n).normal(0.4, 1.0, n)
    reference = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=10**6)
    assert paired_difference(d.tolist(), zeros(d), seed=0).p_value == pytest.approx(min(1.0, float(reference.pvalue)))


def test_above_fifteen_items_random_signs_come_close_to_all_of_them() -> None:
    d = np.random.default_rng(3).normal(0.35, 1.0, 16)
    reference = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**16)
    found = paired_difference(d.tolist(), zeros(d), seed=5)
    assert "random" in found.method
    assert found.p_value == pytest.approx(float(reference.pvalue), abs=0.01)
    t = stats.ttest_1samp(d, 0.0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.08)


def test_the_interval_excludes_zero_exactly_when_the_p_value_is_small() -> None:
    rng = np.random.default_rng(2)
    decided = {True: 0, False: 0}
    for i in range(300):
        n = int(rng.integers(6, 22))
        d = np.round(rng.normal(0.5, 1.0, n), int(rng.integers(0, 3)))
        found = paired_difference(d.tolist(), zeros(d), seed=i)
        assert found.p_value is not None
        if found.low is not None:
            assert found.excludes_zero == (found.p_value <= 0.05 + 1e-12)
            decided[found.excludes_zero] += 1
    assert min(decided.values()) > 30


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    unsteered, steered = np.clip(rng.normal(2.0, 0.7, 100_000), 1, 5), np.clip(rng.normal(3.8, 1.0, 100_000), 1, 5)
    truth, covered, runs = float((steered - unsteered).mean()), 0, 400
    for i in range(runs):
        chosen = rng.integers(0, 100_000, 12)
        found = paired_difference(steered[chosen].tolist(), unsteered[chosen].tolist(), seed=i)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / runs <= 0.98


def test_the_paired_test_rarely_rejects_when_nothing_differs() -> None:
    rng = np.random.default_rng(9)
    rejected = sum(paired_difference(rng.normal(0, 1, 10).tolist(), rng.normal(0, 1, 10).tolist(), seed=i).excludes_zero for i in range(400))
    assert rejected / 400 <= 0.08


def test_items_missing_on_either_side_are_dropped_and_counted() -> None:
    a, b = [1.0, None, 3.0, math.nan, 5.0, 6.0, 7.0, 8.0, 9.0], [0.0, 1.0, None, 1.0, 1.0, 2.5, 2.0, 1.0, 1.0]
    whole = paired_difference([1.0, 5.0, 6.0, 7.0, 8.0, 9.0], [0.0, 1.0, 2.5, 2.0, 1.0, 1.0], seed=0)
    found = paired_difference(a, b, seed=0)
    assert (found.n, found.missing) == (6, 3)
    assert (found.mean, found.low, found.high, found.p_value) == (whole.mean, whole.low, whole.high, whole.p_value)


def test_one_seed_gives_one_result() -> None:
    d = np.random.default_rng(4).normal(0.2, 1.0, 40).tolist()
    assert paired_difference(d, zeros(d), seed=1) == paired_difference(d, zeros(d), seed=1)
    assert paired_difference(d, zeros(d), seed=1) != paired_difference(d, zeros(d), seed=2)


def test_swapping_the_sides_mirrors_the_result() -> None:
    d = np.random.default_rng(6).normal(0.5, 1.0, 11).tolist()
    one, two = paired_difference(d, zeros(d), seed=0), paired_difference(zeros(d), d, seed=0)
    assert one.low is not None
    assert one.high is not None
    assert (two.mean, two.low, two.high, two.p_value) == pytest.approx((-(one.mean or 0.0), -one.high, -one.low, one.p_value))


@pytest.mark.parametrize(
    ("a", "b", "reason", "mean", "p"),
    [
        ([], [], "no item has a value on both sides", None, None),
        ([1.0, None], [None, 1.0], "no item has a value on both sides", None, None),
        ([3.0], [1.0], "all 1 differences are equal", 2.0, 1.0),
        ([2.0] * 8, [2.0] * 8, "all 8 differences are equal", 0.0, 1.0),
        ([3.1] * 8, [2.0] * 8, "all 8 differences are equal", 1.1, 2 / 256),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5, "5 items are too few for a 95% interval; 6 are needed", 3.0, 2 / 32),
    ],
)
def test_data_that_carry_no_interval_get_a_reason_and_no_numbers(
    a: list[float | None], b: list[float | None], reason: str, mean: float | None, p: float | None
) -> None:
    found = paired_difference(a, b, seed=0)
    assert (found.low, found.high, found.excludes_zero) == (None, None, False)
    assert reason in (found.reason or "")
    assert found.mean == pytest.approx(mean)
    assert found.p_value == pytest.approx(p)


@pytest.mark.parametrize(
    ("a", "b", "confidence", "message"),
    [
        ([1.0], [1.0, 2.0], 0.95, "a has 1 items and b has 2"),
        ([math.inf], [1.0], 0.95, "values[0] is infinite"),
        ([1.0], [1.0], 95.0, "confidence=95.0 is not a level. Allowed: between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused(a: list[float | None], b: list[float | None], confidence: float, message: str) -> None:
    with pytest.raises(UserError) as error:
        paired_difference(a, b, confidence=confidence, seed=0)
    assert message in str(error.value)


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[float | None], list[float | None]]:
    a = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    b = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    return list(a), list(b)


@pytest.mark.parametrize("cells", [(30, 12, 2, 6), (10, 3, 9, 8), (20, 0, 5, 5), (25, 1, 1, 13)])
def test_the_p_value_for_paired_answers_is_statsmodels_exact_mcnemar(cells: tuple[int, int, int, int]) -> None:
    both, gained, lost, neither = cells
    reference = mcnemar([[both, gained], [lost, neither]], exact=True)
    assert mcnemar_paired(*answers(*cells)).p_value == pytest.approx(reference.pvalue)


def test_the_interval_for_paired_answers_worked_by_hand() -> None:
    # 50 items, 12 gained, 2 lost: centre 10/52, variance (12 + 2 + 1 - 100/52) / 52^2, by Agresti and Min's Wald+2 formula.
    found = mcnemar_paired(*answers(30, 12, 2, 6))
    half = 1.959963984540054 * math.sqrt(15 - 100 / 52) / 52
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((10 / 52 - half, 10 / 52 + half))
    assert (found.mean_a, found.mean_b) == pytest.approx((0.84, 0.64))


def test_the_interval_for_paired_answers_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(12)
    cells, covered, runs = np.array([0.5, 0.08, 0.16, 0.26]), 0, 1000
    for counts in rng.multinomial(40, cells, runs):
        found = mcnemar_paired(*answers(*(int(c) for c in counts)))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= cells[1] - cells[2] <= found.high
    assert 0.93 <= covered / runs <= 0.985


def test_unchanged_answers_still_have_an_interval_with_width() -> None:
    found = mcnemar_paired(*answers(20, 0, 0, 10))
    assert (found.mean, found.p_value) == (0.0, 1.0)
    assert found.low == pytest.approx(-(found.high or 0.0))
    assert (found.high or 0.0) > 0.02


def test_the_interval_for_paired_answers_stays_within_one() -> None:
    found = mcnemar_paired(*answers(0, 3, 0, 0))
    assert found.high == 1.0


def test_missing_answers_are_dropped_and_none_at_all_is_said() -> None:
    assert mcnemar_paired([1.0, None, 0.0], [1.0, 1.0, None]).missing == 2
    empty = mcnemar_paired(NONE, NONE)
    assert (empty.mean, empty.p_value, empty.low) == (None, None, None)
    assert empty.reason == "no item has an answer on both sides"


def test_answers_that_are_neither_right_nor_wrong_are_refused() -> None:
    with pytest.raises(UserError, match="use paired_difference"):
        mcnemar_paired([0.5], [1.0])


def test_holm_agrees_with_statsmodels_and_keeps_the_order() -> None:
    p = [0.04, 0.001, 0.3, 0.012, 0.012, 1.0]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_leaves_untested_comparisons_out_of_the_family() -> None:
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([]) == []


def test_holm_refuses_what_is_no_p_value() -> None:
    with pytest.raises(UserError, match=r"p_values\[1\]=1.2"):
        holm([0.5, 1.2])


def test_the_mean_interval_is_students_t() -> None:
    x = [1.2, 3.4, 2.2, 4.1, 2.9]
    found = mean_interval([*x, None, math.nan])
    assert (found.low, found.high) == pytest.approx(DescrStatsW(x).tconfint_mean(0.05))
    assert (found.n, found.missing) == (5, 2)


def test_the_mean_interval_ends_where_the_scale_ends() -> None:
    found = mean_interval([4.9, 3.0, 5.0], bounds=(1.0, 5.0))
    assert found.high == 5.0


@pytest.mark.parametrize(
    ("values", "value", "reason"),
    [
        ([], None, "no value"),
        ([None], None, "no value"),
        ([2.0], 2.0, "one value has no spread"),
        ([2.0, 2.0], 2.0, "all 2 values are equal"),
    ],
)
def test_a_mean_without_spread_has_a_reason_in_place_of_an_interval(values: list[float | None], value: float | None, reason: str) -> None:
    found = mean_interval(values)
    assert (found.value, found.low, found.high, found.reason) == (value, None, None, reason)


def test_the_gap_of_two_sets_of_items_is_welchs() -> None:
    x, y = [4.0, 4.4, 4.1, 4.8, 4.0], [3.1, 3.9, 3.5, 2.8]
    found = mean_gap(x, y)
    assert (found.low, found.high) == pytest.approx(CompareMeans(DescrStatsW(x), DescrStatsW(y)).tconfint_diff(usevar="unequal"))
    assert (found.n, mean_gap([1.0], [2.0, 3.0]).reason) == (4, "one side has no spread")
    assert mean_gap([None], [2.0]).reason == "one side has no value"


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (24, 40), (1, 1)])
def test_a_share_has_wilsons_interval(k: int, n: int) -> None:
    found = share_interval(k, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)


def test_a_share_of_nothing_has_no_value_and_more_than_all_is_refused() -> None:
    assert share_interval(0, 0).value is None
    with pytest.raises(UserError, match="successes=5 of n=4"):
        share_interval(5, 4)


def test_spearman_has_scipys_rho_and_an_interval_worked_by_hand() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [2.0, 1.0, 4.0, 3.0, 7.0, 5.0, 6.0]
    rho = float(stats.spearmanr(x, y).statistic)
    half = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / 4)
    found = spearman_interval([*x, None], [*y, 1.0])
    assert (found.value, found.low, found.high) == pytest.approx((rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)))
    assert (found.n, found.missing) == (7, 1)


def test_the_spearman_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(21)
    truth, covered, runs = 6 / math.pi * math.asin(0.6 / 2), 0, 600
    for _ in range(runs):
        sample = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 25)
        found = spearman_interval(sample[:, 0].tolist(), sample[:, 1].tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / runs <= 0.98


@pytest.mark.parametrize(
    ("x", "y", "value", "reason"),
    [
        ([1.0], [1.0], None, "needs two items"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], None, "values that differ"),
        ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.5, "too few for an interval"),
        ([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], 1.0, "agree perfectly"),
    ],
)
def test_a_rank_correlation_that_carries_no_interval_says_why(x: list[float | None], y: list[float | None], value: float | None, reason: str) -> None:
    found = spearman_interval(x, y)
    assert found.value == pytest.approx(value)
    assert found.low is None
    assert reason in (found.reason or "")
