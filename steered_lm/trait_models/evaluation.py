"""What an experiment's models are measured by: trait tasks, in lm-eval or in Inspect, each model and task a step of its own."""

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import steered_lm
from steered_lm.config import file_hash
from steered_lm.judges import COMPUTED, PANEL_SUFFIXES, judge_names
from steered_lm.judges.endpoint import MissingKeyError
from steered_lm.judges.items import JudgedItem, identities
from steered_lm.judges.trait_run import VERSION, TraitRun
from steered_lm.judges.traits import Trait, TraitError, judge_needed
from steered_lm.trait_models.backend import TrainedModel
from steered_lm.trait_models.experiment import Evaluation, Experiment, ExperimentError
from steered_lm.trait_models.store import Step, Store

logger = logging.getLogger(__name__)
_LIGHT = (*COMPUTED, "openai", "anthropic")
"""Judges that load no model when they are built."""
_PREFIX = "pv_"  # of the harness's tasks that are named after their trait
_VERSIONS = {"lm-eval": ("lm-eval", "transformers", "torch"), "inspect": ("inspect-ai", "transformers", "torch")}


class DetectionTask(NamedTuple):
    """One trait that models are measured for.

    Attributes:
        name: the trait's.
        run: how it is measured.
        trait: the trait.
    """

    name: str
    run: TraitRun
    trait: Trait


def detection_tasks(evaluation: Evaluation) -> list[DetectionTask]:
    """Return the tasks that an experiment names, by trait (``formality``), by task (``pv_evil``) or by a trait's file.

    Raises:
        TraitError: when a trait is unknown (with near misses) or an option does not fit.
        ExperimentError: when two are the same.
    """
    for name in evaluation.metadata:
        if name in ("trait", "judge") or name.startswith("judge_"):
            raise ExperimentError(f"evaluation.metadata holds {name!r}. Write it as evaluation.tasks, evaluation.judge or evaluation.judge_options.")
    found = []
    for name in evaluation.tasks:
        given = {"trait": name.removeprefix(_PREFIX), "judge": evaluation.judge, **evaluation.metadata}
        run = TraitRun.parse(given, source="evaluation.metadata", error=TraitError)
        try:
            trait = run.load()
        except TraitError as problem:
            raise TraitError(f"evaluation.tasks holds {name!r}, and models are measured for traits. {problem}{_elsewhere(name)}") from problem
        found.append(DetectionTask(trait.name, run, trait))
    repeated = [name for name, count in Counter(task.name for task in found).items() if count > 1]
    if repeated:
        raise ExperimentError(f"evaluation.tasks names trait {repeated[0]!r} twice. Leave one out.")
    return found


def _elsewhere(name: str) -> str:
    """Return where to measure what is no trait."""
    if Path(name).suffix:
        return ""
    return " What a model is capable of (MMLU, TruthfulQA, perplexity, a persona's fit) is measured by steered-lm cost --peft <adapter>."


def check_judge(evaluation: Evaluation, tasks: Sequence[DetectionTask]) -> None:
    """Refuse a judge that cannot judge the tasks, as far as can be told without loading a model; a key may come later, or on another machine.

    Raises:
        JudgeError: when there is none, or it is unknown, takes other options, or judges other things.
    """
    backend = str(evaluation.judge).partition(":")[0]
    if evaluation.judge is not None and backend not in _LIGHT and (backend in judge_names() or backend.endswith(PANEL_SUFFIXES)):
        return
    for task in tasks:
        try:
            if task.run.judges(task.trait, evaluation.judge_options) is None:
                raise judge_needed(f"evaluation.tasks={task.name!r}")
        except MissingKeyError as problem:
            logger.warning("models are trained, but cannot be evaluated yet: %s", problem)
            return


def evaluation_step(store: Store, experiment: Experiment, training: Step, trained: TrainedModel, task: DetectionTask, *, label: str) -> Step:
    """Return the step that measures a trained model for a trait."""
    evaluation = experiment.evaluation
    judge = evaluation.judge or ""
    config = {
        "harness": evaluation.backend,
        "task": VERSION,
        "limit": evaluation.limit,
        "seed": experiment.training.seed,
        "run": task.run.model_dump(mode="json", exclude={"trait", "folder", "cache"}),
        "judge_file": file_hash(Path(judge)) if Path(judge).is_file() else None,
        "judge_options": evaluation.judge_options,
    }
    # the training's key too: a digest of adapter weights says nothing about the model below them
    data = {"training": training.folder.name, "weights": trained.digest, "trait": task.trait.digest}
    versions = {"steered-lm": steered_lm.__version__} | {name: metadata.version(name) for name in _VERSIONS[evaluation.backend]}
    return store.step("evaluate", {"config": config, "data": data, "identity": versions}, label=label)


