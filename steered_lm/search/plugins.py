"""Optimisers are files: ``optimizers/<name>.py`` or a user's own, each with a ``make(space, seed, **options)``."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from steered_lm.content import optimizer_file
from steered_lm.errors import RunError
from steered_lm.search.protocol import Optimizer, SearchSpace


def load_optimizer(name: str, space: SearchSpace, *, seed: int, options: Mapping[str, Any] | None = None) -> Optimizer:
    """Return a fresh optimiser from the name of one of ours or the path of a ``.py`` file.

    Args:
        name: ``cma_es``, ``random_search``, or a path.
        space: the box to search.
        seed: seeds the optimiser's own generator.
        options: keyword arguments of the file's ``make``.

    Raises:
        UserError: when there is no such optimiser.
        RunError: when the file cannot be loaded, has no ``make``, or ``make`` refuses the options.
    """
    file = optimizer_file(name)
    make = _make_of(file)
    chosen = dict(options or {})
    try:
        inspect.signature(make).bind(space, seed, **chosen)
    except TypeError as problem:
        raise RunError(f"optimizer_options={chosen!r} do not fit optimizer={name!r}: {problem}. Allowed: {_options_of(make)}.") from problem
    try:
        optimizer = make(space, seed, **chosen)
    except (ValueError, TypeError) as problem:
        raise RunError(f"optimizer={name!r} with options {chosen!r} over {space.names} could not be made: {problem}") from problem
    lacking = [member for member in ("ask", "tell", "should_stop") if not hasattr(optimizer, member)]
    if lacking:
        raise RunError(
            f"optimizer={name!r}: what make() returned has no {', '.join(lacking)}. It needs ask(), tell(population, fitness) and should_stop."
        )
    return optimizer


def _make_of(file: Path) -> Callable[..., Optimizer]:
    module = _import_file(file)
    make = getattr(module, "make", None)
    if not callable(make):
        raise RunError(
            f"optimizer file {str(file)!r} has no make(space, seed, **options) function. Add one that returns an object with ask, tell, should_stop."
        )
    found: Callable[..., Optimizer] = make
    return found


def _import_file(file: Path) -> ModuleType:
    # dataclasses look their module up in sys.modules; the path's hash keeps two files of one name apart, and from any importable name
    name = f"_steered_lm_optimizer_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as problem:
        raise RunError(f"optimizer file {str(file)!r} is not valid Python: {problem}") from problem
    except ImportError as problem:
        raise RunError(f"optimizer file {str(file)!r} needs a library that is not installed: {problem}. Install it with pip.") from problem
    return module


def _options_of(make: Callable[..., Optimizer]) -> str:
    names = [str(p) for p in list(inspect.signature(make).parameters.values())[2:]]
    return ", ".join(names) or "no options"
