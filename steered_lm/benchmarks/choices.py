"""Items of multiple choice in a file: MMLU's and TruthfulQA's shapes, as our own small sets have them."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from steered_lm.config import Config, content_hash
from steered_lm.errors import UserError


class Mc1Targets(Config):
    """TruthfulQA's ``mc1_targets``: choices, and labels with a single 1."""

    choices: tuple[str, ...] = Field(min_length=2)
    labels: tuple[int, ...]

    @model_validator(mode="after")
    def _one_true(self) -> Self:
        if sorted(self.labels) != [0] * (len(self.choices) - 1) + [1]:
            raise ValueError("labels must be one a choice, a single 1 and else 0")
        return self


class ChoiceItem(Config):
    """One line of an ``items.jsonl``: MMLU's shape (``choices``, ``answer``) or TruthfulQA's (``mc1_targets``)."""

    question: str = Field(min_length=1)
    subject: str = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None
    mc1_targets: Mc1Targets | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if (self.mc1_targets is None) == (self.answer is None):
            raise ValueError("an item has either choices and answer, or mc1_targets")
        if self.answer is not None and not (len(self.choices) > 1 and 0 <= self.answer < len(self.choices)):
            raise ValueError(f"answer={self.answer} is not the index of one of {len(self.choices)} choices")
        return self

    def document(self) -> dict[str, Any]:
        """Return the document: id (a hash of question and choices), question, subject, choices, index of the right one."""
        choices = list(self.choices if self.mc1_targets is None else self.mc1_targets.choices)
        gold = self.answer if self.mc1_targets is None else self.mc1_targets.labels.index(1)
        item = content_hash({"question": self.question, "choices": choices})[:16]
        return {"id": item, "question": self.question, "subject": self.subject, "choices": choices, "gold": gold}


def read_choices(path: Path, task: str) -> list[dict[str, Any]]:
    """Return a file's items as documents.

    Args:
        path: JSONL, one item a line.
        task: whose items they are, for messages.

    Raises:
        UserError: when the file is missing or an item is malformed.
    """
    if not path.is_file():
        raise UserError(f"items file {str(path)!r} of task {task!r} does not exist. metadata.items names it, beside the task's YAML.")
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [ChoiceItem.parse(_json(line, path, number), source=f"{path} line {number}").document() for number, line in lines if line.strip()]


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(f"{path} line {number} is not JSON: {problem}. Write one item a line.") from problem
