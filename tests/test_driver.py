"""The driver: one call a generation, a fresh look at the best, and the same end for a broken and an unbroken run."""

import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steered_lm.errors import JudgeError, RunError, UserError
from steered_lm.judges.base import Verdict
from steered_lm.search.driver import optimize
from steered_lm.search.protocol import Candidate, CandidateScore, ItemScore, SearchSpace
from steered_lm.search.result import Generation, OptimizeResult
from steered_lm.search.runlog import LOG_NAME, RunSettings
from steered_lm.steering.spec import SteeringSpec, VectorsRef

ROOT = Path(__file__).resolve().parents[1]
TARGET = {"a": 0.6, "b": -0.4, "c": 0.2}
ITEMS = {"tune": 12, "validate": 10, "test": 15}


class Toy:
    """Scores fall with the distance from ``TARGET``; each item adds a fixed noise that depends on spec, split and item.

    ``before`` is called with (number of the call, split) at the start of each call, ``spoil`` may replace a verdict.
    """

    def __init__(self, before: Callable[[int, str], None] | None = None, spoil: Callable[[Candidate, int], Verdict | None] | None = None) -> None:
        self.before, self.spoil = before, spoil
        self.calls: list[tuple[str, list[str]]] = []
        self.timings: Mapping[str, float] = {"generate": 0.25}

    def __call__(self, candidates: Sequence[Candidate], *, split: str) -> list[CandidateScore]:
        if self.before is not None:
            self.before(len(self.calls), split)
        self.calls.append((split, [c.name for c in candidates]))
        return [CandidateScore(items=tuple(self._item(c, split, i) for i in range(ITEMS[split]))) for c in candidates]

    def _item(self, candidate: Candidate, split: str, index: int) -> ItemScore:
        weights = candidate.spec.weights if candidate.spec else {}
        distance = math.sqrt(sum((weights.get(k, 0.0) - v) ** 2 for k, v in TARGET.items()))
        seed = hashlib.sha256(f"{sorted(weights.items())} {split} {index}".encode()).digest()
        noise = float(np.random.default_rng(list(seed)).normal(0, 0.8))
        verdict = (self.spoil and self.spoil(candidate, index)) or Verdict(score=min(5.0, max(1.0, 4.5 - 2 * distance + noise)), judge="toy")
        return ItemScore(item=f"{split}-{index}", prompt=f"prompt {index}", response=f"reply of {distance:.6f}", verdict=verdict)


def template(folder: Path) -> SteeringSpec:
    vectors = folder / "vectors.safetensors"
    vectors.write_bytes(b"vectors")
    return SteeringSpec(vectors=VectorsRef.to(vectors), layers=(1,), alpha=0.5)


def settings(**changes: Any) -> RunSettings:
    base = {"persona": "keeper", "model": "tiny", "judge": "toy", "space": SearchSpace(names=("a", "b", "c")), "budget": 50, "seed": 5}
    return RunSettings(**{**base, **changes})


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def start(
    tmp_path: Path, objective: Toy | None = None, name: str = "run", progress: Callable[[Generation], None] | None = None, **changes: Any
) -> OptimizeResult:
    return optimize(objective or Toy(), template(tmp_path), settings(**changes), out=tmp_path / name, progress=progress)


def test_every_generation_is_one_call_and_each_later_split_is_touched_once(tmp_path: Path) -> None:
    objective = Toy()
    result = start(tmp_path, objective)
    splits = [split for split, _ in objective.calls]
    assert splits == ["tune"] * 7 + ["validate", "test"]  # 50 evaluations are 7 whole generations of 7
    assert objective.calls[2][1] == [f"g2c{i}" for i in range(7)]
    assert len(objective.calls[-2][1]) == 4
    assert objective.calls[-2][1][-1] == "incumbent"
    assert objective.calls[-1][1] == ["optimised", "unsteered"]
    assert result.generations[-1].evaluated == result.generations[-1].planned == 49


