"""Saved samples, read back to be judged again: lm-eval's ``samples_*.jsonl`` and plain JSONL of prompts and responses."""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from steered_lm.config import Config, json_objects
from steered_lm.errors import JudgeError
from steered_lm.judges.base import JudgeRequest, Verdict

SampleFormat = Literal["lm_eval", "inspect", "plain"]
RENDERED = "arguments"
"""As ``prompt_field``: the whole text that lm-eval gave the model."""

_PROMPT_FIELDS = ("prompt", "question")
_REFERENCES, _FALSE_REFERENCES = "correct_answers", "incorrect_answers"  # as TruthfulQA's documents name them
_HEAD = 4_096
_WHAT = "Allowed: lm-eval's samples_*.jsonl, an Inspect log, or JSONL with prompt and response in each line."


class SavedSample(Config):
    """A response from a log.

    Attributes:
        file: the log.
        id: the sample's id in it.
        repeat: which of several responses to the same prompt, from 0.
        request: what is to be judged.
        old: the verdict that the log holds.
        old_scores: other numbers that the log gives the sample, by metric.
        turns: (role, text) of everything before the response, where the log says more than the request's prompt.
        trait: the verdict on a trait, where the log is of a trait's task.
    """

    file: str
    id: str
    repeat: int = 0
    request: JudgeRequest
    old: Verdict | None = None
    old_scores: dict[str, float] = Field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()
    trait: Verdict | None = None


class _Line(NamedTuple):
    """A line of a JSONL file, its number, and the words that name it in messages."""

    number: int
    where: str
    data: dict[str, Any]


def sample_format(path: Path) -> SampleFormat:
    """Return what kind of file it is, by its content.

    Raises:
        JudgeError: when it is missing, or none of the kinds.
    """
    if not path.is_file():
        raise JudgeError(f"{str(path)!r} does not exist. {_WHAT}")
    if is_log(path):
        return "inspect"
    if zipfile.is_zipfile(path):
        raise JudgeError(f"{str(path)!r} is an archive, but no Inspect log. {_WHAT}")
    first = next(_lines(path), None)
    if first is None:
        raise JudgeError(f"{str(path)!r} is empty. {_WHAT}")
    if {"doc", "resps"} <= first.data.keys():
        return "lm_eval"
    if {"prompt", "response"} <= first.data.keys():
        return "plain"
    raise JudgeError(f"{first.where} has neither doc and resps nor prompt and response; it has {', '.join(sorted(first.data)) or 'nothing'}. {_WHAT}")


def is_log(path: Path) -> bool:
    """Return whether a file is a log of Inspect's, by its content; False when there is no file."""
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name in archive.namelist() for name in ("header.json", "_journal/start.json"))
    with path.open("rb") as handle:
        compact = "".join(handle.read(_HEAD).decode("utf-8", errors="replace").split())
    return compact.startswith("{") and '"status":' in compact and '"eval":{' in compact


def sample_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files that are meant; a folder stands for the ``samples_*.jsonl`` and ``*.eval`` in it, at any depth.

    Raises:
        JudgeError: when a path does not exist, a folder has none, or one file is meant twice.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted([*path.rglob("samples_*.jsonl"), *path.rglob("*.eval")]) if path.is_dir() else [path]
        if not inside:
            raise JudgeError(f"{str(path)!r} holds no samples_*.jsonl and no *.eval. Run lm_eval with --log_samples, or name the files.")
        found += inside
    for path in found:
        if sum(path.resolve() == other.resolve() for other in found) > 1:
            raise JudgeError(f"{str(path)!r} is named twice. Name each file once.")
    return found


