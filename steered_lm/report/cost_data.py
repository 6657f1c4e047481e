"""What a cost page is drawn from: every arm's value on every item of every measure."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from steered_lm.config import Config
from steered_lm.errors import RunError
from steered_lm.report.data import ModelInfo, Provenance, Sample, Scalar, Scores

UNSTEERED = "unsteered"
ADAPTER, SYSTEM = "adapter", "system turn"
"""Settings of arms that are not steered: a trained model's adapter, a prompted model's system turn."""
Role = Literal["benefit", "cost", "note"]


class CostArm(Config):
    """One steering spec among those that are compared; without ``series`` and ``trait`` it is the unsteered model.

    Attributes:
        name: unique.
        series: the spec that it comes from; arms of one series are joined by a line.
        x: the swept setting's value; None where nothing is swept.
        trait: for the matrix of side effects, the one trait whose vector is added; such an arm belongs to no series.
        digest: the spec's digest.
        settings: the spec's settings as they are shown.
    """

    name: str
    series: str | None = None
    x: float | None = None
    trait: str | None = None
    digest: str | None = None
    settings: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def steered(self) -> bool:
        """Whether it is a spec, and neither the unsteered model nor a trained or prompted one."""
        return (self.series is not None or self.trait is not None) and not {ADAPTER, SYSTEM} & set(self.settings)


class Judged(Config):
    """How many responses of an arm were judged on a measure, where an item has several.

    Attributes:
        responses: all of them.
        missing: those without a value; an item's value is the mean of its others.
    """

    responses: int
    missing: int


class Measure(Config):
    """One number that is measured under every arm, item by item.

    Attributes:
        name: unique, such as ``mmlu`` or ``trait formality``.
        role: ``benefit`` is what is aimed at, ``cost`` what should stay as it is, ``note`` is shown without a test.
        kind: ``accuracy`` items are 1 or 0; ``score`` items are any number; ``tokens`` items are sums over their tokens, in nats.
        higher_is_better: None where neither is.
        scale: lowest and highest value of a score, if it has them.
        chance: what guessing scores.
        exponentiate: of kind ``tokens``: shown as a perplexity.
        trait: the trait that it is the score of.
        beside: the benefit whose responses it judges, too; None for what has responses or answers of its own.
        items: the items' names, the same for every arm.
        groups: each item's subject; empty where there are none.
        tokens: of kind ``tokens``: each item's number of tokens.
        values: by arm, one value an item, None for a missing one.
        reasons: by arm, how many items each reason left without a value; an item is counted once, under its most frequent reason.
        judged: by arm, the responses behind the items' values, where items have several; else empty.
        bands: of trait scores: by arm, the shares of responses in 0-20, 21-40, … 81-100.
        about: what it is, in plain words.
    """

    name: str
    role: Role
    kind: Literal["accuracy", "score", "tokens"]
    higher_is_better: bool | None = True
    scale: tuple[float, float] | None = None
    chance: float | None = None
    exponentiate: bool = False
    trait: str | None = None
    beside: str | None = None
    items: tuple[str, ...]
    groups: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    values: dict[str, Scores]
    reasons: dict[str, dict[str, int]] = Field(default_factory=dict)
    judged: dict[str, Judged] = Field(default_factory=dict)
    bands: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    about: str = ""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        for arm, values in self.values.items():
            if len(values) != len(self.items):
                raise ValueError(f"measure {self.name!r}: arm {arm!r} has {len(values)} values for {len(self.items)} items")
        if self.role == "cost" and (self.higher_is_better is None or (self.kind == "score" and self.scale is None)):
            raise ValueError(f"measure {self.name!r} is a cost, and nobody says which way is better, or how wide its scale is")
        if self.kind == "accuracy" and any(not {*values} <= {0.0, 1.0, None} for values in self.values.values()):
            raise ValueError(f"measure {self.name!r} is an accuracy and has answers that are neither 0, 1 nor None")
        if self.exponentiate and (self.kind != "tokens" or (self.role == "cost" and self.higher_is_better)):
            raise ValueError(f"measure {self.name!r} is shown as a perplexity, so it is of kind 'tokens', and lower is better")
        if len(self.tokens) != (len(self.items) if self.kind == "tokens" else 0) or len(self.groups) not in (0, len(self.items)):
            raise ValueError(f"measure {self.name!r}: groups, and tokens of kind 'tokens', have one entry an item")
        return self


class CostData(Config):
    """Everything that a cost page shows, before any statistics.

    Attributes:
        title: the page's.
        model: the model that is steered.
        axis: what is swept (``alpha``, ``kl``, ``layer``, ``weight of formality``); None when nothing is.
        arms: the first one is the unsteered model.
        measures: what was measured; an arm may be left out of some.
        tolerance: loss that is accepted: a share of the scale (0.02 are two points of accuracy).
        perplexity_tolerance: growth of perplexity that is accepted, as a share of it.
        samples: prompts with the replies of several arms.
        settings: further facts about the run, shown as they are.
        notes: remarks in plain words.
    """

    version: Literal[1] = 1
    title: str
    model: ModelInfo
    axis: str | None = None
    arms: tuple[CostArm, ...] = Field(min_length=1)
    measures: tuple[Measure, ...]
    tolerance: float = Field(default=0.02, gt=0.0, lt=1.0)
    perplexity_tolerance: float = Field(default=0.05, gt=0.0)
    samples: tuple[Sample, ...] = ()
    settings: dict[str, Scalar] = Field(default_factory=dict)
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or names[0] != UNSTEERED or self.arms[0].series is not None:
            raise ValueError(f"arms need names of their own, and the first is {UNSTEERED!r}; got {', '.join(names)}")
        if any(arm.series is not None and arm.trait is not None for arm in self.arms):
            raise ValueError("an arm with a trait belongs to the matrix of side effects and to no series")
        if len({measure.name for measure in self.measures}) != len(self.measures):
            raise ValueError(f"measures need names of their own; got {', '.join(measure.name for measure in self.measures)}")
        for series, arms in self.series.items():
            values = [arm.x for arm in arms if arm.x is not None]
            if len(set(values)) != len(values):
                raise ValueError(f"series {series!r} has two arms of one value; got {', '.join(f'{value:g}' for value in values)}")
        for measure in self.measures:
            unknown = [arm for arm in measure.values if arm not in names]
            if unknown or UNSTEERED not in measure.values:
                raise ValueError(f"measure {measure.name!r} needs values for {UNSTEERED!r} and only for arms; got {', '.join(measure.values)}")
        return self

    def of_role(self, role: Role) -> list[Measure]:
        """Return the measures of a role, in order."""
        return [measure for measure in self.measures if measure.role == role]

    def measure(self, name: str) -> Measure:
        """Return a measure by its name, which must be one of them."""
        return next(measure for measure in self.measures if measure.name == name)

    @property
    def series(self) -> dict[str, list[CostArm]]:
        """The arms of each series, by the swept setting's value."""
        found: dict[str, list[CostArm]] = {}
        for arm in self.arms:
            if arm.series is not None:
                found.setdefault(arm.series, []).append(arm)
        return {name: sorted(arms, key=lambda arm: arm.x or 0.0) for name, arms in found.items()}


def holds_cost(path: Path) -> bool:
    """Return whether a JSON file is a cost page's, and not another report's.

    Raises:
        RunError: when the file is missing or no JSON.
    """
    found = _read(path)
    return isinstance(found, dict) and "measures" in found


def load_cost(path: Path | str) -> CostData:
    """Return the data of a cost page's JSON file, as ``render_cost`` wrote it or bare.

    Raises:
        RunError: when the file is missing, is no JSON, or does not hold such data.
    """
    return CostData.parse(_read(path), source=f"cost page {str(path)!r}", error=RunError)


def _read(path: Path | str) -> Any:
    # not by YAML, which takes minutes for the values of a whole benchmark
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise RunError(f"{str(path)!r} cannot be read: {problem}. Give the JSON file of a report or a cost page.") from problem
    except ValueError as problem:
        raise RunError(f"{str(path)!r} is not JSON: {problem}. Give the JSON file of a report or a cost page.") from problem
    return found["data"] if isinstance(found, dict) and "data" in found else found
