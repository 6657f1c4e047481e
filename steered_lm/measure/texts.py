"""Text files as documents. No torch here: the harness's tasks read through it, too."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from steered_lm.config import Config, json_objects
from steered_lm.content import content_dir
from steered_lm.errors import UserError, near_misses

Split = Literal["paragraph", "line", "file"]
ENGLISH = "english"
"""The short text of ours that is used when none is named."""
_FIELD = "text"


class PerplexityOptions(Config):
    """What a task of perplexity reads, in both harnesses.

    Attributes:
        text: a text file, JSONL with ``text`` in each line, or a text of ours: ``english``, ``tiny_talk``.
        split: where a document of a text file ends: ``paragraph``, ``line`` or ``file``.
    """

    text: str = ENGLISH
    split: Split = "paragraph"

    def documents(self) -> list[str]:
        """Return the text's documents, in order.

        Raises:
            UserError: when the file is missing or holds no text.
        """
        return read_documents(text_file(self.text), self.split)


class Sizes(NamedTuple):
    """How many words and bytes a text has, as lm-eval counts them."""

    words: int
    bytes: int


def sizes(text: str) -> Sizes:
    """Return a text's number of words (parts between white space) and of bytes in UTF-8."""
    return Sizes(len(re.split(r"\s+", text)), len(text.encode("utf-8")))


def text_file(name: Path | str) -> Path:
    """Return a text's path: of one of ours by name (``english``, or ``tiny_talk`` in the tiny chat model's own language), or as it is given."""
    ours = content_dir("tasks") / "perplexity" / f"{name}.txt"
    return ours if Path(name).name == str(name) and ours.is_file() else Path(name).expanduser()


def as_split(name: str) -> Split:
    """Return a split by its name.

    Raises:
        UserError: when there is none of that name.
    """
    for known in get_args(Split):
        if known == name:
            return cast(Split, known)
    raise UserError(f"split={name!r} is not known. {near_misses(name, get_args(Split))}")


def read_documents(path: Path, split: Split = "paragraph") -> list[str]:
    """Return a file's documents, in order and stripped; empty ones are left out.

    Args:
        path: a text file, or JSONL with ``text`` in each line (then a line is a document, whatever ``split`` says).
        split: where a document of a text file ends: at an empty line (``paragraph``), at each line, or nowhere (``file``).

    Raises:
        UserError: when the file is missing, no text in UTF-8, holds no document, or a line has no ``text``.
    """
    whole = read_text(path)
    if path.suffix == ".jsonl":
        found = [_text_of(data, where) for where, data in read_objects(path, whole)]
    else:
        found = {"paragraph": re.split(r"\n\s*\n", whole), "line": whole.splitlines(), "file": [whole]}[split]
    documents = [text.strip() for text in found if text.strip()]
    if not documents:
        raise UserError(f"text={str(path)!r} holds no text. Give a text file, or JSONL with {_FIELD!r} in each line.")
    return documents


def read_text(path: Path) -> str:
    """Return a file's content.

    Raises:
        UserError: when it is missing or no text in UTF-8.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        ours = ", ".join(sorted(file.stem for file in text_file(ENGLISH).parent.glob("*.txt")))
        raise UserError(f"text={str(path)!r} {what}. Give a text file, JSONL with {_FIELD!r} in each line, or the name of a text of ours: {ours}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(f"text={str(path)!r} is no text in UTF-8: {problem}. Convert it first.") from problem


def read_objects(path: Path, whole: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a JSONL text with the words that name each line in messages.

    Raises:
        UserError: when a line is no JSON object.
    """
    return [(where, data) for _, where, data in json_objects(whole.split("\n"), repr(str(path)))]


def _text_of(data: dict[str, Any], where: str) -> str:
    text = data.get(_FIELD)
    if not isinstance(text, str):
        raise UserError(f"{where} has no text {_FIELD!r}; it has {', '.join(sorted(data)) or 'nothing'}.")
    return text
