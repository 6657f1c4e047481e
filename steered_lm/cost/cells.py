"""Finished measurements, one file each: what is there is not measured again."""

import logging
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from pydantic import ValidationError

from steered_lm.config import Config, content_hash, write_atomic
from steered_lm.errors import UserError
from steered_lm.harness.items import ItemResult

logger = logging.getLogger(__name__)
Kept = TypeVar("Kept", bound=Config)


class Items(Config):
    """One task under one arm."""

    items: tuple[ItemResult, ...]


def check_folder(folder: Path) -> None:
    """Make a folder, and refuse one that cannot be written.

    Raises:
        UserError: when it is no folder, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise UserError(f"out={str(folder.parent)!r} cannot be written: {problem.strerror}. Name a folder that can.") from problem


class Cells:
    """A folder of finished measurements, each in a file that is named by the hash of all that decides it.

    Files are written whole or not at all, so that several processes may share a folder, and a killed one loses only what it was at.

    Attributes:
        reused: how many were read.
        made: how many were written.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, which need not exist."""
        self.folder, self.reused, self.made = folder, 0, 0

    @staticmethod
    def key(**facts: Any) -> str:
        """Return the name of a measurement that is decided by these facts."""
        return content_hash({"format": 2, **facts})

    def get(self, key: str, kind: type[Kept]) -> Kept | None:
        """Return a measurement, None when it is not there; a damaged file is as good as none."""
        path = self._path(key)
        try:
            found = kind.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as problem:
            logger.warning("%s is damaged and measured again: %s", path, problem)
            return None
        self.reused += 1
        return found

    def put(self, key: str, value: Config) -> None:
        """Keep a measurement."""
        write_atomic(self._path(key), value.model_dump_json())
        self.made += 1

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
