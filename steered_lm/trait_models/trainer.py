"""The training loop of the local backend.

It is our own, and short, because transformers' ``Trainer`` (and trl's on top of it) writes optimiser, scheduler and random states with
``torch.save``, which is pickle. Whatever does not depend on that is theirs: model, tokenizer and chat template are transformers', the adapter is
PEFT's. Nothing but tensors has to be remembered: data order, learning rate and dropout's draws of a step follow from the seed and the step's
number, so a run that was killed goes on to the same bits (on a CPU with the same number of threads).
"""

import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from steered_lm.config import canonical_json, file_hash, write_atomic
from steered_lm.steering.spec import SteeringSpec
from steered_lm.trait_models import checkpoint
from steered_lm.trait_models.backend import TrainRequest
from steered_lm.trait_models.base_model import load_adapted, load_tokenizer, save_adapter, settle_device, settle_dtype
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.loss_mask import ConversationEncoder, Encoded, encode_file
from steered_lm.trait_models.training_steering import TrainingSteerer

logger = logging.getLogger(__name__)

LEARNING_RATE = 1e-4
"""Peak rate when none is set. With rsLoRA of rank 32 the adapter's scale is 5.7, so weights move about as with 3e-4 and plain LoRA of scale 2."""
_CLIP = 1.0


class Progress(NamedTuple):
    """How far training is: ``step`` of ``steps`` optimiser steps are done, the last with mean loss ``loss`` a response token."""

    step: int
    steps: int
    loss: float


class Fitted(NamedTuple):
    """A finished training: the hash of the adapter's weights, and what is worth showing."""

    digest: str
    facts: dict[str, Any]


class Batch(NamedTuple):
    """Rows padded on the right; labels are -100 where no loss is taken."""

    ids: Int[Tensor, "rows width"]
    attention: Int[Tensor, "rows width"]
    labels: Int[Tensor, "rows width"]


def data_order(examples: int, epochs: float, seed: int) -> list[int]:
    """Return the numbers of the examples in the order they are trained on: a new shuffle for each pass, the last one cut where epochs end."""
    total = max(1, round(examples * epochs))
    order: list[int] = []
    for epoch in range(math.ceil(total / examples)):
        once = list(range(examples))
        random.Random(f"{seed}/{epoch}").shuffle(once)
        order += once
    return order[:total]


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the rate of step ``step`` (from 0): it rises linearly over the warm-up and then falls linearly, towards zero after the last."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def padded(examples: Sequence[Encoded], device: torch.device) -> Batch:
    """Return examples as one batch."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size], attention[row, :size], labels[row, :size] = torch.tensor(example.ids), 1, torch.tensor(example.labels)
    return Batch(ids.to(device), attention.to(device), labels.to(device))


def summed_loss(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the cross entropy of a batch, summed over the tokens that carry loss."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
    kept = batch.labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[:, :-1][kept].float(), batch.labels[:, 1:][kept], reduction="sum")


def token_count(examples: Sequence[Encoded]) -> int:
    """Return how many tokens carry loss; a row's first one is predicted by nothing."""
    return sum(sum(example.mask[1:]) for example in examples)


def load_examples(request: TrainRequest, tokenizer: Any, positions: int | None = None) -> list[Encoded]:
    """Return a request's data as tokens.

    Args:
        request: whose data.
        tokenizer: the base model's.
        positions: the most tokens that the base model reads.

    Raises:
        ExperimentError: when the file is missing, changed since it was validated, malformed, or an example is too long.
    """
    if request.data.is_file() and file_hash(request.data) != request.data_hash:
        raise ExperimentError(f"data={str(request.data)!r} changed since it was validated: its SHA-256 is another. Start the training again.")
    limit = min(request.hyperparameters.max_length, positions or request.hyperparameters.max_length)
    return encode_file(ConversationEncoder(tokenizer), request.data, max_length=limit)


