"""Traits as Persona Vectors publishes them: contrastive instructions, questions and a judge's prompt, for extraction and for evaluation.

The persona axes are traits, too, made from their contrast sets.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations, product
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from steered_lm.config import Config, content_hash
from steered_lm.content import content_dir
from steered_lm.errors import JudgeError, UserError, near_misses
from steered_lm.extract.contrast import ContrastSet, available_traits, load_contrast_set
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.eval_prompt import eval_prompt
from steered_lm.judges.question import Question, trait_descriptions
from steered_lm.judges.rubric import Rubric

TRAITS = ("evil", "sycophantic", "hallucinating", "apathetic", "humorous", "impolite", "optimistic")
"""The traits of Persona Vectors, in the paper's order: three that it studies, four more of its appendix."""
PAIRS, QUESTIONS = 5, 20
"""How many instruction pairs and questions a published file has."""
RubricName = Literal["auto", "ours", "file"]

_CONTRAST_SETS = (".yaml", ".yml")
_FOLDERS = {"extract": ("extract", "trait_data_extract"), "evaluate": ("eval", "trait_data_eval")}
_ALIKE = 0.85  # of two questions' words and letters in order, from where on they ask the same
_WORDS = re.compile(r"\w+")
_FORM = (
    'Write {"instruction": [{"pos": "…", "neg": "…"}, …], "questions": ["…", …], "eval_prompt": "… {question} … {answer} …"}, '
    'with "description" where you have one.'
)

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class TraitError(UserError):
    """A trait is unknown, or its file is malformed."""


class Pair(Config):
    """Two system turns: one that brings the trait out, and one for its opposite."""

    pos: Line
    neg: Line


class TraitFile(Config):
    """One file in the published form.

    Attributes:
        instruction: contrastive system turns.
        questions: what a model is asked, one user turn each.
        eval_prompt: a judge's prompt with the places ``{question}`` and ``{answer}``, which asks for a number from 0 to 100, or REFUSAL.
        description: what the trait means, in a sentence; not in the published files.
    """

    instruction: tuple[Pair, ...] = Field(min_length=1)
    questions: tuple[Line, ...] = Field(min_length=1)
    eval_prompt: Line
    description: Line | None = None

    @field_validator("eval_prompt")
    @classmethod
    def _has_places(cls, prompt: str) -> str:
        names = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
        if "answer" not in names or names - {"question", "answer"}:
            raise ValueError("it must have the place {answer}, may have {question} and no other; braces that are meant as such are doubled")
        return prompt


