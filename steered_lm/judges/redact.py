"""A key that shows itself to nobody: not in texts, not in reprs, not in what a client library logs."""

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SHORTEST = 8  # what local endpoints take for a key (EMPTY, x) is no secret, and replacing it would mangle texts
_MARK = "[key]"


class Key:
    """The key of an endpoint; its repr and str are a mark."""

    def __init__(self, value: str) -> None:
        """Hold the key."""
        self._value = value

    def reveal(self) -> str:
        """Return the key itself, to be sent and nothing else."""
        return self._value

    def redacted(self, text: str) -> str:
        """Return the text without the key, should somebody have echoed it."""
        return text.replace(self._value, _MARK) if len(self._value) >= _SHORTEST else text

    @contextmanager
    def unlogged(self, loggers: Sequence[str]) -> Iterator[None]:
        """Keep the key out of what these loggers write: clients log a response's headers, and a server may echo the key there."""
        redactor = _Redactor(self)
        found = [logging.getLogger(name) for name in loggers]
        for logger in found:
            logger.addFilter(redactor)
        try:
            yield
        finally:
            for logger in found:
                logger.removeFilter(redactor)

    def __repr__(self) -> str:
        """Show that there is one."""
        return _MARK

    __str__ = __repr__


class _Redactor(logging.Filter):
    def __init__(self, key: Key) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._key.redacted(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = self._key.redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
            record.exc_info = None  # a handler of its own taste would print it anew
        return True
