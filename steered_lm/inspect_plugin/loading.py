"""What the provider takes as ``-M`` arguments, and the model and tokenizer that they name."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_lm.chat import PromptFormat
from steered_lm.config import Config
from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.engine.gemm import Gemm
from steered_lm.errors import ModelError, require
from steered_lm.steering.spec import INLINE_KEYS, SteeringSpec, spec_from_args

logger = logging.getLogger(__name__)

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ProviderOptions(Config):
    """What ``-M name=value`` takes.

    Attributes:
        steering: a spec file; or the inline form ``vectors``, ``layer`` (or ``layers``), ``weights``, ``alpha``, ``unit``,
            ``positions``, ``operation``. Neither is the unsteered model.
        device: ``cpu``, ``cuda:0``, …, or ``auto`` to spread a large model; by default an accelerator if there is one.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: a hub id or folder when it is not the model's.
        chat_template: a Jinja template, or a file that holds one, in place of the tokenizer's.
        prompt_format: ``chat``, or ``plain`` (``User:`` / ``Assistant:`` lines) for base models.
        blocks: dotted path of the decoder blocks when they are not found by structure.
        allow_foreign_vectors: take vectors that were built for another checkpoint of the same shape.
        batch_size: most rows in a step; ``auto`` is as many as the memory budget allows.
        memory_budget: what the cache and everything else that grows with the batch may take: a number of GiB, or text with a unit, such as
            ``500MiB``; by default a share of what is free.
        gemm: library of float32 linear layers on the CPU: ``auto``, ``torch`` or ``onednn``.
        exact: the reference path: each reply by itself through the model's own ``generate``, with torch's own linear layers and no heed to
            ``memory_budget``.
        peft: a LoRA adapter's folder or hub id.
        revision, trust_remote_code: as for ``from_pretrained``.
    """

    steering: str | None = None
    vectors: str | None = None
    layer: int | None = None
    layers: int | str | list[int] | None = None
    weights: str | list[str] | dict[str, float] | None = None
    alpha: float | None = None
    unit: str | None = None
    positions: str | None = None
    operation: str | None = None
    device: str | None = None
    dtype: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    prompt_format: PromptFormat = "chat"
    blocks: str | None = None
    allow_foreign_vectors: bool = False
    batch_size: int | str = "auto"
    memory_budget: int | float | str | None = None
    gemm: Gemm = "auto"
    exact: bool = False
    peft: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def spec(self) -> SteeringSpec | None:
        """Return the steering that is asked for; None is the unsteered model.

        Raises:
            SpecError: when it is malformed, or a file and the inline form are mixed.
        """
        inline = {key: getattr(self, key) for key in INLINE_KEYS}
        if isinstance(self.weights, list):  # -M splits at commas
            inline["weights"] = ";".join(self.weights)
        return spec_from_args(self.steering, inline)

    def max_rows(self) -> int | None:
        """Return ``batch_size`` as a number; None is as many as the memory budget allows.

        Raises:
            ModelError: when it is neither ``auto`` nor a number from 1 up.
        """
        text = str(self.batch_size)
        if text == "auto":
            return None
        if not text.isdecimal() or int(text) < 1:
            raise ModelError(f"batch_size={self.batch_size!r} is not a number of rows. Allowed: 1 or more, or auto.")
        return int(text)


def load_tokenizer(name: str, options: ProviderOptions) -> Any:
    """Return a model's tokenizer, with the chat template that the options ask for.

    Raises:
        ModelError: when it cannot be loaded, or ``chat_template`` is neither a template nor a file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), revision=options.revision, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer can be loaded for {name!r}: {error} Allowed: a hub id, a folder, or {TINY_CHAT}; or set tokenizer=…."
        ) from error
    if options.chat_template is not None:
        is_text = "{" in options.chat_template
        file = Path(options.chat_template if not is_text else "").expanduser()
        if not is_text and not file.is_file():
            raise ModelError(f"chat_template={options.chat_template!r} is neither a Jinja template nor a file. Check the path.")
        tokenizer.chat_template = options.chat_template if is_text else file.read_text("utf-8")
    return tokenizer


def load_model(name: str, options: ProviderOptions) -> Any:
    """Return a causal model on its device, in evaluation mode.

    Raises:
        ModelError: when it cannot be loaded.
    """
    if options.dtype not in _DTYPES:
        raise ModelError(f"dtype={options.dtype!r} is not known. Allowed: {', '.join(_DTYPES)}.")
    logger.info("loading %s", name)
    spread: dict[str, Any] = {"device_map": "auto"} if options.device == "auto" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name), dtype=_DTYPES[options.dtype], revision=options.revision, trust_remote_code=options.trust_remote_code, **spread
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r} cannot be loaded: {error} Allowed: steered-hf/<hub id>, steered-hf/<folder>, or steered-hf/{TINY_CHAT}."
        ) from error
    if options.peft is not None:
        try:
            model = require("peft", "peft").PeftModel.from_pretrained(model, options.peft)
        except (OSError, ValueError) as error:
            raise ModelError(f"peft={options.peft!r} cannot be loaded: {error} Allowed: a LoRA adapter's folder or hub id.") from error
    placed: Any = model if spread else model.to(options.device or _best_device())  # type: ignore[arg-type]
    return placed.eval()


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
