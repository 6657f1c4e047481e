"""Permanent hooks on the steered blocks, switched per batch."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steered_lm.errors import SpecError
from steered_lm.steering.blocks import find_blocks, hidden_size, parent_of
from steered_lm.steering.compile import CompiledSpec, Layout, SiteTable, compile_spec
from steered_lm.steering.spec import SteeringSpec
from steered_lm.steering.vectors import TraitVectors

_UNSTEERED = CompiledSpec("unsteered", {})
# Arguments by which state-space and other recurrent stacks take what they keep between passes.
_STATES = ("cache_params", "state")


class Table(Protocol):
    """What one steered block's hook does to the hidden states of a forward pass."""

    def apply(self, hidden: Float[Tensor, "rows width d_model"], offset: int) -> tuple[Float[Tensor, "rows width d_model"], Int[Tensor, ""]]:
        """Return new hidden states, and how many tokens were steered; ``offset`` is the number of cached columns."""
        ...


class Steerer:
    """Steers a causal model row by row: one permanent forward hook per steered block, idle outside :meth:`batch`.

    Attributes:
        blocks, stack: the decoder blocks, and the module that runs them.
        tokens: how many tokens (rows x positions) each block's hook has steered so far, by layer.
    """

    def __init__(self, model: nn.Module, *, blocks: str | nn.ModuleList | None = None, allow_foreign: bool = False) -> None:
        """Prepare a model; nothing is attached yet.

        Args:
            model: a Hugging Face causal model, bare or wrapped by PEFT.
            blocks: the block list, or its dotted path, when the structure misleads.
            allow_foreign: take vectors whose model fingerprint differs.

        Raises:
            ModelError: when no decoder blocks are found.
        """
        self.model = model
        self.blocks = blocks if isinstance(blocks, nn.ModuleList) else find_blocks(model, blocks)
        self.stack = parent_of(model, self.blocks)
        self._signature = inspect.signature(self.stack.forward)
        self.d_model = hidden_size(model)
        self.allow_foreign = allow_foreign
        self.tokens: dict[int, int] = {}
        self._compiled: dict[str, CompiledSpec] = {}
        self._vectors: dict[str, TraitVectors] = {}
        self._handles: dict[int, RemovableHandle] = {}
        self._top: RemovableHandle | None = None
        self._tables: dict[int, Table] = {}
        self._running = False
        self._counts: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._offset = self._seen = 0

    def compile(self, spec: SteeringSpec | None) -> CompiledSpec:
        """Check a spec against its vectors file and this model, and attach hooks where it acts. Results are kept by digest.

        Raises:
            VectorsError: for a missing, damaged or foreign vectors file, an unknown trait or a layer that it does not hold.
            SpecError: when the vectors changed since the spec was written.
        """
        if spec is None:
            return _UNSTEERED
        digest = spec.digest
        if digest not in self._compiled:
            self._compiled[digest] = compile_spec(spec, self._load(spec))
        compiled = self._compiled[digest]
        self._attach([layer for layer in compiled.sites if layer not in self._handles])
        return compiled

    def _load(self, spec: SteeringSpec) -> TraitVectors | None:
        if spec.vectors is None:
            return None
        if spec.vectors.sha256 not in self._vectors:
            vectors = TraitVectors.load(spec.vectors.path)
            spec.vectors.verify()
            vectors.check_model(self.model, allow_foreign=self.allow_foreign)
            self._vectors[spec.vectors.sha256] = vectors
        return self._vectors[spec.vectors.sha256]

    def _attach(self, layers: Sequence[int]) -> None:
        outside = [layer for layer in layers if not 0 <= layer < len(self.blocks)]
        if outside:
            raise SpecError(f"layer={outside[0]} is out of range: this model has blocks 0..{len(self.blocks) - 1}.")
        if layers and self._top is None:
            self._top = self.stack.register_forward_pre_hook(self._before, with_kwargs=True)
        for layer in layers:
            self._handles[layer] = self.blocks[layer].register_forward_hook(self._hook(layer))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        cache = bound.get("past_key_values")
        if cache is not None:
            self._offset = int(cache.get_seq_length())
        elif any(bound.get(name) is not None for name in _STATES):
            # a recurrent state does not say how many tokens it has seen
            self._offset, self._seen = self._seen, self._seen + _width(bound)
        else:
            self._offset, self._seen = 0, _width(bound)

    def _hook(self, layer: int) -> Any:
        def steer_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            table = self._tables.get(layer)
            if table is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            steered, count = table.apply(hidden, self._offset)
            self._calls[layer] = self._calls.get(layer, 0) + 1
            self._counts[layer] = self._counts.get(layer, 0) + count
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return steer_output

    @contextmanager
    def batch(self, rows: Sequence[SteeringSpec | None], layout: Layout) -> Iterator[None]:
        """Steer every forward pass inside the ``with`` block, row ``i`` by ``rows[i]`` (None: unsteered).

        Raises:
            SpecError, VectorsError: see :meth:`compile`.
            RuntimeError: when a hook of a steered block did not fire, so that results would silently be the baseline's.
        """
        if self._running:
            raise RuntimeError("Steerer.batch() is already active; leave one batch before the next.")
        if len(rows) != len(layout.start):
            raise ValueError(f"rows has {len(rows)} specs, the layout {len(layout.start)} rows; give one spec (or None) a row.")
        compiled = [self.compile(spec) for spec in rows]
        layers = sorted({layer for row in compiled for layer in row.sites})
        tables: dict[int, Table] = {layer: SiteTable([row.sites.get(layer) for row in compiled], layout, self.d_model) for layer in layers}
        with self.running(tables, layers):
            yield

    @contextmanager
    def running(self, tables: dict[int, Table], layers: Sequence[int]) -> Iterator[None]:
        """Let the hooks of the steered blocks apply ``tables``, which the caller may change between forward passes.

        Args:
            tables: by layer, what is done to the hidden states of the pass that comes next; a layer without an entry is left alone.
            layers: the layers that have to be steered at least once inside the ``with`` block.

        Raises:
            RuntimeError: when a hook of one of ``layers`` did not fire, so that results would silently be the baseline's.
        """
        if self._running:
            raise RuntimeError("Steerer.batch() is already active; leave one batch before the next.")
        self._tables, self._running, self._calls, self._counts, self._seen = tables, True, {}, {}, 0
        try:
            yield
            silent = [layer for layer in layers if not self._calls.get(layer)]
            if silent:
                raise RuntimeError(
                    f"the steering hook of block {silent[0]} did not fire; the model did not run that block. Name the blocks: blocks=<dotted path>."
                )
            for layer, count in self._counts.items():
                self.tokens[layer] = self.tokens.get(layer, 0) + int(count)
        finally:
            self._tables, self._running = {}, False

    def close(self) -> None:
        """Detach every hook."""
        for handle in self._handles.values():
            handle.remove()
        if self._top is not None:
            self._top.remove()
        self._handles, self._top = {}, None

    def __enter__(self) -> Self:
        """Return the steerer; its hooks are detached at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Detach every hook."""
        self.close()


