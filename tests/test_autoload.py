import subprocess
import sys
from pathlib import Path

import pytest
from environments import REPOSITORY, clean_environ, make_environment, run, site_packages

from steered_lm import _autoload

REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target
model_registry = Registry()
"""
MANAGER = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.seen = include_path
"""
NATIVE = "from importlib.metadata import entry_points\nfound = entry_points(group='{group}')\n"
REPORT = "import lm_eval.models; print('models', *lm_eval.models.model_registry.items())"


@pytest.fixture
def small_lm_eval(tmp_path):
    """A folder with an lm_eval of a few lines: for what no released one does yet, and for what a damaged one would do."""

    def write(models="from lm_eval.api.registry import model_registry\n", registry=REGISTRY, manager=MANAGER):
        folder = tmp_path / "small"
        modules = {
            "__init__": "",
            "models/__init__": models,
            "api/__init__": "",
            "api/registry": registry,
            "tasks/__init__": "",
            "tasks/manager": manager,
        }
        for name, text in modules.items():
            path = folder / "lm_eval" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return folder

    return write


def say(python: Path, code: str, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run([python, "-c", code], cwd=cwd, **environ)


def test_the_real_lm_eval_knows_the_model_type_and_puts_our_tasks_before_the_users(installed_python, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "persona_judge.yaml").write_text("task: persona_judge\n", encoding="utf-8")
    code = f"""
import lm_eval.tasks, lm_eval.models
from lm_eval.api.registry import model_registry
assert model_registry._objs["steered-hf"] == {_autoload.MODEL_TARGET!r}
both = lm_eval.tasks.TaskManager(None, {str(mine)!r})
alone = lm_eval.tasks.TaskManager(include_path={str(mine)!r}, include_defaults=False)
found = [both.task_index["tiny_truth"], both.task_index["persona_judge"], alone.task_index["persona_judge"]]
print(*(task.yaml_path for task in found), len(alone.all_tasks), sep="\\n")
"""
    first, second, third, count = say(installed_python, code, tmp_path).stdout.split()[-4:]
    assert Path(first).is_relative_to(site_packages(installed_python) / "steered_lm" / "_content" / "tasks")
    assert second == third == str(mine / "persona_judge.yaml")
    assert count == "1"


def test_installing_twice_leaves_one_finder_and_one_wrapper(tmp_path, small_lm_eval):
    code = """
import sys, steered_lm
steered_lm.install(); steered_lm.install()
from lm_eval.tasks.manager import TaskManager
init = TaskManager.__init__
steered_lm.install()
assert TaskManager.__init__ is init
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
print(*(path.name for path in TaskManager(include_path="x").seen[:1]), TaskManager(include_path="x").seen[1:])
"""
    paths = f"{REPOSITORY}:{small_lm_eval()}"
    assert say(sys.executable, code, tmp_path, PYTHONPATH=paths, STEERED_LM_NO_AUTOLOAD="1").stdout == "tasks ['x']\n"


def test_install_works_after_lm_eval_was_imported(tmp_path, small_lm_eval):
    code = (
        f"import lm_eval.models, lm_eval.tasks.manager, steered_lm; steered_lm.install(); {REPORT}; print(lm_eval.tasks.manager.TaskManager().seen)"
    )
    said = say(sys.executable, code, tmp_path, PYTHONPATH=f"{REPOSITORY}:{small_lm_eval()}", STEERED_LM_NO_AUTOLOAD="1").stdout
    assert _autoload.MODEL_TARGET in said
    assert str(REPOSITORY / "tasks") in said


def test_the_loaders_of_lm_eval_stay_the_real_ones(tmp_path, small_lm_eval):
    code = """
import inspect, steered_lm
steered_lm.install()
import lm_eval.models
print(type(lm_eval.models.__loader__).__name__, "model_registry" in inspect.getsource(lm_eval.models))
"""
    said = say(sys.executable, code, tmp_path, PYTHONPATH=f"{REPOSITORY}:{small_lm_eval()}").stdout
    assert said == "SourceFileLoader True\n"


def test_an_lm_eval_that_reads_entry_points_itself_is_left_alone(installed_python, tmp_path, small_lm_eval):
    models = "from lm_eval.api.registry import model_registry\n" + NATIVE.format(group="lm_eval.models")
    folder = small_lm_eval(models=models, manager=MANAGER + NATIVE.format(group="lm_eval.tasks"))
    code = f"{REPORT}; import lm_eval.tasks.manager as m; print(m.TaskManager(include_path='x').seen, [p.value for p in m.found])"
    said = say(installed_python, code, tmp_path, PYTHONPATH=str(folder)).stdout.splitlines()
    assert said == ["models", "x ['steered_lm._content.tasks']"]


def test_a_model_type_that_is_registered_already_is_left_alone(installed_python, tmp_path, small_lm_eval):
    folder = small_lm_eval(registry=REGISTRY + "model_registry.register('steered-hf', target='native')\n")
    assert say(installed_python, REPORT, tmp_path, PYTHONPATH=str(folder)).stdout == "models ('steered-hf', 'native')\n"


def test_the_opt_out_variable_switches_the_hook_off_but_not_an_explicit_install(installed_python, tmp_path, small_lm_eval):
    folder = str(small_lm_eval())
    assert "steered-hf" in say(installed_python, REPORT, tmp_path, PYTHONPATH=folder).stdout
    assert say(installed_python, REPORT, tmp_path, PYTHONPATH=folder, STEERED_LM_NO_AUTOLOAD="1").stdout == "models\n"
    explicit = f"import steered_lm; steered_lm.install(); {REPORT}"
    assert "steered-hf" in say(installed_python, explicit, tmp_path, PYTHONPATH=folder, STEERED_LM_NO_AUTOLOAD="1").stdout


def test_an_lm_eval_that_has_changed_beyond_recognition_gets_one_warning_and_works(installed_python, tmp_path, small_lm_eval):
    folder = small_lm_eval(models="", registry="")
    done = say(installed_python, "import lm_eval.models; print('works')", tmp_path, PYTHONPATH=str(folder))
    assert done.stdout == "works\n"
    assert done.stderr.count("RuntimeWarning: steered-lm could not announce 'steered-hf'") == 1
    assert "steered-lm eval" in done.stderr


@pytest.mark.parametrize("remains", [None, "raise SyntaxError('torn file')"])
def test_a_start_up_file_left_behind_by_a_broken_installation_only_warns(tmp_path, small_lm_eval, remains):
    python = make_environment(tmp_path / "broken")
    packages = site_packages(python)
    (packages / "borrowed.pth").unlink()
    (packages / "steered_lm.pth").write_bytes((REPOSITORY / "steered_lm.pth").read_bytes())
    if remains is not None:
        (packages / "steered_lm").mkdir()
        (packages / "steered_lm" / "__init__.py").write_text(remains, encoding="utf-8")
    silent = say(python, "pass", tmp_path)
    assert silent.stderr == ""
    done = say(python, REPORT, tmp_path, PYTHONPATH=str(small_lm_eval()))
    assert done.stdout == "models\n"
    assert done.stderr.count("RuntimeWarning: steered-lm is gone or broken") == 1


def test_starting_python_imports_nothing_of_ours_and_nothing_else_for_us(installed_python, tmp_path):
    code = "import sys; print(*sorted(sys.modules))"
    with_hook = set(say(installed_python, code, tmp_path).stdout.split())
    plain = make_environment(tmp_path / "plain")
    assert with_hook == set(say(plain, code, tmp_path).stdout.split())


def test_the_start_up_line_costs_a_fraction_of_a_millisecond():
    line = (REPOSITORY / "steered_lm.pth").read_text(encoding="utf-8")
    code = f"""
import sys, time
def once():
    before = list(sys.meta_path)
    begin = time.perf_counter()
    exec({line!r})
    spent = time.perf_counter() - begin
    sys.meta_path[:] = before
    return spent
print(1e3 * min(once() for _ in range(50)))
"""
    spent = subprocess.run([sys.executable, "-S", "-c", code], env=clean_environ(), capture_output=True, text=True, check=True).stdout
    assert float(spent) < 1.0, "see tests/bench/startup.py for whole interpreter starts"


def test_what_the_hook_imports_at_an_early_start_is_what_python_has_loaded_anyway(tmp_path):
    # Python 3.15 and later call autoload() itself at every start (steered_lm.start), so its modules must not pull in others.
    code = "import sys; before = set(sys.modules); from steered_lm._autoload import autoload; autoload(); print(*sorted(set(sys.modules) - before))"
    assert say(sys.executable, code, tmp_path, PYTHONPATH=str(REPOSITORY)).stdout.split() == ["steered_lm", "steered_lm._autoload"]
