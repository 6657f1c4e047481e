"""Judges that ask somebody else's server: many requests at a time, retries, quotas, budgets, and what an endpoint refuses.

What is particular to one API is in its adapter (:mod:`steered_lm.judges.adapter`).
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.adapter import Api, Turn, Way
from steered_lm.judges.answers import SPLIT, Answer, read
from steered_lm.judges.attempts import ANSWER_TOKENS, Attempts, Failure, Hold, OutOfBudgetError, Tally
from steered_lm.judges.base import EMPTY, JudgeRequest, Mode, OnVerdict, Usage, Verdict
from steered_lm.judges.budget import Budget, Tokens
from steered_lm.judges.endpoint import Endpoint
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
        self._hold = Hold()
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
            total = total.plus(Tokens.estimated(system + len(text), ANSWER_TOKENS[mode]))
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
    """

    way: Way
    sure: bool = False


class _Batch:
    """One call of ``judge``: connections, workers, and when to give up."""

    def __init__(self, judge: RemoteJudge, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> None:
        self._api, self._endpoint, self._key, self._name = judge.api, judge._endpoint, judge._key, judge.name
        self._budget, self._hold, self._learnt = judge._budget, judge._hold, judge._learnt
        self._rubric = judge._question.rubric
        self._systems: dict[Mode, str] = {mode: judge._question.system(token=mode == "logprobs") for mode in self._api.ladder}
        # before anything is sent: a request that lacks a part is the caller's mistake
        self._users = [None if _empty(request) else judge._question.user(request) for request in requests]
        self._on_verdict = on_verdict
        self._verdicts: dict[int, Verdict] = {}
        self._failures = 0

    async def ask_all(self) -> list[Verdict]:
        """Ask for every request; the first fatal answer cancels the rest, a budget that is reached lets what is under way end."""
        todo = iter(enumerate(self._users))
        async with self._api.connect(self._endpoint, self._key) as ask:
            attempts = Attempts(ask, self._endpoint, self._key, self._budget, self._hold, self._name)
            workers = [asyncio.create_task(self._work(attempts, todo)) for _ in range(min(self._endpoint.concurrency, len(self._users)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if attempts.reached is not None:
            raise self._budget.reached(attempts.reached, self._name, len(self._verdicts), len(self._users))
        return [self._verdicts[index] for index in range(len(self._users))]

    async def _work(self, attempts: Attempts, todo: Iterator[tuple[int, str | None]]) -> None:
        for index, user in todo:
            try:
                verdict = await self._one(attempts, user)
            except OutOfBudgetError:
                return
            self._verdicts[index] = verdict
            self._on_verdict(index, verdict)
            if attempts.reached is not None:
                return

    async def _one(self, attempts: Attempts, user: str | None) -> Verdict:
        """Return the verdict on one request."""
        if user is None:
            return self._missing(EMPTY)
        if self._failures >= _FAILURES_IN_A_ROW:
            return self._missing(f"not asked, as {_FAILURES_IN_A_ROW} requests in a row had failed")
        tally = Tally()
        way: Way | None = self._learnt.way
        while way is not None:  # until the endpoint takes a way, or refuses the last one
            used = way
            answer = await attempts.ask(Turn(self._systems[used.mode], user, self._rubric.answer_schema, used), tally)
            way = self._less(used, answer)
        usage = self._endpoint.usage(tally.attempts, tally.tokens)
        if isinstance(answer, Failure):
            return self._failed(answer, usage)
        self._failures = 0
        return self._read(answer, used, usage)

    def _less(self, way: Way, answer: Answer | Failure) -> Way | None:
        """Return the way to try after one that the endpoint does not take; None when it took it, or nothing is left to try."""
        if isinstance(answer, Failure):
            if answer.status not in _REFUSED:
                return None
        elif way.mode != "logprobs" or answer.refused or answer.cut == "content_filter" or self._first_token_tells(answer):
            return None
        if self._learnt.sure:
            return None if way == self._learnt.way else self._learnt.way
        if isinstance(answer, Failure):
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

    def _failed(self, failure: Failure, usage: Usage) -> Verdict:
        if failure.status in _FATAL:
            advice = _FATAL[failure.status].format(key_env=self._endpoint.key_env)
            raise JudgeError(f"judge {self._name} at {self._endpoint.base_url}: HTTP {failure.status}, {advice}.")
        # when the endpoint has taken requests before, a refusal is about this one
        self._failures += failure.status not in _REFUSED or not self._learnt.sure
        return self._missing(failure.reason, failure.message, usage)

    def _missing(self, reason: str, text: str = "", usage: Usage | None = None) -> Verdict:
        return Verdict(missing=reason, scale=self._rubric.bounds, explanation=text[:_SHOWN], judge=self._name, usage=usage)
