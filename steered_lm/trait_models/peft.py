"""The local backend: LoRA by PEFT, one detached process a job, which survives the one that started it."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import Field

import steered_lm
from steered_lm.config import Config
from steered_lm.errors import require
from steered_lm.trait_models.backend import JobState, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.job_lock import JobLock, detach, reap
from steered_lm.trait_models.peft_job import JobFile, job_id, prepare, train, trained_model

__all__ = ["PeftBackend", "PeftOptions", "train"]
logger = logging.getLogger(__name__)

_GRACE, _PATIENCE = 5.0, 20.0  # seconds until a job that does not end is killed, and until nothing helps


class PeftOptions(Config):
    """Options of the backend.

    Attributes:
        threads: CPU threads of a job; None is what torch takes, and then one job runs at a time.
    """

    threads: int | None = Field(default=None, ge=1)


class PeftBackend:
    """Trains adapters on this machine."""

    name = "peft"

    def __init__(self, options: PeftOptions | None = None) -> None:
        """Nothing is loaded."""
        self.options = options or PeftOptions()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the backend with ``training.options`` of an experiment.

        Raises:
            ExperimentError: for an option that it does not have.
        """
        return cls(PeftOptions.parse(dict(options), source="training.options of backend 'peft'", error=ExperimentError))

    @property
    def parallel(self) -> int:
        """As many jobs as have processors for their ``threads``; one when that is not set."""
        return max(1, (os.cpu_count() or 1) // self.options.threads) if self.options.threads else 1

    def check(self, request: TrainRequest) -> None:
        """Refuse what cannot be trained here: base model, adapter, precision, steering, and each example's length.

        Raises:
            UserError: with the argument, the value, what is allowed and what to do next.
        """
        if sys.platform == "win32":
            raise ExperimentError("backend='peft' needs file locks that Windows does not have. Run it under WSL.")
        require("peft", "peft")
        from steered_lm.trait_models.base_model import check_base, load_tokenizer, settle_device, settle_dtype, skeleton, target_pattern
        from steered_lm.trait_models.trainer import load_examples

        settle_dtype(request.hyperparameters.dtype, settle_device(request.device))
        config = check_base(request.base_model)
        target_pattern(skeleton(config), request.hyperparameters.target_modules)
        if request.steering is not None:
            _check_steering(request, config)
        load_examples(request, load_tokenizer(request.base_model), getattr(config.get_text_config(), "max_position_embeddings", None))

    def identity(self, request: TrainRequest) -> Mapping[str, Any]:
        """Return versions, the base model's fingerprint, what the steering does, and the number of threads, which decides roundings."""
        from steered_lm.trait_models.base_model import fingerprint

        require("peft", "peft")
        libraries = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}
        steering = None if request.steering is None else {"method": request.steering.method, "spec": request.steering.load().digest}
        return {
            "backend": self.name,
            "versions": {"steered-lm": steered_lm.__version__, **libraries},
            "base_model": fingerprint(request.base_model),
            "steering": steering,
            "threads": self.options.threads,
        }

    def submit(self, request: TrainRequest, folder: Path) -> str:
        """Start a process that trains in ``folder``, or leave the one alone that does; go on from its last checkpoint after a failure.

        Raises:
            ExperimentError: when the folder holds another request's job.
        """
        reap()
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        request = request.model_copy(update={"data": request.data.resolve()})
        lock = _lock_or_running(folder, job_id(request))
        if lock is None:
            return job_id(request)
        with lock:
            state = prepare(request, folder)
            if not state.finished:
                self._start(folder, lock)
            return state.job

    def _start(self, folder: Path, lock: JobLock) -> None:
        command = [sys.executable, "-m", "steered_lm.trait_models.peft_job", str(folder), "--lock", str(lock.descriptor)]
        if self.options.threads is not None:
            command += ["--threads", str(self.options.threads)]
        child = detach(command, folder / "log.txt", lock)
        logger.info("started process %d for %s", child, folder)

    def poll(self, job: str, folder: Path) -> JobState:
        """Say how the job stands; one whose process is gone without a word has failed.

        Raises:
            ExperimentError: when the folder does not hold this job.
        """
        reap()
        state = _state(job, folder)
        if not state.finished and not JobLock.held(folder):
            state = _state(job, folder)  # it may have ended since
            if not state.finished:
                return JobState(status="failed", error=f"{_stopped(state)}; submit again to go on. See {folder / 'log.txt'}.", progress=_share(state))
        detail = "" if state.steps is None else f"step {state.step}/{state.steps}" + ("" if state.loss is None else f", loss {state.loss:.3g}")
        model = None
        if state.status == "succeeded":
            request = TrainRequest.model_validate_json((folder / "request.json").read_text(encoding="utf-8"))
            model = trained_model(request, state, folder.resolve())
        return JobState(status=state.status, model=model, error=state.error, progress=_share(state), detail=detail)

    def cancel(self, job: str, folder: Path) -> None:
        """End the job's own process; its checkpoints stay.

        Raises:
            ExperimentError: when the folder does not hold this job, or its process does not end.
        """
        started, asked = time.monotonic(), False
        while (lock := JobLock.take(folder)) is None:
            waited = time.monotonic() - started
            process = _state(job, folder).process()
            if process is not None and (not asked or waited > _GRACE):
                _end(process, hard=asked)
                asked = True
            if waited > _PATIENCE:
                raise ExperimentError(f"job {job} in {str(folder)!r} does not end. Look at its process (pid in state.json) and end it yourself.")
            time.sleep(0.05)
            reap()
        with lock:
            state = _state(job, folder)
            if not state.finished:
                state.but(status="cancelled", error=f"cancelled at step {state.step}; submit again to go on").write(folder)


