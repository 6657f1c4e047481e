"""Passes over prompts: what several have in common runs once, and what is steered runs once for each row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steered_lm.engine.adapters import Adapters
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Fork, Forward
from steered_lm.engine.generation_plan import GenerationPlan, common_prefix
from steered_lm.engine.roster import Prompt, Roster
from steered_lm.steering.hooks import Table


class FinishedPrompts(NamedTuple):
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


class PromptPasses:
    """Runs the prompts of a run's rows, each pass with its own steering."""

    def __init__(self, forward: Forward, roster: Roster, tables: dict[int, Table], plan: GenerationPlan, adapters: Adapters | None) -> None:
        """Prepare the passes.

        Args:
            forward: runs the model.
            roster: the rows.
            tables: what the steering hooks apply; changed here before each pass.
            plan: how much runs at once.
            adapters: is told which row of a pass has which adapter; None when rows name none, or all the same.
        """
        self._forward, self._roster, self._tables, self._adapters = forward, roster, tables, adapters
        self._blocks = len(forward.blocks)
        self._most, self._prefixes = plan.prompt_tokens, plan.prefixes
        self._common = self._prefix([roster.prompt(row) for row in range(len(roster.rows))])

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Split rows into passes: those whose prompts are steered apart from those that share theirs whole, none wider than the plan allows."""
        parts: list[list[int]] = []
        for early in (False, True):
            part: list[int] = []
            width, sequences = 0, set[Prompt]()
            for row in (row for row in rows if self._roster.early(row) is early):
                prompt = self._roster.prompt(row)
                size = (len(part) + 1 if early else len(sequences | {prompt})) * (max(width, len(prompt[0])) - self._common)
                if part and size > self._most:
                    parts.append(part)
                    part, width, sequences = [], 0, set()
                part.append(row)
                width, sequences = max(width, len(prompt[0])), sequences | {prompt}
            if part:
                parts.append(part)
        return parts

    def run(self, rows: Sequence[int]) -> FinishedPrompts:
        """Run the prompts of one of these parts."""
        prompts = list(dict.fromkeys(self._roster.prompt(row) for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        sequence = torch.tensor([place[self._roster.prompt(row)] for row in rows])
        if len(prompts) < len(rows) and not self._roster.early(rows[0]):
            return self._shared(rows, prompts, sequence)
        return self._own(rows, prompts, sequence)

    def unsteered(self, prompts: list[Prompt]) -> tuple[EngineCache, Tensor]:
        """Run prompts but for their last token through all blocks, without steering, with room for that token; return their cache and mask."""
        prefix = self._prefix(prompts)
        ids, mask, positions = _padded([tokens[prefix:-1] for tokens, _ in prompts], prefix, self._forward.device)
        cache = EngineCache(self._blocks, prefix + ids.shape[1] + 1)
        self._tables.clear()
        if prefix:
            cache.select(self._run_prefix(prompts, prefix, cache), range(self._blocks))
        if ids.shape[1]:
            self._adapt([adapter for _, adapter in prompts])
            self._forward.last(ids, mask, positions, cache)
        return cache, mask

    def _shared(self, rows: Sequence[int], prompts: list[Prompt], sequence: Tensor) -> FinishedPrompts:
        """Nothing is steered before the last prompt token: all that precedes it runs once per prompt, through every block."""
        cache, mask = self.unsteered(prompts)
        if cache.columns.visible:
            cache.select(sequence, range(self._roster.sites.fork + 1, self._blocks))
        last = torch.tensor([[tokens[-1]] for tokens, _ in prompts], device=mask.device)
        place = torch.tensor([[len(tokens) - 1] for tokens, _ in prompts], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(last)], dim=1)
        self._steer(rows, place[sequence])
        self._adapt([adapter for _, adapter in prompts], [self._roster.adapters[row] for row in rows])
        logits = self._forward.last(last, mask, place, cache, Fork(self._roster.sites.fork, sequence))
        return FinishedPrompts(logits, cache, mask, sequence)

    def _own(self, rows: Sequence[int], prompts: list[Prompt], sequence: Tensor) -> FinishedPrompts:
        """Prompts are steered, or a row's alone: blocks up to the first steered one run once per prompt, the others once per row."""
        prefix = self._prefix(prompts)
        ids, mask, positions = _padded([tokens[prefix:] for tokens, _ in prompts], prefix, self._forward.device)
        cache = EngineCache(self._blocks, prefix + ids.shape[1])
        fork = Fork(self._roster.sites.fork, sequence) if len(prompts) < len(rows) else None
        self._tables.clear()
        if prefix and self._roster.early(rows[0]):
            pairs = torch.stack([torch.tensor([self._roster.adapters[row] for row in rows]), self._roster.specs[list(rows)]], dim=1)
            kinds, of_row = pairs.unique(dim=0, return_inverse=True)
            where = torch.arange(prefix).expand(len(kinds), prefix)
            self._tables.update(self._roster.sites.tables(kinds[:, 1], torch.full((len(kinds),), prefix), where))
            cache.select(self._run_prefix(prompts, prefix, cache, kinds[:, 0].tolist()), range(self._roster.sites.fork + 1))
            cache.select(of_row, range(self._roster.sites.fork + 1, self._blocks))
        elif prefix:
            cache.select(self._run_prefix(prompts, prefix, cache), range(self._blocks))
        real = mask[:, prefix:] > 0
        self._steer(rows, torch.where(real, positions, -1)[sequence.to(real.device)])
        self._adapt([adapter for _, adapter in prompts], [self._roster.adapters[row] for row in rows])
        logits = self._forward.last(ids, mask, positions, cache, fork)
        return FinishedPrompts(logits, cache, mask, sequence)

    def _run_prefix(self, prompts: Sequence[Prompt], prefix: int, cache: EngineCache, kinds: Sequence[int] | None = None) -> Tensor:
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
        fork = None if kinds is None else Fork(self._roster.sites.fork, torch.tensor([own.index(adapter) for adapter in kinds]))
        self._adapt(own, kinds or own)
        self._forward.last(ids, torch.ones_like(ids), positions, cache, fork)
        return torch.tensor([own.index(adapter) for _, adapter in prompts])

    def _adapt(self, sequences: Sequence[int], rows: Sequence[int] = ()) -> None:
        """Tell the layers each sequence's adapter for the next pass, and each row's behind its fork; as many rows as sequences are the same ones."""
        if self._adapters is not None:
            self._adapters.passing = {len(entries): self._roster.groups(entries) for entries in (sequences, rows)}

    def _steer(self, rows: Sequence[int], positions: Tensor) -> None:
        self._tables.clear()
        self._tables.update(self._roster.tables(rows, positions))

    def _prefix(self, prompts: Sequence[Prompt]) -> int:
        return common_prefix(list({tokens: None for tokens, _ in prompts})) if self._prefixes else 0


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
