"""Variety, repetition and length of responses: cheap signs of a model that was steered too hard."""

from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.measure.clusters import group_means
from steered_lm.persona.style import words
from steered_lm.stats import Estimate, mean_interval


class Fluency(Config):
    """How varied and how long responses are; each value list has one entry a response, None where it is too short.

    Attributes:
        distinct: by n, each response's :func:`distinct_n`.
        pooled: by n, the share of different n-grams among those of all responses together; low when responses are alike.
        repetition: each response's :func:`repetition` of word pairs.
        words: each response's number of words.
        groups: which responses reply to the same prompt, a number each; empty when every one is by itself.
    """

    distinct: dict[int, tuple[float | None, ...]]
    pooled: dict[int, float | None]
    repetition: tuple[float | None, ...]
    words: tuple[int, ...]
    groups: tuple[int, ...] = ()

    def estimates(self, *, confidence: float = 0.95) -> dict[str, Estimate]:
        """Return means over prompts with intervals: ``distinct_<n>``, ``repetition``, ``words``."""
        shares = {**{f"distinct_{n}": values for n, values in self.distinct.items()}, "repetition": self.repetition}
        found = {name: mean_interval(self._by_prompt(values), confidence=confidence, bounds=(0.0, 1.0)) for name, values in shares.items()}
        return found | {"words": mean_interval(self._by_prompt(self.words), confidence=confidence)}

    def _by_prompt(self, values: Sequence[float | None]) -> Sequence[float | None]:
        return group_means(values, self.groups) if self.groups else values


def fluency(responses: Sequence[str], sizes: Sequence[int] = (1, 2, 3), prompts: Sequence[str] = ()) -> Fluency:
    """Return variety, repetition and length of responses.

    Args:
        responses: texts.
        sizes: the n of distinct-n.
        prompts: what each response replies to: several replies to one prompt are no independent ones.

    Raises:
        UserError: when a size is below 1.
    """
    wrong = [n for n in sizes if n < 1]
    if wrong:
        raise UserError(f"n={wrong[0]} is not the size of an n-gram. Allowed: 1 and more.")
    split = [words(text) for text in responses]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return Fluency(
        distinct={n: tuple(distinct_n(found, n) for found in split) for n in sizes},
        pooled={n: _share([gram for found in split for gram in _grams(found, n)]) for n in sizes},
        repetition=tuple(repetition(found) for found in split),
        words=tuple(map(len, split)),
        groups=tuple(numbers[prompt] for prompt in prompts),
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