@pytest.mark.parametrize("optimizer", ["cma_es", "random_search"])
def test_the_spec_that_is_found_beats_the_unsteered_model_on_fresh_items(tmp_path: Path, optimizer: str) -> None:
    result = start(tmp_path, optimizer=optimizer, budget=140)
    assert result.test.mean is not None
    assert result.unsteered.mean is not None
    assert result.test.mean > result.unsteered.mean + 0.3
    assert SteeringSpec.load(result.spec_path).digest == result.best.digest
    assert result.spec_path.read_text().count("keeper") == 1


def test_the_optimism_gap_is_the_best_tuning_score_less_the_fresh_one(tmp_path: Path) -> None:
    result = start(tmp_path, optimizer="random_search", budget=140)
    best = max(f for line in lines(tmp_path / "run", "generation") for f in line["fitness"])
    assert result.tune.mean == best == result.generations[-1].best
    assert result.test.mean is not None
    assert result.validate.mean is not None
    assert result.optimism_test.gap == best - result.test.mean
    assert result.optimism_validate.gap == best - result.validate.mean
    assert result.optimism_test.standard_error == pytest.approx(math.hypot(result.tune.standard_error or 0, result.test.standard_error or 0))


def test_the_validation_split_chooses(tmp_path: Path) -> None:
    result = start(tmp_path)
    data = json.loads(result.result_path.read_text())
    means = {name: arm["estimate"]["mean"] for name, arm in data["validate"]["arms"].items()}
    assert result.chosen == data["chosen"]["name"] == max(means, key=lambda n: means[n])
    assert result.validate.mean == means[result.chosen]


def test_the_result_holds_paired_scores_by_item_for_every_arm(tmp_path: Path) -> None:
    arms = [Candidate(name="prompted", system="Be a keeper."), Candidate(name="equal", spec=template(tmp_path).with_weights({"a": 0.3}))]
    result = optimize(Toy(), template(tmp_path), settings(), out=tmp_path / "run", arms=arms)
    test = json.loads(result.result_path.read_text())["test"]
    assert [i["item"] for i in test["items"]] == [f"test-{i}" for i in range(15)]
    assert list(result.test_scores) == ["optimised", "unsteered", "prompted", "equal"]
    assert set(test["arms"]) == set(result.test_scores)
    for name, arm in test["arms"].items():
        assert arm["scores"] == result.test_scores[name].scores
        assert len(arm["responses"]) == 15
    assert test["arms"]["unsteered"]["digest"] is None
    assert test["arms"]["prompted"]["system"] == "Be a keeper."


def test_the_log_says_what_was_evaluated_and_how_long_it_took(tmp_path: Path) -> None:
    start(tmp_path)
    header = json.loads((tmp_path / "run" / LOG_NAME).read_text().split("\n")[0])
    assert header["template_digest"] == template(tmp_path).digest
    assert len(header["optimizer_digest"]) == 64
    line = lines(tmp_path / "run", "generation")[3]
    assert (line["generation"], line["seed"], line["missing"], len(line["points"])) == (3, 5, 0, 7)
    assert line["candidates"][0]["weights"] == dict(zip(("a", "b", "c"), line["points"][0], strict=True))
    assert line["fitness"][0] == pytest.approx(np.mean([i["score"] for i in line["scores"][0]["items"]]))
    assert line["scores"][0]["items"][0].keys() >= {"item", "prompt", "response", "length", "score", "missing"}
    assert line["seconds"]["total"] >= 0
    assert line["seconds"]["generate"] == 0.25


def test_progress_shows_each_generation(tmp_path: Path) -> None:
    seen: list[Generation] = []
    result = start(tmp_path, progress=seen.append)
    assert tuple(seen) == result.generations
    assert [g.index for g in seen] == list(range(7))
    assert [g.best for g in seen] == sorted(g.best for g in seen)
    assert all(g.verdicts == 7 * 12 and not g.replayed for g in seen)


