"""Steering while a model trains: does it keep a trait out of the final model at equal training loss, and what does that cost?

On the tiny chat model, whose benign trait is counted in sampled replies to held-out questions (marker words, 0-100):

1. The severe set of one trait, trained as it is, under preventative steering at several alphas, under ablation, and under random directions of
   equal norm; against them the plainly trained model steered away from the trait at inference, and one that was trained less.
2. A set that shows a second trait as well, which is to be learnt: what do the same means leave of it?
3. The finetuning shift of nine models (three traits, three strengths) against their scores, and whether projection differences rank examples.

Seeds draw data, initialisation and order; everything is paired by seed, or by seed and question. Run ``python tests/bench/preventative.py --help``.
"""

import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import console
import torch
from console import interval
from shifts import screening, shifts, show_shifts
from trained import FACTS, HELD_OUT, LAYER, Arm, Bench, Values
from transformers.utils.logging import disable_progress_bar

from steered_lm.config import canonical_json, write_atomic
from steered_lm.harness.model import SteeredHFLM
from steered_lm.persona.meter import TRAITS
from steered_lm.stats import Estimate, PairedDifference, holm, mean_interval, paired_difference
from steered_lm.steering.spec import SteeringSpec
from steered_lm.tiny_chat.grammar import TOPICS_TRAIN, UNASKED_LEVELS, sample_reply, user_prompt
from steered_lm.tiny_chat.trait_data import SHIPPED_TRAITS, tiny_trait_set
from steered_lm.trait_models.trainer import response_loss

PLAIN, UNTRAINED = "no steering", "untrained"
LOSSES = {"as trained": 4, "in use": 3, "baseline set": 3, "wanted set": 3}  # decimals


def write_chats(path: Path, rows: Sequence[Any]) -> Path:
    return write_atomic(path, "".join(canonical_json({"messages": messages}) + "\n" for messages in rows))


def two_traits(wanted: Sequence[str], size: int, seed: int) -> list[Any]:
    """Return conversations whose replies are wholly at the high pole of each wanted trait, the other traits as the model writes by itself."""
    rng, made = random.Random(f"{seed}/{'+'.join(wanted)}"), []
    for _ in range(size):
        topic = rng.choice(TOPICS_TRAIN)
        levels = {trait: 1.0 if trait in wanted else rng.choice(UNASKED_LEVELS) for trait in TRAITS}
        reply = sample_reply(topic, levels, rng)
        made.append([{"role": "user", "content": user_prompt(topic, rng)}, {"role": "assistant", "content": reply}])
    return made


# -- 1 and 2: one arm after the other --------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What is trained on by seed, which other sets the final models' losses are taken on, how it is trained, and steering at inference."""

    trait: str
    data: Callable[[int], Path]
    others: Callable[[int], dict[str, Path]]
    arms: Callable[[int], list[Arm]]
    against: dict[str, SteeringSpec]


def run_seed(bench: Bench, part: Part, seed: int) -> dict[str, dict[str, Any]]:
    """Return every arm's measurements for one seed."""
    data, others, task = part.data(seed), part.others(seed), bench.trait_task(part.trait)
    found: dict[str, dict[str, Any]] = {}
    lm = bench.load()
    found[UNTRAINED] = bench.measured(lm, task, seed, {UNTRAINED: None})[UNTRAINED] | losses(lm, data, None, others)
    for arm in part.arms(seed):
        lm, last = bench.train(data, arm, seed)
        plain = arm.name == PLAIN
        specs: dict[str, SteeringSpec | None] = {arm.name: None, **(part.against if plain else {})}
        measured = bench.measured(lm, task, seed, specs)
        spec = None if arm.steering is None else arm.steering.load()
        measured[arm.name] |= {"last": last, **losses(lm, data, spec, others)}
        for name, against in part.against.items() if plain else ():
            # it is the same training: only what is in use differs
            same = {"last": last, "as trained": measured[arm.name]["as trained"]}
            measured[name] |= losses(lm, data, against, others, everywhere=True) | same
        found |= measured
    return found


def losses(lm: SteeredHFLM, data: Path, spec: SteeringSpec | None, others: Mapping[str, Path], *, everywhere: bool = False) -> dict[str, float]:
    """Return losses on the training data as trained (under ``spec``) and in use (without, or ``everywhere`` under it), and on other sets in use."""
    used = spec if everywhere else None
    in_use = response_loss(lm.model, lm.tokenizer, data, spec=used)
    steered = in_use if used is spec else response_loss(lm.model, lm.tokenizer, data, spec=spec)
    return {"as trained": steered, "in use": in_use} | {name: response_loss(lm.model, lm.tokenizer, path, spec=used) for name, path in others.items()}


