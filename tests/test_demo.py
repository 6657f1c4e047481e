"""The demo from end to end, with a small budget."""

import json

import pytest
from rich.console import Console

from steered_lm.demo import DemoConfig, run_demo
from steered_lm.steering.spec import SteeringSpec

ARMS = [
    "unsteered",
    "optimised by cma_es",
    "optimised by random_search",
    "prompted persona",
    "equal weights",
    "random direction",
    "unsteered, sampled",
    "unsteered, sampled again",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = DemoConfig(out=tmp_path_factory.mktemp("demo"), persona="walt", budget=16, pairs=32, held_out_pairs=20)
    console = Console(width=160, record=True)
    return config, run_demo(config, console), console.export_text()


def test_every_arm_is_scored_on_the_same_held_out_items(finished):
    _, files, _ = finished
    data = json.loads(files.json.read_text())["data"]
    assert [a["name"] for a in data["arms"]] == ARMS
    assert {len(a["scores"]) for a in data["arms"]} == {len(data["items"])}
    assert len(data["items"]) >= 9
    assert {t["name"] for t in data["capability"]} == {"tiny_knowledge", "tiny_truth"}
    assert [s["optimizer"] for s in data["searches"]] == ["cma_es", "random_search"]
    assert all(s["generations"][-1]["evaluations"] == 16 for s in data["searches"])


def test_controls_are_as_long_as_the_optimised_vector(finished):
    config, files, _ = finished
    from steered_lm.arms import added_norms, equal_weights, random_direction
    from steered_lm.study import Study, StudyConfig

    (vectors,) = config.out.glob("*.safetensors")
    study = Study(StudyConfig(persona="walt", vectors=vectors, alpha=config.alpha))
    best = SteeringSpec.load(files.html.parent / "cma_es" / "best_spec.yaml")
    norms = added_norms(study, best)
    assert added_norms(study, equal_weights(study, best)) == pytest.approx(norms, rel=1e-4)
    assert added_norms(study, random_direction(study, best, files.html.parent, seed=3)) == pytest.approx(norms, rel=1e-4)


def test_the_null_arm_compares_the_unsteered_model_with_itself(finished):
    _, files, _ = finished
    (null,) = json.loads(files.json.read_text())["analysis"]["null"]
    assert (null["arm"], null["baseline"]) == ("unsteered, sampled again", "unsteered, sampled")


def test_the_terminal_ends_in_a_table_a_verdict_and_the_paths(finished):
    _, files, shown = finished
    assert "Mean persona fit (1-5) on held-out prompts" in shown
    assert str(files.html.resolve()) in shown


def test_a_second_run_reuses_everything_and_gives_the_same_numbers(finished):
    config, files, _ = finished
    before = json.loads(files.json.read_text())["analysis"]
    console = Console(width=160, record=True)
    run_demo(config, console)
    assert "replayed" in console.export_text()
    assert json.loads(files.json.read_text())["analysis"] == before
