"""Measures specs and sweeps on the same items, reusing what is finished, and gathers all of it for the page."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.cost.cells import Cells, Items
from steered_lm.cost.config import CostConfig
from steered_lm.cost.gather import fluency_measures, item_measure, samples, token_measure
from steered_lm.cost.measures import Planned, default_tasks, plan_task, plan_trait, readings
from steered_lm.cost.sweep import Sweep
from steered_lm.errors import JudgeError, SpecError, UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.items import BROKEN, ItemResult, evaluate_items, load_task, task_digest
from steered_lm.harness.model import SteeredHFLM
from steered_lm.judges.base import EMPTY, FINDINGS
from steered_lm.measure.divergence import Calibration, calibrated, kl_to_unsteered, with_alpha
from steered_lm.measure.means import TokenMean
from steered_lm.measure.passages import Passage, read_passages
from steered_lm.measure.perplexity import perplexities
from steered_lm.measure.texts import ENGLISH, text_file
from steered_lm.report.assemble import provenance
from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.data import ModelInfo, Sample, Scalar
from steered_lm.search.protocol import Candidate
from steered_lm.search.runlog import installed_versions
from steered_lm.steering.spec import SteeringSpec
from steered_lm.steering.vectors import TraitVectors, model_fingerprint
from steered_lm.study import load_lm, numerics

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
# what a response is, and no failure of who judges it
_FINDINGS = FINDINGS | {EMPTY, BROKEN}


class _Arm(NamedTuple):
    shown: CostArm
    spec: SteeringSpec | None


class _Loaded(NamedTuple):
    planned: Planned
    tasks: tuple[ChatTask, ...]


@dataclass(frozen=True)
class _Text:
    """A text as the model reads it."""

    name: str
    digest: str
    passages: Sequence[Passage]
    length: int


def run_cost(config: CostConfig, progress: Progress = lambda what, done, total: None) -> CostData:
    """Measure everything that is asked for, and return the data of the page.

    What was finished under ``config.out`` is reused. Whatever is wrong with specs, tasks, data or judges is said before anything is measured.

    Raises:
        UserError: when something that was asked for cannot be used.
        JudgeError: when too many verdicts are missing; finished tasks stay finished.
    """
    specs = _specs(config.steering)
    sweeps = {name: None if config.sweep is None else Sweep.of_text(config.sweep, spec) for name, spec in specs.items()}
    plans = _plans(config)
    lm = load_lm(config.model)
    for spec in specs.values():
        lm.steerer.compile(spec)
    loaded = [_Loaded(plan, tuple(load_task(name, _metadata(config, plan), num_fewshot=config.num_fewshot) for name in plan.tasks)) for plan in plans]
    text = _text(config, lm)
    run = _Run(config, lm, Cells(config.out / "cells"), progress, text)
    arms = run.arms(specs, sweeps)
    measures, replies = run.measures(loaded, arms)
    logger.info("%d measurements made, %d reused from %s", run.cells.made, run.cells.reused, run.cells.folder)
    axis = next((sweep.name for sweep in sweeps.values() if sweep is not None), None)
    return CostData(
        title=f"What steering {config.model.model} buys and costs",
        model=run.model_info(),
        axis=axis,
        arms=tuple(arm.shown for arm in arms),
        measures=tuple(measures),
        tolerance=config.tolerance,
        perplexity_tolerance=config.perplexity_tolerance,
        samples=replies,
        settings=run.settings(),
        provenance=provenance({f"spec {name}": spec.digest[:16] for name, spec in specs.items()}),
        seed=config.seed,
    )


def _specs(paths: Sequence[Path]) -> dict[str, SteeringSpec]:
    found: dict[str, SteeringSpec] = {}
    for path in paths:
        name = path.stem if all(path.stem != other.stem for other in paths if other != path) else str(path)
        if name in found:
            raise SpecError(f"steering={str(path)!r} is given twice. Name each spec once.")
        spec = SteeringSpec.load(path)
        if spec.vectors is None:
            raise SpecError(f"steering={str(path)!r} has no vectors, so it is the unsteered model, which is always among the arms. Leave it out.")
        found[name] = spec
    return found


def _plans(config: CostConfig) -> list[Planned]:
    plans = [plan_task(name, config.data) for name in config.tasks or default_tasks(config.model.model)]
    plans += [plan_trait(trait) for trait in config.traits]
    if config.persona is not None:
        plans.append(plan_task("persona_judge"))
    repeated = [name for name, count in Counter(plan.name for plan in plans).items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]!r} is asked for twice. Name each task and trait once.")
    return plans


def _metadata(config: CostConfig, plan: Planned) -> dict[str, Any]:
    """Return the options of a task; who judges too little is decided here, for all arms together, and not by the task."""
    found: dict[str, Any] = {} if config.data is None else {"data": config.data}
    if plan.trait is not None:
        own = {} if plan.tasks[0] != "pv_trait" else {"trait": plan.trait}
        found |= {**own, "judge": config.judge_of(plan.trait), "samples": config.samples, "max_gen_toks": config.max_new_tokens}
    elif plan.tasks == ("persona_judge",):
        persona = {} if config.persona is None else {"persona": config.persona}
        found |= {**persona, "split": config.persona_split, "judge": config.judge_of(None), "max_gen_toks": config.max_new_tokens}
    elif config.judge is not None and plan.name in ("truthfulqa_gen", "lamp_7"):
        found |= {"judge": config.judge}
    if "judge" not in found:
        return found
    options = {f"judge_{name}": value for name, value in config.judge_options.items()} if config.judge is not None else {}
    offline = found["judge"] in ("stylometric", "markers")
    cache = {} if offline else {"cache": str(config.judge_cache or config.out / "verdicts.sqlite")}
    return found | options | cache | {"missing_limit": 1.0}


def _text(config: CostConfig, lm: SteeredHFLM) -> _Text | None:
    if config.text == "none":
        return None
    name = config.text or ("tiny_talk" if config.model.model == TINY_CHAT else ENGLISH)
    path = text_file(name)
    passages = read_passages(path, lm.tokenizer, lm.prefix_token_id, split=config.split, prompt_format=config.model.prompt_format)
    return _Text(name, file_hash(path), passages, lm.max_length)


class _Run:
    """One run: a model, a text, and the finished measurements."""

    def __init__(self, config: CostConfig, lm: SteeredHFLM, cells: Cells, progress: Progress, text: _Text | None) -> None:
        self.config, self.lm, self.cells, self.progress, self.text = config, lm, cells, progress, text
        self.fingerprint = model_fingerprint(lm.model)
        model = config.model
        self._facts = {
            "model": self.fingerprint,
            "dtype": str(lm.model.dtype),
            "prompt_format": model.prompt_format,
            "numerics": numerics(model),
            "versions": installed_versions("steered-lm", "torch", "transformers", "lm-eval"),
        }

    # -- arms -----------------------------------------------------------------------------------------------------------------

    def arms(self, specs: Mapping[str, SteeringSpec], sweeps: Mapping[str, Sweep | None]) -> list[_Arm]:
        """Return the unsteered model, every spec at every value of its sweep, and the arms of the matrix."""
        found = [_Arm(CostArm(name=UNSTEERED), None)]
        for name, spec in specs.items():
            sweep = sweeps[name]
            base = spec if self.config.kl is None else self._at_kl(spec, self.config.kl)
            for value in (None,) if sweep is None else sweep.values:
                here = base if sweep is None or value is None else self._swept(sweep, spec, value)
                title = name if sweep is None else f"{name}, {sweep.name} {value:g}"
                if not here.resolved():
                    if sweep is None:
                        raise SpecError(f"steering={name!r} has no weight that is not zero, so there is nothing to measure. Give it weights.")
                    continue  # zero is the unsteered model, which is there
                found.append(_Arm(CostArm(name=title, series=name, x=value, digest=here.digest, settings=_settings(here)), here))
        if self.config.side_effects:
            found += self._side_effects(next(iter(specs.values())))
        for arm in found:
            if arm.spec is not None:
                self.lm.steerer.compile(arm.spec)
        return found

    def _swept(self, sweep: Sweep, spec: SteeringSpec, value: float) -> SteeringSpec:
        if sweep.setting == "kl":
            return with_alpha(spec, 0.0) if value == 0 else self._at_kl(spec, value)
        here = sweep.at(spec, value)
        return here if self.config.kl is None or not here.resolved() else self._at_kl(here, self.config.kl)

    def _side_effects(self, spec: SteeringSpec) -> list[_Arm]:
        assert spec.vectors is not None
        found = []
        for trait in TraitVectors.load(spec.vectors.verify()).meta.traits:
            alone = SteeringSpec.model_validate({**spec.model_dump(exclude={"sites", "comment"}), "weights": {trait: 1.0}, "layers": _layers(spec)})
            here = alone if self.config.kl is None else self._at_kl(alone, self.config.kl)
            shown = CostArm(name=f"{trait} alone", trait=trait, digest=here.digest, settings=_settings(here))
            found.append(_Arm(shown, here))
        return found

    def _at_kl(self, spec: SteeringSpec, kl: float) -> SteeringSpec:
        """Return the spec at the alpha that is ``kl`` nats a token away from the unsteered model on the text."""
        assert self.text is not None
        key = Cells.key(what="calibration", text=self.text.digest, split=self.config.split, spec=spec.digest, kl=kl, **self._facts)
        found = self.cells.get(key, Calibration)
        if found is None:
            found = calibrated(self.lm.steerer, self.text.passages, spec, kl, length=self.text.length)
            self.cells.put(key, found)
        return with_alpha(spec, found.alpha)

    # -- measures -------------------------------------------------------------------------------------------------------------

    def measures(self, loaded: Sequence[_Loaded], arms: Sequence[_Arm]) -> tuple[list[Measure], tuple[Sample, ...]]:
        """Measure everything under every arm; traits alone under the arms of the matrix."""
        total = sum(len(one.tasks) for one in loaded) + (self.text is not None)
        done = 0
        found: list[Measure] = []
        written: dict[str, dict[str, list[ItemResult]]] = {}
        for one in loaded:
            wanted = [arm for arm in arms if arm.shown.trait is None or one.planned.trait is not None]
            results: dict[str, list[ItemResult]] = {arm.shown.name: [] for arm in wanted}
            for task in one.tasks:
                self.progress(one.planned.name, done, total)
                for name, items in self._task(task, wanted).items():
                    results[name] += items
                done += 1
            found += [item_measure(reading, results, grouped=len(one.tasks) > 1) for reading in readings(one.tasks[0], one.planned)]
            if one.tasks[0].OUTPUT_TYPE == "generate_until":
                written[one.planned.name] = results
        if self.text is not None:
            self.progress(f"perplexity of {self.text.name}", done, total)
            found += self._tokens([arm for arm in arms if arm.shown.trait is None], self.text)
        self.progress("done", total, total)
        main = [arm.shown.name for arm in arms if arm.shown.trait is None]
        return found + fluency_measures(written, main), samples(written, main)

    def _task(self, task: ChatTask, arms: Sequence[_Arm]) -> dict[str, list[ItemResult]]:
        config = self.config
        digest = task_digest(task, limit=config.limit)
        sampled = bool(task.config.generation_kwargs and task.config.generation_kwargs.get("do_sample"))
        # an arm's name is among what its draws start from
        facts = {"what": "items", "task": task.task_name, "digest": digest, **self._facts}
        keys = {
            arm.shown.name: Cells.key(
                arm=None if arm.spec is None else arm.spec.digest, draw=[config.seed, arm.shown.name] if sampled else None, **facts
            )
            for arm in arms
        }
        found = {name: cell.items for name, key in keys.items() if (cell := self.cells.get(key, Items)) is not None}
        lacking = [arm for arm in arms if arm.shown.name not in found]
        if lacking:
            candidates = [Candidate(name=arm.shown.name, spec=arm.spec) for arm in lacking]
            made = evaluate_items(self.lm, task, candidates, limit=config.limit, seed=config.seed)
            _check_judged(task.task_name, made, config.missing_limit)
            for name, items in made.items():
                self.cells.put(keys[name], Items(items=tuple(items)))
                found[name] = tuple(items)
        return {name: list(found[name]) for name in keys}

    def _tokens(self, arms: Sequence[_Arm], text: _Text) -> list[Measure]:
        """Return perplexity, and KL divergence to the unsteered model."""
        facts = {"text": text.digest, "split": self.config.split, "length": text.length, **self._facts}
        found: dict[str, dict[str, TokenMean]] = {"perplexity": {}, "kl": {}}
        for what, means in found.items():
            keys = {arm.shown.name: Cells.key(what=what, arm=None if arm.spec is None else arm.spec.digest, **facts) for arm in arms}
            kept = {name: cell for name, key in keys.items() if (cell := self.cells.get(key, TokenMean)) is not None}
            lacking = [arm for arm in arms if arm.shown.name not in kept]
            specs = [arm.spec for arm in lacking]
            if what == "perplexity":
                made = [one.nll for one in perplexities(self.lm.engine, text.passages, specs, length=text.length)] if lacking else []
            else:
                made = kl_to_unsteered(self.lm.steerer, text.passages, specs, length=text.length) if lacking else []
            for arm, mean in zip(lacking, made, strict=True):
                self.cells.put(keys[arm.shown.name], mean)
                kept[arm.shown.name] = mean
            means.update({arm.shown.name: kept[arm.shown.name] for arm in arms})
        about = f"of {text.name}, by token"
        return [
            token_measure(f"perplexity of {text.name}", "cost", found["perplexity"], exponentiate=True, about=f"perplexity {about}"),
            token_measure("kl", "note", found["kl"], exponentiate=False, about=f"KL divergence to the unsteered model {about}, in nats"),
        ]

    # -- facts ----------------------------------------------------------------------------------------------------------------

    def model_info(self) -> ModelInfo:
        """Return what the page says of the model."""
        model = self.lm.model
        count = sum(p.numel() for p in model.parameters())
        dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
        return ModelInfo(name=self.config.model.model, fingerprint=self.fingerprint, parameters=count, dtype=dtype, device=device)

    def settings(self) -> dict[str, Scalar]:
        """Return what the page says of the run."""
        config = self.config
        found: dict[str, Scalar] = {
            "sweep": config.sweep,
            "KL of each spec": config.kl,
            "judge": config.judge,
            "examples in a prompt": config.num_fewshot,
        }
        found |= {"items a task": config.limit, "responses a question": config.samples, "max new tokens": config.max_new_tokens, "seed": config.seed}
        return {name: value for name, value in found.items() if value is not None}


def _layers(spec: SteeringSpec) -> tuple[int, ...]:
    return spec.layers or tuple(layer for site in spec.sites for layer in site.layers)


def _settings(spec: SteeringSpec) -> dict[str, Scalar]:
    weights = ", ".join(f"{trait} {weight:g}" for trait, weight in spec.weights.items())
    layers = ", ".join(map(str, _layers(spec)))
    return {
        "alpha": round(spec.alpha, 6),
        "layers": layers,
        "weights": weights,
        "unit": spec.unit,
        "positions": spec.positions,
        "operation": spec.operation,
    }


def _check_judged(task: str, found: Mapping[str, Sequence[ItemResult]], limit: float) -> None:
    reasons = [reason for items in found.values() for item in items for reason in item.missing if reason not in _FINDINGS]
    asked = sum(max(len(item.responses), 1) for items in found.values() for item in items)
    if len(reasons) > limit * asked:
        worst, count = Counter(reasons).most_common(1)[0]
        raise JudgeError(
            f"{task}: {len(reasons)} of {asked} verdicts are missing ({len(reasons) / asked:.0%}; limit {limit:.0%}), {count} because: {worst}. "
            "Finished tasks are kept: mend the judge and run the same command again."
        )