def read_samples(path: Path, *, prompt_field: str | None = None) -> list[SavedSample]:
    """Return the samples of an lm-eval file or of plain JSONL, in order.

    Args:
        path: the file.
        prompt_field: lm-eval: the document's field that holds the prompt, or ``arguments`` for the whole text that the model was given; by default
            ``prompt``, ``question``, or else that text. Plain JSONL: the field in place of ``prompt``.

    Raises:
        JudgeError: when the file cannot be read as such, naming the line; or when nothing was generated in it.
    """
    kind = sample_format(path)
    if kind == "inspect":
        raise JudgeError(f"{str(path)!r} is a log of Inspect's. Read it with steered_lm.inspect_plugin.logs.read_log.")
    lines = list(_lines(path))
    return _lm_eval(path, lines, prompt_field) if kind == "lm_eval" else _plain(path, lines, prompt_field)


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the objects of a JSONL file."""
    try:
        with path.open(encoding="utf-8") as handle:
            for number, where, data in json_objects(handle, repr(str(path)), error=JudgeError, advice=_WHAT):
                yield _Line(number, where, data)
    except UnicodeDecodeError as problem:
        raise JudgeError(f"{str(path)!r} is no text in UTF-8. {_WHAT}") from problem


def _lm_eval(path: Path, lines: Sequence[_Line], prompt_field: str | None) -> list[SavedSample]:
    """Return the samples of a task that generates; a document is logged once for each filter, and its responses are the same each time."""
    by_document: dict[str, list[_Line]] = {}
    for line in lines:
        by_document.setdefault(str(_needed(line, "doc_id")), []).append(line)
    written = {name: _responses(same[0]) for name, same in by_document.items()}
    # data-parallel runs answer the last document again and again to keep their ranks in step
    repeats = min(len(responses) for responses in written.values())
    samples = []
    for name, same in by_document.items():
        doc, prompt = same[0].data["doc"], _lm_eval_prompt(same[0], prompt_field)
        # a document's metrics are about all of its responses together
        old = _own_verdict(same[0].data) if repeats == 1 else None
        scores = _metrics(same) if repeats == 1 and old is None else {}
        told = {"file": str(path), "id": name, "old": old, "old_scores": scores, "turns": _system_and_prompt(doc, prompt)}
        traits = _trait_verdicts(same[0].data)
        for repeat, response in enumerate(written[name][:repeats]):
            request = JudgeRequest(prompt=prompt, response=response.strip(), **document_references(doc))
            samples.append(SavedSample(request=request, repeat=repeat, trait=traits[repeat] if repeat < len(traits) else None, **told))
    return samples


def _system_and_prompt(doc: Mapping[str, Any], prompt: str) -> tuple[tuple[str, str], ...]:
    """Return the turns of a trait's task, whose documents hold the system turn."""
    system = doc.get("system")
    return (("system", system), ("user", prompt)) if isinstance(system, str) and system else ()


def _responses(line: _Line) -> list[str]:
    """Return the texts that a model wrote for a document."""
    found = _needed(line, "resps")
    options = [argument[1] for argument in _arguments(line.data) if len(argument) > 1]
    texts = found[0] if isinstance(found, list) and found and isinstance(found[0], list) else None
    if texts is None or not texts or not all(isinstance(text, str) for text in texts) or not all(isinstance(option, dict) for option in options):
        raise JudgeError(f"{line.where} holds log-likelihoods and no text: only samples of tasks that generate can be judged. Leave this file out.")
    if len(found) > 1 or not options:
        raise JudgeError(f"{line.where} has {len(found)} requests for one document, and not one that generates. Leave this file out.")
    return texts


def _arguments(data: Mapping[str, Any]) -> list[list[Any]]:
    """Return the arguments of each request: named ``gen_args_0`` … in files, and lists in what ``evaluate`` returns."""
    found = data.get("arguments")
    requests = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else []
    return [list(request.values()) if isinstance(request, dict) else list(request) for request in requests]


def _lm_eval_prompt(line: _Line, field: str | None) -> str:
    doc = line.data["doc"]
    if not isinstance(doc, dict):
        raise JudgeError(f"{line.where} has a doc that is no object. {_WHAT}")
    if field not in (None, RENDERED):
        return _text(line, doc, str(field))
    names = [name for name in _PROMPT_FIELDS if field is None and isinstance(doc.get(name), str)]
    return str(doc[names[0]]) if names else str(_arguments(line.data)[0][0])


