"""The rows of a batch: whose steering each one has, and the order in which lm-eval puts them together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from lm_eval.models.utils import Collator
from torch import Tensor
from transformers import LogitsProcessor

from steered_lm.steering.spec import SteeringSpec

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class Row(NamedTuple):
    """What steers one row of a batch, and whose it is."""

    spec: SteeringSpec | None
    candidate: str | None = None

    @property
    def acts(self) -> bool:
        """Whether the spec changes anything at all."""
        return self.spec is not None and bool(self.spec.resolved())


class ScoredRow(NamedTuple):
    """One teacher-forced row: its input tokens, and how many of them are context."""

    row: Row
    tokens: list[int]
    context: int


class FiniteScores(LogitsProcessor):
    """Notes which rows ever had a next-token score that is NaN: a steered model that has overflowed still writes *some* text."""

    def __init__(self) -> None:
        """Start with no row noted."""
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the scores as they are."""
        found = torch.isnan(scores).any(dim=-1)
        self.broken = found if self.broken is None else self.broken | found
        return scores


def mergeable(rows: Sequence[ScoredRow]) -> bool:
    """Return whether lm-eval may run rows with the same tokens once: only if the same steering acts on the same positions of them."""
    kinds: dict[tuple[int, ...], tuple[str, int] | None] = {}
    for row in rows:
        kind = (row.row.spec.digest, row.context) if row.row.acts and row.row.spec else None
        if kinds.setdefault(tuple(row.tokens), kind) != kind:
            return False
    return True


def in_order(rows: Sequence[ScoredRow], requests: Sequence[TokenRequest], *, merge: bool) -> Iterator[ScoredRow]:
    """Yield the rows in the order in which ``HFLM._loglikelihood_tokens`` puts them into batches, with its own collator."""

    def length_first(entry: tuple[ScoredRow, list[int], list[int]]) -> tuple[int, tuple[int, ...]]:
        tokens = entry[1] + entry[2]
        return -len(tokens), tuple(tokens)

    entries = [(row, context, continuation) for row, (_, context, continuation) in zip(rows, requests, strict=True)]
    grouping = {"group_by": "contexts" if merge else None, "group_fn": lambda entry: entry[1] + entry[2][:-1]}
    for row, _, _ in (entry for chunk in Collator(entries, sort_fn=length_first, **grouping).get_batched(n=1) for entry in chunk):
        yield row


def pad(rows: Sequence[list[int]], fill: int, side: str) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Return ids and mask of rows that are padded with ``fill`` on one side."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask
