"""Training and measuring an experiment's models: nothing is done twice, and what fails is shown and stops nothing else."""

import gc
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from fake_training import FakeBackend, environment, load, register, write_experiment
from fault_server import FaultServer, says

from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.errors import JudgeError
from steered_lm.judges.traits import TraitError
from steered_lm.report.trait_models import write_results
from steered_lm.trait_models import store as store_module
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.registry import make_backend
from steered_lm.trait_models.store import Store
from steered_lm.trait_models.workflow import cancel, evaluate, results, status, train, used_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own use of transformers
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
THREE = {"calm": ("humorous", "baseline"), "wry": ("humorous", "mild"), "clown": ("humorous", "severe")}


def groups(states):
    return {state.model.name: state.group for state in states}


def train_now(file, **settings):
    """Train with pauses that are not slept through, and return states and backend."""
    experiment, backend = load(file)
    return train(experiment, backend=backend, sleep=lambda seconds: time.sleep(0.01), **settings), backend


# -- training -----------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_trained_and_a_second_call_starts_nothing(tmp_path):
    file = write_experiment(tmp_path, THREE)
    states, backend = train_now(file)
    assert groups(states) == dict.fromkeys(THREE, "succeeded")
    assert sorted(backend.started()) == sorted(THREE)
    again, backend = train_now(file)
    assert [state.trained for state in again] == [state.trained for state in states]
    assert len(backend.started()) == 3


def test_no_more_jobs_run_at_a_time_than_the_backend_or_the_experiment_allows(tmp_path):
    models = {f"m{number}": ("humorous", "mild") for number in range(5)}
    for parallel, options in ((None, {"parallel": 3, "seconds": 0.5}), (1, {"parallel": 3, "seconds": 0.1})):
        folder = tmp_path / str(parallel)
        file = write_experiment(folder, models, options=options, **({} if parallel is None else {"parallel": parallel}))
        most = []
        states, _ = train_now(file, show=lambda states, most=most: most.append(sum(state.group == "running" for state in states)))
        assert groups(states) == dict.fromkeys(models, "succeeded")
        assert max(most) == (parallel or 3)


def test_one_models_failure_is_shown_stops_no_other_and_is_tried_again_by_the_next_call_alone(tmp_path):
    file = write_experiment(tmp_path, THREE, options={"script": {"wry": ["out of memory", None]}})
    states, backend = train_now(file)
    assert groups(states) == {"calm": "succeeded", "wry": "failed", "clown": "succeeded"}
    assert states[1].error == "out of memory"
    assert backend.started().count("wry") == 1
    experiment, backend = load(file)
    assert groups(status(experiment, backend=backend)) == {"calm": "succeeded", "wry": "failed", "clown": "succeeded"}
    states, backend = train_now(file)
    assert groups(states) == dict.fromkeys(THREE, "succeeded")
    assert sorted(backend.started()) == ["calm", "clown", "wry", "wry"]


def test_a_job_that_cannot_be_submitted_is_a_failure_of_that_model(tmp_path):
    states, backend = train_now(write_experiment(tmp_path, THREE, options={"unsubmittable": ["calm"]}))
    assert groups(states) == {"calm": "failed", "wry": "succeeded", "clown": "succeeded"}
    assert states[0].error == "the service says no."
    assert sorted(backend.started()) == ["clown", "wry"]


def test_without_waiting_what_finds_a_place_is_submitted_and_later_calls_go_on(tmp_path):
    file = write_experiment(tmp_path, THREE, options={"seconds": {"calm": 600, "wry": 600}, "parallel": 2})
    states, backend = train_now(file, wait=False)
    assert groups(states) == {"calm": "running", "wry": "running", "clown": "not submitted"}
    assert [state.detail for state in states] == ["step 1/2", "step 1/2", ""]
    states, backend = train_now(file, wait=False)
    assert len(backend.started()) == 2
    for job in tmp_path.rglob("fake.json"):
        job.write_text(json.dumps({**json.loads(job.read_text()), "ends": 0.0}))
    experiment, backend = load(file)
    assert groups(status(experiment, backend=backend)) == {"calm": "succeeded", "wry": "succeeded", "clown": "not submitted"}
    states, backend = train_now(file)
    assert groups(states) == dict.fromkeys(THREE, "succeeded")
    assert sorted(backend.started()) == sorted(THREE)


