"""How many rows fit: the cache's size is computed before anything runs, and the batch is cut to a budget."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from steered_lm.engine.forward import Forward
from steered_lm.engine.generate import GenerationPlan, columns, common_prefix
from steered_lm.engine.rows import GenerationRow
from steered_lm.engine.score import ScorePlan
from steered_lm.engine.tree import Context
from steered_lm.errors import ModelError

# Shares of what is free that are taken without being asked: other programs, and the allocator's own waste, need the rest.
_CUDA_SHARE, _CPU_SHARE = 0.85, 0.5
# More rows or tokens at once gain nothing any more; smaller passes stay in the processor's caches.
_ROWS, _PROMPT_TOKENS, _SCORE_TOKENS = 1024, 8192, 4096
# Drawing a token takes so many times the scores' own memory: float64 copies of them, sorted and summed.
_DRAW = 5

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Footprint(NamedTuple):
    """What a model's tensors take, in bytes.

    Attributes:
        cache: keys and values of one token, over all blocks.
        activation: what a block holds at once for one token.
        scores: one token's scores over the vocabulary, with the copies that choosing or normalising makes.
    """

    cache: int
    activation: int
    scores: int

    @classmethod
    def of(cls, forward: Forward, cache_bytes: int) -> "Footprint":
        """Estimate a model's footprint from its shapes; ``cache_bytes`` is measured in the trial of :mod:`steered_lm.engine.support`."""
        size = forward.model.dtype.itemsize
        widest = max(max(weight.shape) for block in forward.blocks for weight in block.parameters())
        width = forward.model.get_input_embeddings().weight.shape[1]
        return cls(cache_bytes, size * (3 * widest + 4 * width), forward.head.weight.shape[0] * (size + 4))


class Fit(NamedTuple):
    """A plan for generation, and the bytes that it takes at its peak."""

    plan: GenerationPlan
    bytes: int


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory the engine may take when it is given no budget."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_CUDA_SHARE * (free + idle))
    return int(_CPU_SHARE * min(psutil.virtual_memory().available, _container_bytes()))


def _container_bytes() -> int:
    """Return what a container's limit leaves, or a number beyond any machine."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.is_file() and used.is_file()) or (text := limit.read_text().strip()) == "max":
        return 1 << 62
    return max(int(text) - int(used.read_text()), 0)


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
        """The distinct prompts."""
        return list({row.tokens: None for row in self.rows})

    @cached_property
    def widest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @cached_property
    def prefix(self) -> int:
        """Tokens that all prompts begin with and that run on their own."""
        return common_prefix(self.prompts) if self.prefixes else 0

    @cached_property
    def draws(self) -> bool:
        """Whether any row samples, which takes float64 copies of its scores."""
        return any(row.sampling.temperature > 0 for row in self.rows)

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

    def bytes(self, slots: int, footprint: "Footprint") -> int:
        """Return what a run of ``slots`` rows at once takes at its peak: while prompts run, or later, when the cache is full."""
        shared, part = self.shared(slots), self.lower / self.blocks
        prompts, wide = min(slots, len(self.prompts)), self.widest
        together = self.prompt_tokens(slots) / (wide - self.prefix)  # rows, or prompts, in a pass
        if self.early:
            prompt_cache = wide * (together * (1 - part) + min(together, prompts) * part)
        else:
            fanned = slots * (1 - part) if shared < self.blocks and prompts < slots else 0
            prompt_cache = wide * (together + fanned)
        scores = footprint.scores * (_DRAW if self.draws else 1)
        prompting = prompt_cache * footprint.cache + together * (wide - self.prefix) * footprint.activation + slots * scores
        own = columns(self.rows, slots, shared=shared == self.blocks) - (wide * shared / self.blocks if shared < self.blocks else 0)
        kept = slots * own + prompts * wide * shared / self.blocks
        stepping = slots * (footprint.activation + scores)
        later = (slots if self.early else prompts) - together  # that run when others have their keys and values in place already
        longest = max(row.max_new_tokens for row in self.rows)
        if slots < len(self.rows):
            before = kept
        elif later > 0:
            before = kept - slots * longest if self.lazy else kept
        else:
            before = 0.0  # prompts leave block by block as the rows' own cache takes its memory
        return int(max(before * footprint.cache + prompting, kept * footprint.cache + stepping))

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


def fit_scoring(contexts: Sequence[Context], footprint: Footprint, budget: int, *, most_contexts: int | None, prefixes: bool) -> ScorePlan:
    """Return the largest plan for scoring that stays within a budget.

    Raises:
        ModelError: when not even one context fits.
    """
    widths = [len(c.key.tokens) + sum(len(tokens) - 1 for tokens in c.continuations) for c in contexts]
    reads = [1 + sum(len(tokens) - 1 for tokens in c.continuations) for c in contexts]
    fan = max(len(c.specs) for c in contexts)
    per_token = footprint.cache + footprint.activation
    least = max(len(c.specs) * (width * per_token + read * footprint.scores) for c, width, read in zip(contexts, widths, reads, strict=True))
    if least > budget:
        raise ModelError(
            f"one context of {max(widths)} tokens under {fan} specs needs {mebibytes(least)} beside the model's weights and the memory budget is "
            f"{mebibytes(budget)}. Raise memory_budget, or evaluate fewer specs at once."
        )
    # the cached prefix is copied to every row, so a row costs its whole width
    fits = budget / least
    tokens = int(min(_SCORE_TOKENS, max(fits * max(widths) * fan / 2, max(widths) * fan)))
    places = int(max(max(read * len(c.specs) for c, read in zip(contexts, reads, strict=True)), budget / 4 / footprint.scores))
    return ScorePlan(most_contexts or len(contexts), tokens, places, prefixes)


def mebibytes(size: float) -> str:
    """Return a size in words."""
    return f"{size / 2**20:,.0f} MiB"


def parse_size(size: str | float | None, argument: str = "memory_budget") -> int | None:
    """Return a size in bytes: a number means GiB, text has a unit, such as ``4GiB`` or ``500MB``; None stays None.

    Raises:
        ModelError: when it is neither, or not positive.
    """
    if size is None:
        return None
    parts = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    try:
        value = float(parts[1]) * _UNITS[parts[2] or "GiB"] if parts else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not 1 <= value < math.inf:
        raise ModelError(
            f"{argument}={size!r} is not a size. Allowed: a positive number of GiB, or one with a unit out of {', '.join(_UNITS)}: 4GiB."
        )
    return int(value)
