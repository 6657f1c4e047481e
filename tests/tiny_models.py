"""Tiny random models of each architecture family, seeded, and trait vectors for them."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from steered_lm.engine import GenerationRow, ScoreRequest
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
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


# Families with something of their own that an engine may trip over.
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_RECURRENT = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "initializer_range": 0.2}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
SPECIAL_FAMILIES: dict[str, Any] = {
    # positions as a bias on attention, taken from the mask
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64, initializer_range=0.2),
    "falcon_alibi": lambda: hf.FalconConfig(**_BASE, alibi=True),
    # the same, taken from the columns
    "mpt": lambda: hf.MptConfig(d_model=32, n_layers=3, n_heads=4, vocab_size=64, max_seq_len=64, initializer_range=0.2),
    # local attention that the cache knows nothing of
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        window_size=8,
        attention_types=[[["local", "global", "local"], 1]],
        initializer_range=0.2,
    ),
    # blocks that remember how many sequences came in
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT2),
    # keys wider than values
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**_BASE, "num_key_value_heads": 4},
        **_LATENT,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    # attention sinks and windows
    "gpt_oss": lambda: hf.GptOssConfig(**_GATED, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    # attention in chunks
    "llama4": lambda: hf.Llama4TextConfig(**_GATED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8),
}
# Not among them, since transformers itself gives other texts for them in a batch than alone: RWKV and RecurrentGemma.
RECURRENT_FAMILIES: dict[str, Any] = {
    "mamba": lambda: hf.MambaConfig(**_RECURRENT, state_size=4),
    "mamba2": lambda: hf.Mamba2Config(**_RECURRENT, state_size=4, num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    "lfm2": lambda: hf.Lfm2Config(**_GATED, layer_types=["conv", "full_attention", "conv"]),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **_GATED, **_MIXTURE, **_LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"]
    ),
}


def special_model(family: str, **options: Any) -> Any:
    """Return a random causal model of any family above, in evaluation mode, that never stops early."""
    config = {**FAMILIES, **SPECIAL_FAMILIES, **RECURRENT_FAMILIES}[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, **({"attn_implementation": "eager"} if family == "gemma2" else {}) | options).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def steering_kinds(model: Any, folder: Path) -> list[SteeringSpec | None]:
    """Return one spec of each kind for a model of three blocks: operations, positions, layers, several sites, weight zero, none."""
    base = spec_for(model, folder)

    def other(**settings: Any) -> SteeringSpec:
        return SteeringSpec.model_validate({**base.model_dump(), **settings})

    both = {"formality": 1.0, "emotional_tone": -1.0}
    sites = [
        {"layers": [2], "positions": "prompt", "operation": "ablate", "alpha": 0.5},
        {"layers": [0], "positions": "all", "weights": {"emotional_tone": 1.5}},
    ]
    return [
        None,
        base,
        other(positions="prompt"),
        other(positions="all", layers=(0,)),
        other(layers=(2,)),
        other(positions="all", layers=(2,), alpha=-3.0),
        other(positions="all", layers=(0, 1, 2), operation="ablate", alpha=1.0),
        other(positions="prompt", layers=(0, 2), operation="clamp"),
        other(operation="clamp", weights=both),
        base.with_weights({"formality": 0.0}),
        other(sites=sites),
        other(layers=(0, 1), weights=both, alpha=2.0),
    ]


@torch.no_grad()
def generated_alone(steerer: Steerer, row: GenerationRow, end_ids: tuple[int, ...] = (), **options: Any) -> tuple[int, ...]:
    """Return the greedy continuation of one unpadded row by transformers' own ``generate``, stop strings aside."""
    ids = torch.tensor([row.tokens])
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "repetition_penalty": row.sampling.repetition_penalty, "pad_token_id": 0, **options}
    with steerer.batch([row.spec], Layout.generation(mask)):
        output = steerer.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=row.max_new_tokens, eos_token_id=list(end_ids) or None, **options
        )
    return tuple(output[0, len(row.tokens) :].tolist())


@torch.no_grad()
def scored_alone(steerer: Steerer, request: ScoreRequest, max_length: int) -> tuple[float, bool]:
    """Return a continuation's log-likelihood and whether it is the greedy one, from one unpadded pass without a cache."""
    text = (request.context + request.continuation)[-max_length - 1 :]
    cut = len(request.context) + len(request.continuation) - len(text)
    start = len(request.context) if request.response_start is None else request.response_start
    with steerer.batch([request.spec], Layout.scored([max(start - cut, 0)], [len(text) - 1])):
        logits = steerer.model(input_ids=torch.tensor([text[:-1]]), use_cache=False).logits[0, -len(request.continuation) :]
    targets = torch.tensor(request.continuation)
    value = logits.double().log_softmax(dim=-1).gather(1, targets[:, None]).sum()
    return float(value), bool((logits.argmax(dim=-1) == targets).all())
