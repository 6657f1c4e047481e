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


def options(vectors: Path, out: Path) -> list[str]:
    settings = ["--budget", 48, "--max-new-tokens", 24, "--judge-cache", out.parent / "v.sqlite"]
    return list(map(str, ["optimize", "--persona", "walt", "--vectors", vectors, "--out", out, *settings]))


def finish(vectors: Path, out: Path) -> None:
    done = CliRunner().invoke(cli.app, options(vectors, out))
    assert done.exit_code == 0, done.output


def generations(out: Path) -> int:
    log = out / "run.jsonl"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.is_file() else 0


def test_kill_9_in_the_middle_of_a_generation_and_start_again_gives_the_same_final_spec(vectors: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(vectors, whole)
    command = [sys.executable, "-m", "steered_lm.cli", *options(vectors, broken)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while generations(broken) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (broken / "best_spec.yaml").exists(), "the run ended before it could be killed"
    finish(vectors, broken)
    for name in ("best_spec.yaml", "result.json", "audit.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
