"""What the engine is asked for, and what it answers."""

from typing import Literal, NamedTuple

from steered_lm.steering.spec import SteeringSpec

Ended = Literal["stop", "length", "nan"]


class Sampling(NamedTuple):
    """How a row's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token at each step.
        top_k: sampling is restricted to so many likeliest tokens; 0 is no restriction.
        top_p: then to the fewest likeliest tokens whose probability reaches this; 1 is no restriction.
        min_p: then to tokens at least this likely, relative to the likeliest; 0 is no restriction.
        repetition_penalty: scores of tokens that the row holds already are divided by this when positive and multiplied by it when
            negative (Keskar et al. 2019, arXiv:1909.05858); 1 is none. Applies to greedy rows too.
        seed: seeds the row's own draws, which depend on nothing else in the batch; read when the temperature is above 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


class GenerationRow(NamedTuple):
    """One continuation to generate.

    Attributes:
        tokens: ids of the prompt, at least one.
        max_new_tokens: most tokens to generate, the end token included.
        spec: how the row is steered; None is the unsteered model.
        sampling: how its tokens are chosen.
        stop: the row ends as soon as its text holds one of these.
        adapter: name of the PEFT adapter (plain LoRA) that the row runs with; ``"__base__"`` is the model without any, None the model as it
            stands, with what is active.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    spec: SteeringSpec | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    adapter: str | None = None


class Generated(NamedTuple):
    """One continuation.

    Attributes:
        tokens: what was generated, the end token or the tokens of the stop string included.
        ended: ``stop`` at an end token or a stop string, ``length`` at ``max_new_tokens``, ``nan`` when a next-token score was NaN: the
            steering drove the activations out of range, and the text is worth nothing.
    """

    tokens: tuple[int, ...]
    ended: Ended


class ScoreRequest(NamedTuple):
    """One continuation to score.

    Attributes:
        context: ids before the continuation, at least one.
        continuation: ids whose log-likelihood is asked for, at least one.
        spec: how the request is steered; None is the unsteered model.
        response_start: number of leading tokens that are prompt; None takes the context's length. 0 makes everything response.
        adapter: as in :class:`GenerationRow`; requests run one adapter after the other.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    spec: SteeringSpec | None = None
    response_start: int | None = None
    adapter: str | None = None

    @property
    def split(self) -> int:
        """Index of the first token whose output predicts a response token."""
        return max((len(self.context) if self.response_start is None else self.response_start) - 1, 0)


class Scored(NamedTuple):
    """One continuation's log-likelihood in nats (NaN when the steering drove the activations out of range), and whether it is the greedy one."""

    loglikelihood: float
    is_greedy: bool
