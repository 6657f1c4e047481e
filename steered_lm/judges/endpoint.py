"""An endpoint: where to ask, how hard to try, what may be spent, and which environment variable holds the key."""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field

from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges.budget import Limits
from steered_lm.judges.redact import Key


class MissingKeyError(JudgeError):
    """The environment holds no key; all else about the judge is well."""


class Defaults(NamedTuple):
    """What an endpoint's options are when they are not given.

    Attributes:
        judge: the backend's name, for messages.
        base_url: the provider's own endpoint.
        url_env: the environment variable that holds another one.
        key_env: the environment variable that holds the key.
    """

    judge: str
    base_url: str
    url_env: str
    key_env: str


class Endpoint(Limits):
    """Where and how to ask, beside the budget.

    Attributes:
        model: the endpoint's name of the judge model.
        base_url: the endpoint; by default what the provider's variable says (``OPENAI_BASE_URL``, ``ANTHROPIC_BASE_URL``), or the provider's own.
        key_env: the environment variable that holds the key; ``none`` for an endpoint without keys.
        mode: ``logprobs``, ``json`` or ``text``: how answers are asked for and read; ``auto``: the first of these that the endpoint takes.
        concurrency: requests in flight.
        timeout: seconds that one attempt may take, all in all.
        attempts: attempts a request, retries included.
        backoff: seconds before the first retry, doubled at each further one, less a random part of up to a half.
        max_wait: longest wait before a retry, in seconds; an endpoint that asks for a longer one (Retry-After) is not asked again.
    """

    model: str = Field(min_length=1)
    base_url: str
    key_env: str
    mode: Literal["auto", "logprobs", "json", "text"] = "auto"
    concurrency: int = Field(default=16, ge=1)
    timeout: float = Field(default=60.0, gt=0)
    attempts: int = Field(default=6, ge=1)
    backoff: float = Field(default=1.0, ge=0)
    max_wait: float = Field(default=60.0, ge=0)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], defaults: Defaults) -> Self:
        """Validate options without ever repeating a value that could be a key.

        Raises:
            JudgeError: when an option is unknown or malformed.
        """
        unknown = sorted(set(options) - set(cls.model_fields))
        if unknown:
            hints = near_misses(unknown[0], cls.model_fields)
            raise JudgeError(
                f"judge {defaults.judge} has no option {', '.join(unknown)}. {hints} "
                "A key is read from the environment only (key_env names the variable)."
            )
        if not re.fullmatch(r"none|[A-Z_][A-Z0-9_]*", str(options.get("key_env", "none"))):
            raise JudgeError("key_env is not an environment variable's name in capitals (nor none); its value is not shown here, as it may be a key.")
        url = str(options.get("base_url") or os.environ.get(defaults.url_env) or defaults.base_url)
        if not re.fullmatch(r"https?://[^@?#\s]+", url):
            raise JudgeError(
                "base_url must be http(s)://host/path without user, password or query; its value is not shown here, as it may hold a key."
            )
        if not options.get("model"):
            raise JudgeError(f"judge {defaults.judge} needs a model. Write {defaults.judge}:<model>, with the endpoint's name of it.")
        given = {"key_env": defaults.key_env, **options, "base_url": url.rstrip("/")}
        return cls.parse(given, source=f"judge {defaults.judge}", error=JudgeError)

    def key(self, judge: str) -> Key:
        """Return the key; ``judge`` is the backend's name, for the message.

        Raises:
            MissingKeyError: when the environment has none.
        """
        if self.key_env == "none":
            return Key("none")
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise MissingKeyError(
                f"judge {judge}:{self.model} needs a key, and the environment variable {self.key_env} is not set. "
                "Set it, name another one with key_env=…, write key_env=none for an endpoint without keys, or use judge=stylometric (offline)."
            )
        return Key(key)
