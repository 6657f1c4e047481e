"""Finished steps of experiments, one folder each, found again by the hash of everything that decides their outcome. JSON alone."""

import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steered_lm.config import Config, content_hash, write_atomic
from steered_lm.trait_models.experiment import ExperimentError

WORKFLOW = 1
"""Part of every key: what older versions of the workflow finished is not taken for this one's."""
SUBMIT = "submit"
"""The lock of whoever submits jobs or removes data that a job may need."""
_REMOVED = ".removed-"

StepStatus = Literal["finished", "running", "failed", "unfinished"]


class Job(Config):
    """A job that a backend was given.

    Attributes:
        id: its id at the backend.
        attempt: 1 for the first.
    """

    id: str
    attempt: int


class Failure(Config):
    """How the last attempt ended.

    Attributes:
        status: whether it failed or was cancelled.
        error: why.
        attempt: which one it was.
    """

    status: Literal["failed", "cancelled"] = "failed"
    error: str
    attempt: int


@dataclass(frozen=True)
class Step:
    """One step: a folder with ``request.json``, ``record.json`` once it is finished, ``job.json`` while a backend works on it, ``failure.json``.

    Attributes:
        folder: its own.
        lock_file: what whoever works on it holds.
        request: everything that decides its outcome.
        label: names it for people; no part of the key.
    """

    folder: Path
    lock_file: Path
    request: Mapping[str, Any]
    label: str

    @property
    def work(self) -> Path:
        """Where a backend or a harness keeps what it makes."""
        return self.folder / "work"

    def record(self) -> dict[str, Any] | None:
        """Return what came out; None when the step is not finished.

        Raises:
            ExperimentError: when the file is damaged.
        """
        return _read(self.folder / "record.json")

    def job(self) -> Job | None:
        """Return the job under way, as far as the folder knows."""
        found = _read(self.folder / "job.json")
        return None if found is None else Job.parse(found, source=str(self.folder / "job.json"), error=ExperimentError)

    def failure(self) -> Failure | None:
        """Return how the last attempt failed; None when none did."""
        found = _read(self.folder / "failure.json")
        return None if found is None else Failure.parse(found, source=str(self.folder / "failure.json"), error=ExperimentError)

    @property
    def attempts(self) -> int:
        """How many attempts have failed."""
        failure = self.failure()
        return 0 if failure is None else failure.attempt

    def prepare(self) -> None:
        """Make the folder and write down what the step is."""
        self.work.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "request.json", {"label": self.label, **self.request})

    def started(self, job: str) -> None:
        """Note the job that works on the step."""
        _write(self.folder / "job.json", Job(id=job, attempt=self.attempts + 1).model_dump(mode="json"))

    def failed(self, error: str, *, status: Literal["failed", "cancelled"] = "failed", attempt: int | None = None) -> None:
        """Note how an attempt ended, by default the next one; then there is no job any more."""
        attempt = self.attempts + 1 if attempt is None else attempt
        _write(self.folder / "failure.json", Failure(status=status, error=error, attempt=attempt).model_dump(mode="json"))
        (self.folder / "job.json").unlink(missing_ok=True)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write what came out, which makes the step finished."""
        _write(self.folder / "record.json", record)
        (self.folder / "job.json").unlink(missing_ok=True)
        (self.folder / "failure.json").unlink(missing_ok=True)

    def reopen(self) -> None:
        """Forget what came out, so that the step is done again."""
        (self.folder / "record.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the step against other processes; gives False at once when another one holds it and ``wait`` is False."""
        with exclusive(self.lock_file, wait=wait) as held:
            yield held


class StepInfo(NamedTuple):
    """A step as ``cache list`` shows it.

    Attributes:
        name: what kind of step: ``train`` or ``evaluate``.
        label: names it for people.
        status: ``unfinished`` when it was begun and nothing works on it.
        size: bytes of its folder.
        changed: when its state last changed, in seconds since 1970.
        folder: where it lies.
    """

    name: str
    label: str
    status: StepStatus
    size: int
    changed: float
    folder: Path

    @property
    def key(self) -> str:
        """The hash that it is found by."""
        return self.folder.name


