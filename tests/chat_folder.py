"""A tiny random chat model with a tokenizer and a chat template of its own, in a folder."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_CORPUS = (
    "the quick brown fox jumps over the lazy dog while my sister reads letters and my brother cooks a very good soup. Pack twelve BIG jugs? Yes!"
)


def save_chat_model(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """Write the model and return its folder; its replies are nonsense in plain ASCII that depends on the prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([_CORPUS], trainers.BpeTrainer(vocab_size=120, special_tokens=_SPECIAL, show_progress=False))
    settings = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|end|>", "additional_special_tokens": _SPECIAL[3:]}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, clean_up_tokenization_spaces=False, **settings)
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(config)
    # what many published checkpoints carry: sampling by default, which an evaluation must not inherit
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
