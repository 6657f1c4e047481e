"""Whole populations for little more than one candidate: generation and scoring with a steering of its own for every row."""

from steered_lm.engine.engine import Engine
from steered_lm.engine.rows import Generated, GenerationRow, Sampling, Scored, ScoreRequest

__all__ = ["Engine", "Generated", "GenerationRow", "Sampling", "ScoreRequest", "Scored"]
