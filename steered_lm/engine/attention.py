"""Attention of a step over prompts that many rows share: their keys and values are kept, and read, once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steered_lm.engine.cache import EngineCache


class SharedPrompts:
    """The prompts of the rows in a batch, one copy each, and which rows read which.

    A row's attention is taken apart: over its prompt, together with all rows of the same prompt, and over its own tokens. The two are put together
    by their normalisers, which is exact (Juravsky et al. 2024, arXiv:2402.05099, eq. 1; Milakov and Gimelshein 2018, arXiv:1805.02867).

    Attributes:
        width: columns that a prompt takes.
    """

    def __init__(self, blocks: int) -> None:
        """Start without prompts; the first ``blocks`` blocks of a model share them, the others do not."""
        self._keys: list[Tensor | None] = [None] * blocks
        self._values: list[Tensor | None] = [None] * blocks
        self._bias: Float[Tensor, "prompts 1 1 width"] = torch.zeros(0, 1, 1, 0)
        self._members: Int[Tensor, "prompts most"] = torch.zeros(0, 0, dtype=torch.int64)
        self._back: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.int64)
        self.width = 0

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._bias)

    @property
    def blocks(self) -> int:
        """How many blocks share prompts, from the first on."""
        return len(self._keys)

    def replace(self, kept: Sequence[int], new: EngineCache | None, mask: Int[Tensor, "prompts columns"] | None) -> None:
        """Keep the prompts ``kept`` and add those of ``new``, a prompt a row; those of its layers are freed as they are copied.

        Args:
            kept: numbers of the prompts that rows still read.
            new: keys and values of further prompts, or None.
            mask: which columns of ``new`` are tokens.
        """
        added = 0 if mask is None else len(mask)
        width = max(self.width if kept else 0, 0 if mask is None else mask.shape[1])
        bias = torch.full((len(kept) + added, 1, 1, width), float("-inf"))
        if kept:
            bias[: len(kept), ..., width - self.width :] = self._bias[list(kept)]
        if mask is not None:
            bias[len(kept) :, 0, 0, width - mask.shape[1] :] = torch.where(mask.cpu() > 0, 0.0, float("-inf"))
        for block in range(len(self._keys)):
            parts = (None, None) if new is None else (new.block_caches[block].keys, new.block_caches[block].values)
            columns = slice(0, 0) if new is None else slice(new.columns.low, new.columns.end)
            for held, part in ((self._keys, parts[0]), (self._values, parts[1])):
                held[block] = _joined(held[block], kept, None if part is None else part[:, :, columns], width)
            if new is not None:
                new.block_caches[block].keys = new.block_caches[block].values = None
        self._bias, self.width = bias, width

    def assign(self, prompts: Sequence[int]) -> None:
        """Say which prompt each row of the batch reads."""
        members: list[list[int]] = [[] for _ in range(len(self))]
        places = []
        for row, prompt in enumerate(prompts):
            places.append((prompt, len(members[prompt])))
            members[prompt].append(row)
        most = max(map(len, members), default=0)
        self._members = torch.tensor([rows + [0] * (most - len(rows)) for rows in members], dtype=torch.int64).reshape(len(self), most)
        self._back = torch.tensor([prompt * most + place for prompt, place in places], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return sum(part.nbytes for part in (*self._keys, *self._values) if part is not None)

    def attend(
        self,
        block: int,
        query: Float[Tensor, "rows heads 1 k"],
        key: Float[Tensor, "rows kv_heads width k"],
        value: Float[Tensor, "rows kv_heads width v"],
        mask: Tensor | None,
        scale: float | None,
    ) -> Float[Tensor, "rows heads 1 v"]:
        """Return the attention of one new token a row over its prompt and its own ``width`` tokens."""
        keys, values = self._keys[block], self._values[block]
        assert keys is not None, "prompts have run"
        assert values is not None, "prompts have run"
        rows, heads = query.shape[0], key.shape[1]
        grouped = query.reshape(rows, heads, -1, query.shape[-1])  # the query heads of a key-value head side by side
        prompts, most = self._members.shape
        together = grouped.index_select(0, self._members.flatten()).unflatten(0, (prompts, most)).transpose(1, 2).flatten(2, 3)
        bias = self._bias.to(query.dtype).expand(-1, 1, together.shape[2], -1)
        shared, shared_norm = _attention(together, keys, values, bias, scale)
        seen = None if mask is None else _additive(mask[..., -key.shape[2] :], query.dtype)
        own, own_norm = _attention(grouped, key, value, seen, scale)
        split = shared.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1).index_select(0, self._back)
        split_norm = shared_norm.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1).index_select(0, self._back)
        share = torch.sigmoid(split_norm - own_norm)[..., None]
        joined: Tensor = (share * split + (1 - share) * own).to(query.dtype)
        return joined.reshape(rows, -1, 1, value.shape[-1])


def _joined(held: Tensor | None, kept: Sequence[int], part: Tensor | None, width: int) -> Tensor | None:
    like = held if part is None else part
    assert like is not None, "nothing to keep and nothing to add"
    count = len(kept) + (0 if part is None else len(part))
    joined = like.new_zeros(count, like.shape[1], width, like.shape[3])
    if kept:
        assert held is not None, "prompts to keep"
        joined[: len(kept), :, width - held.shape[2] :] = held[list(kept)]
    if part is not None:
        joined[len(kept) :, :, width - part.shape[2] :] = part
    return joined


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return attention ``[batch, heads, width, v]`` and the log of its normaliser ``[batch, heads, width]``, which only the kernel itself gives."""
    output, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    return output, norm


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else mask


class _Redirection:
    """Stands in for transformers' ``sdpa`` attention while any thread reads shared prompts; for the other threads it changes nothing."""

    def __init__(self) -> None:
        self._lock, self._readers = threading.Lock(), 0
        self._original: Callable[..., Any] | None = None
        self._step = threading.local()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        active: SharedPrompts | None = getattr(self._step, "prompts", None)
        if active is None or module.layer_idx >= active.blocks:  # type: ignore[operator]
            assert self._original is not None, "installed"
            found: tuple[Tensor, None] = self._original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
            return found
        block: Any = module.layer_idx
        return active.attend(block, query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None

    @contextmanager
    def reading(self, prompts: SharedPrompts) -> Iterator[None]:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._original = ALL_ATTENTION_FUNCTIONS["sdpa"]
                ALL_ATTENTION_FUNCTIONS["sdpa"] = self
        self._step.prompts = prompts
        try:
            yield
        finally:
            self._step.prompts = None
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    ALL_ATTENTION_FUNCTIONS["sdpa"] = self._original


_REDIRECTION = _Redirection()


def reading(prompts: SharedPrompts) -> AbstractContextManager[None]:
    """Let every ``sdpa`` attention that this thread runs inside the ``with`` block read ``prompts`` beside the keys that it is given."""
    return _REDIRECTION.reading(prompts)
