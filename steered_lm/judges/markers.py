"""The offline judge of the persona axes: how strongly a response shows one, by the words that mark the axis's two poles."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from steered_lm.config import content_hash, file_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.base import EMPTY, NO_MARKER, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Kind
from steered_lm.persona import meter

VERSION = 1
"""Raised whenever a change of this file, or of the meter's way of counting, changes a verdict."""


class MarkersJudge:
    """Scores a persona axis from marker words, offline, the same every time; it sees the response alone.

    The level of a response, -1 (low pole) to 1 (high pole), becomes a score on the rubric's scale: 0, 50 and 100 for -1, 0 and 1. It knows
    words and no sense: a response that shows an axis in other words than those of ``persona/markers.yaml`` has no score, and one that
    quotes them has.

    Attributes:
        kinds: the kinds of question that it answers.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("trait",)

    def __init__(self, question: Question) -> None:
        """Take the question; use ``for_question``, which checks it."""
        self._question = question

    @classmethod
    def for_question(cls, question: Question) -> Self:
        """Return the judge of one persona axis.

        Raises:
            JudgeError: when the question is of another kind, or about another trait.
        """
        if question.kind not in cls.kinds or question.about not in meter.TRAITS:
            asked = f"trait {question.about!r}" if question.kind == "trait" else f"the kind {question.kind!r}"
            raise JudgeError(
                f"judge=markers counts marker words, which say how strongly a response shows one of these traits: {', '.join(meter.TRAITS)}. "
                f"They say nothing about {asked}. Use a language model, such as openai:<model>, anthropic:<model> or hf:<model>; "
                "for persona_fit also stylometric, offline."
            )
        return cls(question)

    @property
    def name(self) -> str:
        """``markers``."""
        return "markers"

    @property
    def facts(self) -> dict[str, str]:
        """What a cache notes beside the verdicts, for people."""
        return self._question.facts

    @property
    def identity(self) -> str:
        """Hash over the question and the marker words."""
        words = file_hash(Path(meter.__file__).with_name("markers.yaml"))
        return content_hash(
            {"judge": "markers", "version": VERSION, "question": self._question.digest, "axis": self._question.about, "markers": words}
        )

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order; a response without a marker of the axis is missing. The prompt is not looked at."""
        return [self._verdict(request.response) for request in requests]

    def _verdict(self, text: str) -> Verdict:
        axis, (low, high) = self._question.about, self._question.bounds
        level = meter.trait_levels(text)[axis]
        if level is None:
            return Verdict(missing=NO_MARKER if text.strip() else EMPTY, judge=self.name, scale=(low, high))
        counted = meter.marker_counts(text)[axis]
        said = f"markers of {axis}: {counted[0]} of its high pole, {counted[1]} of its low pole"
        return Verdict(score=low + (high - low) * (1 + level) / 2, explanation=said, judge=self.name, scale=(low, high))