def test_status_writes_nothing(tmp_path):
    file = write_experiment(tmp_path, THREE)
    experiment, backend = load(file)
    assert groups(status(experiment, backend=backend)) == dict.fromkeys(THREE, "not submitted")
    assert not (tmp_path / "cache").exists()
    train_now(file, wait=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert groups(status(experiment, backend=backend)) == {"calm": "succeeded", "wry": "succeeded", "clown": "not submitted"}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_a_job_that_cannot_be_asked_after_is_left_running_and_found_again(tmp_path):
    file = write_experiment(tmp_path, THREE, options={"parallel": 1})
    experiment, backend = load(file)
    backend.unreachable = {"calm"}
    states = train(experiment, backend=backend, sleep=lambda seconds: None)
    assert groups(states) == {"calm": "running", "wry": "not submitted", "clown": "not submitted"}
    assert states[0].error == "the backend cannot be asked: no answer."
    states, backend = train_now(file)
    assert groups(states) == dict.fromkeys(THREE, "succeeded")
    assert sorted(backend.started()) == sorted(THREE)


def test_a_job_that_its_service_does_not_know_has_failed(tmp_path):
    experiment, backend = load(write_experiment(tmp_path, THREE, options={"parallel": 3}))
    backend.forgotten = {"calm"}
    states = train(experiment, backend=backend, sleep=lambda seconds: None)
    assert groups(states) == {"calm": "failed", "wry": "succeeded", "clown": "succeeded"}
    assert states[0].error == "there is no such job."


def test_models_of_the_same_data_and_settings_are_trained_once(tmp_path):
    file = write_experiment(tmp_path, {"one": ("humorous", "baseline"), "two": ("humorous", "baseline")})
    (tmp_path / "data" / "two.jsonl").write_text((tmp_path / "data" / "one.jsonl").read_text())
    states, backend = train_now(file)
    assert groups(states) == {"one": "succeeded", "two": "succeeded"}
    assert backend.started() == ["one"]


@pytest.mark.parametrize("change", ["data", "rate", "version", "name"])
def test_changed_data_settings_or_library_train_anew_and_another_name_does_not(tmp_path, change):
    one = {"calm": THREE["calm"]}
    train_now(write_experiment(tmp_path, one))
    if change == "rate":
        file = write_experiment(tmp_path, one, hyperparameters={"learning_rate": 0.5})
    elif change == "version":
        file = write_experiment(tmp_path, one, options={"version": 2})
    else:
        file = write_experiment(tmp_path, one)
    if change == "data":
        data = tmp_path / "data" / "calm.jsonl"
        data.write_text(2 * data.read_text())
    if change == "name":
        file.write_text(file.read_text().replace("name: calm", "name: other"))
    _, backend = train_now(file)
    assert len(backend.started()) == (1 if change == "name" else 2)


def test_every_model_is_checked_before_any_is_submitted_and_all_problems_are_named(tmp_path):
    file = write_experiment(tmp_path, THREE, options={"refused": ["wry", "clown"]})
    with pytest.raises(ExperimentError, match="2 of 3 models cannot be used; nothing was submitted:\n- wry: model wry is refused.\n- clown: model"):
        train_now(file)
    file = write_experiment(tmp_path, THREE, dataset_options={"cache_dir": "cache", "sample_size": 1, "folder": "nowhere"})
    with pytest.raises(ExperimentError, match="^every model: dataset_options.folder='.*nowhere' does not exist"):
        train_now(file)
    file = write_experiment(tmp_path, THREE)
    (tmp_path / "data" / "clown.jsonl").write_text("")
    with pytest.raises(ExperimentError, match="models clown: .*clown.jsonl' is empty"):
        train_now(file)
    file = write_experiment(tmp_path, THREE, evaluation={"tasks": ["humorou"]})
    with pytest.raises(TraitError, match="Did you mean 'humorous'"):
        train_now(file)
    assert not (tmp_path / "started.txt").exists()


def test_cancelled_jobs_are_shown_as_failed_and_trained_by_the_next_call(tmp_path):
    file = write_experiment(tmp_path, THREE, options={"seconds": 60, "parallel": 3})
    train_now(file, wait=False)
    experiment, backend = load(file)
    states = cancel(experiment, backend=backend)
    assert [(state.group, state.status) for state in states] == [("failed", "cancelled")] * 3
    file.write_text(file.read_text().replace("seconds: 60", "seconds: 0"))
    states, backend = train_now(file)  # other options are other steps
    assert groups(states) == dict.fromkeys(THREE, "succeeded")


def test_a_lost_adapter_is_a_failure_that_training_mends_and_a_moved_cache_is_none(tmp_path, adapter):
    file = write_experiment(tmp_path, {"calm": THREE["calm"]}, options={"adapter": {"calm": str(adapter)}})
    (state,), _ = train_now(file)
    (tmp_path / "cache").rename(tmp_path / "moved")
    file.write_text(file.read_text().replace("cache_dir: cache", "cache_dir: moved"))
    (moved,), backend = train_now(file)
    assert len(backend.started()) == 1
    assert Path(moved.trained.peft).is_dir()
    assert Path(state.trained.peft).relative_to(tmp_path / "cache") == Path(moved.trained.peft).relative_to(tmp_path / "moved")
    for part in Path(moved.trained.peft).iterdir():
        part.unlink()
    Path(moved.trained.peft).rmdir()
    experiment, backend = load(file)
    (lost,) = status(experiment, backend=backend)
    assert lost.group == "failed"
    assert "is gone. Train again" in lost.error
    (mended,), _ = train_now(file)
    assert Path(mended.trained.peft).is_dir()


def test_unknown_backends_are_named_with_near_misses_and_keys_are_refused():
    with pytest.raises(ExperimentError, match="training.backend='pfet' is not known. Allowed: dummy, .*peft.* Did you mean 'peft'"):
        make_backend("pfet", {})
    with pytest.raises(ExperimentError, match="api_key is not taken"):
        make_backend("openai", {"api_key": "sk-1"})


def test_a_package_of_the_users_may_bring_a_backend(tmp_path, monkeypatch):
    register(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = make_backend("fake", {"log": str(tmp_path / "log")})
    assert isinstance(found, FakeBackend)


# -- measuring ----------------------------------------------------------------------------------------------------------------


def lot(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def trait_rule(response: str):
    """0 to 100; every seventh text is a refusal, and every eleventh gets an answer that cannot be read."""
    number = lot(response)
    return "REFUSAL" if number % 7 == 0 else "well" if number % 11 == 0 else number % 101


@pytest.fixture
def judge():
    def answer(number, body, headers):
        system, user = (message["content"] for message in body["messages"])
        response = json.loads(user)["response"]
        return says({"reason": "by lot", "score": lot(f"{response} coherent") % 101 if "how coherent" in system else trait_rule(response)})

    server = FaultServer(answer)
    server.evaluation = {
        "judge_options": {"base_url": server.url, "key_env": "none", "mode": "json"},
        "metadata": {"missing_limit": 1, "max_gen_toks": 8},
        "limit": 6,
    }
    yield server
    server.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the tiny model that changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(resolve_model(TINY_CHAT))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def collected():
    yield
    gc.collect()  # while this file's filters hold: Inspect's eval() leaves streams behind


def outcomes(found):
    return {(one.model.name, one.task): one.status for one in found}


def test_ready_models_are_measured_once_and_the_others_are_skipped_with_the_reason(tmp_path, judge, adapter):
    options = {"script": {"wry": ["out of memory"]}, "adapter": {"clown": str(adapter)}}
    models = {**THREE, "late": ("evil", "mild")}
    evaluation = {**judge.evaluation, "tasks": ["humorous", "pv_optimistic"]}
    file = write_experiment(tmp_path, models, options=options, evaluation=evaluation)
    experiment, backend = load(file)
    assert set(outcomes(evaluate(experiment, backend=backend)).values()) == {"skipped"}
    assert backend.started() == []
    assert judge.bodies == []
    train(experiment.model_copy(update={"models": experiment.models[:3]}), backend=backend, sleep=lambda seconds: None)
    found = evaluate(experiment, backend=backend)
    wanted = {"calm": "finished", "wry": "skipped", "clown": "finished", "late": "skipped"}
    assert outcomes(found) == {(name, task): status for name, status in wanted.items() for task in ("humorous", "optimistic")}
    reasons = {one.model.name: one.reason for one in found}
    assert reasons == {"calm": None, "wry": "failed: out of memory", "clown": None, "late": "not submitted"}
    assert len(backend.started()) == 3
    asked = len(judge.bodies)
    again = evaluate(experiment, backend=backend)
    assert set(outcomes(again).values()) == {"reused", "skipped"}
    assert len(judge.bodies) == asked

    gathered = results(experiment, backend=backend)
    cells = {(cell.model, cell.task): cell for cell in gathered.cells}
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "evaluate").glob("*/record.json")]
    assert len(records) == 4
    for record in records:
        for item in record["items"]:
            (response,) = item["responses"]
            rule = trait_rule(response)
            assert (item["trait_score"], item["refusals"], item["missing"]) == (
                rule if isinstance(rule, int) else None,
                int(rule == "REFUSAL"),
                int(rule == "well"),
            )
            assert item["coherence"] == lot(f"{response} coherent") % 101
        assert set(record["judges"]) == {"trait", "coherence"}
    assert any(item["trait_score"] is None for record in records for item in record["items"])
    calm, clown = cells["calm", "humorous"], cells["clown", "humorous"]
    assert calm.score.n + calm.score.missing == 6 == len(calm.scores)
    assert calm.scores != clown.scores  # the adapter is used
    assert clown.change.n + clown.change.missing == 6
    assert cells["wry", "humorous"].reason == "failed: out of memory"
    assert cells["late", "optimistic"].score.value is None


def test_both_harnesses_give_the_same_items_for_an_adapter_and_draw_no_bar_of_their_own(tmp_path, judge, adapter, collected, capsys):
    records = {}
    for harness in ("lm-eval", "inspect"):
        folder = tmp_path / harness
        evaluation = {**judge.evaluation, "backend": harness, "tasks": ["humorous", "optimistic"]}
        file = write_experiment(folder, {"clown": THREE["clown"]}, options={"adapter": {"clown": str(adapter)}}, evaluation=evaluation)
        experiment, backend = load(file)
        train(experiment, backend=backend, sleep=lambda seconds: None)
        assert [(one.status, one.reason) for one in evaluate(experiment, backend=backend)] == [("finished", None)] * 2
        found = [json.loads(record.read_text()) for record in (folder / "cache" / "evaluate").glob("*/record.json")]
        records[harness] = {record["items"][0]["id"]: record for record in found}
    assert records["inspect"] == records["lm-eval"]
    assert "Loading weights" not in capsys.readouterr().err
    assert {name: len(record["items"]) for name, record in records["inspect"].items()} == {"humorous-00": 6, "optimistic-00": 6}


@pytest.mark.parametrize("harness", ["lm-eval", "inspect"])
def test_the_sampled_replies_to_a_question_differ_and_are_the_same_again(tmp_path, judge, collected, harness):
    found = []
    for folder in (tmp_path / "one", tmp_path / "again"):
        metadata = {"samples": 3, "max_gen_toks": 12}
        evaluation = {"judge": "markers", "backend": harness, "tasks": ["formality"], "metadata": metadata, "limit": 3}
        experiment, backend = load(write_experiment(folder, {"calm": THREE["calm"]}, evaluation=evaluation))
        train(experiment, backend=backend, sleep=lambda seconds: None)
        assert [(one.status, one.reason) for one in evaluate(experiment, backend=backend)] == [("finished", None)]
        (record,) = (folder / "cache" / "evaluate").glob("*/record.json")
        found.append([item["responses"] for item in json.loads(record.read_text())["items"]])
    assert found[0] == found[1]
    assert [len(set(responses)) for responses in found[0]] == [3, 3, 3]


def test_a_services_model_is_left_to_inspect(tmp_path, judge):
    file = write_experiment(tmp_path, {"calm": THREE["calm"]}, options={"service": {"calm": "openai/ft:m"}}, evaluation=judge.evaluation)
    experiment, backend = load(file)
    train(experiment, backend=backend, sleep=lambda seconds: None)
    (found,) = evaluate(experiment, backend=backend)
    assert (found.status, found.reason) == ("skipped", "only Inspect can ask the service's model 'openai/ft:m'. Set evaluation.backend: inspect")


@pytest.mark.parametrize("known", [True, False])
def test_inspect_asks_a_services_model_by_its_name_where_the_backend_or_else_the_environment_says(tmp_path, judge, collected, monkeypatch, known):
    key = "sk-of-this-service"
    asked = []

    def answer(number, body, headers):
        assert body["model"] == "ft:m"
        asked.append(headers["Authorization"])
        return says("A duck walks in.")

    service = FaultServer(answer)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/nobody" if known else service.url)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong" if known else key)
    monkeypatch.setenv("OTHER_KEY", key)
    options = {"service": {"calm": "openai/ft:m"}, "place": {"base_url": service.url, "key_env": "OTHER_KEY"} if known else {}}
    file = write_experiment(tmp_path, {"calm": THREE["calm"]}, options=options, evaluation={**judge.evaluation, "backend": "inspect"})
    experiment, backend = load(file)
    train(experiment, backend=backend, sleep=lambda seconds: None)
    try:
        (found,) = evaluate(experiment, backend=backend)
    finally:
        service.close()
    assert (found.status, found.reason) == ("finished", None), found.reason
    (cell,) = results(experiment, backend=backend).cells
    assert cell.scores == (float(trait_rule("A duck walks in.")),) * 6
    assert set(asked) == {f"Bearer {key}"}
    for log in (tmp_path / "cache").rglob("*"):
        if log.suffix == ".eval":
            with zipfile.ZipFile(log) as archive:
                assert not any(key.encode() in archive.read(name) for name in archive.namelist())
        else:
            assert log.is_dir() or key.encode() not in log.read_bytes()


