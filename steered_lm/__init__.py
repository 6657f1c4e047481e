"""Steer language models towards a persona or a trait and measure what it buys and what it costs.

Importing this package loads neither torch nor a harness; the names below are resolved on first use.
"""

TYPE_CHECKING = False  # not imported from typing, which costs milliseconds at every interpreter start
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SteeringSpec": "steered_lm.steering.spec",
    "TraitVectors": "steered_lm.steering.vectors",
    "Steerer": "steered_lm.steering.hooks",
    "steer": "steered_lm.steering.hooks",
    "Engine": "steered_lm.engine",
    "GenerationRow": "steered_lm.engine",
    "Sampling": "steered_lm.engine",
    "ScoreRequest": "steered_lm.engine",
    "build_vectors": "steered_lm.extract.build",
    "load_persona": "steered_lm.persona.load",
    "make_judge": "steered_lm.judges",
    "optimize": "steered_lm.search.driver",
    "install": "steered_lm._autoload",
}

__all__ = [
    "Engine",
    "GenerationRow",
    "Sampling",
    "ScoreRequest",
    "Steerer",
    "SteeringSpec",
    "TraitVectors",
    "__version__",
    "build_vectors",
    "install",
    "load_persona",
    "make_judge",
    "optimize",
    "steer",
]


def __getattr__(name: str) -> "Any":
    """Import a public name's module when the name is first used."""
    from importlib import import_module

    if name not in _EXPORTS:
        raise AttributeError(f"module 'steered_lm' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
