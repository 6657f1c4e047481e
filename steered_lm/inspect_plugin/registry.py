"""What Inspect finds through the entry-point group ``inspect_ai``. Light: torch is imported when a model is asked for."""

from inspect_ai.model import ModelAPI, modelapi

from steered_lm.inspect_plugin.benchmarks import mmlu, truthfulqa_gen, truthfulqa_mc1
from steered_lm.inspect_plugin.tasks import persona_judge

__all__ = ["mmlu", "persona_judge", "steered_hf", "truthfulqa_gen", "truthfulqa_mc1"]


@modelapi(name="steered-hf")
def steered_hf() -> type[ModelAPI]:
    """Return the provider behind ``--model steered-hf/<hub id, folder or steered-lm/tiny-chat>``."""
    from steered_lm.inspect_plugin.provider import SteeredHFAPI

    return SteeredHFAPI
