"""What a judge is: it maps responses to verdicts, and a verdict is a score or missing with a reason."""

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

from pydantic import Field, model_validator

from steered_lm.config import Config

SCALE = (1.0, 5.0)


class JudgeRequest(Config):
    """One response to be judged. The judge sees the response, and the prompt only as context, never glued together."""

    prompt: str
    response: str


class Verdict(Config):
    """A score on the judge's scale *or* missing with a reason; never a made-up number."""

    score: float | None = Field(default=None, ge=SCALE[0], le=SCALE[1])
    missing: str | None = None
    explanation: str = ""
    judge: str
    cached: bool = False

    @model_validator(mode="after")
    def _score_or_reason(self) -> Self:
        if (self.score is None) == (self.missing is None):
            raise ValueError("a verdict has either a score or a reason why it is missing")
        return self


@runtime_checkable
class Judge(Protocol):
    """Scores persona fit, 1 (not this persona) to 5 (unmistakably this persona)."""

    @property
    def name(self) -> str:
        """Short name for tables, such as ``stylometric`` or ``openai:gpt-5-mini``."""
        ...

    @property
    def identity(self) -> str:
        """Everything that can change a verdict (model, rubric, parameters, persona) as one hash; keys the cache."""
        ...

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order. An empty response is missing, not a score."""
        ...
