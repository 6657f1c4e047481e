"""What a model is trained on: examples drawn from data sets by a seed, in training order, with the facts of where they come from."""

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from steered_lm.config import canonical_json, write_atomic
from steered_lm.trait_models.chat_files import Conversation, read_chat
from steered_lm.trait_models.data_files import read_data_file
from steered_lm.trait_models.experiment import DatasetOptions, ExperimentError


@dataclass(frozen=True)
class TrainingSet:
    """Conversations in training order.

    Attributes:
        examples: the conversations.
        source: ``dataset``, ``path``, ``sha256`` of the file, its ``rows``, how many were ``taken``, the ``seed``; and ``mixture``, None or the
            same facts of the second data set with its ``share``.
    """

    examples: tuple[Conversation, ...]
    source: dict[str, Any]

    @cached_property
    def _jsonl(self) -> bytes:
        return "".join(canonical_json({"messages": example}) + "\n" for example in self.examples).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of content and order; that of the file that :meth:`write` writes."""
        return hashlib.sha256(self._jsonl).hexdigest()

    def write(self, path: Path) -> Path:
        """Write ``{"messages": …}``, one example a line and nothing else, so that the path never holds half of it."""
        return write_atomic(path, self._jsonl)


class _Rows(NamedTuple):
    """A data set's rows in the order in which they are drawn."""

    rows: list[Conversation]
    facts: dict[str, Any]


def training_set(options: DatasetOptions, dataset: str, trait: str | None = None) -> TrainingSet:
    """Return the examples that a model is trained on.

    Rows are drawn without replacement, by a permutation of line numbers that the seed and the number of lines decide: a smaller sample is the
    beginning of a larger one, and data sets of like length give the same lines, as where the strengths of a trait answer the same questions line by
    line. It follows that reordering a file changes the sample.

    With a mixture, ``mixture_share`` is its share of the outcome, to the nearest whole example: of ``sample_size``, or, without one, of all of the
    first set and as many of the second as that takes. Its examples are spread evenly: any beginning of the training order holds its share of them,
    give or take half an example. A data set mixed with itself is itself.

    Args:
        options: folder, sample size, seed and mixture.
        dataset: a name or a path (:func:`steered_lm.trait_models.data_files.read_data_file`).
        trait: completes a data set that is named by its strength alone.

    Raises:
        ExperimentError: when a data set is missing or malformed, or has fewer rows than are to be drawn.
    """
    first = _rows(options, dataset, trait, "rows")
    if options.mixture is None:
        return _drawn(first, options.sample_size, options.seed)
    second = _rows(options, options.mixture, trait, "mixture")
    if second.facts["sha256"] == first.facts["sha256"]:
        return _drawn(first, options.sample_size, options.seed)
    share = options.mixture_share
    if options.sample_size is None:
        kept = len(first.rows)
        mixed = _nearest(kept * share / (1 - share))
    else:
        mixed = _nearest(options.sample_size * share)
        kept = options.sample_size - mixed
    if not kept or not mixed:
        raise ExperimentError(
            f"mixture_share={share} of {kept + mixed} examples leaves {kept} of {dataset!r} and {mixed} of {options.mixture!r}. "
            "Raise sample_size, or take mixture_share nearer to 0.5."
        )
    main, other = _drawn(first, kept, options.seed), _drawn(second, mixed, options.seed, "mixture_share or sample_size")
    return TrainingSet(interleaved(main.examples, other.examples), {**main.source, "mixture": {**other.source, "share": share}})


def interleaved(first: tuple[Conversation, ...], second: tuple[Conversation, ...]) -> tuple[Conversation, ...]:
    """Return both in one sequence, each in its order, the second's examples evenly spread: whole numbers only, so nothing is lost to rounding."""
    total, more = len(first) + len(second), len(second)
    ones, others = iter(first), iter(second)
    # half a step of start, so that neither set is crowded towards one end
    counts = [(2 * i * more + total) // (2 * total) for i in range(total + 1)]
    return tuple(next(others) if counts[i + 1] > counts[i] else next(ones) for i in range(total))


def _rows(options: DatasetOptions, dataset: str, trait: str | None, stream: str) -> _Rows:
    file = read_data_file(dataset, options.folder, trait)
    rows = list(read_chat(file.content, f"training data {file.path!r}"))
    random.Random(f"{options.seed}/{stream}").shuffle(rows)
    return _Rows(rows, {"dataset": dataset, "path": file.path, "sha256": hashlib.sha256(file.content).hexdigest(), "rows": len(rows)})


def _drawn(found: _Rows, count: int | None, seed: int, argument: str = "sample_size") -> TrainingSet:
    taken = len(found.rows) if count is None else count
    if taken > len(found.rows):
        raise ExperimentError(
            f"data set {found.facts['dataset']!r} has {len(found.rows)} examples, and {taken} are to be drawn from it without repeats. "
            f"Lower {argument} in training.dataset_options, or give more data."
        )
    return TrainingSet(tuple(found.rows[:taken]), {**found.facts, "taken": taken, "seed": seed, "mixture": None})


def _nearest(number: float) -> int:
    return int(number + 0.5)
