"""What a judge is asked: a rubric, and the persona or the trait that responses are held against."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from steered_lm.config import content_hash, read_structured
from steered_lm.content import content_dir
from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.rubric import Kind, Rubric

if TYPE_CHECKING:
    from steered_lm.persona.schema import Persona


@dataclass(frozen=True)
class Question:
    """A rubric and its subject.

    Attributes:
        rubric: instructions and scale.
        subject: the text that responses are held against: a persona's judge prompt, a trait's description; empty when the rubric needs none.
        about: the name of the persona or trait, for tables.
        persona: the persona itself, for judges that learn from its utterances.
    """

    rubric: Rubric
    subject: str = ""
    about: str = ""
    persona: "Persona | None" = None

    def __post_init__(self) -> None:
        """Refuse a rubric without what it judges against."""
        if self.rubric.subject is not None and not self.subject.strip():
            what = f"{self.rubric.subject.lower()} is empty" if self.about else f"{self.rubric.subject.lower()} is not given"
            raise JudgeError(f"rubric {self.rubric.name!r}: {what}, so a judge would rate against nothing. Name a persona or a trait.")

    @classmethod
    def of_persona(cls, persona: "Persona", kind: Kind = "persona_fit", *, rubric: Rubric | None = None) -> Self:
        """Return the question how well responses fit a persona (``persona_fit``), or which of two fits better (``pairwise``)."""
        return cls(rubric or Rubric.load(kind), persona.judge_prompt, persona.name, persona)

    @classmethod
    def of_trait(cls, trait: str, description: str | None = None, *, rubric: Rubric | None = None) -> Self:
        """Return the question how strongly responses show a trait, 0 to 100.

        Raises:
            JudgeError: when no description is given and the trait is none of ours.
        """
        return cls(rubric or Rubric.load("trait"), f"{trait}: {(description or '').strip() or trait_description(trait)}", trait)

    @classmethod
    def of_kind(cls, kind: Kind | Path) -> Self:
        """Return a question that needs no subject: coherence, truthful, informative, instruction; or a rubric file."""
        return cls(Rubric.load(kind))

    @property
    def kind(self) -> Kind:
        """What is judged."""
        return self.rubric.kind

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest score."""
        return self.rubric.bounds

    @property
    def facts(self) -> dict[str, str]:
        """What a cache shows of it: ``rubric``, ``rubric_version`` and ``about``."""
        return {"rubric": self.rubric.name, "rubric_version": str(self.rubric.version), "about": self.about}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rubric and the subject."""
        return content_hash({"rubric": self.rubric.digest, "subject": self.subject})

    def system(self, *, token: bool = False) -> str:
        """Return the judge's system turn; see :meth:`Rubric.system_prompt`."""
        return self.rubric.system_prompt(self.subject, token=token)

    def user(self, request: JudgeRequest) -> str:
        """Return the judge's user turn; see :meth:`Rubric.material`."""
        return self.rubric.material(request)


def trait_descriptions() -> dict[str, str]:
    """Return what each trait of ours means, by name: the five persona axes (their high pole) and the Persona Vectors traits."""
    file = content_dir("tasks") / "rubrics" / "traits.yaml"
    return {str(name): str(text).strip() for name, text in read_structured(file, error=JudgeError).items()}


def trait_description(trait: str) -> str:
    """Return what a trait of ours means.

    Raises:
        JudgeError: when it is none of ours.
    """
    known = trait_descriptions()
    if trait not in known:
        raise JudgeError(f"trait={trait!r} has no description of ours. {near_misses(trait, known)} For a trait of your own give its description.")
    return known[trait]
