"""The model that training starts from: looked at without its weights, told from others, and loaded with a new adapter."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steered_lm.config import file_hash
from steered_lm.content import resolve_model
from steered_lm.errors import ModelError, near_misses, require
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters

if TYPE_CHECKING:
    import torch
    from torch import nn

_ALLOWED = "Allowed: a hub id, a folder with config.json, weights and tokenizer, or steered-lm/tiny-chat."
# beyond this, hashing a file takes longer than looking at samples of it
_WHOLE = 64 * 2**20
_SLICES, _SLICE = 256, 4096


def fingerprint(name: str) -> str:
    """Return what tells a base model from others without loading it: a hash of its files, or the hub's commit.

    Of a weights file above 64 MiB the size and 256 evenly spread slices are hashed: a fine-tune changes nearly every weight.

    Raises:
        ExperimentError: when there is no such model.
    """
    folder = Path(resolve_model(name)).expanduser()
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")):
            digest.update(f"{file.name} {_sampled_hash(file)}\n".encode())
        return digest.hexdigest()[:32]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # …/snapshots/<commit>/config.json
        return Path(hf_hub_download(name, "config.json")).parent.name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _unloadable(name, error) from error


def _sampled_hash(file: Path) -> str:
    size = file.stat().st_size
    if size <= _WHOLE:
        return file_hash(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for part in range(_SLICES):
            handle.seek(part * (size - _SLICE) // (_SLICES - 1))
            digest.update(handle.read(_SLICE))
    return digest.hexdigest()


def load_tokenizer(name: str) -> Any:
    """Return the base model's tokenizer.

    Raises:
        ExperimentError: when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def check_base(name: str) -> Any:
    """Return the config of a base model that can be trained.

    Raises:
        ExperimentError: when it is missing, is no decoder-only language model, or is quantised.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    place = Path(resolve_model(name)).expanduser()
    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    known = {one for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for one in ([names] if isinstance(names, str) else names)}
    named = getattr(config, "architectures", None) or []
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not causal or (named and not known.intersection(named)):
        raise ExperimentError(
            f"base_model={name!r} is a {', '.join(named) or type(config).__name__}, and only decoder-only (causal) language models are trained. "
            "Name one, such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown") if isinstance(config.quantization_config, dict) else "unknown"
        raise ExperimentError(
            f"base_model={name!r} holds quantised weights ({method}), which are not trained. Name the checkpoint that it was made from; "
            "dtype=bfloat16 halves its memory."
        )
    if place.is_dir() and not any(place.glob("*.safetensors")) and not any(place.glob("pytorch_model*.bin")):
        raise ExperimentError(f"base_model={name!r} has a config.json and no weights. {_ALLOWED}")
    return config


def _unloadable(name: str, error: Exception) -> ExperimentError:
    said = str(error).strip() or type(error).__name__
    return ExperimentError(f"base_model={name!r} cannot be loaded: {said.splitlines()[0]:.200} {_ALLOWED}")


def skeleton(config: Any) -> "nn.Module":
    """Return the model of a config without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def target_pattern(model: "nn.Module", wanted: Sequence[str] | None) -> str:
    """Return the regular expression of the modules that get an adapter; by default all linear layers of the decoder blocks.

    Args:
        model: the base model, with or without weights.
        wanted: last parts of module paths, such as ``q_proj`` or ``mlp.down_proj``.

    Raises:
        ExperimentError: when a name fits no linear layer, or the decoder blocks are not found.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from steered_lm.steering.blocks import find_blocks

    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if wanted is not None:
        leaves = sorted({path.rpartition(".")[-1] for path in linear})
        for name in wanted:
            if not any(path == name or path.endswith(f".{name}") for path in linear):
                raise ExperimentError(f"target_modules name {name!r}, which is no linear layer of the model. {near_misses(name, leaves)}")
        return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, wanted))})"
    try:
        blocks = find_blocks(model)
    except ModelError as error:
        raise ExperimentError(f"{error} Or name target_modules.") from error
    owner = next(path for path, module in model.named_modules() if module is blocks)
    leaves = sorted({path.rpartition(".")[-1] for path in linear if path.startswith(f"{owner}.")})
    if not leaves:
        raise ExperimentError(
            f"{type(model).__name__} has no linear layers in its decoder blocks, so LoRA has nothing to adapt. Choose another model."
        )
    return rf"{re.escape(owner)}\.\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, leaves))})"


def settle_device(name: str | None) -> "torch.device":
    """Return where to train: ``name``, or a GPU where there is one, else the CPU.

    Raises:
        ExperimentError: when the device is not there.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ExperimentError(f"device={name!r} is no device. Allowed: cuda, cuda:0, mps or cpu.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ExperimentError(f"device={name!r} is not available here. Allowed: {', '.join(kind for kind, ok in there.items() if ok)}.")
    return device


def settle_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Return the base weights' precision: ``auto`` is bfloat16 on a GPU that has it, else float32. Adapters are float32 always.

    Raises:
        ExperimentError: when the device does not have it.
    """
    import torch

    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if native else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not native:
        raise ExperimentError(f"dtype='bfloat16' is not what {device} computes in. Allowed here: auto, float32, float16.")
    if name == "float16" and device.type != "cuda":
        raise ExperimentError(f"dtype='float16' trains on a CUDA device alone, and device is {device}. Allowed here: auto, float32, bfloat16.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_adapted(name: str, hyperparameters: Hyperparameters, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Return the base model with a new LoRA adapter, drawn from torch's generator; only the adapter learns.

    Raises:
        ExperimentError: when the base model cannot be loaded, or a target module is not in it.
        MissingDependencyError: when PEFT is not installed.
    """
    from transformers import AutoModelForCausalLM

    try:
        base: nn.Module = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    return adapted(base.to(device), name, hyperparameters)


def adapted(base: "nn.Module", name: str, hyperparameters: Hyperparameters) -> Any:
    """Return a loaded base model that goes by ``name`` with a new LoRA adapter."""
    from transformers.pytorch_utils import Conv1D

    peft: Any = require("peft", "peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=hyperparameters.lora_rank,
        lora_alpha=adapter_alpha(hyperparameters),
        use_rslora=hyperparameters.rslora,
        lora_dropout=hyperparameters.lora_dropout,
        target_modules=target_pattern(base, hyperparameters.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with warnings.catch_warnings():
        # PEFT's own use of transformers
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model = peft.get_peft_model(base, settings)
    # the name that the weights go by, in place of where they came from
    model.peft_config["default"].base_model_name_or_path = name
    return model


def adapter_alpha(hyperparameters: Hyperparameters) -> float:
    """Return LoRA's alpha: as set, else the rank with rsLoRA and twice the rank without."""
    if hyperparameters.lora_alpha is not None:
        return hyperparameters.lora_alpha
    return hyperparameters.lora_rank * (1 if hyperparameters.rslora else 2)


def save_adapter(model: Any, folder: Path) -> str:
    """Write an adapter as PEFT loads it, safetensors and JSON alone, and return the SHA-256 of its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(tensors.items())}, weights, metadata={"format": "pt"})
    settings = copy(model.peft_config["default"])
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    return file_hash(weights)
