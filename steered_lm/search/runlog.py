"""The run log: append-only JSONL, a header and one line a generation, from which a killed run resumes."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import Field

from steered_lm.config import Config, canonical_json, content_hash
from steered_lm.errors import RunError
from steered_lm.judges.base import Verdict
from steered_lm.search.protocol import CandidateScore, ItemScore, SearchSpace

LOG_NAME = "run.jsonl"
FORMAT_VERSION = 1
LineKind = Literal["generation", "validate", "test", "stopped"]
_log = logging.getLogger(__name__)


class RunSettings(Config):
    """Everything that decides a run's result; two runs with equal settings are one run, and one may resume the other.

    Attributes:
        persona: the persona's name, ``persona_digest`` the hash of its content.
        model: the model's id, ``model_fingerprint`` the hash of its weights or config.
        judge: the judge's name, ``judge_identity`` its hash.
        template_digest: digest of the spec whose weights are searched; with ``optimizer_digest`` and ``arms`` filled in by ``optimize``.
        space: the box of weights.
        optimizer: name or path, ``optimizer_digest`` the file's hash, ``optimizer_options`` what its ``make`` got.
        budget: candidate evaluations on the tuning split, at most.
        finalists: how many of the best are evaluated again on the validation split.
        missing_limit: share of missing verdicts above which the run stops.
        splits: digest of the items of each split.
        arms: digest of every further arm of the test evaluation.
        versions: installed library versions.
        extra: whatever else decides the result, such as generation settings.
    """

    persona: str
    persona_digest: str = ""
    model: str
    model_fingerprint: str = ""
    judge: str
    judge_identity: str = ""
    template_digest: str = ""
    space: SearchSpace
    optimizer: str = "cma_es"
    optimizer_digest: str = ""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    budget: int
    finalists: int = 3
    missing_limit: float = Field(default=0.2, ge=0, le=1)
    splits: dict[str, str] = Field(default_factory=dict)
    arms: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)


def installed_versions(*names: str) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def score_to_json(score: CandidateScore) -> dict[str, Any]:
    """Return a candidate's outcomes as they are logged: per item the response, its length in characters, the score or why it is missing."""
    rows = [{"item": i.item, "prompt": i.prompt, "response": i.response, "length": len(i.response), **i.verdict.record()} for i in score.items]
    return {"mean": None if score.missing == len(score.items) else score.mean, "missing": score.missing, "items": rows}


def score_from_json(data: Mapping[str, Any]) -> CandidateScore:
    """Return what ``score_to_json`` wrote."""
    fields = Verdict.model_fields
    items = (
        ItemScore(item=r["item"], prompt=r["prompt"], response=r["response"], verdict=Verdict(**{k: r[k] for k in fields if k in r}))
        for r in data["items"]
    )
    return CandidateScore(items=tuple(items))


class RunLog:
    """An open run log. Every line is on disk before ``append`` returns; one process at a time holds a run's log."""

    def __init__(self, path: Path, handle: IO[bytes], lines: list[dict[str, Any]], run_id: str) -> None:
        """Use ``RunLog.open`` instead."""
        self.path = path
        self.run_id = run_id
        self.lines = lines
        self._handle = handle

    @classmethod
    def open(cls, folder: Path, settings: RunSettings) -> Self:
        """Create the log of a new run, or open that of the same run to go on with it; a torn last line is cut off.

        Raises:
            RunError: when the folder holds another run, files of a run without its log, or a damaged log, or another process uses it.
        """
        if folder.exists() and not folder.is_dir():
            raise RunError(f"out={str(folder)!r} is a file. Give a folder.")
        path = folder / LOG_NAME
        orphans = [n for n in ("best_spec.yaml", "result.json") if (folder / n).exists()]
        if orphans and not path.exists():
            raise RunError(f"out={str(folder)!r} holds {', '.join(orphans)} but no {LOG_NAME}, so it is another run's. Use another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+b")
        try:
            _lock(handle, path)
            return cls._resume(path, handle, settings)
        except BaseException:
            handle.close()
            raise

    @classmethod
    def _resume(cls, path: Path, handle: IO[bytes], settings: RunSettings) -> Self:
        lines, end = read_lines(path)
        header = {"kind": "header", "format": FORMAT_VERSION, **settings.model_dump(mode="json")}
        header["run_id"] = content_hash(header)
        if handle.seek(0, os.SEEK_END) > end:
            _log.warning("%s: the last line was cut short (a killed run); dropped, its generation is evaluated again", path)
            handle.truncate(end)
        log = cls(path, handle, lines[1:], header["run_id"])
        if not lines:
            log._write(header)
        else:
            _check_same_run(path, lines[0], header)
        return log

    def append(self, kind: LineKind, data: Mapping[str, Any]) -> dict[str, Any]:
        """Write one line, wait until it is on disk, and return it."""
        line = {"kind": kind, **data}
        self._write(line)
        self.lines.append(line)
        return line

    def _write(self, line: Mapping[str, Any]) -> None:
        self._handle.write(canonical_json(line).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def of_kind(self, kind: LineKind) -> list[dict[str, Any]]:
        """Return the logged lines of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]

    def close(self) -> None:
        """Close the file and release the lock."""
        self._handle.close()

    def __enter__(self) -> Self:
        """Return the open log."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the log."""
        self.close()


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a log's full lines and the byte offset where the last of them ends; a torn last line is left out.

    Raises:
        RunError: when a full line is not a JSON object with a ``kind``, or the log does not begin with a header.
    """
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    lines = [_parse(raw, number, path) for number, raw in enumerate(data[:end].splitlines(), start=1)]
    if lines and lines[0]["kind"] != "header":
        raise RunError(f"run log {str(path)!r} does not begin with a header line. It is not a run log, or its start was cut off; use another folder.")
    return lines, end


def _parse(raw: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict) or "kind" not in line:
        raise RunError(
            f"run log {str(path)!r} is damaged: line {number} is not a JSON object with a kind: {raw[:60]!r}. "
            f"Restore the file, delete everything from line {number} on (those generations are evaluated again), or use another folder."
        )
    return line


def _check_same_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found.get("format") != FORMAT_VERSION:
        raise RunError(f"run log {str(path)!r} has format {found.get('format')!r}, this version reads {FORMAT_VERSION}. Use another folder.")
    old, new = _flat(found), _flat(wanted)
    changed = [k for k in sorted(old.keys() | new.keys()) if k != "run_id" and old.get(k) != new.get(k)]
    if changed:
        listed = "; ".join(f"{k}: {_short(old.get(k))} there, {_short(new.get(k))} now" for k in changed)
        raise RunError(
            f"out={str(path.parent)!r} holds another run, with other settings: {listed}. "
            "To go on with that run, start it with its own settings; to start a new one, give another folder or delete this one."
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _lock(handle: IO[bytes], path: Path) -> None:
    # flock goes with the process, even a killed one; Windows has none, and there two runs in one folder go unnoticed
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"out={str(path.parent)!r} is in use by another running process. Wait for it, stop it, or give another folder.") from None
