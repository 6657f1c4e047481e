"""A whole population through lm-eval at once: fitness for a search, and answers to multiple-choice items for the capability cost."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate

from steered_lm.config import Config
from steered_lm.errors import ModelError, RunError
from steered_lm.harness.chat_task import ChatTask, load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.persona_task import PersonaJudgeTask, judge_request
from steered_lm.harness.quiet import quiet
from steered_lm.judges.base import Judge
from steered_lm.judges.stream import JudgeStream, is_remote
from steered_lm.persona.schema import Persona
from steered_lm.search.protocol import Candidate, CandidateScore, ItemScore


class Timing(NamedTuple):
    """Where the seconds of one generation went.

    Attributes:
        total: all of it.
        prompt: passes over prompts.
        decode: steps that write tokens; on the reference path, all of the model's time.
        judge: waiting for verdicts when the model had nothing left to do.
        judge_hidden: judging that went on while the model was writing; it adds nothing to the total.
    """

    total: float
    prompt: float
    decode: float
    judge: float
    judge_hidden: float = 0.0

    @property
    def overhead(self) -> float:
        """Seconds that neither model nor judge took: lm-eval's own and ours."""
        return self.total - self.prompt - self.decode - self.judge


class ItemCorrect(Config):
    """One candidate's answer to one multiple-choice item.

    Attributes:
        task: the task's name.
        item: hash of the item's question and choices; the same for every candidate.
        correct: whether the right choice has the highest log-likelihood.
        loglikelihoods: of each choice's text as the reply, in nats.
    """

    task: str
    item: str
    correct: bool
    loglikelihoods: tuple[float, ...]