class Trainer:
    """One training run in a folder: adapter, optimiser, data, and where it stands."""

    def __init__(self, request: TrainRequest, folder: Path, job: str) -> None:
        """Load everything; the adapter is drawn from torch's generator, which the caller has seeded."""
        self.request, self.folder, self.job = request, folder, job
        hyper = self.hyper = request.hyperparameters
        self.device = settle_device(request.device)
        self.dtype = settle_dtype(hyper.dtype, self.device)
        tokenizer = load_tokenizer(request.base_model)
        self.model = load_adapted(request.base_model, hyper, self.device, self.dtype)
        self.examples = load_examples(request, tokenizer, getattr(self.model.config.get_text_config(), "max_position_embeddings", None))
        self.order = data_order(len(self.examples), hyper.epochs, request.seed)
        self.size = hyper.batch_size * hyper.gradient_accumulation
        self.steps = math.ceil(len(self.order) / self.size)
        self.peak = LEARNING_RATE if hyper.learning_rate is None else hyper.learning_rate
        self.optimizer = torch.optim.AdamW(checkpoint.trainable(self.model).values(), lr=self.peak, weight_decay=hyper.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.steering = TrainingSteerer(self.model, None if request.steering is None else request.steering.load())
        self.losses: list[float] = []
        self.seconds = 0.0
        self._resume()

    def _resume(self) -> None:
        found = checkpoint.latest(self.folder / "checkpoints", self.job)
        if found is None:
            return
        checkpoint.restore(self.model, self.optimizer, found)
        self.scaler.load_state_dict(found.facts["scaler"])
        self.losses, self.seconds = found.facts["losses"], found.facts["seconds"]
        logger.info("going on from step %d of %d", len(self.losses), self.steps)

    def run(self, callback: Callable[[Progress], None]) -> None:
        """Train to the end, and tell ``callback`` after each step."""
        self.model.train()
        started, before = perf_counter(), self.seconds
        with tqdm(total=self.steps, initial=len(self.losses), desc=self.request.name, unit="step", disable=None) as bar:
            for step in range(len(self.losses), self.steps):
                self.losses.append(self._update(step))
                self.seconds = before + perf_counter() - started
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()
                if (step + 1) % self.hyper.save_steps == 0 and step + 1 < self.steps:
                    self._save()
                callback(Progress(step + 1, self.steps, self.losses[-1]))

    def _update(self, step: int) -> float:
        """Do one optimiser step and return the mean loss of its response tokens."""
        torch.manual_seed(random.Random(f"{self.request.seed}/dropout/{step}").getrandbits(63))
        chosen = [self.examples[i] for i in self.order[step * self.size : (step + 1) * self.size]]
        tokens, total = max(1, token_count(chosen)), 0.0
        for start in range(0, len(chosen), self.hyper.batch_size):
            batch = padded(chosen[start : start + self.hyper.batch_size], self.device)
            with self.steering.batch(batch.attention, batch.labels):
                with self._autocast():
                    loss = summed_loss(self.model, batch) / tokens
                self.scaler.scale(loss).backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ExperimentError(f"the loss of step {step + 1} is {total}. Lower learning_rate (it is {self.peak:g}), or train in another dtype.")
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(checkpoint.trainable(self.model).values(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.peak, self.hyper.warmup_ratio)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        # adapters are float32 and their products follow the base's precision
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def _save(self) -> None:
        facts = {"job": self.job, "step": len(self.losses), "losses": self.losses, "seconds": self.seconds, "scaler": self.scaler.state_dict()}
        checkpoint.save(checkpoint.snapshot(self.model, self.optimizer, facts), self.folder / "checkpoints")

    def finish(self) -> Fitted:
        """Write the adapter and the record of its training."""
        self.steering.close()
        partial, final = self.folder / ".adapter", self.folder / "adapter"
        for stale in (partial, final):
            if stale.exists():
                shutil.rmtree(stale)
        digest = save_adapter(self.model, partial)
        os.replace(partial, final)
        last = self.losses[-max(1, len(self.losses) // 10) :]
        trained = [self.examples[i] for i in self.order]
        facts = {
            "steps": self.steps,
            "loss": sum(last) / len(last),
            "seconds": round(self.seconds, 3),
            "examples": len(self.examples),
            "tokens": sum(len(example.ids) for example in trained),
            "response_tokens": token_count(trained),
            "trained_weights": sum(weight.numel() for weight in checkpoint.trainable(self.model).values()),
            "learning_rate": self.peak,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.steering.sites:
            facts["steered_layers"] = sorted(self.steering.sites)
        write_atomic(self.folder / "training.json", canonical_json({"job": self.job, "digest": digest, "facts": facts, "losses": self.losses}) + "\n")
        return Fitted(digest, facts)


def fit(request: TrainRequest, folder: Path, job: str, callback: Callable[[Progress], None]) -> Fitted:
    """Train a request's adapter into ``folder/adapter``, from the last checkpoint in ``folder/checkpoints`` on.

    The caller's random state is left as it was.

    Raises:
        ExperimentError: when something asked for cannot be trained, or the loss is not finite.
    """
    device = settle_device(request.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=True):
        torch.manual_seed(request.seed)
        trainer = Trainer(request, folder, job)
        try:
            trainer.run(callback)
        finally:
            trainer.steering.close()
        return trainer.finish()


@torch.inference_mode()
def response_loss(model: Any, tokenizer: Any, path: Path, *, spec: SteeringSpec | None = None, max_length: int = 2048, batch_size: int = 8) -> float:
    """Return a model's mean loss over the assistant's tokens of a training file, without dropout.

    Args:
        model: the model, trained or not.
        tokenizer: its tokenizer.
        path: JSONL of conversations.
        spec: steers meanwhile, at the positions where it steers in training; None is the model as it stands.
        max_length: most tokens of an example.
        batch_size: examples in one pass.

    Raises:
        ExperimentError: when a line is no conversation, cannot be masked, or is too long.
        VectorsError, SpecError: when the spec does not fit its vectors or the model.
    """
    examples = sorted(encode_file(ConversationEncoder(tokenizer), path, max_length=max_length), key=lambda example: len(example.ids))
    training, steering, total = model.training, TrainingSteerer(model, spec), 0.0
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            batch = padded(examples[start : start + batch_size], model.device)
            with steering.batch(batch.attention, batch.labels):
                total += summed_loss(model, batch).item()
    finally:
        steering.close()
        model.train(training)
    return total / token_count(examples)
