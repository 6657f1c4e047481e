"""Trait vectors: unit directions in the residual stream, one per trait and layer, in one ``.safetensors`` file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from steered_lm.config import Config, write_atomic
from steered_lm.errors import VectorsError, near_misses
from steered_lm.steering.blocks import hidden_size, layer_count

Method = Literal["svd", "mean_diff", "pca", "random"]
Pooling = Literal["response_mean", "prompt_mean", "prompt_last"]
_SAMPLED = 64  # values of each weight that go into its fingerprint


class DirectionStats(Config):
    """How one direction came out.

    Attributes:
        pairs, held_out_pairs: number of contrast pairs it was built on and checked on.
        singular_values: spectrum of the paired differences (of the centred ones for ``pca``), largest first, at most 16.
        explained_variance: share of the paired differences' sum of squares that lies along the direction.
        right_side: share of build pairs whose difference has a positive projection.
        held_out_right_side: the same on held-out pairs; 0.5 is chance.
        held_out_low: lower end of its exact one-sided 95 % (Clopper-Pearson) interval; a direction with ``held_out_low <= 0.5`` is not
            told from chance.
        cosine: cosine with the direction that each other method gives on the same pairs.
        separation: mean held-out projection of the differences over their standard deviation.
    """

    pairs: int
    held_out_pairs: int
    singular_values: tuple[float, ...]
    explained_variance: float
    right_side: float
    held_out_right_side: float
    held_out_low: float
    cosine: dict[str, float]
    separation: float

    @property
    def at_chance(self) -> bool:
        """Whether held-out pairs are separated no better than chance."""
        return self.held_out_low <= 0.5


class ResidualNorm(Config):
    """Median over tokens of the L2 norm of the residual stream at one block's output, by which positions are steered."""

    all: float
    prompt: float
    response: float


class SideCounts(Config):
    """What became of one side's responses when a judge had to confirm them.

    Attributes:
        generated: responses that the model gave.
        kept: those that the direction, or its check, rests on.
        off_trait: coherent ones on the wrong side of the trait score.
        incoherent: those with a coherence below the limit.
        missing: those without both scores: empty ones, refusals, failed judgements.
    """

    generated: int
    kept: int
    off_trait: int
    incoherent: int
    missing: int


class Confirmed(Config):
    """Which judges confirmed the responses of one trait, and the counts as ``build/pos``, ``build/neg``, ``held_out/pos``, ``held_out/neg``."""

    trait_judge: str
    coherence_judge: str
    counts: dict[str, SideCounts]


