"""Log-likelihoods by token trees: what requests share runs once, and below the first steered block once for all specs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Fork, Forward
from steered_lm.engine.passes import Part, Stage
from steered_lm.engine.rows import Scored
from steered_lm.engine.sites import SpecSites
from steered_lm.steering.hooks import Table

# Rows of scores that are normalised at once.
LOGIT_ROWS = 512


@dataclass
class ScoreCost:
    """What a run took: passes, tokens through the blocks below and above the fork, and the cache's bytes at most."""

    passes: int = 0
    lower_tokens: int = 0
    upper_tokens: int = 0
    cache_bytes: int = 0


class _Piece(NamedTuple):
    """The tokens of a pass: ids, position in the text (-1: padding) and branch (0 trunk, then one a continuation, -1 padding)."""

    ids: Int[Tensor, "sequences width"]
    positions: Int[Tensor, "sequences width"]
    branches: Int[Tensor, "sequences width"]


class TreeScorer:
    """One run over contexts, their continuations, and specs."""

    def __init__(self, forward: Forward, sites: SpecSites, tables: dict[int, Table], softmax_dtype: torch.dtype | None = None) -> None:
        """Prepare a run.

        Args:
            forward: runs the model.
            sites: the distinct specs of the run.
            tables: what the steering hooks apply; changed here between passes.
            softmax_dtype: of the log-softmax; None is float32, or float64 for a float64 model.
        """
        self._forward, self._sites, self._tables = forward, sites, tables
        self._dtype = softmax_dtype
        self._blocks = len(forward.blocks)
        self.cost = ScoreCost()

    def run(self, stages: Sequence[Stage], done: Callable[[int, Sequence[int], list[list[Scored]]], None]) -> None:
        """Score every continuation of every context under each of its specs.

        Args:
            stages: what to score, pass by pass.
            done: is told a context's number, the specs that were run on it, by their place in the context, and their results,
                ``[spec][continuation]``.
        """
        for stage in stages:
            self._run_stage(stage, done)

    def _run_stage(self, stage: Stage, done: Callable[[int, Sequence[int], list[list[Scored]]], None]) -> None:
        shared = self._prefix(stage) if stage.beginning else None
        for parts in stage.passes:
            for part, results in zip(parts, self._score(stage, parts, shared), strict=True):
                done(part.number, [part.context.specs[spec] for spec in part.specs], results)

    def _prefix(self, stage: Stage) -> EngineCache:
        """Run a common beginning: once for all specs when it is not steered, else once up to the fork and once a spec above it."""
        tokens, specs, device = stage.beginning, stage.specs, self._forward.device
        ids = torch.tensor([tokens], device=device)
        positions = torch.arange(len(tokens), device=device)[None]
        cache = EngineCache(self._blocks, len(tokens))
        self._tables.clear()
        fork = None
        if not stage.late:
            numbers = torch.tensor(specs)
            self._tables.update(self._sites.tables(numbers, torch.full_like(numbers, len(tokens)), positions.expand(len(specs), -1)))
            fork = Fork(self._sites.fork, torch.zeros(len(specs), dtype=torch.int64)) if len(specs) > 1 else None
        self._forward.last(ids, torch.ones_like(ids), positions, cache, fork)
        self._count(1, len(specs) if fork else 1, len(tokens), cache)
        return cache

    def _score(self, stage: Stage, batch: Sequence[Part], shared: EngineCache | None) -> list[list[list[Scored]]]:
        shape, prefix = stage.shape(batch), len(stage.beginning)
        numbers = torch.tensor([spec for part in batch for spec in part.specs])
        sequence = torch.tensor([i for i, part in enumerate(batch) for _ in part.specs])
        split = torch.tensor([part.context.key.split for part in batch])[sequence]
        fork = Fork(self._sites.fork, sequence) if shape.forked else None
        # With several specs and an unsteered context, the context runs once and only what follows it is fanned out.
        trunks = [part.context.key.tokens[prefix:] for part in batch]
        head = [trunk[:-1] if shape.head else () for trunk in trunks]
        first = _pieces(head, [[] for _ in trunks], [prefix] * len(batch))
        starts = [prefix + len(tokens) for tokens in head]
        tails = [trunk[len(tokens) :] for trunk, tokens in zip(trunks, head, strict=True)]
        second = _pieces(tails, [list(part.context.continuations) for part in batch], starts)
        assert (first.ids.shape[1], second.ids.shape[1]) == (shape.head, shape.tail), "a pass is as wide as it was planned to be"
        cache = self._begin(stage, batch, shared, shape.columns)
        seen = torch.ones(len(batch), prefix, dtype=torch.bool)
        if first.ids.shape[1]:
            self._tables.clear()
            mask = self._forward.mask(_tree_mask(first.branches, seen))
            device = self._forward.device
            self._forward.last(first.ids.to(device), mask, first.positions.clamp(min=0).to(device), cache)
            self._count(len(batch), len(batch), first.ids.shape[1], cache)
            seen = torch.cat([seen, first.branches >= 0], dim=1)
        if fork and stage.late and cache.columns.visible:
            cache.select(sequence, range(self._sites.fork + 1, self._blocks))
        self._tables.clear()
        self._tables.update(self._sites.tables(numbers, split, second.positions[sequence]))
        reads = _Reads.of(batch, tails)
        mask = self._forward.mask(_tree_mask(second.branches, seen))
        device = self._forward.device
        logits = self._forward.at(second.ids.to(device), mask, second.positions.clamp(min=0).to(device), cache, (reads.rows, reads.columns), fork)
        self._count(len(batch), len(sequence), second.ids.shape[1], cache)
        return self._collect(batch, reads, logits)

    def _begin(self, stage: Stage, batch: Sequence[Part], shared: EngineCache | None, capacity: int) -> EngineCache:
        if shared is None:
            return EngineCache(self._blocks, capacity)
        lower = torch.zeros(len(batch), dtype=torch.int64)
        place = {spec: i for i, spec in enumerate(stage.specs)}
        upper = lower if stage.late else torch.tensor([place[spec] for part in batch for spec in part.specs])
        return shared.branched([lower if block <= self._sites.fork else upper for block in range(self._blocks)], capacity)

    def _collect(self, batch: Sequence[Part], reads: "_Reads", logits: Float[Tensor, "places vocab"]) -> list[list[list[Scored]]]:
        device = logits.device
        places, targets, segments = reads.places.to(device), reads.targets.to(device), reads.segments.to(device)
        normaliser, best = _normaliser(logits, self._dtype)
        values = logits[places, targets].to(normaliser.dtype) - normaliser[places]
        sums = torch.zeros(reads.answers, dtype=torch.float64, device=device).index_add_(0, segments, values.double()).tolist()
        misses = torch.zeros(reads.answers, dtype=torch.int64, device=device).index_add_(0, segments, (best[places] != targets).long()).tolist()
        found = iter(Scored(total, not missed) for total, missed in zip(sums, misses, strict=True))
        return [[[next(found) for _ in part.context.continuations] for _ in part.specs] for part in batch]

    def _count(self, lower: int, upper: int, width: int, cache: EngineCache) -> None:
        self.cost.passes += 1
        self.cost.lower_tokens += lower * width
        self.cost.upper_tokens += upper * width
        self.cost.cache_bytes = max(self.cost.cache_bytes, cache.nbytes)


