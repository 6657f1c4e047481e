"""How many rows fit: the cache's size is computed before anything runs, and the batch is cut to a budget."""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from steered_lm.engine.forward import Forward
from steered_lm.engine.generate import GenerationPlan, columns, common_prefix
from steered_lm.engine.passes import PassShape, Stage, stages
from steered_lm.engine.rows import GenerationRow
from steered_lm.engine.score import LOGIT_ROWS
from steered_lm.engine.tree import Context
from steered_lm.errors import ModelError

# Shares of what is free that are taken without being asked: other programs, and the allocator's own waste, need the rest.
_CUDA_SHARE, _CPU_SHARE = 0.85, 0.5
# More rows or tokens at once gain nothing any more; smaller passes stay in the processor's caches.
_ROWS, _PROMPT_TOKENS, _SCORE_TOKENS = 1024, 8192, 4096
# Drawing a token takes so many times the scores' own memory: float64 copies of them, sorted and summed.
_DRAW = 7
# What attention holds beside its keys and values: so many hidden states of each token.
_ATTENTION = 7
# A matrix product rearranges about half of a weight first, and no more than this (measured with MKL).
_WORKSPACE = 2**24

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Footprint(NamedTuple):
    """What a model's tensors take, in bytes.

    Attributes:
        cache: keys and values of one token, over all blocks.
        activation: what a block holds at once for one token.
        scores: one token's scores over the vocabulary, with the copies that choosing makes.
        logits: the scores alone.
        normalising: copies of one token's scores that their normaliser takes.
        hidden: one token's hidden state.
        column: one token's keys and values in one block, repeated for the heads that share them; 0 when none do.
        pair: what attention takes for one token and one column that it may see.
        workspace: of the library of matrix products, which rearranges a weight.
        sdpa: whether attention is the fused kernel, which without a mask takes nothing for pairs.
    """

    cache: int
    activation: int
    scores: int
    logits: int
    normalising: int
    hidden: int
    column: int
    pair: int
    workspace: int = 0
    sdpa: bool = True

    @classmethod
    def of(cls, forward: Forward, cache_bytes: int, softmax_dtype: torch.dtype | None = None) -> "Footprint":
        """Estimate a model's footprint from its shapes; ``cache_bytes`` is measured in the trial of :mod:`steered_lm.engine.support`."""
        dtype, config = forward.model.dtype, forward.model.config.get_text_config()
        size, fine = dtype.itemsize, softmax_dtype or (dtype if dtype == torch.float64 else torch.float32)
        weights = [weight for block in forward.blocks for weight in block.parameters()]
        widest = max(max(weight.shape) for weight in weights)
        width = forward.model.get_input_embeddings().weight.shape[1]
        vocabulary = forward.head.weight.shape[0]
        sdpa = config._attn_implementation == "sdpa"
        return cls(
            cache=cache_bytes,
            activation=size * (3 * widest + 4 * width),
            scores=vocabulary * (size + 4),
            logits=vocabulary * size,
            # exponentials, and a copy where the dtype changes
            normalising=vocabulary * fine.itemsize * (1 if fine == dtype else 2),
            hidden=width * size,
            column=2 * width * size if cache_bytes < 2 * width * size * len(forward.blocks) else 0,
            # the fused kernel turns the mask into numbers; without it every head has scores, and their softmax in float32
            pair=size if sdpa else size + config.num_attention_heads * (2 * size if size >= 4 else size + 8),
            workspace=min(max(weight.nbytes for weight in (forward.head.weight, *weights)) // 2, _WORKSPACE),
            sdpa=sdpa,
        )


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

    def bytes(self, slots: int, footprint: "Footprint") -> int:
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


class ScorePlan(NamedTuple):
    """What a scoring run consists of, and the bytes that it takes at its peak."""

    stages: list[Stage]
    bytes: int


def beginning_bytes(stage: Stage, footprint: Footprint, part: float) -> int:
    """Return what the common beginning of a stage takes while it runs; ``part`` is the share of the blocks that run once for all specs."""
    width, rows = len(stage.beginning), 1 if stage.late else len(stage.specs)
    seen = 0 if footprint.sdpa else rows * width * footprint.pair  # it needs no mask of its own
    cache = _held(stage, footprint, part)
    return cache + footprint.workspace + rows * max(width * (footprint.activation + footprint.hidden + seen), footprint.logits)


def pass_bytes(stage: Stage, shape: PassShape, footprint: Footprint, part: float) -> int:
    """Return what a pass of a stage takes at its peak, with the keys and values of the common beginning; ``part`` as above."""

    def running(rows: int, width: int, columns: int, places: int) -> int:
        """What comes and goes: in a block's layers, in its attention, or when scores are normalised."""
        tokens, normalised = rows * width, min(places, LOGIT_ROWS)
        attention = rows * columns * (footprint.column + width * footprint.pair) + tokens * _ATTENTION * footprint.hidden
        scores = tokens * 2 * footprint.hidden + places * (footprint.hidden + footprint.logits) + normalised * footprint.normalising
        # a byte says who sees whom
        return tokens * columns + max(tokens * (footprint.activation + footprint.hidden), attention, scores)

    sequences, rows, columns = shape.sequences, shape.rows, shape.columns
    before = footprint.cache * sequences * (shape.prefix + shape.head) + running(sequences, shape.head, shape.prefix + shape.head, sequences)
    cache = int(footprint.cache * columns * (part * sequences + (1 - part) * rows))
    return _held(stage, footprint, part) + footprint.workspace + max(before, cache + running(rows, shape.tail, columns, shape.places))


def _held(stage: Stage, footprint: Footprint, part: float) -> int:
    """Return what the keys and values of a stage's common beginning take."""
    return int(footprint.cache * len(stage.beginning) * (1 if stage.late else part + (1 - part) * len(stage.specs)))


def fit_scoring(
    contexts: Sequence[Context],
    early: Sequence[bool],
    footprint: Footprint,
    budget: int,
    *,
    most_contexts: int | None,
    prefixes: bool,
    part: float = 1.0,
) -> ScorePlan:
    """Return how contexts are scored within a budget, in passes as full as it allows; where one context is too much, with fewer specs at a time.

    Args:
        contexts: what to score.
        early: per spec, whether it steers prompt tokens before the last one.
        footprint: what the model's tensors take.
        budget: bytes.
        most_contexts: a limit of the user's own; None is as many as fit.
        prefixes: whether common beginnings may run on their own.
        part: share of the blocks that run once for all specs.

    Raises:
        ModelError: when not even one context with one spec fits.
    """

    def fits(stage: Stage, shape: PassShape) -> bool:
        if shape.rows * shape.whole > _SCORE_TOKENS or shape.sequences > (most_contexts or len(contexts)):
            return False
        return pass_bytes(stage, shape, footprint, part) <= budget

    made: list[Stage] = []
    most = 0
    waiting = stages(contexts, early, share=prefixes)[::-1]
    while waiting:
        stage = waiting.pop()
        members = [member for parts in stage.passes for member in parts]
        first = beginning_bytes(stage, footprint, part) if stage.beginning else 0
        needed, widest = max((pass_bytes(stage, stage.shape([member]), footprint, part), i) for i, member in enumerate(members))
        if max(first, needed) <= budget:
            divided = stage.divided(partial(fits, stage))
            most = max(most, first, *(pass_bytes(stage, stage.shape(parts), footprint, part) for parts in divided.passes))
            made.append(divided)
        elif len(stage.specs) > 1:
            waiting += stage.halves()[::-1]
        else:
            width = len(members[widest].context.key.tokens) + members[widest].branches
            raise ModelError(
                f"one context of {width} tokens needs {mebibytes(max(first, needed))} beside the model's weights and the memory budget "
                f"is {mebibytes(budget)}. Raise memory_budget, or shorten the texts."
            )
    return ScorePlan(made, most)


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
