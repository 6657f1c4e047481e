"""``make_backend`` builds a fine-tuning backend by its name in configs. Light: a backend's libraries are imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any, cast

from steered_lm.errors import near_misses
from steered_lm.trait_models.backend import Backend
from steered_lm.trait_models.experiment import ExperimentError

ENTRY_POINTS = "steered_lm.training_backends"
# used from a checkout, where no entry point is registered
_BUILT_IN = {
    "dummy": "steered_lm.trait_models.dummy:DummyBackend",
    "openai": "steered_lm.trait_models.openai:OpenAIBackend",
    "peft": "steered_lm.trait_models.peft:PeftBackend",
    "tinker": "steered_lm.trait_models.tinker:TinkerBackend",
}


def make_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """Return a fine-tuning backend.

    A backend is a class with ``from_options(options)`` whose instances are :class:`~steered_lm.trait_models.backend.Backend`, registered in the
    entry-point group ``steered_lm.training_backends``.

    Args:
        name: ``peft``, ``openai``, ``tinker``, ``dummy``, or one that a package of the user's registers.
        options: what the experiment's ``training.options`` hold.

    Raises:
        ExperimentError: when the backend is unknown (with near misses), its options do not fit, or one of them is a key.
        MissingDependencyError: when its library is not installed.
    """
    targets = _registered()
    if name not in targets:
        raise ExperimentError(f"training.backend={name!r} is not known. {near_misses(name, targets)} Write peft to train here.")
    given = dict(options or {})
    if any("api_key" in option for option in given):
        raise ExperimentError("training.options: api_key is not taken: options are written into the cache. Set the key in the environment.")
    module, _, attribute = targets[name].partition(":")
    return cast(Backend, getattr(import_module(module), attribute).from_options(given))


def backend_names() -> list[str]:
    """Return the names of the backends that are installed."""
    return sorted(_registered())


def _registered() -> dict[str, str]:
    return _BUILT_IN | {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}
