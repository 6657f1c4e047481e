"""A language model as judge, behind any OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp, Ollama, ``transformers serve``.

It speaks HTTP itself: of the clients that were measured, aiohttp alone adds little to a thousand short answers.
"""

import json
import os
import ssl
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import certifi

from steered_lm.judges.adapter import Api, Ask, GarbageError, RefusedError, Reply, Turn, UnreachableError, count, error_message
from steered_lm.judges.answers import TOP, Answer
from steered_lm.judges.base import Usage
from steered_lm.judges.endpoint import Defaults, Endpoint
from steered_lm.judges.redact import Key
from steered_lm.judges.remote import RemoteJudge

_CUT = ("length", "content_filter")
_FEW_TOKENS = 16  # the least that some endpoints allow for an answer


@asynccontextmanager
async def _connect(endpoint: Endpoint, key: Key) -> AsyncIterator[Ask]:
    url = f"{endpoint.base_url}/chat/completions"
    connector = aiohttp.TCPConnector(limit=0, ssl=_certificates() if url.startswith("https") else True)
    patience = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None)  # the caller watches the time
    async with aiohttp.ClientSession(
        connector=connector, headers=_headers(endpoint, key), timeout=patience, proxy=_proxy(url), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield partial(_ask, session, url, endpoint.model)


async def _ask(session: aiohttp.ClientSession, url: str, model: str, turn: Turn) -> Reply:
    payload = json.dumps(_body(model, turn)).encode()
    try:
        # a redirect is not followed: it would carry the key elsewhere
        async with session.post(url, data=payload, allow_redirects=False) as response:
            content = await response.read()
            status, headers = response.status, response.headers
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as problem:
        raise UnreachableError(str(problem)) from None
    # never aiohttp's own words for these: they hold the address that was asked, and a proxy's address may hold a password
    except aiohttp.ClientHttpProxyError as problem:
        raise UnreachableError(f"the proxy answered {problem.status} {problem.message}") from None
    except aiohttp.ClientResponseError as problem:
        raise GarbageError(f"no HTTP response: {problem.message}") from None
    except aiohttp.ClientError as problem:
        raise UnreachableError(f"{type(problem).__name__}: the address or that of the proxy is none") from None
    body = _parsed(content)
    if not 200 <= status < 300:
        raise RefusedError(status, content.decode(errors="replace") if body is None else error_message(body), headers)
    return Reply(_answer(body), headers)


def _body(model: str, turn: Turn) -> dict[str, Any]:
    mode, dropped = turn.way
    messages = [{"role": "system", "content": turn.system}, {"role": "user", "content": turn.user}]
    body: dict[str, Any] = {"model": model, "messages": messages}
    if "temperature" not in dropped:
        body["temperature"] = 0
    if mode == "logprobs":
        body |= {"logprobs": True, "top_logprobs": TOP}
        body |= {"max_completion_tokens": _FEW_TOKENS} if "max_tokens" in dropped else {"max_tokens": 1}
    if mode == "json":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": turn.schema}}
    return body


def _parsed(content: bytes) -> Any:
    """Return a body's JSON, None when it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _answer(body: Any) -> Answer:
    """Return the answer of a chat completion.

    Raises:
        GarbageError: when it is none.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(message, dict):
        said = f": {error_message(body)}" if isinstance(body, dict) and "error" in body else ""  # proxies of many models answer 200 and an error
        raise GarbageError(f"no chat completion{said}")
    content, refusal, ending = message.get("content"), message.get("refusal"), first.get("finish_reason")
    return Answer(
        text=str(refusal or (content if isinstance(content, str) else "")),
        top=_top(first.get("logprobs")),
        refused=bool(refusal),
        cut=ending if ending in _CUT else None,
        usage=_usage(body.get("usage")),
    )


def _top(logprobs: Any) -> list[tuple[str, float]] | None:
    """Return the first token's alternatives; None when there are none.

    Raises:
        GarbageError: when they are of another form.
    """
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    try:
        found = [(entry["token"], float(entry["logprob"])) for entry in tokens[0]["top_logprobs"]] if tokens else []
    except (KeyError, IndexError, TypeError, ValueError):
        raise GarbageError("log-probabilities of another form") from None
    if not all(isinstance(token, str) for token, _ in found):
        raise GarbageError("log-probabilities of another form")
    return found or None


def _usage(counts: Any) -> Usage | None:
    if not isinstance(counts, dict):
        return None
    return Usage(input_tokens=count(counts.get("prompt_tokens")), output_tokens=count(counts.get("completion_tokens")))


def _headers(endpoint: Endpoint, key: Key) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if endpoint.key_env != "none":
        headers["Authorization"] = f"Bearer {key.reveal()}"
        # whom to bill, as in OpenAI's own client
        named = {"OpenAI-Organization": os.environ.get("OPENAI_ORG_ID"), "OpenAI-Project": os.environ.get("OPENAI_PROJECT_ID")}
        headers |= {name: value for name, value in named.items() if value}
    return headers


def _certificates() -> ssl.SSLContext:
    """Return the system's certificates and certifi's: some systems have none, some firms have their own."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment names for this address; aiohttp's own way asks .netrc for another key at each request."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy and proxy.startswith("http") else None


class OpenAIJudge(RemoteJudge):
    """Asks an OpenAI-compatible endpoint, for log-probabilities first, then for JSON under a schema, then for text."""

    api = Api(
        defaults=Defaults("openai", "https://api.openai.com/v1", "OPENAI_BASE_URL", "OPENAI_API_KEY"),
        ladder=("logprobs", "json", "text"),
        droppable=("temperature", "max_tokens"),  # the latter is renamed: newer models call it max_completion_tokens
        connect=_connect,
    )
