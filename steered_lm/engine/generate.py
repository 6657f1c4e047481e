"""Generation for a whole population: prompts once, rows that come and go, one step for all of them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch
from jaxtyping import Int
from torch import Tensor

from steered_lm.engine.adapters import Adapters, Group
from steered_lm.engine.attention import SharedPrompts, reading
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Forward
from steered_lm.engine.generation_plan import GenerationPlan, columns
from steered_lm.engine.prompts import FinishedPrompts, PromptPasses
from steered_lm.engine.roster import Prompt, Roster
from steered_lm.engine.rows import Ended, Generated, GenerationRow
from steered_lm.engine.sampling import Sampler
from steered_lm.engine.sites import PassTable, SpecSites
from steered_lm.engine.stops import Stops
from steered_lm.steering.hooks import Table

# A prompt, and whether it is steered.
_Key = tuple[Prompt, bool]


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
        self._forward, self._tables, self._plan, self._adapters = forward, tables, plan, adapters
        self._rows, self._stops, self._done = rows, stops, done
        self._roster = Roster(rows, sites, numbers, forward.device)
        self._prompts = PromptPasses(forward, self._roster, tables, plan, adapters)
        self._written: list[list[int]] = [[] for _ in rows]
        self._blocks = len(forward.blocks)
        # with every block sharing prompts, what the rows' own cache holds begins with the prompt's last token
        self._whole = plan.shared == self._blocks
        self._before = 0 if self._whole else max(len(row.tokens) for row in rows)
        self.cost = GenerationCost()

    def run(self, vocabulary: int) -> None:
        """Generate every row."""
        rows, plan = self._rows, self._plan
        sampler = Sampler(rows, vocabulary, self._forward.device)
        # rows of one prompt stay together, so that it runs once for as many of them as fit; long ones first
        waiting = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), *self._roster.prompt(i), self._roster.early(i)), reverse=True)
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
        for part in self._prompts.parts(rows):
            self.cost.prompt_passes += 1
            if self._whole:
                self._share(batch, part)
                continue
            prompts = self._prompts.run(part)
            tokens, broken = sampler.choose(prompts.logits, part)
            kept = [place for place, row in enumerate(part) if not self._append(row, tokens[place], broken[place])]
            self.cost.cache_bytes = max(self.cost.cache_bytes, batch.cache.nbytes + prompts.cache.nbytes)
            if kept:
                self._admit(batch, prompts, part, kept, tokens)
        self._settle(batch, list(range(len(batch.rows))))

    def _key(self, row: int) -> _Key:
        """Return what rows have to have in common to read one copy of a prompt."""
        return self._roster.prompt(row), self._roster.early(row) and not self._whole

    def _share(self, batch: _Batch, rows: Sequence[int]) -> None:
        """Run prompts but for their last token, which is each row's first step, and keep one copy of each."""
        shared = batch.shared
        assert shared is not None, "every block shares prompts"
        read = sorted({batch.prompts[self._key(row)] for row in batch.rows})
        kept = {key: read.index(number) for key, number in batch.prompts.items() if number in read}
        new = [prompt for prompt in dict.fromkeys(self._roster.prompt(row) for row in rows) if (prompt, False) not in kept]
        cache: EngineCache | None = None
        mask: Tensor | None = None
        if new:
            cache, mask = self._prompts.unsteered(new)
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

    def _admit(self, batch: _Batch, prompts: FinishedPrompts, part: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        chosen, first = torch.tensor(kept), len(batch.rows)
        slots, width = slice(first, first + len(kept)), prompts.mask.shape[1]
        end = batch.cache.columns.end
        of_prompt = prompts.sequence[chosen]
        if batch.shared is not None:
            known = len(batch.shared)
            batch.shared.replace(range(known), prompts.cache, prompts.mask)
            batch.prompts |= {self._key(part[place]): known + int(number) for place, number in zip(kept, of_prompt, strict=True)}
        # up to the fork a row takes its prompt's keys and values, above it its own
        indices = [of_prompt if block <= self._roster.sites.fork else chosen for block in range(self._blocks)]
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
            batch.tables = self._roster.tables(batch.rows, torch.zeros(count, 1, dtype=torch.int64))
            batch.groups = self._roster.groups([self._roster.adapters[row] for row in batch.rows]) if self._adapters is not None else []

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
