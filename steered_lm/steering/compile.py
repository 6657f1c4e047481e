"""A spec and its vectors to numbers per layer, and the rows of a batch to tables."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steered_lm.errors import SpecError
from steered_lm.steering.spec import Positions, ResolvedSite, SteeringSpec
from steered_lm.steering.vectors import TraitVectors

_FAR = torch.iinfo(torch.int64).max


class Projection(NamedTuple):
    """``h <- h + share * (target - h @ basis.T) @ dual`` for k directions."""

    basis: Float[Tensor, "k d_model"]
    dual: Float[Tensor, "k d_model"]
    target: Float[Tensor, " k"]
    share: float


@dataclass(frozen=True)
class CompiledSite:
    """What one row does at one layer: an added vector or a projection, in float32 on the CPU."""

    layer: int
    positions: Positions
    delta: Float[Tensor, " d_model"] | None = None
    projection: Projection | None = None


@dataclass(frozen=True)
class CompiledSpec:
    """A spec's sites by layer. No sites means the unsteered model, bit for bit."""

    digest: str
    sites: dict[int, CompiledSite]


class Layout(NamedTuple):
    """Which columns of a batch are what, per row, in columns of the full (uncached) token matrix.

    Attributes:
        start: first column that is not padding, int64 ``[rows]``.
        split: first column whose output predicts a response token (the last prompt token).
        end: one past the last column that is not padding.
    """

    start: Int[Tensor, " rows"]
    split: Int[Tensor, " rows"]
    end: Int[Tensor, " rows"]

    @classmethod
    def generation(cls, attention_mask: Int[Tensor, "rows width"]) -> "Layout":
        """Layout of prompts to be continued, padded on the left; everything generated is response."""
        rows, width = attention_mask.shape
        start = attention_mask.to("cpu", torch.int64).argmax(dim=1)
        return cls(start, torch.full((rows,), width - 1), torch.full((rows,), _FAR))

    @classmethod
    def scored(cls, context_lengths: Sequence[int], lengths: Sequence[int], *, width: int | None = None, padding_side: str = "right") -> "Layout":
        """Layout of teacher-forced rows: ``context_lengths`` prompt tokens, ``lengths`` tokens in all, in ``width`` columns.

        A context of length 0 makes the whole row response.
        """
        context, total = torch.as_tensor(context_lengths, dtype=torch.int64), torch.as_tensor(lengths, dtype=torch.int64)
        shift = torch.zeros_like(total) if padding_side == "right" else (int(total.max()) if width is None else width) - total
        return cls(shift, shift + (context - 1).clamp(min=0), shift + total)

    def repeat(self, times: int) -> "Layout":
        """Layout of a batch whose every row stands ``times`` times in a row (beams, several samples a prompt)."""
        return Layout(*(part.repeat_interleave(times) for part in self))


def compile_spec(spec: SteeringSpec, vectors: TraitVectors | None) -> CompiledSpec:
    """Return the spec's numbers. Nothing is re-normalised: what the spec says is what is added.

    Raises:
        VectorsError: when a trait or a layer is not in the vectors file.
        SpecError: when the spec needs vectors and none are given, or clamps linearly dependent directions.
    """
    if spec.resolved() and vectors is None:
        raise SpecError("a spec with non-zero weights needs trait vectors; set its vectors.")
    if vectors is not None:
        for trait in spec.weights:
            vectors.vector(trait, vectors.meta.layers[0])
        for layer in spec.layers:
            vectors.vector(vectors.meta.traits[0], layer)
    return CompiledSpec(spec.digest, {site.layer: _compile_site(site, vectors) for site in spec.resolved() if vectors is not None})


def _compile_site(site: ResolvedSite, vectors: TraitVectors) -> CompiledSite:
    strength = site.alpha * vectors.scale(site.layer, site.unit, site.positions)
    basis = torch.stack([vectors.vector(trait, site.layer) for trait in site.weights]).to(torch.float32)
    weights = torch.tensor(list(site.weights.values()), dtype=torch.float32)
    if site.operation == "add":
        delta = strength * (weights @ basis)
        if not torch.isfinite(delta).all():
            raise SpecError(f"layer={site.layer}: alpha={site.alpha} times weights {site.weights} is not finite in float32. Use a smaller alpha.")
        return CompiledSite(site.layer, site.positions, delta=delta)
    gram = basis.double() @ basis.double().T
    if torch.linalg.matrix_rank(gram) < len(weights):
        raise SpecError(
            f"layer={site.layer}: directions {', '.join(site.weights)} are linearly dependent, so {site.operation} is not defined. Leave one out."
        )
    dual = torch.linalg.solve(gram, basis.double()).float()
    if site.operation == "ablate":
        projection = Projection(basis, dual, torch.zeros(len(weights)), share=site.alpha)
    else:
        projection = Projection(basis, dual, strength * weights, share=1.0)
    return CompiledSite(site.layer, site.positions, projection=projection)


