"""How much is scored at once: what each pass takes is computed before it, and passes are as full as a budget allows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from steered_lm.engine.memory import Footprint, mebibytes
from steered_lm.engine.passes import PassShape, Stage, stages
from steered_lm.engine.score import LOGIT_ROWS
from steered_lm.engine.tree import Context
from steered_lm.errors import ModelError

# More tokens at once gain nothing any more; smaller passes stay in the processor's caches.
_TOKENS = 4096
# What attention holds beside its keys and values: so many hidden states of each token.
_ATTENTION = 7


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
        if shape.rows * shape.whole > _TOKENS or shape.sequences > (most_contexts or len(contexts)):
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
