"""The shipped weights hold what the package promises of them: held-out wordings and topics, greedy, seeded."""

import json
import random
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from steered_lm.extract.build import ExtractConfig, build_vectors
from steered_lm.extract.contrast import load_contrast_set
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.tiny_chat import WEIGHTS, evaluate
from steered_lm.tiny_chat.facts import fact_exchanges
from steered_lm.tiny_chat.grammar import TOPICS_TRAIN, TRAITS, ParsedReply, parse, sample_dialogue, user_prompt
from steered_lm.tiny_chat.train import encode

BLOCK = 3
ALPHAS = (-0.5, -0.375, -0.25, -0.125, 0.0, 0.125, 0.25, 0.375, 0.5)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return evaluate.load()


@pytest.fixture(scope="module")
def vectors(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> VectorsRef:
    made = build_vectors(*loaded, [load_contrast_set(t) for t in TRAITS], [BLOCK], ExtractConfig(pairs=60, held_out_pairs=30))
    return VectorsRef.to(made.save(tmp_path_factory.mktemp("vectors") / "v.safetensors"))


@torch.no_grad()
def _steered(loaded: tuple[Any, Any], questions: list[evaluate.Question], specs: list[SteeringSpec], sample: bool) -> list[ParsedReply | None]:
    """Replies without a system turn, each question under each spec, spec by spec."""
    model, tokenizer = loaded
    texts = [tokenizer.apply_chat_template(q.messages, tokenize=False, add_generation_prompt=True) for q in questions] * len(specs)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False, return_token_type_ids=False)
    rows = [spec for spec in specs for _ in questions]
    with torch.random.fork_rng(), Steerer(model) as steerer, steerer.batch(rows, Layout.generation(batch["attention_mask"])):
        torch.manual_seed(0)
        tokens = model.generate(**batch, max_new_tokens=64, do_sample=sample, pad_token_id=tokenizer.pad_token_id)
    return [parse(text) for text in tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]


def _mean_levels(readings: list[ParsedReply | None], trait: str, groups: int) -> list[float]:
    size = len(readings) // groups
    levels = [[r.levels[trait] for r in readings[i * size : (i + 1) * size] if r is not None] for i in range(groups)]
    return [sum(found) / len(found) for found in levels]


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
def test_asked_levels_are_expressed_on_unseen_topics(loaded: tuple[Any, Any], traits_asked: int) -> None:
    report = evaluate.ask(*loaded, traits_asked=traits_asked, n=200, wordings="train")
    assert min(report.share_expressed.values()) >= 0.95, report
    assert report.well_formed >= 0.95
    assert report.on_topic >= 0.9


@pytest.mark.parametrize("traits_asked", [1, 3])
def test_asked_levels_are_expressed_in_wordings_never_trained_on_too(loaded: tuple[Any, Any], traits_asked: int) -> None:
    report = evaluate.ask(*loaded, traits_asked=traits_asked, n=200)
    shares = report.share_expressed.values()
    # one wording of the five for closeness ("talk as friends who always knew each other") is not understood
    assert sum(shares) / len(shares) >= 0.95, report
    assert min(shares) >= 0.85, report
    assert report.well_formed >= 0.95


def test_replies_without_a_system_turn_are_well_formed_and_on_topic(loaded: tuple[Any, Any]) -> None:
    questions = evaluate.plain_questions(100)
    replies = evaluate.greedy_replies(*loaded, [q.messages for q in questions])
    assert sum(parse(r) is not None for r in replies) >= 95
    assert sum(parse(r, q.topic) is not None for r, q in zip(replies, questions, strict=True)) >= 90


@pytest.mark.parametrize("trait", TRAITS)
def test_steering_alone_moves_each_trait_monotonically(loaded: tuple[Any, Any], vectors: VectorsRef, trait: str) -> None:
    specs = [SteeringSpec(vectors=vectors, weights={trait: 1.0}, layers=(BLOCK,), alpha=alpha) for alpha in ALPHAS]
    questions = evaluate.plain_questions(24, seed=5)
    # sampled: greedy replies jump from pole to pole, and a step function has too many ties for a rank correlation
    readings = _steered(loaded, questions, specs, sample=True)
    means = _mean_levels(readings, trait, len(ALPHAS))
    assert spearmanr(ALPHAS, means).statistic >= 0.9, means
    assert means[0] <= -0.6, means
    assert means[-1] >= 0.6, means
    assert sum(r is not None for r in readings) >= 0.9 * len(readings)


@pytest.mark.parametrize("trait", TRAITS)
def test_greedy_replies_go_from_pole_to_pole_and_stay_well_formed_up_to_six_tenths(loaded: tuple[Any, Any], vectors: VectorsRef, trait: str) -> None:
    alphas = (-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6)
    specs = [SteeringSpec(vectors=vectors, weights={trait: 1.0}, layers=(BLOCK,), alpha=alpha) for alpha in alphas]
    readings = _steered(loaded, evaluate.plain_questions(20, seed=6), specs, sample=False)
    means = _mean_levels(readings, trait, len(alphas))
    assert means == sorted(means)
    assert (means[0], means[-1]) == (-1.0, 1.0)
    assert sum(r is not None for r in readings) >= 0.95 * len(readings)


def test_all_five_traits_are_steered_at_once(loaded: tuple[Any, Any], vectors: VectorsRef) -> None:
    rng = random.Random(0)
    signs = [{trait: rng.choice((-1.0, 1.0)) for trait in TRAITS} for _ in range(8)]
    specs = [SteeringSpec(vectors=vectors, weights=weights, layers=(BLOCK,), alpha=0.3) for weights in signs]
    readings = _steered(loaded, evaluate.plain_questions(8, seed=7), specs, sample=False)
    assert sum(r is not None for r in readings) >= 0.9 * len(readings)
    hits = [r.levels[t] * signs[i // 8][t] > 0 for i, r in enumerate(readings) if r is not None for t in TRAITS]
    assert sum(hits) >= 0.8 * len(hits)


def test_the_contrast_sets_are_followed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for trait in TRAITS:
        pairs = load_contrast_set(trait).pairs("held_out", 24)
        for side, sign in (("pos", 1), ("neg", -1)):
            chats = [[{"role": "system", "content": getattr(p, side)}, {"role": "user", "content": str(p.question)}] for p in pairs]
            readings = [parse(r) for r in evaluate.greedy_replies(model, tokenizer, chats)]
            assert sum(r is not None and r.levels[trait] * sign > 0 for r in readings) >= 0.8 * len(pairs), (trait, side)


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
