"""What commands about judges have in common: which question is asked, of which judges, at what price."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from steered_lm.errors import JudgeError, near_misses
from steered_lm.judges import COMPUTED, make_judge
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import KINDS, Rubric
from steered_lm.persona.load import load_persona

if TYPE_CHECKING:
    from steered_lm.judges.base import Judge

JudgeNames = Annotated[
    list[str], typer.Option("--judge", help="stylometric, markers, openai:<model>, anthropic:<model>, hf:<model> or a panel's YAML file.")
]
JudgeOptions = Annotated[
    list[str], typer.Option("--judge-option", help="name=value for the judge's backend, such as base_url=http://localhost:8000/v1; again for more.")
]
KindName = Annotated[str, typer.Option("--kind", help=f"What is judged: {', '.join(KINDS)}.")]
PersonaName = Annotated[str | None, typer.Option("--persona", help="persona_fit and pairwise: a persona of ours, or a folder.")]
TraitName = Annotated[str | None, typer.Option("--trait", help="trait: a trait of ours, or any name with --description.")]
Description = Annotated[str | None, typer.Option("--description", help="trait: what it means, for the judge.")]
RubricFile = Annotated[Path | None, typer.Option("--rubric", help="A rubric file of your own in place of ours.")]
CacheFile = Annotated[Path | None, typer.Option("--cache", help="SQLite file that keeps verdicts: what is in it is not paid for again.")]


def make_question(kind: str, *, persona: str | None, trait: str | None, description: str | None, rubric: Path | None = None) -> Question:
    """Return the question that the options describe.

    Raises:
        JudgeError: when the kind is unknown, or lacks its persona or trait.
    """
    if kind not in KINDS:
        raise JudgeError(f"--kind {kind!r} is no kind of judgement. {near_misses(kind, KINDS)}")
    own = None if rubric is None else Rubric.load(rubric)
    chosen = own or Rubric.load(kind)
    if chosen.kind != kind:
        raise JudgeError(f"--rubric {str(rubric)!r} is for {chosen.kind!r}, and --kind is {kind!r}. Give the same kind.")
    if kind == "trait":
        if trait is None:
            raise JudgeError("--kind trait needs --trait, such as --trait humorous.")
        return Question.of_trait(trait, description, rubric=own)
    if chosen.subject is None:
        return Question(chosen)
    if persona is None:
        raise JudgeError(f"--kind {kind} needs --persona, such as --persona edmund.")
    return Question.of_persona(load_persona(persona), chosen.kind, rubric=own)


def parse_options(given: Sequence[str], flag: str = "--judge-option") -> dict[str, Any]:
    """Return ``name=value`` pairs with values read as YAML scalars; ``flag`` is what they were given by.

    Raises:
        JudgeError: when one is no pair or no YAML; its value is not shown, as it may be a key.
    """
    pairs = [text.partition("=") for text in given]
    found = {}
    for name, sign, value in pairs:
        if not sign or not name.strip().isidentifier():
            raise JudgeError(f"{flag} is not name=value. Write for example {flag} base_url=http://localhost:8000/v1.")
        if not value.strip():  # an unset shell variable must not become a budget without a limit
            raise JudgeError(f"{flag} {name.strip()}= has no value. Write one, or leave the option out.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the latter for dates that do not exist
            raise JudgeError(f"{flag} {name.strip()}: its value is no YAML scalar; it is not shown, as it may be a key.") from None
    return found


def make_judges(names: Sequence[str], question: Question, options: Sequence[str] = (), *, cache: Path | None = None) -> "list[Judge]":
    """Return the judges of a command; the options go to each of them that takes options, which is all but those that compute."""
    shared = parse_options(options)
    return [make_judge(name, question, cache=cache, **({} if name in COMPUTED else shared)) for name in names]
