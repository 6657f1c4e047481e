"""Subprocesses and clean virtual environments for tests of what is installed: stock commands, entry points, start-up files."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
STOCK_COMMANDS = ("lm_eval", "lm-eval", "inspect", "accelerate")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def clean_environ(**extra: str) -> dict[str, str]:
    """Return the environment for a subprocess test: offline, and with nothing that would leak this checkout's code into it."""
    leaks = {"PYTHONPATH", "STEERED_LM_NO_AUTOLOAD", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in leaks} | OFFLINE | extra


def run(command: Sequence[str | Path], cwd: Path, check: bool = True, **extra: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in ``clean_environ(**extra)`` from ``cwd``, with what it printed in the failure's message."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean_environ(**extra), capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        pytest.fail(f"{' '.join(map(str, command))} exited with {done.returncode}\n{said}", pytrace=False)
    return done


def site_packages(python: Path) -> Path:
    """Return the site-packages folder of a virtual environment's interpreter."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1]), "platbase": str(python.parents[1])}))


def make_environment(folder: Path) -> Path:
    """Return the interpreter of a new virtual environment that borrows this one's libraries, but runs none of its ``.pth`` files."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    (site_packages(python) / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    for script in entry_points(group="console_scripts"):
        if script.name in STOCK_COMMANDS:
            command = python.with_name(script.name)
            command.write_text(f"#!{python}\nimport sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n", encoding="utf-8")
            command.chmod(0o755)
    return python


def install_into(python: Path, *arguments: str | Path) -> None:
    """Install without dependencies and without an index, with this environment's pip."""
    # --ignore-installed: the borrowed libraries may hold this project's own editable installation.
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation", *arguments], cwd=python.parent)