class Trait(Config):
    """A trait with what it takes to bring it out and to measure it.

    Attributes:
        name: its name.
        extract: the file for extraction.
        evaluate: the file for evaluation; its questions are never among those of extraction.
        published: whether it is meant to be in the published form; a trait made from a contrast set has counts and ways of asking of its own.
    """

    name: str = Field(min_length=1)
    extract: TraitFile | None = None
    evaluate: TraitFile | None = None
    published: bool = Field(default=True, exclude=True)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        shared = [b for a, b in self._across() if _plain(a) == _plain(b)]
        if shared:
            raise ValueError(f"{shared[0]!r} is a question of extraction and of evaluation; what vectors are made from cannot measure them")
        return self

    def _across(self) -> list[tuple[str, str]]:
        return [] if self.extract is None or self.evaluate is None else list(product(self.extract.questions, self.evaluate.questions))

    @property
    def description(self) -> str | None:
        """What the trait means, by its file, or by ours for a trait of ours; None where nobody says."""
        said = [file.description for file in (self.evaluate, self.extract) if file is not None and file.description]
        return said[0] if said else trait_descriptions().get(self.name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is unlike the published files but allowed: other counts, questions that are asked twice, or nearly the same in both files."""
        if not self.published:
            return ()
        found = []
        for use, file in (("extraction", self.extract), ("evaluation", self.evaluate)):
            if file is not None and (len(file.instruction), len(file.questions)) != (PAIRS, QUESTIONS):
                pairs, questions = len(file.instruction), len(file.questions)
                found.append(f"{use}: {pairs} instruction pairs and {questions} questions, where published files have {PAIRS} and {QUESTIONS}")
            twice = [] if file is None else [b for a, b in combinations(file.questions, 2) if _plain(a) == _plain(b)]
            found += [f"{use}: asked twice: {question!r}" for question in twice]
        return (*found, *(f"nearly the same in extraction and evaluation: {a!r} and {b!r}" for a, b in self._across() if alike(a, b)))

    @property
    def digest(self) -> str:
        """SHA-256 of all its content."""
        return content_hash(self.model_dump(mode="json"))

    def items(self) -> TraitFile:
        """Return the file for evaluation.

        Raises:
            TraitError: when there is only one for extraction.
        """
        if self.evaluate is None:
            raise TraitError(f"trait {self.name!r} has questions of extraction alone. Put those of evaluation into a folder 'eval' beside 'extract'.")
        return self.evaluate

    def question(self, rubric: RubricName = "auto") -> Question:
        """Return what a judge is asked about this trait's responses.

        Args:
            rubric: ``ours``: our trait rubric and the trait's description; ``file``: the file's own ``eval_prompt``; ``auto``: ours where the trait
                has a description, else the file's.

        Raises:
            TraitError: for ``ours`` when the trait has no description.
        """
        described = self.description
        if rubric == "file" or (rubric == "auto" and described is None):
            return PromptQuestion.of_prompt(self.name, self.items().eval_prompt)
        if described is None:
            raise TraitError(
                f"trait {self.name!r} has no description, which our rubric needs. Add \"description\" to its file, or use rubric='file'."
            )
        return Question.of_trait(self.name, described)


@dataclass(frozen=True)
class PromptQuestion(Question):
    """A trait judged by a prompt of its own, filled in and sent as the user turn; the system turn only says the form of the answer.

    Attributes:
        prompt: text with the places ``{question}`` and ``{answer}``.
    """

    prompt: str = ""

    @classmethod
    def of_prompt(cls, trait: str, prompt: str) -> Self:
        """Return the question; scale, refusals and forms of an answer are those of our trait rubric."""
        ours = Rubric.load("trait")
        return cls(ours.model_copy(update={"name": "eval_prompt"}), prompt, trait, prompt=prompt)

    def system(self, *, token: bool = False) -> str:
        """Return the form of the answer."""
        return (self.rubric.answer_token if token else self.rubric.answer).strip()

    def user(self, request: JudgeRequest) -> str:
        """Return the prompt with prompt and response in their places, whatever braces these hold."""
        return self.prompt.format(question=request.prompt, answer=request.response)


def trait_names(folder: Path | None = None) -> list[str]:
    """Return the names of the traits in a folder, by default of ours."""
    root = folder or ours()
    return sorted({file.stem for names in _FOLDERS.values() for name in names for file in (root / name).glob("*.json")})


def ours() -> Path:
    """Return the folder of our traits."""
    return content_dir("tasks") / "persona_vectors"


def load_trait(trait: str | Path, folder: str | Path | None = None) -> Trait:
    """Return a trait of ours, of the published repository, or of a user's own.

    Args:
        trait: the name of one, a persona axis included; or a contrast set's ``.yaml`` file (:func:`trait_of_contrast`); or a ``.json`` file,
            named after its trait: for evaluation, or, where it lies in a folder ``eval`` or ``extract``, read together with its partner; or a
            folder that holds one trait alone.
        folder: where the trait named lies: a folder that holds ``eval/<trait>.json`` and ``extract/<trait>.json`` (or, as published,
            ``trait_data_eval/`` and ``trait_data_extract/``). By default ours.

    Raises:
        TraitError: when there is no such trait, a file is malformed, or a question is in both files.
        UserError: when a contrast set's file is missing or malformed.
    """
    if folder is None and str(trait).endswith(_CONTRAST_SETS):
        return trait_of_contrast(load_contrast_set(str(trait)))
    if folder is None and str(trait).endswith(".json"):
        return _of_file(Path(trait).expanduser())
    if folder is None and Path(trait).expanduser().is_dir():
        folder = Path(trait).expanduser()
        names = trait_names(folder)
        if len(names) != 1:
            raise TraitError(
                f"folder {str(folder)!r} holds {len(names)} traits: {', '.join(names) or 'none'}. Name the one that is meant, or its file."
            )
        trait = names[0]
    if folder is None and str(trait) in available_traits():
        return trait_of_contrast(load_contrast_set(str(trait)))
    root = ours() if folder is None else Path(folder).expanduser()
    files = _files(root, str(trait))
    if not any(files):
        known = [*trait_names(root), *(available_traits() if folder is None else ())]
        where = "none of ours, no file and no folder" if folder is None else f"not in folder {str(root)!r}, in its folders eval and extract"
        raise TraitError(f"trait={str(trait)!r} is {where}. {near_misses(str(trait), known)}")
    return _made(str(trait), files)


def trait_of_contrast(contrast: ContrastSet) -> Trait:
    """Return the trait of a contrast set: extraction from what it builds on, evaluation from what it holds out.

    It is described by us where it is a trait of ours, else by the contrast set.

    Raises:
        TraitError: when the contrast set holds finished texts, or nobody says what the trait means.
    """
    described = trait_descriptions().get(contrast.trait) or contrast.description.strip()
    if contrast.instructions is None or contrast.questions is None:
        raise TraitError(f"contrast set {contrast.trait!r} holds finished texts, and nothing to ask. Write instructions and questions.")
    if not described:
        raise TraitError(f"contrast set {contrast.trait!r} has no description, so a judge would not know what to look for. Add one.")
    parts = {
        use: {
            "instruction": [pair.model_dump() for pair in getattr(contrast.instructions, split)],
            "questions": getattr(contrast.questions, split),
            "eval_prompt": eval_prompt(contrast.trait, described),
            "description": described,
        }
        for use, split in (("extract", "build"), ("evaluate", "held_out"))
    }
    return Trait.parse({"name": contrast.trait, "published": False, **parts}, source=f"contrast set {contrast.trait!r}", error=TraitError)


class _Files(NamedTuple):
    """Where a trait's two files lie."""

    extract: Path | None
    evaluate: Path | None


def _files(root: Path, name: str) -> _Files:
    def first(use: str) -> Path | None:
        places = [root / folder / f"{name}.json" for folder in _FOLDERS[use]]
        return next((place for place in places if place.is_file()), None)

    return _Files(first("extract"), first("evaluate"))


def _of_file(file: Path) -> Trait:
    if not file.is_file():
        raise TraitError(f"trait file {str(file)!r} does not exist. Check the path, or name a trait of ours: {', '.join(TRAITS)}.")
    folders = [name for names in _FOLDERS.values() for name in names]
    if file.parent.name in folders:
        return _made(file.stem, _files(file.resolve().parents[1], file.stem))
    return _made(file.stem, _Files(None, file))


def _made(name: str, files: _Files) -> Trait:
    parts = {use: None if file is None else read_trait_file(file) for use, file in files._asdict().items()}
    return Trait.parse({"name": name, **parts}, source=f"trait {name!r}", error=TraitError)


def read_trait_file(file: Path) -> TraitFile:
    """Return one file's content.

    Raises:
        TraitError: when it is no JSON, lacks a key, or a part of it is empty.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise TraitError(f"trait file {str(file)!r} is not JSON: {problem}. {_FORM}") from problem
    missing = [key for key in ("instruction", "questions", "eval_prompt") if not isinstance(data, dict) or key not in data]
    if missing:
        raise TraitError(f"trait file {str(file)!r} lacks {', '.join(map(repr, missing))}. {_FORM}")
    return TraitFile.parse(data, source=f"trait file {str(file)!r}", error=TraitError)


def alike(a: str, b: str) -> bool:
    """Return whether two questions are nearly the same: most of their words are, whatever their order, or most letters in order."""
    one, other = _plain(a), _plain(b)
    words, others = set(one.split()), set(other.split())
    if len(words & others) >= _ALIKE * len(words | others):
        return True
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.real_quick_ratio() >= _ALIKE and matcher.quick_ratio() >= _ALIKE and matcher.ratio() >= _ALIKE


def near_duplicates(questions: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of questions that are nearly the same."""
    return [(a, b) for a, b in combinations(questions, 2) if alike(a, b)]


def _plain(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))


def judge_needed(task: str) -> JudgeError:
    """Return the error for a trait's task that was given no judge."""
    return JudgeError(
        f"{task} needs a judge that can tell a trait from its absence, and none is given. Give judge=openai:<model> (any compatible endpoint, by "
        "judge_base_url), anthropic:<model>, hf:<model> (a local one, offline) or a panel's file; for a persona axis also judge=markers (offline). "
        "There is no default."
    )
