"""The rows of a run, and by what each is steered."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from steered_lm.engine.adapters import Group, by_adapter
from steered_lm.engine.rows import GenerationRow
from steered_lm.engine.sites import SpecSites
from steered_lm.steering.hooks import Table

# A prompt, and the number of its adapter: with another one it has other keys and values, from the first block on.
Prompt = tuple[tuple[int, ...], int]


class Roster:
    """Rows by number, each with its prompt, its spec and its adapter.

    Attributes:
        rows: what to generate.
        sites: the distinct specs of the run.
        specs: for each row, the number of its spec, int64 ``[rows]``.
        adapters: for each row, the number of its adapter.
    """

    def __init__(self, rows: Sequence[GenerationRow], sites: SpecSites, specs: Sequence[int], device: torch.device) -> None:
        """Number the adapters; ``device`` is where the model's input is."""
        self.rows, self.sites = rows, sites
        self.specs: Int[Tensor, " rows"] = torch.tensor(specs, dtype=torch.int64)
        self._names, self._device = sorted({row.adapter or "" for row in rows}), device
        self.adapters = [self._names.index(row.adapter or "") for row in rows]
        self._split = torch.tensor([len(row.tokens) - 1 for row in rows])

    def prompt(self, row: int) -> Prompt:
        """Return a row's prompt."""
        return self.rows[row].tokens, self.adapters[row]

    def early(self, row: int) -> bool:
        """Return whether a row's prompt is steered before its last token."""
        return self.sites.early[self.specs[row]]

    def tables(self, rows: Sequence[int], positions: Int[Tensor, "rows width"]) -> dict[int, Table]:
        """Return what the hooks apply in a pass over ``rows``, whose tokens have these positions, -1 for padding."""
        chosen = torch.tensor(list(rows))
        return self.sites.tables(self.specs[chosen], self._split[chosen], positions)

    def groups(self, adapters: Sequence[int]) -> list[Group]:
        """Return which entries of a pass have which adapter, given its number for each."""
        return by_adapter([self._names[adapter] for adapter in adapters], self._device)