class VectorsMeta(Config):
    """What a trait-vectors file says of itself."""

    format: Literal["steered-lm/trait-vectors/1"] = "steered-lm/trait-vectors/1"
    library_version: str
    model_id: str
    model_fingerprint: str
    d_model: int
    n_layers: int
    layers: tuple[int, ...]
    traits: tuple[str, ...]
    method: Method
    pooling: Pooling
    sign_convention: str = "positive = the trait's high pole (pos minus neg)"
    contrast_sets: dict[str, str] = Field(default_factory=dict)
    stats: dict[str, dict[int, DirectionStats]] = Field(default_factory=dict)
    residual_norms: dict[int, ResidualNorm]
    confirmed: dict[str, Confirmed] = Field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class TraitVectors:
    """Unit directions ``[d_model]`` float32 by (trait, layer), with the facts of how they were made.

    Raises:
        VectorsError: when a direction is missing, has a wrong shape, is not finite or not of unit norm.
    """

    directions: Mapping[tuple[str, int], Float[Tensor, " d_model"]]
    meta: VectorsMeta
    source: str = "<memory>"

    def __post_init__(self) -> None:
        """Check every direction against the metadata."""
        wanted = {(trait, layer) for trait in self.meta.traits for layer in self.meta.layers}
        if set(self.directions) != wanted:
            odd = sorted(set(self.directions) ^ wanted)[:3]
            raise VectorsError(f"vectors={self.source!r} is damaged: directions {odd} do not match its metadata. Build it again.")
        for (trait, layer), vector in self.directions.items():
            where = f"vectors={self.source!r}: {trait} at layer {layer}"
            if vector.shape != (self.meta.d_model,):
                raise VectorsError(f"{where} has shape {tuple(vector.shape)}, its metadata says d_model={self.meta.d_model}. Build the file again.")
            if not torch.isfinite(vector).all():
                raise VectorsError(f"{where} holds NaN or infinity. Build the file again (in float32 if the model overflows).")
            if abs(float(vector.norm()) - 1.0) > 1e-3:
                raise VectorsError(f"{where} has norm {float(vector.norm()):.4g}; trait vectors have unit norm. Build the file again.")

    def vector(self, trait: str, layer: int) -> Float[Tensor, " d_model"]:
        """Return one unit direction.

        Raises:
            VectorsError: when the file has no such trait or layer; the message lists what it has.
        """
        if trait not in self.meta.traits:
            raise VectorsError(
                f"weights name the trait {trait!r}, which vectors={self.source!r} does not hold. {near_misses(trait, self.meta.traits)}"
            )
        if layer not in self.meta.layers:
            raise VectorsError(
                f"layer={layer} is not in vectors={self.source!r}. Allowed: {', '.join(map(str, self.meta.layers))}. "
                f"Build it with: steered-lm vectors build --layers {layer} …"
            )
        return self.directions[trait, layer]

    def scale(self, layer: int, unit: str, positions: str) -> float:
        """Return ``s``: 1 for ``raw``, the median token norm over the steered positions for ``residual``."""
        return 1.0 if unit == "raw" else float(getattr(self.meta.residual_norms[layer], positions))

    def check_model(self, model: nn.Module, *, allow_foreign: bool = False) -> None:
        """Refuse vectors that were made for another model.

        Raises:
            VectorsError: when d_model, the number of layers or (unless ``allow_foreign``) the fingerprint differ.
        """
        for name, mine, its in (("d_model", self.meta.d_model, hidden_size(model)), ("n_layers", self.meta.n_layers, layer_count(model))):
            if mine != its:
                raise VectorsError(
                    f"vectors={self.source!r} were built for {self.meta.model_id!r} with {name}={mine}; this model has {name}={its}. "
                    "Build vectors for this model: steered-lm vectors build --model …"
                )
        if not allow_foreign and model_fingerprint(model) != self.meta.model_fingerprint:
            raise VectorsError(
                f"vectors={self.source!r} were built for {self.meta.model_id!r}, and this model's fingerprint differs. Build vectors for this model, "
                "or pass allow_foreign_vectors=true to use them all the same (a fine-tune of the same base, say)."
            )

    def save(self, path: Path | str) -> Path:
        """Write the file in one piece and return its path."""
        tensors = {f"{trait}/{layer}": vector.detach().to("cpu", torch.float32).contiguous() for (trait, layer), vector in self.directions.items()}
        return write_atomic(Path(path), save_tensors(tensors, metadata={"steered_lm": self.meta.model_dump_json()}))

    @classmethod
    def load(cls, path: Path | str) -> "TraitVectors":
        """Read a file.

        Raises:
            VectorsError: when it is missing, truncated, or not a trait-vectors file.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise VectorsError(f"vectors={str(path)!r} does not exist. Build it with: steered-lm vectors build --model … --out {path}")
        data = file.read_bytes()
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise VectorsError(f"vectors={str(path)!r} is truncated or not a safetensors file ({error}). Build or copy it again.") from error
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get("steered_lm")
        if text is None:
            raise VectorsError(
                f"vectors={str(path)!r} is a safetensors file without trait-vectors metadata. Build one with: steered-lm vectors build"
            )
        meta = VectorsMeta.parse(json.loads(text), source=f"the metadata of vectors={str(path)!r}", error=VectorsError)
        directions = {(trait, int(layer)): tensor for (trait, _, layer), tensor in ((key.rpartition("/"), tensor) for key, tensor in tensors.items())}
        return cls(directions, meta, source=str(path))

    @cached_property
    def matrix(self) -> dict[int, Float[Tensor, "traits d_model"]]:
        """All directions of a layer as one matrix, in the order of ``meta.traits``."""
        return {layer: torch.stack([self.directions[trait, layer] for trait in self.meta.traits]) for layer in self.meta.layers}


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of the model's shape and of a slice of its input embeddings.

    Values are rounded to bfloat16, so the same checkpoint has one fingerprint in float32 and bfloat16, quantised blocks or not.
    """
    causal: Any = model
    weight, text = causal.get_input_embeddings().weight, causal.config.get_text_config()
    digest = hashlib.sha256(f"{text.model_type}/{hidden_size(model)}/{layer_count(model)}/{text.vocab_size}".encode())
    for row in _sample_rows(int(weight.shape[0])):
        digest.update(weight[row].detach().to("cpu", torch.float32).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of the model's shape, of its embeddings and of a sample of each weight, for what is kept of *this* model's results.

    :func:`model_fingerprint` is the same for a model and its fine-tunes whose embeddings were left alone, as vectors fit all of them; what one
    of them wrote is not what another would have written.
    """
    digest = hashlib.sha256(model_fingerprint(model).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        digest.update(f"{name}/{tuple(weight.shape)}".encode())
        if not flat.is_meta:
            digest.update(flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _sample_rows(count: int) -> Sequence[int]:
    return range(0, count, max(1, count // 64))


def random_vectors(like: TraitVectors, *, seed: int, trait: str = "random") -> TraitVectors:
    """Return one random unit direction per layer, uniform on the sphere: the control arm of equal norm."""
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for layer in like.meta.layers:
        draw = torch.randn(like.meta.d_model, generator=generator)
        directions[trait, layer] = draw / draw.norm()
    meta = like.meta.model_copy(update={"traits": (trait,), "method": "random", "contrast_sets": {}, "stats": {}, "seed": seed})
    return TraitVectors(directions, meta, source=f"random direction, seed {seed}")
