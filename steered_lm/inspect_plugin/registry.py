"""What Inspect finds through the entry-point group ``inspect_ai``. Light: torch is imported when a model is asked for."""

from inspect_ai.model import ModelAPI, modelapi

from steered_lm.inspect_plugin.benchmarks import mmlu, truthfulqa_gen, truthfulqa_mc1
from steered_lm.inspect_plugin.lamp import lamp_1, lamp_2, lamp_3, lamp_4, lamp_5, lamp_6, lamp_7
from steered_lm.inspect_plugin.likelihood_tasks import perplexity, tiny_knowledge, tiny_truth, truthfulqa_mc2
from steered_lm.inspect_plugin.tasks import persona_judge
from steered_lm.inspect_plugin.traits import (
    pv_apathetic,
    pv_evil,
    pv_hallucinating,
    pv_humorous,
    pv_impolite,
    pv_optimistic,
    pv_sycophantic,
    pv_trait,
)

__all__ = [
    "lamp_1",
    "lamp_2",
    "lamp_3",
    "lamp_4",
    "lamp_5",
    "lamp_6",
    "lamp_7",
    "mmlu",
    "perplexity",
    "persona_judge",
    "pv_apathetic",
    "pv_evil",
    "pv_hallucinating",
    "pv_humorous",
    "pv_impolite",
    "pv_optimistic",
    "pv_sycophantic",
    "pv_trait",
    "steered_hf",
    "tiny_knowledge",
    "tiny_truth",
    "truthfulqa_gen",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
]


@modelapi(name="steered-hf")
def steered_hf() -> type[ModelAPI]:
    """Return the provider behind ``--model steered-hf/<hub id, folder or steered-lm/tiny-chat>``."""
    from steered_lm.inspect_plugin.provider import SteeredHFAPI

    return SteeredHFAPI