def _metrics(lines: Sequence[_Line]) -> dict[str, float]:
    """Return a document's numbers by metric; by metric and filter, as lm-eval's results name them, where there are several filters."""
    found = {}
    for line in lines:
        for name in line.data.get("metrics", []):
            value = line.data.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[name if len(lines) == 1 else f"{name},{line.data.get('filter')}"] = float(value)
    return found


def _own_verdict(data: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict that ``persona_judge`` logs in place of a filtered response; None when this is another task's."""
    found = _filtered(data)
    if not isinstance(found, dict) or not {"score", "missing", "judge"} <= found.keys():
        return None
    return verdict_of(found)


def _trait_verdicts(data: Mapping[str, Any]) -> list[Verdict | None]:
    """Return the verdicts that a trait's task logs in place of a filtered response, one a repeat; empty when this is another task's."""
    found = _filtered(data)
    records = found if isinstance(found, list) else []
    return [trait_verdict(record) if isinstance(record, dict) else None for record in records]


def trait_verdict(record: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict on the trait out of what a trait's task logs of a response; None when it holds none."""
    found = record.get("trait")
    return verdict_of(found) if isinstance(found, dict) and {"score", "missing", "judge"} <= found.keys() else None


def _filtered(data: Mapping[str, Any]) -> object:
    """Return what a task of ours logs as JSON in place of a filtered response; None when there is no such thing."""
    filtered = data.get("filtered_resps")
    if not isinstance(filtered, list) or len(filtered) != 1 or not isinstance(filtered[0], str):
        return None
    try:
        return json.loads(filtered[0])
    except ValueError:
        return None


def verdict_of(record: Mapping[str, Any]) -> Verdict | None:
    """Return a logged verdict, without what a log adds to it; None when it is none."""
    try:
        return Verdict.model_validate({name: value for name, value in record.items() if name in Verdict.model_fields})
    except ValidationError:
        return None


def document_references(doc: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return ``references`` and ``false_references`` of a document that has TruthfulQA's fields; empty ones otherwise."""
    return {"references": _texts(doc.get(_REFERENCES)), "false_references": _texts(doc.get(_FALSE_REFERENCES))}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str) and text) if isinstance(value, (list, tuple)) else ()


def _plain(path: Path, lines: Sequence[_Line], prompt_field: str | None) -> list[SavedSample]:
    """Return lines of prompts and responses; what ``steered-lm judge rejudge`` writes for one judge is such a file, too."""
    samples: dict[tuple[str, int], SavedSample] = {}
    for line in lines:
        data = line.data
        request = {"prompt": _text(line, data, prompt_field or "prompt"), "response": _text(line, data, "response")}
        request |= {name: data[name] for name in ("other", "references", "false_references") if data.get(name) is not None}
        parsed = JudgeRequest.parse(request, source=line.where.rstrip(","), error=JudgeError)
        old = data.get("verdict")
        facts = {"id": str(data.get("id", line.number)), "repeat": data.get("repeat", 0), "old": verdict_of(old) if isinstance(old, dict) else None}
        sample = SavedSample.parse({"file": str(path), "request": parsed, **facts}, source=line.where.rstrip(","), error=JudgeError)
        if (sample.id, sample.repeat) in samples:
            raise JudgeError(f"{line.where} has id {sample.id!r} a second time. Give each line its own, or tell repeats apart by repeat: 0, 1, ….")
        samples[sample.id, sample.repeat] = sample
    return list(samples.values())


def _needed(line: _Line, field: str) -> Any:
    if field not in line.data:
        raise JudgeError(f"{line.where} has no {field!r}. {_WHAT}")
    return line.data[field]


def _text(line: _Line, data: Mapping[str, Any], field: str) -> str:
    value = data.get(field)
    if not isinstance(value, str):
        texts = ", ".join(sorted(name for name, text in data.items() if isinstance(text, str))) or "none"
        raise JudgeError(f"{line.where} has no text {field!r} (--prompt-field names the prompt). Its texts: {texts}.")
    return value
