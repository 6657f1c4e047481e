"""Steering while a model trains, by the hooks that steer it at inference; nothing of it stays in the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steered_lm.steering.compile import CompiledSite, SteeredRows
from steered_lm.steering.hooks import Steerer, Table
from steered_lm.steering.spec import SteeringSpec


class MaskedSite:
    """One site applied to every row of a batch, at the positions of a mask; a hook's :class:`steered_lm.steering.hooks.Table`."""

    def __init__(self, site: CompiledSite, mask: Bool[Tensor, "rows width"], d_model: int) -> None:
        """Take a site, and where it acts in the next pass."""
        self._row, self._mask = SteeredRows([site], d_model), mask

    def apply(self, hidden: Float[Tensor, "rows width d_model"], offset: int) -> tuple[Float[Tensor, "rows width d_model"], Int[Tensor, ""]]:
        """Return steered hidden states, through which gradients flow, and how many tokens were steered."""
        # projections are float32 products, as at inference
        with torch.autocast(hidden.device.type, enabled=False):
            return self._row.apply(hidden, self._mask, times=len(hidden)), self._mask.sum()


class TrainingSteerer:
    """Steers training passes of a model.

    Positions mean what they mean at inference, for every turn of the assistant: ``response`` is each position whose output predicts a token that
    carries loss, ``prompt`` every other one, ``all`` both. Padding is never steered.
    """

    def __init__(self, model: nn.Module, spec: SteeringSpec | None) -> None:
        """Attach hooks where the spec acts; a spec of weight zero, or none, attaches nothing.

        Raises:
            VectorsError, SpecError: when the spec does not fit its vectors or the model.
        """
        self._steerer = Steerer(model)
        self.sites = self._steerer.compile(spec).sites

    @property
    def tokens(self) -> dict[int, int]:
        """How many tokens were steered, by layer."""
        return dict(self._steerer.tokens)

    @contextmanager
    def batch(self, attention_mask: Int[Tensor, "rows width"], labels: Int[Tensor, "rows width"]) -> Iterator[None]:
        """Steer the passes inside the ``with`` block; ``labels`` is -100 where a token carries no loss.

        Raises:
            RuntimeError: when a hook did not fire.
        """
        if not self.sites:
            yield
            return
        tables: dict[int, Table] = {
            layer: MaskedSite(site, positions(site.positions, attention_mask, labels), self._steerer.d_model) for layer, site in self.sites.items()
        }
        with self._steerer.running(tables, sorted(tables)):
            yield

    def close(self) -> None:
        """Detach every hook."""
        self._steerer.close()


def positions(which: str, attention_mask: Int[Tensor, "rows width"], labels: Int[Tensor, "rows width"]) -> Bool[Tensor, "rows width"]:
    """Return the positions that ``all``, ``prompt`` or ``response`` means in a batch with labels."""
    present = attention_mask.bool()
    if which == "all":
        return present
    predicting = torch.zeros_like(present)
    predicting[:, :-1] = labels[:, 1:] != -100
    return predicting if which == "response" else present & ~predicting
