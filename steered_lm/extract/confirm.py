"""Responses that a judge confirms: extraction as Persona Vectors does it (Chen et al. 2025, arXiv:2507.21509, section 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from steered_lm.errors import JudgeError
from steered_lm.extract.contrast import ContrastSet
from steered_lm.judges import check_missing
from steered_lm.judges.base import FINDINGS, Judge, JudgeRequest, Verdict
from steered_lm.judges.question import Question, trait_descriptions
from steered_lm.judges.trait_run import TraitJudges
from steered_lm.steering.vectors import SideCounts

JudgeOf = Callable[[Question], Judge]
"""Makes a judge of a question, such as ``lambda question: make_judge("openai:my-judge", question)``."""

LIMIT = 50.0
"""The trait score from which on a response shows the trait, and the coherence from which on it makes sense, both of 0 to 100."""


def judges_of(contrast: ContrastSet, judge_of: JudgeOf) -> TraitJudges:
    """Return the judges of a contrast set's trait.

    Raises:
        JudgeError: when the trait has no description, neither of ours nor in its contrast set; when the judge cannot judge coherence.
    """
    known = trait_descriptions().get(contrast.trait)
    expression = judge_of(Question.of_trait(contrast.trait, known or contrast.description))
    try:
        return TraitJudges(expression, judge_of(Question.of_kind("coherence")))
    except JudgeError as problem:
        raise JudgeError(f"a response is confirmed by its coherence, too, and {expression.name} cannot judge that: {problem}") from problem


class Kept(NamedTuple):
    """Which responses of each side are kept, by their number, and what became of the others."""

    positive: list[int]
    negative: list[int]
    counts: dict[str, SideCounts]


def confirm(judges: TraitJudges, questions: Sequence[str], positive: Sequence[str], negative: Sequence[str], *, missing_limit: float = 0.2) -> Kept:
    """Return the responses that show what they should, each side filtered on its own.

    Kept are positive responses with a trait score of at least 50 and negative ones below 50, both with a coherence of at least 50.

    Args:
        judges: give the scores.
        questions: what is answered, one a response of either side.
        positive: responses under instructions that ask for the trait.
        negative: responses under their opposites.
        missing_limit: share of failed judgements above which nothing is trusted; empty responses, refusals and responses without a marker do
            not count as failed.

    Raises:
        JudgeError: when more judgements failed, or coherence is not judged.
    """
    requests = [JudgeRequest(prompt=q, response=r) for side in (positive, negative) for q, r in zip(questions, side, strict=True)]
    asked = [number for number, request in enumerate(requests) if request.response.strip()]
    found: list[tuple[Verdict, Verdict] | None] = [None] * len(requests)
    both = [judge.judge([requests[number] for number in asked]) for judge in judges.both()]
    for verdicts in both:
        check_missing(verdicts, missing_limit, findings=FINDINGS)
    for number, pair in zip(asked, zip(*both, strict=True), strict=True):
        found[number] = (pair[0], pair[1])
    size = len(questions)
    first, counts = _side(found[:size], shows=True)
    second, others = _side(found[size:], shows=False)
    return Kept(first, second, {"pos": counts, "neg": others})


def _side(found: Sequence[tuple[Verdict, Verdict] | None], *, shows: bool) -> tuple[list[int], SideCounts]:
    kept: list[int] = []
    missing = incoherent = off = 0
    for number, pair in enumerate(found):
        trait, coherence = (None, None) if pair is None else (pair[0].score, pair[1].score)
        if trait is None or coherence is None:
            missing += 1
        elif coherence < LIMIT:
            incoherent += 1
        elif (trait >= LIMIT) is not shows:
            off += 1
        else:
            kept.append(number)
    return kept, SideCounts(generated=len(found), kept=len(kept), off_trait=off, incoherent=incoherent, missing=missing)


def matched(positive: Sequence[int], negative: Sequence[int]) -> list[tuple[int, int]]:
    """Return disjoint pairs of places in both lists, as many as the shorter one has: what answers the same pair first, then the rest in order."""
    place = {number: k for k, number in enumerate(negative)}
    same = [(k, place[number]) for k, number in enumerate(positive) if number in place]
    left = [k for k, number in enumerate(positive) if number not in place]
    right = [place[number] for number in negative if number not in set(positive)]
    return same + list(zip(left, right, strict=False))
