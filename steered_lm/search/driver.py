"""Runs a search: one objective call a generation, then a fresh look at the best few, then the test split once."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from steered_lm.config import content_hash, file_hash, write_atomic
from steered_lm.content import optimizer_file
from steered_lm.errors import JudgeError, RunError
from steered_lm.judges import check_missing
from steered_lm.search.plugins import load_optimizer
from steered_lm.search.protocol import Candidate, CandidateScore, FloatArray, Objective, Optimizer, SearchSpace
from steered_lm.search.result import Estimate, Evaluated, Gap, Generation, OptimizeResult, describe, paired_table, result_json
from steered_lm.search.runlog import RunLog, RunSettings, score_from_json, score_to_json
from steered_lm.steering.spec import SteeringSpec

SPEC_NAME = "best_spec.yaml"
RESULT_NAME = "result.json"
OPTIMISED, UNSTEERED, INCUMBENT = "optimised", "unsteered", "incumbent"
_log = logging.getLogger(__name__)


@runtime_checkable
class Timed(Protocol):
    """An objective that also says how many seconds each part of its last call took, such as generation and judging."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds by part of the last call."""
        ...


def optimize(
    objective: Objective,
    template: SteeringSpec,
    settings: RunSettings,
    *,
    out: Path | str,
    arms: Sequence[Candidate] = (),
    progress: Callable[[Generation], None] | None = None,
    before: Callable[[], None] | None = None,
) -> OptimizeResult:
    """Search the weights of ``template`` for the highest mean score and return the spec that holds up on fresh items.

    Each generation is one call of ``objective`` on the split ``tune``. Only whole generations are run: the budget is rounded down to them. The
    best ``settings.finalists`` distinct candidates, and the optimiser's own ``incumbent`` when it has one, are then evaluated on ``validate``; the
    best there is evaluated on ``test``, in one call with the unsteered model and ``arms``. ``out`` receives ``run.jsonl``, ``best_spec.yaml`` and
    ``result.json``. A killed run that is started again with equal settings replays its log and ends with the same files.

    A candidate's fitness is the mean over its scored items, and unknown (NaN) when more than ``settings.missing_limit`` of its verdicts
    are missing: what is left then is a selection, not a sample.

    Args:
        objective: evaluates candidates; every candidate on the same items in the same order.
        template: everything but the weights.
        settings: what decides the result; ``template_digest``, ``optimizer_digest`` and ``arms`` are filled in here.
        out: the run's folder, new or of the same run.
        arms: further conditions of the test evaluation, such as the prompted persona.
        progress: called after each generation, replayed ones included.
        before: called when the folder is this run's and evaluations are to come, ahead of the first one; an error of it ends the run.

    Raises:
        RunError: when the settings make no run, the folder is another run's, the log does not replay, or every fitness is unknown.
        JudgeError: when more than ``settings.missing_limit`` of an evaluation's verdicts are missing; the log is kept, and the run can go on.
    """
    settings = _completed(settings, template, arms)
    folder = Path(out)
    size = population_size(settings)
    with RunLog.open(folder, settings) as log:
        if before is not None and not log.of_kind("test"):
            before()
        run = _Run(objective, template, settings, log, progress, planned=settings.budget // size * size)
        optimizer = _load(settings)
        run.search(optimizer)
        finalists = run.finalists(optimizer)
        validated = run.evaluate_once("validate", finalists)
        chosen = _choose(finalists, validated)
        spec = finalists[chosen].spec
        assert spec is not None, "every finalist is steered"
        conditions = [Candidate(name=OPTIMISED, spec=spec), Candidate(name=UNSTEERED), *arms]
        tested = run.evaluate_once("test", conditions)
        return _finish(run, folder, (finalists, validated, chosen), (conditions, tested))


def _load(settings: RunSettings) -> Optimizer:
    return load_optimizer(settings.optimizer, settings.space, seed=settings.seed, options=settings.optimizer_options)


def _completed(settings: RunSettings, template: SteeringSpec, arms: Sequence[Candidate]) -> RunSettings:
    if settings.budget < 1:
        raise RunError(f"budget={settings.budget} allows no evaluation. Allowed: at least one population of candidates, such as 80.")
    if settings.finalists < 1:
        raise RunError(f"finalists={settings.finalists} leaves nothing to choose from. Allowed: 1 or more.")
    _check_space(settings.space)
    if template.vectors is None or not (template.layers or template.sites):
        raise RunError("template has no vectors or no layers, so no weight would have an effect. Set both before searching weights.")
    names = [OPTIMISED, UNSTEERED, *(a.name for a in arms)]
    if len(set(names)) != len(names):
        raise RunError(f"arms={[a.name for a in arms]}: names repeat. Allowed: distinct names other than {OPTIMISED!r} and {UNSTEERED!r}.")
    digests = {a.name: content_hash(describe(a)) for a in arms}
    file = optimizer_file(settings.optimizer)
    return settings.model_copy(update={"template_digest": template.digest, "optimizer_digest": file_hash(file), "arms": digests})


def _check_space(space: SearchSpace) -> None:
    if not space.names or len(set(space.names)) != len(space.names):
        raise RunError(f"space.names={space.names!r}: allowed are one or more distinct trait names.")
    if not space.low < space.high:
        raise RunError(f"space has low={space.low} and high={space.high}: low must be below high.")


def population_size(settings: RunSettings) -> int:
    """Return the first population's size, from an optimiser made for the purpose, before anything is written."""
    size = len(_checked(_load(settings).ask(), settings))
    if settings.budget < size:
        raise RunError(f"budget={settings.budget} is smaller than one population of {settings.optimizer} ({size}). Allowed: {size} or more.")
    if settings.budget % size:
        _log.info("budget %d is rounded down to %d, whole generations of %d", settings.budget, settings.budget // size * size, size)
    return size


def _checked(points: FloatArray, settings: RunSettings) -> FloatArray:
    space = settings.space
    if points.ndim != 2 or points.shape[1] != space.dimension or not len(points):
        raise RunError(f"optimizer={settings.optimizer!r} asked for an array of shape {points.shape}; it must be [population, {space.dimension}].")
    if not (np.isfinite(points).all() and (points >= space.low).all() and (points <= space.high).all()):
        raise RunError(
            f"optimizer={settings.optimizer!r} asked for a point outside the box [{space.low}, {space.high}], or not finite: {points.tolist()}"
        )
    return points


@dataclass
class _Run:
    """What the stages of one run share."""

    objective: Objective
    template: SteeringSpec
    settings: RunSettings
    log: RunLog
    progress: Callable[[Generation], None] | None
    planned: int
    history: list[Generation] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)

    def search(self, optimizer: Optimizer) -> None:
        """Run the generations, the logged ones by replay."""
        logged: Iterator[dict[str, Any] | None] = chain(self.log.of_kind("generation"), iter(lambda: None, 0))
        while not optimizer.should_stop and len(self.evaluated) < self.planned:
            points = _checked(optimizer.ask(), self.settings)
            if len(self.evaluated) + len(points) > self.settings.budget:
                break
            line = next(logged)
            replayed = line is not None
            if line is None:
                line = self._generation(points)
            else:
                self._check_replay(points, line)
            fitness = np.array([math.nan if f is None else f for f in line["fitness"]])
            self._record(points, line, fitness, replayed=replayed)
            optimizer.tell(points, fitness)
        if next(logged) is not None:
            raise RunError(f"run log {str(self.log.path)!r} holds more generations than this run makes. It does not replay; use another folder.")

    def _candidates(self, points: FloatArray, generation: int) -> list[Candidate]:
        weights = [self.settings.space.weights(p) for p in points]
        return [Candidate(name=f"g{generation}c{i}", spec=self.template.with_weights(w)) for i, w in enumerate(weights)]

    def _generation(self, points: FloatArray) -> dict[str, Any]:
        number = len(self.history)
        candidates = self._candidates(points, number)
        head = {"generation": number, "seed": self.settings.seed, "points": points.tolist()}
        data = head | self._evaluate(candidates, "tune", head)
        limit = self.settings.missing_limit
        fitness = [_fitness(score_from_json(s), limit) for s in data["scores"]]
        if all(math.isnan(f) for f in fitness):
            reason = f"every fitness of generation {number} is NaN: each candidate has more than {limit:.0%} of its verdicts missing"
            self.log.append("stopped", data | {"reason": reason})
            raise RunError(f"{reason}. Look at the reasons in {self.log.path}; lower alpha if replies are empty, check the judge if it fails.")
        return self.log.append("generation", data | {"fitness": [None if math.isnan(f) else f for f in fitness]})

    def _check_replay(self, points: FloatArray, line: Mapping[str, Any]) -> None:
        number = len(self.history)
        if line["generation"] != number or not np.array_equal(np.array(line["points"]), points):
            raise RunError(
                f"run log {str(self.log.path)!r} does not replay: generation {number} asks for other points than were logged. "
                "The optimiser draws from something other than its seed, or a library changed; use another folder."
            )

    def _record(self, points: FloatArray, line: Mapping[str, Any], fitness: FloatArray, *, replayed: bool) -> None:
        candidates = self._candidates(points, len(self.history))
        scores = [score_from_json(s) for s in line["scores"]]
        self.evaluated += [Evaluated(c, float(f), s) for c, f, s in zip(candidates, fitness, scores, strict=True)]
        best, mean = np.nanmax([e.fitness for e in self.evaluated]), np.nanmean(fitness)
        verdicts = sum(len(s.items) for s in scores)
        generation = Generation(
            index=len(self.history),
            evaluated=len(self.evaluated),
            planned=self.planned,
            best=float(best),
            mean=float(mean),
            missing=line["missing"],
            verdicts=verdicts,
            seconds=line["seconds"],
            replayed=replayed,
        )
        self.history.append(generation)
        if self.progress is not None:
            self.progress(generation)

    def _evaluate(self, candidates: Sequence[Candidate], split: str, head: Mapping[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        scores = self.objective(candidates, split=split)
        seconds = {"total": time.perf_counter() - started}
        if isinstance(self.objective, Timed):
            seconds |= self.objective.timings
        _check_items(candidates, scores, split)
        data = {
            "split": split,
            "candidates": [describe(c) for c in candidates],
            "scores": [score_to_json(s) for s in scores],
            "missing": sum(s.missing for s in scores),
            "seconds": seconds,
        }
        try:
            check_missing([i.verdict for s in scores for i in s.items], self.settings.missing_limit)
        except JudgeError as problem:
            self.log.append("stopped", {**head, **data, "reason": str(problem)})
            raise
        return data

    def evaluate_once(self, split: Literal["validate", "test"], candidates: Sequence[Candidate]) -> list[CandidateScore]:
        """Evaluate candidates on a split that is touched once; a resumed run takes the logged outcome."""
        lines = self.log.of_kind(split)
        line = lines[0] if lines else self.log.append(split, self._evaluate(candidates, split, {}))
        if line["candidates"] != json.loads(json.dumps([describe(c) for c in candidates])):
            raise RunError(f"run log {str(self.log.path)!r} does not replay: its {split} line has other candidates. Use another folder.")
        return [score_from_json(s) for s in line["scores"]]

    def finalists(self, optimizer: Optimizer) -> list[Candidate]:
        """Return the best few distinct candidates by tuning fitness, and the optimiser's incumbent when it has one."""
        ranked = sorted((e for e in self.evaluated if not math.isnan(e.fitness)), key=lambda e: -e.fitness)
        found: dict[str, Candidate] = {}
        for entry in ranked:
            assert entry.candidate.spec is not None, "the search evaluates specs only"
            if len(found) < self.settings.finalists:
                found.setdefault(entry.candidate.spec.digest, entry.candidate)
        incumbent = getattr(optimizer, "incumbent", None)
        if incumbent is not None:
            point = _checked(np.asarray(incumbent, dtype=np.float64)[None], self.settings)[0]
            spec = self.template.with_weights(self.settings.space.weights(point))
            found.setdefault(spec.digest, Candidate(name=INCUMBENT, spec=spec))
        return list(found.values())


def _fitness(score: CandidateScore, limit: float) -> float:
    return math.nan if score.missing / len(score.items) > limit else score.mean


def _check_items(candidates: Sequence[Candidate], scores: Sequence[CandidateScore], split: str) -> None:
    if len(scores) != len(candidates):
        raise RunError(
            f"the objective returned {len(scores)} scores for {len(candidates)} candidates on split {split!r}; one each is needed, in order."
        )
    items = [tuple(i.item for i in s.items) for s in scores]
    if not items[0] or len(set(items)) != 1:
        raise RunError(
            f"the objective scored the candidates on different items, or on none, on split {split!r}; all need the same items in the same order."
        )


def _choose(finalists: Sequence[Candidate], scores: Sequence[CandidateScore]) -> int:
    """Return the index of the highest validation mean; ties go to the better tuning fitness, which comes first."""
    means = [s.mean for s in scores]
    if all(math.isnan(m) for m in means):
        raise RunError(
            f"none of the finalists {[c.name for c in finalists]} has a score on the validation split. Look at the missing verdicts' reasons."
        )
    return int(np.nanargmax(means))


def _finish(
    run: _Run,
    folder: Path,
    validation: tuple[Sequence[Candidate], Sequence[CandidateScore], int],
    testing: tuple[Sequence[Candidate], Sequence[CandidateScore]],
) -> OptimizeResult:
    (finalists, validated, chosen), (arms, tested) = validation, testing
    spec = finalists[chosen].spec
    assert spec is not None, "every finalist is steered"
    spec = spec.model_copy(update={"comment": f"persona {run.settings.persona}, {run.settings.optimizer}, run {run.log.run_id[:12]}"})
    top = max((e for e in run.evaluated if not math.isnan(e.fitness)), key=lambda e: e.fitness)
    tune, validate, test, unsteered = (Estimate.of(s) for s in (top.score, validated[chosen], tested[0], tested[1]))
    result = OptimizeResult(
        run_id=run.log.run_id,
        best=spec,
        chosen=finalists[chosen].name,
        tune=tune,
        validate=validate,
        test=test,
        unsteered=unsteered,
        optimism_validate=Gap.between(tune, validate),
        optimism_test=Gap.between(tune, test),
        tune_score=top.score,
        validate_score=validated[chosen],
        test_scores={a.name: s for a, s in zip(arms, tested, strict=True)},
        generations=tuple(run.history),
        spec_path=folder / SPEC_NAME,
        result_path=folder / RESULT_NAME,
    )
    spec.save(result.spec_path)
    content = result_json(result, run.settings.model_dump(mode="json"), paired_table(finalists, validated), paired_table(arms, tested))
    write_atomic(result.result_path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
    return result
