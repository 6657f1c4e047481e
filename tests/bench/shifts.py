"""Finetuning shifts of trained models against their scores, and whether projection differences rank training examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import console
import numpy as np
from console import interval
from sklearn.metrics import roc_auc_score
from trained import HELD_OUT, LAYER, Arm, Bench, level, mean_or_none

from steered_lm.extract.activations import Row
from steered_lm.extract.projections import Projections, project
from steered_lm.harness.model import SteeredHFLM
from steered_lm.measure.examples import read_examples
from steered_lm.stats import Estimate, spearman_interval
from steered_lm.steering.blocks import find_blocks
from steered_lm.tiny_chat.trait_data import SHARES, SHIPPED_TRAITS, tiny_trait_set, write_tiny_sets
from steered_lm.trait_models.shift import finetuning_shift, screen, shift_against_score


def shifts(bench: Bench, seed: int) -> dict[str, Any]:
    """Return nine models' shifts along each trait's vector, their scores, and how the two go together."""
    folder = bench.folder / f"nine-{seed}"
    write_tiny_sets(folder, size=bench.size, seed=seed)
    rows: list[dict[str, Any]] = []
    base = bench.load()
    held_out = tiny_trait_set("formality", "baseline", 48, seed + HELD_OUT)
    texts = [Row(rendered_chat(base, messages[:1]), messages[1]["content"]) for messages in held_out]
    task = bench.trait_task("formality")
    before = projected(bench, base, texts)
    for trait in SHIPPED_TRAITS:
        for strength in SHARES:
            lm, _ = bench.train(folder / f"{strength}_{trait}.jsonl", Arm(strength), seed)
            scores = bench.measured(lm, task, seed, {"model": None}, facts=False)["model"]["scores"]
            after = projected(bench, lm, texts)
            moved = {where: finetuning_shift(before, after, where=where) for where in ("prompt_last", "response")}
            by_trait = {where: {shift.trait: shift for shift in found} for where, found in moved.items()}
            rows.append(
                {"trait": trait, "strength": strength, "scores": {axis: mean_or_none(scores[axis]) for axis in SHIPPED_TRAITS}, "shifts": by_trait}
            )
    against = {
        where: {
            axis: shift_against_score([row["shifts"][where][axis] for row in rows], [row["scores"][axis] for row in rows]) for axis in SHIPPED_TRAITS
        }
        for where in ("prompt_last", "response")
    }
    return {"models": rows, "correlation": against}


def rendered_chat(lm: SteeredHFLM, messages: Any) -> str:
    return str(lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def projected(bench: Bench, lm: SteeredHFLM, rows: Sequence[Row]) -> list[Projections]:
    return project(lm.model, lm.tokenizer, find_blocks(lm.model), rows, bench.vectors, layers=[LAYER]).projections


def screening(bench: Bench, seed: int) -> dict[str, Any]:
    """Return how well projection differences tell severe examples from baseline ones, and how they follow an example's own level."""
    folder, lm, found = bench.folder / f"nine-{seed}", bench.load(), {}
    for trait in SHIPPED_TRAITS:
        severe, baseline = (folder / f"{strength}_{trait}.jsonl" for strength in ("severe", "baseline"))
        sides = {
            path: screen(path, lm.model, lm.tokenizer, bench.vectors, traits=[trait], layers=[LAYER]).projections[0] for path in (severe, baseline)
        }
        levels = {path: [level(example.response, trait) for example in read_examples(path)] for path in sides}
        found[trait] = {
            "difference": auc(sides[severe].difference, sides[baseline].difference, seed),
            "response alone": auc(sides[severe].response, sides[baseline].response, seed),
            "level of the text, the most there is to tell": auc(levels[severe], levels[baseline], seed),
            "difference against level, baseline examples": spearman_interval(sides[baseline].difference, levels[baseline]),
        }
    return found


def auc(positive: Sequence[float | None], negative: Sequence[float | None], seed: int) -> Estimate:
    """Return the area under the ROC curve with a percentile interval of 2,000 stratified bootstrap draws."""
    high, low = (np.array([value for value in side if value is not None]) for side in (positive, negative))
    value = float(roc_auc_score(np.r_[np.ones(len(high)), np.zeros(len(low))], np.r_[high, low]))
    # the area is the share of pairs in the right order, so a draw weights the pairs
    won = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(len(side), np.full(len(side), 1 / len(side)), 2000) / len(side) for side in (high, low)]
    drawn = np.einsum("di,ij,dj->d", weights[0], won, weights[1], optimize=True)
    ends = np.quantile(drawn, [0.025, 0.975])
    missing = len(positive) + len(negative) - len(high) - len(low)
    method = "area under the ROC curve, stratified bootstrap"
    return Estimate(value=value, low=float(ends[0]), high=float(ends[1]), n=min(len(high), len(low)), missing=missing, method=method)


def show_shifts(out: Mapping[str, Any]) -> None:
    rows = [
        [
            row["trait"],
            row["strength"],
            *(f"{row['scores'][axis]:.1f} / {row['shifts']['prompt_last'][axis].of_norm:+.3f}" for axis in SHIPPED_TRAITS),
        ]
        for row in out["shifts"]["models"]
    ]
    console.show(
        "3. score / finetuning shift at the last prompt token, as a share of the residual norm", ["trained on", "strength", *SHIPPED_TRAITS], rows
    )
    rows = [
        [where, *(f"{interval(found[axis].pearson, 2)}; {interval(found[axis].spearman, 2)}" for axis in SHIPPED_TRAITS)]
        for where, found in out["shifts"]["correlation"].items()
    ]
    console.show("Pearson; Spearman of shift and score over nine models", ["projected", *SHIPPED_TRAITS], rows)
    kinds = list(next(iter(out["screening"].values())))
    rows = [[kind, *(interval(out["screening"][axis][kind], 3, signed=False) for axis in SHIPPED_TRAITS)] for kind in kinds]
    console.show("Severe or baseline example? Area under the ROC curve; Spearman in the last row", ["from", *SHIPPED_TRAITS], rows)