def test_a_services_model_without_its_key_is_skipped_and_the_variable_named(tmp_path, judge, monkeypatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    options = {"service": {"calm": "openai/ft:m"}, "place": {"key_env": "OTHER_KEY"}}
    file = write_experiment(tmp_path, {"calm": THREE["calm"]}, options=options, evaluation={**judge.evaluation, "backend": "inspect"})
    experiment, backend = load(file)
    train(experiment, backend=backend, sleep=lambda seconds: None)
    (found,) = evaluate(experiment, backend=backend)
    assert found.status == "skipped"
    assert found.reason.endswith("the environment variable OTHER_KEY is not set")


def test_an_evaluation_that_fails_is_shown_stops_no_other_and_is_tried_again(tmp_path, judge):
    evaluation = {**judge.evaluation, "tasks": ["humorous", "optimistic"], "metadata": {"max_gen_toks": 8, "missing_limit": 0.3}}
    file = write_experiment(tmp_path, {"calm": THREE["calm"]}, evaluation=evaluation)
    experiment, backend = load(file)
    train(experiment, backend=backend, sleep=lambda seconds: None)
    rule, judge.script = judge.script, lambda number, body, headers: says("what?") if "humor" in str(body) else rule(number, body, headers)
    found = evaluate(experiment, backend=backend)
    assert outcomes(found) == {("calm", "humorous"): "failed", ("calm", "optimistic"): "finished"}
    assert "verdicts are missing" in found[0].reason
    assert "verdicts are missing" in next(cell for cell in results(experiment, backend=backend).cells if cell.task == "humorous").reason
    judge.script = rule
    assert outcomes(evaluate(experiment, backend=backend)) == {("calm", "humorous"): "finished", ("calm", "optimistic"): "reused"}


def test_what_is_wrong_with_tasks_or_judge_is_said_before_a_model_is_loaded(tmp_path):
    cases = [
        ({"judge": None}, JudgeError, "needs a judge"),
        ({"judge": "opena:m"}, JudgeError, "there is no judge 'opena'"),
        ({"tasks": ["humorous", "pv_humorous"]}, ExperimentError, "names trait 'humorous' twice"),
        ({"metadata": {"judge": "openai:m"}}, ExperimentError, "evaluation.metadata holds 'judge'"),
        ({"metadata": {"sample": 3}}, TraitError, "sample"),
    ]
    for evaluation, error, said in cases:
        experiment, backend = load(write_experiment(tmp_path, THREE, evaluation=evaluation))
        with pytest.raises(error, match=said):
            evaluate(experiment, backend=backend)


def test_the_steps_that_an_experiment_uses_are_all_that_it_made_and_none_of_another(tmp_path, judge):
    file = write_experiment(tmp_path, THREE, evaluation=judge.evaluation)
    experiment, backend = load(file)
    train(experiment, backend=backend, sleep=lambda seconds: None)
    evaluate(experiment, backend=backend)
    store = Store(experiment.training.dataset_options.cache_dir)
    assert used_steps(experiment, backend=backend) == {info.folder for info in store.steps()}
    assert len(store.steps()) == 6
    other, backend = load(write_experiment(tmp_path, THREE, seed=1, evaluation=judge.evaluation))
    assert not used_steps(other, backend=backend) & {info.folder for info in store.steps()}


# -- several processes, and killed ones -----------------------------------------------------------------------------------------


def command(name: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "steered_lm.cli", "traits", name, str(file)]


def _killed_at(file: Path, write: int, before: bool) -> None:
    """Train, and be killed right before or after a certain file of a step is written."""
    written, real = 0, store_module.write_atomic

    def counted(path, data):
        nonlocal written
        written += 1
        if written == write and before:
            os.kill(os.getpid(), signal.SIGKILL)
        made = real(path, data)
        if written == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    store_module.write_atomic = counted
    train_now(file)


def test_kill_9_before_or_after_any_write_and_start_again_trains_nothing_twice(tmp_path):
    context, killed, write = multiprocessing.get_context("fork"), 0, 0
    ended = {True: False, False: False}
    while not all(ended.values()):
        write += 1
        for before in (True, False):
            folder = tmp_path / f"{write}-{before}"
            file = write_experiment(folder, THREE, options={"script": {"wry": ["out of memory", None]}})
            child = context.Process(target=_killed_at, args=(file, write, before))
            child.start()
            child.join(60)
            ended[before] = child.exitcode == 0
            killed += child.exitcode == -signal.SIGKILL
            assert child.exitcode in (0, -signal.SIGKILL)
            for _ in range(2):
                states, backend = train_now(file)
            assert groups(states) == dict.fromkeys(THREE, "succeeded")
            assert sorted(backend.started()) == ["calm", "clown", "wry", "wry"], (write, before)
    assert killed >= 16


def test_two_processes_on_one_experiment_train_every_model_once(tmp_path):
    register(tmp_path / "site")
    models = {f"m{number}": ("humorous", "mild") for number in range(6)}
    file = write_experiment(tmp_path, models, options={"seconds": 0.3, "parallel": 2})
    said = together(command("train", file), tmp_path / "site")
    assert all("succeeded (6)" in text for text in said)
    assert sorted((tmp_path / "started.txt").read_text().split()) == sorted(models)


def together(arguments: list[str], site: Path) -> list[str]:
    """What two processes print that are started at once."""
    settings = {"env": environment(site), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(arguments, **settings) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


@pytest.mark.slow
def test_two_evaluations_at_a_time_share_the_steps(tmp_path, judge):
    register(tmp_path / "site")
    two = {name: THREE[name] for name in ("calm", "wry")}
    file = write_experiment(tmp_path, two, evaluation={**judge.evaluation, "tasks": ["humorous", "optimistic"]})
    train_now(file)
    said = together(command("evaluate", file), tmp_path / "site")
    counted = [[int(number) for number in re.search(r"(\d+) finished, (\d+) reused, 0 skipped, 0 failed", text).groups()] for text in said]
    assert sum(finished for finished, _ in counted) == 4
    assert sum(reused for _, reused in counted) == 4


@pytest.mark.slow
def test_an_evaluation_that_is_killed_and_started_again_gives_the_same_files(tmp_path, judge, adapter):
    options = {"adapter": {"clown": str(adapter)}}
    evaluation = {**judge.evaluation, "tasks": ["humorous", "optimistic"]}
    register(tmp_path / "site")
    files = {name: write_experiment(tmp_path / name, THREE, options=options, evaluation=evaluation) for name in ("whole", "broken")}
    for file in files.values():
        train_now(file)
    experiment, backend = load(files["whole"])
    evaluate(experiment, backend=backend)
    records = (tmp_path / "broken" / "cache" / "evaluate").glob
    running = subprocess.Popen(command("evaluate", files["broken"]), env=environment(tmp_path / "site"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(records("*/record.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in records("*/record.json")}
    experiment, backend = load(files["broken"])
    assert 2 <= len(kept) < 6, "it was not killed in the middle"
    counted = [one.status for one in evaluate(experiment, backend=backend)]
    assert (counted.count("reused"), counted.count("finished")) == (len(kept), 6 - len(kept))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    written = {}
    for name, file in files.items():
        experiment, backend = load(file)
        written[name] = write_results(results(experiment, backend=backend), tmp_path / name)
    assert written["broken"].json.read_bytes() == written["whole"].json.read_bytes()
    assert written["broken"].html.read_bytes() == written["whole"].html.read_bytes()
    assert all(cell["reason"] is None for cell in json.loads(written["whole"].json.read_text())["cells"])
