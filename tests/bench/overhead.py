"""Seconds of an optimiser's generation outside model and judge: the tiny chat model, new candidates in every generation, one persona's prompts.

Run ``python tests/bench/overhead.py --help``.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import console
import shapes
import torch
import transformers as hf

from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import HarnessObjective
from steered_lm.judges.stylometric import StylometricJudge
from steered_lm.persona.load import list_personas, load_persona
from steered_lm.search.protocol import Candidate

# milliseconds
AIM = 60


def measure(arguments: argparse.Namespace, exact: bool) -> list[dict[str, float]]:
    """Return where the seconds of each generation went; a first one, which loads the task, is left out."""
    lm = SteeredHFLM("steered-lm/tiny-chat", device="cpu", batch_size=arguments.candidates * arguments.prompts, exact=exact)
    persona = load_persona("josie")
    judge = StylometricJudge.for_persona(persona, [load_persona(name) for name in list_personas()])
    objective = HarnessObjective(lm, persona, judge, max_new_tokens=arguments.tokens)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.generations + 1):
            tokens = lm.tok_encode("How was your day?")
            steering = shapes.random_steering(lm.model, tokens, arguments.layer, arguments.candidates, "response", Path(folder), seed=number)
            candidates = [Candidate(name=f"c{i}", spec=spec) for i, spec in enumerate(steering.specs)]
            scores = objective(candidates, split="tune")
            assert len(scores) == arguments.candidates
            found.append({**objective.timings, "prompts": float(len(scores[0].items))})
    return found[1:]


def main() -> None:
    parser = console.options(__doc__, "overhead.json")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument(
        "--prompts", type=int, default=10, help="rows in a batch are candidates x prompts; the persona's tuning prompts decide how many run"
    )
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--generations", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.generations = 15
    torch.set_num_threads(arguments.threads)
    hf.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {"machine": console.machine(arguments.threads)}
    rows = []
    for name, exact in (("engine", False), ("reference path", True)):
        timings = found[name] = measure(arguments, exact)
        parts = [part for part in timings[0] if part != "prompts"]
        rows.append([name, f"{timings[0]['prompts']:.0f}", *(f"{1e3 * statistics.median(timing[part] for timing in timings):.1f}" for part in parts)])
    title = (
        f"milliseconds of a generation, {arguments.candidates} candidates, tiny chat model, median of {arguments.generations}, overhead at most {AIM}"
    )
    console.show(title, ["path", "prompts", *parts], rows)
    console.write(arguments.json, found)


if __name__ == "__main__":
    main()
