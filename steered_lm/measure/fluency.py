"""Variety, repetition and length of responses: cheap signs of a model that was steered too hard."""

from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.persona.style import words
from steered_lm.stats import Estimate, mean_interval


class Fluency(Config):
    """How varied and how long responses are; each value list has one entry a response, None where it is too short.

    Attributes:
        distinct: by n, each response's :func:`distinct_n`.
        pooled: by n, the share of different n-grams among those of all responses together; low when responses are alike.
        repetition: each response's :func:`repetition` of word pairs.
        words: each response's number of words.
    """

    distinct: dict[int, tuple[float | None, ...]]
    pooled: dict[int, float | None]
    repetition: tuple[float | None, ...]
    words: tuple[int, ...]

    def estimates(self, *, confidence: float = 0.95) -> dict[str, Estimate]:
        """Return means over responses with intervals: ``distinct_<n>``, ``repetition``, ``words``."""
        found = {f"distinct_{n}": mean_interval(values, confidence=confidence, bounds=(0.0, 1.0)) for n, values in self.distinct.items()}
        found["repetition"] = mean_interval(self.repetition, confidence=confidence, bounds=(0.0, 1.0))
        found["words"] = mean_interval(self.words, confidence=confidence)
        return found


def fluency(responses: Sequence[str], sizes: Sequence[int] = (1, 2, 3)) -> Fluency:
    """Return variety, repetition and length of responses.

    Args:
        responses: texts.
        sizes: the n of distinct-n.

    Raises:
        UserError: when a size is below 1.
    """
    wrong = [n for n in sizes if n < 1]
    if wrong:
        raise UserError(f"n={wrong[0]} is not the size of an n-gram. Allowed: 1 and more.")
    split = [words(text) for text in responses]
    return Fluency(
        distinct={n: tuple(distinct_n(found, n) for found in split) for n in sizes},
        pooled={n: _share([gram for found in split for gram in _grams(found, n)]) for n in sizes},
        repetition=tuple(repetition(found) for found in split),
        words=tuple(map(len, split)),
    )


def distinct_n(found: Sequence[str], n: int) -> float | None:
    """Return the number of different n-grams over the number of n-grams (Li et al. 2016, arXiv:1510.03055, section 5.2); None without any."""
    return _share(_grams(found, n))


def repetition(found: Sequence[str], n: int = 2) -> float | None:
    """Return the share of n-grams that occurred before in the same text, ``1 - distinct_n``; None without any."""
    share = distinct_n(found, n)
    return None if share is None else 1.0 - share


def _grams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def _share(grams: Sequence[tuple[str, ...]]) -> float | None:
    return len(set(grams)) / len(grams) if grams else None
