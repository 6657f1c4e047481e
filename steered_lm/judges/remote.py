"""Judges that ask somebody else's server: many requests at a time, retries, quotas, budgets, and what an endpoint refuses.

What is particular to one API is in its adapter (:mod:`steered_lm.judges.adapter`).
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.adapter import Api, Ask, GarbageError, RefusedError, Reply, Turn, UnreachableError, Way
from steered_lm.judges.answers import SPLIT, Answer, read
from steered_lm.judges.base import EMPTY, JudgeRequest, Mode, OnVerdict, Usage, Verdict
from steered_lm.judges.budget import Budget, Tokens
from steered_lm.judges.endpoint import Endpoint
from steered_lm.judges.limits import retry_after, until_refilled
from steered_lm.judges.loop import run
from steered_lm.judges.question import Question

VERSION = 1
"""Raised whenever a change of how is asked or read changes a verdict."""

_log = logging.getLogger(__name__)
_MOVED = "the endpoint has moved, and a key is not carried elsewhere; set base_url to where it is now"
_FATAL = {
    **dict.fromkeys((301, 302, 307, 308), _MOVED),
    401: "the key was refused; check the key in {key_env}",
    402: "the account has no money left; pay in, or use another key in {key_env}",
    403: "the key may not use this model or endpoint; check the key in {key_env} and its rights",
    404: "the endpoint does not know this model or path; check the model and base_url (most OpenAI-compatible ones end in /v1)",
}
_REFUSED = (400, 422)
_FAILURES_IN_A_ROW = 8
_ANSWER_TOKENS: Mapping[Mode, int] = {"logprobs": 1, "json": 60, "text": 60}  # for estimates: a score, or a sentence and a score
_SHOWN = 500  # characters of a text from outside that are kept


class RemoteJudge:
    """Asks a language model behind an API; what is no plain score is missing with its reason.

    Attributes:
        api: the adapter.
    """

    api: ClassVar[Api]
    remote = True

    def __init__(self, endpoint: Endpoint, question: Question) -> None:
        """Judge one question at one endpoint.

        Raises:
            JudgeError: when there is no key, or the API does not have the mode.
        """
        name = self.api.defaults.judge
        if endpoint.mode not in ("auto", *self.api.ladder):
            raise JudgeError(f"mode={endpoint.mode!r} is not possible with judge {name}. Allowed: auto, {', '.join(self.api.ladder)}.")
        self._endpoint, self._question = endpoint, question
        self._key = endpoint.key(name)
        self._budget = Budget(endpoint)
        self._learnt = _Learnt(Way(self.api.ladder[0] if endpoint.mode == "auto" else endpoint.mode))
        asked = {"model": endpoint.model, "base_url": endpoint.base_url, "mode": endpoint.mode, "question": question.digest}
        self._identity = content_hash({"judge": name, "version": VERSION, **asked})

    @classmethod
    def for_question(cls, question: Question, **options: Any) -> Self:
        """Return a judge of one question; ``options`` are ``Endpoint``'s fields."""
        return cls(Endpoint.from_options(options, cls.api.defaults), question)

    @property
    def name(self) -> str:
        """``<backend>:<model>``."""
        return f"{self.api.defaults.judge}:{self._endpoint.model}"

    @property
    def identity(self) -> str:
        """SHA-256 of model, endpoint, mode and question."""
        return self._identity

    @property
    def facts(self) -> dict[str, str]:
        """What a cache notes beside the verdicts, for people."""
        return {"model": self._endpoint.model, **self._question.facts}

    @property
    def usage(self) -> Usage:
        """What all batches so far took: attempts, and the tokens that the endpoint counted."""
        return self._budget.spent

    def estimate(self, requests: Sequence[JudgeRequest]) -> Usage:
        """Return about what judging these would take, without asking: a token for every four characters, no retries. An estimate, no count."""
        mode = self._learnt.way.mode
        texts = [self._question.user(request) for request in requests if not _empty(request)]
        system = len(self._question.system(token=mode == "logprobs"))
        total = Tokens()
        for text in texts:
            total = total.plus(Tokens.estimated(system + len(text), _ANSWER_TOKENS[mode]))
        return self._endpoint.usage(len(texts), total)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order.

        Raises:
            JudgeError: when the endpoint refuses the key, the model or the path: no further request would fare better.
            BudgetReached: when the next request would pass the budget.
        """
        return self.judge_each(requests, lambda index, verdict: None)

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict(index, verdict)`` as each arrives, possibly from another thread."""
        if not requests:
            return []
        batch = _Batch(self, requests, on_verdict)
        return run(batch.ask_all)

    def __repr__(self) -> str:
        """Show model and endpoint, never a key."""
        return f"{type(self).__name__}(model={self._endpoint.model!r}, base_url={self._endpoint.base_url!r})"


