"""A population's continuations: one by one, per candidate, all rows in one batch, and by the engine; both sides in one process, in turns.

A  ``generate`` of Hugging Face for every candidate and prompt, a hook written by hand
B  the same per candidate, its prompts in one batch; also as repeng, steering-vectors and lm-eval's ``steered`` do it
C  the same with all rows in one batch, a vector a row
D  ``steered_lm.engine.Engine``; D' is D with oneDNN's linear layers

Run ``python tests/bench/generation.py --help``. Ratios are of processor seconds (one thread) or of the clock (more than one).
"""

import argparse
import functools
import importlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shapes
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM

from steered_lm.engine import Engine, GenerationRow
from steered_lm.engine.gemm import Gemm
from steered_lm.harness.model import SteeredHFLM
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer

Rows = list[list[int]]
Design = Callable[[int], Any]

OTHERS = {"repeng": "repeng", "steering_vectors": "steering-vectors"}


class Workload:
    """One model, its candidates and prompts, and every design's way to run them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.subject = shapes.subject(arguments.size, getattr(torch, arguments.dtype))
        self.model, self.tokenizer, layer = self.subject.model, self.subject.tokenizer, self.subject.layer
        self.prompts = self.encoded(arguments.prompts)
        self.steering = shapes.random_steering(self.model, self.prompts[0], layer, arguments.candidates, arguments.positions, folder)
        self.hook = shapes.HandHook(self.model, layer, arguments.positions)
        self.steerer = Steerer(self.model)
        self.count = arguments.candidates * arguments.prompts
        self._written: dict[tuple[int, ...], dict[int, Rows]] = {}

    def texts(self, count: int, *, common: bool = True) -> list[str]:
        """Return distinct prompts."""
        return self.subject.texts(count, common)

    def encoded(self, count: int, *, common: bool = True) -> list[tuple[int, ...]]:
        """Return their tokens."""
        return shapes.encoded(self.tokenizer, self.texts(count, common=common))

    # -- designs ------------------------------------------------------------------------------------------------------------------

    def sequential(self, ends: Sequence[int], number: int) -> Rows:
        """A, spread over the rounds: each runs its share of the candidates."""
        found: Rows = []
        for candidate in self.share(number):
            with self.hook.adding(self.steering.vectors[candidate]):
                for prompt in self.prompts:
                    found += self._continued([prompt], ends)
        self._written.setdefault(tuple(ends), {})[number] = found
        return found

    def share(self, number: int) -> range:
        """Return the candidates that design A runs in a round."""
        edges = [self.arguments.candidates * i // self.arguments.rounds for i in (number, number + 1)]
        return range(*edges)

    def written(self, ends: Sequence[int]) -> Rows:
        """Return what design A wrote in all rounds, candidate by candidate."""
        by_round = self._written[tuple(ends)]
        return [row for number in sorted(by_round) for row in by_round[number]]

    def per_candidate(self, ends: Sequence[int], number: int) -> Rows:
        found: Rows = []
        for vector in self.steering.vectors:
            with self.hook.adding(vector):
                found += self._continued(self.prompts, ends)
        return found

    def one_batch(self, ends: Sequence[int], number: int) -> Rows:
        with self.hook.adding(torch.stack(self.steering.vectors).repeat_interleave(len(self.prompts), dim=0)[:, None]):
            return self._continued(self.prompts * len(self.steering.vectors), ends)

    def repeng(self, ends: Sequence[int], number: int) -> Rows:
        from repeng import ControlModel

        controlled, found = ControlModel(self.model, [self.steering.layer]), []
        try:
            for vector in self.steering.vectors:
                controlled.set_raw_control({self.steering.layer: vector})
                found += self._continued(self.prompts, ends)
        finally:
            controlled.unwrap()
        return found

    def steering_vectors(self, ends: Sequence[int], number: int) -> Rows:
        from steering_vectors import SteeringVector

        found: Rows = []
        for vector in self.steering.vectors:
            with SteeringVector({self.steering.layer: vector}, "decoder_block").apply(self.model):
                found += self._continued(self.prompts, ends)
        return found

    def stock_steered(self, models: Sequence[HFLM], number: int) -> list[str]:
        requests = self.requests(self.texts(len(self.prompts)))
        return [text for model in models for text in model.generate_until(requests, disable_tqdm=True)]

    def engine(self, gemm: Gemm, ends: Sequence[int]) -> Design:
        """Return design D, warmed up."""
        engine = Engine(self.steerer, self.tokenizer, end_ids=ends, gemm=gemm)
        rows = [GenerationRow(prompt, self.arguments.tokens, spec) for spec in self.steering.specs for prompt in self.prompts]
        engine.generate([row._replace(max_new_tokens=2) for row in rows[:2]])
        return lambda number: [list(generated.tokens) for generated in engine.generate(rows)]

    def _continued(self, prompts: Sequence[tuple[int, ...]], ends: Sequence[int]) -> Rows:
        return continued(self.model, prompts, self.arguments.tokens, ends)

    def precise(self, ends: Sequence[int]) -> Rows:
        """Return what the same weights write in float32."""
        model = shapes.subject(self.arguments.size, getattr(torch, self.arguments.dtype)).model.float()
        hook = shapes.HandHook(model, self.steering.layer, self.arguments.positions)
        with hook.adding(torch.stack(self.steering.vectors).float().repeat_interleave(len(self.prompts), dim=0)[:, None]):
            return continued(model, self.prompts * len(self.steering.vectors), self.arguments.tokens, ends)

    # -- lm-eval ------------------------------------------------------------------------------------------------------------------

    def requests(self, texts: Sequence[str]) -> list[Instance]:
        """Return greedy requests that end at their length only."""
        settings = {"until": [], "do_sample": False, "max_gen_toks": self.arguments.tokens}
        return [Instance("generate_until", {}, (text, dict(settings)), 0, metadata=("bench", i, 1)) for i, text in enumerate(texts)]

    def harness(self, kind: type[HFLM], **settings: Any) -> HFLM:
        """Return a model of one of lm-eval's types."""
        longest = self.model.config.max_position_embeddings
        return kind(pretrained=self.model, tokenizer=self.tokenizer, add_bos_token=False, max_length=longest, **settings)

    def stock_models(self) -> list[HFLM]:
        """Return lm-eval's ``steered`` for each candidate; it reads its vector from a pickle."""
        made = []
        for number, vector in enumerate(self.steering.vectors):
            path = self.folder / f"{number}.pt"
            site = {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
            torch.save({f"layers.{self.steering.layer}": site}, path)
            made.append(self.harness(SteeredModel, steer_path=str(path), batch_size=len(self.prompts)))
        return made


@contextmanager
def _numpy_one() -> Iterator[None]:
    """Give numpy the name back that repeng 0.4.0 uses in an annotation and numpy 2 left out; all else that it needs is there."""
    import numpy as np

    missing = not hasattr(np, "float_")
    if missing:
        np.float_ = np.float64
    try:
        yield
    finally:
        if missing:
            del np.float_


def continued(model: Any, prompts: Sequence[tuple[int, ...]], tokens: int, ends: Sequence[int]) -> Rows:
    """Return what the model's own ``generate`` writes, each row up to its first end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=list(ends) or None)[:, width:].tolist()
    stops = set(ends)
    return [row[: next((place + 1 for place, token in enumerate(row) if token in stops), len(row))] for row in written]


A, D, ONEDNN = "A one by one", "D engine", "D' engine, oneDNN"


def population(work: Workload, early: bool) -> dict[str, Any]:
    """Measure the designs, print their table, and return it."""
    arguments = work.arguments
    ends = work.subject.ends if early else []
    designs, missing = _designs(work, ends, others=not early)
    continued(work.model, work.prompts, 2, ends)
    runs = shapes.interleaved(designs, arguments.rounds)
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
    shapes.show(title, header, table, "\n".join(missing))
    return {"tokens a row": tokens / work.count, "designs": facts, "not run": missing}


def _designs(work: Workload, ends: Sequence[int], *, others: bool) -> tuple[dict[str, Design], list[str]]:
    """Return the designs by name, and what other libraries are not installed."""
    designs: dict[str, Design] = {
        A: functools.partial(work.sequential, ends),
        "B per candidate": functools.partial(work.per_candidate, ends),
        "C one batch": functools.partial(work.one_batch, ends),
        D: work.engine("torch", ends),
    }
    if work.arguments.dtype == "float32" and torch.backends.mkldnn.is_available():
        designs[ONEDNN] = work.engine("onednn", ends)
    missing: list[str] = []
    if not others:
        return designs, missing
    for module, package in OTHERS.items():
        if importlib.util.find_spec(module):
            with _numpy_one():
                importlib.import_module(module)
            designs[f"B {package}"] = functools.partial(getattr(work, module), ends)
        else:
            missing.append(f"B {package}: not installed: pip install --no-deps {package}")
    designs["B lm-eval steered"] = functools.partial(work.stock_steered, work.stock_models())
    return designs, missing


def _facts(work: Workload, ends: Sequence[int], runs: Mapping[str, shapes.Run]) -> dict[str, dict[str, Any]]:
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
                fact[key] = one_by_one / runs[engine].seconds(clock) if name == A else shapes.ratio(run, runs[engine], clock)
        rows = reference if name == A else run.output
        # the other libraries steer all positions, and lm-eval returns text
        if isinstance(rows[0], list) and (arguments.positions == "all" or name[2:] not in OTHERS.values()):
            fact["equal rows"], fact["flips"] = shapes.agreement(reference, rows)
            if precise is not None:
                fact["flips against float32"] = shapes.agreement(precise, rows).flips
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
    shapes.show(title, ["what", "ratio"], [[name, f"{value:.3f}"] for name, value in facts.items()])
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

    runs = shapes.interleaved({name: functools.partial(design, name) for name in rows}, max(arguments.rounds, 5))
    what = f"{count} specs in {count} rows against one spec, positions {positions}"
    by_round = [one / distinct for one, distinct in zip(steps["one"], steps["distinct"], strict=True)]
    return {what: shapes.ratio(runs["one"], runs["distinct"], clock), f"{what}, steps only (by the clock)": statistics.median(by_round)}


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

    runs = shapes.interleaved({"plain": plain, "hooked": hooked}, max(work.arguments.rounds, 3))
    assert runs["plain"].output == runs["hooked"].output, "weight zero is not the unsteered model"
    return {"hooks at weight zero against none, Hugging Face generate": shapes.ratio(runs["plain"], runs["hooked"], clock)}


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
    runs = shapes.interleaved({name: functools.partial(design, name) for name in models}, max(work.arguments.rounds, 3))
    return {
        f"{name} with one spec against hf, generation": shapes.ratio(runs["hf"], runs[name], clock) for name in ("steered-hf", "steered-hf, exact")
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one setting."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(arguments, Path(folder))
        settings = {name: value for name, value in vars(arguments).items() if isinstance(value, (str, int))}
        found: dict[str, Any] = {"settings": settings, "machine": shapes.machine(arguments.threads)}
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
    parser = shapes.options(__doc__, "generation.json")
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
    shapes.write(arguments.json, [measure(argparse.Namespace(**{**vars(arguments), **setting})) for setting in settings])


if __name__ == "__main__":
    main()
