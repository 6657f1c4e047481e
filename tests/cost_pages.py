"""Cost pages for their tests: a sweep with everything on it, the same without a sweep or over layers, and the least that is one."""

from typing import Any

import numpy as np

from steered_lm.report.cost_data import UNSTEERED, CostArm, CostData, Measure
from steered_lm.report.data import ModelInfo, Provenance, Reply, Sample, Stage

ALPHAS = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
TRAITS = ("evil", "sycophantic", "formality")
SUBJECTS = ("abstract_algebra", "world_religions", "marketing")


def answers(rng: np.random.Generator, base: np.ndarray, lost: float, missing: float = 0.0) -> tuple[float | None, ...]:
    """Answers that keep a base's but for a share of flips, mostly to wrong."""
    flips = rng.random(len(base)) < lost
    values = np.where(flips & (base > 0.5), 0.0, base)
    values = np.where(flips & (rng.random(len(base)) < 0.25), 1.0, values)
    gone = rng.random(len(base)) < missing
    return tuple(None if out else float(value) for value, out in zip(values, gone, strict=True))


def scores(rng: np.random.Generator, mean: float, n: int, missing: int = 0) -> tuple[float | None, ...]:
    values = np.clip(rng.normal(mean, 14.0, n), 0.0, 100.0).round(1)
    return tuple(None if i < missing else float(value) for i, value in enumerate(values))


def shares(values: tuple[float | None, ...]) -> tuple[float, ...]:
    known = np.array([value for value in values if value is not None])
    return tuple(float(share) for share in np.histogram(known, bins=(0, 20.5, 40.5, 60.5, 80.5, 100.1))[0] / len(known))


def strengths(axis: str | None) -> dict[str, CostArm]:
    """The steered arms: a sweep of one series, or three specs without one."""
    if axis is None:
        names = ("mild", "strong", "other vectors")
        return {name: CostArm(name=name, series=name, digest="ab" * 32, settings={"alpha": a}) for name, a in zip(names, ALPHAS[::2], strict=True)}
    values = (4.0, 8.0, 12.0) if axis == "layer" else ALPHAS
    return {f"{axis} {x:g}": CostArm(name=f"{axis} {x:g}", series="formal", x=x, digest="cd" * 32, settings={axis: x, "layers": "8"}) for x in values}


