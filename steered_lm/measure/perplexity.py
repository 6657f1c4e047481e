"""Token perplexity of texts under several steering specs at once."""

import math
from collections.abc import Sequence

from steered_lm.config import Config
from steered_lm.engine import Engine, ScoreRequest
from steered_lm.measure.means import TokenMean, exponentiated
from steered_lm.measure.passages import Passage, refuse_idle, windows
from steered_lm.stats import Estimate
from steered_lm.steering.spec import SteeringSpec


class Perplexity(Config):
    """How well a model predicts a text.

    Attributes:
        nll: negative log-likelihoods in nats, ``-sum_t ln p(token_t | tokens before it)``, by window.
    """

    nll: TokenMean

    @property
    def value(self) -> float | None:
        """``exp(mean negative log-likelihood a token)``; None when no window has a number, or it overflows."""
        return self.estimate().value

    def estimate(self, *, confidence: float = 0.95) -> Estimate:
        """Return the perplexity with an interval: that of the mean negative log-likelihood over windows, exponentiated."""
        return exponentiated(self.nll.estimate(confidence=confidence))


def perplexities(
    engine: Engine, passages: Sequence[Passage], specs: Sequence[SteeringSpec | None], *, length: int, overlap: int = 1
) -> list[Perplexity]:
    """Return the perplexity of the same tokens under each spec; below the first steered block all of them share one pass.

    Plain text counts as response from its first token on, so ``positions: response`` and ``all`` are the same there. A window in which the
    steering drives the activations out of range (NaN) is missing and counted.

    Args:
        engine: runs the model.
        passages: what to predict.
        specs: steering specs; None is the unsteered model.
        length: most tokens that the model reads at once.
        overlap: see :func:`steered_lm.measure.passages.windows`.

    Raises:
        UserError: for a window out of range, a reply that is too long, or a spec that steers nothing here.
    """
    refuse_idle(specs, passages)
    cut = windows(passages, length, overlap)
    asked = [ScoreRequest(w.context, w.tokens, spec, response_start=w.response_start) for spec in specs for w in cut]
    found = [-scored.loglikelihood for scored in engine.score(asked, max_length=length)]
    names, sizes = tuple(w.name for w in cut), tuple(len(w.tokens) for w in cut)
    rows = [found[first : first + len(cut)] for first in range(0, len(found), len(cut))]
    return [
        Perplexity(nll=TokenMean(items=names, totals=tuple(value if math.isfinite(value) else None for value in row), tokens=sizes)) for row in rows
    ]
