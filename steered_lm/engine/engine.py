"""The engine: rows and requests in, text and log-likelihoods out, as if each had run by itself."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any

import torch

from steered_lm.engine.adapters import Adapters
from steered_lm.engine.forward import Forward
from steered_lm.engine.gemm import Gemm, onednn_linear
from steered_lm.engine.generate import Population
from steered_lm.engine.generation_plan import Demand, fit_generation
from steered_lm.engine.memory import Footprint, free_bytes, mebibytes
from steered_lm.engine.plain import generate_plain, score_plain
from steered_lm.engine.report import EngineReport
from steered_lm.engine.rows import Generated, GenerationRow, Scored, ScoreRequest
from steered_lm.engine.score import TreeScorer
from steered_lm.engine.scoring_plan import fit_scoring
from steered_lm.engine.sites import SpecSites
from steered_lm.engine.stops import Stops
from steered_lm.engine.support import Support, inspect_adapters, inspect_model
from steered_lm.engine.tree import build_contexts, check_requests
from steered_lm.errors import ModelError
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
        self._mixed: dict[tuple[str, ...], str | None] = {}

    @property
    def support(self) -> Support:
        """What works with this model."""
        if self._support is None:
            self._support = inspect_model(self._forward)
        return self._support

    def generate(self, rows: Sequence[GenerationRow], done: Callable[[int, Generated], None] | None = None) -> list[Generated]:
        """Return one continuation a row, in order.

        Args:
            rows: what to generate. Rows that are alike and greedy run once, and rows with different adapters together.
            done: is told each row's number and continuation as soon as it is complete, before the others are.

        Raises:
            ValueError: for an empty prompt or nothing to generate.
            ModelError: when not even one row fits the memory budget, or an adapter is not loaded or not plain LoRA.
            SpecError, VectorsError: when a spec does not fit the model.
        """
        for number, row in enumerate(rows):
            if not row.tokens or row.max_new_tokens < 1:
                raise ValueError(f"row {number} has {len(row.tokens)} prompt tokens and max_new_tokens={row.max_new_tokens}; both must be 1 or more.")
        found: dict[int, Generated] = {}
        adapters, names = self._adapters([row.adapter for row in rows])
        rows = [row._replace(adapter=name) for row, name in zip(rows, names, strict=True)]
        twins = _twins(rows)
        chosen = list(twins)

        def tell(turn: Sequence[int], number: int, generated: Generated) -> None:
            for twin in twins[chosen[turn[number]]]:
                found[twin] = generated
                if done is not None:
                    done(twin, generated)

        if rows:
            mixed = adapters if adapters is not None and self._mixes(adapters, tuple(sorted(set(filter(None, names))))) else None
            with self._session(adapters):
                for turn in _turns([None if mixed is not None else names[i] for i in chosen], adapters):
                    self._generate([rows[chosen[i]] for i in turn], mixed, partial(tell, turn))
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
            ModelError: when not even one context fits the memory budget, or an adapter is not loaded or not plain LoRA.
            SpecError, VectorsError: when a spec does not fit the model.
        """
        check_requests(requests, max_length)
        found: dict[int, Scored] = {}

        def tell(turn: Sequence[int], places: Sequence[int], scored: Sequence[Scored]) -> None:
            numbers = [turn[place] for place in places]
            found.update(zip(numbers, scored, strict=True))
            if done is not None:
                done(numbers, scored)

        adapters, names = self._adapters([request.adapter for request in requests])
        if requests:
            with self._session(adapters):
                for turn in _turns(names, adapters):
                    self._score([requests[i] for i in turn], max_length, partial(tell, turn))
        return [found[number] for number in range(len(requests))]

    def _session(self, adapters: Adapters | None) -> ExitStack:
        if adapters is not None:
            _ = self.support  # its trial is of the model as it stands, before rows choose their adapters
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(onednn_linear(self._forward.model, self.gemm))
        if adapters is not None:
            stack.enter_context(adapters.running())
        return stack

    def _adapters(self, asked: Sequence[str | None]) -> tuple[Adapters | None, Sequence[str | None]]:
        """Return the model's adapters and each row's by name; None, and None for each, when no row names one."""
        named = next((name for name in asked if name is not None), None)
        if named is None:
            return None, asked
        adapters = Adapters(self._forward.model, named)
        resolved = {name: adapters.resolve(name) for name in dict.fromkeys(asked)}
        return adapters, [resolved[name] for name in asked]

    def _mixes(self, adapters: Adapters, names: tuple[str, ...]) -> bool:
        """Return whether rows with these adapters can run together."""
        if len(names) < 2 or self.support.generation is not None:
            return False
        if names not in self._mixed:
            self._mixed[names] = inspect_adapters(self._forward, adapters, names)
            if self._mixed[names] is not None:
                logger.warning("%s runs one adapter after the other, correct but slower: %s", type(self._forward.model).__name__, self._mixed[names])
        return self._mixed[names] is None

    def _generate(self, rows: Sequence[GenerationRow], mixed: Adapters | None, tell: Callable[[int, Generated], None]) -> None:
        stops = Stops(self.tokenizer, self._end_ids)
        if not self._works(self.support.generation):
            started = perf_counter()
            generate_plain(self.steerer, rows, stops, self.max_rows or _PLAIN_ROWS, tell)
            self.report.decode_seconds += perf_counter() - started
            return
        missing = dict(enumerate(rows))

        def note(numbers: Sequence[int], number: int, generated: Generated) -> None:
            del missing[numbers[number]]
            tell(numbers[number], generated)

        most = self.max_rows
        while missing:
            numbers = list(missing)
            try:
                self._generate_planned([missing[n] for n in numbers], mixed, most, stops, partial(note, numbers))
            except torch.OutOfMemoryError:
                most = self._fewer(most or len(numbers))

    def _generate_planned(
        self, rows: Sequence[GenerationRow], mixed: Adapters | None, most_rows: int | None, stops: Stops, done: Callable[[int, Generated], None]
    ) -> None:
        sites, numbers = self._sites([row.spec for row in rows])
        demand = Demand(
            rows,
            blocks=len(self._forward.blocks),
            lower=sites.fork + 1,
            early=any(sites.early[n] for n in numbers),
            prefixes=self.support.window is None,
            sharing=self.support.sharing,
            lazy=self._forward.device.type == "cpu",
        )
        fit = fit_generation(demand, Footprint.of(self._forward, self.support.cache_bytes), self._budget(), most_rows=most_rows)
        logger.debug("%d rows, %d at once, %s planned", len(rows), fit.plan.rows, mebibytes(fit.bytes))
        tables: dict[int, Table] = {}
        run = Population(self._forward, sites, tables, rows, numbers, fit.plan, stops, done, mixed)
        try:
            with self.report.peak(self._forward.device, fit.bytes), self.steerer.running(tables, sites.layers):
                run.run(int(self._forward.head.weight.shape[0]))
        finally:
            self.report.add_generation(run.cost)

    def _fewer(self, rows: int) -> int:
        """Return half as many rows after the device ran out of memory, which the plan did not foresee.

        Raises:
            ModelError: when there was only one.
        """
        if rows == 1:
            raise ModelError(
                "the device is out of memory with a single row. Use a smaller dtype, shorter prompts, or a lower max_gen_toks."
            ) from None
        torch.cuda.empty_cache()
        logger.warning("out of memory with %d rows at once: going on with %d; a memory_budget would say so beforehand", rows, rows // 2)
        return rows // 2

    def _score(self, requests: Sequence[ScoreRequest], max_length: int, tell: Callable[[Sequence[int], Sequence[Scored]], None]) -> None:
        started = perf_counter()
        window = self.support.window
        windowed = window is not None and any(len(r.context) + len(r.continuation) > window for r in requests)
        if not self._works(self.support.scoring or ("texts are longer than its attention window" if windowed else None)):
            score_plain(self.steerer, requests, max_length, self.max_rows or _PLAIN_ROWS, self.softmax_dtype, tell)
            self.report.score_seconds += perf_counter() - started
            return
        missing = dict(enumerate(requests))

        def note(order: Sequence[int], numbers: Sequence[int], scored: Sequence[Scored]) -> None:
            for number in numbers:
                del missing[order[number]]
            tell([order[number] for number in numbers], scored)

        most = self.max_rows
        while missing:
            order = list(missing)
            try:
                self._score_planned([missing[n] for n in order], most, max_length, partial(note, order))
            except torch.OutOfMemoryError:
                most = self._fewer(most or len({(requests[n].context, requests[n].split) for n in order}))
        self.report.score_seconds += perf_counter() - started

    def _score_planned(
        self, requests: Sequence[ScoreRequest], most: int | None, max_length: int, done: Callable[[Sequence[int], Sequence[Scored]], None]
    ) -> None:
        sites, numbers = self._sites([request.spec for request in requests])
        contexts, places = build_contexts(requests, numbers, max_length)
        askers: dict[tuple[int, int], list[int]] = {}
        for number, place in enumerate(places):
            askers.setdefault((place.context, place.spec), []).append(number)

        broken: list[int] = []

        def note(context: int, specs: Sequence[int], results: list[list[Scored]]) -> None:
            for spec, row in zip(specs, results, strict=True):
                mine = askers[context, spec]
                # attention multiplies even what is masked, so that one branch's NaN reaches the others
                if len(row) > 1 and any(math.isnan(scored.loglikelihood) for scored in row):
                    broken.extend(mine)
                else:
                    done(mine, [row[places[n].continuation] for n in mine])

        footprint = Footprint.of(self._forward, self.support.cache_bytes, self.softmax_dtype)
        part = (sites.fork + 1) / len(self._forward.blocks)
        prefixes = self.support.window is None
        plan = fit_scoring(contexts, sites.early, footprint, self._budget(), most_contexts=most, prefixes=prefixes, part=part)
        logger.debug("%d requests in %d passes, %s planned", len(requests), sum(len(stage.passes) for stage in plan.stages), mebibytes(plan.bytes))
        tables: dict[int, Table] = {}
        run = TreeScorer(self._forward, sites, tables, self.softmax_dtype)
        try:
            with self.report.peak(self._forward.device, plan.bytes), self.steerer.running(tables, sites.layers):
                run.run(plan.stages, note)
        finally:
            self.report.add_scoring(run.cost)
        if broken:
            apart = [requests[n] for n in broken]
            size = self.max_rows or _PLAIN_ROWS
            score_plain(self.steerer, apart, max_length, size, self.softmax_dtype, lambda some, scored: done([broken[n] for n in some], scored))

    def _sites(self, specs: Sequence[SteeringSpec | None]) -> tuple[SpecSites, list[int]]:
        """Return the distinct specs that act, stacked, and each row's number among them."""
        compiled: dict[str, CompiledSpec] = {}
        known: dict[int, int] = {}
        for spec in specs:
            # by identity first: a population asks for the same few objects thousands of times
            if id(spec) not in known:
                found = self.steerer.compile(spec)
                digest = found.digest if found.sites else "unsteered"
                compiled.setdefault(digest, found)
                known[id(spec)] = list(compiled).index(digest)
        return SpecSites(list(compiled.values()), len(self._forward.blocks), self.steerer.d_model), [known[id(spec)] for spec in specs]

    def _budget(self) -> int:
        return self.memory_budget if self.memory_budget is not None else free_bytes(self._forward.device)

    def _works(self, obstacle: str | None) -> bool:
        if obstacle is not None and obstacle not in self._said:
            self._said.add(obstacle)
            logger.warning("%s runs in ordinary batches, correct but slower: %s", type(self._forward.model).__name__, obstacle)
        return obstacle is None


def _turns(names: Sequence[str | None], adapters: Adapters | None) -> Iterator[list[int]]:
    """Yield the numbers of what runs together: one adapter after the other, each acting while its turn lasts."""
    for name in dict.fromkeys(names):
        if adapters is not None:
            adapters.only = name
        yield [number for number, own in enumerate(names) if own == name]


def _twins(rows: Sequence[GenerationRow]) -> dict[int, deque[int]]:
    """Return for each row that has to run the rows that get its continuation: greedy rows that are alike get the same one."""
    first: dict[object, int] = {}
    twins: dict[int, deque[int]] = {}
    specs = {id(row.spec): row.spec for row in rows}
    digests = {key: spec.digest if spec is not None else None for key, spec in specs.items()}
    for number, row in enumerate(rows):
        leader = first.setdefault((row._replace(spec=None), digests[id(row.spec)]), number)
        twins.setdefault(leader, deque()).append(number)
    return twins
