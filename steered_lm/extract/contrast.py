"""Contrast sets: instruction pairs that differ in one trait only, times questions, split into build and held out."""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from steered_lm.config import Config, content_hash, read_structured
from steered_lm.errors import UserError, near_misses

if TYPE_CHECKING:
    from steered_lm.judges.traits import Trait

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
    """Return the contrast set of a trait of ours (a persona axis, or one of Persona Vectors), or one from a file.

    A file is a contrast set (YAML or JSON), or a trait's file for extraction in the published form of Persona Vectors (JSON).

    Raises:
        UserError: when there is none, with near misses, or when the file is malformed.
    """
    from steered_lm.judges.traits import TRAITS, load_trait

    path = Path(trait).expanduser()
    if path.suffix not in {".yaml", ".yml", ".json"}:
        if trait in TRAITS:
            return of_trait(load_trait(trait))
        if trait not in available_traits():
            known = [*available_traits(), *TRAITS]
            raise UserError(f"traits={trait!r} has no contrast set. {near_misses(trait, known)} Or give the path of a YAML or JSON file.")
        path = _OURS / f"{trait}.yaml"
    found = read_structured(path)
    if isinstance(found, dict) and "instruction" in found:
        loaded = load_trait(trait)
        # a file by itself, in no folder that says what it is for
        return of_trait(loaded if loaded.extract else loaded.model_copy(update={"extract": loaded.evaluate, "evaluate": None}))
    return ContrastSet.parse(found, source=f"contrast set {str(path)!r}")


def of_trait(trait: "Trait") -> ContrastSet:
    """Return a trait in the published form as a contrast set.

    Directions are built from all instruction pairs but the last, on the questions of extraction. They are checked on the last pair, on the
    questions of evaluation; where there are none, on the last quarter of those of extraction, which are then not built on.

    Raises:
        UserError: when the trait has no file for extraction, or one that is too small to hold anything out.
    """
    file = trait.extract
    if file is None:
        raise UserError(f"trait {trait.name!r} has no file for extraction, so no vector can be built. Put one into a folder 'extract' beside 'eval'.")
    pairs = [TextPair(pos=pair.pos, neg=pair.neg) for pair in file.instruction]
    build, held_out = list(file.questions), [] if trait.evaluate is None else list(trait.evaluate.questions)
    if not held_out:
        kept = len(build) - math.ceil(len(build) / 4)
        build, held_out = build[:kept], build[kept:]
    if len(pairs) < 2 or not build:
        raise UserError(f"trait {trait.name!r} has too little to hold some of it out. Write two instruction pairs and two questions at least.")
    return ContrastSet(
        trait=trait.name,
        description=trait.description or "",
        instructions=Instructions(build=tuple(pairs[:-1]), held_out=(pairs[-1],)),
        questions=Questions(build=tuple(build), held_out=tuple(held_out)),
    )


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
