"""An experiment's models as jobs of a backend: how each stands, and how what has ended is kept."""

import logging
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from steered_lm.errors import UserError
from steered_lm.extract.contrast import available_traits
from steered_lm.judges.traits import trait_names
from steered_lm.trait_models.backend import Backend, JobState, Status, TrainedModel, TrainRequest, UnreachableError
from steered_lm.trait_models.data import TrainingSet, training_set
from steered_lm.trait_models.evaluation import DetectionTask, check_judge, detection_tasks
from steered_lm.trait_models.experiment import Experiment, ExperimentError, TraitModel
from steered_lm.trait_models.registry import make_backend
from steered_lm.trait_models.store import Step, Store

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Made = TypeVar("Made")

Group = Literal["running", "succeeded", "failed", "not submitted"]
GROUPS: tuple[Group, ...] = ("running", "succeeded", "failed", "not submitted")
_NEARLY = 0.85  # from where on a trait's name is taken for a slip
_HERE = "./"  # begins a path within a step's folder, so that the whole cache can be moved


class ModelState(NamedTuple):
    """How one model of an experiment stands.

    Attributes:
        model: which one.
        status: the job's, or ``not submitted``.
        trained: what came out, when it succeeded.
        error: why it failed, or why nobody knows how it stands.
        detail: what it is doing.
        progress: share done, 0 to 1; None when nobody knows.
    """

    model: TraitModel
    status: Status | Literal["not submitted"]
    trained: TrainedModel | None = None
    error: str | None = None
    detail: str = ""
    progress: float | None = None

    @property
    def group(self) -> Group:
        """The status as ``traits status`` groups it."""
        if self.status in ("queued", "running"):
            return "running"
        return "failed" if self.status in ("failed", "cancelled") else "succeeded" if self.status == "succeeded" else "not submitted"


class PlannedModel(NamedTuple):
    """One model with the step that trains it; models of the same data and settings share a step."""

    model: TraitModel
    request: TrainRequest
    data: TrainingSet
    step: Step


class Jobs:
    """An experiment's models, the steps that train them, and the backend that does it."""

    def __init__(self, experiment: Experiment, backend: Backend | None = None) -> None:
        """Load the data sets and find the steps; nothing is written.

        Args:
            experiment: what to train.
            backend: who trains; by default whom the experiment names.

        Raises:
            ExperimentError: when the backend is unknown, or data sets cannot be loaded: all of them are named.
        """
        self.experiment = experiment
        self.store = Store(experiment.training.dataset_options.cache_dir)
        self.backend = backend or make_backend(experiment.training.backend, experiment.training.options)
        self.all = _for_each([(model.name, model) for model in experiment.models], self._plan)

    def _plan(self, model: TraitModel) -> PlannedModel:
        settings = self.experiment.training
        data = training_set(settings.dataset_options, model.dataset, model.trait)
        request = TrainRequest(
            name=model.name,
            base_model=settings.base_model,
            data=self.store.data_file(data.digest),
            data_hash=data.digest,
            hyperparameters=settings.hyperparameters,
            suffix=model.suffix,
            seed=settings.seed,
            steering=settings.steering,
            device=settings.device,
        )
        # the name, places and the device decide nothing; the content of a spec is for the backend's identity to say
        config = request.model_dump(mode="json", exclude={"name", "data", "data_hash", "device", "steering"})
        config |= {"backend": settings.backend, "options": settings.options, "steering": settings.steering and settings.steering.method}
        key = {"config": config, "data": data.digest, "identity": dict(self.backend.identity(request))}
        return PlannedModel(model, request, data, self.store.step("train", key, label=f"{self.experiment.name}/{model.name}"))

    def check(self) -> None:
        """Refuse what cannot be trained or measured; writes data files, which backends may read.

        Raises:
            ExperimentError: naming every model that cannot be trained.
        """
        tasks = detection_tasks(self.experiment.evaluation)
        check_judge(self.experiment.evaluation, tasks)
        _check_traits(self.experiment, tasks)
        self.store.check()

        def checked(planned: PlannedModel) -> None:
            if planned.step.record() is None:
                planned.data.write(planned.request.data)
                self.backend.check(planned.request)

        _for_each([(planned.model.name, planned) for planned in self.all], checked)

    def state(self, planned: PlannedModel, *, ask: bool = True) -> ModelState:
        """Say how a model stands. It only reads.

        Args:
            planned: which one.
            ask: whether the backend is asked about a job under way; otherwise it counts as running.
        """
        model, step = planned.model, planned.step
        # in the order in which they come to be: a step that ends between two reads is seen as ended
        job, failure = step.job(), step.failure()
        trained = _trained(step)
        if trained is not None:
            if trained.peft is not None and not Path(trained.peft).exists():
                return ModelState(model, "failed", error=f"its adapter {trained.peft!r} is gone. Train again to make it anew.")
            return ModelState(model, "succeeded", trained)
        if job is not None:
            if not ask:
                return ModelState(model, "running", detail="last seen running")
            try:
                return _of_job(model, self.backend.poll(job.id, step.work))
            except (UnreachableError, OSError) as problem:
                return ModelState(model, "running", error=f"the backend cannot be asked: {problem}")
            except UserError as problem:  # such as a job that the service does not know
                return ModelState(model, "failed", error=str(problem))
        if failure is not None:
            return ModelState(model, failure.status, error=failure.error)
        return ModelState(model, "not submitted")

    def settle(self, planned: PlannedModel) -> ModelState:
        """Say how a model stands, and keep what has ended: a finished model for good, a failure until the next attempt."""
        step = planned.step
        job, found = step.job(), self.state(planned)
        if job is None or found.group not in ("succeeded", "failed"):
            return found
        with step.locked():
            if step.record() is None and step.job() == job:  # nobody else was faster
                if found.trained is not None:
                    step.finish({"model": _relative(found.trained, step.folder).model_dump(mode="json")})
                else:
                    step.failed(
                        found.error or "no reason given", status="cancelled" if found.status == "cancelled" else "failed", attempt=job.attempt
                    )
        return found

    def states(self) -> list[ModelState]:
        """Return all models' states, and keep what has ended."""
        return [self.settle(planned) for planned in self.all]

    def submit(self, planned: PlannedModel, attempts: int) -> bool:
        """Give a model to the backend, unless it is under way, finished or was tried since; True when it was submitted.

        Args:
            planned: which one.
            attempts: how many failed ones the caller has seen; a newer failure is another process's, and is not repeated.
        """
        step = planned.step
        with step.locked():
            found = self.state(planned)
            if found.group in ("running", "succeeded") or step.attempts != attempts:
                return False
            step.reopen()
            step.prepare()
            planned.data.write(planned.request.data)
            logger.info("submitting %s", planned.model.name)
            try:
                step.started(self.backend.submit(planned.request, step.work))
            except (UserError, OSError) as problem:
                step.failed(str(problem))
                return False
            return True


