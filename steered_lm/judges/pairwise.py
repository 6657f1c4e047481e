"""Pairs judged in both orders, so that a judge's preference for a place cancels and is seen."""

from collections.abc import Sequence

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.base import PREFERENCE, Choice, Judge, JudgeRequest, Verdict

_MIRRORED: dict[Choice, Choice] = {"A": "B", "B": "A", "tie": "tie"}


class BothOrders:
    """Asks a pairwise judge twice, with the responses swapped, and returns one verdict for each pair.

    The preference is the mean of both orders, so a judge that always names the first response comes out at zero. ``consistent`` is false when the two
    name different responses; the choice is then a tie. A pair with one order missing is missing. ``parts`` holds both verdicts as they were given.
    """

    def __init__(self, judge: Judge) -> None:
        """Wrap a judge of a pairwise question."""
        self._judge = judge

    @property
    def name(self) -> str:
        """The wrapped judge's name."""
        return self._judge.name

    @property
    def identity(self) -> str:
        """Hash of the wrapped judge's identity and the two orders."""
        return content_hash({"orders": "both", "judge": self._judge.identity})

    @property
    def remote(self) -> bool:
        """Whether the wrapped judge waits for somebody else's answer."""
        return bool(getattr(self._judge, "remote", False))

    @property
    def inner(self) -> Judge:
        """The judge that is asked once an order."""
        return self._judge

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a pair, in order.

        Raises:
            JudgeError: when a request has no other response.
        """
        verdicts = self._judge.judge(both_orders(requests))
        return [combine(first, second, self.name) for first, second in zip(verdicts[: len(requests)], verdicts[len(requests) :], strict=True)]


def both_orders(requests: Sequence[JudgeRequest]) -> list[JudgeRequest]:
    """Return the pairs as given, and then the same pairs swapped.

    Raises:
        JudgeError: when a request has no other response.
    """
    lacking = [number for number, request in enumerate(requests) if request.other is None]
    if lacking:
        raise JudgeError(f"requests[{lacking[0]}].other is None: a pairwise judge holds two responses against each other. Give both.")
    return [*requests, *(request.swapped() for request in requests)]


def combine(first: Verdict, second: Verdict, judge: str) -> Verdict:
    """Return one verdict from those of a pair and of the same pair swapped."""
    usage = first.usage + second.usage if first.usage and second.usage else first.usage or second.usage
    facts = {
        "judge": judge,
        "scale": PREFERENCE,
        "parts": (first, second),
        "usage": usage,
        "mode": first.mode if first.mode == second.mode else None,
        "cached": first.cached and second.cached,
    }
    if first.score is None or second.score is None:
        reasons = [f"{order}: {v.missing}" for order, v in (("as given", first), ("swapped", second)) if v.missing is not None]
        return Verdict(missing="; ".join(reasons), **facts)
    preferred, other = _choice(first), _MIRRORED[_choice(second)]
    consistent = preferred == other
    sure = [v.confidence for v in (first, second) if v.confidence is not None]
    return Verdict(
        score=(first.score - second.score) / 2,
        choice=preferred if consistent else "tie",
        consistent=consistent,
        confidence=sum(sure) / len(sure) if consistent and len(sure) == 2 else None,
        explanation=f"as given: {first.explanation} | swapped: {second.explanation}",
        **facts,
    )


def _choice(verdict: Verdict) -> Choice:
    """Return what a verdict names; from probabilities that is the likeliest answer, a tie too, and not the sign of the mean."""
    if verdict.choice is not None:
        return verdict.choice
    assert verdict.score is not None
    return "A" if verdict.score > 0 else "B" if verdict.score < 0 else "tie"
