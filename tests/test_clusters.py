"""Statistics of values in groups against scipy on the same values written out, and by how often intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from steered_lm.measure.clusters import clustered_difference, clustered_mean, clustered_spearman, group_means
from steered_lm.stats import mean_interval, paired_difference, spearman_interval


def test_a_group_counts_once_whatever_its_size_and_what_is_missing_is_left_out():
    values, groups = [1.0, 3.0, None, 5.0, None], ["a", "a", "a", "b", "c"]
    assert group_means(values, groups) == [2.0, 5.0, None]
    assert clustered_mean(values, groups) == mean_interval([2.0, 5.0, None])
    found = clustered_difference([1.0, 3.0, 9.0, 5.0], [0.0, 1.0, None, 7.0], ["a", "a", "a", "b"])
    assert found == paired_difference([2.0, 5.0], [0.5, 7.0], seed=0)


def test_without_repeats_they_are_the_plain_statistics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20)).tolist()
    groups = list(range(20))
    assert clustered_mean(x, groups) == mean_interval(x)
    assert clustered_difference(x, y, groups) == paired_difference(x, y, seed=0)
    assert clustered_spearman(x, y, groups) == spearman_interval(x, y)


def test_the_weighted_rank_correlation_is_scipys_on_rows_written_out(monkeypatch):
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 4)
    x, y = rng.integers(0, 6, 48).astype(float), rng.normal(size=48)
    seen = []

    def check(statistic, items, *, seed, confidence=0.95):
        counts = rng.multinomial(items, np.full(items, 1 / items), 50).astype(float)
        for draw, value in zip(counts, statistic(counts), strict=True):
            rows = np.repeat(np.arange(48), draw[groups].astype(int))
            seen.append(value - stats.spearmanr(x[rows], y[rows]).statistic)
        return 0.0, 1.0

    monkeypatch.setattr("steered_lm.measure.clusters.bootstrap_interval", check)
    found = clustered_spearman(x.tolist(), y.tolist(), groups.tolist())
    assert (found.value, found.n, found.low) == (pytest.approx(stats.spearmanr(x, y).statistic), 48, 0.0)
    assert len(seen) == 50
    assert np.abs(seen).max() < 1e-12


def test_replies_to_one_prompt_make_intervals_no_narrower_than_prompts_allow():
    """Ten replies that all say what their prompt says: the rows' own interval misses the truth, 0, most of the time."""
    rng = np.random.default_rng(2)
    plain, clustered = [], []
    for _ in range(60):
        x, y = np.repeat(rng.normal(size=(2, 20)), 10, axis=1).tolist()
        groups = np.repeat(np.arange(20), 10).tolist()
        own, over_prompts = spearman_interval(x, y), clustered_spearman(x, y, groups)
        plain.append(own.low <= 0 <= own.high)
        clustered.append(over_prompts.low <= 0 <= over_prompts.high)
    assert np.mean(plain) < 0.7
    assert np.mean(clustered) > 0.85
    assert "over 20 groups" in over_prompts.method