def _check_traits(experiment: Experiment, tasks: Sequence[DetectionTask]) -> None:
    """Refuse a trait that is nearly one that is known; what data show may have any other name."""
    known = {*(task.name for task in tasks), *trait_names(), *available_traits()}
    for model in experiment.models:
        close = [] if model.trait in known else get_close_matches(model.trait, sorted(known), n=1, cutoff=_NEARLY)
        if close:
            raise ExperimentError(
                f"model {model.name!r}: trait={model.trait!r} is not known. Did you mean {close[0]!r}? A trait of your own that evaluation.tasks "
                "does not measure may have any name that is less like it."
            )


def _of_job(model: TraitModel, job: JobState) -> ModelState:
    if job.status == "succeeded" and job.model is None:
        return ModelState(model, "failed", error="the backend says that the job succeeded, and names no model.")
    return ModelState(model, job.status, job.model, job.error, job.detail, job.progress)


def _trained(step: Step) -> TrainedModel | None:
    record = step.record()
    if record is None:
        return None
    found = TrainedModel.parse(record.get("model"), source=str(step.folder / "record.json"), error=ExperimentError)
    return found.model_copy(update={key: str(step.folder / value) for key, value in _places(found).items() if value.startswith(_HERE)})


def _relative(trained: TrainedModel, folder: Path) -> TrainedModel:
    """Return the model with places in the step's folder written relative to it."""
    inside = {key: Path(value).resolve() for key, value in _places(trained).items() if Path(value).resolve().is_relative_to(folder.resolve())}
    return trained.model_copy(update={key: _HERE + path.relative_to(folder.resolve()).as_posix() for key, path in inside.items()})


def _places(trained: TrainedModel) -> dict[str, str]:
    return {key: value for key in ("model_id", "pretrained", "peft") if (value := getattr(trained, key)) is not None}


def _for_each(named: Sequence[tuple[str, Item]], make: Callable[[Item], Made]) -> list[Made]:
    """Return what is made of every item; when some fail, all of their errors are said at once."""
    made, problems = [], []
    for name, item in named:
        try:
            made.append(make(item))
        except UserError as problem:
            problems.append((name, problem))
    if not problems:
        return made
    if len({str(problem) for _, problem in problems}) == 1:
        if 1 < len(named) == len(problems):
            raise ExperimentError(f"every model: {problems[0][1]}") from problems[0][1]
        raise ExperimentError(f"models {', '.join(name for name, _ in problems)}: {problems[0][1]}") from problems[0][1]
    told = "\n".join(f"- {name}: {problem}" for name, problem in problems)
    raise ExperimentError(f"{len(problems)} of {len(named)} models cannot be used; nothing was submitted:\n{told}") from problems[0][1]
