"""A tiny random chat model with its own tokenizer in a folder, requests for it, and judges without surprises."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from lm_eval.api.instance import Instance
from tiny_models import vectors_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from steered_lm.content import content_dir
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.steering.spec import SteeringSpec, VectorsRef

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K"
_TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>{% endfor %}"
TEMPLATE = _TURNS + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TASKS = content_dir("tasks")


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a byte-level tokenizer of 259 tokens that puts ``<s>`` in front."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    made.chat_template = template
    return made


def save_model(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """Write a random Llama of 3 blocks x 32 with the tokenizer, and return the folder."""
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=259,
        max_position_embeddings=192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def save_vectors(model_folder: Path, target: Path) -> Path:
    """Write random directions of ``formality`` and ``emotional_tone`` for every block of a model, and return the file."""
    model = hf.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return vectors_for(model, tuple(range(model.config.num_hidden_layers))).save(target)


def spec_of(vectors: Path, **settings: Any) -> SteeringSpec:
    """Return a spec that changes what a model writes."""
    return SteeringSpec(**{"vectors": VectorsRef.to(vectors), "weights": {"formality": 1.0}, "layers": (1,), "unit": "raw", "alpha": 4.0, **settings})


def scoring(pairs: Sequence[tuple[str, str]]) -> list[Instance]:
    """Return log-likelihood requests of (context, continuation)."""
    return [Instance("loglikelihood", {}, pair, 0, metadata=("t", i, 1)) for i, pair in enumerate(pairs)]


def rolling(texts: Sequence[str]) -> list[Instance]:
    """Return rolling log-likelihood requests."""
    return [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", i, 1)) for i, text in enumerate(texts)]


def writing(contexts: Sequence[str], **options: Any) -> list[Instance]:
    """Return greedy generation requests of 12 tokens."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": 12, **options}
    return [Instance("generate_until", {}, (context, dict(settings)), 0, metadata=("t", i, 1)) for i, context in enumerate(contexts)]


class LengthJudge:
    """Scores a response by its number of characters, 1 to 5; an empty one, and one that holds ``missing_on``, is missing."""

    name = "length"
    identity = "length/1"

    def __init__(self, missing_on: str | None = None) -> None:
        self.missing_on = missing_on
        self.calls: list[list[JudgeRequest]] = []

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.calls.append(list(requests))
        return [self._verdict(request.response) for request in requests]

    def _verdict(self, response: str) -> Verdict:
        if not response or (self.missing_on is not None and self.missing_on in response):
            return Verdict(missing="nothing to judge", judge=self.name)
        return Verdict(score=1.0 + 4.0 * (len(response) % 17) / 16, explanation=f"{len(response)} characters", judge=self.name)
