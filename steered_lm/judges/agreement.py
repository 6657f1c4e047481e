"""How far raters agree, judges or people, on the same items: Krippendorff's alpha for all, kappa and rank correlation for pairs, with intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from steered_lm.config import Config
from steered_lm.errors import UserError, near_misses
from steered_lm.stats import Estimate, spearman_interval

FloatArray = NDArray[np.float64]
Metric = Literal["interval", "ordinal", "nominal"]
"""What a difference between two scores means: its size, its ranks in between, or nothing but that they differ."""
Statistic = Callable[[FloatArray], FloatArray]
"""Maps how often each item counts ``[draws, items]`` to values ``[draws]``, NaN where undefined."""

LEAST_ITEMS = 10
_DRAWS = 1_999
_CHUNK = 256
_UNDEFINED = 0.02  # a share of resamples in which nothing differs, beyond which the others stand for too little


class PairAgreement(Config):
    """Two raters on the items that both have.

    Attributes:
        a: the first rater.
        b: the second rater.
        kappa: Cohen's kappa; unweighted for choices, with quadratic weights for scores.
        spearman: rank correlation; None for choices, which have no ranks.
        gap: mean of ``a - b``; None for choices.
    """

    a: str
    b: str
    kappa: Estimate
    spearman: Estimate | None
    gap: float | None


class Disagreement(Config):
    """One item that raters see differently.

    Attributes:
        item: its name.
        spread: scores: highest minus lowest; choices: the share of pairs of raters who chose differently.
        scores: every rater's score, None for missing.
    """

    item: str
    spread: float
    scores: dict[str, float | None]


class Agreement(Config):
    """What :func:`agreement` finds.

    Attributes:
        metric: what a difference means.
        raters: their names.
        items: how many items there are.
        missing: how many of them each rater lacks.
        alpha: Krippendorff's alpha over all raters; ``missing`` counts items with fewer than two scores.
        pairs: every pair of raters.
        disagreements: items whose scores differ, the largest spread first.
    """

    metric: Metric
    raters: tuple[str, ...]
    items: int
    missing: dict[str, int]
    alpha: Estimate
    pairs: tuple[PairAgreement, ...]
    disagreements: tuple[Disagreement, ...]


def agreement(
    ratings: Mapping[str, Sequence[float | None]], *, metric: Metric, items: Sequence[str], seed: int, confidence: float = 0.95
) -> Agreement:
    """Return how far raters agree on the same items, any of which may lack some raters.

    Alpha is Krippendorff's (2011, "Computing Krippendorff's alpha-reliability"). Kappa is Cohen's: unweighted for the nominal metric, otherwise with
    weights ``(x - y)^2`` on the scores as they are, so scores need no bins; for whole scores this is the usual quadratic kappa, for continuous ones
    Lin's concordance correlation. Intervals of alpha and kappa are BCa bootstrap ones over items (Efron 1987), those of Spearman's rho
    Bonett & Wright's. With fewer than 10 items, or where resamples often hold one value alone, there is a reason instead. In a simulation of three
    raters on five levels (300 draws a size) the 95 % intervals of alpha and kappa held the truth in 95 and 94 % of the draws with 100 items, 93 and
    93 % with 40, 90 and 92 % with 20, 91 and 86 % with 10: with few items they are too narrow.

    Args:
        ratings: by rater, one score an item in the order of ``items``; None or NaN for missing. Choices are numbers that stand for them.
        metric: ``interval`` for continuous scores, ``ordinal`` for levels, ``nominal`` for choices.
        items: the items' names, no two alike.
        seed: seeds the bootstrap.
        confidence: level of the intervals.

    Raises:
        UserError: when there are fewer than two raters, lengths differ, names repeat, or a score is infinite.
    """
    raters = tuple(ratings)
    if metric not in get_args(Metric):
        raise UserError(f"metric={metric!r} is none. {near_misses(metric, get_args(Metric))}")
    if len(raters) < 2:
        raise UserError(f"ratings are by {len(raters)} rater ({', '.join(raters)}); agreement takes two or more.")
    if len(set(items)) != len(items):
        raise UserError("items repeat a name, so scores cannot be told apart. Give each item its own.")
    scores = np.stack([_row(rater, ratings[rater], len(items)) for rater in raters])
    return Agreement(
        metric=metric,
        raters=raters,
        items=len(items),
        missing={rater: int(np.isnan(row).sum()) for rater, row in zip(raters, scores, strict=True)},
        alpha=_alpha(scores, metric, seed, confidence),
        pairs=tuple(_pair(raters, scores, i, j, metric, seed, confidence) for i, j in combinations(range(len(raters)), 2)),
        disagreements=_disagreements(raters, scores, items, metric),
    )


def bootstrap_interval(statistic: Statistic, items: int, *, seed: int, confidence: float = 0.95) -> tuple[float, float] | str:
    """Return the BCa bootstrap interval of a statistic over items (Efron 1987, JASA 82:171), or why there is none.

    Args:
        statistic: how a value follows from how often each item counts.
        items: how many there are.
        seed: seeds the resamples.
        confidence: level of the interval.
    """
    if items < LEAST_ITEMS:
        return f"{items} items are too few for a bootstrap interval; {LEAST_ITEMS} are needed"
    whole = float(statistic(np.ones((1, items)))[0])
    rng = np.random.default_rng(seed)
    sizes = [min(_CHUNK, _DRAWS - start) for start in range(0, _DRAWS, _CHUNK)]
    drawn = np.concatenate([statistic(rng.multinomial(items, np.full(items, 1 / items), size).astype(np.float64)) for size in sizes])
    left_out = np.concatenate([statistic(1.0 - np.eye(min(_CHUNK, items - k), items, k)) for k in range(0, items, _CHUNK)])
    undefined = float(np.isnan(drawn).mean())
    if undefined > _UNDEFINED or np.isnan(left_out).any():
        return f"scores vary too little: in {undefined:.0%} of the resamples nothing differs"
    drawn = drawn[~np.isnan(drawn)]
    if np.ptp(drawn) < 1e-12:
        return "every resample gives the same value, which leaves no spread"
    below = (np.sum(drawn < whole) + np.sum(drawn == whole) / 2) / len(drawn)
    if not 0.0 < below < 1.0:
        return "the value lies outside its own resamples"
    pull = left_out.mean() - left_out
    scale = float(np.sum(pull**2)) ** 1.5
    acceleration = float(np.sum(pull**3)) / (6.0 * scale) if scale > 0.0 else 0.0
    bias = float(stats.norm.ppf(below))
    ends = []
    for z in stats.norm.ppf([(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0]):
        shifted = bias + (bias + z) / (1.0 - acceleration * (bias + z))
        ends.append(float(np.quantile(drawn, stats.norm.cdf(shifted))))
    return ends[0], ends[1]


def _estimate(statistic: Statistic, items: int, missing: int, what: str, nothing: str, seed: int, confidence: float) -> Estimate:
    """Return a statistic's value with its interval; ``nothing`` says when it is undefined."""
    value = float(statistic(np.ones((1, items)))[0]) if items else math.nan
    method = f"{what}, BCa bootstrap interval over items"
    if math.isnan(value):
        return Estimate(value=None, n=items, missing=missing, method=method, reason=nothing)
    found = bootstrap_interval(statistic, items, seed=seed, confidence=confidence)
    if isinstance(found, str):
        return Estimate(value=value, n=items, missing=missing, method=method, reason=found)
    return Estimate(value=value, low=found[0], high=found[1], n=items, missing=missing, method=method)


