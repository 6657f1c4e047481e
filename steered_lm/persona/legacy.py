"""Personas in two older folder layouts, read where they hold what a score needs and refused with the reason where they do not."""

import json
from pathlib import Path
from typing import Any

from steered_lm.errors import PersonaError
from steered_lm.persona.build import SAMPLES, measure, write_judge_prompt, write_profile
from steered_lm.persona.meter import TRAITS
from steered_lm.persona.schema import Conversation, Persona, PersonaCard, Turn, profile_refusal, source_hash, split_items
from steered_lm.persona.split import normalise

_TURN_FILES = ("train_turns.json", "test_turns.json")


def load_legacy(folder: str | Path, *, licence: str = "unknown") -> Persona:
    """Return a persona from the layout ``profile.json`` + ``train_turns.json`` + ``test_turns.json``.

    The partner's line is ``input``, the persona's answer ``ground_truth``. A line that repeats an earlier one is left out, so that no
    two splits share it. Trait levels are measured, for the layout holds none. The old train/test division is not kept: splits are by
    content hash, as for every persona.

    Raises:
        PersonaError: for the older layout (``raw_conversations.json``), which lacks the partner's lines, and for missing or malformed files.
    """
    path = Path(folder)
    if (path / "raw_conversations.json").is_file():
        raise PersonaError(f"legacy persona {str(path)!r} is refused: {_why_raw_is_refused(path)}")
    about = _read_object(path / "profile.json")
    conversations = _conversations(path)
    if not any(conversation.turns for conversation in conversations):
        raise PersonaError(f"legacy persona {str(path)!r} is refused: it has no own utterances in {' or '.join(_TURN_FILES)}.")
    return _assemble(str(about.get("persona_id") or path.name), about, conversations, licence)


def _assemble(name: str, about: dict[str, Any], conversations: tuple[Conversation, ...], licence: str) -> Persona:
    items = split_items(conversations)
    counts: dict[str, int] = {split: len(found) for split, found in items.items()}
    role, relationship = about.get("speaker_role", "a speaker"), about.get("relationship", "unknown")
    draft = PersonaCard(
        name=name,
        description=f"{role} in conversations of this relationship: {relationship}.",
        traits=dict.fromkeys(TRAITS, 0.0),
        system_prompt=f"You are the {role} in this relationship: {relationship}. Answer as this person would.",
        licence=licence,
    )
    if not items["build"]:
        raise PersonaError(
            f"legacy persona {name!r} is refused: {sum(counts.values())} own utterances are too few to divide; at least ten are needed."
        )
    levels = measure(items["build"], source="0" * 64, splits=counts).levels
    card = draft.model_copy(update={"traits": {trait: levels[trait] or 0.0 for trait in TRAITS}})
    features = measure(items["build"], source=source_hash(card, conversations), splits=counts)
    profile = write_profile(card, features)
    samples = tuple(sorted(items["build"], key=lambda item: item.item)[:SAMPLES])
    built = {"profile": profile, "features": features, "samples": samples, "judge_prompt": write_judge_prompt(card, profile, samples)}
    return Persona.parse({**card.model_dump(), "conversations": conversations, **built}, source=f"legacy persona {name!r}", error=PersonaError)


def _conversations(folder: Path) -> tuple[Conversation, ...]:
    sessions: dict[str, list[Turn]] = {}
    seen: set[str] = set()
    for name in _TURN_FILES:
        rows = _read_object(folder / name).get("turns")
        if not isinstance(rows, list):
            raise PersonaError(f"{folder / name} has no list 'turns'. Each turn needs: session, input, ground_truth.")
        for number, row in enumerate(rows):
            partner, answer = (_text(row, key, f"{folder / name} turn {number}") for key in ("input", "ground_truth"))
            marks = {"partner " + normalise(partner), "persona " + normalise(answer)}
            if not seen & marks:
                seen |= marks
                turns = sessions.setdefault(str(row.get("session", "")), [])
                turns += [Turn(speaker="partner", text=partner), Turn(speaker="persona", text=answer)]
    return tuple(Conversation(id=session or "session", turns=tuple(turns)) for session, turns in sessions.items())


def _text(row: Any, key: str, where: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise PersonaError(f"{where}: {key} must be a text that is not blank (got {value!r:.60}).")
    return value.strip()


def _why_raw_is_refused(folder: Path) -> str:
    raw = _read_json(folder / "raw_conversations.json")
    if not raw or (isinstance(raw, dict) and not raw.get("sessions")):
        return "raw_conversations.json is empty, so there are no own utterances to score against."
    profile = folder / "persona_profile.txt"
    stub = profile_refusal(profile.read_text(encoding="utf-8")) if profile.is_file() else "it has no persona_profile.txt"
    lines = "raw_conversations.json holds the persona's own lines only, under either role, so there are no prompts to evaluate on"
    advice = "Write persona.yaml and conversations.jsonl with the partner's lines, then run: steered-lm persona build <folder>"
    return f"{lines}{f', and {stub}' if stub else ''}. {advice}"


def _read_object(path: Path) -> dict[str, Any]:
    data = _read_json(path)
    if not isinstance(data, dict):
        raise PersonaError(f"{path} holds a {type(data).__name__}, not an object.")
    return data


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise PersonaError(f"file {str(path)!r} does not exist. A legacy persona folder holds profile.json, {', '.join(_TURN_FILES)}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise PersonaError(f"{path} is not JSON: {problem}") from problem
