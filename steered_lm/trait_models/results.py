"""The numbers of an experiment: every model on every task, with intervals, counts, and the change from its trait's baseline."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from steered_lm.config import Config
from steered_lm.stats import Estimate, PairedDifference, holm, mean_interval, paired_difference
from steered_lm.trait_models.evaluation import Record
from steered_lm.trait_models.experiment import STRENGTHS, Experiment, TraitModel

FORMAT = 1
BOUNDS = (0.0, 100.0)
"""Ends of the scale of trait scores and of coherence."""


class Cell(Config):
    """One model on one task.

    Attributes:
        model: its name.
        trait: the trait that it was trained on.
        strength: how strongly the data show it.
        task: the trait that it was measured for.
        score: mean trait score over questions; ``missing`` counts questions without one.
        coherence: the same for coherence.
        refusals: responses that decline to answer.
        missing: responses without a verdict for another reason.
        coherence_missing: responses without a verdict on coherence.
        change: score minus that of the baseline model of the same trait, question by question; None for a baseline, and where there is not
            exactly one.
        p_holm: its p-value, corrected for all changes of the experiment.
        items: the questions' names.
        scores: their scores in order.
        judges: identity of each judge.
        dummy: whether the model was never trained, so that the numbers say nothing.
        reason: why there are no numbers.
    """

    model: str
    trait: str
    strength: Literal["baseline", "mild", "severe"]
    task: str
    score: Estimate
    coherence: Estimate
    refusals: int = 0
    missing: int = 0
    coherence_missing: int = 0
    change: PairedDifference | None = None
    p_holm: float | None = None
    items: tuple[str, ...] = ()
    scores: tuple[float | None, ...] = ()
    judges: dict[str, str] = Field(default_factory=dict)
    dummy: bool = False
    reason: str | None = None


class Results(Config):
    """An experiment's numbers, from which page and figures are drawn.

    Attributes:
        format: of this file.
        experiment: its name.
        base_model: what all models started from.
        training: the backend that trained.
        harness: what asked the models.
        judge: who judged.
        tasks: the traits that were measured, in order.
        traits: the traits that were trained, in order.
        cells: every model on every task; models by trait and strength.
    """

    format: int = FORMAT
    experiment: str
    base_model: str
    training: str
    harness: str
    judge: str
    tasks: tuple[str, ...]
    traits: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def dummy(self) -> bool:
        """Whether any number comes from a model that was never trained."""
        return any(one.dummy for one in self.cells)

    def of_trait(self, trait: str) -> tuple[Cell, ...]:
        """Return the cells of the models that were trained on a trait."""
        return tuple(one for one in self.cells if one.trait == trait)


def cell(model: TraitModel, task: str, record: Record | None = None, *, reason: str | None = None, dummy: bool = False) -> Cell:
    """Return a model's numbers on a task, or the reason why there are none."""
    items = [] if record is None else record.items
    return Cell(
        model=model.name,
        trait=model.trait,
        strength=model.strength,
        task=task,
        score=mean_interval([item.trait_score for item in items], bounds=BOUNDS),
        coherence=mean_interval([item.coherence for item in items], bounds=BOUNDS),
        refusals=sum(item.refusals for item in items),
        missing=sum(item.missing for item in items),
        coherence_missing=sum(item.coherence_missing for item in items),
        items=tuple(item.id for item in items),
        scores=tuple(item.trait_score for item in items),
        judges={} if record is None else record.judges,
        dummy=dummy or (record is not None and record.dummy),
        reason=reason,
    )


def gather(experiment: Experiment, cells: Sequence[Cell]) -> Results:
    """Return an experiment's numbers, with the changes from the baselines; the same cells give the same results."""
    traits = tuple(dict.fromkeys(model.trait for model in experiment.models))
    tasks = tuple(dict.fromkeys(one.task for one in cells))
    changed = [_with_change(one, cells, experiment.training.seed) for one in cells]
    corrected = holm([None if one.change is None else one.change.p_value for one in changed])
    held = [one.model_copy(update={"p_holm": p}) for one, p in zip(changed, corrected, strict=True)]
    order = {name: number for number, name in enumerate(model.name for model in experiment.models)}
    held.sort(key=lambda one: (traits.index(one.trait), STRENGTHS.index(one.strength), order[one.model], tasks.index(one.task)))
    return Results(
        experiment=experiment.name,
        base_model=experiment.training.base_model,
        training=experiment.training.backend,
        harness=experiment.evaluation.backend,
        judge=experiment.evaluation.judge or "",
        tasks=tasks,
        traits=traits,
        cells=tuple(held),
    )


def _with_change(one: Cell, cells: Sequence[Cell], seed: int) -> Cell:
    baselines = [other for other in cells if (other.trait, other.task, other.strength) == (one.trait, one.task, "baseline")]
    if one.strength == "baseline" or len(baselines) != 1 or not one.items or baselines[0].items != one.items:
        return one
    return one.model_copy(update={"change": paired_difference(one.scores, baselines[0].scores, seed=seed)})
