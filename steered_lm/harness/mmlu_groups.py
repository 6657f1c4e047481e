"""The members of the groups ``steered_mmlu…``: lists that the groups' YAML files name, made when a group is loaded.

A folder of local data may hold some subjects only. ``all`` is the list of categories, ``stem`` and the others are lists of tasks.
"""

import logging

from steered_lm.benchmarks.folder import VARIABLE, data_folder
from steered_lm.benchmarks.mmlu import CATEGORIES, CATEGORY_OF, local_subjects
from steered_lm.errors import UserError

logger = logging.getLogger(__name__)


def members(name: str) -> list[str]:
    """Return the members of ``all`` or of a category; subjects that the local folder does not have are left out, with a warning.

    Raises:
        UserError: when the folder has none of them.
    """
    present = local_subjects()
    wanted = list(CATEGORY_OF) if name == "all" else list(CATEGORIES[name])
    found = wanted if present is None else [subject for subject in wanted if subject in present]
    absent = [subject for subject in wanted if subject not in found]
    if not found:
        raise UserError(
            f"{VARIABLE}={str(data_folder())!r} has no subject of MMLU's {name}: {', '.join(wanted)}. It has: {', '.join(present or [])}."
        )
    if name == "all":
        empty = [category for category, subjects in CATEGORIES.items() if not set(subjects) & set(found)]
        if empty:
            logger.warning("steered_mmlu leaves out %s: the folder of local data has none of their subjects", ", ".join(empty))
        return [f"steered_mmlu_{category}" for category in CATEGORIES if category not in empty]
    if absent:
        logger.warning("steered_mmlu_%s runs %d of %d subjects; the folder of local data lacks %s", name, len(found), len(wanted), ", ".join(absent))
    return [f"steered_mmlu_{subject}" for subject in found]


def __getattr__(name: str) -> list[str]:
    """Return :func:`members` for ``all`` and the categories: a group's YAML can name an attribute, not a call."""
    if name == "all" or name in CATEGORIES:
        return members(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
