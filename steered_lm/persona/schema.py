"""What a persona is: a card, conversations with the partner's lines, and the files that are built from them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from steered_lm.config import Config, content_hash
from steered_lm.persona.meter import TRAITS
from steered_lm.persona.split import SPLITS, Split, assign_splits, find_overlap, item_id

STUB_PROFILE = "profile generation failed"


class Turn(Config):
    """One line of a conversation, by the partner or by the persona."""

    speaker: Literal["partner", "persona"]
    text: str

    @field_validator("text")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("a turn is blank; leave it out or write its text")
        return text


class Conversation(Config):
    """A conversation in order; every line of the persona answers the partner's line right before it."""

    id: str = Field(min_length=1)
    turns: tuple[Turn, ...]

    @model_validator(mode="after")
    def _persona_answers(self) -> Self:
        for position, turn in enumerate(self.turns):
            if turn.speaker == "persona" and (position == 0 or self.turns[position - 1].speaker != "partner"):
                raise ValueError(f"turn {position} is the persona's without a partner's line right before it; join its lines or add the partner's")
        return self

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (partner's line, persona's answer), stripped of outer white space."""
        for partner, answer in zip(self.turns, self.turns[1:], strict=False):
            if answer.speaker == "persona":
                yield partner.text.strip(), answer.text.strip()


class Item(Config):
    """One evaluation item: ``prompt`` is the partner's line, ``reference`` the persona's own answer, ``item`` the hash of both."""

    item: str
    prompt: str
    reference: str


class PersonaCard(Config):
    """The content of ``persona.yaml``: what a person writes about a persona.

    Attributes:
        name: short name, also the folder's name for personas of ours.
        description: one paragraph.
        traits: the level on each of the five persona axes, -1 (low pole) to 1 (high pole).
        system_prompt: the system turn of the prompted-persona arm.
        licence: SPDX identifier of the conversations' licence.
    """

    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    traits: dict[str, float]
    system_prompt: str = Field(min_length=1)
    licence: str = Field(min_length=1)

    @field_validator("traits")
    @classmethod
    def _five_levels(cls, traits: dict[str, float]) -> dict[str, float]:
        if set(traits) != set(TRAITS):
            raise ValueError(f"traits must name exactly {', '.join(TRAITS)}; missing or unknown: {', '.join(sorted(set(traits) ^ set(TRAITS)))}")
        outside = {name: level for name, level in traits.items() if not -1 <= level <= 1}
        if outside:
            raise ValueError(f"levels must lie in [-1, 1], which {outside} do not")
        return {name: traits[name] for name in TRAITS}


class Features(Config):
    """The content of ``features.json``, measured on the persona's own utterances of the build split.

    Attributes:
        source_sha256: hash of the card and the conversations that it was built from.
        utterances: number of own utterances in all splits.
        splits: number of items by split.
        levels: mean trait-meter level by trait, -1 to 1; None where no utterance has a marker of the trait.
        style: mean style features (persona/style.py).
        favourite_words: the persona's most repeated words that mark no trait, most frequent first.
    """

    version: Literal[1] = 1
    source_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    utterances: int
    splits: dict[str, int]
    levels: dict[str, float | None]
    style: dict[str, float]
    favourite_words: tuple[str, ...] = ()


class Persona(PersonaCard):
    """A complete persona. Construction refuses one that nothing could be scored against."""

    conversations: tuple[Conversation, ...]
    profile: str
    features: Features
    samples: tuple[Item, ...]
    judge_prompt: str

    @model_validator(mode="after")
    def _complete(self) -> Self:
        reason = refusal(self.conversations) or profile_refusal(self.profile)
        if reason:
            raise ValueError(reason)
        return self

    def items(self, split: str) -> list[Item]:
        """Return the items of ``build``, ``tune``, ``validate`` or ``test``, in conversation order.

        Raises:
            ValueError: when there is no such split.
        """
        if split not in self._by_split:
            raise ValueError(f"split={split!r} does not exist. Allowed: {', '.join(SPLITS)}.")
        return list(self._by_split[split])

    def utterances(self, split: str) -> list[str]:
        """Return the persona's own utterances of one split."""
        return [item.reference for item in self.items(split)]

    @cached_property
    def _by_split(self) -> dict[str, tuple[Item, ...]]:
        return {name: tuple(items) for name, items in split_items(self.conversations).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of everything that can change a score: card, conversations, profile, samples, judge prompt."""
        return content_hash(self.model_dump(mode="json", exclude={"features"}))


def source_hash(card: PersonaCard, conversations: Sequence[Conversation]) -> str:
    """Return the hash of what a person writes; built files that carry another one are stale."""
    fields = card.model_dump(mode="json", include=set(PersonaCard.model_fields))
    return content_hash({"card": fields, "conversations": [c.model_dump(mode="json") for c in conversations]})


def split_items(conversations: Sequence[Conversation]) -> dict[Split, list[Item]]:
    """Return the items by split, each split in conversation order."""
    pairs = [pair for conversation in conversations for pair in conversation.pairs()]
    found: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for (prompt, reference), split in zip(pairs, assign_splits(pairs), strict=True):
        found[split].append(Item(item=item_id(prompt, reference), prompt=prompt, reference=reference))
    return found


def refusal(conversations: Sequence[Conversation]) -> str | None:
    """Return why nothing can be scored against these conversations, or None."""
    pairs = [pair for conversation in conversations for pair in conversation.pairs()]
    if not pairs:
        return "it has no own utterances, so there is nothing to score against; add conversations in which the persona answers its partner"
    repeated = sorted({c.id for c in conversations if sum(c.id == other.id for other in conversations) > 1})
    if repeated:
        return f"conversation ids repeat: {', '.join(repeated)}; give each conversation its own id"
    return find_overlap(pairs)


def profile_refusal(profile: str) -> str | None:
    """Return why a profile cannot be used (it is blank or a stub), or None."""
    if not profile.strip():
        return "its profile is blank"
    if STUB_PROFILE in profile.lower():
        return f"its profile is a stub ({profile.strip()[:60]!r})"
    return None
