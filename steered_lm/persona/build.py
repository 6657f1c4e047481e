"""From a persona's conversations to its profile, features, samples and judge prompt. Only the build split is read."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from steered_lm.config import write_atomic
from steered_lm.content import persona_dir
from steered_lm.errors import PersonaError
from steered_lm.persona.load import load_persona, read_source
from steered_lm.persona.meter import TRAITS, trait_levels
from steered_lm.persona.schema import Features, Item, Persona, PersonaCard, source_hash, split_items
from steered_lm.persona.style import FUNCTION_WORDS, style_features, words

SAMPLES = 8
_STRENGTH = ((0.75, "strongly"), (0.4, "clearly"), (0.15, "slightly"))


def build_persona(name_or_path: str | Path) -> Persona:
    """Write profile.txt, features.json, samples.json and judge_prompt.txt into a persona's folder and return the persona.

    Raises:
        PersonaError: when the folder is unknown, its card or conversations are malformed, or its build split is empty.
    """
    folder = persona_dir(str(name_or_path))
    card, conversations = read_source(folder)
    items = split_items(conversations)
    build = items["build"]
    if not build:
        raise PersonaError(f"persona {card.name!r} has too few own utterances: none falls into the build split. Write at least ten.")
    features = measure(build, source=source_hash(card, conversations), splits={split: len(found) for split, found in items.items()})
    profile = write_profile(card, features)
    samples = sorted(build, key=lambda item: item.item)[:SAMPLES]
    write_atomic(folder / "profile.txt", profile)
    write_atomic(folder / "samples.json", _pretty([sample.model_dump() for sample in samples]))
    write_atomic(folder / "judge_prompt.txt", write_judge_prompt(card, profile, samples))
    write_atomic(folder / "features.json", _pretty(features.model_dump(mode="json")))
    return load_persona(folder)


def measure(build: Sequence[Item], *, source: str, splits: dict[str, int]) -> Features:
    """Return the features of the build split's own utterances."""
    utterances = [item.reference for item in build]
    readings = [trait_levels(text) for text in utterances]
    styles = [style_features(text) for text in utterances]
    return Features(
        source_sha256=source,
        utterances=sum(splits.values()),
        splits=splits,
        levels={trait: _mean([level for reading in readings if (level := reading[trait]) is not None]) for trait in TRAITS},
        style={name: round(fmean(style[name] for style in styles), 4) for name in styles[0]},
        favourite_words=favourite_words(utterances),
    )


def favourite_words(utterances: Sequence[str], count: int = 8) -> tuple[str, ...]:
    """Return the words that most utterances share and that are neither function words nor marks of a trait."""
    shared = Counter(word for text in utterances for word in set(words(text)))
    plain = {word: n for word, n in shared.items() if n > 1 and len(word) > 3 and word not in FUNCTION_WORDS and not _marks_a_trait(word)}
    return tuple(sorted(plain, key=lambda word: (-plain[word], word))[:count])


def write_profile(card: PersonaCard, features: Features) -> str:
    """Return the profile: who it is, how it speaks on each trait (asked and measured level), how long, in which words."""
    lines = [f"{card.name}", "", card.description.strip(), "", "How this persona speaks (level from -1 to 1; measured on its own utterances):"]
    for trait in TRAITS:
        measured = features.levels[trait]
        reading = "not measurable" if measured is None else f"{measured:+.2f}"
        lines.append(f"- {_pole(trait, card.traits[trait])}: {trait} {card.traits[trait]:+.2f}, measured {reading}.")
    style = features.style
    lines += ["", f"A typical answer has {style['words']:.0f} words, {style['words_per_sentence']:.0f} to a sentence."]
    if features.favourite_words:
        lines.append(f"Recurring words: {', '.join(features.favourite_words)}.")
    return "\n".join(lines) + "\n"


def write_judge_prompt(card: PersonaCard, profile: str, samples: Sequence[Item]) -> str:
    """Return what a language-model judge is told about the persona; the judge's rubric adds the task, the scale and the answer's form."""
    examples = "\n\n".join(f"Partner: {sample.prompt}\n{card.name}: {sample.reference}" for sample in samples)
    return f"""{profile}
Things that this persona really said:

{examples}
"""


def _pole(trait: str, level: float) -> str:
    axis = _axes()[trait]
    strength = next((word for bound, word in _STRENGTH if abs(level) >= bound), None)
    if strength is None:
        return f"Neither {axis['high_pole']} nor {axis['low_pole']}"
    return f"{strength.capitalize()} {axis['high_pole'] if level > 0 else axis['low_pole']}"


@cache
def _axes() -> dict[str, Any]:
    axes: dict[str, Any] = yaml.safe_load(files("steered_lm.persona").joinpath("markers.yaml").read_text(encoding="utf-8"))
    return axes


def _marks_a_trait(word: str) -> bool:
    return any(word in marker.split() for axis in _axes().values() for marker in (*axis["high"], *axis["low"]))


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
