"""Statistics of values that come in groups, such as several replies to one prompt: members of a group are no independent evidence."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from steered_lm.judges.agreement import bootstrap_interval
from steered_lm.stats import Estimate, PairedDifference, Values, mean_interval, paired_difference, spearman_interval

FloatArray = NDArray[np.float64]


def group_means(values: Values, groups: Sequence[Hashable]) -> list[float | None]:
    """Return each group's mean, in the order in which groups come first; None where no member has a value."""
    found: dict[Hashable, list[float]] = {group: [] for group in groups}
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            found[group].append(value)
    return [sum(own) / len(own) if own else None for own in found.values()]


def clustered_mean(values: Values, groups: Sequence[Hashable]) -> Estimate:
    """Return the mean over groups of the mean over a group's members, with Student's interval over groups."""
    return mean_interval(group_means(values, groups))


def clustered_difference(a: Values, b: Values, groups: Sequence[Hashable], *, seed: int = 0) -> PairedDifference:
    """Return the mean over groups of the paired differences of their members, tested and with an interval over groups."""
    both = [x is not None and y is not None for x, y in zip(a, b, strict=True)]
    means = [group_means([value if known else None for value, known in zip(side, both, strict=True)], groups) for side in (a, b)]
    return paired_difference(*means, seed=seed)


def clustered_spearman(x: Values, y: Values, groups: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Return Spearman's rank correlation over all values; where groups have several, its interval is a BCa bootstrap over groups (Efron 1987).

    ``n`` counts values.
    """
    plain = spearman_interval(x, y)
    known = [(a, b, group) for a, b, group in zip(x, y, groups, strict=True) if a is not None and b is not None]
    own = {group: number for number, group in enumerate(dict.fromkeys(group for *_, group in known))}
    if len(own) == len(known) or plain.value is None:
        return plain
    first, second = (np.array(side, dtype=np.float64) for side in list(zip(*known, strict=True))[:2])
    member = np.array([own[group] for *_, group in known])

    def statistic(counts: FloatArray) -> FloatArray:
        weights = counts[:, member]
        return _correlation(_midranks(first, weights), _midranks(second, weights), weights)

    method = f"Spearman's rho, BCa bootstrap interval over {len(own)} groups"
    interval = bootstrap_interval(statistic, len(own), seed=seed)
    if isinstance(interval, str):
        return Estimate(value=plain.value, n=plain.n, missing=plain.missing, method=method, reason=interval)
    return Estimate(value=plain.value, low=interval[0], high=interval[1], n=plain.n, missing=plain.missing, method=method)


def _midranks(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the ranks of values that count ``weights[draw]`` times, ties in the middle of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    by_value = np.add.reduceat(weights[:, np.argsort(place, kind="stable")], starts, axis=1)
    ranks: FloatArray = (np.cumsum(by_value, axis=1) - by_value / 2.0)[:, place]
    return ranks


def _correlation(x: FloatArray, y: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the correlation of each draw; NaN where one side does not vary."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = (side - (side * weights).sum(axis=1, keepdims=True) / total for side in (x, y))
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: FloatArray = np.where(spread > 1e-12, (weights * x * y).sum(axis=1) / spread, np.nan)
    return found
