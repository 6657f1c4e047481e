"""STAND-IN until the data branch is merged: take that branch's ``data.py`` in place of this whole file."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from steered_lm.config import json_objects, write_atomic
from steered_lm.trait_models.experiment import DatasetOptions, ExperimentError


class TrainingSet(NamedTuple):
    """Conversations in training order."""

    examples: tuple[dict[str, object], ...]
    source: str

    @property
    def text(self) -> str:
        """The file's content."""
        return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples)

    @property
    def digest(self) -> str:
        """SHA-256 of the file that ``write`` writes."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def write(self, path: Path) -> Path:
        """Write one conversation a line."""
        return write_atomic(path, self.text)


def training_set(options: DatasetOptions, dataset: str, trait: str | None = None) -> TrainingSet:
    """Return the conversations of a data set."""
    file = Path(dataset) if dataset.endswith(".jsonl") else (options.folder or Path()) / f"{dataset}.jsonl"
    if not file.is_file():
        raise ExperimentError(f"dataset={dataset!r}: {str(file)!r} does not exist.")
    found = [row for _, _, row in json_objects(file.read_text(encoding="utf-8").splitlines(), str(file), error=ExperimentError)]
    if not found:
        raise ExperimentError(f"dataset={dataset!r}: {str(file)!r} is empty.")
    return TrainingSet(tuple(found[: options.sample_size]), str(file))
