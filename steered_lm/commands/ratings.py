"""``steered-lm judge sheet`` and ``ratings``: blinded sheets for people, and what they said, beside judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from steered_lm.commands.logs import saved_samples
from steered_lm.commands.options import (
    CacheFile,
    Description,
    JudgeOptions,
    KindName,
    PersonaName,
    RubricFile,
    TraitName,
    make_judges,
    make_question,
)
from steered_lm.commands.panel import JsonFile, WorstCount
from steered_lm.commands.tables import interval, number, show_agreement, table
from steered_lm.config import write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges.question import Question
from steered_lm.judges.verdicts import read_verdicts

if TYPE_CHECKING:
    from steered_lm.judges.sheets import Asked, SheetKey
    from steered_lm.judges.tally import RatingsReport

console = Console(emoji=False)


def sheet(
    arm: Annotated[
        list[str],
        typer.Option("--arm", help="name=file, once an arm: lm-eval's samples_*.jsonl, an Inspect log, or JSONL with prompt, response and id."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: for-raters/ with a page and a table a rater, and key.json, which stays with you.")],
    kind: KindName = "pairwise",
    persona: PersonaName = None,
    trait: TraitName = None,
    description: Description = None,
    rubric: RubricFile = None,
    items: Annotated[int | None, typer.Option(help="How many prompts are drawn; by default all.", min=1)] = None,
    raters: Annotated[int, typer.Option(help="How many sheets; all are of the same prompts, each in an order of its own.", min=1)] = 2,
    repeats: Annotated[float, typer.Option(help="Share of items shown twice, to see how steady a rater is.", min=0.0, max=0.5)] = 0.1,
    seed: Annotated[int, typer.Option(help="Decides the draw and every order.", min=0)] = 0,
    prompt_field: Annotated[str | None, typer.Option(help="Where prompts are, as for steered-lm judge rejudge.")] = None,
) -> None:
    """Write blinded sheets that people fill in offline: pairwise compares arms side by side (A/B or A/B/C), other kinds rate single responses."""
    from steered_lm.judges.sheets import KEY_FILE, RATERS_FOLDER, Asked, make_sheets, pair_samples, write_sheets

    if (out / KEY_FILE).exists():
        raise JudgeError(f"--out {str(out)!r} holds a key already, without which its ratings cannot be read. Name another folder.")
    asked = Asked.parse(
        {"kind": kind, "persona": persona, "trait": trait, "description": description, "rubric": None if rubric is None else str(rubric)},
        source="--kind",
        error=JudgeError,
    )
    question = _question(asked)
    found = pair_samples({name: saved_samples(path, prompt_field) for name, path in _arms(arm).items()})
    key = make_sheets(found.samples, question, asked, items=items, raters=raters, repeats=repeats, seed=seed)
    files = write_sheets(key, question, out)
    lines = (
        f"sheet {key.sheet}: {len(key.samples)} prompts, {len(key.sheets[0].items)} items a rater; "
        f"left out: {found.unpaired} that not every arm has, {found.empty} with an empty response",
        f"wrote {len(files)} files to {out / RATERS_FOLDER}, a page and a table a rater: send each rater one of them",
        f"key: {out / KEY_FILE}. It says which letter is which arm: keep it to yourself.",
        f"then: steered-lm judge ratings {out / KEY_FILE} ratings-{key.sheet}-*.json",
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def ratings(
    key: Annotated[Path, typer.Argument(help="The key.json that was written with the sheets.")],
    rated: Annotated[list[Path], typer.Argument(help="What raters saved: the page's JSON, or the filled-in CSV, one a rater.")],
    judge: Annotated[
        list[str], typer.Option("--judge", help="Ask this judge about the same, and show how far it agrees with people; again for more.")
    ] = [],  # noqa: B006 - typer's way to say none
    judge_option: JudgeOptions = [],  # noqa: B006
    verdicts: Annotated[list[Path], typer.Option("--verdicts", help="Take judges' verdicts on the same texts from files of judge rejudge.")] = [],  # noqa: B006
    cache: CacheFile = None,
    worst: WorstCount = 5,
    json_file: JsonFile = None,
) -> None:
    """Read people's ratings, unblind them, and show what they prefer, how steady they are, and how far they agree with each other and with judges."""
    from steered_lm.judges.ratings import read_ratings
    from steered_lm.judges.sheets import SheetKey, requests_of
    from steered_lm.judges.tally import judge_values, summarise

    known = SheetKey.load(key)
    read = [read_ratings(path, known) for path in rated]
    values: dict[str, Sequence[float | None]] = {}
    if judge:
        question = _question(known.asked)
        if question.digest != known.question:
            raise JudgeError(
                f"key {str(key)!r}: the persona or the rubric has changed since the sheets were made, so judges would be asked something else. "
                "Judge with the old one, and give --verdicts."
            )
        requests = list(requests_of(known).values())
        for one in make_judges(judge, question, judge_option, cache=cache):
            values[one.name] = judge_values(known, dict(zip(requests, one.judge(requests), strict=True)))
    if verdicts:
        found = read_verdicts(verdicts)
        for name, given in found.judges.items():
            if name in values:
                raise JudgeError(f"--judge and --verdicts both give {name}. Leave one out.")
            values[name] = judge_values(known, {found.requests[item]: verdict for item, verdict in given.items()})
            if all(value is None for value in values[name]):
                raise JudgeError(f"--verdicts: {name} has none on the sheet's texts. Give verdicts on the samples that the sheet was made from.")
    report = summarise(known, read, values)
    _show(known, report, worst)
    if json_file is not None:
        console.print(f"wrote {write_atomic(json_file, report.model_dump_json(indent=1) + chr(10))}", soft_wrap=True)


