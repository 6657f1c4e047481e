"""The rubric that a language-model judge is given: instructions, a level's meaning by score, the form of the answer."""

import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from steered_lm.config import Config, content_hash, read_structured
from steered_lm.content import content_dir
from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges.base import PREFERENCE, SCALE, JudgeRequest

Kind = Literal["persona_fit", "pairwise", "trait", "coherence", "truthful", "informative", "instruction"]
"""The kinds of judgement, each with a rubric in ``tasks/rubrics/``."""
KINDS: tuple[Kind, ...] = get_args(Kind)

TIE = "tie"
# the letters of a pairwise answer in one token, and what they say of the first response
_LETTERS = {"A": 1.0, "B": -1.0, "C": 0.0}
_FIELDS = ("prompt", "response", "other", "references", "false_references")
_EVERY_LEVEL = 10  # a scale with so many levels or fewer has each one described


class Rubric(Config):
    """A versioned rubric.

    Attributes:
        name: its name in tables and caches.
        kind: what it judges.
        version: raised with every change that can move a score.
        scale: lowest and highest score, whole numbers; pairwise rubrics have none and answer A, B or tie.
        instructions: what the judge is to do.
        subject: heading of what it judges against, such as ``The persona``; None when it needs nothing of the kind.
        levels: what scores mean: each one of a short scale, some of a long one with both ends.
        shows: the material, by the name that the judge sees: which field of the request.
        answer: the form of an answer in JSON.
        answer_token: the form of an answer in one token, for reading probabilities.
        refusal: the word for a response that declines to answer, where the rubric sets such responses apart.
    """

    name: str
    kind: Kind
    version: int = Field(ge=1)
    scale: tuple[int, int] | None = (int(SCALE[0]), int(SCALE[1]))
    instructions: str = Field(min_length=1)
    subject: str | None = None
    levels: dict[int, str] = Field(default_factory=dict)
    shows: dict[str, str]
    answer: str = Field(min_length=1)
    answer_token: str = Field(min_length=1)
    refusal: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "pairwise") != (self.scale is None):
            raise ValueError("a pairwise rubric has scale: null, and every other one a scale")
        if self.scale is not None:
            low, high = self.scale
            if low >= high:
                raise ValueError(f"scale is [{low}, {high}]; the first number must be the smaller one")
            needed = set(range(low, high + 1)) if high - low < _EVERY_LEVEL else {low, high}
            if needed - set(self.levels) or any(not low <= level <= high for level in self.levels):
                raise ValueError(f"levels are {sorted(self.levels)}; describe each of {sorted(needed)}, and none outside {low} to {high}")
        for field in self.shows.values():
            if field not in _FIELDS:
                raise ValueError(f"shows names {field!r}, which no request has; allowed are {', '.join(_FIELDS)}")
        needs = {"response", "other"} if self.kind == "pairwise" else {"response"}
        if needs - set(self.shows.values()):
            raise ValueError(f"shows lacks {', '.join(sorted(needs - set(self.shows.values())))}, so a judge would not see what it rates")
        return self

    @classmethod
    def load(cls, kind: str | Path = "persona_fit") -> Self:
        """Read a rubric of ours by its kind, or a file.

        Raises:
            JudgeError: when the kind is unknown, or the file is missing or malformed.
        """
        if isinstance(kind, str) and kind not in KINDS and not kind.endswith((".yaml", ".yml", ".json")):
            raise JudgeError(f"kind={kind!r} is no kind of judgement and no rubric file. {near_misses(kind, KINDS)}")
        file = content_dir("tasks") / "rubrics" / f"{kind}.yaml" if kind in KINDS else Path(kind)
        return cls.parse(read_structured(file, error=JudgeError), source=f"rubric {str(file)!r}", error=JudgeError)

    @property
    def digest(self) -> str:
        """SHA-256 of the rubric's content; worked out each time, since pydantic's copies would carry a kept one along."""
        return content_hash(self.model_dump(mode="json"))

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest score of its verdicts."""
        return PREFERENCE if self.scale is None else (float(self.scale[0]), float(self.scale[1]))

    @property
    def options(self) -> dict[str, float]:
        """What a one-token answer may be, and the score that it stands for."""
        return dict(_LETTERS) if self.scale is None else {str(level): float(level) for level in range(self.scale[0], self.scale[1] + 1)}

    @property
    def answer_schema(self) -> dict[str, Any]:
        """The JSON schema of an answer; the reason comes first, to be thought of first.

        Strict modes want every property required and no numeric bounds, so a short scale is an enum, and a long one is checked afterwards.
        """
        reason = {"reason": {"type": "string"}}
        if self.scale is None:
            asked: dict[str, Any] = {"choice": {"type": "string", "enum": ["A", "B", TIE]}, "confidence": {"type": "integer"}}
        else:
            low, high = self.scale
            score: dict[str, Any] = {"type": "integer"}
            if high - low < _EVERY_LEVEL:
                score["enum"] = list(range(low, high + 1))
            asked = {"score": score if self.refusal is None else {"anyOf": [score, {"type": "string", "enum": [self.refusal]}]}}
        return {"type": "object", "properties": reason | asked, "required": ["reason", *asked], "additionalProperties": False}

    def system_prompt(self, subject: str = "", *, token: bool = False) -> str:
        """Return the judge's system turn: instructions, levels, what to judge against, the form of the answer (``token``: one token alone)."""
        levels = "\n".join(f"{score}: {text.strip()}" for score, text in sorted(self.levels.items()))
        against = "" if self.subject is None else f"{self.subject}:\n{subject.strip()}"
        parts = (self.instructions, levels, against, self.answer_token if token else self.answer)
        return "\n\n".join(part.strip() for part in parts if part.strip())

    def material(self, request: JudgeRequest) -> str:
        """Return the judge's user turn: as JSON, no text can pretend to be another one or an instruction's frame.

        Raises:
            JudgeError: when the request lacks a part that the rubric shows.
        """
        shown = {name: getattr(request, field) for name, field in self.shows.items()}
        lacking = [self.shows[name] for name, value in shown.items() if value is None]
        if lacking:
            raise JudgeError(f"rubric {self.name!r} shows {lacking[0]!r}, and the request has none. Give both responses of a pair.")
        return json.dumps(shown, ensure_ascii=False)
