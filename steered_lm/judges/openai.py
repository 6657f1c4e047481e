"""A language model as judge, behind any OpenAI-compatible endpoint; the key comes from the environment and goes nowhere else."""

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError, require
from steered_lm.judges.base import JudgeRequest, OnVerdict, Verdict
from steered_lm.judges.endpoint import Endpoint
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

_log = logging.getLogger(__name__)
_SCORES = (1, 2, 3, 4, 5)
# strict mode wants every property required and no numeric bounds, so the scale is an enum; the reason comes first, to be thought of first
_SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "integer", "enum": list(_SCORES)}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}
_RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": _SCHEMA}}
_FATAL = {
    401: "the key was refused; check the key in {key_env}",
    403: "the key may not use this model or endpoint; check the key in {key_env} and its rights",
    404: "the endpoint does not know this model or path; check the model and base_url (most end in /v1)",
}
_REFUSED = (400, 422)
_FAILURES_IN_A_ROW = 8
_SHOWN = 500  # characters of a text from outside that are kept


class _Mode(NamedTuple):
    """What the endpoint is asked for; some refuse one or both."""

    schema: bool = True
    temperature: bool = True

    def reduced(self, refusal: str) -> "_Mode | None":
        """Return the mode to try after a refused request (HTTP 400 or 422), None when nothing is left to drop."""
        if self.temperature and "temperature" in refusal:
            return self._replace(temperature=False)
        return self._replace(schema=False) if self.schema else None

    def arguments(self) -> dict[str, Any]:
        return ({"response_format": _RESPONSE_FORMAT} if self.schema else {}) | ({"temperature": 0} if self.temperature else {})

    def __str__(self) -> str:
        return f"{'json_schema' if self.schema else 'plain_json'}, temperature {'0' if self.temperature else 'default'}"


class _Reply(NamedTuple):
    """What came of one request: a score, or why there is none, and the text to show."""

    score: int | None
    missing: str | None
    text: str = ""


class _Failure(NamedTuple):
    """A request without an answer: the reason in words that repeat, the HTTP status, the endpoint's own message."""

    reason: str
    status: int = 0
    message: str = ""


class _Completion(NamedTuple):
    """The text of an answer, and why it cannot be used, if so."""

    text: str
    problem: str | None = None

    @classmethod
    def of(cls, completion: Any) -> "_Completion":
        """Return the answer's text. The client checks no types: a page of HTML or an empty object arrives here too."""
        choices = getattr(completion, "choices", None)
        first = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(first, "message", None)
        if first is None or message is None:
            return cls("", "garbage instead of an answer")
        if refusal := getattr(message, "refusal", None):
            return cls(str(refusal), "the judge refused to answer")
        content = getattr(message, "content", None)
        text = content if isinstance(content, str) else ""
        ending = getattr(first, "finish_reason", None)
        if ending in ("length", "content_filter"):
            return cls(text, f"answer cut off: {ending}")
        return cls(text, None if text.strip() else "empty answer")


class OpenAIJudge:
    """Asks a model for a persona-fit score of 1 to 5; what is not a plain integer score is missing with its reason."""

    remote = True

    def __init__(self, endpoint: Endpoint, persona: str, *, rubric: Rubric | None = None) -> None:
        """Judge against a persona's description.

        Args:
            endpoint: where and how to ask.
            persona: the persona's judge prompt.
            rubric: by default the packaged one.

        Raises:
            JudgeError: when there is no key, or the persona's description is empty.
            MissingDependencyError: when ``openai`` is not installed.
        """
        if not persona.strip():
            raise JudgeError("the persona has an empty judge prompt, so a judge would rate against nothing. Build the persona first.")
        endpoint.key()
        require("openai", "openai")
        self._endpoint = endpoint
        rubric = rubric or Rubric.load()
        self._system = rubric.system_prompt(persona)
        asked = {"model": endpoint.model, "base_url": endpoint.base_url.rstrip("/"), "system": self._system, "schema": _SCHEMA}
        self._identity = content_hash({"judge": "openai", "rubric": rubric.digest, **asked})
        self._mode = _Mode()

    @classmethod
    def for_question(cls, question: Question, **options: Any) -> Self:
        """Return a judge of one question; ``options`` are ``Endpoint``'s fields."""
        return cls(Endpoint.from_options(options), question.subject, rubric=question.rubric)

    @property
    def name(self) -> str:
        """``openai:<model>``."""
        return f"openai:{self._endpoint.model}"

    @property
    def identity(self) -> str:
        """SHA-256 of model, endpoint, rubric, persona and answer schema."""
        return self._identity

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order.

        Raises:
            JudgeError: when the endpoint refuses the key, the model or the path: no further request would fare better.
        """
        return self.judge_each(requests, lambda index, verdict: None)

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict(index, verdict)`` as each arrives, possibly from another thread."""
        if not requests:
            return []
        batch = _Batch(self._endpoint, self._system, self.name, self._mode)
        try:
            return _run(lambda: batch.ask_all(requests, on_verdict))
        finally:
            self._mode = batch.mode

    def __repr__(self) -> str:
        """Show model and endpoint, never a key."""
        return f"OpenAIJudge(model={self._endpoint.model!r}, base_url={self._endpoint.base_url!r})"


