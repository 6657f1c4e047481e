"""How far steering moves the next-token distribution, and how strong it has to be for a given distance."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from steered_lm.config import Config
from steered_lm.errors import SpecError, UserError
from steered_lm.measure.means import TokenMean
from steered_lm.measure.passages import Passage, Window, refuse_idle, windows
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec

_LOGIT_BYTES = 2**28
_ROUNDS = 100
_WRONG = 10.0
"""How many times the tolerance away a result is no result."""


class Calibration(Config):
    """A strength, found by its distance to the unsteered model.

    Attributes:
        alpha: what was found.
        kl: mean KL divergence at that alpha, nats a token.
        target: what was asked for.
        tried: every (alpha, mean KL) that was measured, in order.
    """

    alpha: float
    kl: float
    target: float
    tried: tuple[tuple[float, float], ...]


@torch.inference_mode()
def kl_to_unsteered(
    steerer: Steerer, passages: Sequence[Passage], specs: Sequence[SteeringSpec | None], *, length: int, overlap: int = 1
) -> list[TokenMean]:
    """Return each spec's KL divergence to the unsteered model, in nats, at every position that predicts a token of the passages.

    ``KL(steered || unsteered) = sum_v p(v) ln(p(v) / q(v))`` over the vocabulary, with ``p`` the steered and ``q`` the unsteered distribution of
    the next token after the same tokens. Totals are sums over a window's positions. A window with NaN is missing.

    Args:
        steerer: the model with its hooks.
        passages: texts or replies, read teacher-forced.
        specs: steering specs; None is the unsteered model, whose divergence is zero.
        length: most tokens that the model reads at once.
        overlap: see :func:`steered_lm.measure.passages.windows`.

    Raises:
        UserError: as :func:`steered_lm.measure.perplexity.perplexities`.
    """
    refuse_idle(specs, passages)
    cut = windows(passages, length, overlap)
    totals: list[list[float | None]] = [[None] * len(cut) for _ in specs]
    for numbers in _batches(cut, steerer):
        batch = [cut[n] for n in numbers]
        base = _log_probabilities(steerer, batch, None)
        for place, spec in enumerate(specs):
            steered = _log_probabilities(steerer, batch, spec)
            for number, p, q in zip(numbers, steered, base, strict=True):
                value = float(_divergence(p, q).double().sum())
                totals[place][number] = value if math.isfinite(value) else None
    names, sizes = tuple(w.name for w in cut), tuple(len(w.tokens) for w in cut)
    return [TokenMean(items=names, totals=tuple(row), tokens=sizes) for row in totals]


def _divergence(p: Float[Tensor, "tokens vocab"], q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Return KL(p || q) of log-probabilities; what ``p`` rules out adds nothing."""
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(dim=-1)


