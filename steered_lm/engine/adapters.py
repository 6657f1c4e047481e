"""Rows with LoRA adapters of their own: the base model's matrix products are everybody's, the low-rank ones each adapter's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steered_lm.errors import ModelError, near_misses

# PEFT's own name for the model without an adapter.
BASE = "__base__"


class Group(NamedTuple):
    """The entries of a pass that have one adapter; None is all of them."""

    adapter: str
    entries: Int[Tensor, " chosen"] | None = None


def by_adapter(names: Sequence[str], device: torch.device) -> list[Group]:
    """Return which entries have which adapter, without those that have none."""
    found = sorted(set(names))
    if len(found) == 1:
        return [Group(name) for name in found if name != BASE]
    return [Group(name, torch.tensor([i for i, own in enumerate(names) if own == name], device=device)) for name in found if name != BASE]


class Adapters:
    """The LoRA adapters that are loaded into a model, and which entry of a pass has which.

    Attributes:
        passing: the groups of the next passes, by the number of entries that a layer is given: below the fork of a pass it has one per distinct
            sequence, above it one per row.
        only: the adapter of all entries of the next passes, however many there are; None when ``passing`` says.
    """

    def __init__(self, model: nn.Module, asked: str) -> None:
        """Look for a model's adapters.

        Args:
            model: where PEFT put its layers.
            asked: the adapter of some row, for what errors say.

        Raises:
            ModelError: when there are none, or when they are not plain LoRA on linear layers.
        """
        self._layers = _plain_lora(model, asked)
        self.names = sorted({name for layer in self._layers for name in layer.lora_A})
        self.passing: dict[int, list[Group]] = {}
        self.only: str | None = None

    def resolve(self, name: str | None) -> str:
        """Return the adapter that a row means: None is the active one.

        Raises:
            ModelError: for an adapter that is not loaded, or None when several are active at once.
        """
        if name is None:
            active = sorted({name for layer in self._layers if not layer.disable_adapters for name in layer.active_adapters})
            if len(active) > 1:
                raise ModelError(
                    f"a row with adapter=None is the model as it stands, where {' and '.join(map(repr, active))} act together; beside rows with "
                    f"adapters of their own there can be one. Name it, or {BASE!r} for the model without."
                )
            return active[0] if active else BASE
        if name not in (*self.names, BASE):
            raise ModelError(f"adapter={name!r} is not loaded into the model. {near_misses(name, [*self.names, BASE])}")
        return name

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the layers go by ``passing`` and ``only`` inside the ``with`` block, in place of what is active."""
        before = [vars(layer).get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                vars(layer)["forward"] = _Product(layer, self)
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:
                    vars(layer)["forward"] = forward

    def groups(self, entries: int) -> list[Group]:
        """Return the groups of a layer's input.

        Raises:
            ValueError: when the layer is given another number of entries than there are rows, so that it cannot be told whose they are.
        """
        if self.only is not None:
            return [] if self.only == BASE else [Group(self.only)]
        if entries not in self.passing:
            raise ValueError(f"a layer is given {entries} entries, and rows are {' or '.join(map(str, self.passing))}")
        return self.passing[entries]


class _Product:
    """One layer's forward method, with the roundings of PEFT's own."""

    def __init__(self, layer: Any, adapters: Adapters) -> None:
        self._layer, self._adapters = layer, adapters

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer
        product: Tensor = layer.base_layer(input, *args, **kwargs)
        for name, entries in self._adapters.groups(len(input)):
            # an adapter may leave some layers out
            if name not in layer.lora_A:
                continue
            down, up = layer.lora_A[name], layer.lora_B[name]
            if entries is not None:
                entries = entries.to(input.device)
            part = input if entries is None else input.index_select(0, entries)
            added = up(down(part.to(down.weight.dtype)))
            if entries is None:
                product = (product + added * layer.scaling[name]).to(product.dtype)
            elif added.dtype == product.dtype:
                product.index_add_(0, entries, added, alpha=layer.scaling[name])
            else:
                product[entries] = (product[entries] + added * layer.scaling[name]).to(product.dtype)
        return product


def _plain_lora(model: nn.Module, asked: str) -> list[Any]:
    try:
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        layers: dict[str, Any] = {}
    else:
        layers = {path: m for path, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    if not layers:
        raise ModelError(
            f"adapter={asked!r}, but {type(model).__name__} holds no LoRA layers. Load the adapters with PEFT: "
            "PeftModel.from_pretrained(model, folder, adapter_name=name), then load_adapter(folder, name) for each further one."
        )
    for path, layer in layers.items():
        obstacle = None
        if type(layer) is not Linear:
            obstacle = f"is a {type(layer).__module__}.{type(layer).__name__}"
        elif layer.merged:
            obstacle = "has an adapter merged into it (unmerge_adapter() takes it out)"
        elif getattr(layer, "lora_variant", None) or any(layer.use_dora.values()):
            obstacle = "is of another kind, such as DoRA"
        if obstacle is not None:
            raise ModelError(
                f"adapter={asked!r}: adapters of a row's own are plain LoRA on linear layers, and {path} {obstacle}. "
                "Leave adapter out, make one adapter active with set_adapter(name), and run once per adapter."
            )
    return list(layers.values())
