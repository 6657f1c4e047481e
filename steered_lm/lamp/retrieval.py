"""Which items of a profile go into the prompt: the nearest, the newest, some drawn at random, or none."""

import random
from typing import Any, Literal, get_args

import numpy as np

from steered_lm.errors import UserError, near_misses
from steered_lm.lamp.rows import Row
from steered_lm.lamp.task import LampTask

Retrieval = Literal["bm25", "recency", "random", "none"]
RETRIEVALS: tuple[Retrieval, ...] = get_args(Retrieval)


def retrieve(task: LampTask, row: Row, method: str = "bm25", k: int = 4, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return at most ``k`` items of a row's profile, in the order in which the prompt shows them.

    ``bm25``: the nearest first, by Okapi BM25 (k1 1.5, b 0.75, epsilon 0.25) over words between white space, as the official code has it;
    of equally near ones the later in the file first. ``recency``: the newest first, by ``date`` where items have one, else the last of the
    file first. ``random``: drawn without repetition, from the seed and the row's id alone, so that neither the other rows nor ``--limit``
    change it. ``none``: none.

    Raises:
        UserError: for an unknown method, and for a profile of which only some items have a date, or a malformed one.
    """
    profile = list(row.profile)
    if method == "bm25":
        return _nearest(task, row, k)
    if method == "recency":
        return _newest(row, k)
    if method == "random":
        return random.Random(f"{seed}/{task.name}/{row.id}").sample(profile, min(k, len(profile)))
    if method == "none":
        return []
    raise UserError(f"retrieval={method!r} does not exist. {near_misses(method, RETRIEVALS)}")


def _nearest(task: LampTask, row: Row, k: int) -> list[dict[str, Any]]:
    from rank_bm25 import BM25Okapi

    texts = [task.search_text(item).split() for item in row.profile]
    # without a single word BM25 divides by zero; nothing is nearer than anything else then
    scores = BM25Okapi(texts).get_scores(task.query(row.input).split()) if any(texts) else np.zeros(len(texts))
    # a stable sort: the library's own leaves the order of equal scores to the processor
    return [row.profile[place] for place in np.argsort(scores, kind="stable")[::-1][:k]]


def _newest(row: Row, k: int) -> list[dict[str, Any]]:
    dated = [item for item in row.profile if item.get("date")]
    if dated and len(dated) < len(row.profile):
        raise UserError(
            f"retrieval='recency': {len(dated)} of {len(row.profile)} items in the profile of row {row.id} have a date. All must, or none."
        )
    ordered = sorted(row.profile, key=lambda item: _date(row, str(item["date"]))) if dated else list(row.profile)
    return ordered[::-1][:k]


def _date(row: Row, date: str) -> tuple[int, ...]:
    parts = date.split("-")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"retrieval='recency': row {row.id} has the date {date!r} in its profile. Write YYYY-MM-DD, YYYY-MM or YYYY.")
    return tuple(map(int, parts))
