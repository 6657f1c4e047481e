"""Requests to score as trees: a beginning that many contexts share, the contexts, and the continuations of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from steered_lm.engine.rows import ScoreRequest

Tokens = tuple[int, ...]

# A pass of its own for a common beginning has to save this many tokens, and be this long.
_WORTH = 64
_SHORTEST = 8


class ContextKey(NamedTuple):
    """What requests must share to share a context: its tokens, where the response starts, and whether that is where the context ends."""

    tokens: Tokens
    split: int
    ordinary: bool


@dataclass
class Context:
    """One context with its continuations and the specs that it is asked for, both by order of appearance."""

    key: ContextKey
    continuations: dict[Tokens, int] = field(default_factory=dict)
    specs: dict[int, int] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a request's answer is found: context, spec and continuation by number, the last two within the context."""

    context: int
    spec: int
    continuation: int


class Group(NamedTuple):
    """Contexts that begin with the same ``prefix`` tokens, which run once; 0 when they do not."""

    prefix: int
    contexts: list[int]


def check_requests(requests: Sequence[ScoreRequest], max_length: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        ValueError: for an empty context or continuation, or a continuation that is longer than ``max_length``.
    """
    for request in requests:
        if not request.context or not request.continuation:
            raise ValueError("context and continuation must hold at least one token each; give an empty context the model's BOS or EOS token.")
        if len(request.continuation) > max_length:
            raise ValueError(
                f"a continuation of {len(request.continuation)} tokens is longer than max_length={max_length}. Split it, or raise max_length."
            )


def build_contexts(requests: Sequence[ScoreRequest], specs: Sequence[int], max_length: int) -> tuple[list[Context], list[Place]]:
    """Return the distinct contexts, and for each request where its answer will be.

    What does not fit is cut off at the beginning, as lm-eval does: the last ``max_length + 1`` tokens stay, of which the very last is only predicted.

    Args:
        requests: what to score.
        specs: number of each request's spec.
        max_length: most tokens that the model takes.
    """
    contexts: dict[ContextKey, Context] = {}
    numbers: dict[ContextKey, int] = {}
    places: list[Place] = []
    for request, spec in zip(requests, specs, strict=True):
        cut = max(len(request.context) + len(request.continuation) - max_length - 1, 0)
        key = ContextKey(request.context[cut:], max(request.split - cut, 0), request.response_start is None)
        context = contexts.setdefault(key, Context(key))
        place = Place(
            numbers.setdefault(key, len(numbers)),
            context.specs.setdefault(spec, len(context.specs)),
            context.continuations.setdefault(request.continuation, len(context.continuations)),
        )
        places.append(place)
    return list(contexts.values()), places


def group_by_prefix(contexts: Sequence[Tokens], *, share: bool = True) -> list[Group]:
    """Return the contexts in groups whose common beginning is worth a pass of its own, and the rest in one group without.

    Sorted contexts and the lengths of what neighbours share form a Cartesian tree. From the leaves up, each node either shares its own
    common beginning or leaves its two halves to share theirs, whichever saves more tokens.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    if not share or len(order) < 2:
        return [Group(0, order)] if order else []
    common = [_common(contexts[a], contexts[b]) for a, b in pairwise(order)]
    groups, alone = [], list[int]()
    for first, last, prefix in _segments(common):
        if prefix:
            groups.append(Group(prefix, order[first : last + 1]))
        else:
            alone += order[first : last + 1]
    return groups + ([Group(0, alone)] if alone else [])


def _segments(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, last, prefix) of the segments of ``len(common) + 1`` sorted contexts that save most."""
    count = len(common)
    left, right = [-1] * count, [-1] * count
    stack: list[int] = []
    for node in range(count):
        child = -1
        while stack and common[stack[-1]] > common[node]:
            child = stack.pop()
        left[node] = child
        if stack:
            right[stack[-1]] = node
        stack.append(node)
    saved, span, shares = [0] * count, [(0, 0)] * count, [False] * count
    visits = [(stack[0], False)]
    while visits:
        node, ready = visits.pop()
        if not ready:
            visits += [(node, True), *((child, False) for child in (left[node], right[node]) if child >= 0)]
            continue
        first = span[left[node]][0] if left[node] >= 0 else node
        last = span[right[node]][1] if right[node] >= 0 else node + 1
        span[node] = first, last
        split = sum(saved[child] for child in (left[node], right[node]) if child >= 0)
        whole = (last - first) * common[node] - _WORTH if common[node] >= _SHORTEST else 0
        shares[node], saved[node] = (True, whole) if whole > split else (False, split)
    segments: list[tuple[int, int, int]] = []
    todo = [stack[0]]
    while todo:
        node = todo.pop()
        if shares[node] or not saved[node]:
            segments.append((*span[node], common[node] if shares[node] else 0))
            continue
        for child, leaf in ((left[node], node), (right[node], node + 1)):
            if child >= 0:
                todo.append(child)
            else:
                segments.append((leaf, leaf, 0))
    return segments


def _common(one: Tokens, other: Tokens) -> int:
    """Return how many tokens both begin with, leaving each at least one more."""
    limit = min(len(one), len(other)) - 1
    if one[:limit] == other[:limit]:
        return limit
    return next(i for i in range(limit) if one[i] != other[i])
