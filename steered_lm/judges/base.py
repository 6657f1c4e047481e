"""What a judge is: it maps responses to verdicts, and a verdict is a score or missing with a reason."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

from pydantic import AfterValidator, Field, model_validator

from steered_lm.config import Config

SCALE = (1.0, 5.0)
"""The scale of persona fit."""
PREFERENCE = (-1.0, 1.0)
"""The scale of pairwise verdicts: 1 is for the first response, -1 for the other one, 0 is a tie."""

EMPTY = "empty response"
REFUSAL = "the response is a refusal"
"""Why a verdict is missing when the judged model declined to answer, which reports count apart."""
NO_MARKER = "no marker of the trait"
"""Why a verdict is missing when a judge that counts words finds none that say anything about the trait."""
FINDINGS = frozenset({REFUSAL, NO_MARKER})
"""Reasons that say something of the response and nothing against the judge: no share of them is too many."""
NOT_JUDGED = "not judged"
"""Why a verdict is missing when the judge cannot answer that kind of question, so that nobody was asked."""
JUDGE_REFUSED = "the judge refused to answer"

Mode = Literal["logprobs", "json", "text"]
"""How an answer was read: from the probabilities of score tokens, from JSON under a schema, from text by strict parsing."""
Choice = Literal["A", "B", "tie"]


def _whole(text: str) -> str:
    """Return a text with ``?`` for half characters (lone surrogates, from answers that were cut off), which no file or connection takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


Text = Annotated[str, AfterValidator(_whole)]


class JudgeRequest(Config):
    """What is to be judged. The judge sees the response, and the prompt only as context, never glued together.

    Attributes:
        prompt: what the response answers: a message, a question, an instruction.
        response: the text to judge.
        other: pairwise kinds: the text that it is held against.
        references: truthfulness: answers known to be true.
        false_references: truthfulness: answers known to be false.
    """

    prompt: Text
    response: Text
    other: Text | None = None
    references: tuple[Text, ...] = ()
    false_references: tuple[Text, ...] = ()

    def swapped(self) -> "JudgeRequest":
        """Return the same pair in the other order.

        Raises:
            ValueError: when there is no other response.
        """
        if self.other is None:
            raise ValueError("other is None: only a request with two responses has another order.")
        return self.model_copy(update={"response": self.other, "other": self.response})


class Usage(Config):
    """What a verdict took: requests (retries included), tokens that the endpoint counted, and dollars where a price is known."""

    requests: int = Field(default=0, ge=0)
    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    dollars: float | None = Field(default=None, ge=0)

    def __add__(self, other: "Usage") -> "Usage":
        """Return the sum; dollars are unknown when neither side knows them."""
        known = [cost for cost in (self.dollars, other.dollars) if cost is not None]
        return Usage(
            requests=self.requests + other.requests,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            dollars=sum(known) if known else None,
        )


class Verdict(Config):
    """A score on the judge's scale *or* missing with a reason; never a made-up number.

    Attributes:
        score: on ``scale``; pairwise: the preference, from 1 for the first response to -1 for the other one.
        missing: why there is no score.
        scale: lowest and highest score.
        explanation: the judge's reason, or its answer.
        judge: the judge's name.
        cached: whether it was kept from before and cost nothing.
        mode: how the answer was read; None for judges that compute.
        mass: ``logprobs``: the probability on tokens that are scores.
        choice: pairwise: which one the judge prefers.
        confidence: pairwise: how sure it is, 0 to 1.
        consistent: pairwise in both orders: whether both name the same response, or both a tie.
        usage: what it took; None when it was computed here.
        parts: the verdicts that it was made from: a panel's members, or both orders of a pair.
    """

    score: float | None = None
    missing: Text | None = None
    scale: tuple[float, float] = SCALE
    explanation: Text = ""
    judge: str
    cached: bool = False
    mode: Mode | None = None
    mass: Annotated[float, Field(ge=0, le=1.001)] | None = None
    choice: Choice | None = None
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    consistent: bool | None = None
    usage: Usage | None = None
    parts: tuple["Verdict", ...] = ()

    @model_validator(mode="after")
    def _score_or_reason(self) -> Self:
        if (self.score is None) == (self.missing is None):
            raise ValueError("a verdict has either a score or a reason why it is missing")
        if self.score is not None and not self.scale[0] <= self.score <= self.scale[1]:
            raise ValueError(f"score={self.score} is outside the judge's scale of {self.scale[0]:g} to {self.scale[1]:g}")
        return self

    def record(self) -> dict[str, Any]:
        """Return the verdict as JSON for logs: score, missing and judge always, the rest where it says something."""
        facts = self.model_dump(mode="json", exclude_defaults=True)
        return {"score": self.score, "missing": self.missing, "explanation": self.explanation, "judge": self.judge, "cached": self.cached} | facts


@runtime_checkable
class Judge(Protocol):
    """Answers one :class:`~steered_lm.judges.question.Question` about each request."""

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


OnVerdict = Callable[[int, Verdict], None]
"""Called with a request's number and its verdict."""


@runtime_checkable
class StreamingJudge(Protocol):
    """A judge that can hand over each verdict as it arrives, so that a killed run keeps those that were finished."""

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict(index, verdict)`` for each verdict as it arrives, possibly from another thread."""
        ...
