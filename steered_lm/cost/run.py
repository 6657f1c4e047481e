"""Measures all arms on the same items, reusing what is finished, and gathers everything for the page."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steered_lm.cost.arms import Arm, base_arms, check_names, load_specs, prompted_arms, side_effect_arms, trained_arm
from steered_lm.cost.cells import Cells, check_folder
from steered_lm.cost.config import CostConfig
from steered_lm.cost.gather import fluency_measures, item_measure, samples, token_measure
from steered_lm.cost.measures import TRAIT_GROUPS, Planned, default_tasks, plan_task, plan_trait, readings
from steered_lm.cost.measuring import Measuring, Text, adapter_digest, read_text
from steered_lm.cost.sweep import Sweep
from steered_lm.errors import UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.items import ItemResult, load_task, takes_examples
from steered_lm.harness.quiet import quiet_loading
from steered_lm.judges import COMPUTED
from steered_lm.measure.means import TokenMean
from steered_lm.report.assemble import provenance
from steered_lm.report.cost_data import UNSTEERED, CostData, Measure
from steered_lm.report.data import ModelInfo, Sample, Scalar
from steered_lm.steering.spec import SteeringSpec
from steered_lm.steering.vectors import model_fingerprint
from steered_lm.study import load_lm

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


class _Loaded(NamedTuple):
    planned: Planned
    tasks: tuple[ChatTask, ...]


class _Results(NamedTuple):
    """What was measured: by plan and arm the items, by arm the text's tokens."""

    items: dict[str, dict[str, list[ItemResult]]]
    perplexity: dict[str, TokenMean]
    kl: dict[str, TokenMean]


@quiet_loading()
def run_cost(config: CostConfig, progress: Progress = lambda what, done, total: None) -> CostData:
    """Measure everything that is asked for, and return the data of the page.

    What was finished under ``config.out`` is reused. Whatever is wrong with specs, tasks, data or judges is said before anything is measured.

    Raises:
        UserError: when something that was asked for cannot be used.
        JudgeError: when too many verdicts are missing; finished tasks stay finished.
    """
    specs = load_specs(config.steering)
    sweeps = {name: None if config.sweep is None else _sweep(config.sweep, name, spec) for name, spec in specs.items()}
    plans = _plans(config)
    adapters = {name: adapter_digest(folder) for name, folder in config.peft.items()}
    check_folder(config.out / "cells")
    # tasks come with their data and judges, and what is wrong with those is known sooner than a model is loaded
    loaded = [_Loaded(plan, tuple(load_task(name, _metadata(config, plan), num_fewshot=config.num_fewshot) for name in plan.tasks)) for plan in plans]
    if config.num_fewshot and not any(takes_examples(task) for one in loaded for task in one.tasks):
        names = ", ".join(plan.name for plan in plans)
        raise UserError(f"num_fewshot={config.num_fewshot}: none of {names} takes examples. Leave it out, or add mmlu or truthfulqa_mc1.")
    lm = load_lm(config.model)
    for spec in specs.values():
        lm.steerer.compile(spec)
    cells = Cells(config.out / "cells")
    base = Measuring(config, lm, cells, read_text(config, lm))
    arms = base_arms(specs, sweeps, config.kl, base.at_kl)
    arms += prompted_arms(config.system)
    arms += side_effect_arms(next(iter(specs.values())), config.kl, base.at_kl) if config.side_effects else []
    trained = [trained_arm(name, folder) for name, folder in config.peft.items()]
    check_names([*arms, *trained])
    for arm in arms:
        if arm.spec is not None:
            lm.steerer.compile(arm.spec)
    base.check_text(arms)
    counter = _Counter(progress, (1 + len(adapters)) * (sum(len(one.tasks) for one in loaded) + (base.text is not None)))
    results = _measured(base, loaded, arms, counter)
    info, text = _model_info(config, base), base.text
    del base, lm  # one model at a time in memory
    for arm, (name, digest) in zip(trained, adapters.items(), strict=True):
        gc.collect()  # hooks and model hold each other
        model = Measuring(config, load_lm(config.model, peft=str(config.peft[name])), cells, text, adapter=digest)
        more = _measured(model, loaded, [arm], counter)
        del model
        for what, found in more.items.items():
            results.items[what].update(found)
        results.perplexity.update(more.perplexity)
    counter.end()
    logger.info("%d measurements made, %d reused from %s", cells.made, cells.reused, cells.folder)
    every = [*arms, *trained]
    measures, replies = _gathered(loaded, results, text, [arm.name for arm in every if arm.main])
    digests = {f"spec {name}": spec.digest for name, spec in specs.items()} | {f"adapter {name}": digest for name, digest in adapters.items()}
    return CostData(
        title=f"What steering {_short(config.model.model)} buys and costs",
        model=info,
        axis=next((sweep.name for sweep in sweeps.values() if sweep is not None), None),
        arms=tuple(arm.shown for arm in every),
        measures=tuple(measures),
        tolerance=config.tolerance,
        perplexity_tolerance=config.perplexity_tolerance,
        samples=replies,
        settings=_settings(config),
        provenance=provenance({what: digest[:16] for what, digest in digests.items()}),
        seed=config.seed,
    )


