"""A data set of the Hugging Face hub as rows."""

from typing import Any

from steered_lm.benchmarks.folder import VARIABLE
from steered_lm.errors import UserError


def hub_rows(path: str, config: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, as upstream's tasks load it.

    Raises:
        UserError: when it can neither be fetched nor found in the cache.
    """
    import datasets

    try:
        found = datasets.load_dataset(path, config)
    except (OSError, ValueError) as problem:  # offline, not in the cache, no such data set
        raise UserError(
            f"{path!r} ({config}) could not be had from the hub: {problem}. "
            f"Without a network, name a folder with local copies by {VARIABLE} or the option data (docs/tasks.md tells its layout)."
        ) from problem
    if split not in found:
        raise UserError(f"{path!r} ({config}) has no split {split!r}. It has: {', '.join(found)}.")
    return [dict(row) for row in found[split]]