def _alpha(scores: FloatArray, metric: Metric, seed: int, confidence: float) -> Estimate:
    """Return Krippendorff's alpha of scores ``[raters, items]``."""
    kept = scores[:, (~np.isnan(scores)).sum(axis=0) >= 2]
    dropped = scores.shape[1] - kept.shape[1]
    nothing = "alpha needs items with two scores, and scores that differ"
    return _estimate(_alpha_statistic(kept, metric), kept.shape[1], dropped, f"Krippendorff's alpha, {metric}", nothing, seed, confidence)


def _alpha_statistic(scores: FloatArray, metric: Metric) -> Statistic:
    """Return alpha as a function of item weights, for scores ``[raters, items]`` with two or more an item.

    Ordinal differences are those of mid-ranks among all scores, ``(R_c - R_k)^2`` with ``R_v = sum_{g<v} n_g + n_v / 2``, which is Krippendorff's
    sum; interval differences are the same with the scores themselves in place of ranks. So both disagreements are sums of squares.
    """
    values = np.unique(scores[~np.isnan(scores)])
    counts = np.stack([np.sum(scores == value, axis=0) for value in values], axis=1).astype(np.float64) if len(values) else np.zeros((0, 0))
    ratings = counts.sum(axis=1)  # how many raters an item has
    place = values - (values.mean() if len(values) else 0.0)  # less is lost to rounding near zero
    sums, squares = counts @ place, counts @ place**2
    scale = float(np.ptp(values)) ** 2 if metric == "interval" and len(values) else 1.0

    def statistic(weights: FloatArray) -> FloatArray:
        total = weights @ ratings
        if metric == "nominal":
            marginal = weights @ counts
            observed = weights @ ((ratings**2 - (counts**2).sum(axis=1)) / (ratings - 1.0))
            expected = total**2 - (marginal**2).sum(axis=1)
        elif metric == "interval":
            observed = weights @ _squared_gaps(ratings, sums, squares)
            expected = 2.0 * (total * (weights @ squares) - (weights @ sums) ** 2)
        else:
            marginal = weights @ counts
            rank = np.cumsum(marginal, axis=1) - marginal / 2.0
            observed = (weights * _squared_gaps(ratings, rank @ counts.T, rank**2 @ counts.T)).sum(axis=1)
            expected = 2.0 * (total * (marginal * rank**2).sum(axis=1) - (marginal * rank).sum(axis=1) ** 2)
        differs = expected > 1e-12 * total**2 * scale
        return np.where(differs, 1.0 - (total - 1.0) * observed / np.where(differs, expected, 1.0), np.nan)

    return statistic


