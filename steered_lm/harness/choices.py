"""Multiple-choice tasks of ours: MMLU's and TruthfulQA's shapes, scored by the log-likelihood of each choice's text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steered_lm.benchmarks.choices import read_choices
from steered_lm.harness.chat_task import ChatTask


class ChoicesTask(ChatTask):
    """A multiple-choice task whose items lie beside its YAML, in the file that ``metadata.items`` names.

    A choice's score is the summed log-likelihood of its text as the reply to the question (cloze form: no letters, no list of choices).
    """

    def documents(self) -> list[dict[str, Any]]:
        """Return the items as documents.

        Raises:
            UserError: when the file is missing or an item is malformed.
        """
        metadata = self.config.metadata
        return read_choices(Path(metadata["config_source"]).parent / metadata["items"], self.task_name)

    def plain_text(self, doc: Mapping[str, Any]) -> str:
        """Return question and answer lines; the choice follows after the space that the context ends with."""
        return f"Question: {doc['question']}\nAnswer: "