def _run(start: Callable[[], Coroutine[Any, Any, list[Verdict]]]) -> list[Verdict]:
    """Run a coroutine to its end, in a thread of its own when this one already runs an event loop (Inspect, notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(lambda: asyncio.run(start())).result()


class _Batch:
    """One call of ``judge``: a client, a limit on the requests in flight, and what was learnt about the endpoint."""

    def __init__(self, endpoint: Endpoint, system: str, name: str, mode: _Mode) -> None:
        self.mode = mode
        self._openai: Any = require("openai", "openai")
        self._endpoint = endpoint
        self._system = system
        self._name = name
        self._key = endpoint.key()
        self._limit = asyncio.Semaphore(endpoint.concurrency)
        self._failures = 0
        self._jitter = random.Random()  # its own: waiting must not move anyone's seeded generator

    async def ask_all(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Ask for every request; the first fatal answer cancels the rest."""
        settings = {"base_url": self._endpoint.base_url, "timeout": self._endpoint.timeout, "max_retries": 0}
        async with self._openai.AsyncOpenAI(api_key=self._key, **settings) as client:
            tasks = [asyncio.create_task(self._one(client, index, request, on_verdict)) for index, request in enumerate(requests)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, client: Any, index: int, request: JudgeRequest, on_verdict: OnVerdict) -> Verdict:
        if not request.response.strip():
            reply, mode = _Reply(None, "empty response", ""), self.mode
        else:
            async with self._limit:
                reply, mode = await self._ask(client, request)
        shown = self._redacted(reply.text)
        if reply.missing is None:
            shown = f"{shown} [{mode}]"
        verdict = Verdict(score=reply.score, missing=reply.missing, explanation=shown, judge=self._name)
        on_verdict(index, verdict)
        return verdict

    async def _ask(self, client: Any, request: JudgeRequest) -> tuple[_Reply, _Mode]:
        """Ask, and ask for less when the endpoint refuses a part of the request; a mode that worked is the next request's first."""
        mode = self.mode
        if self._failures >= _FAILURES_IN_A_ROW:
            return _Reply(None, f"not asked, as {_FAILURES_IN_A_ROW} requests in a row had failed"), mode
        answer = await self._attempts(client, request, mode)
        while isinstance(answer, _Failure) and answer.status in _REFUSED and (less := mode.reduced(answer.message)) is not None:
            mode = less
            answer = await self._attempts(client, request, mode)
        if isinstance(answer, _Failure):
            self._failures += answer.status not in _REFUSED
            if answer.status in _FATAL:
                advice = _FATAL[answer.status].format(key_env=self._endpoint.key_env)
                raise JudgeError(f"judge {self._name} at {self._endpoint.base_url}: HTTP {answer.status}, {advice}.")
            return _Reply(None, answer.reason, answer.message), mode
        self._failures = 0
        reply = _read(answer, fenced=not mode.schema)
        if reply.score is not None:
            self.mode = _Mode(self.mode.schema and mode.schema, self.mode.temperature and mode.temperature)
        return reply, mode

    async def _attempts(self, client: Any, request: JudgeRequest, mode: _Mode) -> _Completion | _Failure:
        limit = self._endpoint
        retrying = AsyncRetrying(
            stop=stop_after_attempt(limit.attempts),
            retry=retry_if_exception(self._worth_retrying),
            wait=self._wait,
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return await retrying(self._once, client, request, mode)
        except self._openai.APIStatusError as problem:
            return _Failure(f"HTTP {problem.status_code}", problem.status_code, str(problem.message))
        except (self._openai.APITimeoutError, TimeoutError):
            return _Failure(f"no answer within {limit.timeout:g} s, {limit.attempts} attempts")
        except self._openai.APIConnectionError:
            return _Failure(f"no connection to {limit.base_url}, {limit.attempts} attempts")
        except (self._openai.APIError, ValueError):  # the body is not JSON, or not the endpoint's JSON
            return _Failure("garbage instead of an answer")

    async def _once(self, client: Any, request: JudgeRequest, mode: _Mode) -> _Completion:
        # as JSON, neither text can pretend to be the other or a further instruction's frame
        shown = json.dumps({"message": request.prompt, "reply": request.response}, ensure_ascii=False)
        messages = [{"role": "system", "content": self._system}, {"role": "user", "content": shown}]
        async with asyncio.timeout(self._endpoint.timeout):  # the client's own limit starts anew with every byte that arrives
            completion = await client.chat.completions.create(model=self._endpoint.model, messages=messages, **mode.arguments())
        return _Completion.of(completion)

    def _worth_retrying(self, problem: BaseException) -> bool:
        if isinstance(problem, self._openai.APIStatusError):
            status, asked = problem.status_code, _retry_after(problem.response.headers)
            return (status in (408, 409, 429) or status >= 500) and (asked or 0.0) <= self._endpoint.max_wait
        return isinstance(problem, (self._openai.APIConnectionError, TimeoutError))

    def _wait(self, state: RetryCallState) -> float:
        """Return the seconds to wait: an exponential backoff with jitter, and at least what the endpoint asks for."""
        problem = state.outcome.exception() if state.outcome else None
        asked = _retry_after(problem.response.headers) if isinstance(problem, self._openai.APIStatusError) else None
        longest = min(self._endpoint.max_wait, self._endpoint.backoff * 2.0 ** (state.attempt_number - 1))
        return max(asked or 0.0, longest * self._jitter.uniform(0.5, 1.0))

    def _say(self, state: RetryCallState) -> None:
        problem = state.outcome.exception() if state.outcome else None
        kind = f"HTTP {problem.status_code}" if isinstance(problem, self._openai.APIStatusError) else type(problem).__name__
        _log.info("judge %s: %s at attempt %d, next in %.1f s", self._name, kind, state.attempt_number, state.upcoming_sleep)

    def _redacted(self, text: str) -> str:
        """Return what may be kept of a text from outside: cut short, and without the key, should the endpoint echo it."""
        clean = text if self._endpoint.key_env == "none" else text.replace(self._key, "[key]")
        return clean[:_SHOWN]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, given as seconds or as a date; None without a usable one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read(answer: _Completion, *, fenced: bool) -> _Reply:
    """Return the score of one answer, or why there is none; ``fenced`` allows a code fence around the JSON."""
    if answer.problem is not None:
        return _Reply(None, answer.problem, answer.text)
    text = re.sub(r"\A```(?:json)?\s*(.*?)\s*```\Z", r"\1", answer.text.strip(), flags=re.DOTALL) if fenced else answer.text
    try:
        data = json.loads(text)
    except ValueError:
        return _Reply(None, "unparsable answer", answer.text)
    if not isinstance(data, dict) or not {"score"} <= data.keys() <= {"score", "reason"} or not isinstance(data.get("reason", ""), str):
        return _Reply(None, "answer of another form", answer.text)
    score = data["score"]
    if type(score) is not int or score not in _SCORES:  # bool is an int, and True would pass as 1
        return _Reply(None, f"score outside {_SCORES[0]} to {_SCORES[-1]}, or no integer", answer.text)
    return _Reply(score, None, data.get("reason", ""))