def _empty(request: JudgeRequest) -> bool:
    return not request.response.strip() or (request.other is not None and not request.other.strip())


@dataclass
class _Learnt:
    """What earlier requests taught about an endpoint.

    Attributes:
        way: how it is asked first.
        sure: whether that has worked, so that a refusal is about the request and not about the way.
        hold_until: when it takes requests again, on the monotonic clock.
    """

    way: Way
    sure: bool = False
    hold_until: float = 0.0


class _Failure(NamedTuple):
    """A request without an answer: the reason in words that repeat, the HTTP status, the endpoint's own message."""

    reason: str
    status: int = 0
    message: str = ""


class _OutOfBudgetError(Exception):
    """No further attempt fits; the argument is the limit."""


@dataclass
class _Tally:
    """What one verdict took."""

    attempts: int = 0
    tokens: Tokens = field(default_factory=Tokens)


class _Batch:
    """One call of ``judge``: connections, workers, and when to give up."""

    def __init__(self, judge: RemoteJudge, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> None:
        self._api, self._endpoint, self._key, self._name = judge.api, judge._endpoint, judge._key, judge.name
        self._budget, self._learnt = judge._budget, judge._learnt
        self._rubric = judge._question.rubric
        self._systems: dict[Mode, str] = {mode: judge._question.system(token=mode == "logprobs") for mode in self._api.ladder}
        # before anything is sent: a request that lacks a part is the caller's mistake
        self._users = [None if _empty(request) else judge._question.user(request) for request in requests]
        self._on_verdict = on_verdict
        self._verdicts: dict[int, Verdict] = {}
        self._failures = 0
        self._reached: str | None = None
        self._settled = asyncio.Event()
        self._jitter = random.Random()  # its own: waiting must not move anyone's seeded generator

    async def ask_all(self) -> list[Verdict]:
        """Ask for every request; the first fatal answer cancels the rest, a budget that is reached lets what is under way end."""
        todo = iter(enumerate(self._users))
        async with self._api.connect(self._endpoint, self._key) as ask:
            workers = [asyncio.create_task(self._work(ask, todo)) for _ in range(min(self._endpoint.concurrency, len(self._users)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self._reached is not None:
            raise self._budget.reached(self._reached, self._name, len(self._verdicts), len(self._users))
        return [self._verdicts[index] for index in range(len(self._users))]

    async def _work(self, ask: Ask, todo: Iterator[tuple[int, str | None]]) -> None:
        for index, user in todo:
            try:
                verdict = await self._one(ask, user)
            except _OutOfBudgetError as stop:
                self._reached = str(stop)
                return
            self._verdicts[index] = verdict
            self._on_verdict(index, verdict)
            if self._reached is not None:
                return

    async def _one(self, ask: Ask, user: str | None) -> Verdict:
        """Return the verdict on one request."""
        if user is None:
            return self._missing(EMPTY)
        if self._failures >= _FAILURES_IN_A_ROW:
            return self._missing(f"not asked, as {_FAILURES_IN_A_ROW} requests in a row had failed")
        tally = _Tally()
        way: Way | None = self._learnt.way
        while way is not None:  # until the endpoint takes a way, or refuses the last one
            used = way
            answer = await self._attempts(ask, Turn(self._systems[used.mode], user, self._rubric.answer_schema, used), tally)
            way = self._less(used, answer)
        usage = self._endpoint.usage(tally.attempts, tally.tokens)
        if isinstance(answer, _Failure):
            return self._failed(answer, usage)
        self._failures = 0
        return self._read(answer, used, usage)

    def _less(self, way: Way, answer: Answer | _Failure) -> Way | None:
        """Return the way to try after one that the endpoint does not take; None when it took it, or nothing is left to try."""
        if isinstance(answer, _Failure):
            if answer.status not in _REFUSED:
                return None
        elif way.mode != "logprobs" or answer.refused or answer.cut == "content_filter" or self._first_token_tells(answer):
            return None
        if self._learnt.sure:
            return None if way == self._learnt.way else self._learnt.way
        if isinstance(answer, _Failure):
            for parameter in self._api.droppable:
                if parameter in answer.message and parameter not in way.dropped:
                    return way._replace(dropped=way.dropped | {parameter})
        rungs = self._api.ladder[self._api.ladder.index(way.mode) + 1 :]
        return way._replace(mode=rungs[0]) if rungs and self._endpoint.mode == "auto" else None

    def _first_token_tells(self, answer: Answer) -> bool:
        """Return whether there are log-probabilities, and a score does not go on after its first token."""
        return answer.top is not None and read(self._rubric, answer, "logprobs").missing != SPLIT

    def _read(self, answer: Answer, way: Way, usage: Usage) -> Verdict:
        mode = way.mode
        reading = read(self._rubric, answer, mode)
        if mode == "json" and reading.score is None and self._endpoint.mode == "auto":
            # some endpoints take a schema and forget it; the turns are the same in both modes, so its answer may be read as text
            as_text = read(self._rubric, answer, "text")
            reading, mode = (as_text, "text") if as_text.score is not None else (reading, mode)
        if not self._learnt.sure and (reading.score is not None or (mode == "logprobs" and answer.top is not None)):
            self._learnt.way, self._learnt.sure = way, True
            if way.dropped:
                _log.info("judge %s: the endpoint does not take %s", self._name, ", ".join(sorted(way.dropped)))
        return reading.verdict(self._rubric, self._name, mode, usage)

    def _failed(self, failure: _Failure, usage: Usage) -> Verdict:
        if failure.status in _FATAL:
            advice = _FATAL[failure.status].format(key_env=self._endpoint.key_env)
            raise JudgeError(f"judge {self._name} at {self._endpoint.base_url}: HTTP {failure.status}, {advice}.")
        # when the endpoint has taken requests before, a refusal is about this one
        self._failures += failure.status not in _REFUSED or not self._learnt.sure
        return self._missing(failure.reason, failure.message, usage)

    def _missing(self, reason: str, text: str = "", usage: Usage | None = None) -> Verdict:
        return Verdict(missing=reason, scale=self._rubric.bounds, explanation=text[:_SHOWN], judge=self._name, usage=usage)

    async def _attempts(self, ask: Ask, turn: Turn, tally: _Tally) -> Answer | _Failure:
        limit = self._endpoint
        retrying = AsyncRetrying(
            stop=stop_after_attempt(limit.attempts),
            retry=retry_if_exception(self._worth_retrying),
            wait=self._wait,
            before_sleep=self._say,
            reraise=True,
        )
        try:
            reply: Reply = await retrying(self._once, ask, turn, tally)
            return reply.answer._replace(text=self._key.redacted(reply.answer.text))
        except RefusedError as problem:
            return _Failure(f"HTTP {problem.status}", problem.status, self._key.redacted(problem.message))
        except TimeoutError:
            return _Failure(f"no answer within {limit.timeout:g} s, {limit.attempts} attempts")
        except UnreachableError as problem:
            return _Failure(f"no connection to {limit.base_url}, {limit.attempts} attempts", message=self._key.redacted(str(problem)))
        except GarbageError as problem:
            return _Failure("garbage instead of an answer", message=self._key.redacted(str(problem)))

    async def _once(self, ask: Ask, turn: Turn, tally: _Tally) -> Reply:
        expected = Tokens.estimated(len(turn.system) + len(turn.user), _ANSWER_TOKENS[turn.way.mode])
        await self._admit(expected)
        tally.attempts += 1
        counted: Tokens | None = None
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                reply = await ask(turn)
            if (usage := reply.answer.usage) is not None:
                counted = Tokens(usage.input_tokens, usage.output_tokens)
                tally.tokens = tally.tokens.plus(counted)
            self._hold(until_refilled(reply.headers))
            return reply
        except RefusedError as problem:
            counted = Tokens()
            if self._worth_retrying(problem):
                self._hold(max(retry_after(problem.headers) or 0.0, until_refilled(problem.headers)))
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
            left = self._learnt.hold_until - time.monotonic()
            if left > 0:
                await asyncio.sleep(left + self._jitter.uniform(0.0, 0.1) * min(left, 1.0))  # not all in one moment
                continue
            limit = self._reached or self._budget.passed_by(expected)
            if limit is None:
                return self._budget.enter(expected)
            if self._reached or limit.startswith("max_requests") or not self._budget.in_flight:
                raise _OutOfBudgetError(limit)
            await self._settled.wait()  # what is under way may take less than expected

    def _hold(self, seconds: float) -> None:
        """Let no request of this judge start for a while: a quota is everybody's, not only that of the request that met it."""
        if seconds > 0:
            until = time.monotonic() + min(seconds, self._endpoint.max_wait)
            self._learnt.hold_until = max(self._learnt.hold_until, until)

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
