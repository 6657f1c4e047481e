"""Where the content folders lie: ``tasks/``, ``optimizers/`` and ``personas/``, opened by path and never imported by name."""

from pathlib import Path
from typing import Literal

from steered_lm.errors import PersonaError, UserError, near_misses

_PACKAGE = Path(__file__).resolve().parent
TINY_CHAT = "steered-lm/tiny-chat"


def content_dir(kind: Literal["tasks", "optimizers", "personas"]) -> Path:
    """Return a content folder: inside an installed wheel, or beside the package in a checkout."""
    for folder in (_PACKAGE / "_content" / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise UserError(f"content folder {kind!r} is neither inside the package nor beside it; reinstall steered-lm.")


def persona_dir(name: str) -> Path:
    """Return a persona's folder, from the name of one of ours or from a path.

    Raises:
        PersonaError: when neither exists; the message lists near misses.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "persona.yaml").is_file():
        return path
    ours = {folder.name: folder for folder in content_dir("personas").iterdir() if (folder / "persona.yaml").is_file()}
    if name in ours:
        return ours[name]
    raise PersonaError(f"persona={name!r} is neither one of ours nor a folder with a persona.yaml. {near_misses(name, ours)}")


def optimizer_file(name: str) -> Path:
    """Return an optimiser's file, from the name of one of ours or from a path to a ``.py`` file.

    Raises:
        UserError: when neither exists.
    """
    path = Path(name).expanduser()
    if path.suffix == ".py" and path.is_file():
        return path
    ours = {file.stem: file for file in content_dir("optimizers").glob("*.py")}
    if name in ours:
        return ours[name]
    raise UserError(f"optimizer={name!r} is neither one of ours nor a path to a .py file. {near_misses(name, ours)}")


def resolve_model(name: str) -> str:
    """Return the folder of the shipped tiny chat model for its alias ``steered-lm/tiny-chat``; other names as they are."""
    return str(_PACKAGE / "tiny_chat" / "weights") if name == TINY_CHAT else name
