"""What the benchmarks run: random Llama shapes, prompts and texts, a tokenizer made at run time, steering specs."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.steering.vectors import ResidualNorm, TraitVectors, VectorsMeta, model_fingerprint
from steered_lm.tiny_chat.evaluate import load
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, TOPICS_TRAIN, user_prompt

# What is added, as a share of the residual stream's norm.
STRENGTH = 0.15
TRAITS = ("self_other_focus", "formality", "relationship_distance", "narrative_mode", "emotional_tone")

SYSTEM = (
    "You answer as yourself, warmly and to the point. Take two or three sentences, name one concrete example, and stay in the role you were given. "
)
INSTRUCTION = "Each question below has four choices, one of which is right. Give its letter.\n\n"
FORMS = (
    "What is the first thing that you would tell a beginner about {}?",
    "My sister and I disagree about {}, and it comes up at every family dinner. How would you settle it without taking a side?",
    "Describe {} to somebody who has never seen it.",
    "Do you like {}?",
    "Two colleagues of mine have stopped talking to each other because of {}; what should I say to them on Monday morning?",
    "Which mistake do most people make with {}, even after years of practice?",
    "Write a short note that invites a friend to talk about {}.",
    "Is {} worth the money and the time that it takes, if one is honest about it?",
)
TOPICS = (
    "growing tomatoes on a balcony", "old maps", "long train journeys", "baking bread at home", "keeping a diary", "repairing a bicycle",
    "winter swimming", "choir rehearsals", "moving to a small town", "second-hand furniture", "bird watching", "evening classes",
)  # fmt: skip


class Shape(NamedTuple):
    """A Llama shape and the block whose output is steered, at about 70 % of the depth."""

    width: int
    blocks: int
    heads: int
    key_heads: int
    hidden: int
    vocabulary: int
    layer: int


SHAPES = {
    "xs": Shape(256, 6, 4, 2, 704, 4096, 4),
    "s": Shape(512, 8, 8, 4, 1408, 8192, 5),
    "m": Shape(768, 12, 12, 4, 2048, 16384, 8),
}

TINY_CHAT = "tiny-chat"


def random_llama(size: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a random model that never stops early unless it is told how."""
    shape = SHAPES[size]
    config = hf.LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # larger than usual: with the usual one, random models repeat a token for ever
        initializer_range=0.06,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(config).eval().to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def end_tokens(size: str) -> list[int]:
    """Return a sixtieth of the vocabulary, so that rows end early here and there."""
    return list(range(200, 200 + SHAPES[size].vocabulary // 60))


class Words:
    """Made-up words, a few of them frequent and most of them rare, as in a language."""

    def __init__(self, seed: int = 0, size: int = 6000) -> None:
        lexicon, self._random = random.Random(0), random.Random(seed)
        syllables = [a + b + c for a, b, c in product(("b", "d", "f", "k", "l", "m", "n", "r", "sh", "t", "v"), "aeiou", ("", "l", "n", "s"))]
        made: dict[str, None] = {}
        while len(made) < size:
            # frequent words are short
            made["".join(lexicon.choices(syllables, k=lexicon.randint(1, 2 + 2 * len(made) // size)))] = None
        self._words = list(made)

    def text(self, low: int, high: int | None = None) -> str:
        """Return between ``low`` and ``high`` words."""
        count = self._random.randint(low, high or low)
        return " ".join(self._words[min(int(self._random.paretovariate(0.6)) - 1, len(self._words) - 1)] for _ in range(count))


def train_tokenizer(vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer that was trained on the prompts and on made-up text."""
    words = Words(seed=1)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    # answers such as " A" are one token, as in the tokenizers of real models
    made = [f"{INSTRUCTION}{words.text(300)}\nAnswer: {letter}\n\nQ: {words.text(9)}?\nA: {words.text(9)}." for letter in "ABCD" * 100]
    inner.train_from_iterator([*prompt_texts(len(FORMS) * len(TOPICS)), *made], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left")


def prompt_texts(count: int, *, common: bool = True) -> list[str]:
    """Return distinct prompts, at most 96: a system turn, the same for all, then a question; without ``common`` the question comes first."""
    questions = [FORMS[i % len(FORMS)].format(TOPICS[(i % len(FORMS) + i // len(FORMS)) % len(TOPICS)]) for i in range(count)]
    assert len(set(questions)) == count, "there are not so many distinct questions"
    return [f"<s>{SYSTEM}User: {question}\nAssistant:" if common else f"<s>{question}\n{SYSTEM}\nAssistant:" for question in questions]


def prompts(tokenizer: Any, count: int, *, common: bool = True) -> list[tuple[int, ...]]:
    """Return the prompts' tokens."""
    return encoded(tokenizer, prompt_texts(count, common=common))


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the tokens of texts that hold their own special tokens."""
    return [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def chat_texts(tokenizer: Any, count: int) -> list[str]:
    """Return distinct questions to the tiny chat model, at most 383, in its chat template, without a system turn: steering takes its place."""
    wordings = random.Random(0)
    topics = [*TOPICS_HELD_OUT, *TOPICS_TRAIN][:count]
    assert len(topics) == count, "there are not so many topics"
    chats = [[{"role": "user", "content": user_prompt(topic, wordings, "held_out")}] for topic in topics]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


class Subject(NamedTuple):
    """A model to measure, with what it is asked.

    Attributes:
        layer: the block whose output is steered.
        ends: tokens at which rows end early.
        texts: the first ``count`` of its prompts; the second argument says whether they begin alike.
    """

    model: Any
    tokenizer: Any
    layer: int
    ends: list[int]
    texts: Callable[[int, bool], list[str]]


def subject(size: str, dtype: torch.dtype = torch.float32) -> Subject:
    """Return a random Llama of that size, or the tiny chat model with its own tokenizer, chat template and end token."""
    if size != TINY_CHAT:
        tokenizer = train_tokenizer(SHAPES[size].vocabulary)
        return Subject(random_llama(size, dtype), tokenizer, SHAPES[size].layer, end_tokens(size), lambda n, common: prompt_texts(n, common=common))
    model, tokenizer = load()
    ends = [model.generation_config.eos_token_id]
    model.generation_config.eos_token_id = None
    # block 3 of 0-5 is the one that the demo steers
    return Subject(model.to(dtype), tokenizer, 3, ends, lambda n, common: chat_texts(tokenizer, n))


class Steering(NamedTuple):
    """Random candidates: their specs, and the vector that each adds at block ``layer``, for designs that are written by hand."""

    layer: int
    specs: list[SteeringSpec]
    vectors: list[Tensor]


def random_steering(model: Any, tokens: Sequence[int], layer: int, count: int, positions: str, folder: Path, seed: int = 0) -> Steering:
    """Return ``count`` mixtures of five orthonormal directions, each ``STRENGTH`` of the residual norm that ``tokens`` have at ``layer``."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    basis, _ = torch.linalg.qr(torch.randn(width, len(TRAITS), generator=generator))
    norm = float(_residual_norm(model, tokens, layer))
    meta = VectorsMeta(
        library_version="0",
        model_id="random",
        model_fingerprint=model_fingerprint(model),
        d_model=width,
        n_layers=model.config.num_hidden_layers,
        layers=(layer,),
        traits=TRAITS,
        method="random",
        pooling="response_mean",
        residual_norms={layer: ResidualNorm(all=norm, prompt=norm, response=norm)},
    )
    path = folder / f"vectors-{layer}-{seed}.safetensors"
    vectors = TraitVectors({(trait, layer): basis[:, i].contiguous() for i, trait in enumerate(TRAITS)}, meta)
    reference = VectorsRef.to(vectors.save(path))
    draws = torch.randn(count, len(TRAITS), generator=generator)
    draws = draws / draws.norm(dim=1, keepdim=True)
    specs = [
        SteeringSpec(
            vectors=reference, weights=dict(zip(TRAITS, row, strict=True)), layers=(layer,), alpha=STRENGTH, unit="residual", positions=positions
        )
        for row in draws.tolist()
    ]
    return Steering(layer, specs, list((STRENGTH * norm * draws @ basis.T).to(model.dtype)))


def _residual_norm(model: Any, tokens: Sequence[int], layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.inference_mode():
            model(torch.tensor([list(tokens)]))
    finally:
        handle.remove()
    return seen[0][0].float().norm(dim=-1).median()


class HandHook:
    """The few lines that people write: adds ``vector`` (``[d_model]`` or ``[rows, 1, d_model]``) at one block's output.

    With ``response`` only the last column of a prompt pass is steered, which is the last prompt token when the padding is on the left.
    """

    def __init__(self, model: Any, layer: int, positions: str) -> None:
        self.vector: Tensor | None = None
        self._response = positions == "response"
        self._handle = model.model.layers[layer].register_forward_hook(self._steer)

    def _steer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.vector is None:
            return None
        if not self._response or output.shape[1] == 1:
            return output + self.vector
        return torch.cat([output[:, :-1], output[:, -1:] + self.vector], dim=1)

    def close(self) -> None:
        self._handle.remove()

    @contextmanager
    def adding(self, vector: Tensor) -> Iterator[None]:
        """Add ``vector`` inside the ``with`` block."""
        self.vector = vector
        try:
            yield
        finally:
            self.vector = None
