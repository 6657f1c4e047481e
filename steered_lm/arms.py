"""The conditions of a held-out comparison: what is compared with the optimised spec, and why."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from steered_lm.report.assemble import ArmOutcome
from steered_lm.report.data import ArmKind, CapabilityTask
from steered_lm.search.protocol import Candidate, CandidateScore
from steered_lm.steering.spec import Site, SteeringSpec, VectorsRef
from steered_lm.study import Study

if TYPE_CHECKING:
    from steered_lm.search.result import OptimizeResult

UNSTEERED, PROMPTED, EQUAL, RANDOM = "unsteered", "prompted persona", "equal weights", "random direction"
SAMPLED, SAMPLED_AGAIN = "unsteered, sampled", "unsteered, sampled again"
RANDOM_DIRECTIONS = 5
NULL_SEEDS = (1, 2)
COST_TASKS = {
    "tiny_knowledge": "small facts in MMLU's shape: the right one of four answers by log-likelihood",
    "tiny_truth": "common misconceptions in TruthfulQA's mc1 shape: the true one of four answers by log-likelihood",
}


class _Planned(NamedTuple):
    candidate: Candidate
    kind: ArmKind
    note: str = ""


def compare(study: Study, searches: Mapping[str, "OptimizeResult"], folder: Path) -> list[ArmOutcome]:
    """Evaluate every arm on the test split in one population, and the null arm in two sampled ones.

    The arms: unsteered; the persona's system prompt; each optimiser's best spec; equal weights by the sign of the persona's own trait levels,
    and random directions, both as long as the vector of the first optimiser's best spec, so that only the direction differs.
    """
    main = next(iter(searches.values())).best
    planned = [
        _Planned(Candidate(name=UNSTEERED), "unsteered"),
        *(_Planned(Candidate(name=f"optimised by {name}", spec=result.best), "optimized") for name, result in searches.items()),
        _Planned(Candidate(name=PROMPTED, system=study.persona.system_prompt), "prompted", "no steering; the persona's system prompt"),
    ]
    draws: list[Candidate] = []
    if main.operation == "add":
        note = "signs of the persona's own trait levels; as long as the optimised vector"
        planned.append(_Planned(Candidate(name=EQUAL, spec=equal_weights(study, main)), "equal_weights", note))
        draws = [Candidate(name=f"{RANDOM} {i}", spec=random_direction(study, main, folder, seed=i)) for i in range(RANDOM_DIRECTIONS)]
    scores = study.objective([p.candidate for p in planned] + draws, split="test")
    found = [_outcome(p, score, searches) for p, score in zip(planned, scores, strict=False)]
    if draws:
        note = f"mean of {RANDOM_DIRECTIONS} random directions; as long as the optimised vector"
        found.append(ArmOutcome(RANDOM, "random_direction", tuple(scores[len(planned) :]), note))
    return found + _null_arm(study)


def _outcome(planned: _Planned, score: CandidateScore, searches: Mapping[str, "OptimizeResult"]) -> ArmOutcome:
    candidate = planned.candidate
    found = ArmOutcome(candidate.name, planned.kind, (score,), planned.note, weights={} if candidate.spec is None else candidate.spec.weights)
    for name, result in searches.items():
        if candidate.name == f"optimised by {name}":
            return found._replace(optimizer=name, tuning=result.tune_score, validation=result.validate_score)
    return found


def _null_arm(study: Study) -> list[ArmOutcome]:
    """Return the unsteered model twice, sampled with two seeds: what the measurement finds where there is nothing to find."""
    pair = [study.sampled(seed)([Candidate(name=UNSTEERED)], split="test")[0] for seed in NULL_SEEDS]
    notes = [f"temperature 1, seed {seed}; every other arm is greedy" for seed in NULL_SEEDS]
    return [
        ArmOutcome(SAMPLED, "other", (pair[0],), notes[0]),
        ArmOutcome(SAMPLED_AGAIN, "null", (pair[1],), notes[1], reference=SAMPLED),
    ]


def equal_weights(study: Study, like: SteeringSpec) -> SteeringSpec:
    """Return a spec with one common weight, signed by the persona's own trait levels, whose added vector is as long as that of ``like``."""
    signs = {trait: math.copysign(1.0, study.persona.traits.get(trait, 1.0)) for trait in study.traits}
    spec = like.with_weights(signs)
    layer = like.layers[0]
    ratio = added_norms(study, like)[layer] / added_norms(study, spec)[layer]
    return spec.with_weights({trait: sign * ratio for trait, sign in signs.items()})


def random_direction(study: Study, like: SteeringSpec, folder: Path, *, seed: int) -> SteeringSpec:
    """Return a spec that adds, at each layer of ``like``, a random direction of the same length; its vectors file goes into ``folder``."""
    from steered_lm.steering.vectors import random_vectors

    path = random_vectors(study.vectors, seed=seed).save(folder / f"random_direction_{seed}.safetensors")
    sites = tuple(Site(layers=(layer,), weights={"random": 1.0}, alpha=norm, unit="raw") for layer, norm in added_norms(study, like).items())
    return SteeringSpec(vectors=VectorsRef.to(path), sites=sites, positions=like.positions)


def added_norms(study: Study, spec: SteeringSpec) -> dict[int, float]:
    """Return the L2 norm of what a spec adds, by layer."""
    sites = study.lm.steerer.compile(spec).sites
    return {layer: float(site.delta.norm()) for layer, site in sites.items() if site.delta is not None}


def capability(study: Study, spec: SteeringSpec, arm: str) -> list[CapabilityTask]:
    """Answer our two small multiple-choice sets unsteered and under a spec, item by item."""
    from steered_lm.harness.population import evaluate_choices

    pair: Sequence[Candidate] = [Candidate(name="unsteered"), Candidate(name="steered", spec=spec)]
    found = []
    for task, description in COST_TASKS.items():
        answers = evaluate_choices(study.lm, task, pair)
        sides = {name: tuple(float(item.correct) for item in items) for name, items in answers.items()}
        found.append(CapabilityTask(name=task, arm=arm, unsteered=sides["unsteered"], steered=sides["steered"], chance=0.25, description=description))
    return found
