"""A steering spec: everything that is added to a model, in one file that optimising, evaluating and publishing share."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from steered_lm.config import Config, canonical_json, content_hash, file_hash, read_structured, write_atomic
from steered_lm.errors import SpecError, VectorsError

Unit = Literal["raw", "residual"]
Positions = Literal["all", "prompt", "response"]
Operation = Literal["add", "ablate", "clamp"]

INLINE_KEYS = ("vectors", "layer", "layers", "weights", "alpha", "unit", "positions", "operation")


class VectorsRef(Config):
    """Which trait-vectors file a spec uses: its path and the SHA-256 of its bytes."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def to(cls, path: Path | str) -> Self:
        """Refer to an existing file.

        Raises:
            VectorsError: when there is no such file.
        """
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise VectorsError(f"vectors={str(path)!r} does not exist. Build it with: steered-lm vectors build --model … --out {path}")
        return cls(path=str(file), sha256=file_hash(file))

    def verify(self) -> Path:
        """Return the file's path after checking that it is the file that the spec was made with.

        Raises:
            VectorsError: when the file is gone.
            SpecError: when its bytes have changed.
        """
        file = Path(self.path)
        if not file.is_file():
            raise VectorsError(f"vectors={self.path!r} does not exist. Build it with: steered-lm vectors build --model … --out {self.path}")
        found = file_hash(file)
        if found != self.sha256:
            raise SpecError(
                f"vectors={self.path!r} changed since the spec was written: sha256 is {found[:12]}…, the spec says {self.sha256[:12]}…. "
                "Restore the file that the spec was made with, or write a new spec for this one."
            )
        return file


class Site(Config):
    """One place where a spec acts. ``None`` takes the spec's own value."""

    layers: tuple[int, ...] = Field(min_length=1)
    weights: dict[str, float] | None = None
    alpha: float | None = None
    unit: Unit | None = None
    positions: Positions | None = None
    operation: Operation | None = None


class ResolvedSite(Config):
    """One layer of a spec with every value settled and zero weights left out."""

    layer: int
    weights: dict[str, float]
    alpha: float
    unit: Unit
    positions: Positions
    operation: Operation


