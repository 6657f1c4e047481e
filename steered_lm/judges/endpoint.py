"""An OpenAI-compatible endpoint: where to ask, how hard to try, and which environment variable holds the key."""

import os
import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import JudgeError, near_misses

_DEFAULT_URL = "https://api.openai.com/v1"


class Endpoint(Config):
    """Where and how to ask.

    Attributes:
        model: the endpoint's name of the judge model.
        base_url: the endpoint; by default ``OPENAI_BASE_URL`` or OpenAI's own.
        key_env: the environment variable that holds the key; ``none`` for an endpoint without keys.
        concurrency: requests in flight.
        timeout: seconds that one attempt may take, all in all.
        attempts: attempts a request, retries included.
        backoff: seconds before the first retry, doubled at each further one, less a random part of up to a half.
        max_wait: longest wait before a retry, in seconds; an endpoint that asks for a longer one (Retry-After) is not asked again.
    """

    model: str = Field(min_length=1)
    base_url: str = Field(default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL)
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1)
    timeout: float = Field(default=60.0, gt=0)
    attempts: int = Field(default=6, ge=1)
    backoff: float = Field(default=1.0, ge=0)
    max_wait: float = Field(default=60.0, ge=0)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Validate options without ever repeating a value that could be a key.

        Raises:
            JudgeError: when an option is unknown or malformed.
        """
        unknown = sorted(set(options) - set(cls.model_fields))
        if unknown:
            hints = near_misses(unknown[0], cls.model_fields)
            raise JudgeError(
                f"judge openai has no option {', '.join(unknown)}. {hints} A key is read from the environment only (key_env names the variable)."
            )
        if not re.fullmatch(r"none|[A-Z_][A-Z0-9_]*", str(options.get("key_env", "none"))):
            raise JudgeError("key_env is not an environment variable's name in capitals (nor none); its value is not shown here, as it may be a key.")
        url = str(options.get("base_url") or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL)
        if not re.fullmatch(r"https?://[^@?#\s]+", url):
            raise JudgeError(
                "base_url must be http(s)://host/path without user, password or query; its value is not shown here, as it may hold a key."
            )
        return cls.parse({**options, "base_url": url}, source="judge openai", error=JudgeError)

    def key(self) -> str:
        """Return the key.

        Raises:
            JudgeError: when the environment has none.
        """
        if self.key_env == "none":
            return "none"
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise JudgeError(
                f"judge openai:{self.model} needs a key, and the environment variable {self.key_env} is not set. "
                "Set it, name another one with key_env=…, write key_env=none for an endpoint without keys, or use judge=stylometric (offline)."
            )
        return key
