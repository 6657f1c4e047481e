"""OpenAI's client library, asked with patience: what may pass is retried, what is refused is told, and a key shows nowhere."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from steered_lm.errors import require
from steered_lm.judges.limits import retry_after
from steered_lm.judges.redact import Key
from steered_lm.trait_models.backend import UnreachableError
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.service import ServiceOptions

_T = TypeVar("_T")
_PAUSED = (408, 409, 429)  # of what the service refuses, what it may take later
_SPENT = "insufficient_quota"  # a 429 that no waiting helps
_HTTP = ("httpx", "httpx2", *(f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in ("connection", "http11", "http2", "proxy")))
_LOGGERS = ("openai._base_client", "openai._response", *_HTTP)


class OpenAIOptions(ServiceOptions):
    """Options of the backend.

    Attributes:
        learning_rate_multiplier: factor on the rate that the service would choose; None lets it choose.
        timeout: seconds that one attempt may take.
        attempts: attempts a request, before the service is called unreachable.
        backoff: seconds before the first retry, doubled at each further one, less a random part of up to a half.
        max_wait: longest wait before a retry, in seconds; a service that asks for a longer one (Retry-After) is not asked again.
    """

    learning_rate_multiplier: float | None = Field(default=None, gt=0)
    timeout: float = Field(default=120.0, gt=0)
    attempts: int = Field(default=6, ge=1)
    backoff: float = Field(default=1.0, ge=0)
    max_wait: float = Field(default=60.0, ge=0)


class Problem(BaseModel):
    """Why a job failed, in the service's words."""

    code: str | None = None
    message: str | None = None


class Job(BaseModel):
    """What of the service's answer about a job is used; the library itself takes an answer of any form."""

    id: str
    status: str
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    created_at: int | None = None
    finished_at: int | None = None
    seed: int | None = None
    error: Problem | None = None
    metadata: dict[str, str] | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None

    @property
    def used(self) -> dict[str, Any]:
        """The hyperparameters that the service used, its own choices included."""
        supervised = (self.method or {}).get("supervised") or {}
        return supervised.get("hyperparameters") or self.hyperparameters or {}


class Upload(BaseModel):
    """A file that the service has."""

    id: str


class Event(BaseModel):
    """What a job said at a moment."""

    created_at: int
    message: str


class RefusedError(ExperimentError):
    """The service said no.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, message: str, status: int) -> None:
        """Keep the status for whoever knows better."""
        super().__init__(message)
        self.status = status


class _GarbageError(Exception):
    """What came back is not what the API answers."""


class _TransientError(Exception):
    """An attempt that another one may better; ``wait`` is what the service asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Client(NamedTuple):
    """An open client of the library; its own retries are off, so that what may have been done already can be looked up before another attempt."""

    library: Any
    api: Any
    key: Key
    options: OpenAIOptions

    @property
    def jobs(self) -> Any:
        """The library's fine-tuning jobs."""
        return self.api.fine_tuning.jobs

    def ask(self, what: str, call: Callable[[], _T]) -> _T:
        """Return what ``call`` gives, retried; ``what`` names it in messages.

        Raises:
            UnreachableError: when no attempt got a usable answer.
            RefusedError: when the service said no.
        """

        def worth_it(problem: BaseException) -> bool:
            return isinstance(problem, _TransientError) and (problem.wait or 0.0) <= self.options.max_wait

        retrying = Retrying(retry=retry_if_exception(worth_it), stop=stop_after_attempt(self.options.attempts), wait=self._pause, reraise=True)
        try:
            result: _T = retrying(self._attempt, what, call)
            return result
        except _TransientError as problem:
            said = str(problem)
        raise UnreachableError(
            f"{self.options.base_url} gave no usable answer to {what}: {said}. Nothing is lost and nothing will be trained twice; try again later."
        )

    def _attempt(self, what: str, call: Callable[[], _T]) -> _T:
        library = self.library
        problem: Exception
        try:
            with self.key.unlogged(_LOGGERS):
                return call()
        except library.APIStatusError as refused:
            problem = self._refused(what, refused)
        except (library.APIConnectionError, library.OpenAIError) as lost:
            problem = _TransientError(self.key.redacted(f"{lost} {lost.__cause__ or ''}".strip()))
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, _GarbageError):
            problem = _TransientError("what came back is not what the API answers")
        raise problem  # outside of the handler: the library's error holds the request with its key

    def _refused(self, what: str, refused: Any) -> Exception:
        status, said = refused.status_code, self.key.redacted(_message(refused))
        if (status in _PAUSED and refused.code != _SPENT) or status >= 500:
            return _TransientError(f"HTTP {status}: {said}", retry_after(refused.response.headers))
        advice = f" Check the key in {self.options.key_env} and what it may do." if status in (401, 403) else ""
        return RefusedError(f"{self.options.base_url} refused {what} (HTTP {status}): {said}.{advice}", status)

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds before the next attempt: what the service asked for, or a doubled and jittered backoff."""
        problem = state.outcome.exception() if state.outcome else None
        if isinstance(problem, _TransientError) and problem.wait is not None:
            return problem.wait
        grown = min(self.options.backoff * 2.0 ** (state.attempt_number - 1), self.options.max_wait)
        return grown * random.uniform(0.5, 1.0)


@contextmanager
def connect(options: OpenAIOptions) -> Iterator[Client]:
    """Open a client.

    Raises:
        ExperimentError: when there is no key.
        MissingDependencyError: when ``openai`` is not installed.
    """
    library: Any = require("openai", "openai")
    key = options.key("openai")
    with library.OpenAI(api_key=key.reveal(), base_url=options.base_url, timeout=options.timeout, max_retries=0) as api:
        yield Client(library, api, key, options)


def job_of(answer: Any) -> Job:
    """Return a job as the service describes it.

    Raises:
        ValidationError: when the answer is about no job.
    """
    return Job.model_validate(_plain(answer))


def event_of(answer: Any) -> Event:
    """Return an event as the service describes it.

    Raises:
        ValidationError: when the answer is none.
    """
    return Event.model_validate(_plain(answer))


def file_of(answer: Any) -> str:
    """Return the id of a file.

    Raises:
        ValidationError: when the answer is about none.
    """
    return Upload.model_validate(_plain(answer)).id


def rows(first: Callable[[], Any]) -> Iterator[Any]:
    """Yield what is on a page and on those after it; the library itself takes JSON of another form for an empty page."""
    try:
        page = first()
    except AttributeError:  # what the library makes of an answer that is no JSON
        raise _GarbageError from None
    while isinstance(getattr(page, "data", None), list):
        yield from page.data
        if not page.has_next_page():
            return
        page = page.get_next_page()
    raise _GarbageError


def _plain(answer: Any) -> Any:
    return answer.to_dict(warnings=False) if hasattr(answer, "to_dict") else answer


def _message(refused: Any) -> str:
    body = refused.body
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or refused.message).strip().rstrip(".")
