"""Thinking Machines' Tinker, through its own SDK; needs ``pip install 'steered-lm[tinker]'``.

There a client drives the training, batch by batch, so a job is a process of its own on this machine (:mod:`steered_lm.trait_models.tinker_run`): it
outlives the command that started it, holds a lock for as long as it lives, and goes on from its last checkpoint when it is submitted again.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from steered_lm.config import content_hash, write_atomic
from steered_lm.errors import require
from steered_lm.trait_models.backend import JobState, Status, TrainedModel, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.job_lock import JobLock, detach, reap
from steered_lm.trait_models.service import Record, ServiceOptions, asked_for, refuse_changed, refuse_untaken

LEARNING_RATE = 1e-4
"""What is taken where an experiment names no rate: the SDK's own default."""
JOB, PROGRESS, LOG = "tinker.json", "tinker-progress.json", "tinker.log"
_PID, _CANCELLED = "tinker.pid", "tinker-cancelled"
_TAKEN = ("epochs", "learning_rate", "batch_size", "gradient_accumulation", "max_length", "warmup_ratio", "weight_decay", "lora_rank", "save_steps")
_LOOK = 0.5  # seconds that others, who only look whether a process lives, may hold the lock at most
_PATIENCE = 10.0  # seconds that a cancelled process has to say goodbye to the service


class TinkerOptions(ServiceOptions):
    """Options of the backend.

    Attributes:
        tokenizer: hub id or folder of the model's tokenizer; None is the one that the service names.
    """

    tokenizer: str | None = None


class Job(Record):
    """What the process is to do.

    Attributes:
        asked: hash of what decides the outcome.
        request: what is trained on what.
        options: by whom.
    """

    asked: str
    request: TrainRequest
    options: TinkerOptions


class Progress(Record):
    """How far the process is; it alone writes this.

    Attributes:
        status: where it is.
        step: optimiser steps done.
        steps: of how many.
        loss: mean loss of the last step's assistant tokens, in nats; None when the service did not say.
        tokens: tokens trained on.
        seconds: spent, earlier processes of the same job included.
        state: the service's path of the last checkpoint.
        saved: the other numbers at that checkpoint.
        model: the service's path of the finished weights.
        error: why it failed or was cancelled.
    """

    status: Status = "queued"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    state: str | None = None
    saved: "Progress | None" = None
    model: str | None = None
    error: str | None = None


