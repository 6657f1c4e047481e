"""Personas: folders of conversations, read, checked, split by content hash, and built into profiles and judge prompts."""

from steered_lm.persona.build import build_persona
from steered_lm.persona.legacy import load_legacy
from steered_lm.persona.load import list_personas, load_persona
from steered_lm.persona.schema import Conversation, Item, Persona, Turn
from steered_lm.persona.split import SPLITS, Split

__all__ = ["SPLITS", "Conversation", "Item", "Persona", "Split", "Turn", "build_persona", "list_personas", "load_legacy", "load_persona"]
