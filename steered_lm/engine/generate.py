"""Generation for a whole population: prompts once, rows that come and go, one step for all of them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steered_lm.engine.adapters import Adapters, Group, by_adapter
from steered_lm.engine.attention import SharedPrompts, reading
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Fork, Forward
from steered_lm.engine.generation_plan import GenerationPlan, columns, common_prefix
from steered_lm.engine.rows import Ended, Generated, GenerationRow
from steered_lm.engine.sampling import Sampler
from steered_lm.engine.sites import PassTable, SpecSites
from steered_lm.engine.stops import Stops
from steered_lm.steering.hooks import Table

# A prompt, and the number of its adapter: with another one it has other keys and values, from the first block on.
_Prompt = tuple[tuple[int, ...], int]
# A prompt, and whether it is steered.
_Key = tuple[_Prompt, bool]


@dataclass
class GenerationCost:
    """What a run took: seconds for prompts and for steps, tokens through the model for each, and the cache's bytes at most."""

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_passes: int = 0
    steps: int = 0
    row_steps: int = 0
    cache_bytes: int = 0


@dataclass
class _Batch:
    """The rows that are being generated; slot ``i`` of every tensor belongs to row ``rows[i]``."""

    cache: EngineCache
    mask: Int[Tensor, "slots columns"]
    shared: SharedPrompts | None = None
    prompts: dict[_Key, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    feed: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tables: dict[int, Table] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)


class _Prompts(NamedTuple):
    """Prompts that have run.

    Attributes:
        logits: next-token scores, a row each.
        cache: keys and values, a row a prompt up to the fork, and a row each above it.
        mask: which columns are tokens, a row a prompt.
        sequence: which prompt each row has.
    """

    logits: Float[Tensor, "rows vocab"]
    cache: EngineCache
    mask: Int[Tensor, "prompts columns"]
    sequence: Int[Tensor, " rows"]


