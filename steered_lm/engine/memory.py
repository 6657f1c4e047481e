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
from steered_lm.engine.score import LOGIT_ROWS, ScorePlan
from steered_lm.engine.tree import Context, group_by_prefix
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
        logits: the scores alone.
    """

    cache: int
    activation: int
    scores: int
    logits: int

    @classmethod
    def of(cls, forward: Forward, cache_bytes: int) -> "Footprint":
        """Estimate a model's footprint from its shapes; ``cache_bytes`` is measured in the trial of :mod:`steered_lm.engine.support`."""
        size = forward.model.dtype.itemsize
        widest = max(max(weight.shape) for block in forward.blocks for weight in block.parameters())
        width = forward.model.get_input_embeddings().weight.shape[1]
        vocabulary = forward.head.weight.shape[0]
        return cls(cache_bytes, size * (3 * widest + 4 * width), vocabulary * (size + 4), vocabulary * size)


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
        # rows of a prompt come together: so many prompts are read at once
        read = min(prompts, math.ceil(slots * len(self.prompts) / len(self.rows)) + 1)
        together = self.prompt_tokens(slots) / (wide - self.prefix)  # rows, or prompts, in a pass
        if self.early:
            prompt_cache = wide * (together * (1 - part) + min(together, prompts) * part)
        else:
            fanned = slots * (1 - part) if shared < self.blocks and prompts < slots else 0
            prompt_cache = wide * (together + fanned)
        scores = footprint.scores * (_DRAW if self.draws else 1)
        prompting = prompt_cache * footprint.cache + together * (wide - self.prefix) * footprint.activation + slots * scores
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


class ScoreFit(NamedTuple):
    """A plan for scoring, and the bytes that it takes at its peak."""

    plan: ScorePlan
    bytes: int


def fit_scoring(
    contexts: Sequence[Context], footprint: Footprint, budget: int, *, most_contexts: int | None, prefixes: bool, part: float = 1.0
) -> ScoreFit:
    """Return the largest plan for scoring that stays within a budget.

    Args:
        contexts: what to score.
        footprint: what the model's tensors take.
        budget: bytes.
        most_contexts: a limit of the user's own; None is as many as fit.
        prefixes: whether common beginnings may run on their own.
        part: share of the blocks that run once for all specs.

    Raises:
        ModelError: when not even one context fits.
    """
    widths = [len(c.key.tokens) + sum(len(tokens) - 1 for tokens in c.continuations) for c in contexts]
    reads = [1 + sum(len(tokens) - 1 for tokens in c.continuations) for c in contexts]
    fans = [len(c.specs) for c in contexts]
    # what a pass runs; the beginning that a group shares has run, but each row holds its keys and values
    own = [width - prefix for width, prefix in zip(widths, _prefixes(contexts, prefixes), strict=True)]
    # keys and values below the fork are there once for all specs
    cached = footprint.cache * (1 - part + part / max(fans))
    normalising = LOGIT_ROWS * footprint.scores

    def need(tokens: float, held: float, places: float) -> float:
        return tokens * footprint.activation + held * cached + places * footprint.logits + min(normalising, places * footprint.scores)

    each = [(many * mine, many * width, many * read) for many, mine, width, read in zip(fans, own, widths, reads, strict=True)]
    least = max(need(*size) for size in each)
    if least > budget:
        raise ModelError(
            f"one context of {max(widths)} tokens under {max(fans)} specs needs {mebibytes(least)} beside the model's weights and the memory budget "
            f"is {mebibytes(budget)}. Raise memory_budget, or evaluate fewer specs at once."
        )
    full = max(_SCORE_TOKENS, max(size[0] for size in each))
    share = 1.0
    while True:
        # a pass is full when any of the three is: none may be below what a single context takes
        limits = [min(sum(size[i] for size in each), max(share * full * _steepest(each, i), max(size[i] for size in each))) for i in range(3)]
        if need(*limits) <= budget or share < 1e-3:
            break
        share *= 0.9
    tokens, columns_held, places = (math.ceil(limit) for limit in limits)
    plan = ScorePlan(most_contexts or len(contexts), tokens, columns_held, places, prefixes)
    return ScoreFit(plan, int(min(need(*limits), budget)))


def _prefixes(contexts: Sequence[Context], share: bool) -> list[int]:
    """Return how many tokens of each context will have run with others' before."""
    found = [0] * len(contexts)
    ordinary = [i for i, context in enumerate(contexts) if context.key.ordinary]
    for group in group_by_prefix([contexts[i].key.tokens for i in ordinary], share=share):
        for member in group.contexts:
            found[ordinary[member]] = group.prefix
    return found


def _steepest(sizes: Sequence[tuple[int, int, int]], part: int) -> float:
    """Return the largest ratio of one part of a context's size to the tokens that it runs."""
    return max(size[part] / size[0] for size in sizes)


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
