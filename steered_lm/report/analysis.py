"""From raw scores to what may be said: estimates, corrected comparisons, the null arm, the optimism gap, the capability cost."""

from typing import Literal

from steered_lm.config import Config
from steered_lm.report.data import Arm, ArmKind, CapabilityTask, ReportData, Scores, VectorInfo
from steered_lm.stats import Estimate, PairedDifference, holm, mcnemar_paired, mean_gap, mean_interval, paired_difference, share_interval

Question = Literal["unsteered", "prompted", "optimizer", "random_direction", "null"]
Outcome = Literal["higher", "lower", "uncorrected", "unclear", "no_interval", "no_data"]


class ArmSummary(Config):
    """One arm in numbers: mean score, trait levels and share of well-formed replies, each with its interval."""

    name: str
    kind: ArmKind
    score: Estimate
    traits: dict[str, Estimate]
    well_formed: Estimate | None


class Comparison(Config):
    """One arm minus another on the same items.

    ``p_holm`` is corrected for all comparisons of the report but the null ones, which check the measurement and claim nothing.
    """

    arm: str
    baseline: str
    question: Question
    difference: PairedDifference
    p_holm: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What may be said: ``uncorrected`` is an interval without zero that does not survive the correction."""
        d = self.difference
        if d.mean is None:
            return "no_data"
        if d.low is None:
            return "no_interval"
        if not d.excludes_zero:
            return "unclear"
        if self.question != "null" and (self.p_holm is None or self.p_holm > 1.0 - d.confidence + 1e-12):
            return "uncorrected"
        return "higher" if d.mean > 0 else "lower"


class Gap(Config):
    """How much of a tuned arm's score was luck: its scores on the tuning, validation and test items, and tuning minus test."""

    arm: str
    tuning: Estimate
    validation: Estimate
    test: Estimate
    gap: Estimate


class Capability(Config):
    """What steering costs on one task: both sides, and steered minus unsteered on the same items."""

    task: str
    arm: str
    metric: Literal["accuracy", "score"]
    higher_is_better: bool
    unsteered: Estimate
    steered: Estimate
    difference: PairedDifference


class VectorCheck(Config):
    """Whether a direction separates held-out pairs: None when that was not measured, False when chance is not excluded."""

    trait: str
    layer: int
    method: str
    right: Estimate | None
    separates: bool | None


class Analysis(Config):
    """Every number of the page that is not raw data. ``family`` is how many comparisons the correction covers."""

    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]
    null: tuple[Comparison, ...]
    family: int
    gaps: tuple[Gap, ...]
    capability: tuple[Capability, ...]
    vectors: tuple[VectorCheck, ...]

    def against(self, arm: str, baseline: str) -> Comparison | None:
        """Return the comparison of two arms, None when the report does not make it."""
        return next((c for c in self.comparisons if (c.arm, c.baseline) == (arm, baseline)), None)


def analyse(data: ReportData) -> Analysis:
    """Return everything that the page says about ``data``; the same data and seed give the same numbers."""
    comparisons = _corrected(_planned(data))
    return Analysis(
        arms=tuple(_summary(arm, data) for arm in data.arms),
        comparisons=comparisons,
        null=tuple(_compare(arm, _repeated(arm, data), "null", data) for arm in data.arms if arm.kind == "null"),
        family=sum(c.difference.p_value is not None for c in comparisons),
        gaps=tuple(_gap(arm, data) for arm in data.arms if arm.tuning),
        capability=tuple(_capability(task, data) for task in data.capability),
        vectors=tuple(_vector(info, data.confidence) for info in data.vectors),
    )


def _planned(data: ReportData) -> list[Comparison]:
    """Compare each arm with the unsteered one, and the main arm with its rivals and its control."""
    references = {a.reference for a in data.arms}
    main, arms = data.main_arm, [a for a in data.arms if a.kind != "null" and a.name not in references]
    found = [_compare(arm, data.unsteered, "unsteered", data) for arm in arms if arm.kind != "unsteered"]
    rivals: dict[str, Question] = {"prompted": "prompted", "optimized": "optimizer", "random_direction": "random_direction"}
    if main is not None and main.kind != "unsteered":
        found += [_compare(main, arm, rivals[arm.kind], data) for arm in arms if arm.kind in rivals and arm is not main]
    return found


def _repeated(null: Arm, data: ReportData) -> Arm:
    return next((a for a in data.arms if a.name == null.reference), data.unsteered)


def _compare(arm: Arm, baseline: Arm, question: Question, data: ReportData) -> Comparison:
    difference = paired_difference(arm.scores, baseline.scores, confidence=data.confidence, seed=data.seed)
    return Comparison(arm=arm.name, baseline=baseline.name, question=question, difference=difference)


def _corrected(comparisons: list[Comparison]) -> tuple[Comparison, ...]:
    adjusted = holm([c.difference.p_value for c in comparisons])
    return tuple(c.model_copy(update={"p_holm": p}) for c, p in zip(comparisons, adjusted, strict=True))


def _summary(arm: Arm, data: ReportData) -> ArmSummary:
    formed = arm.well_formed
    return ArmSummary(
        name=arm.name,
        kind=arm.kind,
        score=mean_interval(arm.scores, confidence=data.confidence, bounds=data.judge.scale),
        traits={k: mean_interval(v, confidence=data.confidence, bounds=data.trait_scale) for k, v in arm.traits.items()},
        well_formed=share_interval(sum(formed), len(formed), confidence=data.confidence) if formed else None,
    )


def _gap(arm: Arm, data: ReportData) -> Gap:
    def split(scores: tuple[float | None, ...]) -> Estimate:
        return mean_interval(scores, confidence=data.confidence, bounds=data.judge.scale)

    gap = mean_gap(arm.tuning, arm.scores, confidence=data.confidence)
    return Gap(arm=arm.name, tuning=split(arm.tuning), validation=split(arm.validation), test=split(arm.scores), gap=gap)


def _capability(task: CapabilityTask, data: ReportData) -> Capability:
    level = data.confidence
    if task.metric == "accuracy":
        sides = [_accuracy(side, level) for side in (task.unsteered, task.steered)]
        difference = mcnemar_paired(task.steered, task.unsteered, confidence=level)
    else:
        sides = [mean_interval(side, confidence=level) for side in (task.unsteered, task.steered)]
        difference = paired_difference(task.steered, task.unsteered, confidence=level, seed=data.seed)
    return Capability(
        task=task.name,
        arm=task.arm,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        unsteered=sides[0],
        steered=sides[1],
        difference=difference,
    )


def _accuracy(answers: Scores, confidence: float) -> Estimate:
    known = [v for v in answers if v is not None]
    share = share_interval(sum(v == 1.0 for v in known), len(known), confidence=confidence)
    return share.model_copy(update={"missing": len(answers) - len(known)})


def _vector(info: VectorInfo, confidence: float) -> VectorCheck:
    right = None if info.right is None or info.held_out is None else share_interval(info.right, info.held_out, confidence=confidence)
    separates = None if right is None or right.low is None else right.low > 0.5
    return VectorCheck(trait=info.trait, layer=info.layer, method=info.method, right=right, separates=separates)
