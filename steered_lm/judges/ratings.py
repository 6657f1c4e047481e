"""People's ratings, read back, unblinded and summed up: what they prefer, how steady they are, and how far judges agree with them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges.agreement import Agreement, Metric, agreement
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.panel import commonest
from steered_lm.judges.sheets import CONFIDENCE, DECLINES, FORMAT, LETTERS, TIE, RaterSheet, SheetKey, Shown, item_name
from steered_lm.stats import Estimate, PairedDifference, holm, mean_interval, paired_difference, share_interval

PEOPLE = "people"
"""The name of the raters' joint answer beside judges: the commonest choice, or the median rating."""


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


class RaterSummary(Config):
    """One rater.

    Attributes:
        rater: the name.
        shown: items on the sheet, repeats included.
        missing: items without an answer.
        declined: items marked as a response that declines to answer.
        places: pairwise: how often each letter was chosen among answers that are no tie.
        consistency: the share of repeats that were answered as before.
    """

    rater: str
    shown: int
    missing: int
    declined: int
    places: dict[str, Estimate]
    consistency: Estimate


class ArmComparison(Config):
    """Two arms on the same prompts.

    Attributes:
        a: the first arm.
        b: the second arm.
        difference: of their win shares or mean ratings, ``a - b``.
        p_adjusted: its p-value, corrected for the number of comparisons (Holm).
    """

    a: str
    b: str
    difference: PairedDifference
    p_adjusted: float | None


class RatingsReport(Config):
    """What people said, arm by arm.

    Attributes:
        sheet: the set's name.
        kind: what was asked.
        arms: their names.
        prompts: how many were rated.
        codes: pairwise: what stands for a choice in the agreement's scores.
        wins: pairwise: each arm's share of first places; a tie counts as half a win for each of two arms, a third for each of three.
        chance: pairwise: that share for an arm that is like the others.
        means: other kinds: each arm's mean rating.
        comparisons: every pair of arms.
        ties: pairwise: the share of answers that are ties.
        places: pairwise: how often each letter was chosen among answers that are no tie, all raters together; ``chance`` without position bias.
        consistency: the share of repeats that were answered as before, all raters together.
        raters: each rater.
        agreement: among people; None with one rater.
        with_judges: of people's joint answer and each judge; None without judges.
    """

    sheet: str
    kind: str
    arms: tuple[str, ...]
    prompts: int
    codes: dict[str, float]
    wins: dict[str, Estimate]
    chance: float | None
    means: dict[str, Estimate]
    comparisons: tuple[ArmComparison, ...]
    ties: Estimate | None
    places: dict[str, Estimate]
    consistency: Estimate
    raters: tuple[RaterSummary, ...]
    agreement: Agreement | None
    with_judges: Agreement | None


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


