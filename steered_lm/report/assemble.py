"""From a study's outcomes to the data that a report is drawn from."""

import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from steered_lm.persona.meter import TRAITS, trait_levels
from steered_lm.report.data import (
    Arm,
    ArmKind,
    CapabilityTask,
    Generation,
    JudgeInfo,
    ModelInfo,
    PersonaInfo,
    Provenance,
    Reply,
    ReportData,
    Sample,
    SearchTrace,
    Stage,
    TraitInfo,
    VectorInfo,
)
from steered_lm.search.protocol import CandidateScore
from steered_lm.search.runlog import installed_versions

if TYPE_CHECKING:
    from steered_lm.persona.schema import Persona
    from steered_lm.search.result import OptimizeResult
    from steered_lm.steering.vectors import TraitVectors

SAMPLES = 6
_POLES = {
    "self_other_focus": ("other-focused", "self-focused"),
    "formality": ("casual", "formal"),
    "relationship_distance": ("close", "distant"),
    "narrative_mode": ("explaining", "telling"),
    "emotional_tone": ("gloomy", "warm"),
}


class ArmOutcome(NamedTuple):
    """One arm on the test split.

    Attributes:
        draws: one score, or several for a control that stands for several draws; the report takes their mean by item.
        tuning, validation: the arm's own scores on the splits that it was tuned and chosen on, if it was.
        reference: the arm that a null arm is compared with.
    """

    name: str
    kind: ArmKind
    draws: tuple[CandidateScore, ...]
    note: str = ""
    weights: Mapping[str, float] = {}
    optimizer: str = ""
    tuning: CandidateScore | None = None
    validation: CandidateScore | None = None
    reference: str | None = None


class Findings(NamedTuple):
    """What a study found, in the order in which it shall be shown."""

    arms: Sequence[ArmOutcome]
    searches: Mapping[str, "OptimizeResult"]
    costs: Sequence[CapabilityTask]
    seed: int
    stages: Mapping[str, float]
    settings: Mapping[str, Any]


def assemble(persona: "Persona", judge: Any, vectors: "TraitVectors", model: ModelInfo, findings: Findings, *, well_formed: Any = None) -> ReportData:
    """Return the report's data.

    Args:
        persona: what was aimed at.
        vectors: the trait vectors that were weighted.
        model: facts about the model.
        findings: arms, searches and costs.
        judge: its ``held_out_auc`` is shown when it has one.
        well_formed: a function from (prompt, reply) to whether the reply is well-formed, for models whose language is known.
    """
    arms = tuple(_arm(outcome, well_formed) for outcome in findings.arms)
    first = findings.arms[0].draws[0]
    return ReportData(
        title=f"Steering {model.name} towards {persona.name}",
        persona=PersonaInfo(name=persona.name, description=persona.description, traits=tuple(_trait(t, persona.traits.get(t)) for t in TRAITS)),
        model=model,
        judge=_judge(judge),
        items=tuple(i.item for i in first.items),
        arms=arms,
        searches=tuple(_trace(name, result, findings.seed) for name, result in findings.searches.items()),
        capability=tuple(findings.costs),
        vectors=_vectors(vectors),
        samples=_samples(findings.arms),
        settings=dict(findings.settings),
        provenance=_provenance_of(findings, vectors),
        seed=findings.seed,
    )


def _trait(name: str, target: float | None) -> TraitInfo:
    low, high = _POLES[name]
    return TraitInfo(name=name, low_pole=low, high_pole=high, target=target)


def _judge(judge: Any) -> JudgeInfo:
    auc = getattr(judge, "held_out_auc", None)
    description = "authorship model on character and word n-grams, trait markers and style features" if judge.name == "stylometric" else ""
    if auc is None:
        return JudgeInfo(name=judge.name, description=description)
    return JudgeInfo(
        name=judge.name, description=description, auc=auc.auc, auc_low=auc.low, auc_high=auc.high, positives=auc.own, negatives=auc.others
    )


def _arm(outcome: ArmOutcome, well_formed: Any) -> Arm:
    rows = list(zip(*(score.items for score in outcome.draws), strict=True))
    replies = [[item.response for item in row] for row in rows]
    return Arm(
        name=outcome.name,
        kind=outcome.kind,
        scores=tuple(_mean([item.verdict.score for item in row]) for row in rows),
        missing_reasons=dict(Counter(item.verdict.missing for row in rows for item in row if item.verdict.missing)),
        traits={trait: tuple(_mean([trait_levels(text)[trait] for text in texts]) for texts in replies) for trait in TRAITS},
        mean_length=fmean(len(text.split()) for texts in replies for text in texts),
        well_formed=None if well_formed is None else tuple(all(well_formed(i.prompt, i.response) for i in row) for row in rows),
        optimizer=outcome.optimizer,
        weights=dict(outcome.weights),
        tuning=_scores(outcome.tuning),
        validation=_scores(outcome.validation),
        reference=outcome.reference,
        note=outcome.note,
    )


def _scores(score: CandidateScore | None) -> tuple[float | None, ...]:
    return () if score is None else tuple(item.verdict.score for item in score.items)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def _trace(name: str, result: "OptimizeResult", seed: int) -> SearchTrace:
    generations = tuple(
        Generation(evaluations=g.evaluated, best=g.best, mean=g.mean, missing=g.missing, seconds=g.seconds.get("total", 0.0))
        for g in result.generations
    )
    return SearchTrace(optimizer=name, seed=seed, generations=generations)


def _vectors(vectors: "TraitVectors") -> tuple[VectorInfo, ...]:
    meta = vectors.meta
    return tuple(
        VectorInfo(
            trait=trait,
            layer=layer,
            method=meta.method,
            pooling=meta.pooling,
            explained_variance=s.explained_variance,
            right=round(s.held_out_right_side * s.held_out_pairs),
            held_out=s.held_out_pairs,
            cosines=s.cosine,
            residual_norm=meta.residual_norms[layer].response,
        )
        for trait, by_layer in meta.stats.items()
        for layer, s in by_layer.items()
    )


def _samples(arms: Sequence[ArmOutcome]) -> tuple[Sample, ...]:
    references = {a.reference for a in arms}
    shown = [a for a in arms if a.kind != "null" and a.name not in references]
    found = []
    for row in list(zip(*(a.draws[0].items for a in shown), strict=True))[:SAMPLES]:
        replies = tuple(Reply(arm=a.name, text=i.response, score=i.verdict.score, missing=i.verdict.missing) for a, i in zip(shown, row, strict=True))
        found.append(Sample(prompt=row[0].prompt, replies=replies))
    return tuple(found)


def _provenance_of(findings: Findings, vectors: "TraitVectors") -> Provenance:
    hashes = {f"run {name}": result.run_id[:16] for name, result in findings.searches.items()}
    hashes |= {f"contrast set {trait}": digest[:16] for trait, digest in vectors.meta.contrast_sets.items()}
    return provenance(hashes, findings.stages)


def provenance(hashes: Mapping[str, str], stages: Mapping[str, float] | None = None) -> Provenance:
    """Return where numbers come from: this command, its libraries, and hashes of what it read."""
    versions = {"python": platform.python_version(), **installed_versions("steered-lm", "lm-eval", "torch", "transformers", "cma", "scikit-learn")}
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["steered-lm", *sys.argv[1:]]),
        versions=versions,
        stages=tuple(Stage(name=name, seconds=seconds) for name, seconds in (stages or {}).items()),
        hashes=dict(hashes),
    )
