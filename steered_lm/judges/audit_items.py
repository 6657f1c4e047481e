"""What a judge is audited on: items of known quality, broken ones, longer ones of equal quality, and pairs of a response with itself."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from steered_lm.config import Config
from steered_lm.content import content_dir
from steered_lm.errors import JudgeError
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.question import Question, trait_descriptions
from steered_lm.persona.load import list_personas, load_persona
from steered_lm.persona.schema import Item, Persona
from steered_lm.persona.style import words

Sort = Literal["high", "low", "shuffled", "repeated", "longer", "null"]
T = TypeVar("T")
_SPLITS = ("tune", "validate")  # build is what judges learn from and quote, test is touched once, by the run itself
_LEAST_DOUBLINGS = 0.25  # below, a text is hardly longer, and dividing by it would blow up the judge's noise


class AuditItem(Config):
    """One request whose place on the scale is known beforehand.

    Attributes:
        sort: ``high`` and ``low`` anchors (pairwise: ``high`` prefers the first response), ``shuffled`` and ``repeated`` words of a high one,
            ``longer`` than the item ``of`` at equal quality (pairwise: than its other response), ``null`` a response against itself.
        request: what is judged.
        of: position of the high item that a longer or broken one is made from.
        doublings: base-2 logarithm of how many times more words a longer one has.
    """

    sort: Sort
    request: JudgeRequest
    of: int | None = None
    doublings: float | None = None

    @property
    def retested(self) -> bool:
        """Whether it is judged several times: anchors, and of pairs also the close ones, where noise shows first."""
        return self.sort in ("high", "low") or (self.sort == "longer" and self.request.other is not None)


class Anchor(Config):
    """One line of an anchors file: a response that is high or low on the scale, and for high ones the same said at greater length."""

    prompt: str
    response: str = Field(min_length=1)
    level: Literal["high", "low"]
    longer: str | None = None
    references: tuple[str, ...] = ()
    false_references: tuple[str, ...] = ()

    def request(self, response: str | None = None) -> JudgeRequest:
        """Return the request with this response, or with another one to the same prompt."""
        return JudgeRequest(
            prompt=self.prompt,
            response=response or self.response,
            references=self.references,
            false_references=self.false_references,
        )


def audit_items(question: Question, *, count: int = 12, seed: int = 0, anchors: Path | None = None) -> list[AuditItem]:
    """Return what a judge of ``question`` is audited on.

    Persona questions take the persona's own held-out replies as high and other personas' replies as low; other questions take the anchors of
    ``tasks/rubrics/anchors/``.

    Args:
        question: what the judge is asked.
        count: most items of each sort; fewer where there are no more.
        seed: draws the items.
        anchors: an anchors file in place of ours.

    Raises:
        JudgeError: when ``count`` is below 2, or there are no anchors for the question, or too few.
    """
    if count < 2:
        raise JudgeError(f"items={count} of each sort tell nothing about a judge. Allowed: 2 or more, such as 12.")
    generator = np.random.default_rng(seed)
    if anchors is None and question.persona is not None:
        return _persona_items(question, question.persona, count, generator)
    if question.kind == "pairwise":
        raise JudgeError("anchors of a pairwise question come from its persona's conversations, and it has none. Name a persona.")
    return _anchor_items(load_anchors(anchors or _anchors_file(question)), count, generator)


def load_anchors(path: Path) -> list[Anchor]:
    """Return the anchors of a file, one JSON object a line.

    Raises:
        JudgeError: when it is missing or malformed, or holds fewer than two anchors of a level.
    """
    if not path.is_file():
        raise JudgeError(f"anchors file {str(path)!r} does not exist. Give a JSONL file with prompt, response and level (high or low) in each line.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
        except ValueError as problem:
            raise JudgeError(f"{path} line {number} is not JSON: {problem}. Write one anchor a line.") from problem
        found.append(Anchor.parse(data, source=f"{path} line {number}", error=JudgeError))
    for level in ("high", "low"):
        if sum(anchor.level == level for anchor in found) < 2:
            raise JudgeError(f"anchors file {str(path)!r} has fewer than two anchors of level {level!r}. Add some; six are a good start.")
    return found


def _anchors_file(question: Question) -> Path:
    name = question.about if question.kind == "trait" else question.kind
    file = content_dir("tasks") / "rubrics" / "anchors" / f"{name}.jsonl"
    if not file.is_file():
        ours = ", ".join(sorted(trait_descriptions()))
        raise JudgeError(
            f"there are no anchors of ours for {name!r}; ours are for {ours}. Give --anchors a JSONL file with prompt, response, level (high or low)."
        )
    return file


def _anchor_items(anchors: Sequence[Anchor], count: int, generator: np.random.Generator) -> list[AuditItem]:
    high, low = (_draw([a for a in anchors if a.level == level], count, generator) for level in ("high", "low"))
    items = [AuditItem(sort="high", request=a.request()) for a in high] + [AuditItem(sort="low", request=a.request()) for a in low]
    for position, anchor in enumerate(high):
        if anchor.longer is not None:
            items += _longer(anchor.request(anchor.longer), anchor.response, position)
    return items


def _persona_items(question: Question, persona: Persona, count: int, generator: np.random.Generator) -> list[AuditItem]:
    others = [other for name in list_personas() if (other := load_persona(name)).name != persona.name]
    own = _draw(_held_out(persona), count, generator)
    foreign = _draw([item for other in others for item in _held_out(other)], max(count, len(own)), generator)
    if len(own) < 2 or len(foreign) < 2:
        raise JudgeError(
            f"persona {persona.name!r} has {len(own)} replies in the splits tune and validate, and the others {len(foreign)}; an audit needs 2."
        )
    following = [own[(position + 1) % len(own)] for position in range(len(own))]
    joined = [f"{item.reference} {after.reference}" for item, after in zip(own, following, strict=True)]
    if question.kind == "pairwise":
        items = [AuditItem(sort="high", request=_request(item, other=other.reference)) for item, other in zip(own, foreign, strict=False)]
        for item, text in zip(own, joined, strict=True):
            items += _longer(_request(item, text, other=item.reference), item.reference)
        return items + [AuditItem(sort="null", request=_request(item, other=item.reference)) for item in own]
    items = [AuditItem(sort="high", request=_request(item)) for item in own]
    items += [AuditItem(sort="low", request=_request(item)) for item in foreign[:count]]
    for position, text in enumerate(joined):
        items += _longer(_request(own[position], text), own[position].reference, position)
    for position, item in enumerate(own[: max(2, count // 2)]):
        items.append(AuditItem(sort="shuffled", request=_request(item, _shuffled(item.reference, generator)), of=position))
        items.append(AuditItem(sort="repeated", request=_request(item, _repeated(item.reference)), of=position))
    return items


def _longer(request: JudgeRequest, than: str, of: int | None = None) -> list[AuditItem]:
    doublings = math.log2(max(len(words(request.response)), 1) / max(len(words(than)), 1))
    return [AuditItem(sort="longer", request=request, of=of, doublings=doublings)] if doublings >= _LEAST_DOUBLINGS else []


def _request(item: Item, response: str | None = None, other: str | None = None) -> JudgeRequest:
    return JudgeRequest(prompt=item.prompt, response=response or item.reference, other=other)


def _held_out(persona: Persona) -> list[Item]:
    return [item for split in _SPLITS for item in persona.items(split)]


def _draw(found: Sequence[T], count: int, generator: np.random.Generator) -> list[T]:
    chosen = generator.permutation(len(found))[:count]
    return [found[position] for position in chosen]


def _shuffled(text: str, generator: np.random.Generator) -> str:
    return " ".join(generator.permutation(text.split()))


def _repeated(text: str) -> str:
    parts = text.split()
    start = parts[:4]
    return " ".join(start * max(2, round(len(parts) / len(start))))