def summarise(key: SheetKey, rated: Sequence[Rated], judges: Mapping[str, Sequence[float | None]] | None = None) -> RatingsReport:
    """Return what people said, unblinded; prompts are the units, so intervals rest on each prompt's mean over raters.

    Args:
        key: of the sheets.
        rated: one a rater.
        judges: by name, their values for :func:`item_names`, coded as :func:`judge_values` does.

    Raises:
        JudgeError: when a rater is there twice, or nobody rated anything.
    """
    names = [r.rater for r in rated]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise JudgeError(f"ratings of {twice} are there twice. Give one file a rater, JSON or CSV.")
    if not any(answer.given for r in rated for answer in r.answers.values()):
        raise JudgeError("there is no answer in the ratings. Give files that raters have filled in.")
    sheets = {sheet.rater: sheet for sheet in key.sheets}
    items = item_names(key)
    values = {r.rater: _values(key, sheets[r.rater], r) for r in rated}
    shares = _shares(key, values)
    letters = [letter for r in rated for letter in _letters(sheets[r.rater], r)]
    pairs = list(combinations(key.arms, 2))
    found = [paired_difference(shares[a], shares[b], seed=key.seed) for a, b in pairs]
    corrected = holm([difference.p_value for difference in found])
    compared = key.scale is None
    people_metric: Metric = "nominal" if compared else "ordinal" if key.short else "interval"
    joint: dict[str, Sequence[float | None]] = {PEOPLE: _joint(key, list(values.values()), len(items))}
    return RatingsReport(
        sheet=key.sheet,
        kind=key.asked.kind,
        arms=key.arms,
        prompts=len(key.samples),
        codes={TIE: 0.0, **{arm: float(number) for number, arm in enumerate(key.arms, start=1)}} if compared else {},
        wins={arm: _win_interval(shares[arm]) for arm in key.arms} if compared else {},
        chance=1 / len(key.arms) if compared else None,
        means={} if key.scale is None else {arm: mean_interval(shares[arm], bounds=key.scale) for arm in key.arms},
        comparisons=tuple(
            ArmComparison(a=a, b=b, difference=difference, p_adjusted=p) for (a, b), difference, p in zip(pairs, found, corrected, strict=True)
        ),
        ties=share_interval(letters.count(TIE), len(letters)) if compared else None,
        places=_places(key, letters),
        consistency=_steady([pair for r in rated for pair in _repeated(sheets[r.rater], r)]),
        raters=tuple(_rater(key, sheets[r.rater], r) for r in rated),
        agreement=agreement(values, metric=people_metric, items=items, seed=key.seed) if len(values) > 1 else None,
        with_judges=agreement(joint | dict(judges), metric="nominal" if compared else "interval", items=items, seed=key.seed) if judges else None,
    )


def item_names(key: SheetKey) -> list[str]:
    """Return the names of what is rated: samples where arms are compared, else each arm's response."""
    return [s.id for s in key.samples] if key.scale is None else [item_name(s, arm) for s in key.samples for arm in key.arms]


def _values(key: SheetKey, sheet: RaterSheet, rated: Rated) -> list[float | None]:
    """Return one rater's values in the order of ``item_names``, without repeats: ratings, or the winner's number from 1, 0 for a tie."""
    found: dict[str, float | None] = {}
    for shown in (s for s in sheet.items if not s.repeat):
        answer = rated.answers.get(shown.item, Answer())
        sample = key.samples[shown.sample]
        if key.scale is None:
            winner = _winner(shown, answer)
            found[sample.id] = None if winner is None else 0.0 if winner == TIE else float(key.arms.index(winner) + 1)
        else:
            found[item_name(sample, shown.arms[0])] = answer.rating
    return [found.get(name) for name in item_names(key)]


def _winner(shown: Shown, answer: Answer) -> str | None:
    """Return the arm behind a letter, ``tie``, or None without an answer."""
    if answer.choice is None or answer.choice == TIE:
        return answer.choice
    return shown.arms[LETTERS.index(answer.choice)]


