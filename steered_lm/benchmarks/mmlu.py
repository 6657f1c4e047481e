"""MMLU (Hendrycks et al. 2021): 57 subjects in four categories, four choices a question."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from steered_lm.benchmarks.folder import data_folder, find_files, missing_file, read_rows
from steered_lm.benchmarks.hub import hub_rows
from steered_lm.benchmarks.ids import with_ids
from steered_lm.benchmarks.upstream import upstream_prompt, upstream_settings
from steered_lm.config import Config
from steered_lm.errors import UserError, near_misses

HUB = "cais/mmlu"
SHOTS = 5
"""How many examples ``dev`` has for each subject."""
LETTERS = ("A", "B", "C", "D")
Split = Literal["test", "dev"]
CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
"""The subjects of each category."""
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}
_BASES = ("mmlu", HUB)


class Row(Config):
    """One question."""

    model_config = ConfigDict(extra="ignore")

    question: str = Field(min_length=1)
    subject: str
    choices: tuple[str, ...] = Field(min_length=4, max_length=4)
    answer: int

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.subject not in CATEGORY_OF:
            raise ValueError(f"subject={self.subject!r} is none of MMLU's 57. {near_misses(self.subject, CATEGORY_OF)}")
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer={self.answer} is not the index of a choice. Allowed: 0 to 3")
        return self


def select_subjects(named: str | Iterable[str]) -> list[str]:
    """Return subjects by name; a category stands for all of its subjects, ``all`` for the 57.

    Args:
        named: names, or one text with commas between them.

    Raises:
        UserError: for a name that is neither, with near misses.
    """
    names = [name.strip() for name in (named.split(",") if isinstance(named, str) else named)]
    chosen: list[str] = []
    for name in names:
        plain = name.lower().replace(" ", "_")
        if plain != "all" and plain not in CATEGORIES and plain not in CATEGORY_OF:
            raise UserError(
                f"subjects={name!r} is neither a subject of MMLU nor a category. {near_misses(plain, ['all', *CATEGORIES, *CATEGORY_OF])}"
            )
        chosen += [*CATEGORY_OF] if plain == "all" else CATEGORIES.get(plain, (plain,))
    return list(dict.fromkeys(chosen))


def local_subjects(data: str | None = None) -> list[str] | None:
    """Return which subjects the local folder has test questions of, in MMLU's order; None without a folder.

    Raises:
        UserError: when the folder holds no MMLU at all, or malformed rows.
    """
    folder = data_folder(data)
    if folder is None:
        return None
    files = find_files(folder, _joint("test"))
    if files:
        present = {row["subject"] for row in _read(files)}
    else:
        present = {subject for subject in CATEGORY_OF if find_files(folder, _single(subject, "test"))}
    if not present:
        raise missing_file(folder, "MMLU test questions", [*_joint("test"), "mmlu/<subject>/test"])
    return [subject for subject in CATEGORY_OF if subject in present]


def mmlu_rows(subject: str, split: Split, data: str | None = None) -> list[dict[str, Any]]:
    """Return a subject's rows in the hub's shape, each with an ``id`` and, as ``gold``, the index of the right choice.

    Args:
        subject: one of the 57.
        split: ``test``, or ``dev`` for the examples.
        data: a folder of local data; None takes ``STEERED_LM_DATA``, and the hub without one.

    Raises:
        UserError: when the folder, the file, the subject or a row is not as it should be.
    """
    if subject not in CATEGORY_OF:
        raise UserError(f"subject={subject!r} is none of MMLU's 57. {near_misses(subject, CATEGORY_OF)}")
    folder = data_folder(data)
    if folder is None:
        rows = hub_rows(HUB, subject, split)
    elif files := find_files(folder, _joint(split)):
        every = _read(files)
        rows = [row for row in every if row["subject"] == subject]
        if not rows:
            held = sorted({row["subject"] for row in every})
            raise UserError(
                f"{files[0]} has no questions about {subject!r}. It has {len(held)} of {len(CATEGORY_OF)} subjects: {', '.join(held)}. "
                "Add the missing ones, or choose among these."
            )
    else:
        files = find_files(folder, _single(subject, split))
        if not files:
            raise missing_file(folder, f"MMLU {split} questions about {subject!r}", [*_joint(split), *_single(subject, split)])
        rows = _read(files, subject)
    made = with_ids(rows, lambda row: {"subject": subject, "question": row["question"], "choices": row["choices"]})
    return [row | {"gold": row["answer"]} for row in made]


def upstream_context(row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return upstream's plain prompt: what it is about, examples with their letters, and the row's question; a letter follows after a space."""
    name = f"mmlu/default/mmlu_{row['subject']}.yaml"
    prompt = upstream_prompt(name)
    shots = "".join(f"{prompt(example)} {LETTERS[example['gold']]}\n\n" for example in examples)
    return f"{upstream_settings(name)['description']}{shots}{prompt(row)}"


def _joint(split: str) -> list[str]:
    return [f"{base}/{split}" for base in _BASES]


def _single(subject: str, split: str) -> list[str]:
    return [f"{base}/{subject}/{split}" for base in _BASES]


def _read(files: Iterable[Any], subject: str | None = None) -> list[dict[str, Any]]:
    """Return checked rows; files of one subject may leave its name out."""
    default = {} if subject is None else {"subject": subject}
    return [Row.parse(default | row, source=where).model_dump(mode="json") for path in files for where, row in read_rows(path)]
