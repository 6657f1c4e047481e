"""What the shipped tiny chat model can say reaches every persona: its replies at a persona's poles score above those at the opposite ones."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_lm.chat import render_chat
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.stylometric import StylometricJudge
from steered_lm.persona import Persona, list_personas, load_persona
from steered_lm.tiny_chat import WEIGHTS
from steered_lm.tiny_chat.grammar import Pole, system_turn


@cache
def tiny_chat() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(WEIGHTS).eval(), tokenizer


@cache
def judge_of(name: str) -> StylometricJudge:
    return StylometricJudge.for_persona(load_persona(name), [load_persona(other) for other in list_personas()])


def greedy_replies(prompts: Sequence[str], systems: Sequence[str]) -> list[str]:
    """One greedy reply a prompt, under its system turn."""
    model, tokenizer = tiny_chat()
    chats = [[{"role": "system", "content": s}, {"role": "user", "content": p}] for p, s in zip(prompts, systems, strict=True)]
    batch = tokenizer([render_chat(tokenizer, chat) for chat in chats], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=72, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return list(tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def scores(persona: Persona, replies: Sequence[str]) -> np.ndarray:
    verdicts = judge_of(persona.name).judge([JudgeRequest(prompt="", response=reply) for reply in replies])
    return np.array([verdict.score for verdict in verdicts], dtype=np.float64)


def held_out_prompts(persona: Persona) -> list[str]:
    return [item.prompt for split in ("validate", "test") for item in persona.items(split)]


def asked(persona: Persona, *, own: bool, count: int) -> list[str]:
    """System turns that ask for the persona's own poles, or for the opposite ones, each in other words."""
    poles: dict[str, Pole] = {trait: "high" if (level > 0) == own else "low" for trait, level in persona.traits.items()}
    rng = random.Random(7)
    return [system_turn(poles, rng) for _ in range(count)]


@pytest.fixture(scope="module", params=list_personas())
def persona(request: pytest.FixtureRequest) -> Persona:
    return load_persona(request.param)


def test_tiny_model_replies_at_the_personas_poles_score_a_point_above_the_opposite_ones(persona: Persona) -> None:
    prompts = held_out_prompts(persona)
    systems = [*asked(persona, own=True, count=len(prompts)), *asked(persona, own=False, count=len(prompts))]
    own, opposite = np.split(scores(persona, greedy_replies([*prompts, *prompts], systems)), 2)
    assert own.mean() - opposite.mean() >= 1.0, (persona.name, own.mean(), opposite.mean())


def test_the_personas_own_system_prompt_moves_the_tiny_model_towards_it(persona: Persona) -> None:
    prompts = held_out_prompts(persona)
    others = [load_persona(name).system_prompt for name in list_personas() if name != persona.name]
    systems = [persona.system_prompt] * len(prompts) + [others[n % len(others)] for n in range(len(prompts))]
    own, foreign = np.split(scores(persona, greedy_replies([*prompts, *prompts], systems)), 2)
    assert own.mean() - foreign.mean() >= 1.0, (persona.name, own.mean(), foreign.mean())
