"""The engine: rows and requests in, text and log-likelihoods out, as if each had run by itself."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch

from steered_lm.engine.forward import Forward
from steered_lm.engine.gemm import Gemm, onednn_linear
from steered_lm.engine.generate import Population
from steered_lm.engine.memory import Footprint, fit_generation, fit_scoring, free_bytes
from steered_lm.engine.plain import generate_plain, score_plain
from steered_lm.engine.report import EngineReport
from steered_lm.engine.rows import Generated, GenerationRow, Scored, ScoreRequest
from steered_lm.engine.score import TreeScorer
from steered_lm.engine.sites import SpecSites
from steered_lm.engine.stops import Stops
from steered_lm.engine.support import Support, inspect_model
from steered_lm.engine.tree import build_contexts
from steered_lm.steering.compile import CompiledSpec
from steered_lm.steering.hooks import Steerer, Table
from steered_lm.steering.spec import SteeringSpec

logger = logging.getLogger(__name__)

_PLAIN_ROWS = 16


class Engine:
    """Runs many rows or requests, each with its own steering, for little more than the price of one.

    Results are those of one row at a time (float32: token for token, log-likelihoods to rounding). What rows share is computed once: the
    prompt below the first steered block, or all of it when only the response is steered; the beginning that all prompts have in common; a context
    for all of its continuations and specs. A model whose cache is not a plain one of keys and values runs in ordinary batches, which is said once.

    Attributes:
        report: what ran, how long it took, and how much memory was planned and used; counts on over calls.
        support: what works with this model; a small trial at the first use finds out.
    """

    def __init__(
        self,
        steerer: Steerer,
        tokenizer: Any,
        *,
        end_ids: Sequence[int] = (),
        max_rows: int | None = None,
        memory_budget: int | None = None,
        gemm: Gemm = "auto",
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare an engine; the model is looked at when it is first used.

        Args:
            steerer: the model with its hooks.
            tokenizer: for stop strings.
            end_ids: tokens that end a row.
            max_rows: most rows in a step and most contexts in a pass; None is as many as the memory budget allows.
            memory_budget: bytes for the cache and everything else that depends on the batch; None takes a share of what is free.
            gemm: library of float32 linear layers on the CPU: ``auto``, ``torch`` or ``onednn``.
            softmax_dtype: of log-softmax; None is float32.
        """
        self.steerer, self.tokenizer = steerer, tokenizer
        self.max_rows, self.memory_budget, self.gemm, self.softmax_dtype = max_rows, memory_budget, gemm, softmax_dtype
        self.report = EngineReport()
        self._end_ids = tuple(end_ids)
        self._forward = Forward(steerer)
        self._support: Support | None = None
        self._said: set[str] = set()

    @property
    def support(self) -> Support:
        """What works with this model."""
        if self._support is None:
            self._support = inspect_model(self._forward)
        return self._support

    def generate(self, rows: Sequence[GenerationRow], done: Callable[[int, Generated], None] | None = None) -> list[Generated]:
        """Return one continuation a row, in order.

        Args:
            rows: what to generate. Rows that are alike and greedy run once.
            done: is told each row's number and continuation as soon as it is complete, before the others are.

        Raises:
            ValueError: for an empty prompt or nothing to generate.
            ModelError: when not even one row fits the memory budget.
            SpecError, VectorsError: when a spec does not fit the model.
        """
        for number, row in enumerate(rows):
            if not row.tokens or row.max_new_tokens < 1:
                raise ValueError(f"row {number} has {len(row.tokens)} prompt tokens and max_new_tokens={row.max_new_tokens}; both must be 1 or more.")
        found: dict[int, Generated] = {}
        twins = _twins(rows)
        chosen = list(twins)

        def tell(number: int, generated: Generated) -> None:
            for twin in twins[chosen[number]]:
                found[twin] = generated
                if done is not None:
                    done(twin, generated)

        if rows:
            with self._session():
                self._generate([rows[i] for i in chosen], tell)
        return [found[number] for number in range(len(rows))]

    def score(
        self, requests: Sequence[ScoreRequest], *, max_length: int, done: Callable[[Sequence[int], Sequence[Scored]], None] | None = None
    ) -> list[Scored]:
        """Return each continuation's log-likelihood, in order.

        Args:
            requests: what to score; equal ones run once.
            max_length: most tokens that the model takes; longer requests lose their beginning, as in lm-eval.
            done: is told the numbers and results of requests as soon as they are there.

        Raises:
            ValueError: for an empty context or continuation, or a continuation longer than ``max_length``.
            ModelError: when not even one context fits the memory budget.
            SpecError, VectorsError: when a spec does not fit the model.
        """
        found: dict[int, Scored] = {}

        def tell(numbers: Sequence[int], scored: Sequence[Scored]) -> None:
            found.update(zip(numbers, scored, strict=True))
            if done is not None:
                done(numbers, scored)

        if requests:
            with self._session():
                self._score(requests, max_length, tell)
        return [found[number] for number in range(len(requests))]

    def _session(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(onednn_linear(self._forward.model, self.gemm))
        return stack

    def _generate(self, rows: Sequence[GenerationRow], tell: Callable[[int, Generated], None]) -> None:
        stops = Stops(self.tokenizer, self._end_ids)
        if not self._works(self.support.generation):
            started = perf_counter()
            generate_plain(self.steerer, rows, stops, self.max_rows or _PLAIN_ROWS, tell)
            self.report.decode_seconds += perf_counter() - started
            return
        sites, numbers = self._sites([row.spec for row in rows])
        vocabulary = self._forward.head.weight.shape[0]
        fit = fit_generation(
            rows,
            Footprint.of(self._forward, self.support.cache_bytes),
            self._budget(),
            most_rows=self.max_rows,
            early=any(sites.early[n] for n in numbers),
            sampled=any(row.sampling.temperature > 0 for row in rows),
            prefixes=self.support.window is None,
        )
        tables: dict[int, Table] = {}
        run = Population(self._forward, sites, tables, rows, numbers, fit.plan, stops, tell)
        with self.report.peak(self._forward.device, fit.bytes), self.steerer.running(tables, sites.layers):
            run.run(int(vocabulary))
        self.report.add_generation(run.cost)

    def _score(self, requests: Sequence[ScoreRequest], max_length: int, tell: Callable[[Sequence[int], Sequence[Scored]], None]) -> None:
        started = perf_counter()
        sites, numbers = self._sites([request.spec for request in requests])
        contexts, places = build_contexts(requests, numbers, max_length)
        windowed = self.support.window is not None and any(len(c.key.tokens) + sum(map(len, c.continuations)) > self.support.window for c in contexts)
        obstacle = self.support.scoring or ("texts are longer than its attention window" if windowed else None)
        if not self._works(obstacle):
            score_plain(self.steerer, requests, max_length, self.max_rows or _PLAIN_ROWS, self.softmax_dtype, tell)
            self.report.score_seconds += perf_counter() - started
            return
        askers: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            askers.setdefault(place.context, []).append(number)

        def done(context: int, specs: Sequence[int], results: list[list[Scored]]) -> None:
            order = {spec: i for i, spec in enumerate(specs)}
            mine = [n for n in askers[context] if places[n].spec in order]
            tell(mine, [results[order[places[n].spec]][places[n].continuation] for n in mine])

        footprint = Footprint.of(self._forward, self.support.cache_bytes)
        budget = self._budget()
        plan = fit_scoring(contexts, footprint, budget, most_contexts=self.max_rows, prefixes=self.support.window is None)
        tables: dict[int, Table] = {}
        run = TreeScorer(self._forward, sites, tables, plan, self.softmax_dtype)
        with self.report.peak(self._forward.device, None), self.steerer.running(tables, sites.layers):
            run.run(contexts, done)
        self.report.score_seconds += perf_counter() - started
        self.report.add_scoring(run.cost)

    def _sites(self, specs: Sequence[SteeringSpec | None]) -> tuple[SpecSites, list[int]]:
        """Return the distinct specs that act, stacked, and each row's number among them."""
        compiled: dict[str, CompiledSpec] = {}
        digests: list[str] = []
        for spec in specs:
            found = self.steerer.compile(spec)
            digest = found.digest if found.sites else "unsteered"
            compiled.setdefault(digest, found)
            digests.append(digest)
        order = {digest: number for number, digest in enumerate(compiled)}
        return SpecSites(list(compiled.values()), len(self._forward.blocks), self.steerer.d_model), [order[digest] for digest in digests]

    def _budget(self) -> int:
        return self.memory_budget if self.memory_budget is not None else free_bytes(self._forward.device)

    def _works(self, obstacle: str | None) -> bool:
        if obstacle is not None and obstacle not in self._said:
            self._said.add(obstacle)
            logger.warning("%s runs in ordinary batches, correct but slower: %s", type(self._forward.model).__name__, obstacle)
        return obstacle is None


def _twins(rows: Sequence[GenerationRow]) -> dict[int, deque[int]]:
    """Return for each row that has to run the rows that get its continuation: greedy rows that are alike get the same one."""
    first: dict[object, int] = {}
    twins: dict[int, deque[int]] = {}
    for number, row in enumerate(rows):
        digest = row.spec.digest if row.spec is not None else None
        leader = first.setdefault((row._replace(spec=None), digest), number)
        twins.setdefault(leader, deque()).append(number)
    return twins
