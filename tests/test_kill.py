"""``steered-lm optimize`` killed with SIGKILL in the middle of a generation ends, started again, with the same files as an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steered_lm import cli


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    arguments = ["vectors", "build", "--out", path, "--traits", "formality,emotional_tone", "--pairs", 24, "--held-out-pairs", 16]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return path


def command(vectors: Path, out: Path) -> list[str]:
    options = [
        "--persona",
        "walt",
        "--vectors",
        vectors,
        "--out",
        out,
        "--budget",
        48,
        "--max-new-tokens",
        48,
        "--judge-cache",
        out.parent / "v.sqlite",
    ]
    return [sys.executable, "-m", "steered_lm.cli", "optimize", *map(str, options)]


def generations(out: Path) -> int:
    log = out / "run.jsonl"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.is_file() else 0


def test_kill_9_in_the_middle_of_a_generation_and_start_again_gives_the_same_final_spec(vectors: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(vectors, whole), env=environment, check=True, capture_output=True, timeout=240)
    running = subprocess.Popen(command(vectors, broken), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while generations(broken) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (broken / "best_spec.yaml").exists(), "the run ended before it could be killed"
    subprocess.run(command(vectors, broken), env=environment, check=True, capture_output=True, timeout=240)
    for name in ("best_spec.yaml", "result.json", "audit.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
