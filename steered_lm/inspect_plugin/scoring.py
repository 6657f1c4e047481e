"""From texts to the engine's requests, and from what it scored to log-likelihoods."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from steered_lm.engine import Engine, Scored, ScoreRequest
from steered_lm.engine.plain import score_plain
from steered_lm.engine.tree import check_requests
from steered_lm.errors import ModelError, UserError
from steered_lm.inspect_plugin.batcher import Deliver
from steered_lm.inspect_plugin.generation import nan_error
from steered_lm.inspect_plugin.likelihoods import Likelihood

logger = logging.getLogger(__name__)

Texts = tuple[tuple[ScoreRequest, ...], ...]
"""What one call asks for, with one spec: for each text the parts that are read at once, none for a text without tokens."""
Settle = Callable[[int, list[Likelihood] | Exception], None]


class Scorer:
    """Scores batches of texts by an engine, or, when ``exact``, one by one through the model's own forward pass."""

    def __init__(self, engine: Engine, max_length: int, *, exact: bool) -> None:
        """Prepare to score; ``max_length`` is how many tokens the model reads at most."""
        self._engine, self._max_length, self._exact = engine, max_length, exact

    def answer(self, batch: Sequence[Texts], deliver: Deliver[list[Likelihood]]) -> list[list[Likelihood] | Exception]:
        """Return each call's log-likelihoods, or the error that is its alone; ``deliver`` gets each as soon as it is there."""
        found: dict[int, list[Likelihood] | Exception] = {}

        def settle(number: int, outcome: list[Likelihood] | Exception) -> None:
            found[number] = outcome
            deliver(number, outcome)

        sound = []
        for number, texts in enumerate(batch):
            parts = [part for text in texts for part in text]
            problem = self._problem(parts)
            if problem is not None or not parts:
                settle(number, problem or self._likelihoods(texts, []))
            else:
                sound.append(number)
        self._answer(sound, batch, settle)
        return [found[number] for number in range(len(batch))]

    def _problem(self, parts: Sequence[ScoreRequest]) -> UserError | None:
        try:
            check_requests(parts, self._max_length)
            if parts:
                self._engine.steerer.compile(parts[0].spec)  # attaches hooks: here, where no forward pass is under way
        except UserError as error:
            return error
        except ValueError as error:
            return ModelError(f"a text cannot be scored: {error}")
        return None

    def _answer(self, numbers: Sequence[int], batch: Sequence[Texts], settle: Settle) -> None:
        if not numbers:
            return
        asked = [part for number in numbers for text in batch[number] for part in text]
        owner = [number for number in numbers for text in batch[number] for _ in text]
        scores: dict[int, dict[int, Scored]] = {number: {} for number in numbers}
        left = Counter(owner)

        def done(places: Sequence[int], scored: Sequence[Scored]) -> None:
            for place, one in zip(places, scored, strict=True):
                number = owner[place]
                scores[number][place] = one
                left[number] -= 1
                if not left[number]:
                    settle(number, self._outcome(batch[number], [scores[number][at] for at in sorted(scores[number])]))

        try:
            self._score(asked, done)
        except ModelError as error:
            rest = [number for number in numbers if left[number]]
            if len(rest) == 1:
                settle(rest[0], error)
                return
            # too much for the memory: halves, until what is refused is the one call that does not fit by itself
            self._answer(rest[: len(rest) // 2], batch, settle)
            self._answer(rest[len(rest) // 2 :], batch, settle)

    def _score(self, asked: Sequence[ScoreRequest], done: Callable[[Sequence[int], Sequence[Scored]], None]) -> None:
        started = perf_counter()
        try:
            if self._exact:
                with torch.inference_mode():
                    score_plain(self._engine.steerer, asked, self._max_length, 1, None, done)
            else:
                self._engine.score(asked, max_length=self._max_length, done=done)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"out of memory with {len(asked)} texts to score. Lower -M memory_budget or -M batch_size.") from error
        logger.debug("%d log-likelihoods in %.2f s", len(asked), perf_counter() - started)

    def _outcome(self, texts: Texts, scored: Sequence[Scored]) -> list[Likelihood] | Exception:
        if any(value != value for value, _ in scored):
            (spec, *_) = [part.spec for text in texts for part in text]
            return nan_error("log-likelihoods", steered=bool(self._engine.steerer.compile(spec).sites))
        return self._likelihoods(texts, scored)

    def _likelihoods(self, texts: Texts, scored: Sequence[Scored]) -> list[Likelihood]:
        left = iter(scored)
        found = []
        for text in texts:
            own = [next(left) for _ in text]
            size = sum(len(part.continuation) for part in text)
            found.append(Likelihood(sum(one.loglikelihood for one in own), size, all(one.is_greedy for one in own)))
        return found
