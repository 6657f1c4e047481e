"""What our lm-eval tasks share: chat-marked contexts that need no flag, and several candidates in one evaluation."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from steered_lm.chat import Message
from steered_lm.content import content_dir
from steered_lm.harness.requests import ChatStr, for_candidates
from steered_lm.search.protocol import Candidate

logger = logging.getLogger(__name__)


class ChatTask(ConfigurableTask):
    """A YAML task whose every request is one user turn.

    ``steered-hf`` renders the turn with the model's own chat template, so ``--apply_chat_template`` is not needed; with that flag the
    harness renders it, once. Any other model type gets :meth:`plain_text`.

    Attributes:
        candidates: when there are some, every document is asked once for each, steered by the candidate's spec, and no metrics are
            computed: ``harness.population`` reads the answers off ``instances``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the task from its YAML; ``class`` and ``tag`` are for the registry."""
        self.candidates: tuple[Candidate, ...] = ()
        super().__init__(config={key: value for key, value in config.items() if key not in ("class", "tag")})

    def plain_text(self, doc: Mapping[str, Any]) -> str:
        """Return the prompt for model types that do not render messages."""
        return str(self.doc_to_text(doc))

    def documents(self) -> list[dict[str, Any]]:
        """Return the documents, which come with the package or a persona."""
        raise NotImplementedError

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the documents the split ``test``; nothing is downloaded."""
        self.dataset = {"test": datasets.Dataset.from_list(self.documents())}

    @property
    def task_name(self) -> str:
        """The task's name. Upstream's property draws from the global random generator at each call."""
        return str(self.config.task)

    @property
    def only_predicting(self) -> bool:
        """Whether responses are only to be written (``--predict_only``), so that nothing is judged."""
        return "bypass" in self._metric_fn_list

    def fewshot_context(
        self, doc: dict[str, Any], num_fewshot: int = 0, system_instruction: str | None = None, apply_chat_template: bool = False, **kwargs: Any
    ) -> str:
        """Return the document's context, chat-marked unless the harness renders it itself."""
        if apply_chat_template:
            text: str = super().fewshot_context(
                doc, num_fewshot=num_fewshot, system_instruction=system_instruction, apply_chat_template=True, **kwargs
            )
            return text
        system: list[Message] = [{"role": "system", "content": system_instruction}] if system_instruction else []
        text = self.plain_text(doc)
        return ChatStr(
            f"{system_instruction}\n\n{text}" if system_instruction else text,
            messages=[*system, {"role": "user", "content": str(self.doc_to_text(doc))}],
        )

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance] | Instance:
        """Return the document's requests, once per candidate when there are candidates."""
        made: list[Instance] | Instance = super().construct_requests(doc, ctx, **kwargs)
        if not self.candidates:
            return made
        return for_candidates(made if isinstance(made, list) else [made], self.candidates)

    def build_all_requests(
        self, *, limit: int | None = None, samples: Sequence[int] | None = None, rank: int = 0, world_size: int = 1, **kwargs: Any
    ) -> None:
        """Build the requests; lm-eval's cache of them is not used, since its key knows neither persona nor candidates."""
        if kwargs.pop("cache_requests", False):
            logger.warning("cache_requests is ignored for %s: its documents depend on --metadata, which lm-eval's key leaves out", self.task_name)
        if not self.candidates:
            super().build_all_requests(limit=limit, samples=samples, rank=rank, world_size=world_size, cache_requests=False, **kwargs)
            return
        self._instances: list[Instance] = []
        for doc_id, doc in self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size):
            made = self.construct_requests(doc, self.fewshot_context(doc), metadata=(self.task_name, doc_id, self.config.repeats))
            self._instances += made

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the document's metrics; none in an evaluation of candidates."""
        return {} if self.candidates else self.item_metrics(doc, results)

    def item_metrics(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return one document's metrics from the results of one candidate, or of the model as it is."""
        return dict(ConfigurableTask.process_results(self, doc, results))

    def missing_reasons(self, results: Sequence[Any]) -> dict[str, list[str]]:
        """Return why verdicts on a document's responses are missing: by the metric that lacks them, one entry for each that is."""
        return {}


def load_tasks(names: Sequence[str], metadata: Mapping[str, Any] | None = None, *, folder: Path | None = None) -> list[ChatTask]:
    """Return tasks of ours, ready for ``evaluate``: found by lm-eval's own ``TaskManager`` in our folder alone, which takes no time.

    Raises:
        KeyError: (by lm-eval) for an unknown name.
    """
    manager = TaskManager(include_path=str(folder or content_dir("tasks")), include_defaults=False, metadata=dict(metadata or {}))
    loaded = manager.load(list(names))["tasks"]
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(0)
    return [loaded[name] for name in names]
