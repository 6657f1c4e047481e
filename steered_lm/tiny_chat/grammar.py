"""The tiny chat model's language: draws dialogues with a level on each trait, and reads replies back exactly.

A reply is one opening clause about the topic and two follow-up clauses, joined into two or three sentences. Every clause has one slot (or more)
for each of the five traits; a slot is filled from its high pole with probability equal to the trait's level, else from its low pole.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Pole = Literal["high", "low"]
Split = Literal["train", "held_out"]

TRAITS = ("self_other_focus", "formality", "relationship_distance", "narrative_mode", "emotional_tone")
CODES = dict(zip("SFDNT", TRAITS, strict=True))
UNASKED_LEVELS = (0.0, 0.5, 0.5, 1.0)
"""A trait nobody asked for has one of these levels, so that half of the replies mix its poles."""

_HERE = Path(__file__).parent
_LEXICON: dict[str, Any] = yaml.safe_load((_HERE / "lexicon.yaml").read_text("utf-8"))
_PROMPTS: dict[str, Any] = yaml.safe_load((_HERE / "prompts.yaml").read_text("utf-8"))
POLES: tuple[Pole, Pole] = ("high", "low")
_ONSETS = [*"bcdfghjklmnprstvwz", "br", "cl", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr"]
_VOWELS = [*"aeiou", "ai", "ea", "oo", "ou"]
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "nd", "ck", "ng"]
_FIELD = re.compile(r"\{([^}]+)\}")


def _split_list(text: str) -> tuple[str, ...]:
    return tuple(t.strip() for t in text.split(","))


TOPICS_TRAIN = _split_list(_PROMPTS["topics"]["train"])
TOPICS_HELD_OUT = _split_list(_PROMPTS["topics"]["held_out"])


@dataclass(frozen=True)
class Turn:
    """One question and its reply."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Dialogue:
    """A training example: an optional system turn and one or two exchanges; `asked` holds the poles the system turn asks for."""

    system: str | None
    turns: tuple[Turn, ...]
    asked: Mapping[str, Pole]

    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat messages."""
        out = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in self.turns:
            out += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
        return out


@dataclass(frozen=True)
class ParsedReply:
    """A well-formed reply: its topic and its level on each trait in [-1, 1], (high - low) / slots."""

    topic: str
    levels: dict[str, float]


def slot_phrases() -> Iterator[tuple[str, Pole, str]]:
    """Every (trait, pole, phrase) a reply's slots can hold."""
    for code, classes in _LEXICON["slots"].items():
        for poles in classes.values():
            for pole in ("high", "low"):
                for phrase in poles[pole]:
                    yield CODES[code], pole, phrase


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sample_reply(topic: str, levels: Mapping[str, float], rng: random.Random) -> str:
    """Draw a reply about `topic`; `levels` gives each trait's probability of the high pole, in [0, 1] (0.5 where missing)."""

    def fill(match: re.Match[str]) -> str:
        field = match[1]
        if field == "topic":
            return topic
        if field in _LEXICON["fillers"]:
            return str(rng.choice(_LEXICON["fillers"][field]))
        code, _, slot = field.partition(".")
        pole = "high" if rng.random() < levels.get(CODES[code], 0.5) else "low"
        return str(rng.choice(_LEXICON["slots"][code][slot][pole]))

    clauses = [rng.choice(_LEXICON["openings"]), *rng.sample(_LEXICON["followups"], 2)]
    joiners = [". ", ". "]
    if rng.random() < 0.5:
        joiners[rng.randrange(2)] = rng.choice(_LEXICON["joiners"][1:])
    text = _capital(_FIELD.sub(fill, clauses[0]))
    for joiner, clause in zip(joiners, clauses[1:], strict=True):
        filled = _FIELD.sub(fill, clause)
        text += joiner + (_capital(filled) if joiner == ". " else filled)
    return text + "."


@cache
def _clause_patterns(kind: str) -> tuple[tuple[re.Pattern[str], tuple[tuple[str, str], ...]], ...]:
    """One pattern a skeleton, with the (trait code, slot) of each of its groups; the topic is a named group."""
    out = []
    for skeleton in _LEXICON[kind]:
        fields: list[tuple[str, str]] = []

        def group(match: re.Match[str], fields: list[tuple[str, str]] = fields) -> str:
            field = match[1]
            if field == "topic":
                return r"(?P<topic>[^.,;?!]+?)"
            if field in _LEXICON["fillers"]:
                return "(?:" + "|".join(_LEXICON["fillers"][field]) + ")"
            code, _, slot = field.partition(".")
            fields.append((code, slot))
            phrases = [p for pole in ("high", "low") for p in _LEXICON["slots"][code][slot][pole]]
            return "(" + "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True)) + ")"

        out.append((re.compile(_FIELD.sub(group, skeleton) + r"(?=\. |; |, and |\.$)"), tuple(fields)))
    return tuple(out)


def _parse_clause(kind: str, clause: str, sentence_start: bool) -> tuple[str | None, list[tuple[str, bool]]] | None:
    for pattern, fields in _clause_patterns(kind):
        for text in {clause, clause[0].lower() + clause[1:]} if sentence_start else {clause}:
            match = pattern.match(text)
            if match is None or match.end() != len(text) - 1:
                continue
            groups = [g for i, g in enumerate(match.groups(), 1) if i != pattern.groupindex.get("topic")]
            marks = [(CODES[c], g in _LEXICON["slots"][c][s]["high"]) for (c, s), g in zip(fields, groups, strict=True)]
            return match.groupdict().get("topic"), marks
    return None


