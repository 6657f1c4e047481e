"""Fixtures that many test files share: the built distributions and clean environments that they are installed into."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

# Before torch is loaded anywhere: two processes with two threads each on two cores wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a runner that was started in the background hands an ignored SIGINT down, and tests of Ctrl-C would wait for nothing
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# as wide as tables want to be: where cells wrap depends on the length of temporary folders' names
os.environ["COLUMNS"] = "200"

from environments import REPOSITORY, install_into, make_environment, run

# files that share a clean environment, so that one worker builds it once
INSTALLED = {"test_autoload", "test_packaging", "test_stock_commands", "test_trait_stock"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file's tests on one worker, and those of ``INSTALLED`` on the same one: their fixtures are then made once.

    Group marks would say the same, but xdist 3.8 does not see them under pytest 9.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return "installed" if stem in INSTALLED else stem

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Leave what all test files imported out of later collections of garbage: libraries ask for full ones, a tenth of a second and more each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests where there is none."""
    if accelerated := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            config.hook.pytest_deselected(items=accelerated)
            items[:] = [item for item in items if item not in accelerated]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY], cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    """The wheel, built from the sdist."""
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with the wheel installed; ``lm_eval``, ``inspect``, ``accelerate`` lie beside it."""
    python = make_environment(tmp_path_factory.mktemp("installed"))
    install_into(python, wheel)
    return python


@pytest.fixture(scope="session")
def listed_tasks(installed_python: Path, tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """What ``lm_eval ls tasks`` prints where the wheel is installed: lm-eval takes a quarter of a minute for it."""
    return run([installed_python.with_name("lm_eval"), "ls", "tasks"], cwd=tmp_path_factory.mktemp("listed"))


@pytest.fixture(scope="session")
def editable_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with this checkout installed by ``pip install -e``."""
    python = make_environment(tmp_path_factory.mktemp("editable"))
    install_into(python, "-e", REPOSITORY)
    return python
