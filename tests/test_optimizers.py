"""The shipped optimisers and the loader of optimiser files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steered_lm.errors import RunError, UserError
from steered_lm.search.plugins import load_optimizer
from steered_lm.search.protocol import FloatArray, SearchSpace

SPACE = SearchSpace(names=("a", "b", "c", "d", "e"), low=-2.0, high=2.0)
SHIPPED = ("cma_es", "random_search")
TARGET = np.array([1.5, -1.0, 0.5, 0.0, -1.9])


def fitness_of(points: FloatArray) -> FloatArray:
    """Rounded like a judge's mean score, so that ties happen."""
    found: FloatArray = np.round(5 - ((points - TARGET) ** 2).sum(axis=1), 1)
    return found


def course(name: str, seed: int, generations: int = 12, **options: Any) -> list[FloatArray]:
    optimizer = load_optimizer(name, SPACE, seed=seed, options=options)
    asked = []
    for _ in range(generations):
        asked.append(optimizer.ask())
        optimizer.tell(asked[-1], fitness_of(asked[-1]))
    return asked


@pytest.mark.parametrize("name", SHIPPED)
def test_one_seed_gives_one_course_whatever_the_global_generator_does(name: str) -> None:
    np.random.seed(1)
    first = course(name, seed=7)
    np.random.seed(2)
    before = np.random.get_state()
    second = course(name, seed=7)
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    assert not np.array_equal(first[0], course(name, seed=8)[0])


@pytest.mark.parametrize("name", SHIPPED)
def test_replaying_what_was_told_continues_with_the_same_points(name: str) -> None:
    unbroken = course(name, seed=3, generations=9)
    resumed = load_optimizer(name, SPACE, seed=3)
    for points in unbroken[:8]:
        assert np.array_equal(resumed.ask(), points)
        resumed.tell(points.copy(), fitness_of(points))
    assert np.array_equal(resumed.ask(), unbroken[8])


@pytest.mark.parametrize("name", SHIPPED)
def test_points_stay_in_the_box_and_the_population_is_the_documented_one(name: str) -> None:
    for points in course(name, seed=1, generations=20):
        assert points.shape == (8, 5)
        assert points.dtype == np.float64
        assert np.abs(points).max() <= 2.0
    assert course(name, seed=1, generations=1, population=13)[0].shape == (13, 5)


def test_cma_es_climbs_and_its_incumbent_beats_random_search() -> None:
    optimizer = load_optimizer("cma_es", SPACE, seed=0)
    for _ in range(25):
        points = optimizer.ask()
        optimizer.tell(points, fitness_of(points))
    incumbent = optimizer.incumbent  # type: ignore[attr-defined]
    assert np.abs(incumbent).max() <= 2.0
    random_best = max(fitness_of(points).max() for points in course("random_search", seed=0, generations=25))
    assert fitness_of(incumbent[None])[0] > random_best


def test_cma_es_starts_at_the_centre_with_the_documented_step() -> None:
    draws = np.concatenate([load_optimizer("cma_es", SearchSpace(names=("a", "b"), low=0, high=100), seed=s).ask() for s in range(300)])
    assert abs(draws.mean() - 50) < 2
    assert abs(draws.std() - 30) < 6  # 0.3 of the width; the bounds cut the tails a little


def test_cma_es_takes_missing_fitness_but_not_when_all_is_missing() -> None:
    optimizer = load_optimizer("cma_es", SPACE, seed=0)
    points = optimizer.ask()
    fitness = fitness_of(points)
    fitness[2] = np.nan
    optimizer.tell(points, fitness)
    points = optimizer.ask()
    with pytest.raises(ValueError, match="every fitness is NaN"):
        optimizer.tell(points, np.full(8, np.nan))
    with pytest.raises(ValueError, match="another population"):
        optimizer.tell(points + 0.1, fitness)


def test_cma_es_goes_on_when_a_coarse_judge_scores_a_generation_all_the_same() -> None:
    optimizer = load_optimizer("cma_es", SPACE, seed=0)
    for _ in range(30):
        optimizer.tell(optimizer.ask(), np.full(8, 3.0))
        assert not optimizer.should_stop


def test_cma_es_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    course("cma_es", seed=0, generations=15)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_options_that_do_not_fit_are_refused_with_those_that_do() -> None:
    with pytest.raises(RunError, match=r"optimizer_options=\{'sigma': 1\} do not fit optimizer='cma_es'.*Allowed: .*sigma0.*population"):
        load_optimizer("cma_es", SPACE, seed=0, options={"sigma": 1})
    with pytest.raises(RunError, match="sigma0=-1 must be above 0"):
        load_optimizer("cma_es", SPACE, seed=0, options={"sigma0": -1})
    with pytest.raises(RunError, match="at least two traits.*random_search"):
        load_optimizer("cma_es", SearchSpace(names=("a",)), seed=0)
    with pytest.raises(UserError, match="Did you mean 'cma_es'"):
        load_optimizer("cma-es", SPACE, seed=0)


def test_a_users_own_file_is_loaded_by_path(tmp_path: Path) -> None:
    file = tmp_path / "corners.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "@dataclass\n"
        "class Corners:\n"
        "    n: int\n"
        "    should_stop: bool = False\n"
        "    def ask(self): return np.ones((2, self.n))\n"
        "    def tell(self, population, fitness): pass\n"
        "def make(space, seed): return Corners(space.dimension)\n"
    )
    assert load_optimizer(str(file), SPACE, seed=0).ask().shape == (2, 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", r"has no make\(space, seed, \*\*options\) function"),
        ("make = 3\n", "has no make"),
        ("def make(:\n", "is not valid Python"),
        ("import a_library_that_is_not_there\n", "needs a library that is not installed"),
        ("def make(space, seed):\n    return object()\n", "has no ask, tell, should_stop"),
    ],
)
def test_a_file_that_is_no_optimiser_is_refused(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(RunError, match=message):
        load_optimizer(str(file), SPACE, seed=0)
