"""Log-likelihoods under K settings: K separate runs of lm-eval's stock ``hf`` (a hook written by hand), and one call of the engine.

The items are made up; their lengths are those of MMLU with no and five examples, and of TruthfulQA's multiple choice. Both sides run in one process,
in turns. The limit is what remains when only matrix products cost anything.

Run ``python tests/bench/scoring.py --help``.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import console
import shapes
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from steered_lm.engine import Engine, ScoreRequest
from steered_lm.engine.gemm import Gemm
from steered_lm.harness.model import SteeredHFLM
from steered_lm.steering.hooks import Steerer

GEMMS: list[Gemm] = ["torch", "onednn"] if torch.backends.mkldnn.is_available() else ["torch"]
TASKS = {"mmlu0": "MMLU, no examples", "mmlu5": "MMLU, five examples", "tqa": "TruthfulQA, multiple choice"}


class Question(NamedTuple):
    """A context and its continuations."""

    context: str
    choices: list[str]


def questions(task: str, count: int, seed: int = 0) -> list[Question]:
    """Return made-up items."""
    words = shapes.Words(seed)
    if task == "tqa":
        primer = "\n\n".join(f"Q: {words.text(6, 10)}?\nA: {words.text(6, 9)}." for _ in range(4))
        return [Question(f"{primer}\n\nQ: {words.text(8, 16)}?\nA:", [f" {words.text(5, 10)}" for _ in range(4 + i % 5)]) for i in range(count)]

    def item(low: int, high: int) -> str:
        return f"{words.text(low, high)}\n" + "".join(f"{letter}. {words.text(4)}\n" for letter in "ABCD") + "Answer:"

    primer = "".join(f"{item(12, 28)} {letter}\n\n" for letter in "CABDA") if task == "mmlu5" else ""
    return [Question(shapes.INSTRUCTION + primer + item(25, 45), [" A", " B", " C", " D"]) for _ in range(count)]


class HandSteered(HFLM):
    """The stock ``hf`` type with a hook: adds ``vector`` at one block's output, everywhere or from the last context token on.

    ``splits`` says, for a row's tokens, where that is.
    """

    vector: Tensor | None = None
    splits: dict[tuple[int, ...], int] | None = None
    _steered: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.vector is None:
            return None
        return output + (self.vector if self._steered is None else self.vector * self._steered)

    def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
        if self.splits is not None:
            # the pad token, 0, is in no text
            starts = torch.tensor([self.splits[tuple(token for token in row if token)] for row in inps.tolist()])
            self._steered = (torch.arange(inps.shape[1]) >= starts[:, None])[..., None].to(self.model.dtype)
        return super()._model_call(inps, **kwargs)


class Workload:
    """One model, one task, and both ways to score it under K settings."""

    def __init__(self, arguments: argparse.Namespace, task: str, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        shape = shapes.SHAPES[arguments.size]
        self.shape = shape
        self.tokenizer = shapes.train_tokenizer(shape.vocabulary)
        self.model = shapes.random_llama(arguments.size)
        self.questions = questions(task, arguments.questions)
        self.instances = [
            Instance("loglikelihood", {}, (question.context, choice), 0, metadata=("bench", i, 1))
            for i, question in enumerate(self.questions)
            for choice in question.choices
        ]
        self.stock = self.harness(HandSteered)
        self.pairs = [tuple(map(tuple, self.stock._encode_pair(*instance.args))) for instance in self.instances]
        count = max(arguments.settings)
        self.steering = shapes.random_steering(self.model, self.pairs[0][0], shape.layer, count, arguments.positions, folder)
        self.model.model.layers[shape.layer].register_forward_hook(self.stock.hook)
        if arguments.positions == "response":
            self.stock.splits = {context + continuation[:-1]: len(context) - 1 for context, continuation in self.pairs}
        self.steerer = Steerer(self.model)

    def harness(self, kind: type[HFLM], **settings: Any) -> Any:
        """Return a model of one of lm-eval's types."""
        batch = self.arguments.batch
        return kind(pretrained=self.model, tokenizer=self.tokenizer, add_bos_token=False, max_length=2048, batch_size=batch, **settings)

    def stock_run(self, setting: int) -> list[tuple[float, bool]]:
        """Run lm-eval's ``hf`` under one setting."""
        self.stock.vector = self.steering.vectors[setting]
        try:
            return self.answers(self.stock)
        finally:
            self.stock.vector = None

    def answers(self, model: HFLM) -> list[tuple[float, bool]]:
        return list(model.loglikelihood(self.instances, disable_tqdm=True))

    def others(self) -> dict[str, HFLM]:
        """Return models that run one setting, the first: lm-eval's ``steered``, which reads its vector from a pickle, and ours, warmed up."""
        made: dict[str, HFLM] = {}
        if self.arguments.positions == "all":
            path = self.folder / "first.pt"
            site = {"steering_vector": self.steering.vectors[0], "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
            torch.save({f"layers.{self.steering.layer}": site}, path)
            made["lm-eval steered"] = self.harness(SteeredModel, steer_path=str(path))
        spec = str(self.steering.specs[0].save(self.folder / "spec.yaml"))
        made["steered-hf"] = self.harness(SteeredHFLM, steering=spec, gemm="torch")
        made["steered-hf, exact"] = self.harness(SteeredHFLM, steering=spec, exact=True)
        made["steered-hf"].loglikelihood(self.instances[:1], disable_tqdm=True)
        return made

    def engine(self, settings: int, gemm: Gemm) -> Callable[[], list[Any]]:
        """Return the engine's run under the first ``settings`` settings, warmed up."""
        engine = Engine(self.steerer, self.tokenizer, gemm=gemm)
        requests = [ScoreRequest(context, continuation, spec) for spec in self.steering.specs[:settings] for context, continuation in self.pairs]
        engine.score(requests[:1], max_length=2048)
        return lambda: engine.score(requests, max_length=2048)

    # -- arithmetic ---------------------------------------------------------------------------------------------------------------

    def limit(self, settings: int) -> float:
        """Return how much faster the engine could be: matrix products of separate runs over those that the tree needs."""
        shape, below = self.shape, (self.shape.layer + 1) / self.shape.blocks
        per_token = sum(p.numel() for p in self.model.model.layers.parameters())
        head = shape.width * shape.vocabulary
        # lm-eval merges requests that differ in a last token only
        rows = {context + continuation[:-1] for context, continuation in self.pairs}
        apart = sum(map(len, rows)) * (per_token + head)
        contexts = list(dict.fromkeys(context for context, _ in self.pairs))
        common = 0
        while all(context[: common + 1] == contexts[0][: common + 1] for context in contexts):
            common += 1
        trunk = common + sum(len(context) - common for context in contexts)
        branches = sum(len(continuation) - 1 for _, continuation in self.pairs)
        reads = len(contexts) + branches
        fanned = below + (1 - below) * settings
        once = trunk - len(contexts) if self.arguments.positions == "response" else 0
        together = per_token * (once + (trunk - once + branches) * fanned) + settings * reads * head
        return settings * apart / together


def compared(work: Workload, stock: dict[int, list[tuple[float, bool]]], found: Sequence[Any]) -> dict[str, float]:
    """Return how far the engine's answers are from those of the separate runs."""
    size = len(work.instances)
    differences: list[float] = []
    picks: list[bool] = []
    greedy: list[bool] = []
    for setting, answers in stock.items():
        if (setting + 1) * size > len(found):
            continue
        mine = found[setting * size : (setting + 1) * size]
        differences += [abs(a[0] - b.loglikelihood) for a, b in zip(answers, mine, strict=True)]
        greedy += [a[1] == b.is_greedy for a, b in zip(answers, mine, strict=True)]
        first = 0
        for question in work.questions:
            places = range(first, first + len(question.choices))
            picks.append(max(places, key=lambda i: answers[i][0]) == max(places, key=lambda i: mine[i].loglikelihood))
            first += len(question.choices)
    return {"max difference": max(differences), "equal picks": statistics.mean(picks), "equal is_greedy": statistics.mean(greedy)}


def task_table(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """Measure one task, print its table, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(arguments, task, Path(folder))
        stock: dict[int, list[tuple[float, bool]]] = {}

        def stock_run(number: int) -> None:
            stock[number % max(arguments.settings)] = work.stock_run(number % max(arguments.settings))

        engines = {f"engine, {gemm}, {settings}": (settings, work.engine(settings, gemm)) for settings in arguments.settings for gemm in GEMMS}
        others = work.others()
        designs: dict[str, Callable[[int], Any]] = {"hf": stock_run}
        designs |= {name: lambda number, run=run: run() for name, (_, run) in engines.items()}
        designs |= {name: lambda number, model=model: work.answers(model) for name, model in others.items()}
        runs = comparison.interleaved(designs, arguments.rounds)
        facts = {name: _fact(work, run, runs["hf"], engines[name][0] if name in engines else 1) for name, run in runs.items()}
        for name, (settings, _) in engines.items():
            facts[name] |= {"limit": work.limit(settings), **compared(work, stock, runs[name].output)}
        _show(work, task, facts)
        return {
            "task": task,
            "positions": arguments.positions,
            "size": arguments.size,
            "machine": console.machine(arguments.threads),
            "runs": facts,
        }


def _fact(work: Workload, run: comparison.Run, stock: comparison.Run, settings: int) -> dict[str, Any]:
    clock = "cpu" if work.arguments.threads == 1 else "wall"
    return {"K": settings, "seconds": run.seconds(clock), "over K runs": settings * comparison.ratio(stock, run, clock)}


def _show(work: Workload, task: str, facts: dict[str, dict[str, Any]]) -> None:
    lengths = [len(context) for context in dict.fromkeys(context for context, _ in work.pairs)]
    title = (
        f"{TASKS[task]}: {len(work.questions)} items, {len(work.pairs)} requests, contexts of {statistics.mean(lengths):.0f} tokens, "
        f"{work.arguments.size}, positions {work.arguments.positions}, {work.arguments.threads} thread(s)"
    )
    columns = {
        "K": "d", "seconds": ".2f", "over K runs": ".2f", "limit": ".1f", "max difference": ".1e", "equal picks": ".2%", "equal is_greedy": ".2%"
    }  # fmt: skip
    rows = [[name, *(format(fact[key], form) if key in fact else "" for key, form in columns.items())] for name, fact in facts.items()]
    console.show(title, ["run", "K", "seconds", "over K hf runs", *list(columns)[3:]], rows)


def main() -> None:
    parser = console.options(__doc__, "scoring.json")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="one or several; all when left out")
    parser.add_argument("--size", choices=list(shapes.SHAPES), default="s")
    parser.add_argument("--settings", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="batch_size of lm-eval's runs")
    parser.add_argument("--positions", choices=["all", "response"], action="append", help="one or both; both when left out")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.full:
        arguments.questions, arguments.rounds = 48, 5
    found = [
        task_table(argparse.Namespace(**{**vars(arguments), "positions": positions}), task)
        for task in arguments.task or TASKS
        for positions in arguments.positions or ("all", "response")
    ]
    console.write(arguments.json, found)


if __name__ == "__main__":
    main()
