"""What a search found: estimates with standard errors, the optimism gap, and the per-item scores that paired statistics need."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steered_lm.config import Config
from steered_lm.search.protocol import Candidate, CandidateScore
from steered_lm.steering.spec import SteeringSpec

RESULT_FORMAT = 1


class Estimate(Config):
    """A mean score over items: ``n`` verdicts that are there, ``missing`` that are not, and the mean's standard error (None below two)."""

    mean: float | None
    standard_error: float | None
    n: int
    missing: int

    @classmethod
    def of(cls, score: CandidateScore) -> "Estimate":
        """Return the estimate from one candidate's outcomes, items taken as independent."""
        found = np.array(score.scores)
        error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
        return cls(mean=float(found.mean()) if len(found) else None, standard_error=error, n=len(found), missing=score.missing)


class Gap(Config):
    """How far the search's own score lies above a fresh one; the splits hold different items, so the standard errors add up unpaired.

    The standard error covers the items' scatter alone. That the tuning score is the highest of many is the bias that the gap shows.
    """

    gap: float | None
    standard_error: float | None

    @classmethod
    def between(cls, tune: Estimate, fresh: Estimate) -> "Gap":
        """Return ``tune - fresh``."""
        gap = None if tune.mean is None or fresh.mean is None else tune.mean - fresh.mean
        both = tune.standard_error is not None and fresh.standard_error is not None
        error = math.hypot(tune.standard_error or 0.0, fresh.standard_error or 0.0) if both else None
        return cls(gap=gap, standard_error=error)


@dataclass(frozen=True)
class Generation:
    """One generation, as the progress callback and the result show it.

    Attributes:
        index: counts from 0.
        evaluated: candidate evaluations so far, this generation's included.
        planned: candidate evaluations that the run will make on the tuning split, unless the optimiser stops early.
        best: highest fitness so far.
        mean: mean fitness of this generation, over the candidates that have one.
        missing: missing verdicts of this generation, of ``verdicts``.
        seconds: duration of the evaluation, ``total`` and by part.
        replayed: whether it was read from the log of a killed run.
    """

    index: int
    evaluated: int
    planned: int
    best: float
    mean: float
    missing: int
    verdicts: int
    seconds: Mapping[str, float]
    replayed: bool


@dataclass(frozen=True)
class Evaluated:
    """One candidate with its fitness on the tuning split (NaN when too many verdicts are missing) and its outcomes."""

    candidate: Candidate
    fitness: float
    score: CandidateScore


@dataclass(frozen=True)
class OptimizeResult:
    """The outcome of a run.

    Attributes:
        best: the spec that the validation split chose; it lies at ``spec_path``.
        chosen: its name among the candidates, such as ``g3c5`` or ``incumbent``.
        tune: the highest score that the search saw on the tuning split: what a report without fresh data would have claimed.
        validate: the chosen spec on the validation split, still a little optimistic, as it was chosen there.
        test: the chosen spec on the test split, the score to report.
        unsteered: the model without steering on the same test items.
        optimism_validate: ``tune - validate``.
        optimism_test: ``tune - test``.
        tune_score, validate_score: the outcomes behind ``tune`` and ``validate``.
        test_scores: all outcomes on the test split by arm (``optimised``, ``unsteered`` and any further arms), same items in the same order.
        generations: the search's course.
    """

    run_id: str
    best: SteeringSpec
    chosen: str
    tune: Estimate
    validate: Estimate
    test: Estimate
    unsteered: Estimate
    optimism_validate: Gap
    optimism_test: Gap
    tune_score: CandidateScore
    validate_score: CandidateScore
    test_scores: Mapping[str, CandidateScore]
    generations: tuple[Generation, ...]
    spec_path: Path
    result_path: Path


def digest_of(candidate: Candidate) -> str | None:
    """Return the digest of a candidate's spec; None for the unsteered model."""
    return None if candidate.spec is None else candidate.spec.digest


def describe(candidate: Candidate) -> dict[str, Any]:
    """Return what identifies a candidate in a log line."""
    return {
        "name": candidate.name,
        "weights": None if candidate.spec is None else candidate.spec.weights,
        "digest": digest_of(candidate),
        "system": candidate.system,
    }


def paired_table(candidates: Sequence[Candidate], scores: Sequence[CandidateScore]) -> dict[str, Any]:
    """Return the items once and, by candidate, scores (None where missing), reasons and responses in the items' order, ready for paired statistics.

    Durations and whether a verdict came from the cache are left out: they differ between an unbroken and a resumed run.
    """
    arms = {
        c.name: {
            **describe(c),
            "estimate": Estimate.of(s).model_dump(),
            "scores": [i.verdict.score for i in s.items],
            "missing": [i.verdict.missing for i in s.items],
            "responses": [i.response for i in s.items],
        }
        for c, s in zip(candidates, scores, strict=True)
    }
    return {"items": [{"item": i.item, "prompt": i.prompt} for i in scores[0].items], "arms": arms}


def mean_seconds(generations: Sequence[Generation]) -> dict[str, float]:
    """Return the mean seconds of a generation, in all and by part, over those that were run and not replayed; empty when there are none."""
    ran = [g.seconds for g in generations if not g.replayed]
    return {name: sum(seconds.get(name, 0.0) for seconds in ran) / len(ran) for name in (ran[0] if ran else ())}


def result_json(result: OptimizeResult, settings: Mapping[str, Any], validated: Mapping[str, Any], tested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``result.json``; it holds no timings and no paths of the run, so equal runs give equal bytes."""
    estimates = {"tune_best": result.tune, "validate": result.validate, "test": result.test, "unsteered_test": result.unsteered}
    history = [
        {"generation": g.index, "evaluated": g.evaluated, "best": g.best, "mean": g.mean, "missing": g.missing, "verdicts": g.verdicts}
        for g in result.generations
    ]
    return {
        "format": RESULT_FORMAT,
        "run_id": result.run_id,
        "settings": settings,
        "chosen": {"name": result.chosen, "weights": result.best.weights, "digest": result.best.digest},
        "scores": {name: e.model_dump() for name, e in estimates.items()},
        "optimism": {"tune_minus_validate": result.optimism_validate.model_dump(), "tune_minus_test": result.optimism_test.model_dump()},
        "history": history,
        "validate": validated,
        "test": tested,
    }