def _batches(cut: Sequence[Window], steerer: Steerer) -> list[list[int]]:
    """Return the windows' numbers, longest first, in batches whose scores over the vocabulary take bounded memory."""
    model: Any = steerer.model
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    order = sorted(range(len(cut)), key=lambda n: -len(cut[n].context) - len(cut[n].tokens))
    found: list[list[int]] = []
    room = 0
    for number in order:
        if room < 1:
            width = len(cut[number].context) + len(cut[number].tokens)
            room = max(1, _LOGIT_BYTES // (4 * width * vocabulary))
            found.append([])
        found[-1].append(number)
        room -= 1
    return found


def _log_probabilities(steerer: Steerer, batch: Sequence[Window], spec: SteeringSpec | None) -> list[Float[Tensor, "tokens vocab"]]:
    """Return the log-probabilities at the positions that predict each window's tokens."""
    texts = [(w.context + w.tokens)[:-1] for w in batch]
    width = max(map(len, texts))
    model: Any = steerer.model
    device = model.device
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
    layout = Layout.scored([w.response_start for w in batch], [len(text) for text in texts], width=width)
    with steerer.batch([spec] * len(batch), layout):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [row[len(w.context) - 1 : len(text)].float().log_softmax(dim=-1) for row, w, text in zip(logits, batch, texts, strict=True)]


def with_alpha(spec: SteeringSpec, alpha: float) -> SteeringSpec:
    """Return the spec at another strength."""
    return SteeringSpec.model_validate({**spec.model_dump(), "alpha": alpha})


def calibrate_alpha(
    mean_kl: Callable[[float], float | None], target: float, *, start: float = 0.1, limit: float = 100.0, tolerance: float = 0.01
) -> Calibration:
    """Return the strength at which the mean KL divergence to the unsteered model is ``target`` (iso-KL calibration).

    Specs that lie equally far from the unsteered model can be compared, whatever their vectors, layers and units. From ``start``, alpha is
    doubled until the divergence reaches the target; then Brent's method closes in on ``sqrt(KL) = sqrt(target)``, nearly a straight line since
    KL grows with alpha squared where alpha is small. Where the divergence is not monotone this is the first crossing that the doubling meets.

    Args:
        mean_kl: mean KL in nats a token at an alpha above 0; None when the model gave no numbers there.
        target: nats a token.
        start: the first alpha that is tried.
        limit: the largest one.
        tolerance: how far from the target is near enough, as a share of it.

    Raises:
        UserError: when an argument is not positive, or the target is not reached, or no alpha is that near the unsteered model.
    """
    for name, value in (("kl", target), ("start", start), ("limit", limit), ("tolerance", tolerance)):
        if not 0.0 < value < math.inf:
            raise UserError(f"{name}={value} is not allowed. Allowed: a number above 0.")
    tried: list[tuple[float, float]] = []
    gaps = {0.0: -math.sqrt(target)}

    def gap(alpha: float) -> float:
        if alpha not in gaps:
            found = mean_kl(alpha)
            if found is None:
                raise UserError(f"at alpha={alpha:g} the model's scores are NaN, and kl={target:g} was not reached before. Ask for a smaller one.")
            tried.append((alpha, found))
            near = abs(found - target) <= tolerance * target
            gaps[alpha] = 0.0 if near else math.sqrt(max(found, 0.0)) - math.sqrt(target)
        return gaps[alpha]

    low, high = 0.0, start
    while gap(high) < 0.0:
        if high >= limit:
            raise UserError(
                f"kl={target:g} is not reached: at alpha={high:g} it is {tried[-1][1]:.3g} nats a token. Ask for a smaller one, or steer elsewhere."
            )
        low, high = high, min(2.0 * high, limit)
    if gap(high) > 0.0:
        brentq(gap, low, high, xtol=1e-12, rtol=1e-6, maxiter=_ROUNDS)
    alpha, kl = min(tried, key=lambda pair: abs(pair[1] - target))
    if abs(kl - target) > _WRONG * tolerance * target:
        raise UserError(
            f"kl={target:g} is met by no alpha: the nearest, alpha={alpha:.3g}, is {kl:.3g} nats a token away. What acts whatever alpha is (clamp, "
            "or sites with an alpha of their own) sets a least divergence. Ask for a larger one, or leave such sites out."
        )
    return Calibration(alpha=alpha, kl=kl, target=target, tried=tuple(tried))


def calibrated(steerer: Steerer, passages: Sequence[Passage], spec: SteeringSpec, target: float, *, length: int, overlap: int = 1) -> Calibration:
    """Return the alpha at which a spec is ``target`` nats a token away from the unsteered model on these passages.

    A negative alpha stays negative. The spec's own alpha is where the search begins, and sites with an alpha of their own keep it.

    Raises:
        SpecError: when the spec does nothing whatever its alpha is.
        UserError: when the target is not reached.
    """
    sign = -1.0 if spec.alpha < 0 else 1.0
    if not with_alpha(spec, sign).resolved():
        raise SpecError("the spec has no weight that is not zero, so no alpha takes it away from the unsteered model. Give it weights.")

    def mean_kl(alpha: float) -> float | None:
        (found,) = kl_to_unsteered(steerer, passages, [with_alpha(spec, sign * alpha)], length=length, overlap=overlap)
        # a mean over what is left of the text would be another text's
        return None if None in found.totals else found.mean

    found = calibrate_alpha(mean_kl, target, start=abs(spec.alpha) or 0.1)
    return found.model_copy(update={"alpha": sign * found.alpha, "tried": tuple((sign * alpha, kl) for alpha, kl in found.tried)})