def _width(arguments: Mapping[str, Any]) -> int:
    """Return how many columns a pass has."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if arguments.get(name) is not None:
            return int(arguments[name].shape[1])
    return 0


@contextmanager
def steer(
    model: nn.Module, spec: SteeringSpec | str | Path, *, attention_mask: Tensor, response_start: Sequence[int] | None = None, **options: Any
) -> Iterator[Steerer]:
    """Steer what a model does inside a ``with`` block, for one batch: generation, or a teacher-forced pass.

    Args:
        model: a Hugging Face causal model.
        spec: a spec or a spec file; it applies to every row.
        attention_mask: int ``[rows, width]`` of the batch, 0 for padding on either side.
        response_start: per row, the number of prompt tokens before the response, for teacher-forced passes. None means that the batch
            is prompts padded on the left, to be continued by ``generate``.
        options: as for :class:`Steerer`.
    """
    settled = spec if isinstance(spec, SteeringSpec) else SteeringSpec.load(spec)
    with Steerer(model, **options) as steerer:
        if response_start is None:
            layout = Layout.generation(attention_mask)
        else:
            side = "right" if bool(attention_mask[:, 0].all()) else "left"
            lengths = attention_mask.sum(dim=1).tolist()
            layout = Layout.scored(response_start, lengths, width=attention_mask.shape[1], padding_side=side)
        with steerer.batch([settled] * attention_mask.shape[0], layout):
            yield steerer
