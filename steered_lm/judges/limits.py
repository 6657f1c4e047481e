"""What an endpoint's headers say about waiting: Retry-After, and quotas that are used up."""

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_OPENAI, _ANTHROPIC = ("requests", "tokens"), ("requests", "tokens", "input-tokens", "output-tokens")
_QUOTAS = (
    *((f"x-ratelimit-remaining-{what}", f"x-ratelimit-reset-{what}") for what in _OPENAI),
    *((f"anthropic-ratelimit-{what}-remaining", f"anthropic-ratelimit-{what}-reset") for what in _ANTHROPIC),
)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, given as seconds or as a date; None without a usable one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def until_refilled(headers: Mapping[str, str]) -> float:
    """Return the seconds until every quota that these headers call used up is filled again, 0 when none is.

    Understands ``x-ratelimit-remaining-*`` with ``-reset-*`` as a duration (OpenAI: ``1s``, ``6m0s``, ``20ms``, or plain seconds) and
    ``anthropic-ratelimit-*-remaining`` with ``-reset`` as a date (RFC 3339).
    """
    waits = (_seconds(headers.get(reset)) for remaining, reset in _QUOTAS if headers.get(remaining) == "0")
    return max(waits, default=0.0)


def _seconds(reset: str | None) -> float:
    if not reset:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", reset):
        return float(reset)
    if re.fullmatch(f"({_DURATION.pattern})+", reset):
        return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(reset))
    try:
        moment = datetime.fromisoformat(reset)
    except ValueError:
        return 0.0
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - time.time())
