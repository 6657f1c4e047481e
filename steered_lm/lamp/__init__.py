"""LaMP: its files, retrieval from profiles, prompts and metrics, as its authors define them. Knows no model and no harness.

Salemi et al., "LaMP: When Large Language Models Meet Personalization", ACL 2024.
"""

from steered_lm.lamp.items import LampItem, LampOptions, make_items
from steered_lm.lamp.metrics import evaluate
from steered_lm.lamp.persona import persona_from_profile
from steered_lm.lamp.rows import Row, read_rows
from steered_lm.lamp.task import TASKS, LampTask, task_named

__all__ = ["TASKS", "LampItem", "LampOptions", "LampTask", "Row", "evaluate", "make_items", "persona_from_profile", "read_rows", "task_named"]