@pytest.mark.parametrize("optimizer", ["cma_es", "random_search"])
def test_a_run_cut_off_after_any_call_ends_with_the_same_files(tmp_path: Path, optimizer: str) -> None:
    unbroken = start(tmp_path, optimizer=optimizer, name="unbroken")
    calls = 9

    def interrupt_at(last: int) -> Callable[[int, str], None]:
        def before(number: int, split: str) -> None:
            if number == last:
                raise KeyboardInterrupt

        return before

    for last in range(calls):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, Toy(before=interrupt_at(last)), name=f"cut{last}", optimizer=optimizer)
        rest = Toy()
        resumed = start(tmp_path, rest, name=f"cut{last}", optimizer=optimizer)
        assert len(rest.calls) == calls - last
        assert [g.replayed for g in resumed.generations] == [i < last for i in range(7)]
        assert resumed.spec_path.read_bytes() == unbroken.spec_path.read_bytes()
        assert resumed.result_path.read_bytes() == unbroken.result_path.read_bytes()


def test_a_finished_run_is_read_from_its_log_without_evaluating(tmp_path: Path) -> None:
    first = start(tmp_path)
    log = (tmp_path / "run" / LOG_NAME).read_bytes()
    again = Toy()
    second = start(tmp_path, again)
    assert again.calls == []
    assert (tmp_path / "run" / LOG_NAME).read_bytes() == log
    assert (second.best, second.test, second.chosen) == (first.best, first.test, first.chosen)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_driver import Toy, start

folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])

def before(number, split):
    if number == stop_at:
        (folder / "reached").touch()
        time.sleep(600)

start(folder, Toy(before=before), name="killed")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("stop_at", [4, 8])
def test_a_run_killed_in_the_middle_of_an_evaluation_ends_like_an_unbroken_one(tmp_path: Path, stop_at: int) -> None:
    unbroken = start(tmp_path, name="unbroken")
    code = KILLED.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(stop_at)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    log = tmp_path / "killed" / LOG_NAME
    assert not (tmp_path / "killed" / "best_spec.yaml").exists()
    with log.open("ab") as handle:
        handle.write(b'{"kind":"generation","generation":')  # a kill may also tear the line that is being written
    resumed = start(tmp_path, name="killed")
    assert sum(g.replayed for g in resumed.generations) == min(stop_at, 7)
    assert resumed.spec_path.read_bytes() == unbroken.spec_path.read_bytes()
    assert resumed.result_path.read_bytes() == unbroken.result_path.read_bytes()


def test_an_optimiser_that_does_not_replay_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "drift.py"
    file.write_text(
        "import time\nimport numpy as np\n"
        "class Drift:\n"
        "    should_stop = False\n"
        "    def __init__(self, n): self.n, self.draws = n, np.random.default_rng(time.time_ns())\n"
        "    def ask(self): return self.draws.uniform(-1, 1, (4, self.n))\n"
        "    def tell(self, population, fitness): pass\n"
        "def make(space, seed): return Drift(space.dimension)\n"
    )
    start(tmp_path, optimizer=str(file), budget=8)
    with pytest.raises(RunError, match="generation 0 asks for other points than were logged"):
        start(tmp_path, optimizer=str(file), budget=8)


def test_too_many_missing_verdicts_stop_the_run_and_it_goes_on_once_the_judge_is_mended(tmp_path: Path) -> None:
    unbroken = start(tmp_path, name="unbroken")
    failing = Toy()

    def spoil(candidate: Candidate, index: int) -> Verdict | None:
        return Verdict(missing="HTTP 500", judge="toy") if len(failing.calls) == 3 and index < 6 else None

    failing.spoil = spoil
    with pytest.raises(JudgeError, match=r"42 of 84 verdicts are missing \(50%; limit 20%\)\. Commonest reasons: 42 x HTTP 500"):
        start(tmp_path, failing)
    assert len(lines(tmp_path / "run", "generation")) == 2
    (stopped,) = lines(tmp_path / "run", "stopped")
    assert (stopped["generation"], stopped["missing"]) == (2, 42)
    resumed = start(tmp_path)
    assert resumed.result_path.read_bytes() == unbroken.result_path.read_bytes()


