"""TruthfulQA and MMLU as upstream defines them, on hub data or a user's own copies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from steered_lm.benchmarks.mmlu import mmlu_rows
from steered_lm.benchmarks.truthfulqa import truthfulqa_rows
from steered_lm.benchmarks.upstream import upstream_file
from steered_lm.config import content_hash
from steered_lm.errors import UserError
from steered_lm.harness.chat_task import ChatTask

PREFIX = "steered_"


class UpstreamTask(ChatTask):
    """``steered_<name>``: upstream's task ``<name>``, whose YAML is read from the installed lm-eval when the task is built.

    Prompts, splits, metrics and defaults are upstream's, and so is what the flags do (``--num_fewshot``, ``--apply_chat_template``). Its documents
    have an ``id``, which is the item's in Inspect too. ``metadata.data`` or ``STEERED_LM_DATA`` name a folder of local data.

    Attributes:
        upstream: upstream's name of the task.
        theirs: upstream's YAML.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Merge upstream's YAML with ours.

        Raises:
            UserError: when the data is not to be had, or malformed.
        """
        name = str(config["task"])
        self.upstream = name.removeprefix(PREFIX)
        self.theirs = load_yaml(_yaml_of(self.upstream))
        self._data = config["metadata"].get("data")
        metadata = {**self.theirs["metadata"], **config["metadata"], "upstream": self.upstream}
        super().__init__({**self.theirs, **config, **self.own_settings(), "metadata": metadata})
        self.config.metadata["items_digest"] = content_hash([doc["id"] for doc in self.eval_docs])

    def own_settings(self) -> dict[str, Any]:
        """Return what differs from upstream's YAML."""
        return {}

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the splits that upstream's YAML names."""
        config = self.config
        if config.dataset_path == "cais/mmlu":
            splits = {split: mmlu_rows(config.dataset_name, split, self._data) for split in (config.test_split, config.fewshot_config.split)}
        else:
            splits = {config.validation_split: truthfulqa_rows(config.dataset_name, self._data)}
        self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int | None = None, *args: Any, **kwargs: Any) -> str:
        """Return upstream's context: plain text unless the harness applies the chat template.

        Raises:
            UserError: when there are fewer examples.
        """
        shots = num_fewshot if num_fewshot is not None else self.config.num_fewshot or 0
        self.check_shots(shots)
        text: str = ConfigurableTask.fewshot_context(self, doc, shots, *args, **kwargs)
        return text

    def check_shots(self, shots: int) -> None:
        """Refuse more examples than there are, where a split is set apart for them.

        Raises:
            UserError: when there are fewer.
        """
        split, subject = self.config.fewshot_config.split, self.config.dataset_name
        most = len(self.dataset[split]) if split in self.dataset else shots
        if not 0 <= shots <= most:
            raise UserError(f"num_fewshot={shots} is not possible: {split} has {most} questions about {subject!r}. Allowed: 0 to {most}.")


def _yaml_of(upstream: str) -> Path:
    folder = "mmlu/default" if upstream.startswith("mmlu_") else "truthfulqa"
    return upstream_file(f"{folder}/{upstream}.yaml")
