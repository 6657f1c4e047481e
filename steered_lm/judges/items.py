"""What a trait's evaluation leaves of each question, whichever harness ran it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from steered_lm.config import Config
from steered_lm.judges.trait_run import TraitJudges, question_values, response_values


class JudgedItem(Config):
    """One question with what was made of the responses to it.

    Attributes:
        id: the question's name.
        trait_score: mean over the responses that have a score, 0 to 100; None when none has.
        coherence: the same for coherence.
        refusals: responses that decline to answer.
        missing: responses without a trait verdict for another reason.
        coherence_missing: responses without a verdict on coherence.
        responses: what the model said.
    """

    id: str
    trait_score: float | None
    coherence: float | None
    refusals: int
    missing: int
    coherence_missing: int
    responses: tuple[str, ...]

    @classmethod
    def of(cls, name: str, records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> Self:
        """Return a question from the records of its judged responses (:meth:`steered_lm.judges.trait_run.JudgedResponse.record`)."""
        values = question_values([response_values(record) for record in records])
        return cls(
            id=name,
            trait_score=_known(values["trait_score"]),
            coherence=_known(values["coherence"]),
            refusals=int(values["refusals"]),
            missing=int(values["missing"]),
            coherence_missing=int(values["coherence_missing"]),
            responses=tuple(responses),
        )


def identities(judges: TraitJudges) -> dict[str, str]:
    """Return the judges' identities, by what they judge."""
    return {name: str(judge.identity) for name, judge in judges._asdict().items() if judge is not None}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
