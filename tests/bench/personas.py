"""For each of the six personas: CMA-ES and random search at equal budget against the unsteered model, on held-out prompts.

Prints one line a persona and the pooled comparison, and writes the numbers as JSON. Run: python tests/bench/personas.py [--budget 96] [--out folder]
"""

import argparse
import json
import time
from pathlib import Path

from steered_lm.arms import UNSTEERED
from steered_lm.extract.contrast import available_traits
from steered_lm.persona.load import list_personas
from steered_lm.search.protocol import CandidateScore
from steered_lm.stats import PairedDifference, paired_difference
from steered_lm.study import ModelConfig, SearchConfig, Study, StudyConfig, build


def scores(score: CandidateScore) -> list[float | None]:
    return [item.verdict.score for item in score.items]


def shown(difference: PairedDifference) -> str:
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench-personas"))
    arguments = parser.parse_args()
    vectors = arguments.out / f"vectors-{arguments.layers}.safetensors"
    if not vectors.is_file():
        build(ModelConfig(), available_traits(), arguments.layers, vectors, cache=arguments.out / "activations")
    pooled: dict[str, list[float | None]] = {"cma_es": [], "random_search": [], UNSTEERED: []}
    rows = []
    for persona in list_personas():
        study = Study(StudyConfig(persona=persona, vectors=vectors, alpha=arguments.alpha))
        found, started = {}, time.perf_counter()
        for optimizer, options in (("cma_es", {}), ("random_search", {"population": 8})):
            search = SearchConfig(optimizer=optimizer, options=options, budget=arguments.budget)
            found[optimizer] = study.search(search, arguments.out / f"{persona}-{optimizer}-b{arguments.budget}-a{arguments.alpha:g}")
        by_arm = {name: scores(result.test_scores["optimised"]) for name, result in found.items()}
        by_arm[UNSTEERED] = scores(found["cma_es"].test_scores["unsteered"])
        for name, values in by_arm.items():
            pooled[name] += values
        gain = paired_difference(by_arm["cma_es"], by_arm[UNSTEERED], seed=0)
        rival = paired_difference(by_arm["cma_es"], by_arm["random_search"], seed=0)
        result = found["cma_es"]
        row = {
            "persona": persona,
            "items": gain.n,
            "unsteered": result.unsteered.mean,
            "cma_es": result.test.mean,
            "random_search": found["random_search"].test.mean,
            "cma_es minus unsteered": gain.model_dump(),
            "cma_es minus random_search": rival.model_dump(),
            "optimism gap": result.optimism_test.gap,
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
        print(
            f"{persona:8s} n={gain.n:2d} unsteered {row['unsteered']:.2f}  cma_es {row['cma_es']:.2f}  random {row['random_search']:.2f}  "
            f"gain {shown(gain)}  over random {shown(rival)}  {row['seconds']:.0f} s",
            flush=True,
        )
    total = paired_difference(pooled["cma_es"], pooled[UNSTEERED], seed=0)
    rival = paired_difference(pooled["cma_es"], pooled["random_search"], seed=0)
    print(f"all      n={total.n} gain {shown(total)}  over random {shown(rival)}")
    result_file = arguments.out / "personas.json"
    result_file.write_text(json.dumps({"rows": rows, "gain": total.model_dump(), "over random": rival.model_dump()}, indent=1))


if __name__ == "__main__":
    main()
