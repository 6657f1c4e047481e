"""Small training sets in the tiny chat model's language, and requests to train on them."""

import json
import random
from pathlib import Path
from typing import Any

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.tiny_chat.grammar import sample_dialogue, sample_reply, user_prompt
from steered_lm.trait_models.backend import TrainRequest
from steered_lm.trait_models.experiment import Hyperparameters


def conversations(count: int, *, seed: int = 0, formality: float | None = None) -> list[list[dict[str, str]]]:
    """Return dialogues with and without system turns, of one and two exchanges; with ``formality`` single ones at that level."""
    rng = random.Random(seed)
    if formality is None:
        return [sample_dialogue(rng).messages() for _ in range(count)]
    topics = [f"the {word}" for word in ("garden", "river", "kitchen", "library", "market")]
    made = [(rng.choice(topics), rng) for _ in range(count)]
    return [
        [{"role": "user", "content": user_prompt(t, r)}, {"role": "assistant", "content": sample_reply(t, {"formality": formality}, r)}]
        for t, r in made
    ]


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    """Write conversations as JSON lines."""
    path = folder / name
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def request_for(data: Path, **settings: Any) -> TrainRequest:
    """Return a request to train the tiny chat model; hyperparameters and the request's own settings are told apart by name."""
    hyper = {key: settings.pop(key) for key in tuple(settings) if key in Hyperparameters.model_fields}
    hyperparameters = Hyperparameters(**{"learning_rate": 5e-3, "lora_rank": 4, "batch_size": 4, **hyper})
    fields = {"name": "m", "base_model": TINY_CHAT, "data_hash": file_hash(data), **settings}
    return TrainRequest(data=data, hyperparameters=hyperparameters, **fields)
