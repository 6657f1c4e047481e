"""Persona folders read and checked: a persona comes back complete, or a sentence says what is wrong with its folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steered_lm.config import read_structured
from steered_lm.content import content_dir, persona_dir
from steered_lm.errors import PersonaError
from steered_lm.persona.schema import Conversation, Features, Persona, PersonaCard, profile_refusal, refusal, source_hash

BUILT_FILES = ("profile.txt", "features.json", "samples.json", "judge_prompt.txt")


def list_personas() -> list[str]:
    """Return the names of the personas that come with the package, sorted."""
    return sorted(folder.name for folder in content_dir("personas").iterdir() if (folder / "persona.yaml").is_file())


def load_persona(name_or_path: str | Path) -> Persona:
    """Return a complete persona, by the name of one of ours or by its folder.

    Raises:
        PersonaError: when it is unknown, malformed, has no own utterances, has no usable profile, shares a prompt or utterance between
            splits, or when its built files are missing or older than its conversations.
    """
    folder = persona_dir(str(name_or_path))
    card, conversations = read_source(folder)
    profile = _read_built(folder, "profile.txt")
    if reason := profile_refusal(profile):
        raise PersonaError(f"persona {card.name!r} is refused: {reason}. {_rebuild(folder)}")
    features = Features.parse(_built_json(folder, "features.json"), source=str(folder / "features.json"), error=PersonaError)
    if features.source_sha256 != source_hash(card, conversations):
        raise PersonaError(f"persona {card.name!r}: persona.yaml or conversations.jsonl changed since its files were built. {_rebuild(folder)}")
    data = card.model_dump() | {
        "conversations": conversations,
        "profile": profile,
        "features": features,
        "samples": _built_json(folder, "samples.json"),
        "judge_prompt": _read_built(folder, "judge_prompt.txt"),
    }
    return Persona.parse(data, source=f"persona {str(folder)!r}", error=PersonaError)


def read_source(folder: Path) -> tuple[PersonaCard, tuple[Conversation, ...]]:
    """Return the card and the conversations of a folder, the two files that a person writes.

    Raises:
        PersonaError: when one is missing or malformed, or the conversations hold nothing to score against.
    """
    card = PersonaCard.parse(read_structured(folder / "persona.yaml", error=PersonaError), source=str(folder / "persona.yaml"), error=PersonaError)
    conversations = tuple(_read_conversations(folder / "conversations.jsonl"))
    if reason := refusal(conversations):
        raise PersonaError(f"persona {card.name!r} is refused: {reason}. File: {folder / 'conversations.jsonl'}")
    return card, conversations


def _read_conversations(path: Path) -> Iterator[Conversation]:
    if not path.is_file():
        raise PersonaError(f"file {str(path)!r} does not exist. A persona needs conversations, one JSON object a line: id, turns.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise PersonaError(f"file {str(path)!r} is not UTF-8 text: {problem}. Save it as UTF-8.") from problem
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as problem:
            raise PersonaError(f"{path} line {number} is not JSON: {problem}. Write one conversation a line.") from problem
        yield Conversation.parse(data, source=f"{path} line {number}", error=PersonaError)


def _read_built(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file():
        raise PersonaError(f"persona folder {str(folder)!r} has no {name}, so it is not built. {_rebuild(folder)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise PersonaError(f"file {str(path)!r} is not UTF-8 text: {problem}. {_rebuild(folder)}") from problem


def _built_json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_read_built(folder, name))
    except json.JSONDecodeError as problem:
        raise PersonaError(f"{folder / name} is not JSON: {problem}. {_rebuild(folder)}") from problem


def _rebuild(folder: Path) -> str:
    return f"Run: steered-lm persona build {folder}"