class _Reads(NamedTuple):
    """Which scores are read: (row, column) of each place; and place, token and answer of each target."""

    rows: Int[Tensor, " places"]
    columns: Int[Tensor, " places"]
    places: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    segments: Int[Tensor, " targets"]
    answers: int

    @classmethod
    def of(cls, batch: Sequence[Part], tails: Sequence[Sequence[int]]) -> "_Reads":
        """Return the reads of a batch, in the order: context, spec, continuation."""
        rows: list[int] = []
        columns: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        segments: list[int] = []
        row = segment = 0
        for part, tail in zip(batch, tails, strict=True):
            last = len(tail) - 1
            for _ in part.specs:
                base, used = len(rows), 0
                for tokens in part.context.continuations:
                    # the context's last token predicts the first target, each of the continuation's own the next
                    places += [base, *range(base + 1 + used, base + used + len(tokens))]
                    targets += tokens
                    segments += [segment] * len(tokens)
                    used += len(tokens) - 1
                    segment += 1
                columns += range(last, last + 1 + used)
                rows += [row] * (1 + used)
                row += 1
        read, target = (torch.tensor(rows), torch.tensor(columns)), (torch.tensor(places), torch.tensor(targets), torch.tensor(segments))
        return cls(*read, *target, segment)


def _pieces(trunks: Sequence[Sequence[int]], continuations: Sequence[Sequence[tuple[int, ...]]], starts: Sequence[int]) -> _Piece:
    """Return the tokens of a pass, padded on the right; of a continuation all but its last token, which nothing is read from."""
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    branches: list[list[int]] = []
    for trunk, branching, start in zip(trunks, continuations, starts, strict=True):
        row, place, branch = list(trunk), list(range(start, start + len(trunk))), [0] * len(trunk)
        for number, tokens in enumerate(branching, start=1):
            row += tokens[:-1]
            place += range(start + len(trunk), start + len(trunk) + len(tokens) - 1)
            branch += [number] * (len(tokens) - 1)
        ids.append(row)
        positions.append(place)
        branches.append(branch)
    width = max(map(len, ids))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)

    return _Piece(padded(ids, 0), padded(positions, -1), padded(branches, -1))


def _tree_mask(branches: Int[Tensor, "sequences width"], seen: Bool[Tensor, "sequences past"]) -> Bool[Tensor, "sequences width past+width"]:
    """Return who sees whom: the past, the trunk, and one's own branch, never what comes later. Padding sees itself, so that no row is empty."""
    width = branches.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    own = earlier & ((branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None]))
    return torch.cat([seen[:, None, :].expand(-1, width, -1), own], dim=2)


def _normaliser(logits: Float[Tensor, "places vocab"], dtype: torch.dtype | None) -> tuple[Float[Tensor, " places"], Int[Tensor, " places"]]:
    """Return the log of the normaliser of each row's softmax and its likeliest token, a few rows at a time."""
    dtype = dtype or (logits.dtype if logits.dtype == torch.float64 else torch.float32)
    best = logits.argmax(dim=-1)
    return torch.cat([part.to(dtype).logsumexp(dim=-1) for part in logits.split(LOGIT_ROWS)]), best