class Population:
    """One run over rows that share prompts, specs, or nothing."""

    def __init__(
        self,
        forward: Forward,
        sites: SpecSites,
        tables: dict[int, Table],
        rows: Sequence[GenerationRow],
        numbers: Sequence[int],
        plan: GenerationPlan,
        stops: Stops,
        done: Callable[[int, Generated], None],
        adapters: Adapters | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            forward: runs the model.
            sites: the distinct specs of the run.
            tables: what the steering hooks apply; changed here between passes.
            rows: what to generate.
            numbers: for each row, the number of its spec.
            plan: how much runs at once.
            stops: says when a row ends.
            done: is told each row's continuation as soon as it is complete.
            adapters: is told which row of a pass has which adapter; None when rows name none, or all the same.
        """
        self._forward, self._sites, self._tables, self._plan = forward, sites, tables, plan
        self._rows, self._stops, self._done = rows, stops, done
        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        self._adapters, self._names = adapters, sorted({row.adapter or "" for row in rows})
        self._adapter = [self._names.index(row.adapter or "") for row in rows]
        self._split = torch.tensor([len(row.tokens) - 1 for row in rows])
        self._written: list[list[int]] = [[] for _ in rows]
        self._blocks = len(forward.blocks)
        # with every block sharing prompts, what the rows' own cache holds begins with the prompt's last token
        self._whole = plan.shared == self._blocks
        self._before = 0 if self._whole else max(len(row.tokens) for row in rows)
        self._common = common_prefix(list({row.tokens: None for row in rows})) if plan.prefixes else 0
        self.cost = GenerationCost()

    def run(self, vocabulary: int) -> None:
        """Generate every row."""
        rows, plan = self._rows, self._plan
        sampler = Sampler(rows, vocabulary, self._forward.device)
        # rows of one prompt stay together, so that it runs once for as many of them as fit; long ones first
        waiting = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), *self._prompt(i), self._sites.early[self._numbers[i]]), reverse=True)
        slots = min(len(rows), plan.rows)
        assert self._whole or not plan.shared or slots == len(rows), "prompts are shared in part only when all rows come at once"
        capacity = columns(rows, slots, shared=self._whole)
        cache = EngineCache(self._blocks, capacity, rows=slots, end=self._before, without=0 if self._whole else plan.shared)
        shared = SharedPrompts(plan.shared) if plan.shared else None
        batch = _Batch(cache, torch.zeros(slots, capacity, dtype=torch.int64, device=self._forward.device), shared)
        while waiting or batch.rows:
            free = slots - len(batch.rows)
            if waiting and (not batch.rows or free >= max(1, slots // 8)):
                started = perf_counter()
                self._refill(batch, [waiting.pop() for _ in range(min(free, len(waiting)))], sampler)
                self.cost.prompt_seconds += perf_counter() - started
            if batch.rows:
                started = perf_counter()
                self._step(batch, sampler)
                self.cost.decode_seconds += perf_counter() - started
        self.cost.cache_bytes = max(self.cost.cache_bytes, cache.nbytes + (shared.nbytes if shared is not None else 0))

    # -- prompts ------------------------------------------------------------------------------------------------------------------

    def _refill(self, batch: _Batch, rows: list[int], sampler: Sampler) -> None:
        if not batch.rows:
            batch.cache.columns.low = batch.cache.columns.end = self._before
        for part in self._parts(rows):
            self.cost.prompt_passes += 1
            if self._whole:
                self._share(batch, part)
                continue
            prompts = self._prompts(part)
            tokens, broken = sampler.choose(prompts.logits, part)
            kept = [place for place, row in enumerate(part) if not self._append(row, tokens[place], broken[place])]
            self.cost.cache_bytes = max(self.cost.cache_bytes, batch.cache.nbytes + prompts.cache.nbytes)
            if kept:
                self._admit(batch, prompts, part, kept, tokens)
        self._settle(batch, list(range(len(batch.rows))))

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Split rows into passes: those whose prompts are steered apart from those that share theirs whole, none wider than the plan allows."""
        parts: list[list[int]] = []
        for early in (False, True):
            part: list[int] = []
            width, sequences = 0, set[_Prompt]()
            for row in (row for row in rows if self._sites.early[self._numbers[row]] is early):
                prompt = self._prompt(row)
                size = (len(part) + 1 if early else len(sequences | {prompt})) * (max(width, len(prompt[0])) - self._common)
                if part and size > self._plan.prompt_tokens:
                    parts.append(part)
                    part, width, sequences = [], 0, set()
                part.append(row)
                width, sequences = max(width, len(prompt[0])), sequences | {prompt}
            if part:
                parts.append(part)
        return parts

    def _prompts(self, rows: Sequence[int]) -> _Prompts:
        prompts = list(dict.fromkeys(self._prompt(row) for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        sequence = torch.tensor([place[self._prompt(row)] for row in rows])
        prefix = self._prefix(prompts)
        if len(prompts) < len(rows) and not self._sites.early[self._numbers[rows[0]]]:
            return self._shared_prompts(rows, prompts, sequence, prefix)
        return self._own_prompts(rows, prompts, sequence, prefix)

    def _prompt(self, row: int) -> _Prompt:
        return self._rows[row].tokens, self._adapter[row]

    def _prefix(self, prompts: Sequence[_Prompt]) -> int:
        return common_prefix(list({tokens: None for tokens, _ in prompts})) if self._plan.prefixes else 0

    def _key(self, row: int) -> _Key:
        """Return what rows have to have in common to read one copy of a prompt."""
        return self._prompt(row), self._sites.early[self._numbers[row]] and not self._whole

    def _share(self, batch: _Batch, rows: Sequence[int]) -> None:
        """Run prompts but for their last token, which is each row's first step, and keep one copy of each."""
        shared = batch.shared
        assert shared is not None, "every block shares prompts"
        read = sorted({batch.prompts[self._key(row)] for row in batch.rows})
        kept = {key: read.index(number) for key, number in batch.prompts.items() if number in read}
        new = [prompt for prompt in dict.fromkeys(self._prompt(row) for row in rows) if (prompt, False) not in kept]
        cache: EngineCache | None = None
        mask: Tensor | None = None
        if new:
            cache, mask = self._unsteered(new, self._prefix(new))
            self.cost.cache_bytes = max(self.cost.cache_bytes, batch.cache.nbytes + shared.nbytes + cache.nbytes)
        shared.replace(read, cache, mask)
        batch.prompts = kept | {(prompt, False): len(read) + number for number, prompt in enumerate(new)}
        batch.mask[len(batch.rows) : len(batch.rows) + len(rows)] = 0
        for row in rows:
            tokens = self._rows[row].tokens
            batch.rows.append(row)
            batch.starts.append(batch.cache.columns.end)
            batch.feed.append(tokens[-1])
            batch.positions.append(len(tokens) - 1)

    def _unsteered(self, prompts: list[_Prompt], prefix: int) -> tuple[EngineCache, Tensor]:
        """Run prompts but for their last token through all blocks, without steering, with room for that token."""
        ids, mask, positions = _padded([tokens[prefix:-1] for tokens, _ in prompts], prefix, self._forward.device)
        cache = EngineCache(self._blocks, prefix + ids.shape[1] + 1)
        self._tables.clear()
        if prefix:
            cache.select(self._run_prefix(prompts, prefix, cache), range(self._blocks))
        if ids.shape[1]:
            self._adapt([adapter for _, adapter in prompts])
            self._forward.last(ids, mask, positions, cache)
        return cache, mask

    def _shared_prompts(self, rows: Sequence[int], prompts: list[_Prompt], sequence: Tensor, prefix: int) -> _Prompts:
        """Nothing is steered before the last prompt token: all that precedes it runs once per prompt, through every block."""
        cache, mask = self._unsteered(prompts, prefix)
        if cache.columns.visible:
            cache.select(sequence, range(self._sites.fork + 1, self._blocks))
        last = torch.tensor([[tokens[-1]] for tokens, _ in prompts], device=mask.device)
        place = torch.tensor([[len(tokens) - 1] for tokens, _ in prompts], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(last)], dim=1)
        self._steer(rows, place[sequence])
        self._adapt([adapter for _, adapter in prompts], [self._adapter[row] for row in rows])
        logits = self._forward.last(last, mask, place, cache, Fork(self._sites.fork, sequence))
        return _Prompts(logits, cache, mask, sequence)

    def _own_prompts(self, rows: Sequence[int], prompts: list[_Prompt], sequence: Tensor, prefix: int) -> _Prompts:
        """Prompts are steered, or a row's alone: blocks up to the first steered one run once per prompt, the others once per row."""
        ids, mask, positions = _padded([tokens[prefix:] for tokens, _ in prompts], prefix, self._forward.device)
        cache = EngineCache(self._blocks, prefix + ids.shape[1])
        fork = Fork(self._sites.fork, sequence) if len(prompts) < len(rows) else None
        self._tables.clear()
        if prefix and self._sites.early[self._numbers[rows[0]]]:
            pairs = torch.stack([torch.tensor([self._adapter[row] for row in rows]), self._numbers[list(rows)]], dim=1)
            kinds, of_row = pairs.unique(dim=0, return_inverse=True)
            where = torch.arange(prefix).expand(len(kinds), prefix)
            self._tables.update(self._sites.tables(kinds[:, 1], torch.full((len(kinds),), prefix), where))
            cache.select(self._run_prefix(prompts, prefix, cache, kinds[:, 0].tolist()), range(self._sites.fork + 1))
            cache.select(of_row, range(self._sites.fork + 1, self._blocks))
        elif prefix:
            cache.select(self._run_prefix(prompts, prefix, cache), range(self._blocks))
        real = mask[:, prefix:] > 0
        self._steer(rows, torch.where(real, positions, -1)[sequence.to(real.device)])
        self._adapt([adapter for _, adapter in prompts], [self._adapter[row] for row in rows])
        logits = self._forward.last(ids, mask, positions, cache, fork)
        return _Prompts(logits, cache, mask, sequence)

    def _run_prefix(self, prompts: Sequence[_Prompt], prefix: int, cache: EngineCache, kinds: Sequence[int] | None = None) -> Tensor:
        """Run what all prompts begin with, once per adapter, and return which of these sequences each prompt continues.

        Args:
            prompts: the prompts.
            prefix: how many tokens they begin with.
            cache: where keys and values go.
            kinds: in ascending order the adapters of the rows that part ways at the fork; None when none do.
        """
        own = sorted({adapter for _, adapter in prompts})
        ids = torch.tensor([prompts[0][0][:prefix]] * len(own), device=self._forward.device)
        positions = torch.arange(prefix, device=ids.device).expand(len(own), prefix)
        fork = None if kinds is None else Fork(self._sites.fork, torch.tensor([own.index(adapter) for adapter in kinds]))
        self._adapt(own, kinds or own)
        self._forward.last(ids, torch.ones_like(ids), positions, cache, fork)
        return torch.tensor([own.index(adapter) for _, adapter in prompts])

    def _adapt(self, sequences: Sequence[int], rows: Sequence[int] = ()) -> None:
        """Tell the layers each sequence's adapter for the next pass, and each row's behind its fork; as many rows as sequences are the same ones."""
        if self._adapters is not None:
            self._adapters.passing = {len(entries): self._groups(entries) for entries in (sequences, rows)}

    def _groups(self, entries: Sequence[int]) -> list[Group]:
        return by_adapter([self._names[adapter] for adapter in entries], self._forward.device)

    def _steer(self, rows: Sequence[int], positions: Tensor) -> None:
        chosen = torch.tensor(list(rows))
        self._tables.clear()
        self._tables.update(self._sites.tables(self._numbers[chosen], self._split[chosen], positions))

    def _admit(self, batch: _Batch, prompts: _Prompts, part: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        chosen, first = torch.tensor(kept), len(batch.rows)
        slots, width = slice(first, first + len(kept)), prompts.mask.shape[1]
        end = batch.cache.columns.end
        of_prompt = prompts.sequence[chosen]
        if batch.shared is not None:
            known = len(batch.shared)
            batch.shared.replace(range(known), prompts.cache, prompts.mask)
            batch.prompts |= {self._key(part[place]): known + int(number) for place, number in zip(kept, of_prompt, strict=True)}
        # up to the fork a row takes its prompt's keys and values, above it its own
        indices = [of_prompt if block <= self._sites.fork else chosen for block in range(self._blocks)]
        batch.cache.admit(prompts.cache, slots, indices, self._plan.shared)
        batch.mask[slots] = 0
        batch.mask[slots, end - width : end] = prompts.mask[of_prompt.to(prompts.mask.device)]
        for place in kept:
            row = part[place]
            batch.rows.append(row)
            batch.starts.append(end - width)
            batch.feed.append(tokens[place])
            batch.positions.append(len(self._rows[row].tokens))
        batch.cache.columns.low = min(batch.starts)

    # -- steps --------------------------------------------------------------------------------------------------------------------

    def _step(self, batch: _Batch, sampler: Sampler) -> None:
        cache, live = batch.cache, len(batch.rows)
        if cache.columns.end == cache.columns.capacity:
            self._rebase(batch)
        low, end = cache.columns.low, cache.columns.end
        batch.mask[:live, end] = 1
        device = batch.mask.device
        positions = torch.tensor(batch.positions, device=device)[:, None]
        for table in batch.tables.values():
            assert isinstance(table, PassTable)
            table.positions = positions
        self._tables.clear()
        self._tables.update(batch.tables)
        if self._adapters is not None:
            self._adapters.passing = {live: batch.groups}
        ids = torch.tensor(batch.feed, device=device)[:, None]
        with reading(batch.shared) if batch.shared is not None else nullcontext():
            logits = self._forward.last(ids, batch.mask[:live, low : end + 1], positions, cache)
        tokens, broken = sampler.choose(logits, batch.rows)
        batch.feed = tokens
        batch.positions = [position + 1 for position in batch.positions]
        self.cost.steps += 1
        self.cost.row_steps += live
        kept = [slot for slot, row in enumerate(batch.rows) if not self._append(row, tokens[slot], broken[slot])]
        if any(broken):
            cache.clear([slot for slot in range(live) if broken[slot]])
        if len(kept) < live:
            self._settle(batch, kept)

    def _settle(self, batch: _Batch, kept: list[int]) -> None:
        """Keep the slots ``kept``: rows from the end move into the gaps, and the tables follow."""
        count = len(kept)
        order = list(range(count))
        stay = set(kept)
        gaps = [slot for slot in range(count) if slot not in stay]
        movers = [slot for slot in kept if slot >= count]
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        batch.cache.move(movers, gaps)
        if movers:
            batch.mask[gaps] = batch.mask[movers]
        batch.rows, batch.starts = [batch.rows[i] for i in order], [batch.starts[i] for i in order]
        batch.feed, batch.positions = [batch.feed[i] for i in order], [batch.positions[i] for i in order]
        if batch.rows:
            batch.cache.columns.low = min(batch.starts)
            if batch.shared is not None:
                batch.shared.assign([batch.prompts[self._key(row)] for row in batch.rows])
            chosen = torch.tensor(batch.rows)
            batch.tables = self._sites.tables(self._numbers[chosen], self._split[chosen], torch.zeros(count, 1, dtype=torch.int64))
            batch.groups = self._groups([self._adapter[row] for row in batch.rows]) if self._adapters is not None else []

    def _rebase(self, batch: _Batch) -> None:
        columns, live = batch.cache.columns, len(batch.rows)
        low, width = columns.low, columns.visible
        end = max(width, self._before)
        assert end < columns.end, "the cache has no room for the next token"
        held = batch.mask[:live, low : low + width].clone()
        batch.cache.rebase(live, end)
        batch.mask[:live] = 0
        batch.mask[:live, end - width : end] = held
        batch.starts = [start - low + end - width for start in batch.starts]

    def _append(self, row: int, token: int, broken: bool) -> bool:
        """Note a token and return whether its row has ended."""
        written = self._written[row]
        written.append(token)
        ended: Ended | None = "nan" if broken else self._stops.ended(self._rows[row], written)
        if ended is not None:
            self._done(row, Generated(tuple(written), ended))
        return ended is not None


def _padded(sequences: Sequence[Sequence[int]], prefix: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids ``[sequences, width]`` padded on the left, a mask that also covers ``prefix`` columns before them, and positions."""
    width = max(map(len, sequences))
    ids, positions = torch.zeros(len(sequences), width, dtype=torch.int64), torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.ones(len(sequences), prefix + width, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        gap = width - len(tokens)
        ids[row, gap:] = torch.tensor(tokens, dtype=torch.int64)
        positions[row, gap:] = torch.arange(prefix, prefix + len(tokens))
        mask[row, prefix : prefix + gap] = 0
    return ids.to(device), mask.to(device), positions.to(device)