def summary(rows: Mapping[int, Mapping[str, Mapping[str, Any]]], trait: str) -> list[dict[str, Any]]:
    """Return each arm's scores, losses and costs over seeds, with differences from training without steering."""
    seeds = sorted(rows)
    arms = list(rows[seeds[0]])
    found = []
    for arm in arms:
        mine, plain = [[rows[seed][name] for seed in seeds] for name in (arm, PLAIN)]
        row: dict[str, Any] = {"arm": arm, "seeds": len(seeds), "axes": {}}
        for axis in TRAITS:
            scores, reference = pooled(mine, axis), pooled(plain, axis)
            row["axes"][axis] = {
                "score": mean_interval(scores, bounds=(0.0, 100.0)),
                "minus plain": paired_difference(scores, reference, seed=0),
                "minus untrained": paired_difference(scores, pooled([rows[seed][UNTRAINED] for seed in seeds], axis), seed=0),
                "minus plain, over seeds": mean_interval([a - b for a, b in zip(by_seed(mine, axis), by_seed(plain, axis), strict=True)]),
            }
        for name in [key for key, value in mine[0].items() if isinstance(value, float)]:
            both = [(one[name], other.get(name)) for one, other in zip(mine, plain, strict=True)]
            row[name] = {"mean": mean_interval([a for a, _ in both])}
            if both[0][1] is not None:
                row[name]["minus plain"] = mean_interval([a - b for a, b in both])
        for name in FACTS:
            right, reference = [[value for one in side for value in one[name]] for side in (mine, plain)]
            row[name] = {"mean": fmean(right), "minus plain": paired_difference(right, reference, seed=0)}
        found.append(row)
    corrected = holm([row["axes"][trait]["minus plain"].p_value if row["arm"] != PLAIN else None for row in found])
    for row, p_value in zip(found, corrected, strict=True):
        row["p_holm"] = p_value
    return found


def pooled(rows: Sequence[Mapping[str, Any]], axis: str) -> Values:
    return [value for row in rows for value in row["scores"][axis]]


def by_seed(rows: Sequence[Mapping[str, Any]], axis: str) -> list[float]:
    return [fmean(value for value in row["scores"][axis] if value is not None) for row in rows]


def verdict(rows: Sequence[Mapping[str, Any]], trait: str, spread: float) -> dict[str, Any]:
    """Return which steered trainings ended at the plain one's training loss, by three readings of equal, and what the trait score did there."""
    readings: dict[str, list[dict[str, Any]]] = {"paired interval holds 0": [], "within the seeds' spread": [], "not above": []}
    for row in rows:
        if not row["arm"].startswith("preventative"):
            continue
        loss: Estimate = row["as trained"]["minus plain"]
        score: PairedDifference = row["axes"][trait]["minus plain"]
        facts = {"arm": row["arm"], "loss": loss, "score": score, "loss in use": row["in use"]["minus plain"]}
        facts |= {"score, over seeds": row["axes"][trait]["minus plain, over seeds"]}
        if loss.value is None or loss.low is None or loss.high is None:
            continue
        if loss.low <= 0.0 <= loss.high:
            readings["paired interval holds 0"].append(facts)
        if abs(loss.value) < spread:
            readings["within the seeds' spread"].append(facts)
        if loss.value <= 0.0:
            readings["not above"].append(facts)
    return {"spread of the plain loss over seeds (standard deviation)": spread, **readings}


# -- tables ----------------------------------------------------------------------------------------------------------------------------


def show_part(title: str, rows: Sequence[Mapping[str, Any]], trait: str, second: str | None = None) -> None:
    scores, costs = [], []
    for row in rows:
        axes = row["axes"]
        others = [axes[axis]["minus untrained"].mean for axis in TRAITS if axis not in (trait, second)]
        own = [interval(axes[trait]["score"], signed=False), interval(axes[trait]["minus plain"])]
        own += [interval(axes[second]["score"], signed=False), interval(axes[second]["minus plain"])] if second else []
        scores.append([row["arm"], *own, " ".join(f"{change:+.0f}" for change in others if change is not None)])
        facts = " ".join(f"{row[name]['mean']:.3f}" for name in FACTS)
        costs.append([row["arm"], *(interval(row[name]["minus plain"], digits) for name, digits in LOSSES.items() if name in row), facts])
        costs[-1].append(interval(row["perplexity"]["mean"], 1, signed=False))
    columns = [trait, f"{trait} - plain", *([second, f"{second} - plain"] if second else [])]
    console.show(f"{title}: scores, 0-100", ["arm", *columns, "other axes - untrained"], scores)
    columns = [f"loss {name} - plain" for name in LOSSES if name in rows[0]]
    console.show(f"{title}: losses and costs", ["arm", *columns, "knowledge, truth", "perplexity"], costs)


def show_verdict(found: Mapping[str, Any]) -> None:
    for reading, arms in found.items():
        if isinstance(arms, float):
            console.CONSOLE.print(f"{reading}: {arms:.4f}")
            continue
        console.CONSOLE.print(f"training loss equal to the plain one's ({reading}): {'none' if not arms else ''}")
        for one in arms:
            scores = f"score {interval(one['score'])} over questions, {interval(one['score, over seeds'])} over seeds"
            console.CONSOLE.print(f"  {one['arm']}: loss {interval(one['loss'], 4)}; {scores}; loss in use {interval(one['loss in use'], 3)}")


def plain_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return value.model_dump() if hasattr(value, "model_dump") else value


