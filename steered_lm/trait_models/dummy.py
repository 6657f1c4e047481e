"""A backend that trains nothing, to try out an experiment without network or cost: its models are the base model, marked as dummies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from steered_lm.config import content_hash
from steered_lm.trait_models.backend import JobState, TrainedModel, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.service import BackendOptions, Record


class DummyOptions(BackendOptions):
    """How the pretended training goes.

    Attributes:
        polls: how often a job is called running before it has succeeded or failed.
        fail: names of the models whose jobs fail.
    """

    polls: int = Field(default=0, ge=0)
    fail: tuple[str, ...] = ()


class _Record(Record):
    """What the pretended service knows: the request, how often it was asked about it, and whether it was cancelled."""

    request: TrainRequest
    polls: int = 0
    cancelled: bool = False


class DummyBackend:
    """Pretends to train: each job ends as its options say, and its model is the base model."""

    name = "dummy"
    parallel = 8

    def __init__(self, options: DummyOptions) -> None:
        """Take checked options."""
        self._options = options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make it from an experiment's ``training.options``.

        Raises:
            ExperimentError: when an option is unknown or malformed.
        """
        return cls(DummyOptions.read(cls.name, options))

    def check(self, request: TrainRequest) -> None:
        """Accept everything: nothing is trained."""

    def identity(self, request: TrainRequest) -> Mapping[str, Any]:
        """Return that this is a dummy, so that no real step is ever taken for one of these."""
        return {"dummy": True, "base_model": request.base_model}

    def submit(self, request: TrainRequest, folder: Path) -> str:
        """Write down what is asked for; what an earlier job of the same request left goes on, unless it failed or was cancelled."""
        job = f"dummy-{content_hash(request.model_dump(mode='json', exclude={'data', 'name', 'device'}))[:12]}"
        earlier = _Record.read(_file(job, folder))
        if earlier is None or self._state(earlier).status in ("failed", "cancelled"):
            _Record(request=request).write(_file(job, folder))
        return job

    def poll(self, job: str, folder: Path) -> JobState:
        """Say how the job stands; being asked is what this service's time is measured in, and it stops when the job has ended."""
        record = _known(job, folder)
        state = self._state(record)
        if state.status == "running":
            record.model_copy(update={"polls": record.polls + 1}).write(_file(job, folder))
        return state

    def cancel(self, job: str, folder: Path) -> None:
        """Stop the job; one that has ended stays as it is."""
        record = _known(job, folder)
        if self._state(record).status == "running":
            record.model_copy(update={"cancelled": True}).write(_file(job, folder))

    def _state(self, record: _Record) -> JobState:
        name, polls = record.request.name, self._options.polls
        if record.cancelled:
            return JobState(status="cancelled", error="the dummy job was cancelled")
        if record.polls < polls:
            return JobState(status="running", progress=record.polls / polls, detail=f"dummy: poll {record.polls + 1}/{polls}, nothing is trained")
        if name in self._options.fail:
            return JobState(status="failed", error=f"the dummy job fails because training.options.fail names {name!r}")
        return JobState(status="succeeded", model=_model(record.request), progress=1.0, detail="dummy: nothing was trained")


def _model(request: TrainRequest) -> TrainedModel:
    """Return the base model under a name, a digest and facts that say that nothing was trained."""
    return TrainedModel(
        backend=DummyBackend.name,
        model_id=f"dummy:{request.name}",
        pretrained=request.base_model,
        dummy=True,
        digest=content_hash(["dummy", request.base_model]),
        facts={"dummy": True, "note": "nothing was trained; this is the base model"},
    )


def _file(job: str, folder: Path) -> Path:
    return folder / f"{job}.json"


def _known(job: str, folder: Path) -> _Record:
    record = _Record.read(_file(job, folder))
    if record is None:
        raise ExperimentError(f"dummy job {job!r} is not known in {str(folder)!r}. Train again.")
    return record