def _short(model: str) -> str:
    """Return a model's name, without the folders around it where it is one."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _sweep(text: str, name: str, spec: SteeringSpec) -> Sweep:
    try:
        found = Sweep.of_text(text, spec)
        if found.setting != "kl":
            found.at(spec, found.values[0])
    except UserError as problem:
        raise type(problem)(f"steering={name!r}: {problem}") from problem
    return found


class _Counter:
    """Counts finished parts for a progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def begin(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1

    def end(self) -> None:
        self._progress("done", self._total, self._total)


def _measured(model: Measuring, loaded: Sequence[_Loaded], arms: Sequence[Arm], counter: _Counter) -> _Results:
    """Measure everything under every arm; rows of the matrix are measured on traits alone."""
    found: dict[str, dict[str, list[ItemResult]]] = {}
    for one in loaded:
        wanted = [arm for arm in arms if arm.main or one.planned.trait is not None]
        results: dict[str, list[ItemResult]] = {arm.name: [] for arm in wanted}
        for task in one.tasks:
            counter.begin(one.planned.name)
            for name, items in model.items(task, wanted).items():
                results[name] += items
        found[one.planned.name] = results
    if model.text is None:
        return _Results(found, {}, {})
    counter.begin(f"perplexity of {model.text.name}")
    # a plain text has no prompt that a system turn could be part of
    readers = [arm for arm in arms if arm.main and (arm.system is None or model.text.examples)]
    # the divergence is from the same model unsteered: of a trained or a prompted one it would say nothing
    steered = [arm for arm in readers if arm.system is None] if any(arm.name == UNSTEERED for arm in readers) else []
    return _Results(found, model.perplexity(readers), model.kl(steered))


def _gathered(loaded: Sequence[_Loaded], results: _Results, text: Text | None, arms: Sequence[str]) -> tuple[list[Measure], tuple[Sample, ...]]:
    found: list[Measure] = []
    written: dict[str, dict[str, list[ItemResult]]] = {}
    for one in loaded:
        items = results.items[one.planned.name]
        found += [item_measure(reading, items, grouped=len(one.tasks) > 1) for reading in readings(one.tasks[0], one.planned)]
        if one.tasks[0].OUTPUT_TYPE == "generate_until":
            written[one.planned.name] = items
    if text is not None:
        item = "a reply after its prompt" if text.examples else "a passage of the text"
        about = f"perplexity of {text.name}, by token; an item is {item}"
        found.append(token_measure(f"perplexity of {text.name}", "cost", results.perplexity, exponentiate=True, about=about))
        about = f"KL divergence to the unsteered model on {text.name}, by token, in nats; of steered arms"
        found.append(token_measure("kl", "note", results.kl, exponentiate=False, about=about))
    return found + fluency_measures(written, arms), samples(written, arms)


def _plans(config: CostConfig) -> list[Planned]:
    plans = [plan_task(name, config.data) for name in config.tasks or default_tasks(config.model.model)]
    plans += [plan_trait(trait) for name in config.traits for trait in TRAIT_GROUPS.get(name, (name,))]
    if config.persona is not None:
        plans.append(plan_task("persona_judge"))
    repeated = [name for name, count in Counter(plan.name for plan in plans).items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]!r} is asked for twice. Name each task and trait once.")
    return plans


def _metadata(config: CostConfig, plan: Planned) -> dict[str, Any]:
    """Return the options of a task; how many verdicts may be missing is decided here, for all arms together, and not by the task."""
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
    cache = {} if found["judge"] in COMPUTED else {"cache": str(config.judge_cache or config.out / "verdicts.sqlite")}
    return found | options | cache | {"missing_limit": 1.0}


def _model_info(config: CostConfig, measured: Measuring) -> ModelInfo:
    model = measured.lm.model
    count = sum(p.numel() for p in model.parameters())
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    return ModelInfo(name=config.model.model, fingerprint=model_fingerprint(model), parameters=count, dtype=dtype, device=device)


def _settings(config: CostConfig) -> dict[str, Scalar]:
    found: Mapping[str, Scalar] = {
        "sweep": config.sweep,
        "KL of each spec": config.kl,
        "judge": config.judge,
        "examples in a prompt of MMLU and TruthfulQA": config.num_fewshot,
        "items a task": config.limit,
        "responses a question": config.samples,
        "max new tokens of traits and persona": config.max_new_tokens,
        "seed": config.seed,
    }
    return {name: value for name, value in found.items() if value is not None}
