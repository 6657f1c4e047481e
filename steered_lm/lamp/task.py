"""The seven tasks: what a profile's item holds, what is searched with what, how the prompt is put together, what a right answer is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steered_lm.errors import UserError, near_misses

Metric = Literal["labels", "rating", "text"]
"""How answers are measured: accuracy and macro-F1, MAE and RMSE, or ROUGE-1 and ROUGE-L."""

_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic", "psychology", "fantasy", "romance",
    "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip


@dataclass(frozen=True)
class LampTask:
    """One of LaMP's tasks.

    Attributes:
        name: its name in files, such as ``LaMP_7``.
        metric: how answers are measured.
        searched: the fields of a profile's item that retrieval reads, in order.
        marker: the query is what follows it in the input; None where the query is the second and third quoted text (LaMP_1).
        pattern: a profile's item as the prompt shows it.
        lead: what joins the items to the input; None where they are put into the input, after the word "title" (LaMP_1).
        labels: every right answer that there is; none where the answer is free text.
    """

    name: str
    metric: Metric
    searched: tuple[str, ...]
    marker: str | None
    pattern: str
    lead: str | None
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """The fields of a profile's item that the prompt shows."""
        return tuple(re.findall(r"{(\w+)}", self.pattern))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every item of a profile must have."""
        return tuple(dict.fromkeys((*self.searched, *self.shown)))

    @property
    def long_field(self) -> str:
        """The field that is shortened where a prompt must be: the text, description or abstract; the title where it is all that is shown."""
        return self.searched[-1] if self.searched[-1] in self.shown else self.shown[0]

    def search_text(self, item: Mapping[str, Any]) -> str:
        """Return what retrieval reads of a profile's item."""
        return " ".join(str(item[field]) for field in self.searched)

    def query(self, text: str) -> str:
        """Return what a profile is searched with, from a row's input.

        Raises:
            UserError: when the input has no such part.
        """
        if self.marker is None:
            quoted = text.split('"')[1::2]
            if len(quoted) < 3:
                raise UserError(f"the input of a {self.name} row quotes {len(quoted)} texts, not a title and two references: {text[:120]!r}.")
            return f"{quoted[1]} {quoted[2]}"
        _, found, rest = text.partition(self.marker)
        if not found:
            raise UserError(f"the input of a {self.name} row lacks {self.marker!r}, so there is nothing to search its profile with: {text[:120]!r}.")
        return rest.strip()

    def prompt(self, text: str, items: Sequence[Mapping[str, Any]], *, item_words: int | None = None) -> str:
        """Return the prompt: the input with what was retrieved in front of it (LaMP_1: inside it); the input as it is without any.

        Args:
            text: the row's input.
            items: what was retrieved, in order.
            item_words: how many words of each item's long field are shown; None shows all.
        """
        if not items:
            return text
        shown = ", and ".join(self._show(item, item_words) for item in items)
        if self.lead is not None:
            return f"{shown}{self.lead}{text}"
        before, title, after = text.partition("title")
        return f"{before}title, and {shown}{after}" if title else text

    def _show(self, item: Mapping[str, Any], item_words: int | None) -> str:
        values = {field: str(item[field]) for field in self.shown}
        words = values[self.long_field].split()
        if item_words is not None and len(words) > item_words:
            values[self.long_field] = " ".join(words[:item_words])
        return self.pattern.format_map(values)

    def label(self, text: str) -> int:
        """Return the place of an answer among the labels, -1 when it is none of them; outer white space does not count, all else does."""
        stripped = text.strip()
        return self.labels.index(stripped) if stripped in self.labels else -1


_TITLED = '"{title}" is the title for "{text}"'

TASKS: dict[str, LampTask] = {
    task.name: task
    for task in (
        LampTask("LaMP_1", "labels", ("title", "abstract"), None, '"{title}"', None, ("[1]", "[2]")),
        LampTask("LaMP_2", "labels", ("description",), "description:", 'the tag for the movie: "{description}" is "{tag}"', ". ", _TAGS),
        LampTask("LaMP_3", "rating", ("text",), "review:", '{score} is the score for "{text}"', ". ", tuple("12345")),
        LampTask("LaMP_4", "text", ("title", "text"), "article:", _TITLED, ". "),
        LampTask("LaMP_5", "text", ("title", "abstract"), "paper:", '"{title}" is a title for "{abstract}"', ". Following the given patterns "),
        LampTask("LaMP_6", "text", ("text",), ":", _TITLED, ". "),
        LampTask("LaMP_7", "text", ("text",), ":", '"{text}"', " are written by a person. Following the given patterns "),
    )
}
"""LaMP's tasks by their names in files."""


def task_named(name: str) -> LampTask:
    """Return a task by its name in files, as ``LaMP_7``; ``LaMP-7`` and ``lamp_7`` mean the same.

    Raises:
        UserError: when there is no such task.
    """
    number = re.fullmatch(r"lamp[-_]?(\d)", name.strip().lower())
    found = TASKS.get(f"LaMP_{number[1]}") if number else None
    if found is None:
        raise UserError(f"task={name!r} is none of LaMP's. {near_misses(name, TASKS)}")
    return found
