"""Tiny chat models that are trained for a benchmark, steered meanwhile or not, and what is measured of them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.harness.evaluation import load_model
from steered_lm.harness.items import ItemResult, evaluate_items, load_task
from steered_lm.harness.model import SteeredHFLM
from steered_lm.measure.passages import read_passages
from steered_lm.measure.perplexity import perplexities
from steered_lm.measure.texts import text_file
from steered_lm.persona.meter import TRAITS, trait_levels
from steered_lm.search.protocol import Candidate
from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.steering.vectors import TraitVectors, random_vectors
from steered_lm.study import ModelConfig, build
from steered_lm.tiny_chat.trait_data import SHIPPED_TRAITS
from steered_lm.trait_models.backend import TrainRequest
from steered_lm.trait_models.experiment import Hyperparameters, TrainingSteering
from steered_lm.trait_models.peft import train

LAYER = 3
FACTS = ("tiny_knowledge", "tiny_truth")
HELD_OUT = 10_000  # added to a seed for conversations that nothing is trained on
Values = list[float | None]


class Arm(NamedTuple):
    """One way to train: what is steered meanwhile, if anything, and for how many passes over the data."""

    name: str
    steering: TrainingSteering | None = None
    epochs: float = 1.0


class Trained(NamedTuple):
    """A trained model inside the harness, and its loss at the end of training, as its last tenth of steps saw it."""

    lm: SteeredHFLM
    last: float


class Bench:
    """The vectors, tasks and settings that all parts share."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.size, self.rate = arguments.size, arguments.rate
        path = folder / "vectors.safetensors"
        pairs = {} if arguments.full else {"pairs": 60, "held_out_pairs": 30}
        self.vectors: TraitVectors = build(ModelConfig(), SHIPPED_TRAITS, str(LAYER), path, **pairs)
        self.reference = VectorsRef.to(path)
        self.facts = {name: load_task(name, {}) for name in FACTS}
        self.talk: Any = None
        self.count = 0

    def trait_task(self, trait: str) -> Any:
        return load_task("pv_trait", {"trait": trait, "judge": "markers", "samples": self.arguments.samples, "max_gen_toks": 80})

    def spec(self, trait: str, alpha: float, reference: VectorsRef | None = None) -> SteeringSpec:
        settings = {"weights": {trait: 1.0}, "layers": (LAYER,), "alpha": alpha, "positions": "all"}
        return SteeringSpec(vectors=reference or self.reference, **settings)

    def preventative(self, trait: str, alpha: float) -> TrainingSteering:
        return TrainingSteering(spec=self.spec(trait, alpha).save(self.folder / f"{trait}-{alpha:g}.yaml"))

    def ablation(self, trait: str) -> TrainingSteering:
        return TrainingSteering(spec=self.spec(trait, 1.0).save(self.folder / f"{trait}-span.yaml"), method="ablation")

    def random_direction(self, alpha: float, seed: int) -> TrainingSteering:
        """Return steering along a direction of its own for each seed; the vectors file has the same norms, so alpha means the same length."""
        path = random_vectors(self.vectors, seed=1000 + seed).save(self.folder / f"random-{seed}.safetensors")
        return TrainingSteering(spec=self.spec("random", alpha, VectorsRef.to(path)).save(self.folder / f"random-{seed}-{alpha:g}.yaml"))

    def train(self, data: Path, arm: Arm, seed: int) -> Trained:
        hyper = Hyperparameters(epochs=arm.epochs, learning_rate=self.rate, batch_size=8, max_length=256, lora_rank=32)
        request = TrainRequest(
            name="bench",
            base_model=TINY_CHAT,
            data=data,
            data_hash=file_hash(data),
            hyperparameters=hyper,
            seed=seed,
            steering=arm.steering,
            device="cpu",
        )
        self.count += 1
        model = train(request, self.folder / f"job-{self.count}")
        return Trained(self.load(model.peft), model.facts["loss"])

    def load(self, adapter: str | None = None) -> SteeredHFLM:
        lm = load_model(TINY_CHAT, adapter, "cpu")
        lm.quiet = True
        return lm

    def perplexity(self, lm: SteeredHFLM, specs: Sequence[SteeringSpec | None]) -> list[float | None]:
        if self.talk is None:
            self.talk = read_passages(text_file("tiny_talk"), lm.tokenizer, lm.prefix_token_id)
        return [found.value for found in perplexities(lm.engine, self.talk, specs, length=lm.max_length)]

    def measured(
        self, lm: SteeredHFLM, task: Any, seed: int, specs: Mapping[str, SteeringSpec | None], facts: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Return, by candidate, scores by axis and question, and the shares of facts that are right."""
        candidates = [Candidate(name=name, spec=spec) for name, spec in specs.items()]
        found: dict[str, dict[str, Any]] = {
            name: {"scores": by_axis(items)} for name, items in evaluate_items(lm, task, candidates, seed=seed).items()
        }
        if facts:
            for name, task_ in self.facts.items():
                for arm, items in evaluate_items(lm, task_, candidates).items():
                    found[arm][name] = [item.metrics["acc"] for item in items]
            for arm, value in zip(specs, self.perplexity(lm, list(specs.values())), strict=True):
                found[arm]["perplexity"] = value
        return found


def by_axis(items: Sequence[ItemResult]) -> dict[str, Values]:
    """Return each axis's mean score a question, 0-100, over the replies that show the axis at all."""
    return {axis: [mean_or_none([level(text, axis) for text in item.responses]) for item in items] for axis in TRAITS}


def level(text: str, axis: str) -> float | None:
    found = trait_levels(text)[axis]
    return None if found is None else 50.0 * (1.0 + found)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
