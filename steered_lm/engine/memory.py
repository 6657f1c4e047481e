"""What a model's tensors take, what a device has to give, and how both are said: bytes."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from steered_lm.engine.forward import Forward
from steered_lm.errors import ModelError

# Shares of what is free that are taken without being asked: other programs, and the allocator's own waste, need the rest.
_CUDA_SHARE, _CPU_SHARE = 0.85, 0.5
# A matrix product rearranges about half of a weight first, and no more than this (measured with MKL).
_WORKSPACE = 2**24

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Footprint(NamedTuple):
    """What a model's tensors take, in bytes.

    Attributes:
        cache: keys and values of one token, over all blocks.
        activation: what a block holds at once for one token.
        scores: one token's scores over the vocabulary, with the copies that choosing makes.
        logits: the scores alone.
        normalising: copies of one token's scores that their normaliser takes.
        hidden: one token's hidden state.
        column: one token's keys and values in one block, repeated for the heads that share them; 0 when none do.
        pair: what attention takes for one token and one column that it may see.
        workspace: of the library of matrix products, which rearranges a weight.
        sdpa: whether attention is the fused kernel, which without a mask takes nothing for pairs.
    """

    cache: int
    activation: int
    scores: int
    logits: int
    normalising: int
    hidden: int
    column: int
    pair: int
    workspace: int = 0
    sdpa: bool = True

    @classmethod
    def of(cls, forward: Forward, cache_bytes: int, softmax_dtype: torch.dtype | None = None) -> "Footprint":
        """Estimate a model's footprint from its shapes; ``cache_bytes`` is measured in the trial of :mod:`steered_lm.engine.support`."""
        dtype, config = forward.model.dtype, forward.model.config.get_text_config()
        size, fine = dtype.itemsize, softmax_dtype or (dtype if dtype == torch.float64 else torch.float32)
        weights = [weight for block in forward.blocks for weight in block.parameters()]
        widest = max(max(weight.shape) for weight in weights)
        width = forward.model.get_input_embeddings().weight.shape[1]
        vocabulary = forward.head.weight.shape[0]
        sdpa = config._attn_implementation == "sdpa"
        return cls(
            cache=cache_bytes,
            activation=size * (3 * widest + 4 * width),
            scores=vocabulary * (size + 4),
            logits=vocabulary * size,
            # exponentials, and a copy where the dtype changes
            normalising=vocabulary * fine.itemsize * (1 if fine == dtype else 2),
            hidden=width * size,
            column=2 * width * size if cache_bytes < 2 * width * size * len(forward.blocks) else 0,
            # the fused kernel turns the mask into numbers; without it every head has scores, and their softmax in float32
            pair=size if sdpa else size + config.num_attention_heads * (2 * size if size >= 4 else size + 8),
            workspace=min(max(weight.nbytes for weight in (forward.head.weight, *weights)) // 2, _WORKSPACE),
            sdpa=sdpa,
        )


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory the engine may take when it is given no budget."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_CUDA_SHARE * (free + idle))
    return int(_CPU_SHARE * min(psutil.virtual_memory().available, _container_bytes()))


def _container_bytes() -> int:
    """Return what a container's limit leaves, or a number beyond any machine."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.is_file() and used.is_file()) or (text := limit.read_text().strip()) == "max":
        return 1 << 62
    return max(int(text) - int(used.read_text()), 0)


def mebibytes(size: float) -> str:
    """Return a size in words."""
    return f"{size / 2**20:,.0f} MiB"


def parse_size(size: str | float | None, argument: str = "memory_budget") -> int | None:
    """Return a size in bytes: a number means GiB, text has a unit, such as ``4GiB`` or ``500MB``; None stays None.

    Raises:
        ModelError: when it is neither, or not positive.
    """
    if size is None:
        return None
    parts = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    try:
        value = float(parts[1]) * _UNITS[parts[2] or "GiB"] if parts else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not 1 <= value < math.inf:
        raise ModelError(
            f"{argument}={size!r} is not a size. Allowed: a positive number of GiB, or one with a unit out of {', '.join(_UNITS)}: 4GiB."
        )
    return int(value)
