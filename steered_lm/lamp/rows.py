"""LaMP's files: questions with profiles, and their right answers, joined by id and checked."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steered_lm.errors import UserError
from steered_lm.lamp.task import LampTask

AVOCADO = (
    "LaMP_6 is made from the Avocado Research Email Collection, which needs a licence (Linguistic Data Consortium, LDC2015T03) and is not "
    "downloaded. With a licence, make LaMP_6/<split>_questions.json and LaMP_6/<split>_outputs.json with LaMP's own script."
)

DATA_FOLDER = "STEERED_LM_DATA"
"""The environment variable that names the folder of data sets, for when no option does."""

# Where files lie: in one folder a task, as the official host has them (a folder a split), or straight in the folder.
_PLACES = ("{task}", "{task}/{split}", "{task}/new/{split}", "lamp/{task}", "lamp/{task}/{split}", "lamp/{task}/new/{split}", ".")


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: what joins it to its answer.
        input: the question with its instruction.
        profile: what its author wrote before, in the order of the file; each has an ``id`` and the task's fields, some a ``date``.
        output: the right answer.
    """

    id: str
    input: str
    profile: tuple[dict[str, Any], ...]
    output: str


def read_rows(task: LampTask, data: str | Path | None = None, split: str = "dev") -> list[Row]:
    """Return the rows of a split, in the order of the file of questions.

    Args:
        task: which of the seven.
        data: the folder that holds ``<task>/<split>_questions.json``; by default that of the environment variable ``STEERED_LM_DATA``.
        split: ``train``, ``dev``, ….

    Raises:
        UserError: when the folder or a file is missing, or their content is not what the format says.
    """
    questions = _find(task, _folder(data), split)
    outputs = questions.with_name(f"{split}_outputs.json")
    if not outputs.is_file():
        withheld = " LaMP publishes none for the split test; use dev." if split == "test" else " Both files belong together."
        raise UserError(f"{questions} has no right answers beside it: {outputs.name} does not exist.{withheld}")
    golds = _golds(task, outputs)
    asked = _questions(task, questions)
    _same_ids(questions, [row.id for row in asked], outputs, list(golds))
    return [Row(row.id, row.input, row.profile, golds[row.id]) for row in asked]


def _folder(data: str | Path | None) -> Path:
    given = str(data) if data is not None else os.environ.get(DATA_FOLDER)
    if not given:
        raise UserError(
            f"data is not given, and {DATA_FOLDER} is not set. Name the folder that holds LaMP_1, LaMP_2, …; steered-lm lamp download fills one."
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UserError(f"data={given!r} is not a folder. Name the folder that holds LaMP_1, LaMP_2, ….")
    return folder


def _find(task: LampTask, folder: Path, split: str) -> Path:
    places = {place.format(task=task.name, split=split): folder / place.format(task=task.name, split=split) for place in _PLACES}
    for path in places.values():
        if (path / f"{split}_questions.json").is_file():
            return path / f"{split}_questions.json"
    nested = [path for place in (task.name, f"lamp/{task.name}") for path in (folder / place).rglob("*_questions.json")]
    others = sorted({path.name.removesuffix("_questions.json") for path in (*nested, *folder.glob("*_questions.json"))})
    if others:
        raise UserError(f"{task.name} has no split={split!r} in {str(folder)!r}. There are: {', '.join(others)}.")
    looked = ", ".join(str(Path(name) / f"{split}_questions.json") for name in places)
    advice = f"Name another folder. {AVOCADO}" if task.name == "LaMP_6" else "Name another folder, or see steered-lm lamp download."
    raise UserError(f"data={str(folder)!r} does not hold {task.name}. Looked there for {looked}. {advice}")


def _questions(task: LampTask, path: Path) -> list[Row]:
    found = _read(path)
    if not isinstance(found, list):
        raise UserError(f"{path} holds a {type(found).__name__}, not a list of questions.")
    rows = [_question(task, path, number, row) for number, row in enumerate(found)]
    if not rows:
        raise UserError(f"{path} is an empty list.")
    return rows


def _question(task: LampTask, path: Path, number: int, row: Any) -> Row:
    where = f"{path} row {number}"
    if not isinstance(row, dict) or "id" not in row or not str(row.get("input") or "").strip():
        raise UserError(f"{where} lacks id or input (got {row!r:.80}). A row is {{id, input, profile}}.")
    where = f"{where} (id {row['id']})"
    profile = row.get("profile")
    if not isinstance(profile, list) or not profile:
        raise UserError(f"{where} has no profile, so there is nothing to retrieve. Leave the row out, with its output.")
    for item in profile:
        lacking = [field for field in ("id", *task.fields) if not isinstance(item, dict) or item.get(field) is None]
        if lacking:
            raise UserError(f"{where}: an item of its profile lacks {', '.join(lacking)}; {task.name} needs id, {', '.join(task.fields)}.")
    return Row(str(row["id"]), str(row["input"]), tuple(profile), "")


def _golds(task: LampTask, path: Path) -> dict[str, str]:
    found = _read(path)
    golds = found.get("golds") if isinstance(found, dict) else None
    if not isinstance(golds, list) or not all(isinstance(gold, dict) and {"id", "output"} <= set(gold) for gold in golds):
        raise UserError(f'{path} is not {{"task": …, "golds": [{{"id": …, "output": …}}, …]}}.')
    if found.get("task") != task.name:
        raise UserError(f"{path} is of task {found.get('task')!r}, and {task.name} was asked for.")
    for gold in golds:
        if task.labels and task.label(str(gold["output"])) < 0:
            hint = " LaMP_2's older files are about news; the official host keeps those about movies in LaMP_2/new." if task.name == "LaMP_2" else ""
            raise UserError(f"{path}: id {gold['id']} has the output {gold['output']!r}, which is none of {', '.join(task.labels)}.{hint}")
    _refuse_repeats(path, [str(gold["id"]) for gold in golds])
    return {str(gold["id"]): str(gold["output"]) for gold in golds}


def _same_ids(questions: Path, asked: Sequence[str], outputs: Path, answered: Sequence[str]) -> None:
    _refuse_repeats(questions, asked)
    for path, others, here, there in ((questions, outputs, asked, answered), (outputs, questions, answered, asked)):
        alone = sorted(set(here) - set(there))
        if alone:
            raise UserError(
                f"{len(alone)} ids of {path} are not in {others.name}, such as {', '.join(alone[:3])}. The two files must be of one split."
            )


def _refuse_repeats(path: Path, ids: Sequence[str]) -> None:
    repeated = next(_repeats(ids), None)
    if repeated is not None:
        raise UserError(f"{path} has the id {repeated} twice, so it cannot be joined.")


def _repeats(ids: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            yield one
        seen.add(one)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not JSON: {problem}. Download it again.") from problem
