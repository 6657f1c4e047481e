"""Means over tokens that come in items, with intervals and paired differences over the items."""

import math
from typing import Self

from pydantic import model_validator

from steered_lm.config import Config
from steered_lm.stats import Estimate, PairedDifference, mean_interval, paired_difference


class TokenMean(Config):
    """A mean over tokens, ``sum(totals) / sum(tokens)``, whose tokens come in items that may be of any length.

    Attributes:
        items: the items' names; equal in whatever is compared item by item.
        totals: per item, the sum over its tokens (in nats where it is about log-probabilities); None where there is no number.
        tokens: per item, how many tokens it has.
    """

    items: tuple[str, ...]
    totals: tuple[float | None, ...]
    tokens: tuple[int, ...]

    @model_validator(mode="after")
    def _matching(self) -> Self:
        if not len(self.items) == len(self.totals) == len(self.tokens):
            raise ValueError("items, totals and tokens must have one entry an item")
        if any(count < 1 for count in self.tokens):
            raise ValueError("an item without tokens has no mean; leave it out")
        return self

    @property
    def mean(self) -> float | None:
        """The mean over all tokens of the items that have a number; None when none has."""
        known = [(total, count) for total, count in zip(self.totals, self.tokens, strict=True) if total is not None]
        return math.fsum(total for total, _ in known) / sum(count for _, count in known) if known else None

    @property
    def values(self) -> list[float | None]:
        """Each item's own mean over its tokens, None where it is missing."""
        return [None if total is None else total / count for total, count in zip(self.totals, self.tokens, strict=True)]

    def estimate(self, *, confidence: float = 0.95) -> Estimate:
        """Return the mean over tokens with an interval over items.

        The interval is Student's t of the linearised values ``z_i = R + (x_i - R t_i) / mean(t)``, where item ``i`` has total ``x_i`` and
        ``t_i`` tokens and ``R`` is the mean over tokens: their mean is ``R``, and their spread gives its standard error (the ratio
        estimator of survey sampling; Cochran 1977, "Sampling Techniques", chapter 6). Items are taken as independent.
        """
        found = mean_interval(_linearised(self.totals, self.tokens), confidence=confidence)
        return found.model_copy(update={"method": "mean over tokens, Student's t interval over items (linearised ratio)"})

    def minus(self, other: "TokenMean", *, confidence: float = 0.95, seed: int = 0) -> PairedDifference:
        """Return the difference of two means over the same tokens, paired by item: ``paired_difference`` of the linearised values.

        Raises:
            ValueError: when the items or their numbers of tokens differ.
        """
        if (self.items, self.tokens) != (other.items, other.tokens):
            raise ValueError("the two sides must be of the same items with the same tokens; measure both with the same text and windows.")
        shared = [None if a is None or b is None else a - b for a, b in zip(self.totals, other.totals, strict=True)]
        mine = [None if d is None else a for a, d in zip(self.totals, shared, strict=True)]
        theirs = [None if d is None else b for b, d in zip(other.totals, shared, strict=True)]
        a, b = _linearised(mine, self.tokens), _linearised(theirs, self.tokens)
        return paired_difference(a, b, confidence=confidence, seed=seed)


def exponentiated(found: Estimate) -> Estimate:
    """Return the estimate of ``exp(x)``, ends and all: a perplexity from a mean in nats. What overflows is dropped, with a reason."""
    parts = {name: None if value is None else _exp(value) for name, value in (("value", found.value), ("low", found.low), ("high", found.high))}
    reason = found.reason
    if any(value is not None and math.isinf(value) for value in parts.values()):
        parts, reason = dict.fromkeys(parts), "the mean is too large to exponentiate"
    return found.model_copy(update={**parts, "reason": reason, "method": f"exponential of the {found.method}"})


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _linearised(totals: "list[float | None] | tuple[float | None, ...]", tokens: tuple[int, ...]) -> list[float | None]:
    known = [(total, count) for total, count in zip(totals, tokens, strict=True) if total is not None]
    if not known:
        return [None] * len(totals)
    size = sum(count for _, count in known)
    mean = math.fsum(total for total, _ in known) / size
    scale = len(known) / size
    return [None if total is None else mean + scale * (total - mean * count) for total, count in zip(totals, tokens, strict=True)]
