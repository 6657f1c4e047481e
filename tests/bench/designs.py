"""Ways to write a population's continuations: one workload, and every design that runs it."""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
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
from steered_lm.steering.hooks import Steerer

Rows = list[list[int]]
Design = Callable[[int], Any]

OTHERS = {"repeng": "repeng", "steering_vectors": "steering-vectors"}
A, D, ONEDNN = "A one by one", "D engine", "D' engine, oneDNN"


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


def available(work: Workload, ends: Sequence[int], *, others: bool) -> tuple[dict[str, Design], list[str]]:
    """Return the designs by name, and what other libraries are not installed."""
    found: dict[str, Design] = {
        A: functools.partial(work.sequential, ends),
        "B per candidate": functools.partial(work.per_candidate, ends),
        "C one batch": functools.partial(work.one_batch, ends),
        D: work.engine("torch", ends),
    }
    if work.arguments.dtype == "float32" and torch.backends.mkldnn.is_available():
        found[ONEDNN] = work.engine("onednn", ends)
    missing: list[str] = []
    if not others:
        return found, missing
    for module, package in OTHERS.items():
        if importlib.util.find_spec(module):
            with _numpy_one():
                importlib.import_module(module)
            found[f"B {package}"] = functools.partial(getattr(work, module), ends)
        else:
            missing.append(f"B {package}: not installed: pip install --no-deps {package}")
    found["B lm-eval steered"] = functools.partial(work.stock_steered, work.stock_models())
    return found, missing


def continued(model: Any, prompts: Sequence[tuple[int, ...]], tokens: int, ends: Sequence[int]) -> Rows:
    """Return what the model's own ``generate`` writes, each row up to its first end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=list(ends) or None)[:, width:].tolist()
    stops = set(ends)
    return [row[: next((place + 1 for place, token in enumerate(row) if token in stops), len(row))] for row in written]


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
