"""``steered_truthfulqa_gen``: upstream's ``truthfulqa_gen``, and with a judge how truthful and how informative the answers are."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from steered_lm.benchmarks.truthful import judged_metrics, metric_names, request_of, truthful_judges
from steered_lm.config import Config
from steered_lm.errors import JudgeError
from steered_lm.harness.persona_task import total
from steered_lm.harness.upstream_task import UpstreamTask
from steered_lm.judges import check_missing, judge_options
from steered_lm.judges.base import Judge, Verdict


class TruthfulOptions(Config):
    """What ``--metadata`` chooses; every further ``judge_<option>`` goes to the judge, such as ``judge_base_url``.

    Attributes:
        judge: a judge's name; None asks none, and the task is upstream's.
        cache: SQLite file that keeps scores between runs.
        missing_limit: share of missing verdicts of a kind above which the run stops.
    """

    judge: str | None = None
    cache: str | None = None
    missing_limit: float = 0.2


class TruthfulTask(UpstreamTask):
    """The task behind ``steered_truthfulqa_gen.yaml``; ``metadata`` may also hold judges themselves by kind, under ``judges``.

    Attributes:
        judges: by kind, empty when none is asked for.
        verdicts: by kind, one a response of the last evaluation, in the order of ``instances``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the judges first, so that whatever is wrong with them shows before the model runs.

        Raises:
            JudgeError: when a judge cannot be built.
            UserError: when the data is not to be had, or malformed.
        """
        metadata = dict(config["metadata"])
        given = {key: value for key, value in metadata.items() if key in TruthfulOptions.model_fields and value is not None}
        self.options = TruthfulOptions.parse(given, source="--metadata of steered_truthfulqa_gen", error=JudgeError)
        self.judges: Mapping[str, Judge] = metadata.pop("judges", None) or self._make_judges(metadata)
        self.verdicts: dict[str, list[Verdict]] = {}
        self._unknown: set[str] = set()
        facts = {"judge_identities": {kind: judge.identity for kind, judge in self.judges.items()}} if self.judges else {}
        super().__init__({**config, "metadata": metadata | self.options.model_dump() | facts})

    def _make_judges(self, metadata: Mapping[str, Any]) -> dict[str, Judge]:
        extra = judge_options(metadata)
        if self.options.judge is None:
            if extra:
                raise JudgeError(f"judge_{sorted(extra)[0]} is given and no judge. Name one by judge, or leave its options out.")
            return {}
        return truthful_judges(self.options.judge, cache=self.options.cache, **extra)

    def own_settings(self) -> dict[str, Any]:
        """Return upstream's metrics and, with a judge, ours."""
        if not self.judges:
            return {}
        ours = [
            {"metric": name, "aggregation": total if name.endswith("_missing") else "mean", "higher_is_better": not name.endswith("_missing")}
            for name in metric_names()
        ]
        return {"metric_list": [*self.theirs["metric_list"], *ours]}

    def apply_filters(self) -> list[Instance] | None:
        """Judge every response in one call a kind and put response and verdicts, as JSON, where lm-eval logs filtered responses.

        Raises:
            JudgeError: when more verdicts are missing than ``missing_limit`` allows.
        """
        if not self.judges or self.only_predicting:
            filtered: list[Instance] | None = super().apply_filters()
            return filtered
        responses = [str(instance.resps[0]) for instance in self.instances]
        requests = [request_of(instance.doc, response) for instance, response in zip(self.instances, responses, strict=True)]
        self.verdicts = {kind: list(judge.judge(requests)) for kind, judge in self.judges.items()}
        for verdicts in self.verdicts.values():
            check_missing(verdicts, self.options.missing_limit)
        every = [judged_metrics(dict(zip(self.verdicts, pair, strict=True))) for pair in zip(*self.verdicts.values(), strict=True)]
        self._unknown = {name for name in metric_names() if all(math.isnan(metrics[name]) for metrics in every)}
        for index, (instance, response) in enumerate(zip(self.instances, responses, strict=True)):
            records = {kind: verdicts[index].record() for kind, verdicts in self.verdicts.items()}
            instance.filtered_resps["none"] = json.dumps({"response": response, **records}, ensure_ascii=False)
        return None

    def item_metrics(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return upstream's metrics and ours; a missing verdict leaves out what depends on it, and a metric without any score is NaN."""
        if not self.judges or self.only_predicting:
            return super().item_metrics(doc, results)
        logged = json.loads(results[0])
        metrics = super().item_metrics(doc, [logged["response"]])
        fields = Verdict.model_fields
        verdicts = {kind: Verdict.model_validate({k: v for k, v in logged[kind].items() if k in fields}) for kind in self.judges}
        return metrics | {name: value for name, value in judged_metrics(verdicts).items() if not math.isnan(value) or name in self._unknown}

    def missing_reasons(self, results: Sequence[Any]) -> dict[str, list[str]]:
        """Return why verdicts are missing, by what was judged."""
        if not self.judges:
            return {}
        logged = json.loads(results[0])
        return {kind: [logged[kind]["missing"]] for kind in self.judges if logged[kind]["missing"] is not None}