class TinkerBackend:
    """Trains LoRA adapters at Tinker."""

    name = "tinker"
    parallel = 4

    def __init__(self, options: TinkerOptions) -> None:
        """Take checked options; a key is looked for when it is needed."""
        self._options = options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make it from an experiment's ``training.options``.

        Raises:
            ExperimentError: when an option is unknown or malformed.
        """
        own = {"base_url": "https://tinker.thinkingmachines.dev/services/tinker-prod", "url_env": "TINKER_BASE_URL", "key_env": "TINKER_API_KEY"}
        return cls(TinkerOptions.of_service(cls.name, options, **own))

    def check(self, request: TrainRequest) -> None:
        """Refuse what the service does not take, and a missing key or library; nothing is sent.

        Raises:
            ExperimentError: when the request cannot be trained.
            MissingDependencyError: when ``tinker`` is not installed.
        """
        refuse_untaken(self.name, request, _TAKEN, {})
        if not re.fullmatch(r"[A-Za-z0-9._-]*", request.suffix):
            raise ExperimentError(
                f"model {request.name!r}: suffix {request.suffix!r} names the weights there: letters, digits, '.', '_' and '-' are allowed."
            )
        require("tinker", "tinker")
        self._options.key(self.name)
        if sys.platform == "win32":
            raise ExperimentError("backend tinker needs file locks that Windows has not. Use WSL.")

    def identity(self, request: TrainRequest) -> Mapping[str, Any]:
        """Return where the model is trained, and with which tokens and rate."""
        rate = request.hyperparameters.learning_rate or LEARNING_RATE
        return {"base_model": request.base_model, "learning_rate": rate, **self._options.model_dump(include={"base_url", "tokenizer"})}

    def submit(self, request: TrainRequest, folder: Path) -> str:
        """Start the process that trains; one that runs or has succeeded is left alone, one that ended otherwise goes on from its checkpoint.

        Raises:
            ExperimentError: when the data have changed, or the folder's process trains something else.
        """
        asked = asked_for(request, self.identity(request))
        job = f"tinker-{asked[:16]}"
        earlier = Job.read(folder / JOB)
        progress = read_progress(folder) if earlier is not None and earlier.asked == asked else Progress()
        if progress.status == "succeeded":
            return job
        self._options.key(self.name)
        refuse_changed(request)
        lock = JobLock.take(folder, _LOOK)
        if lock is None:
            if earlier is None or earlier.asked != asked:
                raise ExperimentError(f"model {request.name!r}: the process in {str(folder)!r} trains something else. Cancel it first.")
            return job
        with lock:
            (folder / _CANCELLED).unlink(missing_ok=True)
            Job(asked=asked, request=request, options=self._options).write(folder / JOB)
            checkpoint = {"state": progress.state, "saved": progress.saved, "status": "queued", "steps": None}
            write_progress(folder, (progress.saved or Progress()).model_copy(update=checkpoint))
            _start(folder, lock)
        return job

    def poll(self, job: str, folder: Path) -> JobState:
        """Say how the job stands, from what its process has written; no network."""
        reap()
        known = _known(job, folder)
        lives = JobLock.held(folder)
        progress = read_progress(folder)  # read after the look at the lock: what a process has said last is there before it lets go
        so_far = f"step {progress.step}/{progress.steps}" + ("" if progress.loss is None else f", loss {progress.loss:.3f}")
        if progress.status == "succeeded":
            return JobState(status="succeeded", model=_model(known, progress), progress=1.0, detail=so_far)
        if progress.status in ("failed", "cancelled"):
            return JobState(status=progress.status, error=progress.error, detail=so_far)
        if lives and progress.steps is None:
            return JobState(status="queued", detail="waiting for the service")
        if lives:
            return JobState(status="running", progress=progress.step / max(1, progress.steps or 0), detail=so_far)
        if (folder / _CANCELLED).exists():
            return JobState(status="cancelled", error="the job was cancelled", detail=so_far)
        left = f"step {progress.saved.step}" if progress.saved else "the start"
        why = f"its process has ended without a word (killed?); {str(folder / LOG)!r} may tell. Train again to go on from {left}."
        return JobState(status="failed", error=why, detail=so_far)

    def cancel(self, job: str, folder: Path) -> None:
        """Stop the process; one that has ended stays as it is."""
        _known(job, folder)
        if not JobLock.held(folder):
            return
        (folder / _CANCELLED).touch()
        number = int((folder / _PID).read_text(encoding="utf-8"))  # it holds the lock, so the number is still its own
        for request, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, _PATIENCE)):
            with suppress(ProcessLookupError):
                os.kill(number, request)
            if not JobLock.held(folder, patience):
                return
        raise ExperimentError(f"job {job}: process {number} does not stop. Stop it by hand.")


def read_progress(folder: Path) -> Progress:
    """Return how far the folder's process is."""
    return Progress.read(folder / PROGRESS) or Progress()


def write_progress(folder: Path, progress: Progress) -> None:
    """Keep how far the folder's process is."""
    progress.write(folder / PROGRESS)


def _model(job: Job, progress: Progress) -> TrainedModel:
    """Return the finished model; Inspect reaches it by the service's OpenAI-compatible endpoint."""
    path = str(progress.model)
    place = {"inspect": f"openai-api/tinker/{path}", "base_url": f"{job.options.base_url}/oai/api/v1", "key_env": job.options.key_env}
    facts = progress.model_dump(include={"steps", "loss", "tokens", "seconds"}) | {"checkpoint": progress.state}
    return TrainedModel(backend=TinkerBackend.name, model_id=path, **place, digest=content_hash(path), facts=facts)


def _start(folder: Path, lock: JobLock) -> None:
    """Start the process and hand it the lock, which is held until it ends, however it ends."""
    pid = detach([sys.executable, "-m", "steered_lm.trait_models.tinker_run", str(folder)], folder / LOG, lock)
    write_atomic(folder / _PID, str(pid))


def _known(job: str, folder: Path) -> Job:
    known = Job.read(folder / JOB)
    if known is None:
        raise ExperimentError(f"job {job!r} is not known in {str(folder)!r}. Train again.")
    return known
