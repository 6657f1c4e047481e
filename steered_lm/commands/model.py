"""What commands that run a model have in common: which one, where, and how prompts are rendered."""

from enum import StrEnum
from typing import Annotated

import typer

from steered_lm.study import ModelConfig

ModelName = Annotated[str, typer.Option("--model", help="Hub id, folder, or steered-lm/tiny-chat (the tiny model that ships with the package).")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:0, mps or cpu; by default what is there.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[str, typer.Option(help="Most rows at once; auto is as many as memory allows.")]
PlainFormat = Annotated[bool, typer.Option("--plain", help="Render prompts as User:/Assistant: lines, for base models.")]


class PromptFormatName(StrEnum):
    """How prompts are rendered."""

    chat = "chat"
    plain = "plain"


PromptFormatOption = Annotated[
    PromptFormatName, typer.Option(help="chat: the model's chat template; plain: User:/Assistant: lines, for base models.")
]


def model_config(model: str, device: str | None, dtype: str, batch_size: str, prompt_format: PromptFormatName) -> ModelConfig:
    """Return the model that the options describe."""
    rows = int(batch_size) if batch_size.isdigit() else batch_size
    settings = {"model": model, "device": device, "dtype": dtype, "batch_size": rows, "prompt_format": prompt_format.value}
    return ModelConfig.parse(settings, source="--model, --device, --dtype or --batch-size")
