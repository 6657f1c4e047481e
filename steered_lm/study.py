"""One persona, one model, one judge: everything that a search and a comparison share, built once."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from steered_lm.chat import PromptFormat
from steered_lm.config import Config, content_hash
from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.errors import ModelError, UserError, VectorsError, near_misses
from steered_lm.steering.spec import Operation, Positions, SteeringSpec, Unit, VectorsRef

if TYPE_CHECKING:
    from steered_lm.harness.model import SteeredHFLM
    from steered_lm.harness.population import HarnessObjective
    from steered_lm.judges.audit_report import AuditReport
    from steered_lm.judges.base import Judge
    from steered_lm.judges.question import Question
    from steered_lm.persona.schema import Persona
    from steered_lm.search.result import Generation, OptimizeResult
    from steered_lm.steering.vectors import TraitVectors

logger = logging.getLogger(__name__)
AuditMode = Literal["refuse", "warn", "off"]


class ModelConfig(Config):
    """Which model, and how it is run.

    Attributes:
        model: hub id, folder, or the shipped tiny model.
        batch_size: most rows at once; ``auto`` is as many as the memory budget allows.
        memory_budget: what the engine may use beside the weights, such as ``4GiB``; None is a share of what is free.
        exact: the reference path in place of the engine.
        gemm: library of float32 linear layers on a CPU: ``auto``, ``torch`` or ``onednn``.
    """

    model: str = TINY_CHAT
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    prompt_format: PromptFormat = "chat"
    memory_budget: str | None = None
    exact: bool = False
    gemm: Literal["auto", "torch", "onednn"] = "auto"


class StudyConfig(Config):
    """What a search needs to know besides the optimiser.

    Attributes:
        traits: which weights are searched; empty takes every trait of the vectors file.
        layers: blocks to steer; empty takes every layer of the vectors file.
        alpha: strength of the template; weights are searched in ``[-1, 1]``.
        missing_limit: share of missing verdicts above which the run stops.
        audit: what a short audit of the judge ahead of a search does with an untrusted one: ``refuse``, ``warn``, or no audit (``off``).
        effect: the difference of two candidates that is sought, in points of persona fit; the judge must be able to show it.
    """

    persona: str
    vectors: Path
    model: ModelConfig = ModelConfig()
    traits: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    alpha: float = 0.4
    unit: Unit = "residual"
    positions: Positions = "response"
    operation: Operation = "add"
    judge: str = "stylometric"
    judge_options: dict[str, Any] = Field(default_factory=dict)
    judge_cache: Path | None = None
    max_new_tokens: int = Field(default=64, ge=1)
    missing_limit: float = Field(default=0.2, ge=0, le=1)
    audit: AuditMode = "refuse"
    effect: float = Field(default=0.5, gt=0)


class SearchConfig(Config):
    """Which optimiser runs, with what budget and seed."""

    optimizer: str = "cma_es"
    options: dict[str, Any] = Field(default_factory=dict)
    budget: int = 96
    finalists: int = 3
    seed: int = Field(default=0, ge=0)


class Study:
    """A persona, its judge and a model with its trait vectors; parts are built on first use and then kept."""

    def __init__(self, config: StudyConfig) -> None:
        """Nothing is loaded yet."""
        self.config = config
        self._audit: AuditReport | None = None

    @cached_property
    def persona(self) -> "Persona":
        """The persona."""
        from steered_lm.persona.load import load_persona

        return load_persona(self.config.persona)

    @cached_property
    def question(self) -> "Question":
        """What the judge is asked: how well responses fit that persona."""
        from steered_lm.judges.question import Question

        return Question.of_persona(self.persona)

    @cached_property
    def judge(self) -> "Judge":
        """The judge of that persona."""
        from steered_lm.judges import make_judge

        return make_judge(self.config.judge, self.question, cache=self.config.judge_cache, **self.config.judge_options)

    @cached_property
    def lm(self) -> "SteeredHFLM":
        """The model, inside the harness's model type."""
        return load_lm(self.config.model)

    @cached_property
    def vectors(self) -> "TraitVectors":
        """The trait vectors."""
        from steered_lm.steering.vectors import TraitVectors

        return TraitVectors.load(self.config.vectors)

    @cached_property
    def template(self) -> SteeringSpec:
        """The spec whose weights are searched."""
        config, meta = self.config, self.vectors.meta
        unknown = [t for t in config.traits if t not in meta.traits]
        if unknown:
            raise VectorsError(f"traits={unknown[0]!r} is not in vectors={str(config.vectors)!r}. {near_misses(unknown[0], meta.traits)}")
        settings = {"unit": config.unit, "positions": config.positions, "operation": config.operation}
        spec = SteeringSpec(vectors=VectorsRef.to(config.vectors), layers=config.layers or meta.layers, alpha=config.alpha, **settings)
        self.lm.steerer.compile(spec.with_weights(dict.fromkeys(self.traits, 1.0)))
        return spec

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits whose weights are searched."""
        return self.config.traits or self.vectors.meta.traits

    @cached_property
    def objective(self) -> "HarnessObjective":
        """The harness as fitness function."""
        from steered_lm.harness.population import HarnessObjective

        return HarnessObjective(self.lm, self.persona, self.judge, max_new_tokens=self.config.max_new_tokens)

    def sampled(self, seed: int) -> "HarnessObjective":
        """Return the objective with sampled instead of greedy responses: temperature 1, seeded."""
        from steered_lm.harness.population import HarnessObjective

        return HarnessObjective(self.lm, self.persona, self.judge, max_new_tokens=self.config.max_new_tokens, temperature=1.0, seed=seed)

    def audit(self, folder: Path) -> "AuditReport":
        """Return a short audit of the judge, made, or read from ``audit.json`` in a run's folder.

        Raises:
            JudgeError: when the judge is not trusted for ``effect`` on the tuning split's prompts, and ``audit`` says ``refuse``.
        """
        from steered_lm.judges.audit_gate import check_judge

        config = self.config
        self._audit = check_judge(
            self.judge,
            self.question,
            folder,
            effect=config.effect,
            prompts=max(2, len(self.persona.items("tune"))),
            missing_limit=config.missing_limit,
            refuse=config.audit == "refuse",
            known=self._audit,
        )
        return self._audit

    def search(
        self,
        search: SearchConfig,
        out: Path,
        progress: Callable[["Generation"], None] | None = None,
        on_audit: Callable[["AuditReport"], None] | None = None,
    ) -> "OptimizeResult":
        """Run one search in its own folder, or go on with it; the judge is audited first.

        Raises:
            JudgeError: when the judge is refused or too many of its verdicts are missing.
            RunError: when the settings make no run, or the folder holds another one.
        """
        from steered_lm.search.driver import optimize
        from steered_lm.search.protocol import SearchSpace
        from steered_lm.search.runlog import RunSettings, installed_versions
        from steered_lm.steering.vectors import weights_fingerprint

        persona, config = self.persona, self.config
        settings = RunSettings(
            persona=persona.name,
            persona_digest=persona.digest,
            model=config.model.model,
            model_fingerprint=weights_fingerprint(self.lm.model),
            judge=self.judge.name,
            judge_identity=self.judge.identity,
            space=SearchSpace(names=self.traits),
            optimizer=search.optimizer,
            optimizer_options=search.options,
            seed=search.seed,
            budget=search.budget,
            finalists=search.finalists,
            missing_limit=config.missing_limit,
            splits={split: content_hash([item.item for item in persona.items(split)]) for split in ("tune", "validate", "test")},
            versions=installed_versions("steered-lm", "torch", "transformers", "lm-eval", "cma", "scikit-learn", "numpy"),
            extra={
                "max_new_tokens": config.max_new_tokens,
                "prompt_format": config.model.prompt_format,
                "dtype": config.model.dtype,
                **numerics(config.model),
            },
        )

        def check() -> None:
            report = self.audit(out)
            if on_audit is not None:
                on_audit(report)

        before = None if config.audit == "off" else check
        return optimize(self.objective, self.template, settings, out=out, progress=progress, before=before)


def numerics(config: ModelConfig) -> dict[str, Any]:
    """Return what decides the last bits of a result: runs that differ in it are different runs."""
    from steered_lm.engine.gemm import uses_onednn

    return {"exact": config.exact, "onednn": uses_onednn(config.gemm) and not config.exact}


def load_lm(config: ModelConfig, **more: Any) -> "SteeredHFLM":
    """Return the harness's model type for a hub id, a folder or the shipped tiny model.

    Raises:
        ModelError: when there is no such model or device.
    """
    from steered_lm.harness.model import SteeredHFLM

    options: dict[str, Any] = {**config.model_dump(exclude={"model", "device"}), **more}
    if config.device is not None:
        options["device"] = config.device
    with _loading(config, more.get("peft")):
        return SteeredHFLM(pretrained=resolve_model(config.model), **options)


def load_model(config: ModelConfig) -> tuple[Any, Any]:
    """Return model and tokenizer by transformers alone, for extraction.

    Raises:
        ModelError: when there is no such model or device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = resolve_model(config.model)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _loading(config):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=config.dtype)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


