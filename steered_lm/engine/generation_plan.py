"""How much of a population runs at once: what a run takes is computed before it, and the batch is cut to a budget."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from steered_lm.engine.memory import Footprint, mebibytes
from steered_lm.engine.rows import GenerationRow
from steered_lm.errors import ModelError

# More rows or tokens at once gain nothing any more; smaller passes stay in the processor's caches.
_ROWS, _PROMPT_TOKENS = 1024, 8192
# Drawing a token takes so many times the scores' own memory: float64 copies of them, sorted and summed.
_DRAW = 7
# Fewer common tokens than this are not worth a pass of their own.
_PREFIX = 8
# Columns that the cache may drift before its contents are moved back.
_SLACK = 32


class GenerationPlan(NamedTuple):
    """How much runs at once.

    Attributes:
        rows: most rows in a step.
        prompt_tokens: most tokens, rows times width after the common beginning, in a pass over prompts.
        prefixes: whether the tokens that all prompts begin with run on their own.
        shared: in how many blocks, from the first on, rows read one copy of their prompt (:class:`SharedPrompts`): all of them when nothing of
            the prompts is steered but their last token, else those up to the first steered one.
    """

    rows: int
    prompt_tokens: int
    prefixes: bool = True
    shared: int = 0


class Fit(NamedTuple):
    """A plan for generation, and the bytes that it takes at its peak."""

    plan: GenerationPlan
    bytes: int


@dataclass(frozen=True)
class Demand:
    """What a run over rows asks for.

    Attributes:
        rows: what to generate.
        blocks: how many blocks the model has.
        lower: how many of them run before anything is steered.
        early: whether prompts are steered, so that the other blocks run over the prompt of each row.
        prefixes: whether common beginnings may run on their own.
        sharing: whether rows can read one copy of their prompt.
        lazy: whether memory is taken as it is written, as on a CPU, and not when it is asked for.
    """

    rows: Sequence[GenerationRow]
    blocks: int
    lower: int
    early: bool
    prefixes: bool
    sharing: bool
    lazy: bool = False

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        """The distinct prompts; with another adapter a prompt is another one."""
        return [tokens for tokens, _ in {(row.tokens, row.adapter): None for row in self.rows}]

    @cached_property
    def widest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @cached_property
    def prefix(self) -> int:
        """Tokens that all prompts begin with and that run on their own."""
        return common_prefix(list(dict.fromkeys(self.prompts))) if self.prefixes else 0

    @cached_property
    def draws(self) -> bool:
        """Whether any row samples, which takes float64 copies of its scores."""
        return any(row.sampling.temperature > 0 for row in self.rows)

    @cached_property
    def alike(self) -> list[int]:
        """How many rows have the same prompt, in ascending order."""
        return sorted(Counter(row.tokens for row in self.rows).values())

    def met(self, rows: float) -> int:
        """Return how many prompts so many rows have at most: rows of a prompt come together, so that only the first and last are there in part."""
        return min(math.ceil(rows), 2 + bisect_right(list(accumulate(self.alike)), rows - 2))

    def shared(self, slots: int) -> int:
        """Return in how many blocks prompts are kept once, when ``slots`` rows run at once.

        A row reads its prompt beside its own tokens, which costs a little: it is not done for rows alone. In part it is done only while nobody
        waits: the rows' own columns would have to make room for wider prompts.
        """
        if not self.sharing or 2 * len(self.prompts) > len(self.rows) or min(map(len, self.prompts)) < 2:
            return 0
        if not self.early:
            return self.blocks
        return self.lower if slots == len(self.rows) else 0

    def bytes(self, slots: int, footprint: Footprint) -> int:
        """Return what a run of ``slots`` rows at once takes at its peak: while prompts run, or later, when the cache is full."""
        shared, part = self.shared(slots), self.lower / self.blocks
        prompts, wide = min(slots, len(self.prompts)), self.widest
        read = min(prompts, self.met(slots))
        together = self.prompt_tokens(slots) / (wide - self.prefix)  # rows, or prompts, in a pass
        if self.early:
            prompt_cache = wide * (together * (1 - part) + min(together, prompts, self.met(together)) * part)
        else:
            fanned = slots * (1 - part) if shared < self.blocks and prompts < slots else 0
            prompt_cache = wide * (together + fanned)
        # a pass over a single prompt has nothing in common with others: it runs whole
        tokens = max(together * (wide - self.prefix), min(together, self.alike[-1] if self.early else 1) * wide)
        scores = footprint.scores * (_DRAW if self.draws else 1)
        prompting = prompt_cache * footprint.cache + tokens * footprint.activation + slots * scores
        own = columns(self.rows, slots, shared=shared == self.blocks) - (wide * shared / self.blocks if shared < self.blocks else 0)
        kept = slots * own + read * wide * shared / self.blocks
        stepping = slots * (footprint.activation + scores)
        later = (slots if self.early else prompts) - together  # that run when others have their keys and values in place already
        longest = max(row.max_new_tokens for row in self.rows)
        if slots < len(self.rows):
            before = kept
        elif later > 0:
            before = kept - slots * longest if self.lazy else kept
        else:
            before = 0.0  # prompts leave block by block as the rows' own cache takes its memory
        # of the last block keys and values are there twice, and one of them a third time, as it is copied
        leaving = (kept + 1.5 * prompt_cache / self.blocks) * footprint.cache + slots * footprint.logits
        return int(max(before * footprint.cache + prompting, leaving, kept * footprint.cache + stepping))

    def prompt_tokens(self, slots: int) -> int:
        """Return how many tokens, rows times width after the common beginning, a pass over prompts takes at most."""
        prompts, wide = slots if self.early else min(slots, len(self.prompts)), self.widest - self.prefix
        return max(wide, min(prompts * wide, _PROMPT_TOKENS))


def fit_generation(demand: Demand, footprint: Footprint, budget: int, *, most_rows: int | None) -> Fit:
    """Return the largest plan that stays within a budget.

    Args:
        demand: what is asked for.
        footprint: what the model's tensors take.
        budget: bytes.
        most_rows: a limit of the user's own; None is as many as fit.

    Raises:
        ModelError: when not even one row fits.
    """
    slots = min(len(demand.rows), most_rows or _ROWS)
    while slots > 1 and demand.bytes(slots, footprint) > budget:
        slots = max(1, min(slots - 1, int(slots * 0.9)))
    needed = demand.bytes(slots, footprint)
    if needed > budget:
        raise ModelError(
            f"one row of {columns(demand.rows, len(demand.rows))} tokens needs {mebibytes(needed)} beside the model's weights and the memory budget "
            f"is {mebibytes(budget)}. Raise memory_budget, shorten the prompts, or generate fewer tokens."
        )
    return Fit(GenerationPlan(slots, demand.prompt_tokens(slots), demand.prefixes, demand.shared(slots)), needed)


def columns(rows: Sequence[GenerationRow], slots: int, *, shared: bool = False) -> int:
    """Return how many columns the cache of a run needs when ``slots`` rows run at once; with shared prompts, of which only the last token counts."""
    widest, longest = 1 if shared else max(len(row.tokens) for row in rows), max(row.max_new_tokens for row in rows)
    return widest + longest + (_SLACK if len(rows) > slots else 0)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens several prompts begin with, leaving each at least one more; 0 when they are not worth a pass of their own."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    common = next((i for i in range(limit) if low[i] != high[i]), limit)
    return common if common >= _PREFIX else 0
