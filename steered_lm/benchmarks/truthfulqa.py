"""TruthfulQA's 817 questions (Lin et al. 2022): choices with a single true one (mc1), with several (mc2), and free answers."""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from steered_lm.benchmarks.folder import data_folder, find_files, missing_file, read_rows
from steered_lm.benchmarks.hub import hub_rows
from steered_lm.benchmarks.ids import with_ids
from steered_lm.config import Config

HUB = "truthfulqa/truthful_qa"
SPLIT = "validation"
Part = Literal["multiple_choice", "generation"]


class Targets(Config):
    """Choices and which of them are true, 1 or 0."""

    choices: tuple[str, ...] = Field(min_length=2)
    labels: tuple[int, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if len(self.labels) != len(self.choices) or set(self.labels) - {0, 1}:
            raise ValueError(f"labels must be 0 or 1, one for each of {len(self.choices)} choices")
        if 1 not in self.labels:
            raise ValueError("no choice is true: labels needs a 1")
        return self


class MultipleChoiceRow(Config):
    """One row of ``multiple_choice``."""

    model_config = ConfigDict(extra="ignore")

    question: str = Field(min_length=1)
    mc1_targets: Targets
    mc2_targets: Targets

    @model_validator(mode="after")
    def _first_is_gold(self) -> Self:
        if sum(self.mc1_targets.labels) != 1:
            raise ValueError(f"mc1_targets must have a single true choice, it has {sum(self.mc1_targets.labels)}")
        if self.mc1_targets.labels[0] != 1:
            raise ValueError("the true choice of mc1_targets must come first, as in the published data: the task takes choice 0 as gold")
        return self


class GenerationRow(Config):
    """One row of ``generation``."""

    model_config = ConfigDict(extra="ignore")

    question: str = Field(min_length=1)
    best_answer: str
    correct_answers: tuple[str, ...] = Field(min_length=1)
    incorrect_answers: tuple[str, ...] = Field(min_length=1)
    type: str = ""
    category: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _some_text(self) -> Self:
        for name in ("correct_answers", "incorrect_answers"):
            if not any(answer.strip() for answer in getattr(self, name)):
                raise ValueError(f"{name} has no text")
        return self


def truthfulqa_rows(part: Part, data: str | None = None) -> list[dict[str, Any]]:
    """Return the rows in the hub's shape, each with an ``id``; rows of ``multiple_choice`` also with ``gold``, mc1's true choice.

    Args:
        part: ``multiple_choice`` or ``generation``.
        data: a folder of local data; None takes ``STEERED_LM_DATA``, and the hub without one.

    Raises:
        UserError: when the folder, the file or a row is not as it should be.
    """
    folder = data_folder(data)
    if folder is None:
        rows = hub_rows(HUB, part, SPLIT)
    else:
        places = [place for base in ("truthfulqa", HUB, ".") for place in (f"{base}/{part}", f"{base}/{part}/{SPLIT}")]
        files = find_files(folder, places)
        if not files:
            raise missing_file(folder, f"TruthfulQA {part}", places[:4])
        shape = MultipleChoiceRow if part == "multiple_choice" else GenerationRow
        rows = [shape.parse(row, source=where).model_dump(mode="json") for path in files for where, row in read_rows(path)]
    if part == "generation":
        return with_ids(rows, lambda row: {"question": row["question"]})
    # the published order; only its first choice is true
    return [row | {"gold": 0} for row in with_ids(rows, lambda row: {"question": row["question"], "choices": row["mc1_targets"]["choices"]})]