def _question(asked: "Asked") -> Question:
    rubric = None if asked.rubric is None else Path(asked.rubric)
    return make_question(asked.kind, persona=asked.persona, trait=asked.trait, description=asked.description, rubric=rubric)


def _arms(given: Sequence[str]) -> dict[str, Path]:
    """Return the arms' files by name."""
    found: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or not name.strip() or not path.strip():
            raise JudgeError(f"--arm {text!r} is not name=file. Write for example --arm steered=steered/samples.jsonl --arm unsteered=plain.jsonl.")
        if name.strip() in (*found, "tie"):
            raise JudgeError(f"--arm {text!r}: the name {name.strip()!r} is taken. Give each arm its own.")
        found[name.strip()] = Path(path.strip())
    return found


def _show(key: "SheetKey", report: "RatingsReport", worst: int) -> None:
    chance = number(report.chance)
    if key.scale is None:
        title = f"What {len(report.raters)} raters prefer, {report.prompts} prompts; chance is {chance}, which is what a tie counts"
    else:
        title = f"What {len(report.raters)} raters gave, {key.scale[0]} to {key.scale[1]}, {report.prompts} prompts"
    arms = table(title, ("arm",), ("wins" if key.scale is None else "mean", "95 % interval", "prompts"))
    for name, found in (report.wins or report.means).items():
        arms.add_row(escape(name), number(found.value), interval(found, arms), str(found.n))
    console.print(arms)
    if report.comparisons:
        differences = table("Differences on the same prompts", ("a", "b"), ("a - b", "95 % interval", "p", "p, corrected"))
        for pair in report.comparisons:
            d = pair.difference
            differences.add_row(escape(pair.a), escape(pair.b), number(d.mean), interval(d, differences), number(d.p_value), number(pair.p_adjusted))
        console.print(differences)
    columns = ("items", "missing", "declined", "repeats alike", "95 % interval", *(f"chose {letter}" for letter in report.places))
    raters = table("Raters", ("rater",), columns)
    for rater in report.raters:
        steady = (number(rater.consistency.value), interval(rater.consistency, raters))
        places = (number(place.value) for place in rater.places.values())
        raters.add_row(escape(rater.rater), str(rater.shown), str(rater.missing), str(rater.declined), *steady, *places)
    console.print(raters)
    for letter, place in report.places.items():
        low, high = number(place.low), number(place.high)
        biased = place.low is not None and place.high is not None and report.chance is not None and not place.low <= report.chance <= place.high
        console.print(
            f"place {letter} was chosen in {number(place.value)} of {place.n} answers that are no tie "
            f"({low} to {high}; {chance} without position bias){': raters lean to a place' if biased else ''}",
            highlight=False,
            soft_wrap=True,
        )
    if report.agreement is not None:
        show_agreement(console, report.agreement, "Agreement of raters", worst=worst, codes=report.codes)
    if report.with_judges is not None:
        show_agreement(console, report.with_judges, "People's joint answer and judges", worst=worst, codes=report.codes)
