"""People's ratings, unblinded and summed up: what they prefer, how steady they are, and how far judges agree with them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, median

from steered_lm.config import Config
from steered_lm.errors import JudgeError
from steered_lm.judges.agreement import Agreement, Metric, agreement
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.panel import commonest
from steered_lm.judges.ratings import Answer, Rated
from steered_lm.judges.sheets import LETTERS, TIE, RaterSheet, SheetKey, Shown, item_name
from steered_lm.stats import Estimate, PairedDifference, holm, mean_interval, paired_difference, share_interval

PEOPLE = "people"
"""The name of the raters' joint answer beside judges: the commonest choice, or the median rating."""


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
