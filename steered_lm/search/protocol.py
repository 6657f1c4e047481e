"""What an optimiser is (ask and tell, no I/O) and what an objective returns."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steered_lm.config import Config
from steered_lm.judges.base import Verdict
from steered_lm.steering.spec import SteeringSpec

FloatArray = NDArray[np.float64]


class SearchSpace(Config):
    """The box that is searched: one dimension a trait's weight (alpha is fixed by the spec's template).

    ``names`` are trait names; ``low`` and ``high`` bound every weight.
    """

    names: tuple[str, ...]
    low: float = -1.0
    high: float = 1.0

    @property
    def dimension(self) -> int:
        """The number of weights."""
        return len(self.names)

    def weights(self, point: FloatArray) -> dict[str, float]:
        """Return a point ``[dimension]`` as weights by trait name."""
        return {name: float(value) for name, value in zip(self.names, point, strict=True)}


class Optimizer(Protocol):
    """Ask for a population, tell its fitness (higher is better, NaN for unknown), say when to stop. No I/O, own generator."""

    def ask(self) -> FloatArray:
        """Return the next population, ``[population, dimension]`` float64."""
        ...

    def tell(self, population: FloatArray, fitness: FloatArray) -> None:
        """Take the fitness ``[population]`` of the last asked population, higher is better; NaN marks a missing value."""
        ...

    @property
    def should_stop(self) -> bool:
        """Whether the optimiser itself has converged or failed."""
        ...


class ItemScore(Config):
    """One prompt's outcome for one candidate."""

    item: str
    prompt: str
    response: str
    verdict: Verdict


class CandidateScore(Config):
    """All outcomes of one candidate on one split."""

    items: tuple[ItemScore, ...]

    @property
    def scores(self) -> list[float]:
        """The scores that are there, in item order."""
        return [i.verdict.score for i in self.items if i.verdict.score is not None]

    @property
    def missing(self) -> int:
        """How many verdicts are missing."""
        return sum(i.verdict.score is None for i in self.items)

    @property
    def mean(self) -> float:
        """The mean score over verdicts that are there; NaN when none is."""
        return float(np.mean(self.scores)) if self.scores else float("nan")


class Candidate(Config):
    """One condition to evaluate: a spec (None is the unsteered model) and, for the prompting baseline, a system turn."""

    name: str
    spec: SteeringSpec | None = None
    system: str | None = None


class Objective(Protocol):
    """Evaluates a whole population at once on one split of the persona's prompts."""

    def __call__(self, candidates: Sequence[Candidate], *, split: str) -> list[CandidateScore]:
        """Return one score a candidate, in order; every candidate is scored on the same items in the same order."""
        ...
