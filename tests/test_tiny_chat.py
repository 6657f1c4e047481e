"""The shipped weights hold what the package promises of them: held-out wordings and topics, greedy, seeded."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from steered_lm.extract.contrast import load_contrast_set
from steered_lm.tiny_chat import WEIGHTS, evaluate
from steered_lm.tiny_chat.facts import fact_exchanges
from steered_lm.tiny_chat.grammar import TOPICS_TRAIN, TRAITS, parse, sample_dialogue, user_prompt
from steered_lm.tiny_chat.train import encode

BLOCK = 3
ALPHAS = (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(2)
    return evaluate.load()


@contextmanager
def _at_block(model: Any, edit: Any) -> Iterator[None]:
    """`edit` sees the block's output and returns its replacement, or None to leave it."""
    handle = model.model.layers[BLOCK].register_forward_hook(lambda _module, _args, out: edit(out))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _response_states(model: Any, tokenizer: Any, conversations: list[evaluate.Messages], replies: list[str]) -> list[torch.Tensor]:
    """The block's output on each reply's tokens, teacher-forced: [tokens d_model] each."""
    seen: list[torch.Tensor] = []
    out = []
    prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations]
    starts = [len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts]
    texts = [p + r for p, r in zip(prompts, replies, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    with _at_block(model, lambda h: seen.append(h)):
        model(input_ids=batch["input_ids"])
    for row, start, mask in zip(seen[0], starts, batch["attention_mask"], strict=True):
        out.append(row[start : int(mask.sum())])
    return out


@cache
def _vector(trait: str) -> tuple[torch.Tensor, float]:
    """Unit direction and median token norm, from matched pairs of the model's own replies under the contrast set's build split."""
    model, tokenizer = evaluate.load()
    pairs = load_contrast_set(trait).pairs("build", 48)
    means, norms = [], []
    for side in ("pos", "neg"):
        chats = [[{"role": "system", "content": getattr(p, side)}, {"role": "user", "content": str(p.question)}] for p in pairs]
        states = _response_states(model, tokenizer, chats, evaluate.greedy_replies(model, tokenizer, chats))
        means.append(torch.stack([s.mean(0) for s in states]))
        norms += [s.norm(dim=-1) for s in states]
    difference = means[0] - means[1]
    v = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return v * torch.sign(v @ difference.mean(0)), torch.cat(norms).median().item()


def _steered_replies(model: Any, tokenizer: Any, questions: list[evaluate.Question], shifts: torch.Tensor) -> list[str]:
    """Greedy replies, row i steered by `shifts[i]` on its last prompt token and on all that follow."""

    def edit(h: torch.Tensor) -> torch.Tensor:
        return torch.cat([h[:, :-1], h[:, -1:] + shifts[:, None]], 1)

    with _at_block(model, edit):
        return evaluate.greedy_replies(model, tokenizer, [q.messages for q in questions], batch_size=len(questions))


def test_the_folder_loads_offline_as_float32_and_is_small(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) <= 8 * 2**20
    assert model.config.architectures == ["LlamaForCausalLM"]
    for stage in json.loads((WEIGHTS / "training.json").read_text())["stages"]:
        assert stage["steps_done"] == stage["steps"]
        assert {"seed", "loss", "versions"} <= set(stage)
    assert tokenizer.decode([model.generation_config.eos_token_id]) == "<|end|>"


def test_training_sees_exactly_what_the_chat_template_renders(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for seed in range(20):
        dialogue = sample_dialogue(random.Random(seed))
        tokens, labels = encode([dialogue], tokenizer)[0]
        text = tokenizer.apply_chat_template(dialogue.messages(), tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens
        assert tokens.count(tokenizer.bos_token_id) == 1
        answers = "".join(t.assistant + "<|end|>" for t in dialogue.turns)
        assert tokenizer.decode([y for y in labels if y != -100]) == answers


@pytest.mark.parametrize("traits_asked", [1, 3])
def test_asked_levels_are_expressed(loaded: tuple[Any, Any], traits_asked: int) -> None:
    report = evaluate.ask(*loaded, traits_asked=traits_asked, n=200)
    assert min(report.share_expressed.values()) >= 0.95, report
    assert report.well_formed >= 0.95
    assert report.on_topic >= 0.9


def test_replies_without_a_system_turn_are_well_formed_and_on_topic(loaded: tuple[Any, Any]) -> None:
    questions = evaluate.plain_questions(100)
    replies = evaluate.greedy_replies(*loaded, [q.messages for q in questions])
    assert sum(parse(r, q.topic) is not None for r, q in zip(replies, questions, strict=True)) >= 90


@pytest.mark.parametrize("trait", TRAITS)
def test_steering_alone_moves_each_trait_monotonically(loaded: tuple[Any, Any], trait: str) -> None:
    model, tokenizer = loaded
    questions = evaluate.plain_questions(20, seed=5)
    direction, norm = _vector(trait)
    shifts = torch.cat([(alpha * norm * direction).repeat(len(questions), 1) for alpha in ALPHAS])
    readings = evaluate.read_replies(_steered_replies(model, tokenizer, questions * len(ALPHAS), shifts), questions * len(ALPHAS))
    means = []
    for i in range(len(ALPHAS)):
        levels = [r.levels[trait] for r in readings[i * len(questions) : (i + 1) * len(questions)] if r is not None]
        means.append(sum(levels) / len(levels))
    assert spearmanr(ALPHAS, means).statistic >= 0.9, means
    assert means[0] <= -0.6, means
    assert means[-1] >= 0.6, means
    assert sum(r is not None for r in readings) >= 0.9 * len(readings)


def test_the_contrast_sets_are_followed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for trait in TRAITS:
        pairs = load_contrast_set(trait).pairs("held_out", 24)
        for side, sign in (("pos", 1), ("neg", -1)):
            chats = [[{"role": "system", "content": getattr(p, side)}, {"role": "user", "content": str(p.question)}] for p in pairs]
            readings = [parse(r) for r in evaluate.greedy_replies(model, tokenizer, chats)]
            assert sum(r is not None and r.levels[trait] * sign > 0 for r in readings) >= 0.95 * len(pairs), (trait, side)


def test_facts_are_known_in_wordings_never_trained_on(loaded: tuple[Any, Any]) -> None:
    accuracy = evaluate.fact_accuracy(*loaded)
    assert min(accuracy.values()) >= 0.8, accuracy


def test_facts_are_answered_plainly(loaded: tuple[Any, Any]) -> None:
    exchanges = random.Random(0).sample(fact_exchanges(), 40)
    replies = evaluate.greedy_replies(*loaded, [[{"role": "user", "content": q[0].upper() + q[1:]}] for q, _ in exchanges])
    assert sum(r == a for r, (_, a) in zip(replies, exchanges, strict=True)) >= 36


def test_a_second_turn_follows_the_system_turn_too(loaded: tuple[Any, Any]) -> None:
    rng = random.Random(0)
    chats = []
    for _ in range(20):
        chat = [{"role": "system", "content": "Be cheerful."}, {"role": "user", "content": user_prompt(rng.choice(TOPICS_TRAIN), rng)}]
        chat.append({"role": "assistant", "content": evaluate.greedy_replies(*loaded, [chat])[0]})
        chats.append([*chat, {"role": "user", "content": "Tell me about the piano."}])
    readings = [parse(r, "the piano") for r in evaluate.greedy_replies(*loaded, chats)]
    assert sum(r is not None and r.levels["emotional_tone"] > 0 for r in readings) >= 19
