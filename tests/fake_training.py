"""A fine-tuning backend that trains nothing and notes every job that it starts, and experiments for it."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from steered_lm.content import TINY_CHAT
from steered_lm.errors import UserError
from steered_lm.trait_models.backend import JobState, TrainedModel, TrainRequest, UnreachableError
from steered_lm.trait_models.experiment import Experiment

REPOSITORY = Path(__file__).resolve().parents[1]


class FakeBackend:
    """Jobs that end after a while, as their script says: ``script[model]`` is a list of errors, one an attempt, None for success.

    A job is one file in its folder. Every start is a line in ``log``, so that tests see what was started, and how often.
    """

    name = "fake"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.parallel = options.get("parallel", 2)
        self.log = Path(options["log"])
        self.unreachable: set[str] = set()
        self.forgotten: set[str] = set()

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "FakeBackend":
        return cls(options)

    def check(self, request: TrainRequest) -> None:
        assert request.data.is_file()
        if request.name in self.options.get("refused", ()):
            raise UserError(f"model {request.name} is refused.")

    def identity(self, request: TrainRequest) -> dict[str, Any]:
        return {"fake": self.options.get("version", 1)}

    def submit(self, request: TrainRequest, folder: Path) -> str:
        if request.name in self.options.get("unsubmittable", ()):
            raise UserError("the service says no.")
        file = folder / "fake.json"
        if file.is_file():
            job = json.loads(file.read_text())
            if self._state(job) != "failed":
                return str(job["id"])
        script = self.options.get("script", {}).get(request.name, [])
        attempt, seconds = self.started().count(request.name), self.options.get("seconds", 0.0)
        job = {
            "id": f"job-{request.name}-{attempt}",
            "name": request.name,
            "ends": time.time() + (seconds.get(request.name, 0.0) if isinstance(seconds, dict) else seconds),
            "error": script[attempt] if attempt < len(script) else None,
        }
        with self.log.open("a") as log:  # before the file: a crash between them would show as a second start
            log.write(f"{request.name}\n")
            log.flush()
            os.fsync(log.fileno())
        temporary = folder / "fake.tmp"
        temporary.write_text(json.dumps(job))
        temporary.rename(file)
        return str(job["id"])

    def started(self) -> list[str]:
        return self.log.read_text().split() if self.log.is_file() else []

    def poll(self, job: str, folder: Path) -> JobState:
        known = json.loads((folder / "fake.json").read_text())
        assert known["id"] == job
        if known["name"] in self.unreachable:
            raise UnreachableError("no answer.")
        if known["name"] in self.forgotten:
            raise UserError("there is no such job.")
        state = self._state(known)
        if state == "running":
            return JobState(status="running", progress=0.5, detail="step 1/2")
        if state == "failed":
            return JobState(status="cancelled" if known["error"] == "cancelled" else "failed", error=known["error"])
        adapter = self.options.get("adapter", {}).get(known["name"])
        if adapter is not None and not (folder / "adapter").is_dir():
            shutil.copytree(adapter, folder / "adapter")
        peft = str(folder / "adapter") if adapter is not None else None
        dummy = self.options.get("dummy", False)
        service = self.options.get("service", {}).get(known["name"])
        model = TrainedModel(
            backend="fake",
            model_id=service or peft or known["name"],
            pretrained=None if service else TINY_CHAT,
            peft=peft,
            inspect=service,
            **(self.options.get("place", {}) if service else {}),
            dummy=dummy,
            digest=known["name"],
            facts={"loss": 1.25},
        )
        return JobState(status="succeeded", model=model)

    def cancel(self, job: str, folder: Path) -> None:
        file = folder / "fake.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "ends": 0.0, "error": "cancelled"}))

    def _state(self, job: dict[str, Any]) -> str:
        if time.time() < job["ends"]:
            return "running"
        return "succeeded" if job["error"] is None else "failed"


def register(folder: Path) -> None:
    """Put the backend's entry point where an interpreter with this folder on its path finds it, as an installed package would."""
    info = folder / "fake_training-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-training\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[steered_lm.training_backends]\nfake = fake_training:FakeBackend\n")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that finds package, tests and the registered backend."""
    path = os.pathsep.join(str(place) for place in (REPOSITORY, REPOSITORY / "tests", folder))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


def write_experiment(
    folder: Path,
    models: dict[str, tuple[str, str]],
    *,
    evaluation: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """Write data sets and an experiment's file; ``models`` maps names to trait and strength."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (trait, strength) in models.items():
        turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": f"{name} is {strength} {trait}."}]
        (data / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        rows.append({"name": name, "dataset": str(data / f"{name}.jsonl"), "trait": trait, "strength": strength})
    config = {
        "name": "trial",
        "models": rows,
        "training": {
            "base_model": TINY_CHAT,
            "backend": "fake",
            "options": {"log": str(folder / "started.txt"), **(options or {})},
            "dataset_options": {"cache_dir": "cache"},
            **training,
        },
        "evaluation": {"tasks": ["humorous"], "judge": "openai:rule", **(evaluation or {})},
    }
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def load(file: Path) -> tuple[Experiment, FakeBackend]:
    """The experiment of a file, with its backend."""
    experiment = Experiment.load(file)
    return experiment, FakeBackend.from_options(experiment.training.options)
