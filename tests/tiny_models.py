"""Tiny random models of each architecture family, seeded, and trait vectors for them."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.steering.vectors import ResidualNorm, TraitVectors, VectorsMeta, model_fingerprint

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_GATED = {**_BASE, "num_key_value_heads": 2, "intermediate_size": 48}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}

FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_GATED),
    "mistral": lambda: hf.MistralConfig(**_GATED, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**_GATED),
    "qwen3": lambda: hf.Qwen3Config(**_GATED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_GATED, head_dim=8, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=8),
    "phi3": lambda: hf.Phi3Config(**_GATED),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_BASE, intermediate_size=48),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "opt": lambda: hf.OPTConfig(**{**_BASE, "init_std": 0.2}, ffn_dim=48, word_embed_proj_dim=32),
    "falcon": lambda: hf.FalconConfig(**_BASE),
    "mixtral": lambda: hf.MixtralConfig(**_GATED, num_local_experts=3),
}
TRAITS = ("formality", "emotional_tone")


def random_model(family: str = "llama", seed: int = 0) -> Any:
    """Return a random causal model of a family, in evaluation mode, that never stops early."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager" if family == "gemma2" else None).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def vectors_for(model: Any, layers: tuple[int, ...] = (0, 1, 2), seed: int = 0, norm: float = 4.0) -> TraitVectors:
    """Return random unit directions of two traits for a model."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.get_text_config().hidden_size
    draws = {(trait, layer): torch.randn(width, generator=generator) for trait in TRAITS for layer in layers}
    meta = VectorsMeta(
        library_version="0",
        model_id="random",
        model_fingerprint=model_fingerprint(model),
        d_model=width,
        n_layers=model.config.get_text_config().num_hidden_layers,
        layers=layers,
        traits=TRAITS,
        method="svd",
        pooling="response_mean",
        residual_norms={layer: ResidualNorm(all=norm, prompt=norm / 2, response=norm * 2) for layer in layers},
    )
    return TraitVectors({key: draw / draw.norm() for key, draw in draws.items()}, meta)


def spec_for(model: Any, folder: Path, **settings: Any) -> SteeringSpec:
    """Return a spec whose vectors file is written into a folder."""
    path = vectors_for(model).save(folder / "vectors.safetensors")
    return SteeringSpec(**{"vectors": VectorsRef.to(path), "weights": {"formality": 1.0}, "layers": (1,), "unit": "raw", "alpha": 4.0, **settings})
