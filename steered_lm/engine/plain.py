"""The same rows and requests in ordinary batches, for models that the engine proper does not take."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steered_lm.engine.rows import Ended, Generated, GenerationRow, Scored, ScoreRequest
from steered_lm.engine.sampling import Sampler
from steered_lm.engine.stops import Stops
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer


class _Choice(LogitsProcessor):
    """Leaves one token possible in each row, chosen as the engine would, and notes rows whose scores are NaN."""

    def __init__(self, rows: Sequence[GenerationRow], vocabulary: int, device: torch.device) -> None:
        self._sampler, self._order = Sampler(rows, vocabulary, device), range(len(rows))
        self.broken = [False] * len(rows)

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        tokens, broken = self._sampler.choose(scores, self._order)
        self.broken = broken
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Notes at which token each row ended, and why; transformers pads finished rows on, which is cut off afterwards."""

    def __init__(self, rows: Sequence[GenerationRow], stops: Stops, choice: _Choice, width: int) -> None:
        self._rows, self._stops, self._choice, self._width = rows, stops, choice, width
        self.ends: list[tuple[int, Ended] | None] = [None] * len(rows)

    def __call__(self, input_ids: Int[Tensor, "rows width"], scores: Any, **kwargs: Any) -> Bool[Tensor, " rows"]:
        for number, (row, tokens) in enumerate(zip(self._rows, input_ids[:, self._width :].tolist(), strict=True)):
            if self.ends[number] is None:
                ended: Ended | None = "nan" if self._choice.broken[number] else self._stops.ended(row, tokens)
                self.ends[number] = (len(tokens), ended) if ended else None
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def generate_plain(steerer: Steerer, rows: Sequence[GenerationRow], stops: Stops, size: int, done: Callable[[int, Generated], None]) -> None:
    """Generate rows in batches of ``size`` by the model's own ``generate``, each row steered, sampled and stopped by itself."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        for number, generated in zip(numbers, _generate_batch(steerer, [rows[i] for i in numbers], stops), strict=True):
            done(number, generated)


def _generate_batch(steerer: Steerer, rows: Sequence[GenerationRow], stops: Stops) -> list[Generated]:
    model: Any = steerer.model
    width = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.tokens)) + list(row.tokens) for row in rows])
    mask = torch.tensor([[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows])
    choice = _Choice(rows, model.get_output_embeddings().weight.shape[0], model.device)
    ends = _Ends(rows, stops, choice, width)
    with steerer.batch([row.spec for row in rows], Layout.generation(mask)):
        # neutral settings: everything is decided by the rows
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(row.max_new_tokens for row in rows),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    found = []
    for tokens, end in zip(output[:, width:].tolist(), ends.ends, strict=True):
        length, ended = end or (len(tokens), "length")
        found.append(Generated(tuple(tokens[:length]), ended))
    return found


def score_plain(
    steerer: Steerer,
    requests: Sequence[ScoreRequest],
    max_length: int,
    size: int,
    softmax_dtype: torch.dtype | None,
    done: Callable[[Sequence[int], Sequence[Scored]], None],
) -> None:
    """Score requests in batches of ``size``, padded on the right, one row a request."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context) - len(requests[i].continuation))
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        done(numbers, _score_batch(steerer, [requests[i] for i in numbers], max_length, softmax_dtype))


def _score_batch(steerer: Steerer, requests: Sequence[ScoreRequest], max_length: int, softmax_dtype: torch.dtype | None) -> list[Scored]:
    model: Any = steerer.model
    texts = [(request.context + request.continuation)[-(max_length + 1) :] for request in requests]
    cuts = [len(r.context) + len(r.continuation) - len(text) for r, text in zip(requests, texts, strict=True)]
    width = max(map(len, texts)) - 1
    ids = torch.tensor([list(text[:-1]) + [0] * (width + 1 - len(text)) for text in texts]).to(model.device)
    mask = torch.tensor([[1] * (len(text) - 1) + [0] * (width + 1 - len(text)) for text in texts]).to(model.device)
    starts = [max(request.split - cut, 0) + 1 for request, cut in zip(requests, cuts, strict=True)]
    layout = Layout.scored(starts, [len(text) - 1 for text in texts], width=width)
    with steerer.batch([request.spec for request in requests], layout):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for scores, text, request in zip(logits, texts, requests, strict=True):
        end, size = len(text) - 1, len(request.continuation)
        part = scores[end - size : end]
        logs = part.log_softmax(dim=-1, dtype=softmax_dtype or torch.promote_types(part.dtype, torch.float32))
        targets = torch.tensor(request.continuation, device=part.device)
        value = logs.gather(-1, targets[:, None]).double().sum()
        found.append(Scored(float(value), bool((part.argmax(dim=-1) == targets).all())))
    return found