def _shares(key: SheetKey, values: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """Return by arm one number a prompt, the mean over the raters who answered: its rating, or its share of first places."""
    by_item = [[row[i] for row in values.values() if row[i] is not None] for i in range(len(item_names(key)))]
    if key.scale is not None:
        means = [fmean([v for v in row if v is not None]) if row else None for row in by_item]
        return {arm: means[number :: len(key.arms)] for number, arm in enumerate(key.arms)}
    tie = 1 / len(key.arms)
    return {
        arm: [fmean([tie if v == 0 else float(v == number) for v in row]) if row else None for row in by_item]
        for number, arm in enumerate(key.arms, start=1)
    }


def _win_interval(shares: Sequence[float | None]) -> Estimate:
    """Return the mean with Student's t interval; where an arm won everywhere or nowhere, that has no spread, and Wilson's interval is given."""
    known = [share for share in shares if share is not None]
    found = mean_interval(shares, bounds=(0.0, 1.0))
    if known and set(known) in ({0.0}, {1.0}):
        return share_interval(int(sum(known)), len(known)).model_copy(update={"missing": found.missing})
    return found


def _letters(sheet: RaterSheet, rated: Rated) -> list[str]:
    """Return every choice as it was made, repeats included; a rater's order is random, so each is its own trial of the place."""
    return [answer.choice for shown in sheet.items if (answer := rated.answers.get(shown.item)) is not None and answer.choice is not None]


def _places(key: SheetKey, letters: Sequence[str]) -> dict[str, Estimate]:
    decided = [letter for letter in letters if letter != TIE]
    return {letter: share_interval(decided.count(letter), len(decided)) for letter in key.letters}


def _repeated(sheet: RaterSheet, rated: Rated) -> list[bool]:
    """Return for each repeat with both answers whether they are the same, whichever letters they had."""
    first = {(s.sample, frozenset(s.arms)): s for s in sheet.items if not s.repeat}
    found = []
    for again in (s for s in sheet.items if s.repeat):
        before = first[again.sample, frozenset(again.arms)]
        old, new = (rated.answers.get(shown.item, Answer()) for shown in (before, again))
        if old.given and new.given:
            found.append((_winner(before, old), old.rating) == (_winner(again, new), new.rating))
    return found


def _steady(same: Sequence[bool]) -> Estimate:
    return share_interval(sum(same), len(same))


def _rater(key: SheetKey, sheet: RaterSheet, rated: Rated) -> RaterSummary:
    answers = [rated.answers.get(shown.item, Answer()) for shown in sheet.items]
    return RaterSummary(
        rater=rated.rater,
        shown=len(answers),
        missing=sum(not answer.given and not answer.declines for answer in answers),
        declined=sum(answer.declines for answer in answers),
        places=_places(key, _letters(sheet, rated)),
        consistency=_steady(_repeated(sheet, rated)),
    )


def _joint(key: SheetKey, rows: Sequence[Sequence[float | None]], items: int) -> list[float | None]:
    """Return people's joint answer an item: the median rating, or the commonest choice, a tie where several are."""
    found: list[float | None] = []
    for i in range(items):
        known = [value for row in rows if (value := row[i]) is not None]
        if not known:
            found.append(None)
        elif key.scale is None:
            choice = commonest(known)
            found.append(0.0 if choice is None else choice)
        else:
            found.append(median(known))
    return found


def judge_values(key: SheetKey, verdicts: Mapping[JudgeRequest, Verdict]) -> list[float | None]:
    """Return a judge's values in the order of :func:`item_names`, coded like people's, None where it has no verdict.

    Where arms are compared, a verdict on the pair counts, in either order; without one, the arm with the highest score of its own wins, and equal
    highest scores are a tie.

    Args:
        key: of the sheets.
        verdicts: by what was judged; texts are compared without space around them, and references do not matter.
    """
    by_text = {_texts(request.prompt, request.response, request.other): verdict for request, verdict in verdicts.items()}
    found: list[float | None] = []
    for sample in key.samples:
        single = [by_text.get(_texts(sample.prompt, sample.responses[arm], None)) for arm in key.arms]
        scores = [None if verdict is None else verdict.score for verdict in single]
        if key.scale is not None:
            found += scores
            continue
        paired = _of_pair(key, sample.prompt, [sample.responses[arm] for arm in key.arms], by_text)
        known = [score for score in scores if score is not None]
        if paired is not None:
            found.append(paired)
        elif len(known) < len(key.arms):
            found.append(None)
        else:
            best = [number for number, score in enumerate(known, start=1) if score == max(known)]
            found.append(float(best[0]) if len(best) == 1 else 0.0)
    return found


def _texts(prompt: str, response: str, other: str | None) -> tuple[str, str, str | None]:
    return prompt.strip(), response.strip(), None if other is None else other.strip()


def _of_pair(key: SheetKey, prompt: str, responses: Sequence[str], by_text: Mapping[tuple[str, str, str | None], Verdict]) -> float | None:
    """Return the code of a verdict on both responses, in either order: 1 and 2 for the arms, 0 for a tie."""
    if len(key.arms) != 2:
        return None
    for code, (one, two) in (({"A": 1.0, "B": 2.0}, responses), ({"A": 2.0, "B": 1.0}, responses[::-1])):
        verdict = by_text.get(_texts(prompt, one, two))
        if verdict is not None and verdict.choice is not None:
            return code.get(verdict.choice, 0.0)
    return None
