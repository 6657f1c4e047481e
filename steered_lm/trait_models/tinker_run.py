"""The process that drives a training at Tinker: ``python -m steered_lm.trait_models.tinker_run FOLDER``, started by the backend."""

import json
import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from steered_lm.config import json_objects
from steered_lm.errors import require
from steered_lm.judges.redact import Key
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.tinker import JOB, LEARNING_RATE, Job, Progress, TinkerBackend, read_progress, write_progress

Messages = Sequence[dict[str, str]]
Encode = Callable[[Messages], tuple[Sequence[int], Sequence[bool]]]
"""A conversation's token ids, and which of them carry loss."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_KEPT = 7 * 24 * 3600  # seconds that the service keeps checkpoints; the finished weights stay


class CancelledError(BaseException):
    """Somebody asked for the process to stop."""


class Example(NamedTuple):
    """One conversation.

    Attributes:
        ids: its tokens.
        mask: which of them carry loss.
    """

    ids: Sequence[int]
    mask: Sequence[bool]


def encoder(tokenizer: Any) -> Encode:
    """Return how conversations become tokens: by the chat template, with loss on what the assistant says up to the end of its turn."""

    def encode(messages: Messages) -> Example:
        def shown(upto: int, *, prompt: bool) -> str:
            return str(tokenizer.apply_chat_template(list(messages[:upto]), tokenize=False, add_generation_prompt=prompt))

        text = shown(len(messages), prompt=False)
        spans = [(shown(i, prompt=True), shown(i + 1, prompt=False)) for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not all(text.startswith(end) and end.startswith(start) for start, end in spans):
            raise ExperimentError(
                f"the chat template of {getattr(tokenizer, 'name_or_path', '?')!r} does not show turns one after the other, so the "
                "assistant's tokens cannot be found. Use a model with another template."
            )
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(len(start) <= first < len(end) for start, end in spans) for first, _ in found["offset_mapping"]]
        return Example(found["input_ids"], mask)

    return encode


def read_examples(job: Job, encode: Encode) -> list[Example]:
    """Return the training data as tokens.

    Raises:
        ExperimentError: when there are none, or one is too long or carries no loss.
    """
    longest = job.request.hyperparameters.max_length
    examples = []
    with job.request.data.open(encoding="utf-8") as lines:
        for _, where, row in json_objects(lines, str(job.request.data), error=ExperimentError):
            example = Example(*encode(row["messages"]))
            if len(example.ids) > longest:
                raise ExperimentError(f"{where} has {len(example.ids)} tokens, and max_length is {longest}. Shorten it, or raise max_length.")
            if not any(example.mask[1:]):
                raise ExperimentError(f"{where} has no token of the assistant. Add a turn of the assistant's.")
            examples.append(example)
    if not examples:
        raise ExperimentError(f"{str(job.request.data)!r} is empty. Name a data set with examples.")
    return examples


def schedule(count: int, batch: int, epochs: float, seed: int) -> list[list[int]]:
    """Return which examples each optimiser step sees: in the file's order at first, shuffled by seed and epoch from then on."""
    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(count))
        if epoch:
            random.Random(f"{seed}-{epoch}").shuffle(order)
        steps += [order[i : i + batch] for i in range(0, count, batch)]
    return steps[: max(1, round(epochs * math.ceil(count / batch)))]


def rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of a step, from 0: it rises in a line over the warm-up and falls in a line to 0 after the last step."""
    warmup = math.ceil(warmup_ratio * steps)
    return peak * (step + 1) / warmup if step < warmup else peak * (steps - step) / max(1, steps - warmup)


def data_of(library: Any, examples: Sequence[Example]) -> list[Any]:
    """Return a batch as the SDK takes it: each position predicts the next token, and weights make the loss a mean over the assistant's tokens."""
    total = sum(sum(example.mask[1:]) for example in examples)
    return [
        library.Datum(
            model_input=library.ModelInput.from_ints(list(example.ids[:-1])),
            loss_fn_inputs={"target_tokens": list(example.ids[1:]), "weights": [float(kept) / total for kept in example.mask[1:]]},
        )
        for example in examples
    ]


