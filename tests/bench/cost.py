"""A sweep of ``steered-lm cost`` over seven alphas, and the same numbers from seven single runs: of ours, and of lm-eval's stock ``hf``.

The items have MMLU's shape: real ones from ``--data``, or made up. All sides run in one process, in turns, from a loaded model to item-level results.

Run ``python tests/bench/cost.py --help``.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import comparison
import console
import shapes
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from steered_lm.benchmarks.mmlu import local_subjects
from steered_lm.harness.items import evaluate_items, load_task
from steered_lm.harness.model import SteeredHFLM
from steered_lm.measure.divergence import with_alpha
from steered_lm.search.protocol import Candidate

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def made_up(folder: Path, count: int) -> None:
    """Write items of one subject, and five examples."""
    words = shapes.Words(0)
    (folder / "mmlu").mkdir()
    for split, size in (("test", count), ("dev", 5)):
        rows = [
            {"question": words.text(25, 45), "subject": "virology", "choices": [f"{words.text(4)} {i}" for i in range(4)], "answer": number % 4}
            for number in range(size)
        ]
        (folder / "mmlu" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = console.options(__doc__, "cost.json")
    parser.add_argument("--size", choices=list(shapes.SHAPES), default="s")
    parser.add_argument("--model", help="a model's folder in place of a random one")
    parser.add_argument("--data", help="folder with mmlu/; made-up items when left out")
    parser.add_argument("--items", type=int, default=40, help="items a subject")
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--batch", type=int, default=8, help="batch_size of lm-eval's runs")
    parser.add_argument("--positions", choices=["all", "response"], action="append", help="one or both; both when left out")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data is None:
            made_up(folder, arguments.items)
        os.environ["STEERED_LM_DATA"] = arguments.data or name
        tables = [table(arguments, shots, positions, folder) for shots in arguments.shots for positions in arguments.positions or ["all", "response"]]
    console.write(arguments.json, tables)


def table(arguments: argparse.Namespace, shots: int, positions: str, folder: Path) -> dict[str, Any]:
    """Measure one number of examples, print its table, and return it."""
    subject = shapes.random_llama(arguments.size) if arguments.model is None else arguments.model
    tokenizer = shapes.train_tokenizer(shapes.SHAPES[arguments.size].vocabulary) if arguments.model is None else None
    common = {"pretrained": subject, "tokenizer": tokenizer, "batch_size": arguments.batch, "device": "cpu"}
    stock, ours = HFLM(**common), SteeredHFLM(**common)
    ours.quiet = True
    layer = round(0.7 * ours.model.config.num_hidden_layers)
    (base, *_) = shapes.random_steering(ours.model, [1, 5, 6, 7, 8, 9, 10], layer, 1, positions, folder).specs
    specs = [with_alpha(base, alpha) for alpha in ALPHAS]
    names = [f"steered_mmlu_{name}" for name in (local_subjects() or [])[: arguments.subjects]]
    tasks = [load_task(name, {}, num_fewshot=shots) for name in names]
    limit = arguments.items

    def sweep(number: int) -> list[list[float]]:
        candidates = [Candidate(name=f"{spec.alpha:g}", spec=spec) for spec in specs]
        found = [evaluate_items(ours, task, candidates, limit=limit) for task in tasks]
        return [[item.metrics["acc"] for by_arm in found for item in by_arm[candidate.name]] for candidate in candidates]

    def single(number: int) -> list[list[float]]:
        return [
            [item.metrics["acc"] for task in tasks for item in evaluate_items(ours, task, [Candidate(name="one", spec=spec)], limit=limit)["one"]]
            for spec in specs
        ]

    def upstream(number: int) -> None:
        for task in tasks:
            task.candidates = ()
        evaluate(stock, {"tasks": {task.task_name: task for task in tasks}}, limit=limit, bootstrap_iters=0, log_samples=False)

    sweep(0)
    runs = comparison.interleaved({"one sweep": sweep, "7 single runs": single, "one run of hf, unsteered": upstream}, arguments.rounds)
    equal = runs["one sweep"].output == runs["7 single runs"].output
    answers = len(runs["one sweep"].output) * len(runs["one sweep"].output[0])
    clock = "cpu" if arguments.threads == 1 else "wall"
    facts = {
        "sweep, s": runs["one sweep"].seconds(clock),
        "7 single runs, s": runs["7 single runs"].seconds(clock),
        "single / sweep": comparison.ratio(runs["7 single runs"], runs["one sweep"], clock),
        "7 hf runs / sweep": len(ALPHAS) * comparison.ratio(runs["one run of hf, unsteered"], runs["one sweep"], clock),
        "equal": equal,
    }
    model = Path(arguments.model).name if arguments.model else arguments.size
    title = f"{len(tasks)} subject(s), {answers} answers, {shots} examples, positions {positions}, {model}, {arguments.threads} thread(s)"
    console.show(title, list(facts), [[str(value) if isinstance(value, bool) else f"{value:.2f}" for value in facts.values()]])
    return {"shots": shots, "positions": positions, "machine": console.machine(arguments.threads), "answers": answers, **facts}


if __name__ == "__main__":
    main()
