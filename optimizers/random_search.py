"""Random search: independent uniform draws in the box, the baseline that every optimiser must beat at equal budget."""

import numpy as np

from steered_lm.search.protocol import FloatArray, SearchSpace


class RandomSearch:
    """Ask for uniform points; tell changes nothing."""

    def __init__(self, space: SearchSpace, seed: int, population: int | None) -> None:
        """Draw ``population`` points at a time, by default as many as CMA-ES does, so that both fill a batch alike."""
        self._size = 4 + int(3 * np.log(space.dimension)) if population is None else population
        if self._size < 1:
            raise ValueError(f"random_search: population={population!r} must be at least 1.")
        self._space = space
        self._draws = np.random.default_rng(seed)

    def ask(self) -> FloatArray:
        """Return the next points, ``[population, dimension]``."""
        return self._draws.uniform(self._space.low, self._space.high, (self._size, self._space.dimension))

    def tell(self, population: FloatArray, fitness: FloatArray) -> None:
        """Learn nothing: the draws are independent of what was found."""

    @property
    def should_stop(self) -> bool:
        """Never; the budget ends the run."""
        return False


def make(space: SearchSpace, seed: int, *, population: int | None = None) -> RandomSearch:
    """Return the optimiser; ``population`` points a generation, by default ``4 + floor(3 ln n)``."""
    return RandomSearch(space, seed, population)