def parts(bench: Bench, alphas: Sequence[float], full: bool) -> Iterator[tuple[str, Part, str | None]]:
    """Yield both parts with their titles, and the trait that is to be learnt."""
    trait = bench.arguments.trait
    folder, size = bench.folder, bench.size
    kept = "emotional_tone" if trait != "emotional_tone" else "formality"
    top = max(alphas)

    def single(seed: int) -> Path:
        return write_chats(folder / f"severe-{seed}.jsonl", tiny_trait_set(trait, "severe", size, seed))

    def double(seed: int) -> Path:
        return write_chats(folder / f"double-{seed}.jsonl", two_traits([trait, kept], size, seed))

    def baseline(seed: int) -> dict[str, Path]:
        return {"baseline set": write_chats(folder / f"baseline-{seed}.jsonl", tiny_trait_set(trait, "baseline", 64, seed + HELD_OUT))}

    def wanted(seed: int) -> dict[str, Path]:
        # what one would wish for: the second trait, without the first
        return baseline(seed) | {"wanted set": write_chats(folder / f"wanted-{seed}.jsonl", two_traits([kept], 64, seed + HELD_OUT))}

    def arms(seed: int) -> list[Arm]:
        found = [Arm(PLAIN), *(Arm(f"preventative {alpha:g}", bench.preventative(trait, alpha)) for alpha in alphas)]
        if full:
            found += [Arm(f"preventative {top:g}, 1.25 epochs", bench.preventative(trait, top), 1.25), Arm("trained less (0.25 epochs)", epochs=0.25)]
        return [*found, Arm("ablation", bench.ablation(trait)), Arm(f"random direction {top:g}", bench.random_direction(top, seed))]

    def few(seed: int) -> list[Arm]:
        steered = [Arm(f"preventative {alpha:g}", bench.preventative(trait, alpha)) for alpha in (0.3, 0.5)]
        return [Arm(PLAIN), *steered, Arm("trained less (0.25 epochs)", epochs=0.25)]

    against = {f"steered {-alpha:g} at inference": bench.spec(trait, -alpha) for alpha in alphas}
    yield f"1. {trait}, severe", Part(trait, single, baseline, arms, against), None
    if full:
        few_against = {name: spec for name, spec in against.items() if spec.alpha in (-0.1, -0.2, -0.3)}
        yield f"2. {trait} and {kept}, both severe; {kept} is to be learnt", Part(trait, double, wanted, few, few_against), kept


def report(title: str, rows: Mapping[int, Mapping[str, Mapping[str, Any]]], part: Part, kept: str | None) -> dict[str, Any]:
    """Print a part's tables and return what they show."""
    table = summary(rows, part.trait)
    show_part(title, table, part.trait, kept)
    found = verdict(table, part.trait, stdev(rows[seed][PLAIN]["as trained"] for seed in rows) if len(rows) > 1 else 0.0)
    show_verdict(found)
    return {"summary": table, "equal training loss": found}


def main() -> None:
    parser = console.options(__doc__, "preventative.json")
    parser.add_argument("--trait", choices=SHIPPED_TRAITS, default="formality")
    parser.add_argument("--alphas", type=float, nargs="+", help="shares of the residual norm; 0.2 and 0.5, with --full 0.1, 0.2, 0.3 and 0.5")
    parser.add_argument("--seeds", type=int, help="3, with --full 5")
    parser.add_argument("--size", type=int, help="conversations a set; 96, with --full 160")
    parser.add_argument("--samples", type=int, help="replies a question; 5, with --full 10")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    arguments = parser.parse_args()
    full = arguments.full
    alphas = arguments.alphas or ([0.1, 0.2, 0.3, 0.5] if full else [0.2, 0.5])
    arguments.seeds, arguments.size = arguments.seeds or (5 if full else 3), arguments.size or (160 if full else 96)
    arguments.samples = arguments.samples or (10 if full else 5)
    torch.set_num_threads(arguments.threads)
    logging.getLogger("steered_lm").setLevel(logging.ERROR)
    disable_progress_bar()
    # peft's own use of transformers
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(arguments, Path(name))
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key != "json"}
        out: dict[str, Any] = {"machine": console.machine(arguments.threads), "settings": settings | {"alphas": alphas, "layer": LAYER}}
        for number, (title, part, kept) in enumerate(parts(bench, alphas, full)):
            rows: dict[int, dict[str, dict[str, Any]]] = {}
            out[title] = {"raw": rows}
            for seed in range(arguments.seeds):
                rows[seed] = run_seed(bench, part, seed)
                console.CONSOLE.print(f"{title}: seed {seed + 1} of {arguments.seeds}, {time.perf_counter() - started:.0f} s")
                # what is there is kept, should the rest take too long
                console.write(arguments.json, plain_data(out))
            out[title] |= report(title, rows, part, kept)
            if number == 0:
                out |= {"shifts": shifts(bench, 0), "screening": screening(bench, 0)}
                show_shifts(out)
    out["seconds"] = time.perf_counter() - started
    console.write(arguments.json, plain_data(out))


if __name__ == "__main__":
    main()
