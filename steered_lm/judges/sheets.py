"""Blinded rating sheets for people: a page and a table a rater, and the key that says which letter is which arm."""

import csv
import io
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field

from steered_lm.config import Config, content_hash, read_structured, write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Kind
from steered_lm.judges.samples import SavedSample

LETTERS = ("A", "B", "C")
TIE = "tie"
DECLINES = "declines"
"""What a rater writes of a response that declines to answer, where the rubric sets such responses apart."""
CONFIDENCE = ("a guess", "fairly sure", "certain")
"""What confidence 1, 2 and 3 mean."""
FORMAT = "steered-lm ratings"
KEY_FILE, RATERS_FOLDER = "key.json", "for-raters"
_BUTTONS = 10  # a scale with so many levels or fewer is rated by buttons
_HEADINGS: dict[Kind, str] = {
    "pairwise": "Which reply fits the persona better?",
    "persona_fit": "How well does the reply fit the persona?",
    "trait": "How strongly does the response show this trait: {about}?",
    "coherence": "How coherent is the response?",
    "truthful": "How truthful is the answer?",
    "informative": "How informative is the answer?",
    "instruction": "How well does the response follow the instruction?",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Asked(Config):
    """The question, as a command line asks it, so that judges can be asked the same one later."""

    kind: Kind
    persona: str | None = None
    trait: str | None = None
    description: str | None = None
    rubric: str | None = None


class Sample(Config):
    """One prompt and the response of each arm to it."""

    id: str
    prompt: str
    responses: dict[str, str]
    references: tuple[str, ...] = ()
    false_references: tuple[str, ...] = ()


class Shown(Config):
    """One item of a sheet.

    Attributes:
        item: the name that the sheet gives it, which says nothing.
        sample: number of the sample.
        arms: whose responses are shown, in the order of the letters; one arm where responses are rated alone.
        repeat: whether the same was shown before, to see whether the rater says the same again.
    """

    item: str
    sample: int
    arms: tuple[str, ...]
    repeat: bool = False


class RaterSheet(Config):
    """What one rater sees, in order."""

    rater: str
    items: tuple[Shown, ...]


class SheetKey(Config):
    """Everything about a set of sheets, letters and arms included; it stays with the researcher.

    Attributes:
        sheet: the set's name, a hash of its content.
        asked: what raters are asked.
        question: digest of the question, so that a rubric changed since is noticed.
        scale: lowest and highest rating; None where responses are compared.
        refusal: whether raters may say that a response declines to answer.
        arms: in the order given.
        seed: decided the draw and every order.
        samples: what is rated.
        sheets: one a rater.
    """

    format: Literal["steered-lm rating key"] = "steered-lm rating key"
    version: Literal[1] = 1
    sheet: str
    asked: Asked
    question: str
    scale: tuple[int, int] | None
    refusal: bool
    arms: tuple[str, ...] = Field(min_length=1)
    seed: int
    samples: tuple[Sample, ...] = Field(min_length=1)
    sheets: tuple[RaterSheet, ...] = Field(min_length=1)

    @classmethod
    def load(cls, path: Path) -> "SheetKey":
        """Read a key.

        Raises:
            JudgeError: when it is missing or none.
        """
        return cls.parse(read_structured(path, what="key ", error=JudgeError), source=f"key {str(path)!r}", error=JudgeError)

    @property
    def short(self) -> bool:
        """Whether ratings are on a scale of so few levels that each has a button."""
        return self.scale is not None and self.scale[1] - self.scale[0] < _BUTTONS

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters that raters choose from; none where responses are rated alone."""
        return LETTERS[: len(self.arms)] if self.scale is None else ()


class Paired(NamedTuple):
    """Samples that every arm has a response to, and how many were left out for lack of one."""

    samples: list[Sample]
    unpaired: int
    empty: int


def pair_samples(arms: Mapping[str, Sequence[SavedSample]]) -> Paired:
    """Return the prompts that every arm answered, by the samples' ids, or by their prompts where ids do not fit together.

    Raises:
        JudgeError: when neither pairs them.
    """
    by_id = {arm: {(s.id, s.repeat): s for s in samples} for arm, samples in arms.items()}
    by_prompt = {arm: {(s.request.prompt, 0): s for s in samples} for arm, samples in arms.items()}
    for pairing in (by_id, by_prompt):
        shared = [k for k in next(iter(pairing.values())) if all(k in found for found in pairing.values())]
        distinct = all(len(found) == len(arms[arm]) for arm, found in pairing.items())
        if shared and distinct and all(len({found[k].request.prompt for found in pairing.values()}) == 1 for k in shared):
            break
    else:
        raise JudgeError(
            f"the samples of {', '.join(arms)} do not fit together: neither their ids nor their prompts name the same items in each. "
            "Give files of the same task, or lines with the same id and prompt; --prompt-field chooses lm-eval's prompt."
        )
    paired = [_sample({arm: found[k] for arm, found in pairing.items()}) for k in shared]
    whole = [sample for sample in paired if all(response.strip() for response in sample.responses.values())]
    return Paired(whole, max(map(len, arms.values())) - len(shared), len(paired) - len(whole))


def _sample(found: Mapping[str, SavedSample]) -> Sample:
    first = next(iter(found.values()))
    return Sample(
        id=f"{first.id}#{first.repeat}" if first.repeat else first.id,
        prompt=first.request.prompt,
        responses={arm: s.request.response for arm, s in found.items()},
        references=first.request.references,
        false_references=first.request.false_references,
    )


def make_sheets(
    samples: Sequence[Sample],
    question: Question,
    asked: Asked,
    *,
    items: int | None = None,
    raters: int = 2,
    repeats: float = 0.1,
    seed: int,
) -> SheetKey:
    """Return sheets for raters, all of the same samples, each in an order of its own.

    Pairwise: each item shows one response of every arm, and every order of the arms comes up equally often, give or take one. Other kinds: each item
    shows one response alone. Repeats come from the first half of a sheet, and stand in its second half with the letters changed.

    Args:
        samples: each with the same arms.
        question: what raters are asked.
        asked: the same, in words of the command line.
        items: how many samples are drawn; None takes all.
        raters: how many sheets.
        repeats: the share of items that is shown twice, at most a half.
        seed: decides the draw and every order.

    Raises:
        JudgeError: when there are too few samples, or arms that cannot be compared.
    """
    if not samples:
        raise JudgeError("there is no sample with a response of every arm, so there is nothing to rate.")
    arms = tuple(samples[0].responses)
    compared = question.kind == "pairwise"
    if compared and not 2 <= len(arms) <= len(LETTERS):
        raise JudgeError(f"--arm names {len(arms)} arm(s) ({', '.join(arms)}); raters compare {len(LETTERS) - 1} or {len(LETTERS)}.")
    if items is not None and not 1 <= items <= len(samples):
        raise JudgeError(f"--items {items}: {len(samples)} samples have a response of every arm. Allowed: 1 to {len(samples)}.")
    if raters < 1 or not 0.0 <= repeats <= 0.5:
        raise JudgeError(f"--raters {raters} --repeats {repeats}: one rater or more, and at most half of the items (0.5) shown twice.")
    drawn = [samples[k] for k in sorted(random.Random(seed).sample(range(len(samples)), items or len(samples)))]
    facts = {"question": question.digest, "samples": [s.model_dump(mode="json") for s in drawn], "seed": seed, "raters": raters, "repeats": repeats}
    name = content_hash(facts)[:10]
    return SheetKey(
        sheet=name,
        asked=asked,
        question=question.digest,
        scale=question.rubric.scale,
        refusal=question.rubric.refusal is not None,
        arms=arms,
        seed=seed,
        samples=tuple(drawn),
        sheets=tuple(_rater_sheet(f"rater-{k + 1}", name, len(drawn), arms, compared, repeats, seed) for k in range(raters)),
    )


def _rater_sheet(rater: str, sheet: str, samples: int, arms: tuple[str, ...], compared: bool, repeats: float, seed: int) -> RaterSheet:
    rng = random.Random(f"{seed} {rater}")
    if compared:
        orders = list(permutations(arms))
        rng.shuffle(orders)  # which of them gets one more
        balanced = (orders * math.ceil(samples / len(orders)))[:samples]
        rng.shuffle(balanced)
        entries = list(enumerate(balanced))
    else:
        entries = [(sample, (arm,)) for sample in range(samples) for arm in arms]
    rng.shuffle(entries)
    half = len(entries) // 2
    again = rng.sample(entries[:half], min(half, round(repeats * len(entries))))
    shown = [(sample, order, False) for sample, order in entries]
    for sample, order in again:
        shown.insert(rng.randint(half, len(shown)), (sample, order[::-1], True))
    names = [content_hash([sheet, rater, number])[:8] for number in range(len(shown))]
    return RaterSheet(
        rater=rater, items=tuple(Shown(item=n, sample=s, arms=order, repeat=twice) for n, (s, order, twice) in zip(names, shown, strict=True))
    )


def requests_of(key: SheetKey) -> dict[str, JudgeRequest]:
    """Return what is rated, by the name that tables give it: pairs by sample, in the order of ``key.arms``; single responses by sample and arm.

    Raises:
        JudgeError: when three arms are compared, which no judge does.
    """
    if key.scale is None and len(key.arms) != 2:
        raise JudgeError("judges hold two responses against each other, and the sheet compares three arms. Give --verdicts of a kind with scores.")
    found = {}
    for sample in key.samples:
        shared = {"prompt": sample.prompt, "references": sample.references, "false_references": sample.false_references}
        if key.scale is None:
            found[sample.id] = JudgeRequest(response=sample.responses[key.arms[0]], other=sample.responses[key.arms[1]], **shared)
        else:
            found |= {item_name(sample, arm): JudgeRequest(response=sample.responses[arm], **shared) for arm in key.arms}
    return found


def item_name(sample: Sample, arm: str) -> str:
    """Return the name of one arm's response in tables."""
    return f"{sample.id} [{arm}]"


def write_sheets(key: SheetKey, question: Question, out: Path) -> list[Path]:
    """Write a page and a table for each rater into ``for-raters/``, and beside that folder the key; return the raters' files."""
    folder = out / RATERS_FOLDER
    files = []
    for sheet in key.sheets:
        name = f"sheet-{key.sheet}-{sheet.rater}"
        files += [
            write_atomic(folder / f"{name}.html", sheet_page(key, sheet, question)),
            write_atomic(folder / f"{name}.csv", sheet_table(key, sheet, question)),
        ]
    write_atomic(out / KEY_FILE, key.model_dump_json(indent=1) + "\n")
    return files


def sheet_page(key: SheetKey, sheet: RaterSheet, question: Question) -> str:
    """Return the page of one rater: no text of it says which arm is which, every text is escaped, and it may load nothing."""
    return (
        _environment()
        .get_template("sheet.html.j2")
        .render(sheet=_blinded(key, sheet, question), heading=_HEADINGS[question.kind].format(about=question.about))
    )


def sheet_table(key: SheetKey, sheet: RaterSheet, question: Question) -> str:
    """Return the same as CSV with empty columns to fill in; cells that a spreadsheet would take for a formula begin with an apostrophe."""
    blinded = _blinded(key, sheet, question)
    letters = list(blinded["letters"]) or ["response"]
    asked = ["choice", "confidence"] if blinded["letters"] else ["rating"]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\r\n")
    table.writerow(["sheet", "rater", "number", "item", blinded["prompt_label"], *letters, *asked, "comment"])
    for number, item in enumerate(blinded["items"], start=1):
        cells = [item["prompt"], *item["responses"]]
        table.writerow([key.sheet, sheet.rater, number, item["item"], *map(_cell, cells), *[""] * (len(asked) + 1)])
    return "\ufeff" + out.getvalue()  # with this mark spreadsheets read UTF-8


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _blinded(key: SheetKey, sheet: RaterSheet, question: Question) -> dict[str, Any]:
    """Return all that a rater may know."""
    rubric = question.rubric
    labels = {field: name.replace("_", " ") for name, field in rubric.shows.items()}
    items = []
    for shown in sheet.items:
        sample = key.samples[shown.sample]
        notes = {labels[f]: list(getattr(sample, f)) for f in ("references", "false_references") if f in labels and getattr(sample, f)}
        items.append({"item": shown.item, "prompt": sample.prompt, "responses": [sample.responses[arm] for arm in shown.arms], "notes": notes})
    return {
        "format": FORMAT,
        "sheet": key.sheet,
        "rater": sheet.rater,
        "letters": list(key.letters),
        "scale": list(key.scale) if key.scale else None,
        "buttons": key.short,
        "levels": {str(level): text.strip() for level, text in sorted(rubric.levels.items())},
        "declines": key.refusal,
        "confidence": list(CONFIDENCE),
        "prompt_label": labels.get("prompt", "prompt"),
        "instructions": people_instructions(rubric.instructions),
        "subject_label": rubric.subject or "",
        "subject": question.subject.strip(),
        "items": items,
    }


def people_instructions(text: str) -> list[str]:
    """Return a rubric's paragraphs without the one about JSON, which tells a model how its material comes."""
    return [paragraph.strip() for paragraph in text.split("\n\n") if "JSON" not in paragraph]


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