class Store:
    """The steps of all experiments that share a folder."""

    def __init__(self, root: Path) -> None:
        """Use a folder; it is made when something is written."""
        self.root = root

    def step(self, name: str, request: Mapping[str, Any], *, label: str) -> Step:
        """Return the step of a request, which may or may not be finished.

        Args:
            name: what kind of step, such as ``train``.
            request: JSON-like; everything that decides the outcome and nothing else.
            label: names it for people.
        """
        whole = {"workflow": WORKFLOW, "step": name, **request}
        key = content_hash(whole)[:32]
        return Step(self.root / name / key, self.root / "locks" / f"{name}-{key}", whole, label)

    def check(self) -> None:
        """Make the folder.

        Raises:
            ExperimentError: when nothing can be written there.
        """
        try:
            with self.locked(SUBMIT):
                pass
        except OSError as problem:
            raise ExperimentError(
                f"training.dataset_options.cache_dir={str(self.root)!r} cannot be written: {problem}. Name a folder that can."
            ) from problem

    def data_file(self, digest: str) -> Path:
        """Return where training data with this digest lie, whichever steps use them."""
        return self.root / "data" / f"{digest[:32]}.jsonl"

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold one lock of the whole folder; waits for other processes."""
        with exclusive(self.root / "locks" / what):
            yield

    def steps(self) -> list[StepInfo]:
        """Return all steps in the folder, by kind and label."""
        found = [_info(folder) for name in ("train", "evaluate") for folder in sorted((self.root / name).glob("[!.]*")) if folder.is_dir()]
        return sorted(found, key=lambda info: (info.name != "train", info.label, info.key))

    def prunable(
        self, *, older_than: float = 0.0, failed: bool = False, used: Collection[Path] = (), also_used: bool = False, now: float | None = None
    ) -> list[StepInfo]:
        """Return the steps that may go; those on which a job is under way never do.

        Args:
            older_than: seconds since the step last changed.
            failed: only those that failed or were never finished.
            used: folders of steps that experiments still use; they stay, unless ``also_used``.
            also_used: take those too.
            now: the time; by default the clock's.
        """
        moment = time.time() if now is None else now
        kept = set() if also_used else {folder.resolve() for folder in used}
        return [
            info
            for info in self.steps()
            if info.status != "running"
            and moment - info.changed >= older_than
            and not (failed and info.status == "finished")
            and info.folder.resolve() not in kept
        ]

    def remove(self, info: StepInfo) -> bool:
        """Remove a step and, with the last step that used them, its training data; False when another process is working on it."""
        with exclusive(self.root / "locks" / f"{info.name}-{info.key}", wait=False) as held:
            if not held or _info(info.folder).status == "running":
                return False
            # renamed first: a step is there or not, even when this process is killed half way
            gone = info.folder.with_name(f"{_REMOVED}{info.key}-{os.getpid()}")
            os.replace(info.folder, gone)
        for folder in info.folder.parent.glob(f"{_REMOVED}*"):  # and what a killed process left
            shutil.rmtree(folder, ignore_errors=True)
        with self.locked(SUBMIT):
            self._remove_unused_data()
        return True

    def _remove_unused_data(self) -> None:
        wanted = {self.data_file(str(request["data"])).name for request in self._requests("train") if "data" in request}
        for file in (self.root / "data").glob("*.jsonl"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)

    def _requests(self, name: str) -> Iterator[dict[str, Any]]:
        for file in (self.root / name).glob("[!.]*/request.json"):
            found = _read(file)
            if found is not None:
                yield found


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; gives False at once when another process holds it and ``wait`` is False.

    The lock goes with the process, even a killed one. Windows has none, and there two processes go unnoticed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
        yield True


def _info(folder: Path) -> StepInfo:
    names = ("request.json", "record.json", "job.json", "failure.json")
    times = {name: (folder / name).stat().st_mtime for name in names if (folder / name).is_file()}
    status: StepStatus = (
        "finished" if "record.json" in times else "running" if "job.json" in times else "failed" if "failure.json" in times else "unfinished"
    )
    request = _read(folder / "request.json") or {}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    changed = max(times.values(), default=folder.stat().st_mtime)
    return StepInfo(folder.parent.name, str(request.get("label", "?")), status, size, changed, folder)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as problem:
        raise ExperimentError(f"{str(file)!r} is damaged: {problem}. Remove the folder it lies in, and the step is done again.") from problem
    if not isinstance(found, dict):
        raise ExperimentError(f"{str(file)!r} is no JSON object. Remove the folder it lies in, and the step is done again.")
    return found


def _write(file: Path, data: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
