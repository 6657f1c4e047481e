"""Frozen configs that refuse unknown keys, and files that are never half written."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from steered_lm.errors import UserError

# pydantic's names for the forms that a value may have: parts of an error's place that nobody wrote
_FORM = re.compile(
    r"(constrained-|nullable-|function-)?(int|float|str|bool|none|(before|after|wrap|plain)\[.*\])|(literal|dict|list|tuple|set)\[.*\]"
)


class Config(BaseModel):
    """Base of every config and artefact: immutable, unknown keys are errors, NaN and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Any, *, source: str, error: type[UserError] = UserError) -> Self:
        """Validate ``data`` and turn pydantic's report into one of our errors that names ``source``."""
        try:
            return cls.model_validate(data)
        except ValidationError as report:
            problems = "; ".join(_problems(report))
            # where values are wrong and keys are not, a list of keys only hides what is wrong
            of_keys = any(e["type"] in ("extra_forbidden", "missing") for e in report.errors())
            where, owner = _owner(cls, next((e["loc"] for e in report.errors() if e["type"] == "extra_forbidden"), ()))
            allowed = f" Allowed keys{where}: {', '.join(owner.model_fields)}." if of_keys else ""
            raise error(f"{source} is not a valid {cls.__name__}: {problems.removesuffix('.')}.{allowed}") from report


def _problems(report: ValidationError) -> list[str]:
    """Return what is wrong, a text a place; the forms that a value may have at one place are told together."""
    found: dict[str, tuple[list[str], Any]] = {}
    for error in report.errors():
        place = ".".join(str(part) for part in error["loc"] if not (isinstance(part, str) and _FORM.fullmatch(part)))
        found.setdefault(place, ([], error.get("input")))[0].append(error["msg"] if place else error["msg"].removeprefix("Value error, "))
    return [f"{place}: {', or '.join(said)} (got {given!r:.80})" if place else "; ".join(said) for place, (said, given) in found.items()]


def _owner(config: type[BaseModel], place: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """Return the config that a key lies in, which may be one within another, and words for where that is."""
    found: tuple[str, type[BaseModel]] = ("", config)
    for number, part in enumerate(place[:-1], start=1):
        if isinstance(part, str):
            field = found[1].model_fields.get(part)
            inner = [] if field is None else _configs(field.annotation)
            if len(inner) != 1:  # a mapping, or one of several configs
                break
            found = (f" in {'.'.join(map(str, place[:number]))}", inner[0])
    return found


def _configs(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _configs(part)]


def read_structured(path: Path, *, what: str = "file ", error: type[UserError] = UserError) -> Any:
    """Read a YAML or JSON file; ``what`` names it in messages: ``file``, or the argument that it was given by, such as ``steering=``.

    Raises:
        UserError: (or ``error``) when the file is missing or cannot be parsed.
    """
    if not path.is_file():
        raise error(f"{what}{str(path)!r} does not exist. Check the path, or create the file first.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{what}{str(path)!r} is neither valid YAML nor JSON: {problem}") from problem


def json_objects(
    lines: Iterable[str], source: str, *, error: type[UserError] = UserError, advice: str = "Write one object a line."
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the objects of JSON lines, each with its number from 1 and the words that name it in messages; empty lines are passed over.

    Raises:
        UserError: (or ``error``) when a line is no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number},"
        try:
            data = json.loads(line)
        except ValueError as problem:
            raise error(f"{where} is not JSON: {problem}. {advice}") from problem
        if not isinstance(data, dict):
            raise error(f"{where} is JSON, but no object. {advice}")
        yield number, where, data


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces, the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """Return the SHA-256 hex digest of a JSON-like value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def make_folder(folder: Path) -> Path:
    """Make a folder, and those above it, where they are not there yet, and return it.

    Raises:
        UserError: when a file stands in its place, or it may not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"folder {str(folder)!r} cannot be made: {problem.strerror}. Name another place to write to.") from problem
    return folder


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a file under a temporary name in the same folder and rename it, so that no reader ever sees half of it.

    Raises:
        UserError: when its folder cannot be made, or the path is a folder itself.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder, and a file is to be written there. Name a file.")
    payload = data.encode("utf-8") if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