def train(job: Job, key: Key, progress: Progress, tell: Callable[[Progress], None], make_encoder: Callable[[Any], Encode] = encoder) -> Progress:
    """Train a model at the service, from a checkpoint if there is one, and return the end; ``tell`` hears of every step.

    The SDK itself waits out rate limits, server errors and a lost network: some minutes for a request to be taken, without limit for its result.

    Raises:
        ExperimentError: when the data cannot be used.
        TinkerError: or one of Python's own, when the service refuses or stays away.
    """
    library: Any = require("tinker", "tinker")
    request, wanted = job.request, job.request.hyperparameters
    service = library.ServiceClient(base_url=job.options.base_url, api_key=key.reveal(), user_metadata={"steered_lm": job.asked})
    ending = "errored"
    try:
        model, progress = _model(library, service, job, progress)
        examples = read_examples(job, make_encoder(_tokenizer(job, model)))
        batches = schedule(len(examples), wanted.batch_size * wanted.gradient_accumulation, wanted.epochs, request.seed)
        began = time.monotonic() - progress.seconds
        progress = progress.model_copy(update={"status": "running", "steps": len(batches)})
        tell(progress)
        for step in range(progress.step, len(batches)):
            batch = [examples[i] for i in batches[step]]
            peak = wanted.learning_rate or LEARNING_RATE
            optimizer = library.AdamParams(learning_rate=rate(step, len(batches), peak, wanted.warmup_ratio), weight_decay=wanted.weight_decay)
            gradients, update = model.forward_backward(data_of(library, batch), "cross_entropy"), model.optim_step(optimizer)
            metrics = gradients.result().metrics
            update.result()
            done = {"step": step + 1, "loss": metrics.get("loss:sum"), "tokens": progress.tokens + sum(len(example.ids) for example in batch)}
            progress = progress.model_copy(update={**done, "seconds": time.monotonic() - began})
            if (step + 1) % wanted.save_steps == 0 or step + 1 == len(batches):
                path = model.save_state(f"step-{step + 1:06d}", ttl_seconds=_KEPT, overwrite=True).result().path
                progress = progress.model_copy(update={"state": path, "saved": progress.model_copy(update={"state": None, "saved": None})})
            tell(progress)
        finished = model.save_weights_for_sampler(request.suffix or "final").result().path
        progress = progress.model_copy(update={"status": "succeeded", "model": finished, "seconds": time.monotonic() - began})
        tell(progress)
        ending = "success"
        return progress
    except CancelledError:
        ending = "interrupted"
        raise
    finally:
        _close(library, service, ending)


def _model(library: Any, service: Any, job: Job, progress: Progress) -> tuple[Any, Progress]:
    """Return a model to train, and how far it is: at the checkpoint, or at the start where there is none or the service has it no more."""
    if progress.state is not None:
        try:
            return service.create_training_client_from_state_with_optimizer(progress.state).result(), progress
        except (library.RequestFailedError, library.NotFoundError) as problem:
            _log.warning("the checkpoint %s cannot be loaded, training starts anew: %s", progress.state, problem)
    rank, seed = job.request.hyperparameters.lora_rank, job.request.seed
    return service.create_lora_training_client(base_model=job.request.base_model, rank=rank, seed=seed).result(), Progress()


def _close(library: Any, service: Any, ending: str) -> None:
    """Tell the service that the session is over; it finds out by itself if that fails."""
    try:
        service.close(ending).result(timeout=5)
    except (TimeoutError, library.TinkerError) as problem:
        _log.warning("the session was not closed: %s", problem)


def _tokenizer(job: Job, model: Any) -> Any:
    if job.options.tokenizer is None:
        return model.get_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.options.tokenizer)


class _Formatter(logging.Formatter):
    """Keeps the key out of the log."""

    def __init__(self, key: Key) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._key = key

    def format(self, record: logging.LogRecord) -> str:
        return self._key.redacted(super().format(record))


def _stop(*_: Any) -> NoReturn:
    raise CancelledError


def main(folder: Path) -> None:
    """Train what the folder asks for; the end, good or bad, is written there."""
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("TINKER_TELEMETRY", "0")  # the SDK would report errors, and what led to them, to its makers
    job = Job.parse(json.loads((folder / JOB).read_text(encoding="utf-8")), source=JOB, error=ExperimentError)
    key = job.options.key(TinkerBackend.name)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(key))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    library: Any = require("tinker", "tinker")
    status, why = "failed", ""
    try:
        train(job, key, read_progress(folder), lambda progress: write_progress(folder, progress))
        return
    except CancelledError:
        status, why = "cancelled", "the job was cancelled"
    # the SDK has its own errors for some of what may happen, and Python's for the rest
    except (library.TinkerError, ValueError, RuntimeError, OSError) as problem:
        _log.exception("training has failed")
        why = key.redacted(f"{type(problem).__name__}: {problem}")
    progress = read_progress(folder)
    go_on = f" Train again to go on from step {progress.saved.step}." if progress.saved else ""
    write_progress(folder, progress.model_copy(update={"status": status, "error": f"{why.rstrip('.')}.{go_on}"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
