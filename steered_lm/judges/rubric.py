"""The rubric that a language-model judge is given: instructions, a level's meaning by score, the form of the answer."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator

from steered_lm.config import Config, content_hash, read_structured
from steered_lm.content import content_dir
from steered_lm.errors import JudgeError
from steered_lm.judges.base import SCALE


class Rubric(Config):
    """A versioned rubric; ``levels`` says what each score of the judge's scale means."""

    name: str
    version: int = Field(ge=1)
    instructions: str = Field(min_length=1)
    levels: dict[int, str]
    answer: str = Field(min_length=1)

    @field_validator("levels")
    @classmethod
    def _whole_scale(cls, levels: dict[int, str]) -> dict[int, str]:
        scale = range(int(SCALE[0]), int(SCALE[1]) + 1)
        if sorted(levels) != list(scale):
            raise ValueError(f"levels are {sorted(levels)}; describe each of {list(scale)}")
        return levels

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a rubric, by default ``tasks/persona_judge/rubric.yaml``.

        Raises:
            JudgeError: when the file is missing or malformed.
        """
        file = path or content_dir("tasks") / "persona_judge" / "rubric.yaml"
        return cls.parse(read_structured(file, error=JudgeError), source=f"rubric {str(file)!r}", error=JudgeError)

    @property
    def digest(self) -> str:
        """SHA-256 of the rubric's content."""
        return content_hash(self.model_dump(mode="json"))

    def system_prompt(self, persona: str) -> str:
        """Return the judge's system turn: instructions, levels, the persona's description, the form of the answer."""
        levels = "\n".join(f"{score}: {text.strip()}" for score, text in sorted(self.levels.items()))
        return "\n\n".join((self.instructions.strip(), levels, f"The persona:\n{persona.strip()}", self.answer.strip()))