def _check_steering(request: TrainRequest, config: Any) -> None:
    from steered_lm.steering.compile import compile_spec
    from steered_lm.steering.vectors import TraitVectors

    assert request.steering is not None
    spec = request.steering.load()
    if spec.vectors is None:
        return
    vectors = TraitVectors.load(spec.vectors.verify())
    compile_spec(spec, vectors)
    text = config.get_text_config()
    if (vectors.meta.d_model, vectors.meta.n_layers) != (text.hidden_size, text.num_hidden_layers):
        raise ExperimentError(
            f"training.steering: the vectors of {str(request.steering.spec)!r} were built for {vectors.meta.model_id!r}, a model of "
            f"another shape than base_model={request.base_model!r}. Build them for it: steered-lm vectors build --model {request.base_model} …"
        )


def _lock_or_running(folder: Path, job: str) -> JobLock | None:
    """Return the folder's lock, or None when its own job is running already."""
    started = time.monotonic()
    while (lock := JobLock.take(folder)) is None:
        state = JobFile.read(folder)
        if state is not None and (state.process() is not None or time.monotonic() - started > 1.0):
            if state.job != job:
                raise ExperimentError(
                    f"folder {str(folder)!r} is training the job {state.job}, and this request is {job}. Give each a folder of its own."
                )
            return None
        time.sleep(0.02)  # somebody looked at the lock just now, or the process has not come to write its number
    return lock


def _state(job: str, folder: Path) -> JobFile:
    state = JobFile.read(folder)
    if state is None or state.job != job:
        holds = "no job" if state is None else f"the job {state.job}"
        raise ExperimentError(f"job {job!r} is not in folder {str(folder)!r}, which holds {holds}. Submit it first.")
    return state


def _stopped(state: JobFile) -> str:
    return "stopped before its first step" if not state.step or state.steps is None else f"stopped at step {state.step} of {state.steps}"


def _share(state: JobFile) -> float | None:
    return state.step / state.steps if state.steps else None


def _end(process: psutil.Process, *, hard: bool) -> None:
    try:
        process.kill() if hard else process.terminate()
    except psutil.NoSuchProcess:
        logger.debug("the process had ended by itself")
