import re
import sys
import tarfile
import tomllib
import zipfile

import pytest
from environments import REPOSITORY, run, site_packages

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOAD_ENTRY_POINTS = """
from importlib.metadata import distribution
for point in distribution("steered-lm").entry_points:
    print(point.group, point.name, point.load())
"""


@pytest.fixture(scope="module")
def packed(wheel):
    """Size of each file in the wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def tracked(folder):
    """Names of the files under a content folder that belong into a wheel."""
    return {
        path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("kind", ["tasks", "optimizers", "personas"])
def test_the_wheel_carries_each_content_folder_whole_and_inside_the_package(packed, kind):
    inside = {name.removeprefix("steered_lm/_content/") for name in packed if name.startswith(f"steered_lm/_content/{kind}/")}
    assert inside == tracked(kind) != set()


def test_the_wheel_puts_nothing_at_the_top_but_the_package_and_its_start_up_files(packed):
    tops = {name.partition("/")[0] for name in packed}
    assert tops == {"steered_lm", f"steered_lm-{version()}.dist-info", "steered_lm.pth", "steered_lm.start"}


def test_the_wheel_carries_the_package_with_typing_marker_licence_and_tiny_model(packed):
    source = tracked("steered_lm")
    assert source <= set(packed)
    assert "steered_lm/py.typed" in source
    assert f"steered_lm-{version()}.dist-info/licenses/LICENSE" in packed
    weights = {name: size for name, size in packed.items() if name.startswith("steered_lm/tiny_chat/weights/")}
    assert any(name.endswith(".safetensors") for name in weights)
    assert sum(weights.values()) <= 8 * 2**20


def test_the_wheel_is_the_same_from_the_sdist_and_from_the_checkout(packed, tmp_path):
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, REPOSITORY], cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(direct) as archive:
        assert {info.filename: info.file_size for info in archive.infolist()} == packed


def test_the_sdist_carries_what_a_build_and_the_tests_need(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "hatch_build.py", "constraints.txt", "LICENSE", "README.md", "Makefile", "tests/conftest.py"} <= names


def test_the_start_up_files_are_one_line_each_and_come_after_the_editable_path():
    line = (REPOSITORY / "steered_lm.pth").read_text(encoding="utf-8")
    assert re.fullmatch(r"import sys; .+\n", line)
    assert sorted(["steered_lm.pth", "_editable_impl_steered_lm.pth"])[-1] == "steered_lm.pth"
    assert (REPOSITORY / "steered_lm.start").read_text(encoding="utf-8") == "steered_lm._autoload:autoload\n"


def test_an_editable_install_reads_the_checkout_and_holds_no_copy_of_it(editable_python, tmp_path):
    packages = site_packages(editable_python)
    assert {"steered_lm.pth", "steered_lm.start"} <= {path.name for path in packages.iterdir()}
    assert not (packages / "steered_lm").exists()
    code = "import steered_lm.content as c; print(c.__file__, *map(c.content_dir, ('tasks', 'optimizers', 'personas')), sep='\\n')"
    module, *folders = run([editable_python, "-c", code], cwd=tmp_path).stdout.split()
    assert module == str(REPOSITORY / "steered_lm" / "content.py")
    assert folders == [str(REPOSITORY / kind) for kind in ("tasks", "optimizers", "personas")]


def test_an_installed_wheel_finds_its_content_inside_itself(installed_python, tmp_path):
    code = "import steered_lm.content as c; print(*map(c.content_dir, ('tasks', 'optimizers', 'personas')), c.resolve_model(c.TINY_CHAT), sep='\\n')"
    package = site_packages(installed_python) / "steered_lm"
    folders = [package / "_content" / kind for kind in ("tasks", "optimizers", "personas")]
    assert run([installed_python, "-c", code], cwd=tmp_path).stdout.split() == [*map(str, folders), str(package / "tiny_chat" / "weights")]


@pytest.mark.parametrize("environment", ["installed_python", "editable_python"])
def test_every_entry_point_loads(environment, request, tmp_path):
    said = run([request.getfixturevalue(environment), "-c", LOAD_ENTRY_POINTS], cwd=tmp_path).stdout
    declared = [(group, name) for group, points in PROJECT["entry-points"].items() for name in points]
    assert {tuple(line.split()[:2]) for line in said.splitlines()} == {*declared, ("console_scripts", "steered-lm")}


@pytest.mark.parametrize("environment", ["installed_python", "editable_python"])
def test_the_tasks_entry_point_names_a_package_that_holds_the_task_files(environment, request, tmp_path):
    code = f"""
from importlib.resources import files
from importlib.util import find_spec
name = {PROJECT["entry-points"]["lm_eval.tasks"]["steered_lm"]!r}
(folder,) = find_spec(name).submodule_search_locations
assert files(name).joinpath("persona_judge").is_dir()
print(folder)
"""
    folder = run([request.getfixturevalue(environment), "-c", code], cwd=tmp_path).stdout.strip()
    assert {path.rpartition("/")[2] for path in tracked("tasks")} >= {"persona_judge.yaml"}
    assert folder.endswith("/tasks")


def test_an_installed_wheel_writes_the_ready_experiments(installed_python, tmp_path):
    for name in ("tiny", "persona_vectors"):
        run([installed_python.with_name("steered-lm"), "traits", "example", name, "--out", f"{name}.yaml"], cwd=tmp_path)
        source = REPOSITORY / "steered_lm" / "trait_models" / "configs" / f"{name}.yaml"
        assert (tmp_path / f"{name}.yaml").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("environment", ["installed_python", "editable_python"])
def test_the_console_script_says_what_it_can_do(environment, request, tmp_path):
    said = run([request.getfixturevalue(environment).with_name("steered-lm"), "--help"], cwd=tmp_path, COLUMNS="200").stdout
    assert all(command in said for command in ("vectors", "optimize", "demo", "eval"))


def test_the_stock_command_lists_our_tasks_with_no_flag(listed_tasks):
    assert re.search(r"\|\s*persona_judge\s*\|", listed_tasks.stdout)
    assert "steered-lm" not in listed_tasks.stderr


def test_lm_eval_finds_our_tasks_in_an_editable_install(editable_python, tmp_path):
    said = run([editable_python.with_name("lm_eval"), "validate", "--tasks", "persona_judge"], cwd=tmp_path)
    assert "All tasks found and valid" in said.stdout


def test_stock_inspect_finds_each_of_our_tasks_with_no_flag(installed_python, tmp_path):
    from steered_lm.inspect_plugin import registry

    names = sorted(set(registry.__all__) - {"steered_hf"})
    code = f"from inspect_ai._util.registry import registry_lookup as look; print(*(n for n in {names} if look('task', f'steered_lm/{{n}}')))"
    assert run([installed_python, "-c", code], cwd=tmp_path).stdout.split() == names
    assert run([installed_python.with_name("inspect"), "--version"], cwd=tmp_path).returncode == 0


def test_every_dependency_is_pinned_in_the_constraints_and_ranges_stay_open():
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    names = {normal(name) for name in pins}
    requirements = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    for requirement in requirements:
        assert "<" not in requirement
        assert normal(re.split(r"[><=\[ ]", requirement)[0]) in names | {"pip"}
    assert pins["torch"] == "2.13.0"


def normal(name):
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version():
    """Return the version that the package itself states."""
    return re.search(r'__version__ = "(.+)"', (REPOSITORY / "steered_lm" / "__init__.py").read_text(encoding="utf-8"))[1]
