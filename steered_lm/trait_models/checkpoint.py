"""Checkpoints of a training run: one safetensors file each, tensors and a JSON header, renamed into place when complete."""

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)
_KEY = "steered_lm"


class Checkpoint(NamedTuple):
    """What training goes on from.

    Attributes:
        tensors: adapter weights as ``adapter/<name>``, AdamW's state as ``optimizer/<name>/<key>``.
        facts: everything else, JSON-like: the step, the losses so far.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> Checkpoint:
    """Return where training stands."""
    tensors = {}
    for name, weight in trainable(model).items():
        tensors[f"adapter/{name}"] = weight.detach()
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[weight].items()}
    return Checkpoint({name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}, facts)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, found: Checkpoint) -> None:
    """Put model and optimiser back to where they stood, to the bit."""
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for number, (name, weight) in enumerate(trainable(model).items()):
            weight.copy_(found.tensors[f"adapter/{name}"])
            prefix = f"optimizer/{name}/"
            state[number] = {key.removeprefix(prefix): tensor for key, tensor in found.tensors.items() if key.startswith(prefix)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name, in the order that the optimiser has them."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save(found: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint in one piece and remove older ones."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{found.facts['step']:06d}.safetensors"
    temporary = folder / f".{path.name}"
    save_file(found.tensors, temporary, metadata={_KEY: json.dumps(found.facts)})
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    for older in _files(folder)[1:]:
        older.unlink()
    return path


def latest(folder: Path, job: str) -> Checkpoint | None:
    """Return a job's last complete checkpoint; damaged ones and those of another job are passed over."""
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as handle:
                facts: dict[str, Any] = json.loads((handle.metadata() or {}).get(_KEY, "{}"))
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it is no mapping
        except SafetensorError as problem:
            logger.warning("checkpoint %s is damaged (%s); going back to the one before", path, problem)
            continue
        if facts.get("job") == job:
            return Checkpoint(tensors, facts)
    return None


def _files(folder: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)
