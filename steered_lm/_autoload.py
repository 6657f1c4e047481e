"""Makes ``lm_eval`` know our model type and our tasks, with no flag, until lm-eval reads entry points itself.

``steered_lm.pth`` (``steered_lm.start`` from Python 3.15 on) calls :func:`autoload` whenever this environment's Python starts. It
leaves one finder in ``sys.meta_path``, which does nothing until ``lm_eval`` is imported. Hence only ``os`` and ``sys`` at module
level, which every interpreter has loaded by then: not even ``typing``.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OPT_OUT = "STEERED_LM_NO_AUTOLOAD"
MODEL_NAME = "steered-hf"
MODEL_TARGET = "steered_lm.harness.model:SteeredHFLM"


def autoload() -> None:
    """Install the hook at interpreter start, unless ``STEERED_LM_NO_AUTOLOAD`` is set; any error is a warning."""
    if os.environ.get(OPT_OUT, "0") in {"", "0"}:
        _guarded(install)


def install() -> None:
    """Make ``lm_eval`` know ``steered-hf`` and our tasks in this process; calling it again changes nothing.

    For places that no ``.pth`` file reaches: notebooks whose kernel started before the installation, ``pip install --target``,
    a checkout on ``PYTHONPATH``. It works before and after ``lm_eval`` is imported, whatever ``STEERED_LM_NO_AUTOLOAD`` says.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, extend in _EXTENSIONS.items():
        module = sys.modules.get(name)
        # A module that is still being executed gets its turn from the finder.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            extend(module)


class _Finder:
    """Finds nothing itself; lets the modules named in ``_EXTENSIONS`` be extended once they have been executed."""

    def find_spec(self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        if name not in _EXTENSIONS:
            return None
        for finder in tuple(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                _guarded(_extend_after_execution, spec, _EXTENSIONS[name])
                return spec
        return None


def _extend_after_execution(spec: "ModuleSpec", extend: "Callable[[ModuleType], None]") -> None:
    # The loader stays the real one (inspect and importlib.resources ask it); only this instance's exec_module is replaced, once.
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        loader.exec_module = execute
        execute(module)
        _guarded(extend, module)

    loader.exec_module = exec_module


def _extend_models(module: "ModuleType") -> None:
    registry = sys.modules["lm_eval.api.registry"].model_registry
    if MODEL_NAME not in registry and not _native("lm_eval.models"):
        registry.register(MODEL_NAME, target=MODEL_TARGET)


def _extend_tasks(module: "ModuleType") -> None:
    manager = module.TaskManager
    if not getattr(manager.__init__, "_steered_lm", False):
        manager.__init__ = _with_our_tasks(manager.__init__)


def _with_our_tasks(original: "Callable[..., None]") -> "Callable[..., None]":
    """Return ``TaskManager.__init__`` with our folder first among the included paths, so that a user's own still win."""
    from functools import wraps
    from inspect import signature

    parameters = signature(original)

    def include(bound: "Any") -> None:
        from steered_lm.content import content_dir

        given = bound.arguments["include_path"]
        user = [] if not given else list(given) if isinstance(given, list | tuple) else [given]
        if bound.arguments["include_defaults"] and not _native("lm_eval.tasks"):
            bound.arguments["include_path"] = [content_dir("tasks"), *user]

    @wraps(original)
    def init(*args: "Any", **kwargs: "Any") -> None:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        _guarded(include, bound)
        original(*bound.args, **bound.kwargs)

    init._steered_lm = True  # type: ignore[attr-defined]
    return init


def _native(group: str) -> bool:
    """Return whether lm-eval itself will find our entry point: it is installed, and a module of lm-eval's names its group."""
    from importlib.metadata import entry_points

    if not any(point.value.startswith("steered_lm.") for point in entry_points(group=group)):
        return False
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "lm_eval"]
    return any("entry_points" in source and f'"{group}"' in source for source in map(_source, modules))


def _source(module: "ModuleType") -> str:
    from inspect import getsource

    try:
        return getsource(module).replace("'", '"')
    except (OSError, TypeError):
        return ""


def _guarded(action: "Callable[..., None]", *args: "Any") -> None:
    # Whatever goes wrong in here must never cost somebody their interpreter or their lm_eval: the one place for a broad except.
    try:
        action(*args)
    except Exception as error:
        from warnings import warn

        warn(
            f"steered-lm could not announce {MODEL_NAME!r} and its tasks to lm_eval ({type(error).__name__}: {error}). "
            f"Use `steered-lm eval ...` instead of `lm_eval ...`, or set {OPT_OUT}=1 to switch the hook off.",
            RuntimeWarning,
            stacklevel=2,
        )


_EXTENSIONS: "dict[str, Callable[[ModuleType], None]]" = {"lm_eval.models": _extend_models, "lm_eval.tasks.manager": _extend_tasks}
