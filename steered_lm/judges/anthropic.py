"""Claude as judge, through Anthropic's Messages API; needs ``pip install 'steered-lm[anthropic]'``."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from steered_lm.errors import require
from steered_lm.judges.adapter import Api, Ask, GarbageError, RefusedError, Reply, Turn, UnreachableError, count, error_message
from steered_lm.judges.answers import Answer
from steered_lm.judges.base import Usage
from steered_lm.judges.endpoint import Defaults, Endpoint
from steered_lm.judges.question import Question
from steered_lm.judges.redact import Key
from steered_lm.judges.remote import RemoteJudge

_ANSWER_TOKENS = 1024  # the API wants a limit
_INPUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_TRANSPORT = ("connection", "http11", "http2", "proxy")
_LOGGERS = ("anthropic._base_client", "anthropic._response", "httpx2", *(f"httpcore2.{part}" for part in _TRANSPORT))


@asynccontextmanager
async def _connect(endpoint: Endpoint, key: Key) -> AsyncIterator[Ask]:
    library: Any = require("anthropic", "anthropic")
    settings = {"base_url": endpoint.base_url, "timeout": endpoint.timeout, "max_retries": 0}
    with key.unlogged(_LOGGERS):
        async with library.AsyncAnthropic(api_key=key.reveal(), **settings) as client:
            yield partial(_ask, library, client, endpoint.model)


async def _ask(library: Any, client: Any, model: str, turn: Turn) -> Reply:
    messages = [{"role": "user", "content": turn.user}]
    try:
        response = await client.messages.with_raw_response.create(
            model=model, system=turn.system, messages=messages, max_tokens=_ANSWER_TOKENS, extra_body=_extras(turn)
        )
        content = await response.read()
    except library.APIStatusError as problem:
        refused = RefusedError(problem.status_code, error_message(problem.body or problem.message), problem.response.headers)
    except (library.APIConnectionError, library.APITimeoutError) as problem:
        raise UnreachableError(str(problem)) from None
    except library.AnthropicError as problem:
        raise GarbageError(str(problem)) from None
    else:
        return Reply(_answer(content), response.headers)
    raise refused  # outside of the handler: the library's error holds the request with its key


def _extras(turn: Turn) -> dict[str, Any]:
    """Return what only some models take, as plain JSON, whatever the library's version knows."""
    extras: dict[str, Any] = {} if "temperature" in turn.way.dropped else {"temperature": 0}
    if turn.way.mode == "json":
        extras["output_config"] = {"format": {"type": "json_schema", "schema": turn.schema}}
    return extras


def _answer(content: bytes) -> Answer:
    """Return the answer of a message.

    Raises:
        GarbageError: when it is none.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    blocks = body.get("content") if isinstance(body, dict) else None
    if not isinstance(blocks, list):
        raise GarbageError("no message")
    texts = [block["text"] for block in blocks if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)]
    ending, counts = body.get("stop_reason"), body.get("usage")
    usage = None
    if isinstance(counts, dict):
        usage = Usage(input_tokens=sum(count(counts.get(name)) for name in _INPUT), output_tokens=count(counts.get("output_tokens")))
    return Answer("".join(texts), refused=ending == "refusal", cut="length" if ending == "max_tokens" else None, usage=usage)


class AnthropicJudge(RemoteJudge):
    """Asks Claude for JSON under a schema, and where a model does not take one, for text; the API gives no log-probabilities."""

    api = Api(
        defaults=Defaults("anthropic", "https://api.anthropic.com", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"),
        ladder=("json", "text"),
        droppable=("temperature",),
        connect=_connect,
    )

    def __init__(self, endpoint: Endpoint, question: Question) -> None:
        """Judge one question.

        Raises:
            JudgeError: when there is no key, or the mode is ``logprobs``.
            MissingDependencyError: when ``anthropic`` is not installed.
        """
        require("anthropic", "anthropic")
        super().__init__(endpoint, question)
