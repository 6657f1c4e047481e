"""``persona_judge``: one response to each prompt of a persona's split, judged all at once for how well it fits the persona."""

import json
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter
from typing import Any

from lm_eval.api.instance import Instance
from pydantic import Field

from steered_lm.config import Config
from steered_lm.errors import PersonaError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.judges import check_missing, judge_options, make_judge
from steered_lm.judges.base import Judge, JudgeRequest, Verdict
from steered_lm.judges.stream import JudgeStream
from steered_lm.persona.load import load_persona
from steered_lm.persona.schema import Persona

logger = logging.getLogger(__name__)


class PersonaJudgeOptions(Config):
    """What ``--metadata`` chooses; every further ``judge_<option>`` goes to the judge, such as ``judge_base_url``.

    Attributes:
        persona: a persona of ours, or a folder.
        split: ``build``, ``tune``, ``validate`` or ``test``.
        judge: ``stylometric`` or ``openai:<model>``.
        cache: SQLite file that keeps scores between runs.
        max_gen_toks: longest response, in tokens.
        temperature: 0 is greedy; above, responses are sampled.
        missing_limit: share of missing verdicts above which the run stops.
    """

    persona: str
    split: str = "test"
    judge: str = "stylometric"
    cache: str | None = None
    max_gen_toks: int = 64
    temperature: float = Field(default=0.0, ge=0.0)
    missing_limit: float = 0.2


class PersonaJudgeTask(ChatTask):
    """The task behind ``persona_judge.yaml``.

    From Python, ``metadata`` may also hold a :class:`Persona` and a :class:`Judge` themselves instead of their names.

    Attributes:
        persona, judge: what responses are held against, and who says how well they fit.
        verdicts: one a response of the last evaluation, in the order of ``instances``.
        stream: judges responses while others are still being generated, by ``id`` of the instance; None judges all at the end.
        judge_seconds: time that the judge took in the last evaluation.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Load persona and judge, so that whatever is wrong with them shows before the model runs.

        Raises:
            PersonaError: when the persona is unknown or incomplete.
            JudgeError: when the judge cannot be built.
        """
        metadata = dict(config["metadata"])
        persona, judge = metadata.get("persona"), metadata.get("judge")
        names = {"persona": persona.name if isinstance(persona, Persona) else persona, "judge": judge.name if isinstance(judge, Judge) else judge}
        given = {key: value for key, value in {**metadata, **names}.items() if key in PersonaJudgeOptions.model_fields and value is not None}
        for key in metadata.keys() - PersonaJudgeOptions.model_fields.keys():  # other tasks may have keys of their own there
            if close := get_close_matches(key, PersonaJudgeOptions.model_fields, n=1, cutoff=0.75):
                logger.warning("--metadata %s is no option of persona_judge and changes nothing; did you mean %s?", key, close[0])
        self.options = PersonaJudgeOptions.parse(given, source="--metadata of persona_judge", error=PersonaError)
        self.persona = persona if isinstance(persona, Persona) else load_persona(self.options.persona)
        self.judge = judge if isinstance(judge, Judge) else self._make_judge(metadata)
        self.verdicts: list[Verdict] = []
        self.stream: JudgeStream | None = None
        self.judge_seconds = 0.0
        if config.get("repeats", 1) != 1:
            raise PersonaError(f"repeats={config['repeats']} is not allowed: persona_judge judges one response to each prompt. Leave repeats out.")
        facts = {"persona_digest": self.persona.digest, "judge_identity": self.judge.identity}
        generation = {**config["generation_kwargs"], "max_gen_toks": self.options.max_gen_toks}
        if self.options.temperature:
            generation |= {"do_sample": True, "temperature": self.options.temperature}
        super().__init__({**config, "generation_kwargs": generation, "metadata": metadata | self.options.model_dump() | facts})

    def _make_judge(self, metadata: Mapping[str, Any]) -> Judge:
        return make_judge(
            self.options.judge, self.persona, cache=None if self.options.cache is None else Path(self.options.cache), **judge_options(metadata)
        )

    def documents(self) -> list[dict[str, Any]]:
        """Return the prompts of the split with the persona's own answers.

        Raises:
            PersonaError: when the split is unknown or empty.
        """
        try:
            items = self.persona.items(self.options.split)
        except ValueError as problem:
            raise PersonaError(f"persona {self.persona.name!r}: {problem}") from problem
        if not items:
            raise PersonaError(
                f"persona {self.persona.name!r} has no items in split={self.options.split!r}. Choose another split, or add conversations."
            )
        return [{"id": item.item, "prompt": item.prompt, "reference": item.reference} for item in items]

    def apply_filters(self) -> list[Instance] | None:
        """Judge every response in one call and put the verdicts, as JSON, where lm-eval logs filtered responses.

        Raises:
            JudgeError: when more verdicts are missing than ``missing_limit`` allows.
        """
        if self.only_predicting:
            filtered: list[Instance] | None = super().apply_filters()
            return filtered
        # Data-parallel runs pad the requests, so an instance can hold more responses than were asked for.
        responses = [str(instance.resps[0]).strip() for instance in self.instances]
        started = perf_counter()
        if self.stream is None:
            requests = [judge_request(instance, response) for instance, response in zip(self.instances, responses, strict=True)]
            self.verdicts = list(self.judge.judge(requests))
        else:
            self.verdicts = self.stream.verdicts([id(instance) for instance in self.instances])
        self.judge_seconds = perf_counter() - started
        check_missing(self.verdicts, self.options.missing_limit)
        if all(verdict.score is None for verdict in self.verdicts):
            logger.warning("all %d verdicts are missing, so persona_fit is NaN", len(self.verdicts))
        for instance, response, verdict in zip(self.instances, responses, self.verdicts, strict=True):
            instance.filtered_resps["none"] = json.dumps({**verdict.model_dump(), "words": len(response.split())}, ensure_ascii=False)
        return None

    def item_metrics(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the document's metrics; a missing verdict leaves ``persona_fit`` out, and all missing make it NaN."""
        metrics = super().item_metrics(doc, results)
        if "missing" in metrics and all(verdict.score is None for verdict in self.verdicts):
            metrics["persona_fit"] = float("nan")
        return metrics

    def missing_reasons(self, results: Sequence[Any]) -> dict[str, list[str]]:
        """Return why the verdict is missing, if it is."""
        reason = json.loads(results[0])["missing"]
        return {} if reason is None else {"persona_fit": [reason]}


def judge_request(instance: Instance, text: str) -> JudgeRequest:
    """Return what the judge is asked about a generated text."""
    return JudgeRequest(prompt=instance.doc["prompt"], response=text.strip())


def persona_metrics(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return one document's metrics from its verdict: ``missing``, ``response_length`` in words and, if there is a score, ``persona_fit``."""
    verdict = json.loads(results[0])
    metrics = {"missing": float(verdict["score"] is None), "response_length": float(verdict["words"])}
    return metrics if verdict["score"] is None else {"persona_fit": verdict["score"], **metrics}


def total(values: Sequence[float]) -> int:
    """Return the sum of counts."""
    return int(sum(values))
