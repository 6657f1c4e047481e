"""A model and its contrast sets to a trait-vectors file."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn

import steered_lm
from steered_lm.chat import PromptFormat, render_chat
from steered_lm.config import Config, content_hash, write_atomic
from steered_lm.errors import ModelError, VectorsError
from steered_lm.extract.activations import Row, collect, generate_responses, residual_norm
from steered_lm.extract.confirm import JudgeOf, confirm, judges_of, matched
from steered_lm.extract.contrast import ContrastPair, ContrastSet, Split
from steered_lm.extract.directions import describe, direction, side_direction
from steered_lm.judges.trait_run import TraitJudges
from steered_lm.steering.blocks import find_blocks, hidden_size
from steered_lm.steering.vectors import (
    Confirmed,
    DirectionStats,
    Method,
    Pooling,
    ResidualNorm,
    SideCounts,
    TraitVectors,
    VectorsMeta,
    model_fingerprint,
    weights_fingerprint,
)

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Tensors = dict[str, Tensor]


class ExtractConfig(Config):
    """How vectors are built.

    Attributes:
        method: ``svd``, ``mean_diff`` or ``pca``; see :func:`steered_lm.extract.directions.direction`.
        pooling: over which tokens a row's activations are averaged.
        pairs, held_out_pairs: how many contrast pairs are run of each split.
        max_new_tokens: length of the model's own responses (``response_mean`` only).
        prompt_format: ``chat`` or ``plain``.
        allow_chance: keep directions that separate held-out pairs no better than chance.
        missing_limit: share of failed judgements above which a judge that confirms responses is not trusted.
    """

    method: Method = "svd"
    pooling: Pooling = "response_mean"
    pairs: int = 120
    held_out_pairs: int = 60
    max_new_tokens: int = 64
    batch_size: int = 32
    prompt_format: PromptFormat = "chat"
    allow_chance: bool = False
    missing_limit: float = Field(default=0.2, ge=0, le=1)
    seed: int = Field(default=0, ge=0)


def build_vectors(
    model: Any,
    tokenizer: Any,
    contrast_sets: Sequence[ContrastSet],
    layers: Sequence[int],
    config: ExtractConfig | None = None,
    *,
    model_id: str | None = None,
    blocks: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    judge: JudgeOf | None = None,
) -> TraitVectors:
    """Return trait vectors from matched pairs: the model answers the same question under two instructions that differ in the trait only.

    With a judge the responses have to be confirmed, each side on its own, and the direction is the difference of the two sides' means, as in Persona
    Vectors (see ``extract.confirm``). What is said of such a direction is of kept responses matched in disjoint pairs, the same question and
    instructions first.

    Args:
        model: a Hugging Face causal model; it is run unsteered.
        tokenizer: its tokenizer.
        contrast_sets: one per trait.
        layers: 0-indexed decoder blocks whose output is read.
        config: how; by default SVD of response means.
        model_id: the name that the file carries; by default the config's own.
        blocks: dotted path of the block list when the structure misleads.
        cache: folder that keeps the pooled activations, so that a refused or repeated build does not run the model again.
        progress: called with (what, done, total).
        judge: makes the judges that confirm responses; needs ``method`` mean_diff, ``pooling`` response_mean and instruction pairs.

    Raises:
        VectorsError: when a direction separates held-out pairs no better than chance (unless ``allow_chance``), or has no pairs; when too few
            responses are confirmed.
        JudgeError: when too many judgements failed, or a trait has no description.
        ModelError: when a layer is out of range, or the tokenizer has no chat template.
    """
    config = config or ExtractConfig()
    found = find_blocks(model, blocks)
    outside = [layer for layer in layers if not 0 <= layer < len(found)]
    if outside or not layers:
        raise ModelError(f"layers={list(layers)} is out of range: this model has blocks 0..{len(found) - 1}.")
    names = [s.trait for s in contrast_sets]
    if len(set(names)) != len(names) or not names:
        raise VectorsError(f"traits={names} must name at least one trait, each once.")
    judges = {} if judge is None else _judges(contrast_sets, judge, config)
    runner = _Runner(model, tokenizer, found, tuple(layers), config, cache, progress or (lambda *_: None), judges)
    data = {contrast.trait: runner.activations(contrast) for contrast in contrast_sets}
    directions: dict[tuple[str, int], Tensor] = {}
    stats: dict[str, dict[int, DirectionStats]] = {name: {} for name in names}
    for trait, tensors in data.items():
        for layer in layers:
            build, held = (_differences(tensors, split, layer) for split in ("build", "held_out"))
            if trait in judges:
                made = side_direction(tensors[f"build/pos/{layer}"], tensors[f"build/neg/{layer}"], build)
            else:
                made = direction(build, config.method)
            directions[trait, layer] = made.vector
            stats[trait][layer] = describe(made, config.method, build, held)
    _refuse_chance(stats, allow=config.allow_chance)
    meta = VectorsMeta(
        library_version=steered_lm.__version__,
        model_id=model_id or str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        model_fingerprint=model_fingerprint(model),
        d_model=hidden_size(model),
        n_layers=len(found),
        layers=tuple(layers),
        traits=tuple(names),
        method=config.method,
        pooling=config.pooling,
        contrast_sets={s.trait: s.digest for s in contrast_sets},
        stats=stats,
        residual_norms={layer: _norms(list(data.values()), layer) for layer in layers},
        confirmed={trait: _confirmed(data[trait], judges[trait]) for trait in judges},
        seed=config.seed,
    )
    return TraitVectors(directions, meta)


def _judges(contrast_sets: Sequence[ContrastSet], judge: JudgeOf, config: ExtractConfig) -> dict[str, TraitJudges]:
    if config.method != "mean_diff" or config.pooling != "response_mean":
        raise VectorsError(
            f"method={config.method!r}, pooling={config.pooling!r} cannot be used with a judge: its sides are not paired. "
            "Allowed: method=mean_diff, pooling=response_mean."
        )
    texts = [s.trait for s in contrast_sets if s.texts]
    if texts:
        raise VectorsError(f"trait {texts[0]!r} comes as finished texts, which no model gave. A judge confirms responses: give instruction pairs.")
    return {contrast.trait: judges_of(contrast, judge) for contrast in contrast_sets}


def _differences(tensors: Tensors, split: str, layer: int) -> Tensor:
    """Return positive minus negative of each pair; where sides were filtered on their own, of those that were matched."""
    positive, negative = tensors[f"{split}/pos/{layer}"], tensors[f"{split}/neg/{layer}"]
    pairs = tensors.get(f"{split}/matched")
    return positive - negative if pairs is None else positive[pairs[:, 0]] - negative[pairs[:, 1]]


def _confirmed(tensors: Tensors, judges: TraitJudges) -> Confirmed:
    counts = {name.removeprefix("counts/"): _counts(value) for name, value in tensors.items() if name.startswith("counts/")}
    trait, coherence = judges.both()
    return Confirmed(trait_judge=trait.name, coherence_judge=coherence.name, counts=counts)


def _counts(value: Tensor) -> SideCounts:
    return SideCounts(**dict(zip(SideCounts.model_fields, map(int, value.tolist()), strict=True)))


def _norms(data: Sequence[Tensors], layer: int) -> ResidualNorm:
    prompt, response = (torch.cat([tensors[f"norms/{part}/{layer}"] for tensors in data]) for part in ("prompt", "response"))
    return residual_norm(prompt, response)


def _refuse_chance(stats: dict[str, dict[int, DirectionStats]], *, allow: bool) -> None:
    bad = [(trait, layer, s) for trait, by_layer in stats.items() for layer, s in by_layer.items() if s.at_chance]
    if not bad:
        return
    lines = "; ".join(
        f"{trait} at layer {layer}: {s.held_out_right_side:.0%} of {s.held_out_pairs} held-out pairs right (lower bound {s.held_out_low:.0%})"
        for trait, layer, s in bad
    )
    if not allow:
        raise VectorsError(
            f"these directions separate held-out pairs no better than chance, so they are noise rather than the trait: {lines}. Try other layers, "
            "method=mean_diff, more pairs, or pass allow_chance (--allow-chance) to keep them all the same."
        )
    logger.warning("kept directions at chance level, as asked: %s", lines)


class _Runner:
    """Runs the model over the pairs of one trait after the other, with a cache of pooled activations."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        blocks: nn.ModuleList,
        layers: tuple[int, ...],
        config: ExtractConfig,
        cache: Path | None,
        progress: Progress,
        judges: Mapping[str, TraitJudges],
    ) -> None:
        self.model, self.tokenizer, self.blocks, self.layers = model, tokenizer, blocks, layers
        self.config, self.cache, self.progress, self.judges = config, cache, progress, judges

    def activations(self, contrast: ContrastSet) -> Tensors:
        """Return pooled activations ``[pairs, d_model]`` as ``<split>/<side>/<layer>`` and token norms as ``norms/<part>/<layer>``."""
        settings = self.config.model_dump(exclude={"method", "allow_chance", "batch_size", "missing_limit"})
        judges = [judge.identity for judge in self.judges[contrast.trait].both()] if contrast.trait in self.judges else []
        key = content_hash([weights_fingerprint(self.model), contrast.digest, list(self.layers), settings, *judges])[:24]
        file = self.cache / f"{contrast.trait}-{key}.safetensors" if self.cache else None
        if file is not None and file.is_file():
            return load_file(file)
        tensors = self._run_confirmed(contrast) if contrast.trait in self.judges else self._run(contrast)
        if file is not None:
            write_atomic(file, save(tensors))
        return tensors

    def _run(self, contrast: ContrastSet) -> Tensors:
        tensors: Tensors = {}
        for split, limit in (("build", self.config.pairs), ("held_out", self.config.held_out_pairs)):
            pairs = contrast.pairs(split, limit, self.config.seed)  # type: ignore[arg-type]
            rows = self._rows(contrast.trait, split, pairs)
            if not rows:
                raise VectorsError(f"trait {contrast.trait!r} has no usable {split} pairs: of {len(pairs)} none gave a response on both sides.")
            both = [side for pair in rows for side in pair]
            what = f"{contrast.trait}: activations ({split})"
            seen = _Counter(self.progress, what, len(both))
            found = collect(
                self.model, self.tokenizer, self.blocks, both, self.layers, pooling=self.config.pooling, batch_size=self.config.batch_size, tick=seen
            )
            for layer in self.layers:
                tensors[f"{split}/pos/{layer}"] = found.pooled[layer][0::2].contiguous()
                tensors[f"{split}/neg/{layer}"] = found.pooled[layer][1::2].contiguous()
                if split == "build":
                    tensors[f"norms/prompt/{layer}"], tensors[f"norms/response/{layer}"] = found.norms[layer]
        return tensors

    def _run_confirmed(self, contrast: ContrastSet) -> Tensors:
        """Return the same of responses that the judges confirm, with ``counts/<split>/<side>`` and the places ``<split>/matched`` ``[pairs, 2]``."""
        tensors: Tensors = {}
        limits: dict[Split, int] = {"build": self.config.pairs, "held_out": self.config.held_out_pairs}
        for split, limit in limits.items():
            pairs = contrast.pairs(split, limit, self.config.seed)
            prompts = [self._prompt(p.pos, p.question or "") for p in pairs] + [self._prompt(p.neg, p.question or "") for p in pairs]
            seen = _Counter(self.progress, f"{contrast.trait}: responses ({split})", len(prompts))
            replies = generate_responses(self.model, self.tokenizer, self.blocks, prompts, max_new_tokens=self.config.max_new_tokens, tick=seen)
            questions, size = [p.question or "" for p in pairs], len(pairs)
            kept = confirm(self.judges[contrast.trait], questions, replies[:size], replies[size:], missing_limit=self.config.missing_limit)
            for side, counts in kept.counts.items():
                tensors[f"counts/{split}/{side}"] = torch.tensor(list(counts.model_dump().values()))
            places = matched(kept.positive, kept.negative)
            least = 2 if split == "build" else 1
            if len(places) < least:
                raise VectorsError(
                    f"trait {contrast.trait!r}: the judge confirms too few {split} responses ({least} of each side are needed): "
                    f"{'; '.join(f'{side} {_told(counts)}' for side, counts in kept.counts.items())}. Try more pairs or another judge."
                )
            tensors[f"{split}/matched"] = torch.tensor(places)
            rows = [Row(prompts[n], replies[n]) for n in [*kept.positive, *(size + n for n in kept.negative)]]
            what = _Counter(self.progress, f"{contrast.trait}: activations ({split})", len(rows))
            found = collect(
                self.model, self.tokenizer, self.blocks, rows, self.layers, pooling="response_mean", batch_size=self.config.batch_size, tick=what
            )
            for layer in self.layers:
                tensors[f"{split}/pos/{layer}"] = found.pooled[layer][: len(kept.positive)].contiguous()
                tensors[f"{split}/neg/{layer}"] = found.pooled[layer][len(kept.positive) :].contiguous()
                if split == "build":
                    tensors[f"norms/prompt/{layer}"], tensors[f"norms/response/{layer}"] = found.norms[layer]
        return tensors

    def _rows(self, trait: str, split: str, pairs: Sequence[ContrastPair]) -> list[tuple[Row, Row]]:
        """Return the rows of each pair; a pair with an empty response on either side is left out, and said so."""
        texts = [p for p in pairs if p.question is None]
        if texts:
            if self.config.pooling != "response_mean":
                raise VectorsError(f"pooling={self.config.pooling!r} needs instruction pairs; finished texts have no prompt. Allowed: response_mean.")
            return [(Row("", p.pos), Row("", p.neg)) for p in texts]
        prompts = [self._prompt(instruction, p.question or "") for p in pairs for instruction in (p.pos, p.neg)]
        if self.config.pooling != "response_mean":
            rows = [Row(prompt, "") for prompt in prompts]
        else:
            seen = _Counter(self.progress, f"{trait}: responses ({split})", len(prompts))
            replies = generate_responses(self.model, self.tokenizer, self.blocks, prompts, max_new_tokens=self.config.max_new_tokens, tick=seen)
            rows = [Row(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        matched = list(zip(rows[0::2], rows[1::2], strict=True))
        kept = [pair for pair in matched if self.config.pooling != "response_mean" or (pair[0].response and pair[1].response)]
        if len(kept) < len(matched):
            logger.warning("trait %s: %d of %d pairs left out, the model gave an empty response", trait, len(matched) - len(kept), len(matched))
        return kept

    def _prompt(self, instruction: str, question: str) -> str:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
        return render_chat(self.tokenizer, messages, prompt_format=self.config.prompt_format)


def _told(counts: SideCounts) -> str:
    return (
        f"{counts.kept} of {counts.generated} ({counts.off_trait} on the wrong side of the trait, {counts.incoherent} incoherent, "
        f"{counts.missing} without a score)"
    )


class _Counter:
    """Adds up finished rows for the progress callback."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        self.progress(self.what, self.done, self.total)
