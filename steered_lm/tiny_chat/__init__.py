"""The tiny chat model that ships with the package: its language, its facts, its training script and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""The shipped Hugging Face folder; `AutoModelForCausalLM.from_pretrained(WEIGHTS)` loads it."""

__all__ = ["WEIGHTS"]
