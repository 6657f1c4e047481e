"""Attempts to get an answer from an endpoint: retries, quotas, and a budget."""

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from steered_lm.judges.adapter import Ask, GarbageError, RefusedError, Reply, Turn, UnreachableError
from steered_lm.judges.answers import Answer
from steered_lm.judges.base import Mode
from steered_lm.judges.budget import Budget, Tokens
from steered_lm.judges.endpoint import Endpoint
from steered_lm.judges.limits import retry_after, until_refilled
from steered_lm.judges.redact import Key

ANSWER_TOKENS: Mapping[Mode, int] = {"logprobs": 1, "json": 60, "text": 60}
"""For estimates: a score, or a sentence and a score."""

_log = logging.getLogger(__name__)


@dataclass
class Hold:
    """When an endpoint takes requests again, on the monotonic clock."""

    until: float = 0.0


class Failure(NamedTuple):
    """A request without an answer: the reason in words that repeat, the HTTP status, the endpoint's own message."""

    reason: str
    status: int = 0
    message: str = ""


class OutOfBudgetError(Exception):
    """No further attempt fits; the argument is the limit."""


@dataclass
class Tally:
    """What one verdict took."""

    attempts: int = 0
    tokens: Tokens = field(default_factory=Tokens)


class Attempts:
    """One batch's attempts at an endpoint: they wait for each other's quotas and draw on one budget.

    Attributes:
        reached: the limit of the budget that has stopped the batch, or None.
    """

    def __init__(self, ask: Ask, endpoint: Endpoint, key: Key, budget: Budget, hold: Hold, judge: str) -> None:
        """Ask over open connections; budget and hold are the judge's, and outlive the batch."""
        self._ask, self._endpoint, self._key, self._budget, self._hold, self._name = ask, endpoint, key, budget, hold, judge
        self.reached: str | None = None
        self._settled = asyncio.Event()
        self._jitter = random.Random()  # its own: waiting must not move anyone's seeded generator

    async def ask(self, turn: Turn, tally: Tally) -> Answer | Failure:
        """Return the answer to one turn, or why there is none.

        Raises:
            OutOfBudgetError: when no further attempt fits.
        """
        limit = self._endpoint
        retrying = AsyncRetrying(
            stop=stop_after_attempt(limit.attempts),
            retry=retry_if_exception(self._worth_retrying),
            wait=self._wait,
            before_sleep=self._say,
            reraise=True,
        )
        try:
            reply: Reply = await retrying(self._once, turn, tally)
            return reply.answer._replace(text=self._key.redacted(reply.answer.text))
        except RefusedError as problem:
            return Failure(f"HTTP {problem.status}", problem.status, self._key.redacted(problem.message))
        except TimeoutError:
            return Failure(f"no answer within {limit.timeout:g} s, {limit.attempts} attempts")
        except UnreachableError as problem:
            return Failure(f"no connection to {limit.base_url}, {limit.attempts} attempts", message=self._key.redacted(str(problem)))
        except GarbageError as problem:
            return Failure("garbage instead of an answer", message=self._key.redacted(str(problem)))

    async def _once(self, turn: Turn, tally: Tally) -> Reply:
        expected = Tokens.estimated(len(turn.system) + len(turn.user), ANSWER_TOKENS[turn.way.mode])
        await self._admit(expected)
        tally.attempts += 1
        counted: Tokens | None = None
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                reply = await self._ask(turn)
            if (usage := reply.answer.usage) is not None:
                counted = Tokens(usage.input_tokens, usage.output_tokens)
                tally.tokens = tally.tokens.plus(counted)
            self._pause(until_refilled(reply.headers))
            return reply
        except RefusedError as problem:
            counted = Tokens()
            if self._worth_retrying(problem):
                self._pause(max(retry_after(problem.headers) or 0.0, until_refilled(problem.headers)))
            raise
        except UnreachableError:
            counted = Tokens()
            raise
        finally:
            self._budget.settle(expected, counted)
            self._settled.set()  # wakes who waits now, and only them
            self._settled.clear()

    async def _admit(self, expected: Tokens) -> None:
        """Wait until the endpoint takes requests again and the budget has room for one more, and enter it there."""
        while True:
            left = self._hold.until - time.monotonic()
            if left > 0:
                await asyncio.sleep(left + self._jitter.uniform(0.0, 0.1) * min(left, 1.0))  # not all in one moment
                continue
            limit = self.reached or self._budget.passed_by(expected)
            if limit is None:
                return self._budget.enter(expected)
            if self.reached or limit.startswith("max_requests") or not self._budget.in_flight:
                self.reached = limit
                raise OutOfBudgetError(limit)
            await self._settled.wait()  # what is under way may take less than expected

    def _pause(self, seconds: float) -> None:
        """Let no request of this judge start for a while: a quota is everybody's, not only that of the request that met it."""
        if seconds > 0:
            until = time.monotonic() + min(seconds, self._endpoint.max_wait)
            self._hold.until = max(self._hold.until, until)

    def _worth_retrying(self, problem: BaseException) -> bool:
        if isinstance(problem, RefusedError):
            again = problem.status in (408, 409, 429) or problem.status >= 500
            return again and (retry_after(problem.headers) or 0.0) <= self._endpoint.max_wait
        return isinstance(problem, (UnreachableError, GarbageError, TimeoutError))

    def _wait(self, state: RetryCallState) -> float:
        """Return the seconds to wait: an exponential backoff with jitter, and at least what the endpoint asks for."""
        problem = state.outcome.exception() if state.outcome else None
        asked = retry_after(problem.headers) if isinstance(problem, RefusedError) else None
        longest = min(self._endpoint.max_wait, self._endpoint.backoff * 2.0 ** (state.attempt_number - 1))
        return max(asked or 0.0, longest * self._jitter.uniform(0.5, 1.0))

    def _say(self, state: RetryCallState) -> None:
        problem = state.outcome.exception() if state.outcome else None
        kind = f"HTTP {problem.status}" if isinstance(problem, RefusedError) else type(problem).__name__
        _log.info("judge %s: %s at attempt %d, next in %.1f s", self._name, kind, state.attempt_number, state.upcoming_sleep)
