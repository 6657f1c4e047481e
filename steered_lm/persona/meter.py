"""The trait meter: how high a text stands on each persona axis, by the words that mark the axis's two poles."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TRAITS = ("self_other_focus", "formality", "relationship_distance", "narrative_mode", "emotional_tone")
"""The five persona axes, in the order of markers.yaml."""


@cache
def _markers() -> tuple[re.Pattern[str], dict[str, tuple[str, int]]]:
    """One pattern over all markers, longest first, and the (trait, +1 high or -1 low) of each."""
    axes: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("markers.yaml").read_text("utf-8"))
    where = {marker: (trait, sign) for trait in TRAITS for pole, sign in (("high", 1), ("low", -1)) for marker in axes[trait][pole]}
    longest_first = sorted(where, key=lambda m: (-len(m), m))
    return re.compile(r"(?<![\w'])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w'])"), where


def marker_counts(text: str) -> dict[str, tuple[int, int]]:
    """Count the (high, low) markers of each trait; a longer marker hides the shorter ones inside it, across traits."""
    counts = {trait: [0, 0] for trait in TRAITS}
    pattern, where = _markers()
    for match in pattern.finditer(text.lower().replace("\u2019", "'")):
        trait, sign = where[match[0]]
        counts[trait][sign < 0] += 1
    return {trait: (high, low) for trait, (high, low) in counts.items()}


def trait_levels(text: str) -> dict[str, float | None]:
    """The level of `text` on each trait in [-1, 1], (high - low) / (high + low) over its markers; None for a trait without any."""
    return {trait: (high - low) / (high + low) if high + low else None for trait, (high, low) in marker_counts(text).items()}
