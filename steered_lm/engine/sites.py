"""Which tokens of a pass are steered, and how: from the specs of a run to tables that the hooks apply."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steered_lm.steering.compile import CompiledSpec, SteeredRows
from steered_lm.steering.hooks import Table

_NONE, _ALL, _PROMPT, _RESPONSE = range(4)
_CODES = {None: _NONE, "all": _ALL, "prompt": _PROMPT, "response": _RESPONSE}
_FAR = torch.iinfo(torch.int64).max


class PassTable:
    """One layer of one pass: a row of the table per row of the batch, and each token's own position in place of columns.

    A token at index ``i`` of its row's text is steered when ``low <= i < high``. Padding has index -1, which no interval holds.
    """

    def __init__(self, rows: SteeredRows, low: Int[Tensor, " rows"], high: Int[Tensor, " rows"], positions: Int[Tensor, "rows width"]) -> None:
        """Put the parts together; ``positions`` may be replaced between passes."""
        self.rows, self.low, self.high, self.positions = rows, low, high, positions

    def apply(self, hidden: Float[Tensor, "rows width d_model"], offset: int) -> tuple[Float[Tensor, "rows width d_model"], Int[Tensor, ""]]:
        """Return new hidden states, steered at the chosen positions, and how many tokens that were."""
        low, high, positions = (part.to(hidden.device) for part in (self.low, self.high, self.positions))
        mask: Bool[Tensor, "rows width"] = (positions >= low[:, None]) & (positions < high[:, None])
        return self.rows.apply(hidden, mask), mask.sum()


class SpecSites:
    """The distinct specs of a run, stacked by layer; rows of a pass refer to them by number.

    Attributes:
        layers: the layers that any of them steers.
        fork: the last block whose output no spec has touched before its own hook: what runs up to it is the same for all.
        early: per spec, whether it steers prompt tokens before the last one.
    """

    def __init__(self, specs: Sequence[CompiledSpec], blocks: int, d_model: int) -> None:
        """Stack the specs of a model with ``blocks`` blocks."""
        self.layers = sorted({layer for spec in specs for layer in spec.sites})
        self.fork = min(self.layers, default=blocks - 1)
        self.early = [any(site.positions != "response" for site in spec.sites.values()) for spec in specs]
        self._rows = {layer: SteeredRows([spec.sites.get(layer) for spec in specs], d_model) for layer in self.layers}
        self._codes = {
            layer: torch.tensor([_CODES[spec.sites[layer].positions if layer in spec.sites else None] for spec in specs]) for layer in self.layers
        }

    def tables(self, numbers: Int[Tensor, " rows"], split: Int[Tensor, " rows"], positions: Int[Tensor, "rows width"]) -> dict[int, Table]:
        """Return the tables of a pass.

        Args:
            numbers: which spec each row has.
            split: index of the last prompt token of each row, from which on its output predicts a response token.
            positions: index of each token in its row's text, -1 for padding.
        """
        made: dict[int, Table] = {}
        for layer, rows in self._rows.items():
            code = self._codes[layer][numbers]
            low = torch.where(code == _RESPONSE, split, 0)
            high = torch.where(code == _NONE, 0, torch.where(code == _PROMPT, split, _FAR))
            device = rows.delta.device
            made[layer] = PassTable(rows.select(numbers), low.to(device), high.to(device), positions.to(device))
        return made
