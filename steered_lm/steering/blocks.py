"""Where a model's decoder blocks are: found by structure, so that new architectures need no table of names."""

from typing import Any

from torch import nn

from steered_lm.errors import ModelError


def find_blocks(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Return the decoder blocks in order, ``blocks[l]`` being the block whose output index ``l`` of a spec steers.

    The blocks are the ``nn.ModuleList`` that is as long as the config's ``num_hidden_layers`` and holds modules of the residual
    stream: of several candidates (a vision tower, a mixture's experts) the outermost with the most parameters wins.

    Args:
        model: a Hugging Face causal model, bare or wrapped by PEFT.
        path: dotted path of the list, such as ``model.layers``, when the structure misleads.

    Raises:
        ModelError: when there is no such list.
    """
    if path is not None:
        return _at(model, path)
    count = layer_count(model)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count}
    inner = {name for name in lists for other in lists if name.startswith(f"{other}.")}
    outer = {name: module for name, module in lists.items() if name not in inner}
    if not outer:
        raise ModelError(
            f"found no list of {count} decoder blocks in {type(model).__name__}. Name it yourself: blocks=<dotted path of the nn.ModuleList>, "
            f"one of {', '.join(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)) or 'none'}."
        )
    return max(outer.values(), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def parent_of(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Return the module that owns the block list: the decoder stack, which runs in every pass, under PEFT's ``generate`` too."""
    return next(module for module in model.modules() if any(child is blocks for child in module.children()))


def layer_count(model: nn.Module) -> int:
    """Return the number of decoder blocks from the model's config, looking into ``text_config`` of multimodal ones."""
    return _config_int(model, "num_hidden_layers")


def hidden_size(model: nn.Module) -> int:
    """Return ``d_model`` from the model's config, looking into ``text_config`` of multimodal ones."""
    return _config_int(model, "hidden_size")


def _config_int(model: nn.Module, name: str) -> int:
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; steering takes decoder-only (causal) models.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, name, None)
    if not isinstance(value, int):
        raise ModelError(f"the config of {type(model).__name__} has no {name}; steering takes Hugging Face causal models.")
    return value


def _at(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"blocks={path!r} is not a submodule of {type(model).__name__}: {error}. Give the dotted path of an nn.ModuleList."
        ) from None
    if not isinstance(found, nn.ModuleList):
        raise ModelError(f"blocks={path!r} is a {type(found).__name__}, not an nn.ModuleList of decoder blocks.")
    return found
