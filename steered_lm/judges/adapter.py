"""What a remote judge and the adapter of an API say to each other; an adapter is one file with an :class:`Api` and a judge class that names it."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from steered_lm.judges.answers import Answer
from steered_lm.judges.base import Mode
from steered_lm.judges.endpoint import Defaults, Endpoint
from steered_lm.judges.redact import Key


class Way(NamedTuple):
    """How an endpoint is asked.

    Attributes:
        mode: how its answer will be read.
        dropped: parameters that it refused, of those in :attr:`Api.droppable`.
    """

    mode: Mode
    dropped: frozenset[str] = frozenset()


class Turn(NamedTuple):
    """One question, ready to be sent.

    Attributes:
        system: the system turn, which fits the mode.
        user: the user turn.
        schema: the JSON schema of the answer.
        way: what to ask for.
    """

    system: str
    user: str
    schema: Mapping[str, Any]
    way: Way


class Reply(NamedTuple):
    """An endpoint's answer.

    Attributes:
        answer: what it holds.
        headers: the response's headers, whose names are looked up in lower case.
    """

    answer: Answer
    headers: Mapping[str, str]


class RefusedError(Exception):
    """The endpoint answered with an HTTP status that is no success."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str]) -> None:
        """Keep the status, the endpoint's own message and the headers."""
        super().__init__(f"HTTP {status}")
        self.status, self.message, self.headers = status, message, headers


class UnreachableError(Exception):
    """No connection, or one that broke."""


class GarbageError(Exception):
    """The endpoint answered with something that is not the API's form."""


Ask = Callable[[Turn], Awaitable[Reply]]
"""Asks once, without retries. Raises ``RefusedError``, ``UnreachableError`` or ``GarbageError``; it need not watch the time."""


class Api(NamedTuple):
    """All that is particular to one API.

    Attributes:
        defaults: the backend's name, where it is, and which variable holds its key.
        ladder: what to ask for, best first; each further rung is what an endpoint that refuses the last one may still take.
        droppable: parameters that endpoints refuse by name; what is named in a refusal is dropped (or renamed) and asked without.
        connect: opens connections for one batch, ``async with connect(endpoint, key) as ask``.
    """

    defaults: Defaults
    ladder: tuple[Mode, ...]
    droppable: tuple[str, ...]
    connect: Callable[[Endpoint, Key], AbstractAsyncContextManager[Ask]]


def error_message(body: Any) -> str:
    """Return what an error's JSON body says, in any of the forms that endpoints use."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return error if isinstance(error, str) else str(error)


def count(value: Any) -> int:
    """Return a token count from outside, 0 when it is none."""
    return value if isinstance(value, int) and value > 0 else 0