@contextmanager
def _loading(config: ModelConfig, adapter: str | None = None) -> Iterator[None]:
    """Say what is wrong with a model, adapter or device that is not there; of a device, lm-eval would take the CPU in its place."""
    import torch
    from safetensors import SafetensorError

    name, _, number = (config.device or "").partition(":")
    if name == "cuda" and (int(number) if number.isdigit() else 0) >= torch.cuda.device_count():
        raise ModelError(f"device={config.device!r} is not there: this machine has {torch.cuda.device_count()} for CUDA. Leave it out, or give cpu.")
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        if adapter is None and not isinstance(problem, (OSError, ValueError)):
            raise
        said = f"{type(problem).__name__}: {str(problem).strip()}".partition("\n")[0].rstrip(".:")
        what, give = f"model={config.model!r} cannot be loaded", f"a hub id, a folder, or {TINY_CHAT}"
        if adapter is not None:
            what, give = f"peft={adapter!r} cannot be loaded with model={config.model!r}", "an adapter that was trained from that model"
        raise ModelError(f"{what}: {said}. Give {give}.") from problem


def default_layers(count: int) -> tuple[int, ...]:
    """Return the one block at about two thirds of the depth, where trait directions are usually cleanest."""
    return (round(2 * (count - 1) / 3),)


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Return layers from ``auto``, ``all``, ``4`` or ``3,4,5``.

    Raises:
        VectorsError: when the text is none of these.
    """
    if text == "auto":
        return default_layers(count)
    if text == "all":
        return tuple(range(count))
    parts = text.replace(";", ",").split(",")
    if not all(p.strip().isdigit() for p in parts):
        raise VectorsError(f"layers={text!r} is not understood. Allowed: auto, all, one 0-indexed block (4) or several (3,4,5), up to {count - 1}.")
    return tuple(int(p) for p in parts)


def build(
    config: ModelConfig,
    traits: Sequence[str],
    layers: str,
    out: Path,
    *,
    pairs_file: Path | None = None,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    judge: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    judge_cache: Path | None = None,
    **settings: Any,
) -> "TraitVectors":
    """Build trait vectors with a freshly loaded model and write them to ``out``; with a judge, from responses that it confirms."""
    from steered_lm.extract.build import ExtractConfig, build_vectors
    from steered_lm.extract.contrast import load_contrast_set, load_pair_lists
    from steered_lm.judges import make_judge
    from steered_lm.steering.blocks import layer_count

    sets = load_pair_lists(pairs_file) if pairs_file is not None else [load_contrast_set(t) for t in traits]
    if pairs_file is not None and traits:
        sets = [s for s in sets if s.trait in traits]
    rows = {} if config.batch_size == "auto" else {"batch_size": config.batch_size}
    options = ExtractConfig.parse({**settings, "prompt_format": config.prompt_format, **rows}, source="vectors build")
    judge_of = None if judge is None else partial(make_judge, judge, cache=judge_cache, **(judge_options or {}))
    model, tokenizer = load_model(config)
    chosen = parse_layers(layers, layer_count(model))
    vectors = build_vectors(model, tokenizer, sets, chosen, options, model_id=config.model, cache=cache, progress=progress, judge=judge_of)
    vectors.save(out)
    return vectors
