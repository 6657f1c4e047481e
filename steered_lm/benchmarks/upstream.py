"""What lm-eval's own YAML files say, read without importing lm-eval: prompts and metrics are upstream's, in both harnesses."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from steered_lm.errors import UserError


def upstream_file(name: str) -> Path:
    """Return a file of lm-eval's task folder, such as ``truthfulqa/truthfulqa_gen.yaml``.

    Raises:
        UserError: when the installed lm-eval has no such file.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None, "lm-eval is one of our dependencies"
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tasks" / name
    if not path.is_file():
        raise UserError(f"the installed lm-eval has no tasks/{name}, from which prompts are read. Install lm-eval 0.4.13 or a later one that has it.")
    return path


@cache
def upstream_prompt(name: str) -> Callable[[Mapping[str, Any]], str]:
    """Return what renders a row by the ``doc_to_text`` of one of upstream's YAML files."""
    from jinja2 import BaseLoader, Environment, StrictUndefined

    text = upstream_settings(name)["doc_to_text"]
    template = Environment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    return lambda row: template.render(**row)


@cache
def upstream_settings(name: str) -> dict[str, Any]:
    """Return what one of upstream's YAML files says, with what it includes; functions are named, not looked up."""
    return _read(upstream_file(name))


def _read(path: Path) -> dict[str, Any]:

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    own: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    included = own.pop("include", None)
    return own if included is None else _read(path.parent / included) | own


@cache
def upstream_module(name: str) -> ModuleType:
    """Return one of upstream's task modules, such as ``truthfulqa/utils.py``, which holds its metrics."""
    path = upstream_file(name)
    spec = importlib.util.spec_from_file_location(f"steered_lm_upstream_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
