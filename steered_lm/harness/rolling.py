"""Log-likelihoods of whole texts that say how many tokens they are of."""

from typing import Any, Self


class TokenLikelihood(float):
    """A log-likelihood in nats; in every other respect the number that it is.

    Attributes:
        tokens: how many tokens were predicted.
    """

    tokens: int

    def __new__(cls, value: float, tokens: int) -> Self:
        """Mark ``value``."""
        made = super().__new__(cls, value)
        made.tokens = tokens
        return made

    def __getnewargs__(self) -> Any:
        """Return what a copy or a pickled one is made of."""
        return float(self), self.tokens
