"""What raters saved, read back: the page's JSON or the filled-in table; what does not belong to the sheet is refused."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges.sheets import CONFIDENCE, DECLINES, FORMAT, TIE, SheetKey


class Answer(Config):
    """What a rater said of one item; everything may be left out.

    Attributes:
        choice: a letter, or ``tie``.
        rating: on the key's scale.
        declines: whether the response declines to answer.
        confidence: 1 to 3.
        comment: in the rater's words.
    """

    choice: str | None = None
    rating: float | None = None
    declines: bool = False
    confidence: int | None = Field(default=None, ge=1, le=len(CONFIDENCE))
    comment: str = ""

    @property
    def given(self) -> bool:
        """Whether there is a choice or a rating."""
        return self.choice is not None or self.rating is not None


class Rated(NamedTuple):
    """One rater's answers by item."""

    rater: str
    answers: dict[str, Answer]


def read_ratings(path: Path, key: SheetKey) -> Rated:
    """Read what a rater saved: the page's JSON, or the filled-in CSV.

    Raises:
        JudgeError: when it belongs to other sheets, names an unknown item or one twice, or an answer is out of range; the message names it.
    """
    if not path.is_file():
        raise JudgeError(f"ratings {str(path)!r} does not exist. Give the files that raters saved, JSON or CSV.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise JudgeError(f"ratings {str(path)!r} is no text in UTF-8. A spreadsheet saves one as CSV UTF-8.") from problem
    sheet, rater, rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    if sheet != key.sheet:
        raise JudgeError(f"ratings {str(path)!r} belong to sheet {sheet!r}, and the key is of {key.sheet!r}. Give the key that was written with it.")
    own = {s.rater: {shown.item for shown in s.items} for s in key.sheets}
    if rater not in own:
        raise JudgeError(f"ratings {str(path)!r}: the key has no rater {rater!r}. {near_misses(str(rater), own)}")
    answers: dict[str, Answer] = {}
    for row in rows:
        item = str(row.pop("item", ""))
        where = f"ratings {str(path)!r}, item {item!r}"
        if item not in own[rater]:
            other = next((name for name, items in own.items() if item in items), None)
            raise JudgeError(f"{where} is {f'on the sheet of {other}' if other else 'on no sheet of this key'}, and not on that of {rater}.")
        if item in answers:
            raise JudgeError(f"{where} is there twice. Keep one of its rows.")
        answers[item] = _checked(Answer.parse(row, source=where, error=JudgeError), where, key)
    return Rated(rater, answers)


def _checked(answer: Answer, where: str, key: SheetKey) -> Answer:
    if key.scale is None:
        allowed = (*key.letters, TIE)
        if answer.choice is not None and answer.choice not in allowed:
            raise JudgeError(f"{where}: choice {answer.choice!r}. Allowed: {', '.join(allowed)}, or nothing.")
        if answer.rating is not None or answer.declines:
            raise JudgeError(f"{where} has a rating, and the sheet asks for a choice: {', '.join(allowed)}.")
        return answer
    low, high = key.scale
    if answer.rating is not None and not (low <= answer.rating <= high and answer.rating.is_integer()):
        raise JudgeError(f"{where}: rating {answer.rating:g}. Allowed: a whole number from {low} to {high}, or nothing.")
    if answer.declines and (answer.rating is not None or not key.refusal):
        raise JudgeError(f"{where} is marked as {DECLINES}" + (" and rated, too. Keep one." if key.refusal else ", which this sheet does not offer."))
    if answer.choice is not None:
        raise JudgeError(f"{where} has a choice, and the sheet asks for a rating from {low} to {high}.")
    return answer


def _json_rows(path: Path, text: str) -> tuple[object, object, list[dict[str, Any]]]:
    try:
        data = json.loads(text)
    except ValueError as problem:
        raise JudgeError(f"ratings {str(path)!r} is not JSON: {problem}.") from problem
    rows = data.get("ratings")
    if data.get("format") != FORMAT or data.get("version") != 1 or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise JudgeError(f"ratings {str(path)!r} is not what a rating page saves (format {FORMAT!r}, version 1).")
    return data.get("sheet"), data.get("rater"), [dict(row) for row in rows]


def _csv_rows(path: Path, text: str) -> tuple[object, object, list[dict[str, Any]]]:
    """Return the rows of a table; spreadsheets of some countries put semicolons between cells, and some write ``3.0`` for 3."""
    header = text.partition("\n")[0]
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if header.count(";") > header.count(",") else ","))
    if not rows or not {"sheet", "rater", "item"} <= rows[0].keys() or not {"choice", "rating"} & rows[0].keys():
        raise JudgeError(f"ratings {str(path)!r} lacks rows, or a column of sheet, rater, item and choice or rating. Fill in the CSV as given.")
    for column in ("sheet", "rater"):
        if len({row[column] for row in rows}) > 1:
            raise JudgeError(f"ratings {str(path)!r} has several values in column {column}. Give one file a rater, as it was written.")
    return rows[0]["sheet"], rows[0]["rater"], [_csv_answer(row) for row in rows]


def _csv_answer(row: Mapping[str, str | None]) -> dict[str, Any]:
    cells = {name: (row.get(name) or "").strip() for name in ("item", "choice", "rating", "confidence", "comment")}
    found: dict[str, Any] = {"item": cells["item"], "comment": cells["comment"]}
    if cells["choice"]:
        found["choice"] = TIE if cells["choice"].lower() == TIE else cells["choice"].upper()
    if cells["rating"].lower() == DECLINES:
        found["declines"] = True
    elif cells["rating"]:
        found["rating"] = cells["rating"]
    if cells["confidence"]:
        found["confidence"] = cells["confidence"]
    return found
