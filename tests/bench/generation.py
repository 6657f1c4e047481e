"""A population's continuations: one by one, per candidate, all rows in one batch, and by the engine; both sides in one process, in turns.

A  ``generate`` of Hugging Face for every candidate and prompt, a hook written by hand
B  the same per candidate, its prompts in one batch; also as repeng, steering-vectors and lm-eval's ``steered`` do it
C  the same with all rows in one batch, a vector a row
D  ``steered_lm.engine.Engine``; D' is D with oneDNN's linear layers

Run ``python tests/bench/generation.py --help``. Ratios are of processor seconds (one thread) or of the clock (more than one).
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison
import console
import shapes
import torch
from designs import ONEDNN, OTHERS, A, D, Rows, Workload, available, continued
from lm_eval.models.huggingface import HFLM

from steered_lm.engine import Engine, GenerationRow
from steered_lm.harness.model import SteeredHFLM
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer


def population(work: Workload, early: bool) -> dict[str, Any]:
    """Measure the designs, print their table, and return it."""
    arguments = work.arguments
    ends = work.subject.ends if early else []
    designs, missing = available(work, ends, others=not early)
    continued(work.model, work.prompts, 2, ends)
    runs = comparison.interleaved(designs, arguments.rounds)
    facts = _facts(work, ends, runs)
    tokens = sum(map(len, work.written(ends)))
    title = (
        f"{arguments.size}, {arguments.dtype}, {arguments.candidates} candidates x {arguments.prompts} prompts x {arguments.tokens} tokens, "
        f"positions {arguments.positions}, {'early stops' if early else 'no early stops'} ({tokens / work.count:.1f} tokens a row), "
        f"{arguments.threads} thread(s)"
    )
    header = [
        "design",
        "seconds",
        "tokens/s",
        "over A",
        "D over it",
        "D' over it",
        f"equal rows of {work.count}",
        "flipped tokens",
        "against float32",
    ]
    columns = {"over A": ".2f", "D over it": ".2f", "D' over it": ".2f", "equal rows": "d", "flips": ".2%", "flips against float32": ".2%"}
    table = [
        [
            name,
            f"{fact['seconds']:.2f}",
            f"{tokens / fact['seconds']:.0f}",
            *(format(fact[key], form) if key in fact else "" for key, form in columns.items()),
        ]
        for name, fact in facts.items()
    ]
    console.show(title, header, table, "\n".join(missing))
    return {"tokens a row": tokens / work.count, "designs": facts, "not run": missing}


def _facts(work: Workload, ends: Sequence[int], runs: Mapping[str, comparison.Run]) -> dict[str, dict[str, Any]]:
    """Return seconds, ratios and agreement by design; A ran once in all, spread over the rounds."""
    arguments = work.arguments
    clock = "cpu" if arguments.threads == 1 else "wall"
    reference = work.written(ends)
    precise = work.precise(ends) if arguments.dtype != "float32" else None
    one_by_one = sum(getattr(cost, clock) for cost in runs[A].costs)
    facts: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        seconds = one_by_one if name == A else run.seconds(clock)
        fact: dict[str, Any] = {"seconds": seconds, "over A": one_by_one / seconds}
        for engine, key in ((D, "D over it"), (ONEDNN, "D' over it")):
            if engine in runs:
                fact[key] = one_by_one / runs[engine].seconds(clock) if name == A else comparison.ratio(run, runs[engine], clock)
        rows = reference if name == A else run.output
        # the other libraries steer all positions, and lm-eval returns text
        if isinstance(rows[0], list) and (arguments.positions == "all" or name[2:] not in OTHERS.values()):
            fact["equal rows"], fact["flips"] = comparison.agreement(reference, rows)
            if precise is not None:
                fact["flips against float32"] = comparison.agreement(precise, rows).flips
        facts[name] = fact
    return facts


def throughput(work: Workload) -> dict[str, Any]:
    """Measure what specs cost: as many as rows against one, hooks at weight zero against none, ``steered-hf`` against ``hf``."""
    arguments = work.arguments
    clock = "cpu" if arguments.threads == 1 else "wall"
    facts = {
        **_distinct(work, clock, "response"),
        **_distinct(work, clock, "all"),
        **_weight_zero(work, clock),
        **_one_spec(work, clock),
    }
    title = f"throughput, {arguments.size}, {arguments.dtype}, positions {arguments.positions}, {arguments.threads} thread(s)"
    console.show(title, ["what", "ratio"], [[name, f"{value:.3f}"] for name, value in facts.items()])
    return facts


def _distinct(work: Workload, clock: str, positions: str) -> dict[str, float]:
    """All rows have prompts of their own that begin differently: nothing is shared, and nothing but the specs differs."""
    arguments = work.arguments
    count = min(work.count, len(shapes.FORMS) * len(shapes.TOPICS))
    prompts = work.encoded(count, common=False)
    steering = shapes.random_steering(work.model, prompts[0], work.steering.layer, count, positions, work.folder, seed=1)
    rows = {
        "distinct": [GenerationRow(prompt, arguments.tokens, spec) for prompt, spec in zip(prompts, steering.specs, strict=True)],
        "one": [GenerationRow(prompt, arguments.tokens, steering.specs[0]) for prompt in prompts],
    }
    engine = Engine(work.steerer, work.tokenizer, gemm="torch")
    engine.generate([row._replace(max_new_tokens=2) for row in rows["distinct"]])
    steps: dict[str, list[float]] = {name: [] for name in rows}

    def design(name: str, number: int) -> None:
        before = engine.report.decode_seconds
        engine.generate(rows[name])
        steps[name].append(engine.report.decode_seconds - before)

    runs = comparison.interleaved({name: functools.partial(design, name) for name in rows}, max(arguments.rounds, 5))
    what = f"{count} specs in {count} rows against one spec, positions {positions}"
    by_round = [one / distinct for one, distinct in zip(steps["one"], steps["distinct"], strict=True)]
    return {what: comparison.ratio(runs["one"], runs["distinct"], clock), f"{what}, steps only (by the clock)": statistics.median(by_round)}


def _weight_zero(work: Workload, clock: str) -> dict[str, float]:
    count = min(work.count, len(shapes.FORMS) * len(shapes.TOPICS))
    prompts = work.encoded(count)
    zero = work.steering.specs[0].with_weights({})
    work.hook.close()
    work.steerer.close()

    def plain(number: int) -> Rows:
        return continued(work.model, prompts, work.arguments.tokens, [])

    def hooked(number: int) -> Rows:
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with Steerer(work.model) as steerer:
            steerer.compile(work.steering.specs[0])
            with steerer.batch([zero] * count, Layout.generation(mask)):
                return continued(work.model, prompts, work.arguments.tokens, [])

    runs = comparison.interleaved({"plain": plain, "hooked": hooked}, max(work.arguments.rounds, 3))
    assert runs["plain"].output == runs["hooked"].output, "weight zero is not the unsteered model"
    return {"hooks at weight zero against none, Hugging Face generate": comparison.ratio(runs["plain"], runs["hooked"], clock)}


def _one_spec(work: Workload, clock: str) -> dict[str, float]:
    """The whole harness path, one spec for all requests."""
    texts = work.texts(min(work.count, len(shapes.FORMS) * len(shapes.TOPICS)))
    requests = work.requests(texts)
    path = work.steering.specs[0].save(work.folder / "spec.yaml")
    models = {
        "hf": work.harness(HFLM, batch_size=len(texts)),
        "steered-hf": work.harness(SteeredHFLM, batch_size=len(texts), steering=str(path), gemm="torch"),
        "steered-hf, exact": work.harness(SteeredHFLM, batch_size=len(texts), steering=str(path), exact=True),
    }

    def design(name: str, number: int) -> list[str]:
        return list(models[name].generate_until(requests, disable_tqdm=True))

    models["steered-hf"].generate_until(requests[:2], disable_tqdm=True)
    runs = comparison.interleaved({name: functools.partial(design, name) for name in models}, max(work.arguments.rounds, 3))
    steered = ("steered-hf", "steered-hf, exact")
    return {f"{name} with one spec against hf, generation": comparison.ratio(runs["hf"], runs[name], clock) for name in steered}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one setting."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(arguments, Path(folder))
        settings = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int))}
        found: dict[str, Any] = {"settings": settings, "machine": console.machine(arguments.threads)}
        if arguments.only != "throughput":
            for early in (False, True):
                found["early stops" if early else "no early stops"] = population(work, early)
        if arguments.only != "population":
            found["throughput"] = throughput(work)
        return found


FULL: list[Mapping[str, Any]] = [
    {"size": "s", "positions": "all"},
    {"size": "s", "positions": "response"},
    {"size": "s", "positions": "all", "candidates": 16},
    {"size": "s", "positions": "all", "dtype": "bfloat16"},
    {"size": "m", "positions": "all", "rounds": 2},
    {"size": "xs", "positions": "all", "candidates": 16},
    {"size": shapes.TINY_CHAT, "positions": "all"},
    {"size": shapes.TINY_CHAT, "positions": "response"},
    {"size": shapes.TINY_CHAT, "positions": "all", "candidates": 16},
    {"size": shapes.TINY_CHAT, "positions": "response", "candidates": 16},
]


def main() -> None:
    parser = console.options(__doc__, "generation.json")
    parser.add_argument("--size", choices=[*shapes.SHAPES, shapes.TINY_CHAT], default="s", help="xs, s, m: about 6, 30, 100 million, random")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="design A runs once in all, a part of the candidates in each round")
    parser.add_argument("--positions", choices=["all", "response"], default="all")
    parser.add_argument("--only", choices=["population", "throughput"], help="the designs A to D, or what specs cost; both when left out")
    arguments = parser.parse_args()
    settings = FULL if arguments.full else [{}]
    console.write(arguments.json, [measure(argparse.Namespace(**{**vars(arguments), **setting})) for setting in settings])


if __name__ == "__main__":
    main()
