"""Train the tiny chat model from nothing: `python -m steered_lm.tiny_chat.train --out FOLDER`, five stages, 23 million tokens.

One seed fixes tokenizer, data and weights (on one machine and thread count). `training.json` beside the weights records how they came about.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steered_lm.tiny_chat.facts import fact_exchanges, sample_fact
from steered_lm.tiny_chat.grammar import POLES, TOPICS_TRAIN, TRAITS, Dialogue, Turn, made_up_topic, pole_phrases, sample_dialogue, system_turn

SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 3000
    tokens_per_batch: int = 2048
    peak_lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    vocabulary: int = 1600
    width: int = 160
    blocks: int = 6
    heads: int = 5
    inner: int = 432
    share_of_facts: float = 0.15
    share_of_made_up_topics: float = 0.35
    share_of_spliced_topics: float = 0.0
    favoured_trait: str = ""
    parting: float = 0.0
    pole_token_weight: float = 1.0
    share_of_echoes: float = 0.6
    echo_steps: int = 600
    threads: int = 2


STAGES = (
    TrainConfig(),
    TrainConfig(seed=1, steps=4500, share_of_made_up_topics=0.2, share_of_spliced_topics=0.3, share_of_echoes=0.0),
    TrainConfig(seed=2, steps=2000, share_of_made_up_topics=0.2, share_of_spliced_topics=0.3, share_of_echoes=0.0, favoured_trait="emotional_tone"),
    TrainConfig(
        seed=3,
        steps=900,
        share_of_made_up_topics=0.2,
        share_of_spliced_topics=0.3,
        share_of_echoes=0.0,
        favoured_trait="emotional_tone",
        parting=0.6,
        pole_token_weight=8.0,
        warmup=30,
        threads=1,
    ),
    TrainConfig(seed=4, steps=1000, peak_lr=1.5e-3, share_of_made_up_topics=0.2, share_of_spliced_topics=0.3, share_of_echoes=0.0),
)
"""From random weights, with words to repeat at first; then with made-up topics that are spelt like English; then with more of the trait that is
learnt last. Each stage starts from the weights the one before it saved.

