"""How far responses, and the prompts before them, lie along trait vectors: monitoring, and the screening of training data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.extract.activations import Row, generate_responses, hidden_states
from steered_lm.stats import Estimate, PairedDifference, mean_interval, paired_difference
from steered_lm.steering.vectors import TraitVectors


class Projections(Config):
    """Scalar projections of rows on one trait's unit direction at one layer; None where there is nothing to project.

    Attributes:
        trait, layer: the direction.
        norm: the median norm of the residual stream at response positions; a value divided by it is in units of that norm, like a spec's alpha.
        response: per row, the mean over the response's tokens of ``<h_t, v>`` at the block's output; None for an empty response.
        prompt_last: per row, ``<h_t, v>`` at the last prompt token, from which the response starts; None without a prompt.
        own: per row, as ``response`` for the model's own response to the same prompt; empty when that was not asked for.
    """

    trait: str
    layer: int
    norm: float
    response: tuple[float | None, ...]
    prompt_last: tuple[float | None, ...]
    own: tuple[float | None, ...] = ()

    @property
    def difference(self) -> tuple[float | None, ...]:
        """Per row, ``response - own``, the projection difference of Persona Vectors (Chen et al. 2025, arXiv:2507.21509, section 6).

        Positive where training on the row would pull the model towards the trait.
        """
        pairs = zip(self.response, self.own, strict=True) if self.own else []
        return tuple(None if mine is None or its is None else mine - its for mine, its in pairs)

    def estimate(self, *, confidence: float = 0.95) -> Estimate:
        """Return the mean projection of the responses with its interval over rows."""
        return mean_interval(self.response, confidence=confidence)

    def mean_difference(self, *, confidence: float = 0.95, seed: int = 0) -> PairedDifference:
        """Return the mean projection difference with its interval, paired by row.

        Raises:
            ValueError: when the model's own responses were not projected.
        """
        if not self.own:
            raise ValueError("own is empty: project the model's own responses as well (own=True).")
        return paired_difference(self.response, self.own, confidence=confidence, seed=seed)


class Projected(NamedTuple):
    """Projections by trait and layer, in the order of the vectors file, and the model's own responses where they were asked for."""

    projections: list[Projections]
    own_responses: list[str]


def project(
    model: Any,
    tokenizer: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Row],
    vectors: TraitVectors,
    *,
    traits: Sequence[str] = (),
    layers: Sequence[int] = (),
    own: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Projected:
    """Return where rows lie on trait vectors; the model runs unsteered, and once for all vectors.

    Args:
        model: the model that the vectors were built for, or that is monitored in its place.
        tokenizer: its tokenizer.
        blocks: its decoder blocks.
        rows: rendered prompts with their responses.
        vectors: the trait vectors.
        traits: some of their traits; empty takes all.
        layers: some of their layers; empty takes all.
        own: let the model answer each prompt greedily and project that, too.
        max_new_tokens: longest own response.
        batch_size: rows in one pass.
        progress: called with (what, done, total).

    Raises:
        VectorsError: when the vectors lack a trait or a layer.
        UserError: when a row has more tokens than the model takes.
    """
    _refuse_long(model, tokenizer, rows)
    chosen = [(trait, layer) for trait in traits or vectors.meta.traits for layer in layers or vectors.meta.layers]
    directions = {key: vectors.vector(*key).to(model.device) for key in chosen}
    counted = progress or (lambda *_: None)
    response, prompt_last = _along(model, tokenizer, blocks, rows, directions, batch_size, lambda n: counted("projections", n, len(rows)))
    replies: list[str] = []
    mine: dict[tuple[str, int], list[float | None]] = {}
    if own:
        prompts = [row.prompt for row in rows]
        seen = _Adder(lambda n: counted("own responses", n, len(rows)))
        replies = generate_responses(model, tokenizer, blocks, prompts, max_new_tokens=max_new_tokens, tick=seen)
        answered = [Row(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        mine, _ = _along(model, tokenizer, blocks, answered, directions, batch_size, lambda n: counted("own projections", n, len(rows)))
    made = [
        Projections(
            trait=trait,
            layer=layer,
            norm=vectors.scale(layer, "residual", "response"),
            response=tuple(response[trait, layer]),
            prompt_last=tuple(prompt_last[trait, layer]),
            own=tuple(mine[trait, layer]) if own else (),
        )
        for trait, layer in chosen
    ]
    return Projected(made, replies)


def _refuse_long(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Refuse rows beyond the model's context: its activations mean nothing there, or there are none."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows, start=1):
        size = sum(len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in row)
        if most is not None and size > most:
            raise UserError(f"row {number} has {size} tokens, prompt and response together; the model takes {most}. Shorten or leave it out.")


_Values = dict[tuple[str, int], list[float | None]]


def _along(
    model: Any,
    tokenizer: Any,
    blocks: nn.ModuleList,
    rows: Sequence[Row],
    directions: dict[tuple[str, int], torch.Tensor],
    batch_size: int,
    tick: Callable[[int], None],
) -> tuple[_Values, _Values]:
    """Return projections of the responses, and of the last prompt tokens."""
    response: _Values = {key: [None] * len(rows) for key in directions}
    prompt_last: _Values = {key: [None] * len(rows) for key in directions}
    layers = sorted({layer for _, layer in directions})
    for states in hidden_states(model, tokenizer, blocks, rows, layers, batch_size=batch_size, tick=_Adder(tick)):
        for (trait, layer), direction in directions.items():
            along = states.hidden[layer] @ direction
            if rows[states.row].response and len(along) > states.split:
                response[trait, layer][states.row] = float(along[states.split :].double().mean())
            if rows[states.row].prompt and states.split:
                prompt_last[trait, layer][states.row] = float(along[states.split - 1])
    return response, prompt_last


class _Adder:
    """Adds up what is done."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.done = tell, 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        self.tell(self.done)