class SteeringSpec(Config):
    """What is done to the residual stream: ``h <- h + alpha * s * sum_i(w_i * v_i)`` at the output of each block in ``layers``.

    Attributes:
        vectors: the trait-vectors file; None only for the unsteered model.
        weights: weight by trait name, unitless.
        layers: 0-indexed decoder blocks whose *output* is steered.
        alpha: strength; with ``unit: residual`` a share of the median token norm at that block (``s`` of the vectors file),
            with ``unit: raw`` in units of the activations themselves (``s = 1``).
        positions: ``response`` is every position whose output predicts a response token (the last prompt token and all that follow),
            ``prompt`` the positions before it, ``all`` both. Padding is never steered.
        operation: ``add``; ``ablate`` removes the share ``alpha`` of the projection on the span of the weighted directions;
            ``clamp`` sets the projection on each weighted direction to ``alpha * s * w_i``.
        sites: further places; what they do not name they take from above.
    """

    version: Literal[1] = 1
    vectors: VectorsRef | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    layers: tuple[int, ...] = ()
    alpha: float = 1.0
    unit: Unit = "residual"
    positions: Positions = "response"
    operation: Operation = "add"
    sites: tuple[Site, ...] = ()
    comment: str = ""

    @field_validator("layers")
    @classmethod
    def _distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) != len(layers):
            raise ValueError("layers repeat; name each block once")
        return layers

    @model_validator(mode="after")
    def _complete(self) -> Self:
        sites = self.resolved()
        if sites and self.vectors is None:
            raise ValueError("weights need a vectors file; set vectors, or leave weights out for the unsteered model")
        if any(w for w in self.weights.values()) and not (self.layers or self.sites):
            raise ValueError("weights need layers; set layers to the 0-indexed blocks to steer")
        layers = [s.layer for s in sites]
        if len(set(layers)) != len(layers):
            raise ValueError("two sites name the same layer; give each layer one site")
        return self

    def resolved(self) -> list[ResolvedSite]:
        """Return every layer that really acts: zero weights, empty sites and (but for ``clamp``) alpha zero drop out."""
        top = Site(layers=self.layers, weights=None) if self.layers else None
        found = []
        for site in (*([top] if top else []), *self.sites):
            weights = {k: w for k, w in (self.weights if site.weights is None else site.weights).items() if w != 0.0}
            alpha = self.alpha if site.alpha is None else site.alpha
            operation = site.operation or self.operation
            if not weights or (alpha == 0.0 and operation != "clamp"):
                continue
            for layer in site.layers:
                settled = {"unit": site.unit or self.unit, "positions": site.positions or self.positions, "operation": operation}
                found.append(ResolvedSite(layer=layer, weights=weights, alpha=alpha, **settled))
        return found

    def with_weights(self, weights: Mapping[str, float]) -> Self:
        """Return the spec with other weights, validated again."""
        return type(self).model_validate({**self.model_dump(), "weights": dict(weights)})

    @property
    def digest(self) -> str:
        """SHA-256 of what the spec does: the vectors' content hash and all settings, but neither path nor comment."""
        data = self.model_dump(mode="json", exclude={"comment"})
        if data["vectors"]:
            del data["vectors"]["path"]
        return content_hash(data)

    def save(self, path: Path | str) -> Path:
        """Write the spec as YAML (or JSON, by the file's ending); the vectors' path is written relative to the file."""
        file = Path(path)
        data = self.model_dump(mode="json", exclude_defaults=True) | {"version": 1}
        if self.vectors is not None:
            data["vectors"]["path"] = os.path.relpath(self.vectors.path, file.resolve().parent)
        text = canonical_json(data) if file.suffix == ".json" else yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        return write_atomic(file, text)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a spec file; a relative vectors path is taken from the spec's own folder.

        Raises:
            SpecError: when the file is missing, malformed, or has unknown keys.
        """
        file = Path(path).expanduser()
        data = read_structured(file, what="steering=", error=SpecError)
        if not isinstance(data, dict):
            raise SpecError(
                f"steering={str(path)!r} holds a {type(data).__name__}, not a mapping. A spec has keys like vectors, weights, layers, alpha."
            )
        reference = data.get("vectors")
        if isinstance(reference, str):
            reference = VectorsRef.to(file.parent / Path(reference).expanduser()).model_dump()
        elif isinstance(reference, dict) and isinstance(reference.get("path"), str):
            reference = {**reference, "path": str((file.resolve().parent / reference["path"]).resolve())}
        return cls.parse({**data, "vectors": reference}, source=f"steering={str(path)!r}", error=SpecError)


def parse_weights(text: str) -> dict[str, float]:
    """Parse ``formality:1;emotional_tone:-0.5``.

    Raises:
        SpecError: when a part is not ``name:number``.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, _, value = part.partition(":")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise SpecError(f"weights={text!r}: {part!r} is not trait:number. Write for example weights=formality:1;emotional_tone:-0.5") from None
    return weights


def spec_from_args(steering: str | None, inline: Mapping[str, Any]) -> SteeringSpec | None:
    """Return the spec that model arguments ask for: ``steering=<file>`` or the inline keys (``vectors=…,layer=…,weights=…``).

    Raises:
        SpecError: when both forms are mixed, or the inline form is incomplete or malformed.
    """
    given = {k: v for k, v in inline.items() if v is not None}
    unknown = set(given) - set(INLINE_KEYS)
    assert not unknown, unknown
    if steering is not None:
        if given:
            raise SpecError(f"steering={steering!r} and {', '.join(sorted(given))} were both given. Use either a spec file or the inline form.")
        return SteeringSpec.load(steering)
    if not given:
        return None
    missing = [k for k in ("vectors", "weights") if k not in given] + (["layer"] if not {"layer", "layers"} & set(given) else [])
    if missing:
        raise SpecError(
            f"inline steering lacks {', '.join(missing)}. Example: vectors=v.safetensors,layer=4,alpha=0.5,weights=formality:1;emotional_tone:-0.5"
        )
    raw = given.pop("layers", None)
    layers = raw if raw is not None else given["layer"]
    given.pop("layer", None)
    parts = layers if isinstance(layers, (list, tuple)) else str(layers).split(";")
    weights = given["weights"] if isinstance(given["weights"], Mapping) else parse_weights(str(given["weights"]))
    data = {**given, "vectors": VectorsRef.to(given["vectors"]).model_dump(), "weights": weights, "layers": parts}
    return SteeringSpec.parse(data, source="inline steering", error=SpecError)