def test_a_candidate_with_few_scores_left_has_no_fitness_and_cannot_win(tmp_path: Path) -> None:
    def spoil(candidate: Candidate, index: int) -> Verdict | None:
        if not candidate.name.endswith("c2"):
            return None
        return Verdict(score=5, judge="toy") if index == 0 else Verdict(missing="empty response", judge="toy")

    result = start(tmp_path, Toy(spoil=spoil))
    for line in lines(tmp_path / "run", "generation"):
        assert [f is None for f in line["fitness"]] == [False, False, True, False, False, False, False]
    assert result.tune.mean is not None
    assert result.tune.mean < 5
    assert not result.chosen.endswith("c2")


def test_a_few_missing_verdicts_are_left_out_of_the_mean_and_counted(tmp_path: Path) -> None:
    result = start(tmp_path, Toy(spoil=lambda c, i: Verdict(missing="empty response", judge="toy") if i == 0 else None))
    assert (result.test.n, result.test.missing) == (14, 1)
    assert result.generations[0].missing == 7
    arm = json.loads(result.result_path.read_text())["test"]["arms"]["optimised"]
    assert (arm["scores"][0], arm["missing"][0]) == (None, "empty response")


def test_nan_fitness_of_every_candidate_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"every fitness of generation 0 is NaN.*Look at the reasons"):
        start(tmp_path, Toy(spoil=lambda c, i: Verdict(missing="empty response", judge="toy")), missing_limit=1.0)
    assert len(lines(tmp_path / "run", "stopped")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget=0 allows no evaluation"),
        ({"budget": -5}, "budget=-5 allows no evaluation"),
        ({"budget": 6}, r"budget=6 is smaller than one population of cma_es \(7\)\. Allowed: 7 or more"),
        ({"finalists": 0}, "finalists=0"),
        ({"space": SearchSpace(names=())}, "one or more distinct trait names"),
        ({"space": SearchSpace(names=("a", "a"))}, "one or more distinct trait names"),
        ({"space": SearchSpace(names=("a", "b"), low=1, high=1)}, "low must be below high"),
        ({"optimizer": "cma"}, "Did you mean 'cma_es'"),
        ({"optimizer_options": {"sigma": 1}}, "Allowed: .*sigma0"),
    ],
)
def test_settings_that_make_no_run_are_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_a_template_without_vectors_and_arms_with_taken_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="template has no vectors or no layers"):
        optimize(Toy(), SteeringSpec(), settings(), out=tmp_path / "run")
    with pytest.raises(RunError, match="names repeat"):
        optimize(Toy(), template(tmp_path), settings(), out=tmp_path / "run", arms=[Candidate(name="unsteered")])


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(RunError, match="seed: 5 there, 6 now"):
        start(tmp_path, seed=6)
    with pytest.raises(RunError, match="arms.prompted: nothing there"):
        optimize(Toy(), template(tmp_path), settings(), out=tmp_path / "run", arms=[Candidate(name="prompted", system="x")])
    (tmp_path / "vectors.safetensors").write_bytes(b"others")
    other = SteeringSpec(vectors=VectorsRef.to(tmp_path / "vectors.safetensors"), layers=(1,), alpha=0.5)
    with pytest.raises(RunError, match="template_digest"):
        optimize(Toy(), other, settings(), out=tmp_path / "run")


class Uneven(Toy):
    def __call__(self, candidates: Sequence[Candidate], *, split: str) -> list[CandidateScore]:
        first, *others = super().__call__(candidates, split=split)
        return [CandidateScore(items=first.items[1:]), *others]


class Short(Toy):
    def __call__(self, candidates: Sequence[Candidate], *, split: str) -> list[CandidateScore]:
        return super().__call__(candidates[1:], split=split)


def test_an_objective_that_scores_candidates_on_different_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="different items"):
        start(tmp_path, Uneven())
    with pytest.raises(RunError, match="returned 6 scores for 7 candidates"):
        start(tmp_path, Short(), name="short")


def test_importing_the_search_loads_numpy_but_no_model_library() -> None:
    heavy = ("torch", "transformers", "lm_eval", "inspect_ai", "sklearn", "cma", "openai")
    code = f"import sys, steered_lm.search.driver; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
