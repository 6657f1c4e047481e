"""How far training moved a model along trait vectors, whether that goes with its trait score, and which training examples would move it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from steered_lm.chat import PromptFormat
from steered_lm.config import Config
from steered_lm.extract.activations import Row
from steered_lm.extract.projections import Projections, project
from steered_lm.measure.examples import read_examples, rendered
from steered_lm.stats import Estimate, PairedDifference, Values, paired_difference, pearson_interval, spearman_interval
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import TraitVectors
from steered_lm.trait_models.experiment import ExperimentError

Where = Literal["response", "prompt_last", "own"]
Tick = Callable[[str, int, int], None]


class Shift(Config):
    """How far training moved a model along one direction.

    Attributes:
        trait, layer: the direction.
        where: what was projected: ``response`` (mean over the tokens of given responses), ``own`` (of each model's own responses) or
            ``prompt_last`` (the last prompt token, from which the response starts).
        norm: the residual stream's norm that makes it a share of the stream's own size.
        difference: mean projection after minus before training, paired by prompt.
    """

    trait: str
    layer: int
    where: Where
    norm: float
    difference: PairedDifference

    @property
    def of_norm(self) -> float | None:
        """The mean shift as a share of the residual norm, as a spec's alpha is."""
        return None if self.difference.mean is None else self.difference.mean / self.norm


def finetuning_shift(
    before: Sequence[Projections], after: Sequence[Projections], *, where: Where = "response", confidence: float = 0.95, seed: int = 0
) -> list[Shift]:
    """Return the finetuning shift along each direction (Chen et al. 2025, arXiv:2507.21509, section 4, where it is that of ``prompt_last``).

    Args:
        before: projections of the untrained model (:func:`steered_lm.extract.projections.project`).
        after: of the trained model, for the same prompts in the same order, on the same vectors.
        where: which projections: ``response``, ``own`` (projected with ``own=True``) or ``prompt_last``.
        confidence: level of the intervals.
        seed: of the paired test's random sign patterns.

    Raises:
        ExperimentError: when the two do not hold the same directions and prompts, or lack what was asked for.
    """
    if [(one.trait, one.layer) for one in before] != [(one.trait, one.layer) for one in after]:
        raise ExperimentError(
            "before and after hold other directions, or hold them in another order. Project both on the same vectors, traits and layers."
        )
    shifts = []
    for first, second in zip(before, after, strict=True):
        old, new = getattr(first, where), getattr(second, where)
        if len(old) != len(new) or not old:
            raise ExperimentError(
                f"where={where!r}: before has {len(old)} values and after {len(new)}. Project the same prompts with both models"
                + (", with own=True." if where == "own" else ".")
            )
        difference = paired_difference(new, old, confidence=confidence, seed=seed)
        shifts.append(Shift(trait=first.trait, layer=first.layer, where=where, norm=first.norm, difference=difference))
    return shifts


def adapter_shift(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    vectors: TraitVectors,
    *,
    where: Where = "response",
    traits: Sequence[str] = (),
    layers: Sequence[int] = (),
    max_new_tokens: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    progress: Tick | None = None,
) -> list[Shift]:
    """Return how far a model with its adapter is from the same model without.

    Args:
        model: a PEFT model, as ``PeftModel.from_pretrained(base, folder)`` gives it.
        tokenizer: its tokenizer.
        rows: rendered prompts; for ``where="response"`` with responses, which both models read.
        vectors: the base model's trait vectors.
        where: what is projected; ``own`` lets each model answer greedily.
        traits: some of the vectors' traits; empty takes all.
        layers: some of their layers; empty takes all.
        max_new_tokens: longest own response.
        batch_size: rows in one pass.
        seed: of the paired test's random sign patterns.
        progress: called with (what, done, total).

    Raises:
        VectorsError: when the vectors are another model's, or lack a trait or layer.
    """
    vectors.check_model(model)
    model.eval()

    def projected(which: str) -> list[Projections]:
        def tell(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{what} {which} training", done, total)

        return project(
            model,
            tokenizer,
            find_blocks(model),
            rows,
            vectors,
            traits=traits,
            layers=layers,
            own=where == "own",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=tell,
        ).projections

    with model.disable_adapter():
        before = projected("before")
    return finetuning_shift(before, projected("after"), where=where, seed=seed)


class ShiftAgainstScore(Config):
    """How shifts and trait scores of several models go together.

    Attributes:
        spearman: rank correlation.
        pearson: linear correlation.
    """

    spearman: Estimate
    pearson: Estimate


def shift_against_score(shifts: Sequence[Shift | float | None], scores: Values, *, confidence: float = 0.95) -> ShiftAgainstScore:
    """Return the correlation, over models, of the shift along a trait's vector and the trait's score.

    Args:
        shifts: one a model, along one direction; numbers are taken as they are, None is missing.
        scores: each model's mean trait score, None for missing.
        confidence: level of the intervals.

    Raises:
        ExperimentError: when the shifts are along several directions.
        UserError: when the lengths differ.
    """
    directions = {(one.trait, one.layer, one.where) for one in shifts if isinstance(one, Shift)}
    if len(directions) > 1:
        named = ", ".join(f"{trait} at layer {layer} ({where})" for trait, layer, where in sorted(directions))
        raise ExperimentError(f"shifts are along several directions: {named}. Correlate one at a time.")
    values = [one.difference.mean if isinstance(one, Shift) else one for one in shifts]
    return ShiftAgainstScore(
        spearman=spearman_interval(values, scores, confidence=confidence), pearson=pearson_interval(values, scores, confidence=confidence)
    )


class Screened(NamedTuple):
    """Training examples and where they lie: the ids of the file's lines, and projections with the model's own responses."""

    ids: list[str]
    projections: list[Projections]

    def ranked(self, trait: str, layer: int) -> list[tuple[str, float]]:
        """Return ids with their projection differences, those that pull most towards the trait first; lines without one are left out.

        Raises:
            ExperimentError: when that direction was not projected.
        """
        found = next((one for one in self.projections if (one.trait, one.layer) == (trait, layer)), None)
        if found is None:
            there = ", ".join(f"{one.trait} at layer {one.layer}" for one in self.projections)
            raise ExperimentError(f"{trait!r} at layer {layer} was not projected. Allowed: {there}.")
        pairs = [(name, value) for name, value in zip(self.ids, found.difference, strict=True) if value is not None]
        return sorted(pairs, key=lambda pair: pair[1], reverse=True)


def screen(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    vectors: TraitVectors,
    *,
    traits: Sequence[str] = (),
    layers: Sequence[int] = (),
    prompt_format: PromptFormat = "chat",
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Tick | None = None,
) -> Screened:
    """Return the projection difference of each example of a training file, as ``steered-lm monitor project --difference`` does.

    Args:
        path: JSONL with messages, or with prompt and response.
        model: the model that is to be trained.
        tokenizer: its tokenizer.
        vectors: its trait vectors.
        traits: some of the vectors' traits; empty takes all.
        layers: some of their layers; empty takes all.
        prompt_format: ``plain`` for base models.
        max_new_tokens: longest own response.
        batch_size: rows in one pass.
        progress: called with (what, done, total).

    Raises:
        UserError: when the file is malformed.
        VectorsError: when the vectors are another model's, or lack a trait or layer.
    """
    examples = read_examples(path)
    vectors.check_model(model)
    rows = [Row(rendered(example, tokenizer, prompt_format), example.response) for example in examples]
    found = project(
        model,
        tokenizer,
        find_blocks(model),
        rows,
        vectors,
        traits=traits,
        layers=layers,
        own=True,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return Screened([example.id for example in examples], found.projections)
