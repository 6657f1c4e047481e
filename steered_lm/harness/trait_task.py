"""``pv_<trait>``: responses to a trait's evaluation questions, judged for the trait and for coherence."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from steered_lm.harness.chat_task import ChatTask
from steered_lm.judges import check_missing, judge_options
from steered_lm.judges.base import FINDINGS, JudgeRequest
from steered_lm.judges.trait_run import OF_COHERENCE, JudgedResponse, TraitRun, question_values, response_values
from steered_lm.judges.traits import TraitError, judge_needed

logger = logging.getLogger(__name__)

OWN = "pv_trait"
"""The task whose trait ``--metadata`` names; every other one is named after its trait."""


class TraitTask(ChatTask):
    """The task behind the YAML files in ``tasks/persona_vectors/``; ``--metadata`` holds the fields of :class:`TraitRun` and ``judge_<option>``.

    Attributes:
        run: how the trait is measured.
        trait: the trait.
        judged: the responses of the last evaluation with their verdicts, by instance.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Load trait and judges, so that whatever is wrong with them shows before the model runs.

        Raises:
            TraitError: when the trait is unknown or malformed, or options do not fit each other.
            JudgeError: when the judge cannot be built.
        """
        name, metadata = str(config["task"]), dict(config["metadata"])
        given = {key: value for key, value in metadata.items() if key in TraitRun.model_fields and value is not None}
        if name != OWN:
            given["trait"] = name.removeprefix("pv_")
        elif "trait" not in given:
            raise TraitError(
                f'{OWN} needs a trait: --metadata \'{{"trait": "<file>.json"}}\', or a persona axis. The seven traits have tasks of their own.'
            )
        self.run = TraitRun.parse(given, source=f"--metadata of {name}", error=TraitError)
        self.trait = self.run.load()
        self.judges = self.run.judges(self.trait, judge_options(metadata))
        self.judged: list[list[JudgedResponse]] = []
        facts = {"trait_digest": self.trait.digest, "temperature": self.run.heat}
        if self.judges is not None:
            asked = {"judge_identity": self.judges.trait, "coherence_identity": self.judges.coherence}
            facts |= {key: judge.identity for key, judge in asked.items() if judge is not None}
        generation = {**config["generation_kwargs"], "max_gen_toks": self.run.max_gen_toks}
        if self.run.heat:
            # top_k is named even when it is off: transformers' own default would keep 50 tokens, and a checkpoint may bring a top_p
            generation |= {"do_sample": True, "temperature": self.run.heat, "top_p": 1.0}
            generation |= {"top_k": self.run.top_k} if self.run.top_k >= 0 else {}
        changed = {"generation_kwargs": generation, "repeats": self.run.samples, "metadata": metadata | self.run.model_dump() | facts}
        super().__init__({**config, **changed})

    def documents(self) -> list[dict[str, Any]]:
        """Return the evaluation questions, each with its system turn."""
        return [item._asdict() for item in self.run.items(self.trait)]

    def fewshot_context(
        self, doc: dict[str, Any], num_fewshot: int = 0, system_instruction: str | None = None, apply_chat_template: bool = False, **kwargs: Any
    ) -> str:
        """Return the question with its system turn, after the one that ``--system_instruction`` gives."""
        system = "\n\n".join(part for part in (system_instruction, doc["system"]) if part)
        return super().fewshot_context(doc, num_fewshot, system or None, apply_chat_template, **kwargs)

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests.

        Raises:
            JudgeError: when there is no judge, unless responses are only to be written (``--predict_only``).
        """
        if self.judges is None and not self.only_predicting:
            raise judge_needed(self.task_name)
        super().build_all_requests(**kwargs)

    def apply_filters(self) -> list[Instance] | None:
        """Judge every response and put the verdicts, as JSON, where lm-eval logs filtered responses: a list with one entry a sample.

        Raises:
            JudgeError: when more verdicts are missing than ``missing_limit`` allows.
        """
        if self.only_predicting:
            filtered: list[Instance] | None = super().apply_filters()
            return filtered
        assert self.judges is not None
        # data-parallel runs pad the requests, so an instance can hold more responses than were asked for
        texts = [[str(text).strip() for text in instance.resps[: self.run.samples]] for instance in self.instances]
        pairs = zip(self.instances, texts, strict=True)
        requests = [[JudgeRequest(prompt=instance.doc["question"], response=text) for text in own] for instance, own in pairs]
        flat = [request for own in requests for request in own]
        judged = self.judges.judge(flat)
        check_missing([one.trait for one in judged], self.run.missing_limit, findings=FINDINGS)
        if self.judges.coherence is not None:
            check_missing([one.coherence for one in judged], self.run.missing_limit)
        found = iter(judged)
        self.judged = [[next(found) for _ in own] for own in requests]
        if all(one.trait.score is None for one in judged):
            logger.warning("none of %d responses has a trait score, so trait_score of %s is NaN", len(judged), self.task_name)
        for instance, judged in zip(self.instances, self.judged, strict=True):
            instance.filtered_resps["none"] = json.dumps([one.record() for one in judged], ensure_ascii=False)
        return None

    def item_metrics(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the question's metrics; one without a value is left out, but NaN when no question has a value. What is not judged is left out."""
        metrics = super().item_metrics(doc, results)
        if self.judges is not None and self.judges.coherence is None:
            metrics = {name: value for name, value in metrics.items() if name not in OF_COHERENCE}
        for name in [name for name, value in metrics.items() if isinstance(value, float) and math.isnan(value)]:
            if self._known(name):
                del metrics[name]
        return metrics

    def missing_reasons(self, results: Sequence[Any]) -> dict[str, list[str]]:
        """Return why verdicts on the trait and, where it is judged, on coherence are missing."""
        both = self.judges is not None and self.judges.coherence is not None
        asked = {"trait_score": "trait", "coherence": "coherence"} if both else {"trait_score": "trait"}
        records = json.loads(results[0])
        return {metric: [one[kind]["missing"] for one in records if one[kind]["missing"] is not None] for metric, kind in asked.items()}

    def _known(self, metric: str) -> bool:
        return any(not math.isnan(response_values(one.record())[metric]) for judged in self.judged for one in judged)


def trait_metrics(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return one question's metrics from its logged verdicts."""
    return question_values([response_values(record) for record in json.loads(results[0])])
