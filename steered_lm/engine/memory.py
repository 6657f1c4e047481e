"""How many rows fit: the cache's size is computed before anything runs, and the batch is cut to a budget."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from steered_lm.engine.forward import Forward
from steered_lm.engine.generate import GenerationPlan, columns
from steered_lm.engine.rows import GenerationRow
from steered_lm.engine.score import ScorePlan
from steered_lm.engine.tree import Context
from steered_lm.errors import ModelError

# Shares of what is free that are taken without being asked: other programs, and the allocator's own waste, need the rest.
_CUDA_SHARE, _CPU_SHARE = 0.85, 0.5
# More rows or tokens at once gain nothing any more; smaller passes stay in the processor's caches.
_ROWS, _PROMPT_TOKENS, _SCORE_TOKENS = 1024, 8192, 4096

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


def fit_generation(
    rows: Sequence[GenerationRow],
    footprint: Footprint,
    budget: int,
    *,
    most_rows: int | None,
    early: bool,
    sampled: bool,
    prefixes: bool,
    shared: int,
    blocks: int,
) -> Fit:
    """Return the largest plan that stays within a budget.

    Args:
        rows: what to generate.
        footprint: what the model's tensors take.
        budget: bytes.
        most_rows: a limit of the user's own; None is as many as fit.
        early: whether prompts are steered, so that each row's blocks above the fork run over its whole prompt.
        sampled: whether any row samples, which takes float64 copies of its scores.
        prefixes: whether common beginnings may run on their own.
        shared: in how many blocks rows can read one copy of their prompt; it is done when there are fewer prompts than rows.
        blocks: how many blocks there are.

    Raises:
        ModelError: when not even one row fits.
    """
    wanted = min(len(rows), most_rows or _ROWS)
    widest = max(len(row.tokens) for row in rows)
    per_token = footprint.cache + footprint.activation
    scores = footprint.scores * (5 if sampled else 1)

    distinct = len({row.tokens for row in rows})
    # a row reads its prompt beside its own tokens, which costs a little: not worth it for a row alone
    worth = 2 * distinct <= len(rows) and min(len(row.tokens) for row in rows) > 1

    def sharing(slots: int) -> int:
        # in part only while nobody waits: the rows' own columns would have to make room for wider prompts
        return shared if worth and (shared == blocks or slots == len(rows)) else 0

    def need(slots: int) -> tuple[int, int]:
        prompts = slots if early else min(slots, distinct)
        tokens = max(widest, min(prompts * widest, _PROMPT_TOKENS))
        whole, part = sharing(slots) == blocks, sharing(slots) / blocks
        own = columns(rows, slots, shared=whole) - (0 if whole else part * widest)
        step = int(slots * (own * footprint.cache + footprint.activation + scores))
        # rows that come later each bring their prompt's keys and values, which are then copied to where the others have theirs
        later = max(slots * widest - tokens, 0) if slots < len(rows) else 0
        copies = distinct * widest * part if part else later
        return step + int(copies * footprint.cache) + tokens * per_token, tokens

    slots = wanted
    while slots > 1 and need(slots)[0] > budget:
        slots = max(1, min(slots - 1, int(slots * 0.9)))
    bytes_needed, tokens = need(slots)
    if bytes_needed > budget:
        raise ModelError(
            f"one row of {columns(rows, len(rows))} tokens needs {mebibytes(bytes_needed)} beside the model's weights and the memory budget is "
            f"{mebibytes(budget)}. Raise memory_budget, shorten the prompts, or lower max_gen_toks."
        )
    return Fit(GenerationPlan(slots, tokens, prefixes, sharing(slots)), bytes_needed)


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
