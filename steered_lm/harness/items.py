"""What every candidate scores on every item of a task, from one ``evaluate`` call for all of them."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from pydantic import Field

from steered_lm.config import Config, content_hash
from steered_lm.errors import NaNError
from steered_lm.harness.chat_task import ChatTask, load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import check_lm, evaluate_candidates, seeded
from steered_lm.harness.upstream_task import UpstreamTask
from steered_lm.search.protocol import Candidate

logger = logging.getLogger(__name__)
BROKEN = "the steered model's scores are NaN"
"""Why every item of a candidate is missing when its steering drives the activations out of range."""
EVERY = "every metric"
"""Under which :class:`ItemResult` keeps reasons that concern all of an item's metrics."""


class ItemResult(Config):
    """What one candidate scored on one item.

    Attributes:
        item: the item's name, the same for every candidate.
        group: its subject, empty without one.
        metrics: what the task's own metrics say of it; a metric without a value is left out.
        prompt: generative tasks: what was asked.
        responses: generative tasks: what was answered.
        missing: why verdicts are missing: by the metric that lacks them (``EVERY``: by all of them), one entry for each that is.
    """

    item: str
    group: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    prompt: str = ""
    responses: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    def missing_of(self, metric: str) -> tuple[str, ...]:
        """Return why verdicts that a metric rests on are missing, one entry for each that is."""
        return (*self.missing.get(metric, ()), *self.missing.get(EVERY, ()))


def load_task(name: str, metadata: Mapping[str, Any], *, num_fewshot: int | None = None) -> ChatTask:
    """Return a task of ours, with its own number of examples where ``num_fewshot`` is None or it takes none.

    Raises:
        UserError: when an option or the data cannot be used.
    """
    (task,) = load_tasks([name], metadata)
    if num_fewshot is not None and isinstance(task, UpstreamTask):
        task.check_shots(num_fewshot)
        task.set_config("num_fewshot", num_fewshot)
    return task


def takes_examples(task: ChatTask) -> bool:
    """Return whether examples can stand before a task's questions: in upstream's tasks alone."""
    return isinstance(task, UpstreamTask)


def task_digest(task: ChatTask, *, limit: int | None = None) -> str:
    """Return a hash of all that decides a task's results but for model and steering: items, prompts, examples, settings, judges."""
    docs = list(task.eval_docs)[:limit]
    shots = task.config.num_fewshot or 0
    config = {key: value for key, value in task.dump_config().items() if key not in ("dataset_kwargs", "metadata")}
    metadata = {key: value for key, value in task.config.metadata.items() if key not in _PLACES}
    contexts = [task.fewshot_context(doc) for doc in docs] if shots else []
    return content_hash({"docs": docs, "contexts": contexts, "config": _plain(config), "metadata": _plain(metadata)})


# where something lies, which changes nothing about it
_PLACES = ("config_source", "data", "cache")


def _plain(value: Any) -> Any:
    """Return JSON-like values as they are, functions by name and everything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def evaluate_items(
    lm: SteeredHFLM, task: ChatTask, candidates: Sequence[Candidate], *, limit: int | None = None, seed: int = 0
) -> dict[str, list[ItemResult]]:
    """Return every candidate's results on every item of a task, in the task's order.

    All candidates run together. Should the steering of one of them give NaN, they run one by one, and all items of that one are missing.

    Args:
        lm: the model.
        task: a task of ours.
        candidates: distinct names; a spec None is the unsteered model.
        limit: only the first items.
        seed: of sampled responses.

    Raises:
        ModelError: when ``lm`` is no ``steered-hf`` model, or gives NaN without steering.
        JudgeError: when too many verdicts are missing.
    """
    check_lm(lm)
    try:
        return _evaluated(lm, task, candidates, limit, seed)
    except NaNError as problem:
        if len(candidates) == 1 and candidates[0].spec is None:
            raise
        logger.warning("%s: %s", task.task_name, problem)
    found: dict[str, list[ItemResult]] = {}
    for candidate in candidates:
        try:
            found |= _evaluated(lm, task, [candidate], limit, seed)
        except NaNError:
            if candidate.spec is None:
                raise
            found[candidate.name] = [_named(task, doc).model_copy(update={"missing": {EVERY: (BROKEN,)}}) for doc in list(task.eval_docs)[:limit]]
    return found


def _evaluated(lm: SteeredHFLM, task: ChatTask, candidates: Sequence[Candidate], limit: int | None, seed: int) -> dict[str, list[ItemResult]]:
    with seeded(lm, seed):
        evaluate_candidates(lm, [task], candidates, limit=limit)
    found: dict[str, list[ItemResult]] = {candidate.name: [] for candidate in candidates}
    documents: dict[Any, list[Instance]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    for instances in documents.values():
        size = len(instances) // len(candidates)
        for index, candidate in enumerate(candidates):
            found[candidate.name].append(_result(task, instances[index * size : (index + 1) * size]))
    return found


def _result(task: ChatTask, instances: Sequence[Instance]) -> ItemResult:
    doc = instances[0].doc
    results = [_filtered(instance) for instance in instances]
    given = task.item_metrics(doc, results)
    metrics = {name: float(value) for name, value in given.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    missing = {metric: tuple(reasons) for metric, reasons in task.missing_reasons(results).items() if reasons}
    update: dict[str, Any] = {"metrics": metrics, "missing": missing}
    if task.OUTPUT_TYPE == "generate_until":
        texts = tuple(str(text).strip() for text in instances[0].resps[: task.config.repeats])
        update |= {"prompt": str(task.doc_to_text(doc)), "responses": texts}
    return _named(task, doc).model_copy(update=update)


def _named(task: ChatTask, doc: Mapping[str, Any]) -> ItemResult:
    return ItemResult(item=str(doc["id"]), group=str(doc.get("subject") or ""))


def _filtered(instance: Instance) -> Any:
    (found,) = instance.filtered_resps.values()
    return found
