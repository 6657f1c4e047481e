"""One local training job: its folder, its lock, its state file, and the process that trains (``python -m steered_lm.trait_models.peft_job``).

A folder holds ``request.json``, ``state.json``, ``job.lock``, ``log.txt``, ``checkpoints/`` while it trains, and then ``adapter/`` and
``training.json``. Whoever trains holds a lock on ``job.lock``, which the kernel lets go of when the process ends, however it ends.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from pydantic import Field

from steered_lm.config import Config, content_hash, file_hash, write_atomic
from steered_lm.errors import UserError
from steered_lm.trait_models.backend import FINISHED, Status, TrainedModel, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.job_lock import JobLock

if TYPE_CHECKING:
    from steered_lm.trait_models.trainer import Fitted, Progress

logger = logging.getLogger(__name__)
_EVERY = 0.5  # seconds between two writes of the state


class JobFile(Config):
    """What ``state.json`` says.

    Attributes:
        job: the job's id.
        status: where it is, as far as it came to write it down.
        pid, started: the process that trains, and when it started (seconds since 1970), which tells it from a later one of that number.
        step, steps, loss: how far it is.
        error: why it failed or was cancelled.
        digest, facts: of what came out.
    """

    job: str
    status: Status
    pid: int | None = None
    started: float | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    error: str | None = None
    digest: str | None = None
    facts: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return a folder's state, or None when no job was ever there."""
        path = folder / "state.json"
        return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, folder: Path) -> None:
        """Put this in the place of what the folder says."""
        write_atomic(folder / "state.json", self.model_dump_json(indent=1) + "\n")

    def but(self, **changes: Any) -> Self:
        """Return the state with some values changed."""
        return self.model_copy(update=changes)

    @property
    def finished(self) -> bool:
        """Whether it has ended, and said so."""
        return self.status in FINISHED

    def process(self) -> psutil.Process | None:
        """Return the process that trains, if it is alive and no other."""
        if self.pid is None or self.started is None:
            return None
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < 0.05 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return found if same else None


def job_id(request: TrainRequest) -> str:
    """Return the id of a request: a hash of what is trained on what, wherever it runs, so asking for the same again is the same job."""
    decides = request.model_dump(mode="json", exclude={"name", "data", "suffix", "device"})
    if request.steering is not None:
        decides["steering"] = {"method": request.steering.method, "spec": request.steering.load().digest}
    return f"peft-{content_hash(decides)[:16]}"


def prepare(request: TrainRequest, folder: Path) -> JobFile:
    """Write a request into a folder whose lock is held, and return its state: finished, or about to go on.

    Raises:
        ExperimentError: when the folder holds another job.
    """
    job = job_id(request)
    earlier = JobFile.read(folder)
    if earlier is not None and earlier.job != job:
        raise ExperimentError(
            f"folder {str(folder)!r} holds the job {earlier.job}, and this request is {job}. Give each request a folder of its own."
        )
    if earlier is not None and intact(earlier, folder):
        return earlier
    write_atomic(folder / "request.json", request.model_dump_json(indent=1) + "\n")
    state = JobFile(job=job, status="queued", step=earlier.step if earlier else 0, steps=earlier.steps if earlier else None)
    state.write(folder)
    return state


def intact(state: JobFile, folder: Path) -> bool:
    """Return whether a job succeeded and its adapter is still what it wrote."""
    return state.status == "succeeded" and _adapter_is(folder, state.digest)


def _adapter_is(folder: Path, digest: str | None) -> bool:
    weights = folder / "adapter" / "adapter_model.safetensors"
    return weights.is_file() and file_hash(weights) == digest


def trained_model(request: TrainRequest, state: JobFile, folder: Path) -> TrainedModel:
    """Return what came out of a job that succeeded."""
    adapter = str(folder / "adapter")
    assert state.digest is not None, "a job that succeeded has a digest"
    return TrainedModel(backend="peft", model_id=adapter, pretrained=request.base_model, peft=adapter, digest=state.digest, facts=state.facts)


def train(request: TrainRequest, folder: Path, *, callback: "Callable[[Progress], None] | None" = None) -> TrainedModel:
    """Train in this process, or go on with what an earlier run left in ``folder``, and return the model.

    Args:
        request: what is trained.
        folder: of this job alone; it is made when it is not there.
        callback: told after each optimiser step.

    Raises:
        ExperimentError: when it cannot be trained, or another process is training in the folder.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = JobLock.take(folder)
    if lock is None:
        raise ExperimentError(f"folder {str(folder)!r} is in use by another training. Wait for it, cancel it, or give another folder.")
    with lock:
        state = prepare(request, folder)
        return trained_model(request, state if state.finished else work(request, folder, state, callback), folder)


def work(request: TrainRequest, folder: Path, state: JobFile, callback: "Callable[[Progress], None] | None" = None) -> JobFile:
    """Train in a prepared folder whose lock is held, keep ``state.json`` up to date, and return the last state."""
    own = psutil.Process()
    state = state.but(status="running", pid=own.pid, started=own.create_time(), error=None)
    state.write(folder)
    for stale in (*folder.glob(".*.json.*"), *folder.glob("checkpoints/.*")):
        stale.unlink(missing_ok=True)
    written = time.monotonic()

    def tell(progress: "Progress") -> None:
        nonlocal state, written
        state = state.but(step=progress.step, steps=progress.steps, loss=progress.loss)
        if time.monotonic() - written > _EVERY:
            state.write(folder)
            written = time.monotonic()
        if callback is not None:
            callback(progress)

    try:
        digest, facts = _finished(folder, state.job) or _fit(request, folder, state.job, tell)
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}; see {folder / 'log.txt'}"
        state.but(status="failed", error=said).write(folder)
        raise
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    # last: whoever reads it may do with the folder what they like
    state = state.but(status="succeeded", digest=digest, facts=facts, step=facts["steps"], steps=facts["steps"], loss=facts["loss"])
    state.write(folder)
    return state


def _finished(folder: Path, job: str) -> tuple[str, dict[str, Any]] | None:
    """Return digest and facts of a training that ended and was killed before it could say so."""
    path = folder / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return (record["digest"], record["facts"]) if record.get("job") == job and _adapter_is(folder, record["digest"]) else None


def _fit(request: TrainRequest, folder: Path, job: str, tell: "Callable[[Progress], None]") -> "Fitted":
    # the state says running before torch is imported, which takes seconds
    from steered_lm.trait_models.trainer import fit

    return fit(request, folder, job, tell)


def main() -> None:
    """Train the request in a folder; its lock is inherited from whoever started this process, or taken."""
    parser = argparse.ArgumentParser(description="Train the request in a job's folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lock", type=int, help="descriptor that holds the lock")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder: Path = args.folder.resolve()
    if args.lock is not None:
        os.set_inheritable(args.lock, False)
    lock = JobLock.take(folder) if args.lock is None else JobLock(args.lock)
    if lock is None:
        sys.exit(f"{folder} is in use by another training")
    with lock:
        request = TrainRequest.model_validate_json((folder / "request.json").read_text(encoding="utf-8"))
        state = prepare(request, folder)
        if state.finished:
            return
        if args.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported
        work(request, folder, state)


if __name__ == "__main__":
    main()
