"""Names of items that follow from their content, so that both harnesses and every copy of the data agree."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steered_lm.config import content_hash


def with_ids(rows: Sequence[Mapping[str, Any]], content: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with an ``id``: a hash of their content, with ``-2``, ``-3`` … for further rows of the same content."""
    seen: Counter[str] = Counter()
    made = []
    for row in rows:
        name = content_hash(content(row))[:16]
        seen[name] += 1
        made.append({"id": name if seen[name] == 1 else f"{name}-{seen[name]}", **row})
    return made