_TOPIC = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*(?: [^\W\d_]+(?:['-][^\W\d_]+)*){0,3}")


def parse(reply: str, topic: str | None = None) -> ParsedReply | None:
    """Read a reply back exactly; None when it is not a sentence of the language.

    Every slot must hold one of its own phrases, of either pole (the poles may differ from slot to slot: a narrative verb may follow an
    expository adverb). The topic must be `topic`; without it, any phrase of up to four words will do, so that whether a reply is well-formed and
    whether it spells its topic right are two questions.
    """
    text = reply.strip()
    if not text.endswith(".") or not text[0].isupper():
        return None
    parts = re.split(r"(\. |; |, and )", text[:-1])
    if len(parts) != 5 or (parts[1] != ". " and parts[3] != ". "):
        return None
    if any(j == ". " and not c[:1].isupper() for j, c in zip(parts[1::2], parts[2::2], strict=True)):
        return None
    marks: list[tuple[str, bool]] = []
    found = ""
    for i, clause in enumerate(parts[::2]):
        starts = i == 0 or parts[2 * i - 1] == ". "
        result = _parse_clause("openings" if i == 0 else "followups", clause + ".", starts) if clause else None
        if result is None:
            return None
        found = result[0] or found
        marks += result[1]
    if found.lower() != topic.lower() if topic is not None else _TOPIC.fullmatch(found.lower()) is None:
        return None
    return ParsedReply(found.lower() if topic is None else topic, {t: _level([high for code, high in marks if code == t]) for t in TRAITS})


def user_prompt(topic: str, rng: random.Random, split: Split = "train") -> str:
    """A question about `topic` in one of the split's phrasings."""
    return str(rng.choice(_PROMPTS["prompts"][split])).format(t=topic)


def system_turn(levels: Mapping[str, Pole], rng: random.Random, split: Split = "train") -> str:
    """A system turn that asks for the given poles in the split's words and in random order; `held_out` uses unseen frames and sentences."""
    traits = list(levels)
    rng.shuffle(traits)
    frames = _PROMPTS["frames"]
    sentences: list[str] = []
    if rng.random() < 0.15:
        sentences.append(rng.choice(_PROMPTS["noise"][split]))
    listed = traits[: rng.randint(2, len(traits))] if len(traits) > 1 and rng.random() < 0.5 else []
    if listed:
        keys = [rng.choice(_PROMPTS["wordings"][t][levels[t]]["adjectives"]) for t in listed]
        joined = ", ".join(keys[:-1]) + (" and " if rng.random() < 0.7 else ", ") + keys[-1]
        sentences.append(rng.choice(frames["several"][split]).format(ks=joined))
    for trait in traits[len(listed) :]:
        words = _PROMPTS["wordings"][trait][levels[trait]]
        if rng.random() < 0.45:
            key = rng.choice(words["adjectives"])
            sentence = rng.choice(frames["adjective"][split]).format(k=key)
            sentences.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence))
        else:
            phrase = rng.choice(words[split])
            sentences.append(rng.choice(frames["imperative"][split]).format(vp=phrase, Vp=_capital(phrase)))
    return " ".join(sentences)


def made_up_topic(rng: random.Random) -> str:
    """A topic that is no English word, so that the model learns to copy what it is asked about."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3))))
    if rng.random() < 0.3:
        return "the " + word + " " + rng.choice(TOPICS_TRAIN).removeprefix("the ")
    return ("the " if rng.random() < 0.7 else "") + word


def pole_phrases(trait: str, pole: Pole) -> list[str]:
    """All phrases of one pole of a trait, slot by slot."""
    code = next(c for c, name in CODES.items() if name == trait)
    return [str(phrase) for slot in _LEXICON["slots"][code].values() for phrase in slot[pole]]


def spliced_topic(rng: random.Random) -> str:
    """A topic spliced from the letters of two training topics ("the garbrary"): no word either, but with the spelling of English."""
    first, second = (rng.choice(TOPICS_TRAIN).removeprefix("the ") for _ in range(2))
    return ("the " if rng.random() < 0.7 else "") + first[: rng.randint(1, len(first))].strip() + second[rng.randint(0, len(second) - 1) :].strip()


def sample_topic(rng: random.Random, split: Split = "train", made_up: float = 0.0, spliced: float = 0.0) -> str:
    """A topic of the split; `made_up` and `spliced` are the shares of those kinds."""
    kind = rng.random()
    if kind < made_up:
        return made_up_topic(rng)
    if kind < made_up + spliced:
        return spliced_topic(rng)
    return rng.choice(TOPICS_TRAIN if split == "train" else TOPICS_HELD_OUT)


def sample_dialogue(rng: random.Random, split: Split = "train", made_up: float = 0.0, spliced: float = 0.0, favoured: str = "") -> Dialogue:
    """A dialogue about one or two topics.

    `made_up` and `spliced` are the shares of topics of those kinds; the trait `favoured` is asked for in two thirds of the dialogues or more.
    """
    asked: dict[str, Pole] = {}
    if rng.random() < 0.75:
        asked = {t: rng.choice(POLES) for t in rng.sample(TRAITS, rng.choice((1, 1, 1, 2, 2, 3, 4, 5)))}
    if favoured and rng.random() < 2 / 3:
        asked[favoured] = rng.choice(POLES)
    levels = {t: float(asked[t] == "high") if t in asked else rng.choice(UNASKED_LEVELS) for t in TRAITS}
    system = system_turn(asked, rng, split) if asked else None
    turns = []
    for _ in range(2 if rng.random() < 0.15 else 1):
        topic = sample_topic(rng, split, made_up, spliced)
        turns.append(Turn(user_prompt(topic, rng, split), sample_reply(topic, levels, rng)))
    return Dialogue(system, tuple(turns), asked)


def _level(marks: list[bool]) -> float:
    return (2 * sum(marks) - len(marks)) / len(marks)
