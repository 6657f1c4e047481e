"""Errors for what a user passed: each says which argument, which value, what is allowed and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class UserError(ValueError):
    """Something the user passed is wrong; the command line prints it without a traceback and exits with 2."""


class VectorsError(UserError):
    """A trait-vectors file is missing, damaged, foreign or does not hold what was asked of it."""


class SpecError(UserError):
    """A steering spec is malformed or does not fit its vectors or its model."""


class ModelError(UserError):
    """A model cannot be used the way it was asked for."""


class NaNError(ModelError):
    """A steered model's scores are NaN: the steering drives its activations out of range."""


class PersonaError(UserError):
    """A persona is unknown, empty, or its folder is malformed."""


class JudgeError(UserError):
    """A judge cannot be built or cannot be trusted to go on."""


class RunError(UserError):
    """A run cannot start, resume or go on."""


class MissingDependencyError(UserError):
    """An optional library is not installed."""


def near_misses(name: str, allowed: Iterable[str]) -> str:
    """Return a sentence that lists what is allowed and the closest matches to ``name``."""
    names = sorted(allowed)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"Allowed: {', '.join(names) or 'none'}.{hint}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library or say which extra installs it.

    Raises:
        MissingDependencyError: when ``module`` is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{module!r} is not installed. Install it with: pip install 'steered-lm[{extra}]'") from error
