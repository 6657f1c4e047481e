"""A persona from one author's profile: their texts as answers to prompts that name what each text is about."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from steered_lm.config import write_atomic
from steered_lm.errors import PersonaError
from steered_lm.lamp.author import own_field
from steered_lm.lamp.rows import Row
from steered_lm.lamp.task import LampTask
from steered_lm.persona.build import build_persona, measure
from steered_lm.persona.meter import TRAITS
from steered_lm.persona.schema import Conversation, Persona, PersonaCard, Turn, refusal, split_items
from steered_lm.persona.split import normalise
from steered_lm.persona.style import FUNCTION_WORDS, words

LEAST = 10
"""Utterances without which a split would be empty."""
_TOPIC_WORDS = 3

# What the author is asked for; {about} is what the text is about, in its rarest words.
_PROMPTS = {
    "LaMP_1": 'Write the abstract of your paper with the title "{title}".',
    "LaMP_3": "Write a review with {score} of 5 stars. Mention: {about}.",
    "LaMP_4": "Write a headline for this article: {text}",
    "LaMP_5": "Write a title for the paper with this abstract: {abstract}",
    "LaMP_6": "Write a subject line for this email: {text}",
    "LaMP_7": "Write a tweet. Mention: {about}.",
}
_WHO = {
    "LaMP_1": "an author of scientific papers",
    "LaMP_3": "a writer of product reviews",
    "LaMP_4": "a writer of headlines",
    "LaMP_5": "an author of scientific papers",
    "LaMP_6": "a writer of emails",
    "LaMP_7": "a person who tweets",
}


def persona_from_profile(task: LampTask, row: Row, folder: str | Path, *, name: str | None = None, licence: str = "unknown") -> Persona:
    """Write a persona folder from a row's profile, build it, and return the persona.

    The author's own texts (LaMP_7: tweets; LaMP_4: headlines; LaMP_5: titles; …) are the utterances. Trait levels are measured on them, for
    nobody wrote them down. A text that repeats an earlier one, and one whose prompt would, is left out, so that no two splits share any; so
    is the row's own right answer. The row's question is not used: LaMP's item stays unseen.

    Args:
        task: the row's task.
        row: whose profile is used.
        folder: where to write ``persona.yaml``, ``conversations.jsonl`` and what is built from them.
        name: the persona's name; by default the task and the row's id.
        licence: the licence of the texts.

    Raises:
        PersonaError: when the folder holds a persona already, the task has no texts of the author's own (LaMP_2), or there are fewer than ten.
    """
    target, called = Path(folder), name or f"{task.name}-{row.id}"
    if (target / "persona.yaml").exists():
        raise PersonaError(f"folder {str(target)!r} holds a persona already. Name another one.")
    if own_field(task) is None:
        raise PersonaError(f"{task.name} profiles hold no text of their author's own, so there is no manner to imitate. Take another task.")
    pairs = list(_pairs(task, row))
    if len(pairs) < LEAST:
        raise PersonaError(
            f"row {row.id} of {task.name} has {len(pairs)} different texts by its author, and a persona needs {LEAST}. Take a longer profile."
        )
    turns = tuple(turn for prompt, text in pairs for turn in (Turn(speaker="partner", text=prompt), Turn(speaker="persona", text=text)))
    conversations = (Conversation(id=called, turns=turns),)
    assert refusal(conversations) is None, "pairs are unlike each other"
    write_atomic(target / "conversations.jsonl", "".join(json.dumps(c.model_dump(), ensure_ascii=False) + "\n" for c in conversations))
    card = _card(task, called, conversations, licence).model_dump()
    write_atomic(target / "persona.yaml", yaml.safe_dump(card, allow_unicode=True, sort_keys=False, width=120))
    return build_persona(target)


def _pairs(task: LampTask, row: Row) -> Iterator[tuple[str, str]]:
    """Yield (prompt, own text) of a profile, each prompt and each text once."""
    field = own_field(task)
    assert field is not None
    shared = Counter(word for item in row.profile for word in set(_content_words(str(item[field]))))
    prompts, texts = set[str](), {normalise(row.output)}
    for item in row.profile:
        text = str(item[field]).strip()
        prompt = _prompt(task, item, text, shared)
        marks = normalise(prompt), normalise(text)
        if prompt and marks[1] and marks[0] not in prompts and marks[1] not in texts:
            prompts.add(marks[0])
            texts.add(marks[1])
            yield prompt, text


def _prompt(task: LampTask, item: Mapping[str, Any], text: str, shared: Mapping[str, int]) -> str:
    """Return the prompt of a text; empty when it has no word that says what it is about."""
    found = list(dict.fromkeys(_content_words(text)))
    rarest = set(sorted(found, key=lambda word: (shared[word], -len(word), word))[:_TOPIC_WORDS])
    about = ", ".join(word for word in found if word in rarest)
    pattern = _PROMPTS[task.name]
    if "{about}" in pattern and not about:
        return ""
    return pattern.format_map({**item, "about": about})


def _content_words(text: str) -> list[str]:
    return [word for word in words(text) if len(word) > 3 and word not in FUNCTION_WORDS]


def _card(task: LampTask, name: str, conversations: tuple[Conversation, ...], licence: str) -> PersonaCard:
    items = split_items(conversations)
    levels = measure(items["build"], source="0" * 64, splits={split: len(found) for split, found in items.items()}).levels
    samples = "\n".join(f"- {item.reference}" for item in items["build"][:4])
    return PersonaCard(
        name=name,
        description=f"{_WHO[task.name].capitalize()}, from a {task.name} profile. Trait levels are measured.",
        traits={trait: levels[trait] or 0.0 for trait in TRAITS},
        system_prompt=f"You are {_WHO[task.name]}. Write as in these texts of yours:\n{samples}",
        licence=licence,
    )
