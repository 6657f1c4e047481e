"""Our errors, as Inspect prints them: one message without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from inspect_ai._util.error import PrerequisiteError
from rich.markup import escape

from steered_lm.errors import UserError


class RefusalError(PrerequisiteError, UserError):
    """A :class:`UserError` (kept as its cause) that Inspect's command line prints plainly."""

    def __init__(self, text: str) -> None:
        """Keep the text as it is for ``str()``, and escaped for rich, which prints it."""
        super().__init__(escape(text))
        self.args = (text,)


@contextmanager
def plain_refusals() -> Iterator[None]:
    """Turn every :class:`UserError` that leaves the ``with`` block into a :class:`RefusalError` with the same text."""
    try:
        yield
    except UserError as error:
        raise RefusalError(str(error)) from error
