"""What the engine can do with a model: learnt by looking at it and by a small trial, not from a table of architectures."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from steered_lm.engine.adapters import Adapters, by_adapter
from steered_lm.engine.attention import SharedPrompts, reading
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Fork, Forward, tensors

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# what a forward method may raise when it is handed a cache, positions or a mask that it does not expect
_UNEXPECTED = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)


class Support(NamedTuple):
    """What works with a model.

    Attributes:
        generation: why population generation does not; None when it does.
        scoring: why tree scoring does not; None when it does.
        sharing: whether rows can read one copy of their prompt while they write.
        window: width of the model's sliding attention windows; None without.
        cache_bytes: bytes that one token's keys and values take, over all blocks.
    """

    generation: str | None
    scoring: str | None
    sharing: bool = False
    window: int | None = None
    cache_bytes: int = 0


def inspect_model(forward: Forward) -> Support:
    """Return what works, after learning which arguments of a block have an entry per sequence and comparing a small trial with the plain model."""
    obstacle, window = _obstacle(forward)
    if obstacle is not None:
        return Support(obstacle, obstacle)
    trial = _Trial(forward, window)
    with torch.inference_mode():
        try:
            forward.batched = trial.batched()
            plain = trial.plain()
            generation = _compare(trial.generated(), plain, "population generation")
        except _UNEXPECTED as error:
            reason = f"a trial of it failed ({type(error).__name__}: {error})"
            return Support(reason, reason)
        try:
            scoring = generation or _compare(trial.scored(), plain, "tree scoring")
        except _UNEXPECTED as error:
            scoring = f"a trial of it failed ({type(error).__name__}: {error})"
        sharing = generation is None and window is None and forward.takes_positions and forward.device.type == "cpu"
        sharing = sharing and forward.model.config._attn_implementation == "sdpa"
        try:
            sharing = sharing and _compare(trial.shared(), plain, "sharing prompts") is None
        except _UNEXPECTED as error:
            logger.debug("prompts are not shared: %s", error)
            sharing = False
    return Support(generation, scoring, sharing, window, trial.cache_bytes)


def inspect_adapters(forward: Forward, adapters: Adapters, names: Sequence[str]) -> str | None:
    """Return why rows with these adapters cannot run together, after comparing one row of each with a pass of its own; None when they can.

    A layer that is given tokens instead of rows (in a mixture's experts, or because the model flattens its batch) cannot tell whose they are.
    """
    vocabulary = forward.head.weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, 3), generator=torch.Generator().manual_seed(0)).to(forward.device)
    positions = torch.arange(3, device=ids.device)[None]

    def scores(count: int) -> Tensor:
        several = ids.expand(count, 3)
        return forward.last(several, torch.ones_like(several), positions.expand(count, 3), EngineCache(len(forward.blocks), 3))

    with torch.inference_mode(), adapters.running():
        try:
            alone = []
            for name in names:
                adapters.only = name
                alone.append(scores(1))
            adapters.only, adapters.passing = None, {len(names): by_adapter(names, forward.device)}
            expected = torch.cat(alone)
            # an adapter may be broken; its rows end by themselves
            whole = expected.isfinite().all(dim=1)
            return _compare(scores(len(names))[whole], expected[whole], "a batch of several adapters")
        except _UNEXPECTED as error:
            return f"a trial of several adapters in a batch failed ({type(error).__name__}: {error})"


def _obstacle(forward: Forward) -> tuple[str | None, int | None]:
    """Return what rules the engine out from the start, and the width of sliding windows."""
    config: Any = forward.model.config
    if getattr(forward.model, "_is_stateful", False):
        return "it keeps a recurrent state instead of keys and values", None
    try:
        layers: Sequence[Any] = DynamicCache(config=config).layers
    except _UNEXPECTED as error:
        return f"its cache cannot be told from its config ({error})", None
    other = sorted({type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__})
    if other or len(layers) != len(forward.blocks):
        return f"its cache is not one of keys and values per block ({', '.join(other) or f'{len(layers)} layers'})", None
    if forward.head is None:
        return "it has no output embeddings", None
    if "local" in getattr(config, "attention_layers", ()):
        # GPT-Neo's; the trial's texts are too short to tell
        return f"some of its blocks see {config.window_size} columns by a mask of their own", None
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"attn_implementation={implementation!r} takes no masks of one's own; sdpa and eager do", None
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return None, min(windows, default=None)


def _compare(found: Tensor, expected: Tensor, what: str) -> str | None:
    spread = float(expected.double().std()) or 1.0
    error = float((found.double() - expected.double()).abs().max()) / spread
    limit = _TOLERANCE.get(expected.dtype, 0.25)
    # a NaN compares false
    return None if error <= limit else f"{what} differs from the plain model in a trial (by {error:.1e} standard deviations of the scores)"


class _Trial:
    """Two short prompts with a common beginning, two rows each, run the plain way and the engine's way."""

    def __init__(self, forward: Forward, window: int | None) -> None:
        self._forward = forward
        self._blocks = len(forward.blocks)
        vocabulary = forward.head.weight.shape[0]
        draws = torch.randint(0, vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()
        # within any window: positions in a tree are not those of its columns
        size = 7 if window is None else min(window - 1, 7)
        self._prefix, rest = draws[:2], draws[2:size]
        self._rests = [rest, [draws[8]]]
        self._index = torch.tensor([0, 1, 1, 0])
        self._fork = max(self._blocks // 2 - 1, 0)
        self.cache_bytes = 0

    def _left(self, sequences: Sequence[Sequence[int]], before: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences])
        mask = torch.tensor([[1] * before + [0] * (width - len(s)) + [1] * len(s) for s in sequences])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
        return ids.to(self._forward.device), mask.to(self._forward.device), positions.to(self._forward.device)

    def batched(self) -> dict[tuple[str | int, ...], int]:
        """Return which of a block's tensor arguments grow with the number of sequences, and by how many entries each."""
        seen: list[dict[tuple[str | int, ...], Tensor]] = []
        for rows in (2, 3):
            ids, mask, positions = self._left([self._prefix + self._rests[0], *[self._prefix] * (rows - 1)])
            handle = self._forward.blocks[-1].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(tensors(args, kwargs)), with_kwargs=True
            )
            try:
                self._forward.last(ids, mask, positions, EngineCache(self._blocks, ids.shape[1]))
            finally:
                handle.remove()
        two, three = seen
        return {path: len(three[path]) - len(two[path]) for path in two if two[path].ndim and len(three[path]) > len(two[path])}

    def plain(self) -> Tensor:
        """Return the last scores of each row, from a pass of the model as it is."""
        ids, mask, positions = self._left([self._prefix + rest for rest in self._rests])
        takes = {"position_ids": positions} if self._forward.takes_positions else {}
        logits: Tensor = self._forward.model(input_ids=ids, attention_mask=mask, use_cache=False, **takes).logits
        return logits[:, -1][self._index]

    def _prefixed(self, capacity: int) -> EngineCache:
        cache = EngineCache(self._blocks, capacity)
        ids, mask, positions = self._left([self._prefix])
        self._forward.last(ids, mask, positions, cache, Fork(self._fork, torch.zeros(2, dtype=torch.int64)))
        cache.select(torch.zeros(2, dtype=torch.int64), range(self._fork + 1))
        return cache

    def generated(self) -> Tensor:
        """Return the same scores from a forked prompt pass and one step of rows, the last token being the step's."""
        heads, lasts = [rest[:-1] for rest in self._rests], [rest[-1] for rest in self._rests]
        width = max(map(len, heads))
        cache = self._prefixed(2 + width)
        cache.select(self._index, range(self._fork + 1, self._blocks))
        ids, mask, positions = self._left(heads, before=2)
        self._forward.last(ids, mask, positions, cache, Fork(self._fork, self._index))
        own = torch.arange(len(self._index))
        slab = EngineCache(self._blocks, 4 + width, rows=5, end=3 + width)
        slab.admit(cache, slice(0, 4), [self._index if block <= self._fork else own for block in range(self._blocks)])
        slab.columns.low = 1
        self.cache_bytes = slab.nbytes // (5 * (4 + width))
        last = torch.tensor([[lasts[i]] for i in self._index.tolist()]).to(self._forward.device)
        place = torch.tensor([[2 + len(heads[i])] for i in self._index.tolist()]).to(self._forward.device)
        mask = torch.cat([mask[self._index.to(mask.device)], torch.ones_like(last)], dim=1)
        return self._forward.last(last, mask, place, slab)

    def shared(self) -> Tensor:
        """Return the same scores from a step of rows that read one copy of their prompt."""
        texts = [self._prefix + rest for rest in self._rests]
        ids, mask, positions = self._left([text[:-1] for text in texts])
        cache = EngineCache(self._blocks, ids.shape[1])
        self._forward.last(ids, mask, positions, cache)
        prompts = SharedPrompts(self._blocks)
        prompts.replace([], cache, mask)
        prompts.assign(self._index.tolist())
        last = torch.tensor([[texts[i][-1]] for i in self._index.tolist()])
        place = torch.tensor([[len(texts[i]) - 1] for i in self._index.tolist()])
        with reading(prompts):
            return self._forward.last(last, torch.ones_like(last), place, EngineCache(self._blocks, 2))

    def scored(self) -> Tensor:
        """Return the same scores from a tree: after the common beginning both rests are branches of one sequence."""
        cache = self._prefixed(2 + sum(map(len, self._rests)))
        cache.select(torch.tensor([0]), range(self._fork + 1))
        one, other = (len(rest) for rest in self._rests)
        ids = torch.tensor([self._rests[0] + self._rests[1]]).to(self._forward.device)
        positions = torch.tensor([[*range(2, 2 + one), *range(2, 2 + other)]]).to(self._forward.device)
        seen = torch.ones(one + other, 2 + one + other, dtype=torch.bool).tril(2)
        seen[one:, 2 : 2 + one] = False
        rows, columns = torch.tensor([0, 1, 0, 1]), torch.tensor([one - 1, one + other - 1, one + other - 1, one - 1])
        return self._forward.at(
            ids, self._forward.mask(seen[None]), positions, cache, (rows, columns), Fork(self._fork, torch.zeros(2, dtype=torch.int64))
        )
