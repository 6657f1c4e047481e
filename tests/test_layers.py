import ast
import json
import sys
from pathlib import Path

import pytest
from environments import REPOSITORY, run

PACKAGE = REPOSITORY / "steered_lm"
# The layer of each file or folder of the package; imports run downward, or sideways within a layer.
LAYERS = {
    **dict.fromkeys(("__init__", "errors", "config", "content", "chat", "seeds", "stats", "_content"), 0),
    **dict.fromkeys(("benchmarks", "steering", "extract", "engine", "judges", "lamp", "measure", "persona", "search", "tiny_chat"), 1),
    **dict.fromkeys(("harness", "inspect_plugin", "report", "trait_models"), 2),
    **dict.fromkeys(("cli", "_autoload", "arms", "cost", "demo", "progress", "study", "trait_demo", "commands"), 3),
}
ROOM_OF_LIBRARY = {"lm_eval": "harness", "inspect_ai": "inspect_plugin"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> set[str]:
    """Every absolute module name that is imported anywhere in a file, but for type checkers alone."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_with_modules(*rooms: str) -> list[str]:
    """The importable names of all modules in these rooms."""
    found = [path.relative_to(REPOSITORY).with_suffix("") for path in MODULES if place(path) in rooms]
    return [".".join(path.parts).removesuffix(".__init__") for path in found]


def loaded_after(stages: list[list[str]], tmp_path: Path) -> list[set[str]]:
    """Which heavy libraries a fresh interpreter holds after each stage of imports."""
    code = f"""
import importlib, json, sys
for stage in json.loads({json.dumps(stages)!r}):
    for name in stage:
        importlib.import_module(name)
    print(*[name for name in ("torch", "lm_eval", "inspect_ai") if name in sys.modules], "stage")
"""
    said = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(REPOSITORY), STEERED_LM_NO_AUTOLOAD="1").stdout
    return [set(line.split()) - {"stage"} for line in said.splitlines() if line.endswith("stage")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward_and_harnesses_stay_in_their_rooms(path):
    own = place(path)
    assert own in LAYERS, f"give {own!r} a layer in this test"
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        library, _, rest = name.partition(".")
        assert ROOM_OF_LIBRARY.get(library, own) == own, f"{name} is imported outside {ROOM_OF_LIBRARY[library]}/"
        if library == "steered_lm":
            other = rest.partition(".")[0]
            layer = LAYERS.get(other, 0)
            assert layer <= LAYERS[own], f"{own} (layer {LAYERS[own]}) imports {name} (layer {layer})"


def test_importing_the_package_and_its_light_rooms_loads_no_heavy_library(tmp_path):
    light = rooms_with_modules("benchmarks", "errors", "config", "content", "chat", "judges", "lamp", "persona", "search")
    assert loaded_after([["steered_lm"], light, ["steered_lm.inspect_plugin.registry"]], tmp_path) == [set(), set(), {"inspect_ai"}]


def test_steering_extraction_and_report_load_no_harness_and_the_harness_room_loads_its_own_alone(tmp_path):
    stages = [rooms_with_modules("steering", "extract", "engine"), rooms_with_modules("report"), rooms_with_modules("harness")]
    assert loaded_after(stages, tmp_path) == [{"torch"}, {"torch"}, {"torch", "lm_eval"}]


def test_the_model_type_alone_loads_neither_search_nor_judges_nor_personas(tmp_path):
    code = "import sys, steered_lm.harness.model; print(*{name.split('.')[1] for name in sys.modules if name.startswith('steered_lm.')})"
    said = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(REPOSITORY), STEERED_LM_NO_AUTOLOAD="1").stdout
    assert not {"search", "judges", "persona", "inspect_plugin", "report"} & set(said.split())
