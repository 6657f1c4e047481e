"""What an experiment's four commands do: train what is missing, say how it stands, measure what is trained, gather the numbers."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from steered_lm.errors import UserError
from steered_lm.trait_models.backend import Backend, TrainedModel
from steered_lm.trait_models.evaluation import DetectionTask, Harness, Record, detection_tasks, evaluation_step
from steered_lm.trait_models.experiment import Experiment, TraitModel
from steered_lm.trait_models.jobs import Jobs, ModelState, PlannedModel
from steered_lm.trait_models.results import Cell, Results, cell, gather
from steered_lm.trait_models.store import SUBMIT, Step

# seconds between looks at running jobs: at first, and at most; each is a fifth of the time since a job last changed, so that short jobs are seen soon
_PAUSE = (0.2, 10.0)
_GROWTH = 1.25

Show = Callable[[Sequence[ModelState]], None]
"""Is told all models' states after each look at them."""


def train(
    experiment: Experiment,
    *,
    wait: bool = True,
    show: Show | None = None,
    backend: Backend | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[ModelState]:
    """Train what is missing and return how every model stands.

    Every model is checked before any is submitted. As many jobs run at a time as the experiment or its backend allows. A model that fails does not
    stop the others; it is tried again by the next call, not by this one.

    Args:
        experiment: what to train.
        wait: whether to stay until all jobs have ended; otherwise what finds a free place is submitted, and the call returns.
        show: is told all states after each look.
        backend: who trains; by default whom the experiment names.
        sleep: waits between looks.

    Raises:
        ExperimentError: when something cannot be trained; then nothing was submitted.
    """
    jobs = Jobs(experiment, backend)
    jobs.check()
    states = jobs.states()
    missing = {state.model.name for state in states if state.group in ("failed", "not submitted")}
    # of models that share a step, the first one names the job
    waiting = {planned.step.folder: (planned, planned.step.attempts) for planned in reversed(jobs.all) if planned.model.name in missing}
    waiting = dict(reversed(waiting.items()))
    limit = experiment.training.parallel or jobs.backend.parallel
    pause = _PAUSE[0]
    while True:
        if waiting:
            states = _fill(jobs, waiting, limit)
        if show is not None:
            show(states)
        running = [state for state in states if state.group == "running"]
        # of a job that cannot be asked after, the backend's own patience is at an end
        lost = [state for state in running if state.error is not None]
        if not wait or (len(lost) == len(running) and (not waiting or len(lost) >= limit)):
            return states
        if running:
            sleep(pause)
        before, states = states, jobs.states()
        pause = _PAUSE[0] if [s.status for s in before] != [s.status for s in states] else min(_GROWTH * pause, _PAUSE[1])


def _fill(jobs: Jobs, waiting: dict[Path, tuple[PlannedModel, int]], limit: int) -> list[ModelState]:
    """Submit as many of those that wait as there are free places, and return all states."""
    with jobs.store.locked(SUBMIT):
        states = jobs.states()
        running = len({t.step.folder for t, s in zip(jobs.all, states, strict=True) if s.group == "running"})
        for folder in list(waiting):
            if running >= limit:
                break
            running += jobs.submit(*waiting.pop(folder))
    return jobs.states()


def status(experiment: Experiment, *, backend: Backend | None = None) -> list[ModelState]:
    """Return how every model stands; nothing is written or submitted.

    Raises:
        ExperimentError: when a data set cannot be loaded or the backend is unknown.
    """
    jobs = Jobs(experiment, backend)
    return [jobs.state(planned) for planned in jobs.all]


def cancel(experiment: Experiment, *, backend: Backend | None = None) -> list[ModelState]:
    """Stop the jobs under way and return how every model stands.

    Raises:
        ExperimentError: when the backend cannot do it.
    """
    jobs = Jobs(experiment, backend)
    for planned in jobs.all:
        job = planned.step.job()
        if job is not None:
            jobs.backend.cancel(job.id, planned.step.work)
    return jobs.states()


class EvaluationState(NamedTuple):
    """What became of one model and task.

    Attributes:
        model: which model.
        task: which trait it was measured for.
        status: ``finished`` now, ``reused`` from before, ``skipped`` because the model is not ready, or ``failed``.
        reason: why it was skipped or failed.
        dummy: whether the model was never trained.
    """

    model: TraitModel
    task: str
    status: Literal["finished", "reused", "skipped", "failed"]
    reason: str | None = None
    dummy: bool = False


def evaluate(
    experiment: Experiment, *, show: Callable[[EvaluationState], None] | None = None, backend: Backend | None = None
) -> list[EvaluationState]:
    """Measure every trained model on every task that it was not measured on, and return what became of each.

    It never starts a training: models that are not ready are skipped with the reason. A step that another process works on is left until the end,
    and then waited for.

    Args:
        experiment: what to measure.
        show: is told each outcome.
        backend: who trained; by default whom the experiment names.

    Raises:
        ExperimentError, TraitError, JudgeError: when tasks or judge cannot be had; then no model was loaded.
    """
    jobs = Jobs(experiment, backend)
    tasks = detection_tasks(experiment.evaluation)
    jobs.store.check()
    harness = Harness(experiment, tasks, jobs.store)
    found: dict[tuple[str, str], EvaluationState] = {}

    def tell(outcome: EvaluationState) -> None:
        found[outcome.model.name, outcome.task] = outcome
        if show is not None:
            show(outcome)

    ready: list[tuple[TraitModel, TrainedModel, list[tuple[DetectionTask, Step]]]] = []
    for planned, state in zip(jobs.all, jobs.states(), strict=True):
        reason = _unready(state) if state.trained is None else harness.refuses(state.trained)
        if state.trained is None or reason is not None:
            for task in tasks:
                tell(EvaluationState(planned.model, task.name, "skipped", reason))
        else:
            ready.append((planned.model, state.trained, [(task, _step(jobs, planned, state.trained, task)) for task in tasks]))
    for wait in (False, True):
        for model, trained, steps in ready:
            open_steps = [(task, step) for task, step in steps if (model.name, task.name) not in found]
            for outcome in _measure(harness, model, trained, open_steps, wait=wait):
                tell(outcome)
    return [found[model.name, task.name] for model in experiment.models for task in tasks]


def _measure(
    harness: Harness, model: TraitModel, trained: TrainedModel, steps: Sequence[tuple[DetectionTask, Step]], *, wait: bool
) -> Iterator[EvaluationState]:
    with closing(harness.ask(trained)) as asked:
        for task, step in steps:
            with step.locked(wait=wait) as held:
                if not held:
                    continue
                if step.record() is not None:
                    yield EvaluationState(model, task.name, "reused", dummy=trained.dummy)
                    continue
                step.prepare()
                try:
                    items = asked.items(task, step.work)
                except (UserError, OSError) as problem:
                    step.failed(str(problem))
                    yield EvaluationState(model, task.name, "failed", str(problem), trained.dummy)
                else:
                    step.finish(Record(items, harness.judges[task.name], trained.dummy).dump())
                    yield EvaluationState(model, task.name, "finished", dummy=trained.dummy)


def _unready(state: ModelState) -> str:
    return f"{state.group}: {state.error}" if state.error else state.group


def _step(jobs: Jobs, planned: PlannedModel, trained: TrainedModel, task: DetectionTask) -> Step:
    label = f"{planned.step.label} on {task.name}"
    return evaluation_step(jobs.store, jobs.experiment, planned.step, trained, task, label=label)


def results(experiment: Experiment, *, backend: Backend | None = None) -> Results:
    """Return the numbers of all finished evaluations, and the reasons where there are none; nothing is written, trained or asked.

    Raises:
        ExperimentError, TraitError: when a data set cannot be loaded, or a task is unknown.
    """
    jobs = Jobs(experiment, backend)
    tasks = detection_tasks(experiment.evaluation)
    cells: list[Cell] = []
    for planned in jobs.all:
        state = jobs.state(planned, ask=False)
        for task in tasks:
            if state.trained is None:
                cells.append(cell(planned.model, task.name, reason=_unready(state)))
                continue
            step = _step(jobs, planned, state.trained, task)
            data, failure = step.record(), step.failure()
            if data is not None:
                cells.append(cell(planned.model, task.name, Record.of(data, str(step.folder / "record.json")), dummy=state.trained.dummy))
            else:
                reason = "not evaluated" if failure is None else f"failed: {failure.error}"
                cells.append(cell(planned.model, task.name, reason=reason, dummy=state.trained.dummy))
    return gather(experiment, cells)


def used_steps(experiment: Experiment, *, backend: Backend | None = None) -> set[Path]:
    """Return the folders of the steps that an experiment uses, whether they are finished or not.

    Raises:
        ExperimentError, TraitError: when a data set cannot be loaded, or a task is unknown.
    """
    jobs = Jobs(experiment, backend)
    found = {planned.step.folder for planned in jobs.all}
    for planned in jobs.all:
        trained = jobs.state(planned, ask=False).trained
        if trained is not None:
            found |= {_step(jobs, planned, trained, task).folder for task in detection_tasks(experiment.evaluation)}
    return found
