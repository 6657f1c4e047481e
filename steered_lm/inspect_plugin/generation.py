"""Rows that differ in everything, generated together: each has its own spec, length, stop sequences and random draws."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec

StopReason = Literal["stop", "max_tokens", "model_length"]


class Row(NamedTuple):
    """One reply to generate.

    Attributes:
        tokens: ids of the rendered prompt.
        spec: how the row is steered; None is the unsteered model.
        budget: most tokens to generate, and why it ends there.
        temperature: 0 takes the likeliest token at each step.
        top_p, top_k: what sampling is restricted to, applied after the temperature, top_k first; 1 and 0 are no restriction.
        seed: seeds the row's own generator; it is read when the temperature is above 0.
        stop: the reply ends before the first of these.
    """

    tokens: tuple[int, ...]
    spec: SteeringSpec | None
    budget: tuple[int, StopReason]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Reply(NamedTuple):
    """Text without the stop sequence, how many tokens were generated (the end token included), and why it ended."""

    text: str
    tokens: int
    reason: StopReason


class RowSampler(LogitsProcessor):
    """Leaves one token possible in each row that samples, drawn with the row's own generator.

    A reply therefore depends on its seed and not on what else is in the batch, and nothing draws from torch's global generator.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """Seed one generator a row."""
        self._rows = rows
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the scores with minus infinity for all tokens but the one drawn."""
        chosen = scores.clone()
        for index, row in enumerate(self._rows):
            if row.temperature > 0:
                chosen[index] = float("-inf")
                chosen[index, _draw(scores[index], row, self._generators[index])] = 0.0
        return chosen


def _draw(scores: Float[Tensor, " vocab"], row: Row, generator: torch.Generator) -> int:
    scaled = scores.double().cpu() / row.temperature
    values, order = scaled.sort(descending=True, stable=True)
    probabilities = values.softmax(dim=0)
    if 0 < row.top_k < len(probabilities):
        probabilities = probabilities[: row.top_k] / probabilities[: row.top_k].sum()
    ends = probabilities.cumsum(dim=0)
    kept = int((ends - probabilities < row.top_p).sum().clamp(min=1))
    point = torch.rand(1, generator=generator, dtype=torch.float64) * ends[kept - 1]
    return int(order[int(torch.searchsorted(ends[:kept], point, right=True).clamp(max=kept - 1))])


class RowEnds(StoppingCriteria):
    """Notes for each row at which token it ended and why; finished rows of a batch are padded on and cut afterwards."""

    def __init__(self, rows: Sequence[Row], tokenizer: Any, end_ids: Sequence[int], width: int) -> None:
        """Watch rows whose replies start at column ``width`` and end at any of ``end_ids``."""
        self._rows, self._tokenizer, self._end_ids, self._width = rows, tokenizer, frozenset(end_ids), width
        self.ends: list[tuple[int, StopReason] | None] = [None] * len(rows)

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: Any, **kwargs: Any) -> Bool[Tensor, " rows"]:
        """Return which rows have ended."""
        generated = input_ids[:, self._width :].tolist()
        for index, (row, tokens) in enumerate(zip(self._rows, generated, strict=True)):
            if self.ends[index] is None:
                reason = self._reason(row, tokens)
                self.ends[index] = (len(tokens), reason) if reason else None
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _reason(self, row: Row, tokens: list[int]) -> StopReason | None:
        if tokens[-1] in self._end_ids:
            return "stop"
        if row.stop:
            # a token stands for one byte at least, so a stop sequence lies within as many last tokens as it has bytes
            tail = tokens[-(max(len(s.encode()) for s in row.stop) + 4) :]
            if any(s in decode(self._tokenizer, tail) for s in row.stop):
                return "stop"
        return row.budget[1] if len(tokens) >= row.budget[0] else None


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the tokens' text without special tokens."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the ids that end a reply: the model's own generation config and the tokenizer both count."""
    config: Any = model.generation_config
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def neutral_config(model: nn.Module, tokenizer: Any) -> GenerationConfig:
    """Return the model's generation config without sampling defaults and lengths, which the rows decide; penalties stay."""
    config: Any = deepcopy(model.generation_config)
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    none: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "max_new_tokens", "min_length"))
    config.update(do_sample=False, num_beams=1, num_return_sequences=1, eos_token_id=ends or None, pad_token_id=pad, **none)
    assert isinstance(config, GenerationConfig)
    return config


def generate_rows(steerer: Steerer, tokenizer: Any, rows: Sequence[Row]) -> list[Reply]:
    """Return one reply a row; the model's generation config has to be the :func:`neutral_config`.

    Rows are padded on the left. In float32 the replies are those of one row at a time, for sampled rows too.
    """
    model: Any = steerer.model
    width = max(len(row.tokens) for row in rows)
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row.tokens)) + list(row.tokens) for row in rows])
    mask = torch.tensor([[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows])
    ends = RowEnds(rows, tokenizer, model.generation_config.eos_token_id or [], width)
    sampler = [RowSampler(rows)] if any(row.temperature > 0 for row in rows) else []
    with torch.inference_mode(), steerer.batch([row.spec for row in rows], Layout.generation(mask)):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(row.budget[0] for row in rows),
            logits_processor=LogitsProcessorList(sampler),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    generated = output[:, width:].tolist()
    return [_reply(row, tokens, end, tokenizer) for row, tokens, end in zip(rows, generated, ends.ends, strict=True)]


def _reply(row: Row, tokens: list[int], end: tuple[int, StopReason] | None, tokenizer: Any) -> Reply:
    length, reason = end or (len(tokens), row.budget[1])
    text = decode(tokenizer, tokens[:length])
    cuts = [text.index(s) for s in row.stop if s in text]
    return Reply(text[: min(cuts)] if cuts else text, length, reason)
