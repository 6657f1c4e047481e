"""What an audit of a judge found, as it is stored and printed."""

from typing import Literal

from pydantic import Field

from steered_lm.config import Config
from steered_lm.judges.base import Usage
from steered_lm.stats import Estimate

Outcome = Literal["pass", "warn", "fail", "n/a"]


class Part(Config):
    """One thing that was looked at.

    Attributes:
        name: ``missing``, ``retest``, ``order``, ``null``, ``length``, ``anchors``, ``broken`` or ``noise``.
        outcome: ``fail`` makes the judge untrusted, ``warn`` does not; ``n/a`` where the question has nothing of the kind.
        sentence: what was found, with figures.
        estimate: the figure that decides.
        further: more figures by name.
    """

    name: str
    outcome: Outcome
    sentence: str
    estimate: Estimate | None = None
    further: dict[str, Estimate] = Field(default_factory=dict)


class Detectable(Config):
    """The smallest difference of two arms found with 80 % power at so many prompts; None where its spread is not known.

    Attributes:
        prompts: how many.
        noise: by the judge's noise alone.
        replies: with the scatter between good replies, which the judge's noise is a part of.
    """

    prompts: int
    noise: float | None
    replies: float | None


class AuditReport(Config):
    """What an audit found.

    Attributes:
        key: hash of everything that the audit depends on; see :func:`audit_key`.
        judge: the judge's name.
        identity: the judge's identity.
        kind: what is judged.
        about: the persona or the trait.
        scale: lowest and highest score.
        effect: the difference of two arms that is sought, in points.
        prompts: at how many prompts.
        repeats: how often each anchor was judged (of pairs also each close one).
        items: how many items of each sort.
        judgements: how many were made.
        reasons: why verdicts were missing, and how often.
        usage: what the audit took.
        parts: what was looked at.
        detectable: the smallest detectable difference by number of prompts.
        needed_noise: prompts needed for the effect by the judge's noise alone; None when unknown or above a million.
        needed_replies: the same with the scatter between replies.
    """

    key: str
    judge: str
    identity: str
    kind: str
    about: str
    scale: tuple[float, float]
    effect: float
    prompts: int
    repeats: int
    items: dict[str, int]
    judgements: int
    reasons: dict[str, int]
    usage: Usage | None
    parts: tuple[Part, ...]
    detectable: tuple[Detectable, ...]
    needed_noise: int | None
    needed_replies: int | None

    @property
    def trusted(self) -> bool:
        """Whether no part failed."""
        return not self.failures

    @property
    def failures(self) -> list[Part]:
        """The parts that failed."""
        return [part for part in self.parts if part.outcome == "fail"]

    @property
    def warnings(self) -> list[Part]:
        """The parts that do not fail and call for care."""
        return [part for part in self.parts if part.outcome == "warn"]

    def part(self, name: str) -> Part:
        """Return a part by its name."""
        return next(part for part in self.parts if part.name == name)

    def conclusion(self) -> str:
        """Return the bottom line in one sentence."""
        sought = f"a difference of {self.effect:g} at {self.prompts} prompts"
        if self.trusted:
            limits = f", with warnings about {', '.join(part.name for part in self.warnings)}" if self.warnings else ""
            return f"judge {self.judge} is trusted for {sought}{limits}"
        return f"judge {self.judge} is not trusted for {sought}: {' '.join(f'{part.name}: {part.sentence}' for part in self.failures)}"
