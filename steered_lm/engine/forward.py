"""One forward pass in which the rows part ways at a block: below it each distinct sequence runs once, above it every row."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steered_lm.engine.cache import EngineCache
from steered_lm.steering.hooks import Steerer

Path = tuple[str | int, ...]


class Fork(NamedTuple):
    """Where a pass parts ways.

    Attributes:
        block: the last block that runs on distinct sequences.
        sequence: for each row after it, the sequence that it continues, int64 ``[rows]``.
    """

    block: int
    sequence: Int[Tensor, " rows"]


class Forward:
    """Runs a model's own forward method for the engine: explicit positions, a forked batch, logits at chosen places only.

    Attributes:
        batched: for each tensor among a block's arguments that has a row per sequence, how many entries a sequence has in its first
            dimension (1, or the number of heads for ALiBi). It is learnt by :func:`steered_lm.engine.support.inspect_model`.
    """

    def __init__(self, steerer: Steerer) -> None:
        """Prepare to run the steerer's model."""
        model: Any = steerer.model
        # PEFT injects its layers into the base model; its own forward only adds what prompt learning needs.
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.blocks = steerer.blocks
        self.head: Any = self.model.get_output_embeddings()
        accepted = inspect.signature(self.model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted
        self.batched: dict[Path, int] = {}

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def last(
        self,
        ids: Int[Tensor, "sequences width"],
        mask: Int[Tensor, "sequences columns"],
        positions: Int[Tensor, "sequences width"],
        cache: EngineCache,
        fork: Fork | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Run ``ids`` and return the logits at their last column, one row each, or one per row of the fork."""
        keep = {"logits_to_keep": 1} if self._takes_keep else {}
        with self._forked(fork, len(ids)):
            logits = self._run(ids, mask, positions, cache, **keep)
        return logits[:, -1]

    def at(
        self,
        ids: Int[Tensor, "sequences width"],
        mask: Tensor,
        positions: Int[Tensor, "sequences width"],
        cache: EngineCache,
        places: tuple[Int[Tensor, " places"], Int[Tensor, " places"]],
        fork: Fork | None = None,
    ) -> Float[Tensor, "places vocab"]:
        """Run ``ids`` and return the logits at ``places`` (rows, columns): the output embeddings see nothing else."""

        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            rows, columns = (place.to(hidden.device) for place in places)
            return (hidden[rows, columns][None], *args[1:])

        handle = self.head.register_forward_pre_hook(gather)
        try:
            with self._forked(fork, len(ids)):
                logits = self._run(ids, mask, positions, cache)
        finally:
            handle.remove()
        return logits[0]

    def mask(self, seen: Bool[Tensor, "sequences width columns"]) -> Tensor:
        """Return who sees whom in the form that the model's attention takes."""
        visible = seen[:, None].to(self.device)
        if self.model.config._attn_implementation == "sdpa":
            return visible
        dtype = self.model.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: EngineCache, **keep: Any) -> Tensor:
        if self.takes_positions:
            keep["position_ids"] = positions
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **keep).logits
        cache.advance(ids.shape[1])
        return logits

    @contextmanager
    def _forked(self, fork: Fork | None, sequences: int) -> Iterator[None]:
        if fork is None:
            yield
            return
        expand = _Expansion(fork.sequence, sequences, self.batched)
        handles: list[RemovableHandle] = []
        try:
            # before the steering hook of the same block, which has a row of its table per row of the fork
            handles.append(self.blocks[fork.block].register_forward_hook(expand.output, prepend=True))
            for block in range(fork.block + 1, len(self.blocks)):
                handles.append(self.blocks[block].register_forward_pre_hook(expand.arguments, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Expansion:
    """Turns tensors with an entry per sequence into tensors with an entry per row; each tensor once a pass."""

    def __init__(self, index: Tensor, sequences: int, batched: Mapping[Path, int]) -> None:
        self._index, self._sequences, self._batched = index, sequences, batched
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._expanded(output[0], 1), *output[1:])
        return self._expanded(output, 1)

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # the first argument is the hidden states, which come expanded from the block before
        new_args = (*args[:1], *(self._walk(value, (place,)) for place, value in enumerate(args[1:], start=1)))
        return new_args, {name: value if name == "hidden_states" else self._walk(value, (name,)) for name, value in kwargs.items()}

    def _walk(self, value: Any, path: Path) -> Any:
        if isinstance(value, tuple):
            return tuple(self._walk(part, (*path, place)) for place, part in enumerate(value))
        entries = self._batched.get(path)
        if entries is None or not isinstance(value, Tensor) or len(value) != self._sequences * entries:
            return value
        return self._expanded(value, entries)

    def _expanded(self, value: Tensor, entries: int) -> Tensor:
        # keyed by identity: the tensor is kept beside its expansion, so that its id stays its own
        if id(value) not in self._made:
            index = self._index.to(value.device)
            if entries == 1:
                expanded = value.index_select(0, index)
            else:
                expanded = value.unflatten(0, (self._sequences, entries)).index_select(0, index).flatten(0, 1)
            self._made[id(value)] = (value, expanded)
        return self._made[id(value)][1]


def tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Path, Tensor]:
    """Return the tensors among a block's arguments after the hidden states, by path."""
    found: dict[Path, Tensor] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, tuple):
            for place, part in enumerate(value):
                walk(part, (*path, place))

    for place, value in enumerate(args[1:], start=1):
        walk(value, (place,))
    for name, value in kwargs.items():
        if name != "hidden_states":
            walk(value, (name,))
    return found
