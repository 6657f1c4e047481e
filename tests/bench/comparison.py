"""Designs side by side: run in turns, their ratios, and how far they agree."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Seconds of one run: by the clock, and of the processor, which other programs on the machine do not lengthen by taking turns."""

    wall: float
    cpu: float


class Run(NamedTuple):
    """What one design took in each round, and what it returned in the last."""

    costs: list[Cost]
    output: Any

    def seconds(self, clock: str = "cpu") -> float:
        """Return the median."""
        return statistics.median(getattr(cost, clock) for cost in self.costs)


def timed(work: Callable[[], Any]) -> tuple[Cost, Any]:
    """Run ``work`` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    output = work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu), output


def interleaved(designs: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, Run]:
    """Run every design once a round, in turns, so that a slow spell of the machine meets all of them; designs are told the round.

    Every other round goes backwards: no design always runs after the same one.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in designs}
    outputs: dict[str, Any] = {}
    for number in range(rounds):
        names = list(designs) if number % 2 == 0 else list(designs)[::-1]
        for name in names:
            cost, outputs[name] = timed(lambda name=name, number=number: designs[name](number))
            costs[name].append(cost)
    return {name: Run(costs[name], outputs[name]) for name in designs}


def ratio(slow: Run, fast: Run, clock: str = "cpu") -> float:
    """Return the median over rounds of what ``slow`` took over what ``fast`` took."""
    return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in zip(slow.costs, fast.costs, strict=True))


class Agreement(NamedTuple):
    """How far two designs wrote the same: equal rows, and how often they chose differently after the same tokens (once a row at most)."""

    equal: int
    flips: float


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Agreement:
    """Compare rows; what follows a first difference says nothing, since it follows another text."""
    equal = flips = chosen = 0
    for a, b in zip(one, other, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        differs = list(a) != list(b)
        equal += not differs
        flips += differs
        chosen += same + differs
    return Agreement(equal, flips / chosen)
