"""CMA-ES by pycma: the default optimiser.

Defaults follow Hansen (2016), "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772: population ``4 + floor(3 ln n)`` (Table 1) and
step size ``sigma0 = 0.3`` of the box's width (section on initialisation), here from the box's centre. Stopping on equal or stagnating fitness
is switched off: a judge's scores are coarse and noisy, a whole generation may tie, and the budget ends the run.
"""

import warnings

import numpy as np

from steered_lm.search.protocol import FloatArray, SearchSpace

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Could not import matplotlib")
    import cma

_IGNORE_FITNESS = {"tolfun": 0, "tolfunhist": 0, "tolfunrel": 0, "tolflatfitness": 10**9, "tolstagnation": 10**9}


class CmaEs:
    """Ask and tell over pycma, with a generator of its own (pycma's default is numpy's global one)."""

    def __init__(self, space: SearchSpace, seed: int, sigma0: float, population: int | None) -> None:
        """Start at the box's centre with a step size of ``sigma0`` times the box's width."""
        if space.dimension < 2:
            raise ValueError(f"cma_es needs at least two traits, got {space.names}. Use optimizer=random_search for one.")
        size = 4 + int(3 * np.log(space.dimension)) if population is None else population
        if sigma0 <= 0 or size < 2:
            raise ValueError(f"cma_es: sigma0={sigma0!r} must be above 0 and population={population!r} at least 2.")
        draws = np.random.default_rng(seed)
        # seed NaN: leave numpy's global generator alone; verbose -10: print nothing, log nothing, read no signals file
        options = {"randn": lambda *shape: draws.standard_normal(shape), "seed": float("nan"), "verbose": -10, "verb_log": 0, "verb_disp": 0}
        options |= {"bounds": [space.low, space.high], "popsize": size, **_IGNORE_FITNESS}
        centre = np.full(space.dimension, (space.low + space.high) / 2)
        self._strategy = cma.CMAEvolutionStrategy(centre, sigma0 * (space.high - space.low), options)
        self._asked: list[FloatArray] = []

    def ask(self) -> FloatArray:
        """Return the next population, ``[population, dimension]``."""
        self._asked = self._strategy.ask()
        return np.array(self._asked, dtype=np.float64)

    def tell(self, population: FloatArray, fitness: FloatArray) -> None:
        """Take the last population's fitness, higher is better; NaN counts as the median (pycma's rule), all NaN is refused."""
        if not np.array_equal(population, np.array(self._asked)):
            raise ValueError("cma_es: tell() got another population than the last ask() returned; tell each population once, as asked.")
        if np.isnan(fitness).all():
            raise ValueError("cma_es: every fitness is NaN, there is nothing to learn from. Look at why all verdicts are missing.")
        cost = -np.where(np.isnan(fitness), np.nanmedian(fitness), fitness)
        self._strategy.tell(self._asked, cost.tolist())

    @property
    def incumbent(self) -> FloatArray:
        """The distribution's mean ``[dimension]``: averages noise out, so it is often better than the luckiest sample."""
        return np.array(self._strategy.result.xfavorite, dtype=np.float64)

    @property
    def should_stop(self) -> bool:
        """Whether pycma has converged in the points or failed numerically."""
        return bool(self._strategy.stop())


def make(space: SearchSpace, seed: int, *, sigma0: float = 0.3, population: int | None = None) -> CmaEs:
    """Return the optimiser; ``sigma0`` in widths of the box, ``population`` by default ``4 + floor(3 ln n)``."""
    return CmaEs(space, seed, sigma0, population)