class SteeredRows:
    """What is added to, or projected out of, each row of a batch at one layer: ``[rows, d_model]`` additions and padded projections."""

    def __init__(self, sites: Sequence[CompiledSite | None], d_model: int) -> None:
        """Stack the rows' sites; None is an unsteered row."""
        zeros = torch.zeros(d_model)
        self.delta: Float[Tensor, "rows d_model"] = torch.stack([zeros if site is None or site.delta is None else site.delta for site in sites])
        self.additive = any(site is not None and site.delta is not None for site in sites)
        projections = [site.projection if site is not None else None for site in sites]
        self.packed = _pack(projections, d_model) if any(projections) else None
        self._moved: tuple[torch.device, torch.dtype] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.delta)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the rows to where the hidden states are; projections stay in float32 for half-precision models."""
        if self._moved == (device, dtype):
            return
        self.delta = self.delta.to(device, dtype)
        if self.packed is not None:
            basis, dual, target, share = (part.to(device) for part in self.packed)
            self.packed = basis, dual, target, share
        self._moved = (device, dtype)

    def select(self, index: Int[Tensor, " chosen"]) -> "SteeredRows":
        """Return the rows ``index``, which may repeat."""
        chosen = copy(self)
        index = index.to(self.delta.device)
        chosen.delta = self.delta.index_select(0, index)
        if self.packed is not None:
            basis, dual, target, share = (part.index_select(0, index) for part in self.packed)
            chosen.packed = basis, dual, target, share
        return chosen

    def apply(
        self, hidden: Float[Tensor, "rows width d_model"], mask: Bool[Tensor, "rows width"], times: int = 1
    ) -> Float[Tensor, "rows width d_model"]:
        """Return new hidden states, steered where ``mask`` is True; ``times`` rows of the batch per row of the table."""
        self.to(hidden.device, hidden.dtype)
        steered = hidden
        if self.additive:
            delta = self.delta if times == 1 else self.delta.repeat_interleave(times, dim=0)
            steered = steered + delta[:, None]
        if self.packed is not None:
            basis, dual, target, share = (part if times == 1 else part.repeat_interleave(times, dim=0) for part in self.packed)
            full = steered.to(torch.float32)
            steered = (full + share * torch.bmm(target - torch.bmm(full, basis.transpose(1, 2)), dual)).to(hidden.dtype)
        return torch.where(mask[..., None], steered, hidden)


def _pack(projections: Sequence[Projection | None], d_model: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = max(len(p.target) for p in projections if p)
    rows = len(projections)
    basis, dual = torch.zeros(rows, k, d_model), torch.zeros(rows, k, d_model)
    target, share = torch.zeros(rows, 1, k), torch.zeros(rows, 1, 1)
    for row, p in enumerate(projections):
        if p is not None:
            size = len(p.target)
            basis[row, :size], dual[row, :size], target[row, 0, :size], share[row] = p.basis, p.dual, p.target, p.share
    return basis, dual, target, share


class SiteTable:
    """The rows of one batch at one layer, and each row's steered columns."""

    def __init__(self, sites: Sequence[CompiledSite | None], layout: Layout, d_model: int) -> None:
        rows = len(sites)
        self.low = torch.zeros(rows, dtype=torch.int64)
        self.high = torch.zeros(rows, dtype=torch.int64)
        for row, site in enumerate(sites):
            if site is not None:
                self.low[row] = layout.split[row] if site.positions == "response" else layout.start[row]
                self.high[row] = layout.split[row] if site.positions == "prompt" else layout.end[row]
        self.rows = SteeredRows(sites, d_model)

    def mask(self, offset: int, width: int, times: int) -> Bool[Tensor, "rows width"]:
        """Return which of the columns ``offset .. offset + width`` are steered; ``times`` rows of the batch per row of the table."""
        columns = torch.arange(offset, offset + width, device=self.low.device)
        mask = (columns >= self.low[:, None]) & (columns < self.high[:, None])
        return mask if times == 1 else mask.repeat_interleave(times, dim=0)

    def apply(self, hidden: Float[Tensor, "rows width d_model"], offset: int) -> tuple[Float[Tensor, "rows width d_model"], Int[Tensor, ""]]:
        """Return the steered hidden states (a new tensor) and how many tokens were steered."""
        times, rest = divmod(hidden.shape[0], len(self.rows))
        if rest or not times:
            raise RuntimeError(
                f"the batch has {hidden.shape[0]} rows, the steering table {len(self.rows)}; they must match or be a multiple (beams)."
            )
        self.low, self.high = self.low.to(hidden.device), self.high.to(hidden.device)
        mask = self.mask(offset, hidden.shape[1], times)
        return self.rows.apply(hidden, mask, times), mask.sum()
