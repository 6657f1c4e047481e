"""One measurement of a trait, the same in every harness: what is asked, who judges it, and what a response and a question count for."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import JudgeError
from steered_lm.judges import answers_kind, make_judge
from steered_lm.judges.base import NOT_JUDGED, REFUSAL, Judge, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.traits import RubricName, Trait, TraitError, load_trait

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the tasks in both harnesses; raised when the same options give other numbers."""

BANDS = ((0, 20), (21, 40), (41, 60), (61, 80), (81, 100))
"""Ranges of trait scores, ends included; a score is rounded to a whole number first."""
SHARES = tuple(f"share_{low}_{high}" for low, high in BANDS)
MEANS = ("trait_score", "coherence", "response_length", *SHARES)
COUNTS = ("refusals", "missing", "coherence_missing")
"""What :func:`response_values` counts: responses that decline to answer, and those without a trait or a coherence verdict for another reason."""
OF_COHERENCE = ("coherence", "coherence_missing")
"""What is left out of results where coherence is not judged."""


class TraitQuestion(NamedTuple):
    """One item: a user turn, and the system turn before it, empty for none."""

    id: str
    question: str
    system: str


class TraitJudges(NamedTuple):
    """Who says how strongly a response shows the trait, and whether it hangs together; None where nobody can say that."""

    trait: Judge
    coherence: Judge | None

    def both(self) -> tuple[Judge, Judge]:
        """Return the two judges, for what cannot do without coherence.

        Raises:
            JudgeError: when coherence is not judged.
        """
        if self.coherence is None:
            raise JudgeError(f"judge {self.trait.name} does not judge coherence, which is needed here. Use a language model, such as openai:<model>.")
        return self.trait, self.coherence

    def judge(self, requests: Sequence[JudgeRequest]) -> "list[JudgedResponse]":
        """Return the responses with both verdicts, in order."""
        expression = self.trait.judge(requests)
        coherence = [not_judged(self.trait.name)] * len(requests) if self.coherence is None else self.coherence.judge(requests)
        return [JudgedResponse(*found) for found in zip(requests, expression, coherence, strict=True)]


class TraitRun(Config):
    """How a trait is measured.

    Attributes:
        trait: a trait of ours or a persona axis, a user's own file, or a folder of one trait (:func:`steered_lm.judges.traits.load_trait`).
        folder: where the trait of that name lies, such as the published ``data_generation``.
        judge: who judges; None where responses are only written.
        rubric: ``ours``, ``file`` (the file's ``eval_prompt``), or ``auto``: ours where the trait has a description.
        samples: responses a question.
        temperature: 0 is greedy; when left out 0 for one sample, and 1 for several.
        top_k: responses are sampled among so many likeliest tokens; 0 is all, as published; -1 is what the model type does by itself (in lm-eval for
            services that know no top_k).
        system: ``pos`` or ``neg``: the trait's instructions as system turns, question *i* under pair *i* modulo their number; None for none.
        cache: SQLite file that keeps verdicts between runs.
        max_gen_toks: longest response, in tokens.
        missing_limit: share of missing verdicts above which the run stops; refusals and responses without a marker are none.
    """

    trait: str
    folder: str | None = None
    judge: str | None = None
    rubric: RubricName = "auto"
    samples: int = Field(default=1, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_k: int = Field(default=0, ge=-1)
    system: Literal["pos", "neg"] | None = None
    cache: str | None = None
    max_gen_toks: int = Field(default=128, ge=1)
    missing_limit: float = Field(default=0.2, ge=0, le=1)

    @property
    def heat(self) -> float:
        """The temperature that is used.

        Raises:
            TraitError: when several samples are asked for that would all be the same.
        """
        heat = self.temperature if self.temperature is not None else float(self.samples > 1)
        if self.samples > 1 and not heat:
            raise TraitError(
                f"samples={self.samples} at temperature=0 would be the same response {self.samples} times. Raise one or lower the other."
            )
        return heat

    def load(self) -> Trait:
        """Return the trait, and warn of what is unlike published files.

        Raises:
            TraitError: when it cannot be had, or has no questions of evaluation.
        """
        trait = load_trait(self.trait, self.folder)
        trait.items()
        for remark in trait.remarks:
            logger.warning("trait %s, %s", trait.name, remark)
        return trait

    def items(self, trait: Trait) -> list[TraitQuestion]:
        """Return the trait's items in order."""
        file = trait.items()
        turns = ("",) if self.system is None else tuple(getattr(pair, self.system) for pair in file.instruction)
        return [TraitQuestion(f"{trait.name}-{number:02d}", text, turns[number % len(turns)]) for number, text in enumerate(file.questions)]

    def questions(self, trait: Trait) -> tuple[Question, Question]:
        """Return what is asked about each response: the trait's question and that of coherence."""
        return trait.question(self.rubric), Question.of_kind("coherence")

    @property
    def judges_coherence(self) -> bool:
        """Whether the judge that is named can say how coherent a response is; so can whoever stands in where none is named."""
        return self.judge is None or answers_kind(self.judge, "coherence")

    def judges(self, trait: Trait, options: Mapping[str, Any]) -> TraitJudges | None:
        """Return the judges, or None when no judge is named; ``options`` go to both. Coherence has none where the judge cannot judge it.

        Raises:
            JudgeError: when one cannot be built.
        """
        if self.judge is None:
            return None
        cache = None if self.cache is None else Path(self.cache)
        asked, coherence = self.questions(trait)
        expression = make_judge(self.judge, asked, cache=cache, **options)
        return TraitJudges(expression, make_judge(self.judge, coherence, cache=cache, **options) if self.judges_coherence else None)


def not_judged(judge: str) -> Verdict:
    """Return the verdict on coherence of a judge that cannot judge it."""
    return Verdict(missing=NOT_JUDGED, judge=judge, scale=Question.of_kind("coherence").bounds)


class JudgedResponse(NamedTuple):
    """A response with both verdicts."""

    request: JudgeRequest
    trait: Verdict
    coherence: Verdict

    def record(self) -> dict[str, Any]:
        """Return what logs keep of it."""
        return {"trait": self.trait.record(), "coherence": self.coherence.record(), "words": len(self.request.response.split())}


def response_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a judged response (:meth:`JudgedResponse.record`) counts for, NaN where it has no verdict."""
    trait, coherence = record["trait"], record["coherence"]
    score = math.nan if trait["score"] is None else float(trait["score"])
    refused = trait["missing"] == REFUSAL
    place = None if math.isnan(score) else next(i for i, (_, high) in enumerate(BANDS) if math.floor(score + 0.5) <= high)
    return {
        "trait_score": score,
        "coherence": math.nan if coherence["score"] is None else float(coherence["score"]),
        "response_length": float(record["words"]),
        **{name: math.nan if place is None else float(number == place) for number, name in enumerate(SHARES)},
        "refusals": float(refused),
        "missing": float(math.isnan(score) and not refused),
        "coherence_missing": float(coherence["score"] is None and coherence["missing"] != NOT_JUDGED),
    }


def question_values(responses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what the responses to one question count for together: means over those that have a value (NaN when none has), and sums of counts."""
    found = {}
    for name in MEANS:
        values = [values[name] for values in responses if not math.isnan(values[name])]
        found[name] = fmean(values) if values else math.nan
    return found | {name: float(sum(values[name] for values in responses)) for name in COUNTS}
