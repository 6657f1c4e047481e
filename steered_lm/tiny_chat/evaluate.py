"""Measures how good the tiny chat model is: asked levels, topic fidelity, facts. Everything greedy, held-out wordings and topics, seeded."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_lm.tiny_chat import WEIGHTS
from steered_lm.tiny_chat.facts import knowledge_items, truth_items
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, TRAITS, ParsedReply, Pole, Split, parse, system_turn, user_prompt

Messages = list[dict[str, str]]


class Question(NamedTuple):
    """One question to the model: its messages, the topic asked about, and the poles its system turn asks for."""

    messages: Messages
    topic: str
    asked: Mapping[str, Pole]


class AskedReport(NamedTuple):
    """Outcome of asking by system turn."""

    share_expressed: dict[str, float]
    """Per trait, the share of replies whose level has the asked sign; a malformed reply counts as a miss."""
    well_formed: float
    on_topic: float
    """Share of replies that name the topic asked about, character by character."""
    replies: int


def load(path: str = str(WEIGHTS)) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, from a local folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


@torch.no_grad()
def greedy_replies(model: Any, tokenizer: Any, conversations: Sequence[Messages], batch_size: int = 256, max_new_tokens: int = 80) -> list[str]:
    """One greedy reply to each conversation, in order; batches are left-padded."""
    out: list[str] = []
    for start in range(0, len(conversations), batch_size):
        texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations[start : start + batch_size]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False, return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        out += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def plain_questions(n: int, seed: int = 0) -> list[Question]:
    """`n` held-out questions without a system turn."""
    rng = random.Random(f"{seed}/plain")
    topics = [rng.choice(TOPICS_HELD_OUT) for _ in range(n)]
    return [Question([{"role": "user", "content": user_prompt(t, rng, "held_out")}], t, {}) for t in topics]


def asked_questions(traits_asked: int, n: int, seed: int = 0, wordings: Split = "held_out") -> list[Question]:
    """`n` questions on held-out topics, under system turns in trained or held-out `wordings` that ask for `traits_asked` traits each, balanced."""
    rng = random.Random(f"{seed}/{traits_asked}")
    out = []
    poles: tuple[Pole, Pole] = ("high", "low")
    for i in range(n):
        others = [t for t in TRAITS if t != TRAITS[i % 5]]
        asked: dict[str, Pole] = {TRAITS[i % 5]: poles[i // 5 % 2], **{t: rng.choice(poles) for t in rng.sample(others, traits_asked - 1)}}
        topic = rng.choice(TOPICS_HELD_OUT)
        messages = [
            {"role": "system", "content": system_turn(asked, rng, wordings)},
            {"role": "user", "content": user_prompt(topic, rng, "held_out")},
        ]
        out.append(Question(messages, topic, asked))
    return out


def read_replies(replies: Sequence[str], questions: Sequence[Question]) -> list[ParsedReply | None]:
    """Each reply parsed, whatever topic it names."""
    return [parse(r, q.topic) or parse(r) for r, q in zip(replies, questions, strict=True)]


def ask(model: Any, tokenizer: Any, traits_asked: int, n: int = 200, seed: int = 0, wordings: Split = "held_out") -> AskedReport:
    """Ask for levels by system turn and count what the replies express."""
    questions = asked_questions(traits_asked, n, seed, wordings)
    replies = greedy_replies(model, tokenizer, [q.messages for q in questions])
    parsed = read_replies(replies, questions)
    hits: dict[str, list[bool]] = {t: [] for t in TRAITS}
    for question, reading in zip(questions, parsed, strict=True):
        for trait, pole in question.asked.items():
            hits[trait].append(reading is not None and (reading.levels[trait] > 0) == (pole == "high") and reading.levels[trait] != 0)
    return AskedReport(
        {t: sum(h) / len(h) for t, h in hits.items()},
        sum(p is not None for p in parsed) / n,
        sum(q.topic in r.lower() for q, r in zip(questions, replies, strict=True)) / n,
        n,
    )


@torch.no_grad()
def choice_log_probs(model: Any, tokenizer: Any, question: str, choices: Sequence[str]) -> list[float]:
    """Summed log-probability of each choice as the whole reply to `question` (the end of the turn is not counted)."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    n = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    rows = [tokenizer(prompt + c, add_special_tokens=False)["input_ids"] for c in choices]
    width = max(map(len, rows))
    ids = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
    logp = model(input_ids=ids).logits.log_softmax(-1)
    return [float(logp[i, range(n - 1, len(r) - 1), r[n:]].sum()) for i, r in enumerate(rows)]


def fact_accuracy(model: Any, tokenizer: Any) -> dict[str, float]:
    """Accuracy on the two multiple-choice sets, by summed log-probability of the choice text."""
    items = {
        "tiny_knowledge": [(i["question"], i["choices"], i["answer"]) for i in knowledge_items()],
        "tiny_truth": [(i["question"], i["mc1_targets"]["choices"], i["mc1_targets"]["labels"].index(1)) for i in truth_items()],
    }
    right = {}
    for name, rows in items.items():
        scores = [choice_log_probs(model, tokenizer, question, choices) for question, choices, _ in rows]
        right[name] = sum(s.index(max(s)) == gold for s, (_, _, gold) in zip(scores, rows, strict=True)) / len(rows)
    return right
