"""From requests to the engine's rows, and from what it generated to replies."""

import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig

from steered_lm.engine import Engine, Generated, GenerationRow
from steered_lm.engine.memory import mebibytes
from steered_lm.engine.plain import generate_plain
from steered_lm.engine.stops import Stops, decode, end_ids
from steered_lm.errors import ModelError, UserError
from steered_lm.inspect_plugin.batcher import Deliver
from steered_lm.steering.spec import SteeringSpec

logger = logging.getLogger(__name__)

StopReason = Literal["stop", "max_tokens", "model_length"]

# What a checkpoint may ask for that changes which tokens are chosen, each with the value that, like None, means "off". The first are
# applied by transformers' own ``generate``; the others need end tokens, further passes or beams there, which the rows do not have.
_APPLIED_WHEN_EXACT: dict[str, Any] = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "watermarking_config": None,
}
_NEVER_APPLIED: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "num_beams": 1,
}


class Request(NamedTuple):
    """What one call of the provider asks for.

    Attributes:
        rows: one a choice, alike but for the seed.
        limit: why a reply ends that is as long as it may be.
    """

    rows: tuple[GenerationRow, ...]
    limit: StopReason


class Reply(NamedTuple):
    """Text without the stop sequence, how many tokens were generated (the end token included), and why it ended."""

    text: str
    tokens: int
    reason: StopReason


class Defaults(NamedTuple):
    """What of a checkpoint's generation config applies to every reply: the ids that end it, and the repetition penalty (1 is none)."""

    end_ids: tuple[int, ...]
    repetition_penalty: float


def take_defaults(model: Any, tokenizer: Any, *, exact: bool) -> Defaults:
    """Return a model's defaults, and leave the model a generation config in which the rows decide.

    Sampling, lengths and stop strings are the request's alone. Other settings that change which tokens are chosen stay for the reference
    path, and are named in a warning where they are not applied.

    Args:
        model: its generation config is replaced.
        tokenizer: its end token counts beside the model's own.
        exact: whether replies will come from the model's own ``generate``.
    """
    config = model.generation_config
    kept = _acting(config, _APPLIED_WHEN_EXACT)
    dropped = _acting(config, _NEVER_APPLIED) | ({} if exact else kept)
    if dropped:
        said = ", ".join(f"{name}={value!r:.40}" for name, value in dropped.items())
        more = " exact=true applies some of them." if set(dropped) & set(kept) else ""
        logger.warning("the model's generation config has %s, which steered-hf does not apply.%s", said, more)
    model.generation_config = GenerationConfig(**(kept if exact else {}))
    return Defaults(tuple(end_ids(config, tokenizer.eos_token_id)), config.repetition_penalty or 1.0)


def _acting(config: Any, names: dict[str, Any]) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if value not in (None, names[name])}


class Replier:
    """Answers batches of requests by an engine, or, when ``exact``, row by row through the model's own ``generate``."""

    def __init__(self, engine: Engine, end_ids: Sequence[int], *, exact: bool) -> None:
        """Prepare to answer; ``end_ids`` are those that the engine has."""
        self._engine, self._exact = engine, exact
        self._stops = Stops(engine.tokenizer, end_ids)

    def answer(self, requests: Sequence[Request], deliver: Deliver[list[Reply]]) -> list[list[Reply] | Exception]:
        """Return one reply a row for each request, or the error that is its alone; ``deliver`` gets each as soon as it is there."""
        found: dict[int, list[Reply] | Exception] = {}

        def settle(number: int, outcome: list[Reply] | Exception) -> None:
            found[number] = outcome
            deliver(number, outcome)

        problems = {number: self._spec_problem(request.rows[0].spec) for number, request in enumerate(requests)}
        for number, problem in problems.items():
            if problem is not None:
                settle(number, problem)
        self._answer([number for number, problem in problems.items() if problem is None], requests, settle)
        return [found[number] for number in range(len(requests))]

    def _spec_problem(self, spec: SteeringSpec | None) -> UserError | None:
        # compiling attaches hooks, so it happens here, where no forward pass is under way
        try:
            self._engine.steerer.compile(spec)
        except UserError as error:
            return error
        return None

    def _answer(self, numbers: Sequence[int], requests: Sequence[Request], settle: Callable[[int, list[Reply] | Exception], None]) -> None:
        if not numbers:
            return
        left = set(numbers)
        written: dict[int, list[Generated | None]] = {number: [None] * len(requests[number].rows) for number in numbers}
        owners = [(number, place) for number in numbers for place in range(len(requests[number].rows))]

        def done(row: int, generated: Generated) -> None:
            number, place = owners[row]
            written[number][place] = generated
            whole = [one for one in written[number] if one is not None]
            if len(whole) == len(written[number]):
                left.discard(number)
                settle(number, self._replies(requests[number], whole))

        try:
            self._generate([row for number in numbers for row in requests[number].rows], done)
        except ModelError as error:
            if len(left) == 1:
                settle(left.pop(), error)
                return
            # too much for the memory: halves, until what is refused is the one request that does not fit by itself
            rest = [number for number in numbers if number in left]
            self._answer(rest[: len(rest) // 2], requests, settle)
            self._answer(rest[len(rest) // 2 :], requests, settle)

    def _generate(self, rows: Sequence[GenerationRow], done: Callable[[int, Generated], None]) -> None:
        started = perf_counter()
        try:
            if self._exact:
                generate_plain(self._engine.steerer, rows, self._stops, 1, done)
            else:
                self._engine.generate(rows, done)
        except torch.OutOfMemoryError as error:
            widest = max(len(row.tokens) for row in rows)
            raise ModelError(f"out of memory with {len(rows)} rows of up to {widest} tokens. Lower -M memory_budget or -M batch_size.") from error
        logger.debug("%d rows in %.2f s, peak so far %s", len(rows), perf_counter() - started, mebibytes(self._engine.report.peak_bytes))

    def _replies(self, request: Request, generated: Sequence[Generated]) -> list[Reply] | Exception:
        if any(one.ended == "nan" for one in generated):
            return nan_error("next-token scores", steered=bool(self._engine.steerer.compile(request.rows[0].spec).sites))
        return [self._reply(one, request) for one in generated]

    def _reply(self, generated: Generated, request: Request) -> Reply:
        text = decode(self._engine.tokenizer, generated.tokens)
        cuts = [text.index(stop) for stop in request.rows[0].stop if stop in text]
        return Reply(text[: min(cuts)] if cuts else text, len(generated.tokens), "stop" if generated.ended == "stop" else request.limit)


def nan_error(what: str, *, steered: bool) -> ModelError:
    """Return the error that says that a model gave NaN, and what to do."""
    if steered:
        return ModelError(
            f"the steered model gave NaN {what}: the steering drives the activations out of range. Use a smaller alpha, or dtype=float32."
        )
    return ModelError(f"the model gave NaN {what} without any steering. Use dtype=float32, or check the checkpoint.")
