"""What a report is drawn from: the raw scores, levels, traces and samples of one run, as one JSON file that reads back to the same value."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from steered_lm.config import Config, read_structured
from steered_lm.errors import RunError

ArmKind = Literal["unsteered", "prompted", "equal_weights", "random_direction", "optimized", "null", "other"]
Scores = tuple[float | None, ...]
Scalar = str | bool | int | float | None


class TraitInfo(Config):
    """One trait axis: its poles in words, and the persona's own level on it (None when the persona leaves it open)."""

    name: str
    low_pole: str = ""
    high_pole: str = ""
    target: float | None = None


class PersonaInfo(Config):
    """The persona that was aimed at, with its level on each trait."""

    name: str
    description: str = ""
    traits: tuple[TraitInfo, ...] = ()


class ModelInfo(Config):
    """The model that was steered. ``parameters`` is a count; it decides whether the page warns that the model is tiny."""

    name: str
    fingerprint: str = ""
    parameters: int | None = Field(default=None, ge=0)
    layers: int | None = None
    d_model: int | None = None
    dtype: str = ""
    device: str = ""


class JudgeInfo(Config):
    """The judge, and how well it tells the persona from others on texts that it was not built from.

    ``auc`` is the held-out area under the ROC curve, ``auc_low`` and ``auc_high`` its interval, ``positives`` and ``negatives`` the number
    of held-out texts behind it. All None means that the judge was not validated, and the page says so.
    """

    name: str
    description: str = ""
    scale: tuple[float, float] = (1.0, 5.0)
    auc: float | None = Field(default=None, ge=0.0, le=1.0)
    auc_low: float | None = Field(default=None, ge=0.0, le=1.0)
    auc_high: float | None = Field(default=None, ge=0.0, le=1.0)
    positives: int | None = Field(default=None, ge=0)
    negatives: int | None = Field(default=None, ge=0)


class Generation(Config):
    """One generation of a search. ``best`` is the best score so far, ``mean`` this generation's; None when every verdict was missing."""

    evaluations: int = Field(ge=0)
    best: float | None
    mean: float | None
    missing: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0.0)


class SearchTrace(Config):
    """One run of one optimiser. ``evaluations`` counts candidates since the start of the run."""

    optimizer: str
    seed: int | None = None
    generations: tuple[Generation, ...]


class Arm(Config):
    """One condition, scored on the report's items in the report's order.

    Attributes:
        name: unique; how text and figures call it.
        kind: decides the comparisons. ``null`` is a system evaluated a second time; ``note`` says how it differs.
        reference: for kind ``null``, the arm that it repeats; by default the unsteered one. An arm that serves as a reference alone is not
            compared with anything else.
        scores: the judge's score by item, None for a missing verdict.
        missing_reasons: how often each reason for a missing verdict occurred.
        traits: measured level by item for each trait, None where a reply shows no mark of it.
        mean_length: mean reply length in ``ReportData.length_unit``.
        well_formed: by item, whether the reply is well-formed text.
        optimizer: which optimiser found it, for kind ``optimized``.
        weights: the spec's weights by trait.
        tuning: its scores on the items that it was tuned on.
        validation: its scores on the items that it was chosen on.
        note: anything a reader must know, in plain words.
    """

    name: str
    kind: ArmKind
    scores: Scores
    missing_reasons: dict[str, int] = Field(default_factory=dict)
    traits: dict[str, Scores] = Field(default_factory=dict)
    mean_length: float | None = Field(default=None, ge=0.0)
    well_formed: tuple[bool, ...] | None = None
    optimizer: str = ""
    weights: dict[str, float] = Field(default_factory=dict)
    tuning: Scores = ()
    validation: Scores = ()
    reference: str | None = None
    note: str = ""

    @property
    def missing(self) -> int:
        """How many verdicts are missing."""
        return sum(s is None for s in self.scores)


class CapabilityTask(Config):
    """One capability benchmark: the same items answered by the unsteered and by the steered model.

    ``accuracy`` items are 1 or 0; ``score`` items are any number (a truthful share, a log-likelihood a token). None is a missing answer.
    ``chance`` is what guessing scores.
    """

    name: str
    arm: str
    unsteered: Scores
    steered: Scores
    metric: Literal["accuracy", "score"] = "accuracy"
    higher_is_better: bool = True
    chance: float | None = None
    description: str = ""


class VectorInfo(Config):
    """How good one trait's direction is at one layer.

    ``right`` of ``held_out`` pairs, unseen when the direction was built, lie on the right side of it. ``cosines`` compares it with the same trait's
    direction by other methods.
    """

    trait: str
    layer: int
    method: str
    pooling: str = ""
    explained_variance: float | None = None
    right: int | None = Field(default=None, ge=0)
    held_out: int | None = Field(default=None, ge=0)
    cosines: dict[str, float] = Field(default_factory=dict)
    residual_norm: float | None = None

    @model_validator(mode="after")
    def _share(self) -> Self:
        if (self.right is None) != (self.held_out is None) or (self.right or 0) > (self.held_out or 0):
            raise ValueError("right and held_out are given together, and right is at most held_out")
        return self


