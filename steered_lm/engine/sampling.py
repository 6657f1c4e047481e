"""The next token of every row, each by its own settings and its own random draws."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steered_lm.engine.rows import GenerationRow, Sampling

_DRAWS = 64


class Sampler:
    """Chooses tokens for rows that differ in everything.

    A row's draws come from its own seed, one a token, so its text depends on nothing else in the batch; torch's global generator is left alone.
    """

    def __init__(self, rows: Sequence[GenerationRow], vocabulary: int, device: torch.device) -> None:
        """Seed one generator a sampled row and note the prompts' tokens of rows with a repetition penalty."""
        self._rows = rows
        self._generators = {i: torch.Generator().manual_seed(row.sampling.seed) for i, row in enumerate(rows) if row.sampling.temperature > 0}
        self._drawn: dict[int, list[float]] = {}
        self._penalty = {i: row.sampling.repetition_penalty for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1}
        self._seen: dict[int, Bool[Tensor, " vocab"]] = {}
        for row in self._penalty:
            self._seen[row] = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[row][torch.tensor(rows[row].tokens, device=device)] = True

    def choose(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Return the next token of each of ``rows``, whose scores ``logits`` holds, and whether any of its scores was NaN."""
        if self._penalty:
            logits = self._penalised(logits, rows)
        best, tokens = logits.max(dim=-1)
        broken = torch.isnan(best)
        groups: dict[Sampling, list[int]] = {}
        for place, row in enumerate(rows):
            if row in self._generators:
                groups.setdefault(self._rows[row].sampling._replace(seed=0), []).append(place)
        for sampling, places in groups.items():
            chosen = torch.tensor(places, device=logits.device)
            points = torch.tensor([self._draw(rows[place]) for place in places], dtype=torch.float64, device=logits.device)
            # a broken row has no distribution; it is reported, and any token will do
            scores = logits[chosen] if len(places) < len(rows) else logits
            tokens[chosen] = draw(torch.where(broken[chosen, None], 0.0, scores), sampling, points)
        picked = tokens.tolist()
        for place, row in enumerate(rows):
            if row in self._seen:
                self._seen[row][picked[place]] = True
        return picked, broken.tolist()

    def _penalised(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        places = [place for place, row in enumerate(rows) if row in self._penalty]
        if not places:
            return logits
        seen = torch.stack([self._seen[rows[place]] for place in places])
        penalty = torch.tensor([self._penalty[rows[place]] for place in places], dtype=logits.dtype, device=logits.device)[:, None]
        scores = logits[places]
        logits = logits.clone()
        logits[places] = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        return logits

    def _draw(self, row: int) -> float:
        drawn = self._drawn.setdefault(row, [])
        if not drawn:
            drawn += torch.rand(_DRAWS, generator=self._generators[row], dtype=torch.float64).tolist()[::-1]
        return drawn.pop()


def draw(logits: Float[Tensor, "rows vocab"], sampling: Sampling, points: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Return one token a row by inversion of its distribution function at ``points`` in [0, 1), in float64.

    The restrictions apply in the order of transformers' ``generate``: temperature, ``top_k``, ``top_p``, ``min_p``. Tokens that are kept stand in the
    vocabulary's order: in that of their scores, rounding would make two that are nearly equal change places, and a draw would depend on the batch.
    """
    scores = logits.double() / sampling.temperature
    order: Tensor | None = None
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, order = scores.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.amax(dim=-1, keepdim=True), 0.0)
    if order is not None:
        order, places = order.sort(dim=-1)
        probabilities = probabilities.gather(-1, places)
    cumulative = probabilities.cumsum(dim=-1)
    target = (points * cumulative[:, -1])[:, None]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # rounding may put the point past the end: the last token that is possible is meant
    last = (probabilities > 0).int().mul(torch.arange(probabilities.shape[-1], device=logits.device)).amax(dim=-1)
    found = torch.minimum(found, last)
    return found if order is None else order.gather(-1, found[:, None])[:, 0]