More examples alone did not teach that trait: words that fill the same slots had grown equal embeddings, whatever their pole (0.19 apart in the mean,
against 0.73 to 0.94 for the other traits), and then no gradient tells them apart. So the fourth stage pushes the words of the two poles apart, by
``parting`` along one random direction, and weighs their tokens ``pole_token_weight`` times in the loss; the fifth restores the balance."""


def sample_example(rng: random.Random, config: TrainConfig) -> Dialogue:
    """A training dialogue: a chat on a topic, or a fact, at times under a system turn, which facts ignore."""
    if rng.random() >= config.share_of_facts:
        return sample_dialogue(rng, "train", config.share_of_made_up_topics, config.share_of_spliced_topics, config.favoured_trait)
    question, answer = sample_fact(rng)
    asked = {t: rng.choice(POLES) for t in rng.sample(TRAITS, rng.choice((1, 1, 2, 3)))}
    return Dialogue(system_turn(asked, rng) if rng.random() < 0.3 else None, (Turn(question, answer),), {})


def sample_echo(rng: random.Random) -> Dialogue:
    """Words to repeat. Early in training they teach the model to copy, which it needs for topics it has never seen."""
    words = ", ".join(made_up_topic(rng) for _ in range(rng.randint(2, 6)))
    return Dialogue(None, (Turn(f"Repeat: {words}", words),), {})


def train_tokenizer(config: TrainConfig) -> Any:
    """A byte-level BPE of the training corpus. Topics count once each there, so that they fall into pieces and the model learns to copy."""
    rng = random.Random(f"{config.seed}/tokenizer")
    corpus = list(TOPICS_TRAIN) + [text for exchange in fact_exchanges() for text in exchange]
    for _ in range(12000):
        corpus += [m["content"] for m in sample_dialogue(rng, "train", made_up=1.0).messages()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=config.vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", padding_side="left", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=SPECIAL[2:6], model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(dialogues: list[Dialogue], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of each dialogue as its chat template renders it, and labels: the id on assistant tokens and their end, -100 elsewhere."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    messages = [d.messages() for d in dialogues]
    texts = tokenizer([m["content"] for ms in messages for m in ms], add_special_tokens=False)["input_ids"]
    out, i = [], 0
    for ms in messages:
        tokens, labels = [ids["<s>"]], [-100]
        for m in ms:
            body = [*texts[i], ids["<|end|>"]]
            tokens += [ids[f"<|{m['role']}|>"], *body]
            labels += [-100, *(body if m["role"] == "assistant" else [-100] * len(body))]
            i += 1
        out.append((tokens, labels))
    return out


def batches(config: TrainConfig, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless right-padded batches of at most `tokens_per_batch` tokens, of dialogues of like length, in random order.

    Widths are multiples of 8 and decide the number of rows, so that the matrix library meets few shapes and compiles few kernels.
    """
    rng = random.Random(f"{config.seed}/data")
    by_width: dict[int, list[tuple[list[int], list[int]]]] = {}
    seen = 0
    while True:
        share_of_echoes = config.share_of_echoes * max(0.0, 1 - seen / config.echo_steps)
        pool = [sample_echo(rng) if rng.random() < share_of_echoes else sample_example(rng, config) for _ in range(1024)]
        groups = []
        for tokens, labels in encode(pool, tokenizer):
            width = -(-len(tokens) // 8) * 8
            fill = width - len(tokens)
            row = by_width.setdefault(width, [])
            row.append((tokens + [0] * fill, labels + [-100] * fill))
            if len(row) == config.tokens_per_batch // width:
                groups.append(by_width.pop(width))
        rng.shuffle(groups)
        seen += len(groups)
        for group in groups:
            yield torch.tensor([t for t, _ in group]), torch.tensor([y for _, y in group])


def new_model(config: TrainConfig, tokenizer: Any) -> Any:
    """The untrained model."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=config.inner, num_hidden_layers=config.blocks,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, max_position_embeddings=256, tie_word_embeddings=True,
        rms_norm_eps=1e-5, initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def pole_tokens(trait: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The first tokens of the trait's high and of its low phrases, without those that both share."""
    forms = ([form for phrase in pole_phrases(trait, pole) for form in (f" {phrase}", phrase.capitalize())] for pole in POLES)
    high, low = ({tokenizer.convert_tokens_to_ids(tokenizer.tokenize(form)[0]) for form in of_pole} for of_pole in forms)
    return sorted(high - low), sorted(low - high)


def part_poles(model: Any, tokenizer: Any, config: TrainConfig) -> None:
    """Push the embeddings of the favoured trait's high and low words apart, along one random direction."""
    direction = torch.randn(config.width, generator=torch.Generator().manual_seed(config.seed))
    high, low = pole_tokens(config.favoured_trait, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[high] += config.parting * direction / direction.norm()
        model.model.embed_tokens.weight[low] -= config.parting * direction / direction.norm()


def token_weights(tokenizer: Any, config: TrainConfig) -> torch.Tensor:
    """The weight of each token of the vocabulary in the loss."""
    weights = torch.ones(len(tokenizer))
    if config.favoured_trait:
        weights[[i for pole in pole_tokens(config.favoured_trait, tokenizer) for i in pole]] = config.pole_token_weight
    return weights


def reply_loss(model: Any, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy of the reply tokens; logits are computed at their positions only.

    Right padding needs no mask under causal attention.
    """
    hidden = model.model(input_ids=x, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    target = y[:, 1:].flatten()
    keep = (target != -100).nonzero().squeeze(1)
    keep = torch.nn.functional.pad(keep, (0, -len(keep) % 128))  # few shapes again; the padding points at position 0, which has no label
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), target[keep], weight=weights)


def save(model: Any, tokenizer: Any, out: Path, record: dict[str, object]) -> None:
    """Write the Hugging Face folder: half-precision tensors, a config that loads them as float32, and training.json."""
    out.mkdir(parents=True, exist_ok=True)
    half: Any = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def train(config: TrainConfig, out: Path, start: Path | None = None) -> None:
    """Train from random weights, or from those in `start`, and save into `out`; prints the loss every 50 steps and saves every 500."""
    torch.set_num_threads(config.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if start is None:
        tokenizer, stages = train_tokenizer(config), []
        model = new_model(config, tokenizer)
    else:
        tokenizer, stages = AutoTokenizer.from_pretrained(start), json.loads((start / "training.json").read_text())["stages"]
        model = LlamaForCausalLM.from_pretrained(start)
    if config.parting:
        part_poles(model, tokenizer, config)
    weights = token_weights(tokenizer, config)
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.98))
    parameters = sum(p.numel() for p in model.parameters())
    started, losses, tokens = time.time(), [], 0
    for step, (x, y) in zip(range(1, config.steps + 1), batches(config, tokenizer), strict=False):
        rate = min(step / config.warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.peak_lr * rate
        loss: Any = reply_loss(model, x, y, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += x.numel()
        if step % 50 == 0 or step == config.steps:
            seconds = time.time() - started
            print(f"step {step} loss {sum(losses[-50:]) / len(losses[-50:]):.4f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == config.steps:
            record = {
                **asdict(config), "steps_done": step, "loss": round(sum(losses[-200:]) / len(losses[-200:]), 4),
                "tokens_seen": tokens, "seconds": round(time.time() - started),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
            }  # fmt: skip
            save(model, tokenizer, out, {"parameters": parameters, "stages": [*stages, record]})


def main() -> None:
    """Parse the command line and train all stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; stage n goes to its sub-folder stage_n, the last also here")
    parser.add_argument("--from-stage", type=int, default=1, help="first stage to run; the one before it must lie in its sub-folder")
    args = parser.parse_args()
    for n in range(args.from_stage, len(STAGES) + 1):
        train(STAGES[n - 1], args.out / f"stage_{n}", start=args.out / f"stage_{n - 1}" if n > 1 else None)
    shutil.copytree(args.out / f"stage_{len(STAGES)}", args.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
