"""Linear layers by oneDNN on processors where MKL is slow."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Gemm = Literal["auto", "torch", "onednn"]


def prefers_onednn() -> bool:
    """Return whether oneDNN's float32 matrix product is the faster one here: MKL leaves out AVX-512 on processors that are not Intel's.

    It is decided by the processor's maker, not by a stopwatch, so that two runs on one machine use the same library.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and not _made_by_intel()


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (info.read_text(encoding="utf-8") if info.is_file() else platform.processor())


def uses_onednn(gemm: Gemm) -> bool:
    """Return whether ``gemm`` means oneDNN on this machine."""
    return gemm == "onednn" or (gemm == "auto" and prefers_onednn())


@contextmanager
def onednn_linear(model: nn.Module, gemm: Gemm) -> Iterator[None]:
    """Let the model's float32 linear layers on the CPU multiply by oneDNN inside the ``with`` block; weights stay as they are.

    Args:
        model: whose layers; only those that are plain ``nn.Linear`` are touched.
        gemm: ``torch`` leaves everything as it is, ``onednn`` swaps, ``auto`` swaps where :func:`prefers_onednn` says so.
    """
    swapped: list[nn.Linear] = []
    if uses_onednn(gemm):
        swapped = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and _plain(m.weight)]
    try:
        for module in swapped:
            vars(module)["forward"] = _Product(module)
        yield
    finally:
        for module in swapped:
            vars(module).pop("forward", None)


def _plain(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.layout == torch.strided


class _Product:
    """One layer's forward method."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def __call__(self, input: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._module.weight, self._module.bias, "none", [], "")
        return product
