"""Prompts and responses to pooled activations, recorded by our own hooks at block outputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steered_lm.engine import Engine, GenerationRow, Sampling
from steered_lm.engine.stops import decode, end_ids
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.vectors import Pooling, ResidualNorm


class Row(NamedTuple):
    """One text to run: the rendered prompt (with its special tokens) and the response that follows."""

    prompt: str
    response: str


class Activations(NamedTuple):
    """Pooled activations and token norms.

    Attributes:
        pooled: float32 ``[rows, d_model]`` by layer.
        norms: residual norms of every token by layer, as ``(prompt, response)``; response positions are those that predict a response
            token, as in a spec's ``positions``.
    """

    pooled: dict[int, Float[Tensor, "rows d_model"]]
    norms: dict[int, tuple[Float[Tensor, " n"], Float[Tensor, " m"]]]


@contextmanager
def recorded(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the output of some blocks at each forward pass, ``[batch, seq, d_model]`` by layer.

    ``output_hidden_states`` is no substitute: it shows unsteered values at hooked blocks, and its last entry is after the final norm.
    """
    store: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            store[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def collect(
    model: Any,
    tokenizer: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    pooling: Pooling,
    batch_size: int,
    tick: Callable[[int], None],
) -> Activations:
    """Run the rows teacher-forced and pool the blocks' outputs over each row's prompt or response.

    Args:
        model: a Hugging Face causal model.
        tokenizer: its tokenizer.
        blocks: its decoder blocks.
        rows: what to run, in any order; batches are made of rows of like length.
        layers: 0-indexed blocks whose output is read.
        pooling: ``response_mean``, ``prompt_mean`` or ``prompt_last``.
        batch_size: rows in one batch.
        tick: called with the number of rows done after each batch.
    """
    pooled: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    norms: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    for states in hidden_states(model, tokenizer, blocks, rows, layers, batch_size=batch_size, tick=tick):
        first = max(states.split - 1, 0)
        for layer, hidden in states.hidden.items():
            size = hidden.norm(dim=-1).cpu()
            norms[layer][0].append(size[:first])
            norms[layer][1].append(size[first:])
            pooled[layer][states.row] = _pool(hidden, states.split, pooling).cpu()
    return Activations(
        {layer: torch.stack(found) for layer, found in pooled.items()},
        {layer: (torch.cat(prompt), torch.cat(response)) for layer, (prompt, response) in norms.items()},
    )


class RowStates(NamedTuple):
    """The outputs of some blocks for one row.

    Attributes:
        row: its number.
        split: how many of its tokens are prompt.
        hidden: float32 ``[tokens, d_model]`` by layer, without padding.
    """

    row: int
    split: int
    hidden: dict[int, Float[Tensor, "tokens d_model"]]


@torch.inference_mode()
def hidden_states(
    model: Any,
    tokenizer: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    batch_size: int,
    tick: Callable[[int], None],
) -> Iterator[RowStates]:
    """Yield what the blocks put out for each row, run teacher-forced; rows of like length share a batch, so the order is theirs.

    The arguments are those of :func:`collect`.
    """
    encoded = [_encode(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
    for begin in range(0, len(rows), batch_size):
        chosen = order[begin : begin + batch_size]
        ids, mask = _pad([encoded[i][0] for i in chosen], model.device)
        with recorded(blocks, layers) as store:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        for place, i in enumerate(chosen):
            tokens, split = encoded[i]
            yield RowStates(i, split, {layer: store[layer][place, : len(tokens)].float() for layer in layers})
        tick(len(chosen))


def residual_norm(prompt: Float[Tensor, " n"], response: Float[Tensor, " m"]) -> ResidualNorm:
    """Return the median token norms; a part without tokens takes the median of all."""
    every = float(torch.cat([prompt, response]).median())
    return ResidualNorm(
        all=every, prompt=float(prompt.median()) if len(prompt) else every, response=float(response.median()) if len(response) else every
    )


def _encode(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    prompt = tokenizer(row.prompt, add_special_tokens=not row.prompt).input_ids
    return prompt + tokenizer(row.response, add_special_tokens=False).input_ids, len(prompt)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _pool(hidden: Float[Tensor, "seq d_model"], split: int, pooling: Pooling) -> Float[Tensor, " d_model"]:
    if pooling == "response_mean":
        return hidden[split:].mean(dim=0)
    return hidden[:split].mean(dim=0) if pooling == "prompt_mean" else hidden[split - 1]


def generate_responses(
    model: Any, tokenizer: Any, blocks: nn.ModuleList, prompts: Sequence[str], *, max_new_tokens: int, tick: Callable[[int], None]
) -> list[str]:
    """Return the model's greedy continuations of rendered prompts, in order, which end where the model's context ends.

    The engine runs as many at once as memory allows.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    checkpoint = model.generation_config
    sampling = Sampling(repetition_penalty=checkpoint.repetition_penalty or 1.0)
    encoded = [tuple(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    lengths = [max_new_tokens if most is None else min(max_new_tokens, max(most - len(tokens), 1)) for tokens in encoded]
    rows = [GenerationRow(tokens, length, sampling=sampling) for tokens, length in zip(encoded, lengths, strict=True)]
    with Steerer(model, blocks=blocks) as idle:
        engine = Engine(idle, tokenizer, end_ids=end_ids(checkpoint, tokenizer.eos_token_id))
        generated = engine.generate(rows, lambda number, reply: tick(1))
    return [decode(tokenizer, reply.tokens).strip() for reply in generated]
