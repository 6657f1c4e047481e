"""What a language model answered, read as a score or as missing; nothing is ever guessed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steered_lm.judges.base import JUDGE_REFUSED, REFUSAL, Choice, Mode, Usage, Verdict
from steered_lm.judges.rubric import TIE, Rubric

LEAST_MASS = 0.25
"""Below this probability on score tokens the model was about to say something else: missing (as in Persona Vectors, Chen et al. 2025)."""
TOP = 20
"""How many of the likeliest tokens endpoints give."""
SPLIT = "scores are several tokens to this model, so that the first one alone says nothing"
"""Why an answer cannot be read from its first token: a model that writes 87 as 8 and 7. Another mode can be asked for."""

UNPARSABLE = "unparsable answer"
"""Why an answer that is not the one JSON object asked for is missing."""

_SCORE_OF = {"A": 1.0, "B": -1.0, TIE: 0.0}
_CHOICE_OF: Mapping[float, Choice] = {1.0: "A", -1.0: "B", 0.0: "tie"}
_SHOWN = 500  # characters of a text from outside that are kept
_ROUNDING = 0.02  # by how much probabilities from an endpoint may add up to more than one
_LETTERS_ENOUGH = 2  # of the word for a refusal, to tell its first token from a letter that answers a pairwise question


class Answer(NamedTuple):
    """One answer of a model.

    Attributes:
        text: what it wrote.
        top: its first token's likeliest alternatives with natural-log probabilities, None where the endpoint gave null; None when it gave none.
        refused: whether the model or its provider declined to answer.
        cut: why it ended early (``length``, ``content_filter``), or None.
        usage: what it took.
    """

    text: str
    top: Sequence[tuple[str, float | None]] | None = None
    refused: bool = False
    cut: str | None = None
    usage: Usage | None = None


class Reading(NamedTuple):
    """A score, or why there is none.

    Attributes:
        score: on the rubric's scale.
        missing: why there is none.
        text: what explains it: the judge's reason, or its answer.
        mass: ``logprobs``: the probability on score tokens.
        choice: pairwise: which response is preferred.
        confidence: pairwise: how sure the judge is, 0 to 1.
    """

    score: float | None
    missing: str | None = None
    text: str = ""
    mass: float | None = None
    choice: Choice | None = None
    confidence: float | None = None

    def verdict(self, rubric: Rubric, judge: str, mode: Mode, usage: Usage | None = None) -> Verdict:
        """Return it as the verdict of a judge."""
        return Verdict(
            score=self.score,
            missing=self.missing,
            scale=rubric.bounds,
            explanation=self.text[:_SHOWN],
            judge=judge,
            mode=mode,
            mass=self.mass,
            choice=self.choice,
            confidence=self.confidence,
            usage=usage,
        )


def read(rubric: Rubric, answer: Answer, mode: Mode) -> Reading:
    """Return what an answer says, in the mode that it was asked for."""
    if answer.refused:
        return Reading(None, JUDGE_REFUSED, answer.text)
    # a first token is whole whatever length the answer was allowed, but not when a filter took it away
    if answer.cut is not None and not (mode == "logprobs" and answer.cut == "length"):
        return Reading(None, f"answer cut off: {answer.cut}", answer.text)
    if mode == "logprobs":
        if not answer.top:
            return Reading(None, "the endpoint gave no log-probabilities", answer.text)
        return read_top(rubric, answer.top, answer.text)
    if not answer.text.strip():
        return Reading(None, "empty answer")
    return read_json(rubric, answer.text) if mode == "json" else read_text(rubric, answer.text)


def read_top(rubric: Rubric, top: Sequence[tuple[str, float | None]], text: str = "") -> Reading:
    """Return the expected score over the score tokens among the likeliest first tokens.

    ``score = sum(p_i * s_i) / sum(p_i)`` over tokens that are whole scores of the scale; tokens that differ in spaces alone add up.
    With less than ``LEAST_MASS`` on them, or more on the word for a refusal, it is missing. So it is when the model writes scores in several
    tokens (``SPLIT``): its "8" may be the beginning of 87.

    Args:
        rubric: its ``options`` say which tokens are scores.
        top: tokens with natural-log probabilities; what some endpoints write for none at all (-9999, minus infinity) is a probability of 0.
        text: the answer, to show.
    """
    found = dict.fromkeys(rubric.options, 0.0)
    refusal = total = 0.0
    for token, logprob in top:
        if logprob is None or math.isnan(logprob) or logprob > 1e-3:
            return Reading(None, f"a log-probability of {logprob} is none", text)
        word, p = token.strip(), math.exp(logprob)
        total += p
        if word in found:
            found[word] += p
        elif rubric.refusal and len(word) >= _LETTERS_ENOUGH and rubric.refusal.startswith(word.upper()):
            refusal += p
    if total > 1 + _ROUNDING:
        return Reading(None, f"the probabilities of the likeliest tokens add up to {total:.2f}", text)
    if _split(rubric, [token.strip() for token, _ in top], text) and sum(found.values()) >= LEAST_MASS:
        return Reading(None, SPLIT, text)
    return expected(rubric, found, refusal, text)


def _split(rubric: Rubric, words: Sequence[str], text: str) -> bool:
    """Return whether this model seems to write scores in several tokens, or nothing shows that it does not.

    A scale with scores of several digits shows it: either the answer begins with a number that is no token, or no token is such a number. One that
    has whole numbers as tokens has some among its twenty likeliest.
    """
    if all(len(option) == 1 for option in rubric.options):
        return False
    number = re.match(r"\s*([0-9]+)", text)
    return bool(number and number[1] not in words) or not any(re.fullmatch(r"[0-9]{2,}", word) for word in words)


def expected(rubric: Rubric, found: Mapping[str, float], refusal: float = 0.0, text: str = "") -> Reading:
    """Return the expected score of a distribution over the rubric's options (probabilities; they need not add up to one)."""
    total, scores = sum(found.values()), rubric.options
    if math.isnan(total) or math.isnan(refusal):
        return Reading(None, "a probability is NaN", text)
    mass = min(total, 1.0)
    if refusal > mass and refusal >= LEAST_MASS:
        return Reading(None, REFUSAL, text, mass)
    if mass < LEAST_MASS:
        return Reading(None, f"probability {mass:.2f} on score tokens, below {LEAST_MASS}", text, mass)
    share = {option: p / total for option, p in found.items()}
    score = sum(p * scores[option] for option, p in share.items())
    score = min(max(score, rubric.bounds[0]), rubric.bounds[1])  # rounding
    if rubric.scale is not None:
        return Reading(score, None, text, mass)
    most = max(share.values())
    best = [option for option, p in share.items() if p == most]
    choice = _CHOICE_OF[scores[best[0]]] if len(best) == 1 else "tie"
    return Reading(score, None, text, mass, choice, min(most, 1.0))


