"""What a run may spend on an endpoint: requests, tokens, dollars; what it has spent; and the stop when no more is allowed."""

import math
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from steered_lm.config import Config
from steered_lm.errors import JudgeError
from steered_lm.judges.base import Usage

_CHARACTERS_A_TOKEN = 4  # of English text, roughly; there is no counting without the endpoint's tokenizer
_MILLION = 1_000_000


class BudgetReached(JudgeError):
    """The next request would pass the budget. Verdicts that were finished before have been handed over.

    Attributes:
        usage: what was spent.
        finished: verdicts of this batch that were finished.
        asked: verdicts that were asked for.
    """

    def __init__(self, message: str, usage: Usage, finished: int, asked: int) -> None:
        """Keep what was spent for whoever goes on."""
        super().__init__(message)
        self.usage, self.finished, self.asked = usage, finished, asked


class Limits(Config):
    """A budget and the prices that dollars are counted with.

    Attributes:
        max_requests: requests that may be sent, retries included.
        max_tokens: tokens that may be read and written, both together.
        max_dollars: dollars that may be spent; needs both prices.
        input_price: dollars for a million tokens that are read.
        output_price: dollars for a million tokens that are written.
    """

    max_requests: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_dollars: float | None = Field(default=None, gt=0)
    input_price: float | None = Field(default=None, ge=0)
    output_price: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _prices_where_needed(self) -> Self:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("give input_price and output_price together, in dollars per million tokens")
        if self.max_dollars is not None and self.input_price is None:
            raise ValueError("max_dollars needs input_price and output_price, in dollars per million tokens: see the provider's price list")
        return self

    def dollars(self, tokens: "Tokens") -> float | None:
        """Return what tokens cost, None without prices."""
        if self.input_price is None or self.output_price is None:
            return None
        return (tokens.read * self.input_price + tokens.written * self.output_price) / _MILLION

    def usage(self, requests: int, tokens: "Tokens") -> Usage:
        """Return requests and tokens with their price, where prices are given."""
        return Usage(requests=requests, input_tokens=tokens.read, output_tokens=tokens.written, dollars=self.dollars(tokens))


class Tokens(NamedTuple):
    """Tokens that are read and written."""

    read: int = 0
    written: int = 0

    @classmethod
    def estimated(cls, characters: int, answer: int) -> Self:
        """Return what one request may take: a token for every four characters that are sent, and the answer. An estimate, no count."""
        return cls(math.ceil(characters / _CHARACTERS_A_TOKEN), answer)

    def plus(self, other: "Tokens", sign: int = 1) -> "Tokens":
        """Return the sum, or with ``sign=-1`` the difference."""
        return Tokens(self.read + sign * other.read, self.written + sign * other.written)


class Budget:
    """The account of one judge: every attempt is entered before it is sent and settled when it ended.

    An attempt that is under way counts as what it is expected to take, so that many at a time pass the budget by no more than they take above
    that. One that ended without a count, such as a timeout, stays entered as expected: it may have been billed.

    Attributes:
        in_flight: attempts that are entered and not settled.
    """

    def __init__(self, limits: Limits) -> None:
        """Start at nothing."""
        self._limits = limits
        self._requests = 0
        self._counted = self._uncounted = self._reserved = Tokens()
        self.in_flight = 0

    @property
    def spent(self) -> Usage:
        """Attempts so far, the tokens that the endpoint counted, and their price."""
        return self._limits.usage(self._requests, self._counted)

    def passed_by(self, expected: Tokens) -> str | None:
        """Return the limit that one more attempt would pass, such as ``max_requests=100``, or None when it fits."""
        limits = self._limits
        if limits.max_requests is not None and self._requests + 1 > limits.max_requests:
            return f"max_requests={limits.max_requests}"
        if limits.max_tokens is None and limits.max_dollars is None:
            return None
        total = self._counted.plus(self._uncounted).plus(self._reserved).plus(expected)
        if limits.max_tokens is not None and total.read + total.written > limits.max_tokens:
            return f"max_tokens={limits.max_tokens}"
        if limits.max_dollars is not None and (limits.dollars(total) or 0.0) > limits.max_dollars:
            return f"max_dollars={limits.max_dollars:g}"
        return None

    def enter(self, expected: Tokens) -> None:
        """Count an attempt that is about to be sent."""
        self._requests += 1
        self._reserved = self._reserved.plus(expected)
        self.in_flight += 1

    def settle(self, expected: Tokens, counted: Tokens | None) -> None:
        """Put what an attempt took in place of what was expected; None when nobody counted."""
        self._reserved = self._reserved.plus(expected, -1)
        self.in_flight -= 1
        if counted is None:
            self._uncounted = self._uncounted.plus(expected)
        else:
            self._counted = self._counted.plus(counted)

    def reached(self, limit: str, judge: str, finished: int, asked: int) -> BudgetReached:
        """Return the error that says what was spent and what to do next."""
        spent = self.spent
        tokens = f"{spent.input_tokens:,} tokens read and {spent.output_tokens:,} written"
        if unknown := sum(self._uncounted):
            tokens += f" (and about {unknown:,} of attempts that the endpoint did not count)"
        dollars = "" if spent.dollars is None else f", {spent.dollars:.4f} dollars"
        return BudgetReached(
            f"judge {judge}: one more request would pass the budget, {limit}. Spent: {spent.requests:,} requests, {tokens}{dollars}. "
            f"{finished:,} of {asked:,} verdicts of this batch are finished. Raise {limit.partition('=')[0]} and start again: "
            "with a cache, finished verdicts are not asked for again.",
            spent,
            finished,
            asked,
        )
