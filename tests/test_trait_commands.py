"""``steered-lm traits train | status | evaluate | results | cancel | cache`` as a user meets them."""

import json
import os
import time

import pytest
from fake_training import register, write_experiment
from fault_server import FaultServer, says
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.commands import trait_cache as cache_commands
from steered_lm.commands import trait_models as commands
from steered_lm.errors import UserError
from steered_lm.trait_models.evaluation import detection_tasks
from steered_lm.trait_models.experiment import STRENGTHS, Experiment

MODELS = {"calm": ("humorous", "baseline"), "wry": ("humorous", "mild"), "clown": ("humorous", "severe")}


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    register(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for module in (commands, cache_commands):
        monkeypatch.setattr(module.console, "_width", 240)


@pytest.fixture
def evaluation(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FaultServer(lambda number, body, headers: says({"reason": "by length", "score": 10 + len(body["messages"][-1]["content"]) % 60}))
    options = {"judge_options": {"base_url": server.url, "key_env": "none", "mode": "json"}}
    yield {**options, "metadata": {"max_gen_toks": 8, "missing_limit": 1}, "limit": 5}
    server.close()


def invoke(*arguments, code=0, fails=None):
    done = CliRunner().invoke(cli.app, ["traits", *map(str, arguments)])
    if fails is not None:
        assert isinstance(done.exception, UserError), done.output
        assert fails in str(done.exception)
    else:
        assert done.exit_code == code, (done.output, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.output


def test_an_experiment_goes_from_its_file_to_a_page_by_four_commands(tmp_path, evaluation):
    file = write_experiment(tmp_path, MODELS, evaluation={**evaluation, "tasks": ["humorous", "optimistic"]})
    assert "not submitted (3)\n  calm\n  wry\n  clown\n" in invoke("status", file)
    said = invoke("train", file)
    assert "succeeded (3)\n  calm: calm (loss 1.25)\n" in said
    assert "succeeded (3)" in invoke("status", file)
    said = invoke("evaluate", file)
    assert "clown on optimistic: finished\n6 finished, 0 reused, 0 skipped, 0 failed\n" in said
    assert "it/s" not in said, "a library drew a bar of its own"
    assert "0 finished, 6 reused, 0 skipped, 0 failed" in invoke("evaluate", file)
    said = invoke("results", file, "--out", tmp_path / "out")
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(data["cells"]) == 6
    for cell in data["cells"]:
        assert cell["score"]["n"] == 5
        assert f"{cell['score']['value']:.1f}" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results-01-humorous.png", "results.html", "results.json"]
    assert "DUMMY" not in said + (tmp_path / "out" / "results.html").read_text()


def test_the_example_is_an_experiment_of_three_traits_at_three_strengths(tmp_path):
    file = tmp_path / "mine.yaml"
    assert "wrote" in invoke("example", "persona_vectors", "--out", file)
    experiment = Experiment.load(file)
    traits = ("hallucinating", "evil", "sycophantic")
    assert [(m.trait, m.strength, m.dataset) for m in experiment.models] == [(t, s, f"{s}_{t}") for t in traits for s in STRENGTHS]
    assert [task.name for task in detection_tasks(experiment.evaluation)] == list(traits)
    assert experiment.training.dataset_options.cache_dir == tmp_path / "trait-models"
    invoke("example", "--out", file, fails="exists already")
    invoke("example", "tyni", fails="Did you mean 'tiny'")


def test_dummies_are_marked_in_every_command(tmp_path, evaluation):
    file = write_experiment(tmp_path, MODELS, options={"dummy": True}, evaluation=evaluation)
    assert invoke("train", file).count("DUMMY: nothing was trained") == 3
    assert invoke("status", file).count("DUMMY: nothing was trained") == 3
    assert invoke("evaluate", file).count("DUMMY") == 3
    said = invoke("results", file)
    assert said.count("DUMMY") >= 4
    data = json.loads((tmp_path / "trial-results" / "results.json").read_text())
    assert all(cell["dummy"] for cell in data["cells"])


def test_the_table_of_results_has_no_column_for_what_nothing_judged_and_breaks_between_words(tmp_path):
    file = write_experiment(tmp_path, MODELS, options={"dummy": True}, evaluation={"tasks": ["emotional_tone"], "judge": "markers"})
    said = invoke("results", file)
    assert "coherence" not in said
    assert "emotional" in said
    assert "emotional_tone" not in said


def test_results_before_anything_is_ready_say_what_is_missing(tmp_path):
    file = write_experiment(tmp_path, MODELS, options={"script": {"wry": ["out of memory"]}})
    assert invoke("results", file).count("not submitted") == 3
    invoke("train", file, code=1)
    said = invoke("results", file)
    assert said.count("not evaluated") == 2
    assert "failed: out of memory" in said


def test_a_failed_training_is_shown_and_ends_with_1_and_no_wait_says_what_waits(tmp_path):
    file = write_experiment(tmp_path, MODELS, options={"script": {"wry": ["out of memory", None]}})
    said = invoke("train", file, code=1)
    assert "failed (1)\n  wry: out of memory\n" in said
    assert "succeeded (2)" in said
    assert "Start the same command again" in said
    assert "succeeded (3)" in invoke("train", file)
    slow = write_experiment(tmp_path / "slow", MODELS, options={"seconds": 60, "parallel": 2})
    said = invoke("train", slow, "--no-wait")
    assert "running (2)\n  calm: running 50%: step 1/2\n" in said
    assert "What is not submitted waits for a free place" in said
    assert "failed (2)\n  calm: cancelled\n" in invoke("cancel", slow)


def test_each_change_is_a_line_where_there_is_no_terminal_and_a_table_where_there_is_one(tmp_path, monkeypatch):
    file = write_experiment(tmp_path, MODELS, options={"seconds": 0.2})
    said = invoke("train", file)
    lines = [line for line in said.splitlines() if line.startswith("calm: ")]
    assert lines == ["calm: running", "calm: succeeded"]
    monkeypatch.setattr(commands.console, "_force_terminal", True)
    monkeypatch.setattr(commands.console, "is_interactive", True)
    monkeypatch.setenv("TERM", "xterm")
    said = invoke("train", write_experiment(tmp_path / "two", MODELS, options={"seconds": 0.2}))
    assert "step 1/2" in said
    assert "50%" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("backend: fake", "backend: fak"), "training.backend='fak' is not known"),
        (("trait: humorous", "trait: 7"), "models.0.trait"),
        (("name: wry", "name: calm"), "two models are named 'calm'"),
        (("parallel: 2", "paralel: 2"), "paralel"),
        (("- humorous", "- humorus"), "Did you mean 'humorous'"),
        (("trait: humorous", "trait: humorus"), "model 'calm': trait='humorus' is not known. Did you mean 'humorous'?"),
        (("- humorous", "- steered_mmlu_virology"), "steered-lm cost --peft"),
        (("judge: openai:rule", "judge: opena:rule"), "there is no judge 'opena'"),
        (("judge: openai:rule", "judge: markers"), "They say nothing about trait 'humorous'"),
        (("  judge: openai:rule\n", ""), "needs a judge"),
        (("parallel: 2", "hyperparameters: {lr: 1}"), "Allowed keys in training.hyperparameters: epochs, learning_rate, "),
        (("cache_dir: cache", "cache_dir: data/calm.jsonl"), "calm.jsonl' cannot be written: [Errno"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_before_anything_is_submitted(tmp_path, change, said):
    file = write_experiment(tmp_path, MODELS, parallel=2)
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change))
    invoke("train", file, fails=said)
    assert not (tmp_path / "started.txt").exists()
    invoke("train", tmp_path / "none.yaml", fails="none.yaml' does not exist")


def test_a_judge_whose_key_is_elsewhere_does_not_keep_models_from_being_trained(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = write_experiment(tmp_path, MODELS)
    assert "succeeded (3)" in invoke("train", file)
    assert "cannot be evaluated yet: judge openai:rule needs a key" in caplog.text
    invoke("evaluate", file, fails="OPENAI_API_KEY is not set")


def test_paths_in_the_file_are_taken_from_its_folder_wherever_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "base").mkdir()
    (tmp_path / "mine").mkdir()
    questions = {"instruction": [{"pos": "Be gruff.", "neg": "Be kind."}], "questions": ["How are you?"], "eval_prompt": "{question} {answer}"}
    (tmp_path / "mine" / "gruff.json").write_text(json.dumps(questions))
    metadata = {"folder": "mine"}
    file = write_experiment(
        tmp_path, MODELS, base_model="base", evaluation={"tasks": ["mine/gruff.json"], "judge": "panel.yaml", "metadata": metadata}
    )
    found = Experiment.load(file)
    assert found.training.base_model == str(tmp_path / "base")
    assert found.evaluation.tasks == (str(tmp_path / "mine" / "gruff.json"),)
    assert found.evaluation.judge == str(tmp_path / "panel.yaml")
    assert found.evaluation.metadata == {"folder": str(tmp_path / "mine")}
    (task,) = detection_tasks(found.evaluation.model_copy(update={"metadata": {}}))
    assert task.name == "gruff"


def test_an_empty_data_set_is_named_before_anything_is_submitted(tmp_path):
    file = write_experiment(tmp_path, MODELS)
    (tmp_path / "data" / "wry.jsonl").write_text("")
    invoke("train", file, fails="models wry:")
    assert not (tmp_path / "started.txt").exists()


def test_the_cache_is_listed_and_pruned_only_when_told_and_what_is_in_use_stays(tmp_path, evaluation):
    file = write_experiment(tmp_path, MODELS, options={"script": {"wry": ["out of memory"]}}, evaluation=evaluation)
    invoke("train", file, code=1)
    invoke("evaluate", file)
    cache = tmp_path / "cache"
    said = invoke("cache", "list", cache)
    assert "5 steps" in said
    assert "trial/wry" in said
    assert "trial/clown on humorous" in said
    invoke("cache", "prune", cache, fails="prune needs at least one of --older-than, --failed and --config")
    invoke("cache", "prune", cache, "--failed", "--also-used", fails="--also-used needs --config")
    invoke("cache", "list", tmp_path / "nowhere", fails="nowhere' does not exist")
    assert "1 step, " in invoke("cache", "prune", cache, "--failed")
    assert "0 steps" in invoke("cache", "prune", cache, "--failed", "--config", file)
    assert "0 steps" in invoke("cache", "prune", cache, "--older-than", "1h")
    assert "5 steps" in invoke("cache", "list", cache)
    assert "removed 1 of 1 step" in invoke("cache", "prune", cache, "--failed", "--delete")
    assert "succeeded (2)" in invoke("status", file)

    for step in cache.glob("*/*/*.json"):
        os.utime(step, (time.time() - 7200, time.time() - 7200))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other.yaml"  # the same folder of steps, one model less
    text = file.read_text()
    start, end = text.index("- dataset: " + str(tmp_path / "data" / "clown.jsonl")), text.index("name: trial")
    other.write_text(text[:start] + text[end:])
    assert "2 steps" in invoke("cache", "prune", cache, "--older-than", "1h", "--config", other)
    said = invoke("cache", "prune", cache, "--config", other, "--delete")
    assert "trial/clown" in said
    assert "removed 2 of 2 steps" in said
    said = invoke("status", file)
    assert "succeeded (1)\n  calm" in said
    assert "removed 2 of 2 steps" in invoke("cache", "prune", cache, "--config", other, "--also-used", "--delete")
    assert "0 steps" in invoke("cache", "list", cache)
