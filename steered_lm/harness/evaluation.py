"""A model's trait scores question by question, by lm-eval in this process."""

from typing import Any

import torch
from lm_eval.evaluator import evaluate

from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import seeded
from steered_lm.harness.quiet import quiet, quiet_loading
from steered_lm.harness.trait_task import OWN, TraitTask
from steered_lm.judges.items import JudgedItem
from steered_lm.judges.trait_run import TraitRun


def trait_task(run: TraitRun, judge_options: dict[str, Any]) -> TraitTask:
    """Return the task of a trait, with its judges.

    Raises:
        TraitError, JudgeError: when trait or judges cannot be had.
    """
    options = {f"judge_{name}": value for name, value in judge_options.items()}
    (task,) = load_tasks([OWN], run.model_dump(exclude_none=True) | options)
    assert isinstance(task, TraitTask)
    return task


def load_model(pretrained: str, peft: str | None = None, device: str | None = None) -> SteeredHFLM:
    """Return a model, with its adapter, as ``steered-hf`` runs it."""
    adapter: dict[str, Any] = {} if peft is None else {"peft": peft}
    with quiet_loading():
        return SteeredHFLM(pretrained, device=device, batch_size="auto", **adapter)


def judged_items(lm: SteeredHFLM, task: TraitTask, *, limit: int | None = None, seed: int = 0) -> list[JudgedItem]:
    """Return the task's questions with their scores, in order.

    Args:
        lm: the model.
        task: whose judges judge.
        limit: most questions; None takes all.
        seed: of responses that are sampled.

    Raises:
        JudgeError: when more verdicts are missing than the task allows.
    """
    with torch.no_grad(), seeded(lm, seed), quiet(lm):
        evaluate(lm, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, log_samples=False)
    pairs = zip(task.instances, task.judged, strict=True)
    return [JudgedItem.of(instance.doc["id"], [one.record() for one in own], [one.request.response for one in own]) for instance, own in pairs]
