"""Reports for the report's tests: a realistic one, one without any effect, and the least that is a report."""

from typing import Any

import numpy as np

from steered_lm.report import ReportData
from steered_lm.report.data import (
    Arm,
    CapabilityTask,
    Generation,
    JudgeInfo,
    ModelInfo,
    PersonaInfo,
    Provenance,
    Reply,
    Sample,
    SearchTrace,
    Stage,
    TraitInfo,
    VectorInfo,
)

TRAITS = ("self_other_focus", "formality", "relationship_distance", "narrative_mode", "emotional_tone")
TARGET = dict(zip(TRAITS, (0.7, -0.8, -0.6, 0.9, 0.5), strict=True))
PROMPTS = ("What do you do on a rainy day?", "Tell me about the market.", "How was the harvest?", "Who taught you to sew?")


def scored(rng: np.random.Generator, mean: float, n: int, spread: float = 0.5) -> tuple[float | None, ...]:
    return tuple(round(float(v), 3) for v in np.clip(rng.normal(mean, spread, n), 1.0, 5.0))


def levels(rng: np.random.Generator, share: float, n: int) -> dict[str, tuple[float | None, ...]]:
    return {t: tuple(round(float(v), 3) for v in np.clip(rng.normal(share * TARGET[t], 0.2, n), -1.0, 1.0)) for t in TRAITS}


def arm(rng: np.random.Generator, name: str, kind: Any, mean: float, n: int, share: float, **more: Any) -> Arm:
    formed = tuple(bool(v) for v in rng.random(n) < 0.95)
    scores = scored(rng, mean, n)
    return Arm(name=name, kind=kind, scores=scores, traits=levels(rng, share, n), mean_length=17.5 + mean, well_formed=formed, **more)


def with_missing(scores: tuple[float | None, ...], *where: int) -> tuple[float | None, ...]:
    return tuple(None if i in where else s for i, s in enumerate(scores))


def trace(rng: np.random.Generator, name: str, top: float) -> SearchTrace:
    means = np.linspace(2.0, top, 12) + rng.normal(0, 0.08, 12)
    best = np.maximum.accumulate(means + 0.35)
    rows = [
        Generation(evaluations=8 * (i + 1), best=round(float(b), 3), mean=round(float(m), 3), missing=int(i == 3), seconds=1.25)
        for i, (b, m) in enumerate(zip(best, means, strict=True))
    ]
    return SearchTrace(optimizer=name, seed=7, generations=tuple(rows))


def realistic(effect: float = 1.8, *, n: int = 12, null_shift: float = 0.0) -> ReportData:
    rng = np.random.default_rng(11)
    weights = dict(zip(TRAITS, (0.6, -0.4, -0.7, 0.8, 0.2), strict=True))
    unsteered = arm(rng, "unsteered", "unsteered", 2.1, n, 0.1)
    prompted = arm(rng, "prompted persona", "prompted", 2.1 + 1.15 * effect, n, 0.9)
    optimized = arm(
        rng,
        "CMA-ES",
        "optimized",
        2.1 + effect,
        n,
        0.7,
        optimizer="cma_es",
        weights=weights,
        tuning=scored(rng, min(5.0, 2.4 + effect), 16),
        validation=scored(rng, 2.2 + effect, 12),
    )
    others = (
        arm(rng, "equal weights", "equal_weights", 2.1 + 0.4 * effect, n, 0.4, note="All five traits with weight 1 towards the persona."),
        arm(rng, "random direction", "random_direction", 2.1, n, 0.1, note="Same norm as the optimised push."),
        arm(rng, "random search", "optimized", 2.1 + 0.85 * effect, n, 0.6, optimizer="random_search", tuning=scored(rng, 2.3 + 0.9 * effect, 16)),
        arm(rng, "unsteered again", "null", 2.1 + null_shift, n, 0.1, note="The same model, sampled with another seed."),
    )
    gone = {"scores": with_missing(prompted.scores, 2), "missing_reasons": {"empty reply": 1}}
    prompted = prompted.model_copy(update=gone)
    partial = {"traits": {t: v for t, v in others[0].traits.items() if t != "narrative_mode"}}
    right, wrong = (rng.random((60,)) < 0.66, rng.random((60,)) < 0.6)
    return ReportData(
        title="Steering steered-lm/tiny-chat towards ada",
        persona=PersonaInfo(
            name="ada",
            description="A warm, chatty market trader who tells stories.",
            traits=tuple(TraitInfo(name=t, low_pole=f"low {t}", high_pole=f"high {t}", target=v) for t, v in TARGET.items()),
        ),
        model=ModelInfo(
            name="steered-lm/tiny-chat", fingerprint="3f" * 8, parameters=2_000_000, layers=6, d_model=160, dtype="float32", device="cpu"
        ),
        judge=JudgeInfo(name="stylometric", auc=0.93, auc_low=0.87, auc_high=0.97, positives=24, negatives=120),
        items=tuple(f"test-{i:02d}" for i in range(n)),
        arms=(unsteered, prompted, others[0].model_copy(update=partial), others[1], others[2], optimized, others[3]),
        main="CMA-ES",
        searches=(trace(rng, "CMA-ES", 2.1 + effect), trace(rng, "random search", 2.1 + 0.5 * effect)),
        capability=(
            CapabilityTask(
                name="small facts", arm="CMA-ES", unsteered=tuple(right * 1.0), steered=tuple(wrong * 1.0), chance=0.25, description="60 facts."
            ),
            CapabilityTask(
                name="truthfulness", arm="CMA-ES", unsteered=scored(rng, 2.0, 20, 0.2), steered=scored(rng, 1.95, 20, 0.2), metric="score"
            ),
        ),
        vectors=tuple(
            VectorInfo(
                trait=t,
                layer=4,
                method="svd",
                pooling="response_mean",
                explained_variance=0.41,
                right=r,
                held_out=40,
                cosines={"mean_diff": 0.97, "pca": 0.62},
                residual_norm=8.4,
            )
            for t, r in zip(TRAITS, (40, 39, 38, 24, 40), strict=True)
        ),
        samples=tuple(
            Sample(
                prompt=p,
                replies=(
                    Reply(arm="unsteered", text="One might say that the market is large.", score=2.2),
                    Reply(arm="prompted persona", text="", missing="empty reply")
                    if i == 2
                    else Reply(arm="prompted persona", text="Oh dear friend, once I had a stall!", score=4.1),
                    Reply(arm="CMA-ES", text="Yeah, once I told our friends a story, and we were totally happy together.", score=4.4),
                ),
            )
            for i, p in enumerate(PROMPTS)
        ),
        settings={"budget": 96, "alpha": 0.6, "layers": "4", "positions": "response", "unit": "residual", "optimizer": "cma_es"},
        provenance=Provenance(
            created="2026-01-02 10:11",
            command="steered-lm demo --out runs/demo",
            versions={"steered-lm": "0.1.0", "torch": "2.13.0"},
            stages=(Stage(name="vectors", seconds=11.2), Stage(name="search", seconds=74.0)),
            hashes={"vectors": "ab" * 32},
        ),
    )


def null_result() -> ReportData:
    return realistic(effect=0.0)


def minimal(**more: Any) -> ReportData:
    """The least that makes a report: the unsteered arm and nothing else."""
    base: dict[str, Any] = {
        "title": "t",
        "persona": PersonaInfo(name="ada"),
        "model": ModelInfo(name="m"),
        "judge": JudgeInfo(name="j"),
        "items": ("a", "b"),
        "arms": (Arm(name="unsteered", kind="unsteered", scores=(2.0, 3.0)),),
    }
    return ReportData(**base | more)
