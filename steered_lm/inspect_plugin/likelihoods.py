"""Log-likelihoods in Inspect: what is asked of a model, what comes back, and which models can tell. No torch here: tasks import it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from inspect_ai.model import ChatMessage, GenerateConfig, Model

from steered_lm.errors import ModelError

LOGLIKELIHOODS = "loglikelihoods"
"""Where a reply's metadata holds what its texts scored; such a reply is a choice, and nothing that the model wrote."""


class LikelihoodRequest(NamedTuple):
    """One text whose log-likelihood is asked for.

    Attributes:
        text: what is predicted.
        context: what stands before it. Text is taken as it is; messages are rendered as a prompt, and the text is the reply. None is nothing: each
            token of the text counts as response, and a text that is longer than the model takes is read in lm-eval's windows.
    """

    text: str
    context: str | tuple[ChatMessage, ...] | None = None


class Likelihood(NamedTuple):
    """A text's log-likelihood in nats, of how many tokens it is, and whether each of them was the likeliest."""

    loglikelihood: float
    tokens: int
    is_greedy: bool


@runtime_checkable
class LikelihoodAPI(Protocol):
    """What a model provider has that gives log-likelihoods."""

    async def loglikelihoods(self, requests: Sequence[LikelihoodRequest], config: GenerateConfig) -> list[Likelihood]:
        """Return the log-likelihood of each text, in order."""
        ...


def likelihood_api(model: Model, task: str, twin: str) -> LikelihoodAPI:
    """Return the provider behind a model.

    Args:
        model: the evaluated model.
        task: which task asks.
        twin: the name of the same task in lm-eval.

    Raises:
        ModelError: when the provider gives no log-likelihoods.
    """
    if isinstance(model.api, LikelihoodAPI):
        return model.api
    raise ModelError(
        f"steered_lm/{task} needs log-likelihoods, which model {str(model)!r} cannot give: its provider only writes replies. "
        f"Use --model steered-hf/<hub id or folder>, or lm_eval --tasks {twin}, which takes other types of models too."
    )
