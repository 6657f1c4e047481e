"""The tiny chat model's facts: training exchanges, and the items of the two small multiple-choice sets."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text("utf-8"))
    return facts


@cache
def fact_exchanges() -> tuple[tuple[str, str], ...]:
    """Every (question, answer) of training, before the wrappers; a fact's share does not depend on how many wordings it has."""
    out: list[tuple[str, str]] = []
    for relation in _facts()["knowledge"].values():
        out += [(wording.format(x=x), answer) for x, answer in relation["items"].items() for wording in relation["train"]]
    for item in _facts()["truth"]:
        out += [(q, item["true"]) for q in item["ask"] for _ in range(3)]
    return tuple(out)


def sample_fact(rng: random.Random) -> tuple[str, str]:
    """Draw a training question and its answer."""
    question, answer = rng.choice(fact_exchanges())
    return str(rng.choice(_facts()["wrappers"]["train"])).format(q=_capital(question)), answer


def knowledge_items(seed: int = 0) -> list[dict[str, Any]]:
    """Items in MMLU's shape: question (a wording never trained on), subject, four choices, index of the answer."""
    rng = random.Random(seed)
    out = []
    for subject, relation in _facts()["knowledge"].items():
        answers = sorted(set(relation["items"].values()))
        for x, answer in relation["items"].items():
            choices = [answer, *rng.sample([a for a in answers if a != answer], 3)]
            rng.shuffle(choices)
            out.append({"question": _capital(relation["test"].format(x=x)), "subject": subject, "choices": choices, "answer": choices.index(answer)})
    return out


def truth_items(seed: int = 0) -> list[dict[str, Any]]:
    """Items in TruthfulQA's mc1 shape, choices in a seeded order."""
    rng = random.Random(seed)
    out = []
    for item in _facts()["truth"]:
        choices = [item["true"], *item["false"]]
        rng.shuffle(choices)
        out.append({"question": item["test"], "mc1_targets": {"choices": choices, "labels": [int(c == item["true"]) for c in choices]}})
    return out


def write_items(tasks: Path) -> None:
    """Write `tiny_knowledge/items.jsonl` and `tiny_truth/items.jsonl` below `tasks`."""
    for name, items in (("tiny_knowledge", knowledge_items()), ("tiny_truth", truth_items())):
        path = tasks / name / "items.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), "utf-8")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
