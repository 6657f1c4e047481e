"""What a fine-tuning backend is: it takes jobs, says how they stand, and names the model that came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from steered_lm.config import Config
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters, TrainingSteering

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")


class UnreachableError(ExperimentError):
    """A service gave no usable answer, however often it was asked: nothing is known about the job, and asking later may well work."""


class TrainRequest(Config):
    """One job.

    Attributes:
        name: the model's name in its experiment.
        base_model: what it starts from.
        data: JSONL file with one conversation a line: ``{"messages": [{"role", "content"}, …]}``, validated, in training order.
        data_hash: SHA-256 of that file.
        hyperparameters: how it is trained.
        suffix: for a service's name of the model.
        seed: of initialisation and data order.
        steering: steering while training; only ``peft`` takes it.
        device: where a local backend trains.
    """

    name: str
    base_model: str
    data: Path
    data_hash: str
    hyperparameters: Hyperparameters = Hyperparameters()
    suffix: str = ""
    seed: int = 0
    steering: TrainingSteering | None = None
    device: str | None = None


class TrainedModel(Config):
    """What came out of a job, and how harnesses call it.

    Attributes:
        backend: who trained it.
        model_id: the adapter's folder, or the service's name of the model.
        pretrained: local models: what ``steered-hf`` takes as ``pretrained``; None for a model that only a service runs.
        peft: local models: the adapter's folder.
        inspect: the model's name in Inspect, such as ``openai/ft:…``; None where ``steered-hf`` runs it.
        base_url: where Inspect finds it; None takes the address that Inspect knows.
        key_env: the environment variable that holds the key for it; None takes the one that Inspect reads.
        dummy: whether nothing was trained: every output made with it says so.
        digest: hash of the weights, or of the service's name.
        facts: what is worth showing: steps, final loss, seconds, tokens.
    """

    backend: str
    model_id: str
    pretrained: str | None = None
    peft: str | None = None
    inspect: str | None = None
    base_url: str | None = None
    key_env: str | None = None
    dummy: bool = False
    digest: str
    facts: dict[str, Any] = Field(default_factory=dict)


class JobState(Config):
    """How a job stands.

    Attributes:
        status: where it is.
        model: what came out; only when it succeeded.
        error: why it failed or was cancelled, in words for the user.
        progress: share done, 0 to 1; None when nobody knows.
        detail: what it is doing, for a progress line (``step 40/120, loss 1.92``).
    """

    status: Status
    model: TrainedModel | None = None
    error: str | None = None
    progress: float | None = Field(default=None, ge=0, le=1)
    detail: str = ""


class Backend(Protocol):
    """Takes jobs. Made by ``make_backend(name, options)``; network trouble is retried inside and only then raised."""

    @property
    def name(self) -> str:
        """Its name in configs."""
        ...

    @property
    def parallel(self) -> int:
        """How many jobs it runs well at a time."""
        ...

    def check(self, request: TrainRequest) -> None:
        """Refuse what cannot be trained, before anything is submitted.

        Raises:
            ExperimentError: with the argument, the value, what is allowed and what to do next.
        """
        ...

    def identity(self, request: TrainRequest) -> Mapping[str, Any]:
        """Return what else decides the outcome, for the finished step's key: library versions, the base model, the spec."""
        ...

    def submit(self, request: TrainRequest, folder: Path) -> str:
        """Start the job, or go on with what an earlier one left in ``folder``, and return its id.

        ``folder`` is the job's own and survives crashes; the workflow has made it and holds its lock. A crash may come between this call's end and
        the workflow's note of the id, so a job that ``folder`` knows to be under way, or to have succeeded, is returned again; one that failed or was
        cancelled is started anew, from its checkpoint where there is one. What cannot be done is raised as a ``UserError`` or ``OSError``.
        """
        ...

    def poll(self, job: str, folder: Path) -> JobState:
        """Say how the job stands. It only reads."""
        ...

    def cancel(self, job: str, folder: Path) -> None:
        """Stop the job; one that has ended stays as it is."""
        ...
