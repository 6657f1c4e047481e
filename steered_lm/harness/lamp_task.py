"""``lamp_1`` to ``lamp_7``: LaMP's questions with what was retrieved from their authors' profiles, one greedy answer each."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from steered_lm.harness.chat_task import ChatTask
from steered_lm.judges import check_missing, judge_options, make_judge
from steered_lm.judges.base import Judge, Verdict
from steered_lm.lamp.author import author_question, author_request, refuse_stylometric
from steered_lm.lamp.items import make_items, parse_options
from steered_lm.lamp.metrics import score_answer
from steered_lm.lamp.task import task_named

logger = logging.getLogger(__name__)

JUDGED = "LaMP_7"
"""The task whose answers a judge can hold against their authors: they are texts in the author's manner."""


class LampTask(ChatTask):
    """The task behind ``tasks/lamp/lamp_*.yaml``; ``--metadata`` takes :class:`~steered_lm.lamp.items.LampOptions`.

    ``lamp_7`` also takes ``judge``, ``cache``, ``missing_limit`` and ``judge_<option>``; from Python, ``judge`` may be a :class:`Judge` itself.

    Attributes:
        judge: who says how well answers fit their authors; None: nobody is asked.
        verdicts: one an answer of the last evaluation, in the order of ``instances``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the options, so that whatever is wrong with them shows before the model runs.

        Raises:
            UserError: when an option or the data cannot be used.
            JudgeError: when the judge cannot be built.
        """
        metadata = dict(config["metadata"])
        self.lamp = task_named(str(config["task"]))
        self.options = parse_options(metadata, source=f"--metadata of {config['task']}")
        self.judge = _make_judge(metadata) if self.lamp.name == JUDGED and metadata.get("judge") is not None else None
        self.verdicts: list[Verdict] = []
        facts: dict[str, Any] = self.options.model_dump()
        if self.judge is not None:
            facts |= {"judge": self.judge.name, "judge_identity": self.judge.identity}
        generation = {**config["generation_kwargs"], "max_gen_toks": self.options.answer_length(self.lamp)}
        super().__init__({**config, "generation_kwargs": generation, "metadata": metadata | facts})

    def documents(self) -> list[dict[str, Any]]:
        """Return the rows of the split with their prompts."""
        return [item.document(self.lamp) for item in make_items(self.lamp, self.options)]

    def apply_filters(self) -> list[Instance] | None:
        """Judge the answers, if there is a judge, and put answer and verdict, as JSON, where lm-eval logs filtered responses.

        Raises:
            JudgeError: when more verdicts are missing than ``missing_limit`` allows.
        """
        if self.judge is None or self.only_predicting:
            filtered: list[Instance] | None = super().apply_filters()
            return filtered
        # Data-parallel runs pad the requests, so an instance can hold more responses than were asked for.
        answers = [str(instance.resps[0]).strip() for instance in self.instances]
        requests = [author_request(i.doc["input"], answer, i.doc["lines"]) for i, answer in zip(self.instances, answers, strict=True)]
        self.verdicts = list(self.judge.judge(requests))
        check_missing(self.verdicts, self.options.missing_limit)
        for instance, answer, verdict in zip(self.instances, answers, self.verdicts, strict=True):
            instance.filtered_resps["none"] = json.dumps({**verdict.model_dump(), "answer": answer}, ensure_ascii=False)
        return None

    def item_metrics(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the document's metrics; with a judge also ``missing`` and, if there is a score, ``persona_fit`` (NaN when all are missing)."""
        if self.judge is None:
            return lamp_metrics(doc, results)
        verdict = json.loads(results[0])
        metrics = {**lamp_metrics(doc, [verdict["answer"]]), "missing": float(verdict["score"] is None)}
        if verdict["score"] is not None:
            metrics["persona_fit"] = verdict["score"]
        elif all(other.score is None for other in self.verdicts):
            metrics["persona_fit"] = float("nan")
        return metrics

    def missing_reasons(self, results: Sequence[Any]) -> dict[str, list[str]]:
        """Return why the verdict is missing, if it is."""
        reason = None if self.judge is None else json.loads(results[0])["missing"]
        return {} if reason is None else {"persona_fit": [reason]}


def _make_judge(metadata: Mapping[str, Any]) -> Judge:
    judge = metadata["judge"]
    if isinstance(judge, Judge):
        return judge
    refuse_stylometric(str(judge))
    cache = metadata.get("cache")
    return make_judge(str(judge), author_question(), cache=None if cache is None else Path(cache), **judge_options(metadata))


def lamp_metrics(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return what one answer adds to each metric of its task."""
    return score_answer(task_named(doc["task"]), str(results[0]), str(doc["reference"]))