class Record(NamedTuple):
    """A finished evaluation.

    Attributes:
        items: the questions in order.
        judges: identity by what is judged.
        dummy: whether the model was never trained.
    """

    items: list[JudgedItem]
    judges: dict[str, str]
    dummy: bool

    def dump(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"dummy": self.dummy, "judges": self.judges, "items": [item.model_dump(mode="json") for item in self.items]}

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str) -> "Record":
        """Return what :meth:`dump` gave."""
        items = [JudgedItem.parse(item, source=source, error=ExperimentError) for item in data["items"]]
        return cls(items, dict(data["judges"]), bool(data["dummy"]))


class Asked(Protocol):
    """One trained model, ready to be measured."""

    def items(self, task: DetectionTask, work: Path) -> list[JudgedItem]:
        """Return the questions with their scores; ``work`` is the step's folder for logs."""
        ...

    def close(self) -> None:
        """Let go of what was loaded."""
        ...


class Harness:
    """An experiment's harness with its tasks and judges."""

    def __init__(self, experiment: Experiment, tasks: list[DetectionTask], store: Store) -> None:
        """Build the judges, so that what is wrong with them shows before any model is loaded.

        Raises:
            JudgeError: when one cannot be built, or none is named.
        """
        self.experiment = experiment
        self.device = experiment.training.device
        evaluation = experiment.evaluation
        # verdicts outlive a killed run; where they lie decides no result
        kept = {"cache": str(store.root / "verdicts.sqlite")}
        self.runs = {task.name: task.run.model_copy(update={} if task.run.cache is not None else kept) for task in tasks}
        options = dict(evaluation.judge_options)
        self.judges = {}
        for task in tasks:
            judges = self.runs[task.name].judges(task.trait, options)
            if judges is None:
                raise judge_needed(f"evaluation.tasks={task.name!r}")
            self.judges[task.name] = identities(judges)
        if evaluation.backend == "lm-eval":
            from steered_lm.harness.evaluation import trait_task

            self.harness_tasks = {name: trait_task(run, options) for name, run in self.runs.items()}

    def refuses(self, trained: TrainedModel) -> str | None:
        """Return why a model cannot be measured here; None when it can."""
        if trained.pretrained is not None:
            return None
        if trained.inspect is None:
            return f"nobody can ask the model {trained.model_id!r} of backend {trained.backend!r}"
        if self.experiment.evaluation.backend == "lm-eval":
            return f"only Inspect can ask the service's model {trained.inspect!r}. Set evaluation.backend: inspect"
        if trained.key_env is not None and not os.environ.get(trained.key_env, "").strip():
            return f"the service's model {trained.inspect!r} needs a key, and the environment variable {trained.key_env} is not set"
        return None

    def ask(self, trained: TrainedModel) -> "Asked":
        """Return a model, ready to be measured; it is loaded when it is first asked."""
        return _InLmEval(self, trained) if self.experiment.evaluation.backend == "lm-eval" else _InInspect(self, trained)


class _InLmEval:
    def __init__(self, harness: Harness, trained: TrainedModel) -> None:
        self._harness, self._trained = harness, trained
        self._lm: Any = None

    def items(self, task: DetectionTask, work: Path) -> list[JudgedItem]:
        from steered_lm.harness.evaluation import judged_items, load_model

        if self._lm is None:
            assert self._trained.pretrained is not None
            self._lm = load_model(self._trained.pretrained, self._trained.peft, self._harness.device)
        experiment = self._harness.experiment
        return judged_items(self._lm, self._harness.harness_tasks[task.name], limit=experiment.evaluation.limit, seed=experiment.training.seed)

    def close(self) -> None:
        if self._lm is not None:
            self._lm = None
            gc.collect()  # hooks and model hold each other


class _InInspect:
    def __init__(self, harness: Harness, trained: TrainedModel) -> None:
        self._harness, self._trained = harness, trained
        self._opened = ExitStack()
        self._model: Any = None

    def items(self, task: DetectionTask, work: Path) -> list[JudgedItem]:
        from steered_lm.inspect_plugin.evaluation import judged_items, open_model

        trained, experiment = self._trained, self._harness.experiment
        if trained.pretrained is not None and self._model is None:
            given = {"peft": trained.peft, "device": self._harness.device}
            made = open_model(f"steered-hf/{trained.pretrained}", {name: value for name, value in given.items() if value is not None})
            self._model = self._opened.enter_context(made)
        return judged_items(
            self._model or self._service(open_model),
            self._harness.runs[task.name],
            experiment.evaluation.judge_options,
            log_dir=work / "logs",
            limit=experiment.evaluation.limit,
            seed=experiment.training.seed,
        )

    def _service(self, open_model: Callable[..., Any]) -> Any:
        """Return a client of the service, a new one for each task: it lives in its evaluation's event loop."""
        trained, name = self._trained, str(self._trained.inspect)
        # OpenAI's older interface knows stop strings, and every compatible server has it
        options = {"responses_api": False} if name.startswith("openai/") else {}
        return open_model(name, options, base_url=trained.base_url, key_env=trained.key_env)

    def close(self) -> None:
        self._opened.close()
        self._model = None
        gc.collect()