def _squared_gaps(ratings: FloatArray, sums: FloatArray, squares: FloatArray) -> FloatArray:
    """Return each item's sum of squared differences over ordered pairs of its scores, divided by one less than its number of scores."""
    gaps: FloatArray = 2.0 * (ratings * squares - sums**2) / (ratings - 1.0)
    return gaps


def _pair(raters: tuple[str, ...], scores: FloatArray, i: int, j: int, metric: Metric, seed: int, confidence: float) -> PairAgreement:
    both = ~np.isnan(scores[i]) & ~np.isnan(scores[j])
    x, y = scores[i, both], scores[j, both]
    what = "Cohen's kappa, " + ("unweighted" if metric == "nominal" else "quadratic weights on the scores as they are")
    statistic = _nominal_kappa(x, y) if metric == "nominal" else _quadratic_kappa(x, y)
    nothing = "kappa needs items that both have, and scores that differ"
    return PairAgreement(
        a=raters[i],
        b=raters[j],
        kappa=_estimate(statistic, len(x), int((~both).sum()), what, nothing, seed, confidence),
        spearman=None if metric == "nominal" else spearman_interval(scores[i].tolist(), scores[j].tolist(), confidence=confidence),
        gap=float((x - y).mean()) if len(x) and metric != "nominal" else None,
    )


def _quadratic_kappa(x: FloatArray, y: FloatArray) -> Statistic:
    """``1 - E(x - y)^2 / (var x + var y + (mean x - mean y)^2)``, Cohen's kappa with the weights ``(x - y)^2``."""

    def statistic(weights: FloatArray) -> FloatArray:
        share = weights / weights.sum(axis=1, keepdims=True)
        observed = share @ (x - y) ** 2
        mean_x, mean_y = share @ x, share @ y
        centre = float((x.mean() + y.mean()) / 2.0)
        spread = share @ ((x - centre) ** 2 + (y - centre) ** 2)
        expected = spread - 2.0 * (mean_x - centre) * (mean_y - centre)
        differs = expected > 1e-12 * max(1.0, float(np.ptp(np.concatenate([x, y]))) ** 2)
        return np.where(differs, 1.0 - observed / np.where(differs, expected, 1.0), np.nan)

    return statistic


def _nominal_kappa(x: FloatArray, y: FloatArray) -> Statistic:
    values = np.unique(np.concatenate([x, y]))
    of_x, of_y = (np.equal.outer(scores, values).astype(np.float64) for scores in (x, y))

    def statistic(weights: FloatArray) -> FloatArray:
        share = weights / weights.sum(axis=1, keepdims=True)
        agreed = share @ (x == y).astype(np.float64)
        chance = ((share @ of_x) * (share @ of_y)).sum(axis=1)
        differs = chance < 1.0 - 1e-12
        return np.where(differs, (agreed - chance) / np.where(differs, 1.0 - chance, 1.0), np.nan)

    return statistic


def _disagreements(raters: tuple[str, ...], scores: FloatArray, items: Sequence[str], metric: Metric) -> tuple[Disagreement, ...]:
    found = []
    for item, column in zip(items, scores.T, strict=True):
        given = column[~np.isnan(column)]
        if len(given) < 2 or np.ptp(given) == 0.0:
            continue
        pairs = list(combinations(given.tolist(), 2))
        spread = sum(a != b for a, b in pairs) / len(pairs) if metric == "nominal" else float(np.ptp(given))
        by_rater = {rater: None if math.isnan(score) else float(score) for rater, score in zip(raters, column, strict=True)}
        found.append(Disagreement(item=item, spread=spread, scores=by_rater))
    return tuple(sorted(found, key=lambda d: -d.spread))


def _row(rater: str, given: Sequence[float | None], items: int) -> FloatArray:
    if len(given) != items:
        raise UserError(f"ratings[{rater!r}] has {len(given)} scores for {items} items; give one an item, with None for missing.")
    row = np.array([math.nan if score is None else float(score) for score in given], dtype=np.float64)
    if np.isinf(row).any():
        raise UserError(f"ratings[{rater!r}][{int(np.isinf(row).argmax())}] is infinite. Allowed: finite scores, or None for missing.")
    return row
