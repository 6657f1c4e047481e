"""What a model is asked: the same items for every harness."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from steered_lm.config import Config
from steered_lm.lamp.author import author_lines
from steered_lm.lamp.retrieval import Retrieval, retrieve
from steered_lm.lamp.rows import read_rows
from steered_lm.lamp.task import LampTask

STOP = ("\nUser:",)
"""What ends an answer: where a base model starts to write the next turn."""


class LampOptions(Config):
    """What a run chooses.

    Attributes:
        data: the folder that holds LaMP's files; by default that of the environment variable ``STEERED_LM_DATA``.
        split: ``dev``, ``train``, ….
        retrieval: ``bm25``, ``recency``, ``random`` or ``none``.
        k: how many items of a profile go into the prompt.
        seed: of ``random``.
        item_words: how many words of each of these items are shown, for models of short context; by default all.
        max_gen_toks: longest answer, in tokens; by default 16 for LaMP_1 to LaMP_3, and 64 for the others.
        missing_limit: LaMP_7 with a judge: share of missing verdicts above which the run stops.
    """

    data: str | None = None
    split: str = "dev"
    retrieval: Retrieval = "bm25"
    k: int = Field(default=4, ge=1)
    seed: int = 0
    item_words: int | None = Field(default=None, ge=1)
    max_gen_toks: int | None = Field(default=None, ge=1)
    missing_limit: float = Field(default=0.2, ge=0, le=1)

    def answer_length(self, task: LampTask) -> int:
        """Return the longest answer to a task, in tokens."""
        return self.max_gen_toks or (64 if task.metric == "text" else 16)


@dataclass(frozen=True)
class LampItem:
    """One prompt and its right answer.

    Attributes:
        id: the row's id.
        prompt: what the model reads.
        reference: the right answer.
        input: the row's own question, without what was retrieved.
        retrieved: ids of the profile's items in the prompt, in order.
        lines: texts of the author, for judges; none where the profile holds none (LaMP_2).
    """

    id: str
    prompt: str
    reference: str
    input: str
    retrieved: tuple[str, ...]
    lines: tuple[str, ...]

    def document(self, task: LampTask) -> dict[str, Any]:
        """Return the item as a harness's document."""
        lists = {"retrieved": list(self.retrieved), "lines": list(self.lines)}
        return {"id": self.id, "task": task.name, "prompt": self.prompt, "reference": self.reference, "input": self.input, **lists}


def make_items(task: LampTask, options: LampOptions | None = None) -> list[LampItem]:
    """Return one item a row of the split.

    Raises:
        UserError: when the files are missing or malformed, or a row cannot be searched.
    """
    chosen = options or LampOptions()
    made = []
    for row in read_rows(task, chosen.data, chosen.split):
        found = retrieve(task, row, chosen.retrieval, chosen.k, seed=chosen.seed)
        ids = tuple(str(item["id"]) for item in found)
        made.append(
            LampItem(row.id, task.prompt(row.input, found, item_words=chosen.item_words), row.output, row.input, ids, author_lines(task, row))
        )
    return made


def parse_options(given: Mapping[str, Any], *, source: str) -> LampOptions:
    """Return the options among what a harness was given.

    Raises:
        UserError: when one has a wrong value.
    """
    return LampOptions.parse({key: value for key, value in given.items() if key in LampOptions.model_fields and value is not None}, source=source)