def read_json(rubric: Rubric, text: str) -> Reading:
    """Return the score of an answer that is one JSON object of the rubric's schema, and nothing else."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):  # the latter for brackets by the thousand
        return Reading(None, UNPARSABLE, text)
    asked = set(rubric.answer_schema["required"])
    if not isinstance(data, dict) or not asked - {"reason"} <= data.keys() <= asked or not isinstance(data.get("reason", ""), str):
        return Reading(None, "answer of another form", text)
    reason = str(data.get("reason", ""))
    if rubric.scale is None:
        return _choice(data["choice"], data["confidence"], reason or text)
    score = data["score"]
    if rubric.refusal is not None and score == rubric.refusal:
        return Reading(None, REFUSAL, reason)
    if type(score) is not int or not rubric.scale[0] <= score <= rubric.scale[1]:  # bool is an int, and True would pass as 1
        return Reading(None, f"score outside {rubric.scale[0]} to {rubric.scale[1]}, or no integer", text)
    return Reading(float(score), None, reason)


def read_text(rubric: Rubric, text: str) -> Reading:
    """Return the score of an answer in free text: one JSON object, in a code fence at most, or one score alone."""
    bare = re.sub(r"\A```(?:json)?\s*(.*?)\s*```\Z", r"\1", text.strip(), flags=re.DOTALL)
    if rubric.refusal is not None and bare.strip(" .\"'").upper() == rubric.refusal:
        return Reading(None, REFUSAL, text)
    if rubric.scale is not None and bare in rubric.options:
        return Reading(rubric.options[bare], None, text)
    return read_json(rubric, bare)


def _choice(choice: object, confidence: object, text: str) -> Reading:
    if not isinstance(choice, str) or choice not in _SCORE_OF:
        return Reading(None, "choice is none of A, B and tie", text)
    if isinstance(confidence, bool) or not isinstance(confidence, int) or not 0 <= confidence <= 100:
        return Reading(None, "confidence outside 0 to 100, or no integer", text)
    score = _SCORE_OF[choice]
    return Reading(score, None, text, None, _CHOICE_OF[score], confidence / 100)


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object whose names are each there once: with two scores, which one is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