class Reply(Config):
    """One arm's reply to a sample prompt: a score, or the reason why there is none."""

    arm: str
    text: str
    score: float | None = None
    missing: str | None = None


class Sample(Config):
    """One prompt with the replies of several arms, to be read side by side.

    Attributes:
        scored: what the replies' scores are, such as ``trait evil, mean of 3 responses``.
    """

    prompt: str
    scored: str = "score"
    replies: tuple[Reply, ...]


class Stage(Config):
    """A part of the run and the wall time it took."""

    name: str
    seconds: float = Field(ge=0.0)


class Provenance(Config):
    """Where the numbers come from: library versions, date, command, wall time."""

    created: str = ""
    command: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    hashes: dict[str, str] = Field(default_factory=dict)


class ReportData(Config):
    """Everything a report shows, before any statistics.

    Attributes:
        items: the held-out prompts' identifiers; every arm's scores are in this order.
        main: the arm that the headline is about; by default the first ``optimized`` one.
        trait_scale: ends of the trait levels' scale.
        seed: seeds the random sign patterns of the tests.
        confidence: level of every interval on the page.
        max_missing: share of missing verdicts in an arm above which the page warns.
        settings: what was set for the run (budget, alpha, layers, positions, …), shown as they are.
        notes: remarks about the run, shown with the settings.
    """

    version: Literal[1] = 1
    title: str
    persona: PersonaInfo
    model: ModelInfo
    judge: JudgeInfo
    items: tuple[str, ...]
    arms: tuple[Arm, ...]
    main: str | None = None
    searches: tuple[SearchTrace, ...] = ()
    capability: tuple[CapabilityTask, ...] = ()
    vectors: tuple[VectorInfo, ...] = ()
    samples: tuple[Sample, ...] = ()
    settings: dict[str, Scalar] = Field(default_factory=dict)
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()
    trait_scale: tuple[float, float] = (-1.0, 1.0)
    length_unit: str = "words"
    seed: int = 0
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    max_missing: float = Field(default=0.1, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [a.name for a in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms repeat a name: {', '.join(names)}; give each arm a name of its own")
        if sum(a.kind == "unsteered" for a in self.arms) != 1:
            raise ValueError("a report needs exactly one arm of kind 'unsteered', which every other arm is compared with")
        referred = (
            {"main": self.main}
            | {f"reference of arm {a.name!r}": a.reference for a in self.arms}
            | {f"capability {t.name!r}": t.arm for t in self.capability}
        )
        referred |= {f"sample {s.prompt!r:.40}": r.arm for s in self.samples for r in s.replies if r.arm not in names}
        for where, name in referred.items():
            if name is not None and name not in names:
                raise ValueError(f"{where} names arm {name!r}. Allowed: {', '.join(names)}")
        for arm in self.arms:
            self._aligned(arm)
        for task in self.capability:
            if len(task.unsteered) != len(task.steered):
                raise ValueError(
                    f"capability {task.name!r} has {len(task.unsteered)} unsteered and {len(task.steered)} steered items; give both the same"
                )
            if task.metric == "accuracy" and not {*task.unsteered, *task.steered} <= {0.0, 1.0, None}:
                raise ValueError(f"capability {task.name!r} has metric 'accuracy' and answers that are neither 0, 1 nor None; set metric to 'score'")
        return self

    def _aligned(self, arm: Arm) -> None:
        lists = {"scores": arm.scores, **{f"traits[{k!r}]": v for k, v in arm.traits.items()}}
        if arm.well_formed is not None:
            lists["well_formed"] = arm.well_formed
        for what, values in lists.items():
            if len(values) != len(self.items):
                raise ValueError(f"arm {arm.name!r}: {what} has {len(values)} values for {len(self.items)} items; give one an item, None for missing")
        low, high = self.judge.scale
        for score in (*arm.scores, *arm.tuning, *arm.validation):
            if score is not None and not low <= score <= high:
                raise ValueError(f"arm {arm.name!r}: score {score} is off the judge's scale {low:g} to {high:g}")

    @property
    def unsteered(self) -> Arm:
        """The arm that every other arm is compared with."""
        return next(a for a in self.arms if a.kind == "unsteered")

    @property
    def main_arm(self) -> Arm | None:
        """The arm that the headline is about; None when nothing was optimised and none is named."""
        if self.main is not None:
            return next(a for a in self.arms if a.name == self.main)
        return next((a for a in self.arms if a.kind == "optimized"), None)


def load_report(path: Path | str) -> ReportData:
    """Return the data of a report's JSON file, as ``render`` wrote it or bare.

    Raises:
        RunError: when the file is missing, is no JSON, or does not hold a report.
    """
    found = read_structured(Path(path), error=RunError)
    data = found["data"] if isinstance(found, dict) and "data" in found else found
    return ReportData.parse(data, source=f"report {str(path)!r}", error=RunError)
