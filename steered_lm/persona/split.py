"""Splits of a persona's utterances by content hash: what is built on, tuned on, validated on and tested on never overlap."""

import re
from collections.abc import Sequence
from typing import Literal

from steered_lm.config import content_hash

Split = Literal["build", "tune", "validate", "test"]
SPLITS: tuple[Split, ...] = ("build", "tune", "validate", "test")
BLOCK: tuple[Split, ...] = ("build",) * 4 + ("tune",) * 2 + ("validate",) * 2 + ("test",) * 2
"""What ten items in a row are divided into."""


def normalise(text: str) -> str:
    """Return the text in lower case with words only, the form in which two texts count as the same."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'")))


def item_id(prompt: str, reference: str) -> str:
    """Return the content hash of an item, 16 hex digits."""
    return content_hash([normalise(prompt), normalise(reference)])[:16]


def assign_splits(pairs: Sequence[tuple[str, str]]) -> list[Split]:
    """Return the split of each (partner's line, own utterance): 40 % build, 20 % each of tune, validate, test.

    Every item draws one of the places that are left in its block of ten, by its content hash. So ten items fill every split, and an
    item's split depends on itself and on those before it only: conversations that are appended change nothing.
    """
    splits: list[Split] = []
    left: list[Split] = []
    for prompt, reference in pairs:
        left = left or list(BLOCK)
        splits.append(left.pop(int(item_id(prompt, reference), 16) % len(left)))
    return splits


def find_overlap(pairs: Sequence[tuple[str, str]]) -> str | None:
    """Return a sentence about the first prompt or utterance that two splits share, or about a repeated item; None when there is none."""
    seen: dict[tuple[str, str], Split] = {}
    items: set[str] = set()
    for (prompt, reference), split in zip(pairs, assign_splits(pairs), strict=True):
        identity = item_id(prompt, reference)
        if identity in items:
            return f"{prompt!r} with the answer {reference[:60]!r} occurs twice; keep one of them"
        items.add(identity)
        for kind, text in (("partner's line", prompt), ("utterance", reference)):
            other = seen.setdefault((kind, content_hash(normalise(text))), split)
            if other != split:
                return (
                    f"the {kind} {text[:80]!r} is in two splits, {other!r} and {split!r}; what is tuned on is never reported, so reword one of them"
                )
    return None
