"""Contrast sets: instruction pairs that differ in one trait only, times questions, split into build and held out."""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from steered_lm.config import Config, content_hash, read_structured
from steered_lm.errors import UserError, near_misses

Split = Literal["build", "held_out"]
_OURS = Path(__file__).parent / "contrast_sets"
_OLD_NAMES = {"R1": "self_other_focus", "R2": "formality", "R3": "relationship_distance", "R4": "narrative_mode", "R5": "emotional_tone"}


class TextPair(Config):
    """Two texts, or two instructions: one shows the trait's high pole, the other its low pole."""

    pos: str = Field(min_length=1)
    neg: str = Field(min_length=1)


class Instructions(Config):
    """Instruction pairs by split."""

    build: tuple[TextPair, ...] = Field(min_length=1)
    held_out: tuple[TextPair, ...] = Field(min_length=1)


class Questions(Config):
    """Questions by split."""

    build: tuple[str, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = Field(min_length=1)


class ContrastPair(Config):
    """One pair to run: a question under two instructions, or (``question`` None) two finished texts."""

    question: str | None
    pos: str
    neg: str


class ContrastSet(Config):
    """All pairs of one trait: either ``instructions`` x ``questions``, or finished ``texts`` (the older pair-list format)."""

    trait: str
    description: str = ""
    high: str = "high"
    low: str = "low"
    instructions: Instructions | None = None
    questions: Questions | None = None
    texts: tuple[TextPair, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.texts) == bool(self.instructions and self.questions):
            raise ValueError("a contrast set holds either instructions and questions, or texts")
        if self.instructions and self.questions:
            if set(self.questions.build) & set(self.questions.held_out):
                raise ValueError("a question stands in both splits; what is built on cannot be held out")
            if set(self.instructions.build) & set(self.instructions.held_out):
                raise ValueError("an instruction pair stands in both splits; what is built on cannot be held out")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the set's content."""
        return content_hash(self.model_dump(mode="json"))

    def pairs(self, split: Split, limit: int, seed: int = 0) -> list[ContrastPair]:
        """Return at most ``limit`` distinct pairs of a split, every instruction and question used about equally often.

        Finished texts go to ``held_out`` by content hash, one in four.
        """
        if self.texts:
            chosen = [t for t in self.texts if _held_out(t) == (split == "held_out")]
            return [ContrastPair(question=None, pos=t.pos, neg=t.neg) for t in chosen[:limit]]
        assert self.instructions is not None
        assert self.questions is not None
        instructions: Sequence[TextPair] = getattr(self.instructions, split)
        questions: Sequence[str] = getattr(self.questions, split)
        rng = random.Random(f"{seed}/{self.trait}/{split}")
        order = rng.sample(range(len(questions)), len(questions))
        cycle = math.lcm(len(instructions), len(questions))  # after which the diagonal would repeat itself, so it is shifted by one
        diagonal = ((k % len(instructions), order[(k + k // cycle) % len(questions)]) for k in range(min(limit, len(instructions) * len(questions))))
        return [ContrastPair(question=questions[q], pos=instructions[i].pos, neg=instructions[i].neg) for i, q in diagonal]


def _held_out(pair: TextPair) -> bool:
    return hashlib.sha256(f"{pair.pos}\0{pair.neg}".encode()).digest()[0] % 4 == 0


def available_traits() -> list[str]:
    """Return the traits that have a contrast set of ours."""
    return sorted(file.stem for file in _OURS.glob("*.yaml"))


def load_contrast_set(trait: str) -> ContrastSet:
    """Return one of our contrast sets by trait, or one from a YAML or JSON file.

    Raises:
        UserError: when there is none, with near misses, or when the file is malformed.
    """
    path = Path(trait).expanduser()
    if path.suffix not in {".yaml", ".yml", ".json"}:
        if trait not in available_traits():
            raise UserError(
                f"traits={trait!r} has no contrast set. {near_misses(trait, available_traits())} Or give the path of a YAML or JSON file."
            )
        path = _OURS / f"{trait}.yaml"
    return ContrastSet.parse(read_structured(path), source=f"contrast set {str(path)!r}")


def load_pair_lists(path: Path | str) -> list[ContrastSet]:
    """Read the older pair-list format ``{"R1": [{"pos": …, "neg": …}, …]}``; R1 to R5 become the five persona axes.

    Raises:
        UserError: when the file is not of that form.
    """
    data = read_structured(Path(path))
    if not isinstance(data, dict) or not all(isinstance(v, list) for v in data.values()):
        raise UserError(f'pairs={str(path)!r} is not a pair list. Expected {{"R1": [{{"pos": "…", "neg": "…"}}]}}.')
    source = f"pair list {str(path)!r}"
    return [ContrastSet.parse({"trait": _OLD_NAMES.get(name, name), "texts": pairs}, source=source) for name, pairs in data.items()]
