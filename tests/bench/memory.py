"""Memory of the engine: bytes planned before anything runs against the growth of the process's high-water mark, a fresh process a case.

Run ``python tests/bench/memory.py --help``. Linux only: the mark is read from ``/proc``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import console
import shapes
import torch

from steered_lm.engine import Engine, GenerationRow, Sampling, ScoreRequest
from steered_lm.steering.hooks import Steerer

MEBI = 2**20
AIM = (0.85, 1.15)

# budgets in MiB; None is as much as the case wants
GENERATION: list[dict[str, Any]] = [
    {"size": "s", "candidates": 8, "prompts": 10, "tokens": 48},
    {"size": "s", "candidates": 32, "prompts": 10, "tokens": 48},
    {"size": "s", "candidates": 8, "prompts": 10, "tokens": 48, "positions": "response"},
    {"size": "s", "candidates": 32, "prompts": 10, "tokens": 48, "positions": "response"},
    {"size": "s", "candidates": 8, "prompts": 80, "tokens": 16},
    {"size": "s", "candidates": 1, "prompts": 96, "tokens": 64, "positions": "response"},
    {"size": "s", "candidates": 16, "prompts": 10, "tokens": 48, "temperature": 1.0},
    {"size": "s", "candidates": 16, "prompts": 10, "tokens": 48, "dtype": "bfloat16"},
    {"size": "s", "candidates": 8, "prompts": 10, "tokens": 256},
    {"size": "m", "candidates": 16, "prompts": 10, "tokens": 32},
    {"size": "m", "candidates": 16, "prompts": 10, "tokens": 32, "positions": "response"},
    {"size": "s", "candidates": 32, "prompts": 10, "tokens": 48, "budget": 64},
    {"size": "s", "candidates": 32, "prompts": 10, "tokens": 48, "budget": 128, "positions": "response"},
    {"size": "m", "candidates": 16, "prompts": 10, "tokens": 32, "budget": 128},
]
SCORING: list[dict[str, Any]] = [
    {"size": "s", "settings": 8, "questions": 24, "words": 60},
    {"size": "s", "settings": 8, "questions": 24, "words": 60, "positions": "response"},
    {"size": "s", "settings": 16, "questions": 24, "words": 300, "budget": 256},
    {"size": "m", "settings": 8, "questions": 12, "words": 100, "budget": 256},
    {"size": "s", "settings": 1, "questions": 96, "words": 60, "budget": 64},
]
REDUCED = ([0, 2, 9, 11], [0, 2])


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def run_case(case: dict[str, Any]) -> dict[str, int | bool]:
    """Run one case in this process and return its bytes."""
    torch.set_num_threads(1)
    positions = case.get("positions", "all")
    budget = case["budget"] * MEBI if case.get("budget") else None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = shapes.train_tokenizer(shapes.SHAPES[case["size"]].vocabulary)
        model = shapes.random_llama(case["size"], getattr(torch, case.get("dtype", "float32")))
        count = case.get("candidates") or case["settings"]
        prompts = shapes.prompts(tokenizer, case.get("prompts", 1))
        steering = shapes.random_steering(model, prompts[0], shapes.SHAPES[case["size"]].layer, count, positions, Path(folder))
        warm, engine = (Engine(Steerer(model), tokenizer, gemm=case["gemm"], memory_budget=given) for given in (None, budget))
        if "candidates" in case:
            rows = [
                GenerationRow(prompt, case["tokens"], spec, Sampling(temperature=case.get("temperature", 0.0), seed=number))
                for number, spec in enumerate(steering.specs)
                for prompt in prompts
            ]
            warm.generate([rows[0]._replace(max_new_tokens=2)])
            engine.generate([rows[0]._replace(max_new_tokens=2)])
        else:
            words = shapes.Words()
            texts = [tuple(tokenizer(words.text(case["words"])).input_ids) for _ in range(case["questions"])]
            choices = [tuple(tokenizer(words.text(6)).input_ids) for _ in range(4)]
            requests = [ScoreRequest(text, choice, spec) for spec in steering.specs for text in texts for choice in choices]
            warm.score(requests[:1], max_length=2048)
            engine.score(requests[:1], max_length=2048)
        engine.report.planned_bytes = 0
        resettable = _reset_mark()
        before = _kibibytes("VmRSS") if resettable else _kibibytes("VmHWM")
        if "candidates" in case:
            engine.generate(rows)
        else:
            engine.score(requests, max_length=2048)
        peak = (_kibibytes("VmHWM") - before) * 1024
        return {"peak": peak, "planned": engine.report.planned_bytes, "cache": engine.report.cache_bytes, "reset": resettable}


def _reset_mark() -> bool:
    """Set the high-water mark to what is in use now, and return whether the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _kibibytes("VmHWM") - _kibibytes("VmRSS") < 1024


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a process of its own."""
    # a fixed threshold: what is freed goes back at once, and the mark shows what was in use together, not what the allocator kept
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return {**case, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = console.options(__doc__, "memory.json")
    parser.add_argument("--gemm", choices=["torch", "onednn"], default="torch")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(json.loads(arguments.case))))
        return
    cases = [*GENERATION, *SCORING]
    if not arguments.full:
        cases = [*(GENERATION[i] for i in REDUCED[0]), *(SCORING[i] for i in REDUCED[1])]
    found = [measure({**case, "gemm": arguments.gemm}) for case in cases]
    rows = []
    for fact in found:
        kind = (
            f"{fact['candidates']} x {fact['prompts']} x {fact['tokens']}"
            if "candidates" in fact
            else f"score {fact['settings']} x {fact['questions']}"
        )
        odd = [str(fact[name]) for name in ("dtype", "temperature") if name in fact]
        ratio = fact["peak"] / fact["planned"] if fact["planned"] else None
        budget = fact.get("budget")
        rows.append(
            [
                " ".join([fact["size"], kind, fact.get("positions", "all"), *odd]),
                str(budget or ""),
                *(f"{fact[name] / MEBI:.1f}" for name in ("planned", "cache", "peak")),
                f"{ratio:.2f}" if ratio else "",
                ("yes" if AIM[0] <= ratio <= AIM[1] else "no") if ratio else "",
                f"{fact['peak'] / MEBI / budget:.2f}" if budget else "",
            ]
        )
    header = ["case", "budget", "planned", "cache", "peak", "peak / planned", f"within {AIM[0]}..{AIM[1]}", "peak / budget"]
    console.show("memory in MiB, weights aside", header, rows)
    console.write(arguments.json, found)


if __name__ == "__main__":
    main()
