"""Where a user's own copies of data sets lie, and their files as rows."""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from steered_lm.errors import UserError

VARIABLE = "STEERED_LM_DATA"
"""The environment variable that names the folder; an option ``data`` takes its place."""
SUFFIXES = (".jsonl", ".json", ".parquet")


def data_folder(given: str | None = None) -> Path | None:
    """Return the folder of local data: ``given``, else what ``STEERED_LM_DATA`` names; None when neither is set, which means the hub.

    Raises:
        UserError: when what is named is no folder.
    """
    named = given or os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        source = "data" if given else VARIABLE
        raise UserError(f"{source}={named!r} is not a folder. It names the one that holds truthfulqa/ and mmlu/; leave it out to use the hub.")
    return folder


def find_files(folder: Path, places: Sequence[str]) -> list[Path]:
    """Return the files of the first place that has some; a place is a path below ``folder`` without suffix, shards go by ``name-*``."""
    for place in places:
        base = folder / place
        found = [base.with_name(base.name + suffix) for suffix in SUFFIXES]
        present = [path for path in found if path.is_file()][:1]
        if not present and base.parent.is_dir():
            present = sorted(path for path in base.parent.glob(f"{base.name}-*") if path.suffix in SUFFIXES)
        if present:
            return present
    return []


def missing_file(folder: Path, what: str, places: Sequence[str]) -> UserError:
    """Return the error that says which files were looked for and what the folder holds instead."""
    looked = ", ".join(f"{place}.jsonl" for place in places)
    holds = sorted(str(path.relative_to(folder)) for path in [*folder.iterdir(), *folder.glob("*/*")] if not path.name.startswith("."))
    listed = ", ".join(holds[:20]) + (", …" if len(holds) > 20 else "")
    return UserError(
        f"data folder {str(folder)!r} has no {what}. Looked for {looked} (or .json, .parquet, or shards name-*.parquet). "
        f"It holds: {listed or 'nothing'}. Put the file there, or name another folder by {VARIABLE} or the option data."
    )


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return a file's rows, each with the words that name its place in messages.

    Raises:
        UserError: when the file cannot be read as rows, or has none.
    """
    about = path.stat()
    return list(_rows(path, about.st_mtime_ns, about.st_size))


# 57 subjects read the same file
@lru_cache(maxsize=8)
def _rows(path: Path, changed: int, size: int) -> tuple[tuple[str, dict[str, Any]], ...]:
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path) if path.suffix == ".jsonl" else _json_list(path)
    if not rows:
        raise UserError(f"{path} has no rows. Write one item a line.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object but {row!r:.80}. Write one JSON object an item.")
    return tuple(rows)


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                rows.append((f"{path} line {number}", json.loads(line)))
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 text: {problem}.") from problem
    except json.JSONDecodeError as problem:
        raise UserError(f"{path} line {number} is not JSON: {problem}. Write one item a line.") from problem
    return rows


def _json_list(path: Path) -> list[tuple[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return _json_lines(path)  # the hub has .json files of one object a line, too
    if not isinstance(found, list):
        found = [found]
    return [(f"{path} item {number}", row) for number, row in enumerate(found, start=1)]


def _parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"{path} cannot be read as Parquet: {problem}") from problem
    return [(f"{path} row {number}", row) for number, row in enumerate(found, start=1)]