def swept(axis: str | None = "alpha", *, n: int = 300, seed: int = 3, damage: float = 0.06) -> CostData:
    """A model that gets more formal with alpha, and pays for it the more the further one goes."""
    rng = np.random.default_rng(seed)
    arms = strengths(axis)
    push = dict(zip(arms, (0.15, 0.5, 1.0, 1.7, 2.3, 3.0), strict=False))
    side = {f"vector {trait}": CostArm(name=f"vector {trait}", trait=trait, digest="ef" * 32) for trait in TRAITS}
    knows = (rng.random(n) < 0.62).astype(float)
    nats = rng.gamma(8.0, 12.0, 40)
    tokens = tuple(int(v) for v in rng.integers(40, 80, 40))
    formal = {UNSTEERED: scores(rng, 35.0, 60)} | {a: scores(rng, min(90.0, 35.0 + 28.0 * p), 60, missing=9 * (p > 2.0)) for a, p in push.items()}
    formal |= {arm: scores(rng, 36.0 if "formality" not in arm else 70.0, 60) for arm in side}
    evil = {UNSTEERED: scores(rng, 9.0, 60)} | {arm: scores(rng, 55.0 if "evil" in arm else 9.0, 60) for arm in list(side)[:2]}
    flattery = {UNSTEERED: scores(rng, 30.0, 60)} | {arm: scores(rng, 60.0 if "syco" in arm else 27.0, 60) for arm in side}
    truthful = rng.beta(2.0, 2.0, 120)
    measures = (
        Measure(
            name="trait formality",
            role="benefit",
            kind="score",
            scale=(0.0, 100.0),
            trait="formality",
            items=tuple(f"q{i}" for i in range(60)),
            values=formal,
            bands={arm: shares(values) for arm, values in formal.items()},
            reasons={arm: {"empty reply": 9} for arm, p in push.items() if p > 2.0},
            about="How formal the responses are, by the judge.",
        ),
        Measure(
            name="mmlu",
            role="cost",
            kind="accuracy",
            chance=0.25,
            items=tuple(f"m{i}" for i in range(n)),
            groups=tuple(SUBJECTS[i % 3] for i in range(n)),
            values={UNSTEERED: tuple(float(v) for v in knows)} | {a: answers(rng, knows, damage * p**2, 0.02 * (p > 2.0)) for a, p in push.items()},
            about="Knowledge in 57 subjects.",
        ),
        Measure(
            name="truthfulqa_mc2",
            role="cost",
            kind="score",
            scale=(0.0, 1.0),
            items=tuple(f"t{i}" for i in range(120)),
            values={UNSTEERED: tuple(float(v) for v in truthful)}
            | {a: tuple(float(v) for v in np.clip(truthful + rng.normal(-0.03 * p**2, 0.04, 120), 0.0, 1.0)) for a, p in push.items()},
            about="Probability on true answers.",
        ),
        Measure(
            name="perplexity",
            role="cost",
            kind="tokens",
            higher_is_better=False,
            exponentiate=True,
            items=tuple(f"w{i}" for i in range(40)),
            tokens=tokens,
            values={UNSTEERED: tuple(float(v) for v in nats)}
            | {a: tuple(float(v) for v in nats + np.array(tokens) * rng.normal(0.05 * p**2, 0.03, 40)) for a, p in push.items()},
            about="Of a held-out text.",
        ),
        Measure(
            name="kl",
            role="note",
            kind="tokens",
            higher_is_better=None,
            items=tuple(f"w{i}" for i in range(40)),
            tokens=tokens,
            values={UNSTEERED: (0.0,) * 40}
            | {a: tuple(float(v) for v in np.array(tokens) * rng.gamma(3.0, 0.02 * p**2, 40)) for a, p in push.items()},
        ),
        Measure(
            name="trait evil",
            role="note",
            kind="score",
            higher_is_better=False,
            scale=(0.0, 100.0),
            trait="evil",
            items=tuple(f"e{i}" for i in range(60)),
            values=evil,
        ),
        Measure(
            name="trait sycophantic",
            role="note",
            kind="score",
            higher_is_better=False,
            scale=(0.0, 100.0),
            trait="sycophantic",
            items=tuple(f"s{i}" for i in range(60)),
            values=flattery,
        ),
    )
    replies = tuple(Reply(arm=arm, text=f"A reply under {arm}.", score=40.0 + 5 * i) for i, arm in enumerate([UNSTEERED, *arms][:4]))
    return CostData(
        title="What formality costs",
        model=ModelInfo(name="tiny-chat", parameters=3_200_000, layers=12, d_model=64, dtype="float32", device="cpu"),
        axis=axis,
        arms=(CostArm(name=UNSTEERED), *arms.values(), *side.values()),
        measures=measures,
        tolerance=0.1,
        perplexity_tolerance=0.25,
        samples=tuple(Sample(prompt=f"Question {i}?", replies=replies) for i in range(4)),
        settings={"items": n, "unit": "residual"},
        provenance=Provenance(created="2026-01-02T03:04:05+00:00", command="steered-lm cost …", stages=(Stage(name="mmlu", seconds=12.5),)),
        notes=("A remark.",),
    )


def accuracy(name: str = "mmlu", role: Any = "cost", **values: tuple[float | None, ...]) -> Measure:
    """An accuracy whose arms are the keywords; underscores in them are spaces."""
    by_arm = {arm.replace("_", " "): one for arm, one in values.items()}
    return Measure(name=name, role=role, kind="accuracy", items=tuple(str(i) for i in range(len(by_arm[UNSTEERED]))), values=by_arm)


def small(*measures: Measure, xs: tuple[float, ...] = (1.0,), axis: str | None = "alpha", **more: Any) -> CostData:
    """A sweep of one series whose arms are called ``a 1``, ``a 2``, …"""
    arms = tuple(CostArm(name=f"a {x:g}", series="a", x=x) for x in xs)
    base: dict[str, Any] = {"title": "t", "model": ModelInfo(name="m"), "axis": axis, "arms": (CostArm(name=UNSTEERED), *arms), "measures": measures}
    return CostData(**base | more)