class HarnessObjective:
    """Scores a population on one split of a persona's prompts: one ``evaluate`` call and one judge batch for all of it.

    Attributes:
        history: where the time of each call went, in order.
    """

    def __init__(self, lm: SteeredHFLM, persona: Persona, judge: Judge, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> None:
        """Set up the objective; the task is built once per split.

        Args:
            lm: the model; its batch size is used, and its own spec is not.
            persona: what responses are held against.
            judge: who says how well they fit.
            max_new_tokens: longest response, in tokens.
            temperature: 0 is greedy; above, responses are sampled.
            seed: what sampling starts from at each call; the caller's generators stay as they are.

        Raises:
            ModelError: when ``lm`` is no ``steered-hf`` model, runs on several processes, or detects its batch size on the reference path.
        """
        check_lm(lm)
        self.lm, self.persona, self.judge = lm, persona, judge
        self.history: list[Timing] = []
        self.seed = seed
        # whoever asked decides how many missing verdicts are too many; here they are only counted
        self._metadata = {"persona": persona, "judge": judge, "max_gen_toks": max_new_tokens, "temperature": temperature, "missing_limit": 1.0}
        self._tasks: dict[str, PersonaJudgeTask] = {}

    def __call__(self, candidates: Sequence[Candidate], *, split: str) -> list[CandidateScore]:
        """Return one score a candidate, in order; every candidate is scored on the same items in the same order.

        Raises:
            ModelError: when a candidate's steering drives the model to NaN.
        """
        task = self._task(split)
        report, started = self.lm.engine.report, perf_counter()
        prompt, decode, model = report.prompt_seconds, report.decode_seconds, self.lm.seconds
        with seeded(self.lm, self.seed), self._judging(task) as stream:
            evaluate_candidates(self.lm, [task], candidates)
        decoded = self.lm.seconds - model if self.lm.exact else report.decode_seconds - decode
        hidden = stream.busy_seconds - stream.waited_seconds if stream else 0.0
        total = perf_counter() - started
        self.history.append(Timing(total, report.prompt_seconds - prompt, decoded, task.judge_seconds, max(hidden, 0.0)))
        return [CandidateScore(items=tuple(items)) for items in _by_candidate(task, len(candidates))]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the last call by part, see :class:`Timing`: prompt, decode, judge, overhead; and judge_hidden, which is part of the others."""
        last = self.history[-1]
        return {"prompt": last.prompt, "decode": last.decode, "judge": last.judge, "overhead": last.overhead, "judge_hidden": last.judge_hidden}

    @contextmanager
    def _judging(self, task: PersonaJudgeTask) -> Iterator[JudgeStream | None]:
        """Let a judge that waits for answers work on finished responses while the model writes others."""
        if self.lm.exact or not is_remote(self.judge):
            yield None
            return
        with JudgeStream(self.judge) as stream:
            task.stream = stream
            self.lm.answered = lambda instance, text: stream.put(id(instance), judge_request(instance, text))
            try:
                yield stream
            finally:
                task.stream = self.lm.answered = None

    def _task(self, split: str) -> PersonaJudgeTask:
        if split not in self._tasks:
            (task,) = load_tasks(["persona_judge"], {**self._metadata, "split": split})
            assert isinstance(task, PersonaJudgeTask)
            self._tasks[split] = task
        return self._tasks[split]


def evaluate_choices(lm: SteeredHFLM, task_names: str | Sequence[str], candidates: Sequence[Candidate]) -> dict[str, list[ItemCorrect]]:
    """Return every candidate's answers to the items of one or several multiple-choice tasks of ours, from one ``evaluate`` call.

    Items come task by task, in the same order for every candidate, so that candidates can be compared pairwise.

    Raises:
        ModelError: when ``lm`` is no ``steered-hf`` model, or a candidate's steering drives it to NaN.
        RunError: when two candidates share a name, or a log-likelihood is not finite.
    """
    check_lm(lm)
    repeated = [name for name, count in Counter(candidate.name for candidate in candidates).items() if count > 1]
    if repeated:
        raise RunError(f"two candidates are named {repeated[0]!r}; answers are returned by name, so give each its own.")
    tasks = load_tasks([task_names] if isinstance(task_names, str) else list(task_names))
    evaluate_candidates(lm, tasks, candidates)
    answers: dict[str, list[ItemCorrect]] = {candidate.name: [] for candidate in candidates}
    for task in tasks:
        for instances in _by_document(task):
            size = len(instances) // len(candidates)
            for index, candidate in enumerate(candidates):
                answers[candidate.name].append(_answer(task, candidate, instances[index * size : (index + 1) * size]))
    return answers


def _answer(task: ChatTask, candidate: Candidate, instances: Sequence[Instance]) -> ItemCorrect:
    values = tuple(float(instance.resps[0][0]) for instance in instances)
    doc = instances[0].doc
    if not all(map(math.isfinite, values)):
        raise RunError(f"candidate {candidate.name!r} gave log-likelihoods {values} on item {doc['id']} of {task.task_name}; they must be finite.")
    return ItemCorrect(task=task.task_name, item=doc["id"], correct=int(np.argmax(values)) == doc["gold"], loglikelihoods=values)


def _by_candidate(task: PersonaJudgeTask, count: int) -> list[list[ItemScore]]:
    found: list[list[ItemScore]] = [[] for _ in range(count)]
    for instance, verdict in zip(task.instances, task.verdicts, strict=True):
        doc = instance.doc
        found[instance.idx].append(ItemScore(item=doc["id"], prompt=doc["prompt"], response=str(instance.resps[0]).strip(), verdict=verdict))
    return found


def _by_document(task: ChatTask) -> list[list[Instance]]:
    found: dict[Any, list[Instance]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return list(found.values())


def check_lm(lm: Any) -> None:
    """Refuse a model that cannot evaluate several candidates at once.

    Raises:
        ModelError: when it is no ``steered-hf`` model, runs on several processes, or detects its batch size on the reference path.
    """
    if not isinstance(lm, SteeredHFLM):
        raise ModelError(f"lm is a {type(lm).__name__}; a population needs the model type steered-hf (steered_lm.harness.model.SteeredHFLM).")
    if lm.world_size > 1:
        raise ModelError(f"a population is evaluated by one process, this one is one of {lm.world_size}. Start it without accelerate launch.")
    if lm.exact and lm.batch_size == "auto":
        raise ModelError("batch_size='auto' cannot be used with exact=True when requests carry their own steering. Set batch_size to a number.")


def evaluate_candidates(lm: SteeredHFLM, tasks: Sequence[ChatTask], candidates: Sequence[Candidate], *, limit: int | None = None) -> None:
    """Run tasks once for all candidates; the answers are then in the tasks' ``instances``.

    Raises:
        RunError: when there is no candidate.
    """
    if not candidates:
        raise RunError("candidates is empty; give at least one.")
    for task in tasks:
        task.candidates = tuple(candidates)
    with quiet(lm):
        evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, limit=limit, bootstrap_iters=0, log_samples=False)


@contextmanager
def seeded(lm: SteeredHFLM, seed: int) -> Iterator[None]:
    """Sample from a seed of our own and give torch's generators back as they were."""
    devices = [lm.device.index or 0] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
