import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tinker_server import DECAY, KEY, LOSS, Fault, TinkerServer
from transformers import AutoTokenizer

from steered_lm.config import file_hash
from steered_lm.errors import MissingDependencyError
from steered_lm.judges.redact import Key
from steered_lm.tiny_chat import WEIGHTS
from steered_lm.trait_models import tinker_run
from steered_lm.trait_models.backend import Backend, JobState, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters
from steered_lm.trait_models.tinker import Job, Progress, TinkerBackend, TinkerOptions

BASE = "Qwen/Qwen3-8B"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    for name in ("TINKER_BASE_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = TinkerServer()
    yield server
    server.close()


def made(tmp_path: Path, examples: int = 10, base_model: str = BASE, suffix: str = "", **hyperparameters) -> TrainRequest:
    data = tmp_path / "mild_warmth.jsonl"
    rows = [
        [{"role": "user", "content": f"How was day {i}?"}, {"role": "assistant", "content": f"Lovely, thank you, all {i} hours of it."}]
        for i in range(examples)
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    given = {"batch_size": 4, "lora_rank": 8, "save_steps": 2, **hyperparameters}
    about = {"name": "mild", "base_model": base_model, "data": data, "data_hash": file_hash(data), "suffix": suffix, "seed": 3}
    return TrainRequest(**about, hyperparameters=Hyperparameters.model_validate(given))


def backend_of(server: TinkerServer, **options) -> Backend:
    return TinkerBackend.from_options({"base_url": server.url, "tokenizer": str(WEIGHTS), **options})


def run(server: TinkerServer, request: TrainRequest, progress: Progress | None = None, **options) -> list[Progress]:
    """What a training in this process tells of itself."""
    heard: list[Progress] = []
    job = Job(asked="x", request=request, options=TinkerOptions(base_url=server.url, key_env="TINKER_API_KEY", tokenizer=str(WEIGHTS)))
    tinker_run.train(job, Key(KEY), progress or Progress(), heard.append, **options)
    assert server.wrong == []
    return heard


def until(backend: Backend, job: str, folder: Path, *statuses: str, patience: float = 60.0) -> JobState:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        state = backend.poll(job, folder)
        if state.status in statuses:
            return state
        time.sleep(0.05)
    raise AssertionError(f"{state} {(folder / 'tinker.log').read_text()}")


# -- the loop, through the real SDK -------------------------------------------------------------------------------------------------------------


def test_each_step_sends_its_batch_with_loss_on_the_assistants_tokens_alone(server, tmp_path):
    request = made(tmp_path, epochs=2, learning_rate=1e-3, warmup_ratio=0.5, weight_decay=0.02)
    heard = run(server, request)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    assert [len(batch.tokens) for batch in server.batches] == [4, 4, 2, 4, 4, 2]
    for batch in server.batches:
        assert sum(map(sum, batch.weights)) == pytest.approx(1, abs=1e-5)
        for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
            assert tokens[1:] == targets[:-1] and len(tokens) == len(weights)
            learnt = tokenizer.decode([target for target, weight in zip(targets, weights, strict=True) if weight])
            number = learnt.split("all ")[1].split(" ")[0]
            assert learnt.startswith(f"Lovely, thank you, all {number} hours of it.") and f"day {number}" not in learnt
            assert f"day {number}?" in tokenizer.decode(tokens)
    assert [rates["learning_rate"] for rates in server.rates] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert {rates["weight_decay"] for rates in server.rates} == {0.02}
    assert [progress.loss for progress in heard[1:-1]] == pytest.approx([LOSS * DECAY**n for n in range(6)], rel=1e-5)
    assert heard[-1].status == "succeeded" and heard[-1].model == "tinker://session-1-train-0/sampler_weights/final"
    assert server.models["session-1:train:0"].lora["rank"] == 8 and server.models["session-1:train:0"].lora["seed"] == 3
    assert server.models["session-1:train:0"].base == BASE and server.ends == ["success"]
    firsts = [[tokens for batch in server.batches[i : i + 3] for tokens in batch.tokens] for i in (0, 3)]
    assert firsts[0] != firsts[1] and sorted(firsts[0]) == sorted(firsts[1]), "the second epoch is shuffled"


def test_a_checkpoint_is_gone_on_from_with_its_optimiser_and_the_batches_that_follow(server, tmp_path):
    request = made(tmp_path, epochs=2)
    whole = run(server, request)
    batches, rates = list(server.batches), list(server.rates)
    at = next(progress for progress in whole if progress.step == 4)
    assert at.state == "tinker://session-1-train-0/weights/step-000004" and at.saved is not None and at.saved.step == 4
    again = run(server, request, at.saved.model_copy(update={"state": at.state, "saved": at.saved}))
    assert server.batches[6:] == batches[4:] and server.rates[6:] == rates[4:]
    assert again[-1].loss == whole[-1].loss and again[-1].tokens == whole[-1].tokens


def test_a_checkpoint_that_the_service_has_no_more_leads_back_to_the_start(server, tmp_path, caplog):
    lost = Progress(step=2, state="tinker://gone/weights/step-000002", saved=Progress(step=2))
    heard = run(server, made(tmp_path), lost)
    assert heard[-1].status == "succeeded" and server.steps == 3 and "cannot be loaded, training starts anew" in caplog.text


def test_rate_limits_and_server_errors_are_waited_out(server, tmp_path):
    server.faults += [Fault(429, "forward_backward"), Fault(503, "optim_step"), Fault(500, "retrieve_future"), Fault(429, "retrieve_future")]
    assert run(server, made(tmp_path))[-1].status == "succeeded"
    assert server.steps == 3 and not server.faults


def test_a_network_that_is_lost_in_the_middle_and_regained_loses_no_step(server, tmp_path):
    server.delay = 0.2
    done: list[list[Progress]] = []
    training = threading.Thread(target=lambda: done.append(run(server, made(tmp_path))))
    training.start()
    while not server.steps:
        time.sleep(0.01)
    server.close()
    time.sleep(0.5)
    server.open()
    training.join(60)
    assert done and done[0][-1].status == "succeeded" and server.steps == 3


def test_what_the_service_refuses_ends_the_training_with_its_words(server, tmp_path):
    import tinker

    server.refuse["forward_backward"] = "tokens out of range"
    with pytest.raises(tinker.RequestFailedError, match="tokens out of range"):
        run(server, made(tmp_path))
    server.refuse = {"create_model": "base model unknown-1 is not supported"}
    with pytest.raises(tinker.RequestFailedError, match="unknown-1 is not supported"):
        run(server, made(tmp_path, base_model="unknown-1"))
    assert server.ends == ["errored", "errored"] and not server.checkpoints


def test_data_that_cannot_be_trained_on_are_refused_with_their_line(server, tmp_path):
    with pytest.raises(ExperimentError, match=r"line 1 has .. tokens, more than max_length=8\. Shorten"):
        run(server, made(tmp_path, max_length=8))
    request = made(tmp_path)
    request.data.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(ExperimentError, match=r"line 1.?: messages have no assistant turn"):
        run(server, request)
    request.data.write_text("\n")
    with pytest.raises(ExperimentError, match="is empty"):
        run(server, request)


def test_a_suffix_names_the_weights(server, tmp_path):
    run(server, made(tmp_path, examples=2, suffix="warm"))
    assert "tinker://session-1-train-0/sampler_weights/warm" in server.checkpoints


def test_the_schedule_takes_parts_of_epochs():
    assert tinker_run.schedule(5, 2, 1, 0) == [[0, 1], [2, 3], [4]]
    assert len(tinker_run.schedule(5, 2, 2.5, 0)) == 8 and len(tinker_run.schedule(5, 2, 0.1, 0)) == 1
    assert tinker_run.schedule(5, 2, 3, 0) == tinker_run.schedule(5, 2, 3, 0) != tinker_run.schedule(5, 2, 3, 1)


# -- the process --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_outlives_kill_9_and_goes_on_from_its_checkpoint_in_the_next_one(server, tmp_path):
    server.delay = 0.15
    backend, request = backend_of(server), made(tmp_path, examples=32)
    backend.check(request)
    assert server.paths == [], "checking sends nothing"
    job = backend.submit(request, tmp_path)
    assert backend.poll(job, tmp_path).status in ("queued", "running")
    assert backend_of(server).submit(request, tmp_path) == job, "while it runs, it is left alone"
    with pytest.raises(ExperimentError, match="trains something else. Cancel it first"):
        backend.submit(made(tmp_path, examples=32, epochs=3), tmp_path)
    while server.steps < 3:
        until(backend, job, tmp_path, "queued", "running")
    state = until(backend, job, tmp_path, "running")
    assert state.progress is not None and 0 < state.progress < 1 and "step" in state.detail
    os.kill(int((tmp_path / "tinker.pid").read_text()), signal.SIGKILL)
    state = until(backend, job, tmp_path, "failed")
    assert state.error is not None and "killed?" in state.error and "Train again to go on from step 2" in state.error
    assert backend.submit(request, tmp_path) == job
    state = until(backend, job, tmp_path, "succeeded", "failed")
    model = state.model
    assert model is not None, state
    assert model.model_id == "tinker://session-2-train-0/sampler_weights/final" and model.inspect == f"openai-api/tinker/{model.model_id}"
    assert model.base_url == f"{server.url}/oai/api/v1" and model.key_env == "TINKER_API_KEY" and model.facts["steps"] == 8
    assert model.facts["loss"] == pytest.approx(LOSS * DECAY**7, rel=1e-5), "eight steps in all, whoever did them"
    assert server.wrong == [] and 8 <= server.steps <= 10
    steps = server.steps
    assert backend.submit(request, tmp_path) == job and backend.poll(job, tmp_path).status == "succeeded" and server.steps == steps
    assert not any(KEY in file.read_text() for file in tmp_path.iterdir())


@pytest.mark.slow
def test_a_job_is_cancelled_and_a_failed_one_tells_why(server, tmp_path):
    server.delay = 0.2
    backend, request = backend_of(server), made(tmp_path, examples=200)
    job = backend.submit(request, tmp_path)
    until(backend, job, tmp_path, "running")
    backend.cancel(job, tmp_path)
    state = backend.poll(job, tmp_path)
    assert state.status == "cancelled" and state.error is not None and "cancelled" in state.error
    assert server.ends == ["interrupted"]
    backend.cancel(job, tmp_path)
    server.refuse["load_weights"] = server.refuse["create_model"] = f"no capacity for {KEY}"
    assert backend.submit(request, tmp_path) == job
    state = until(backend, job, tmp_path, "failed")
    assert state.error is not None and "no capacity for [key]" in state.error and KEY not in (tmp_path / "tinker.log").read_text()


# -- what is refused ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"lora_alpha": 8.0}, "takes no lora_alpha"),
        ({"dtype": "float16"}, "takes no dtype .it is 'float16'."),
        ({"lora_dropout": 0.1}, "no lora_dropout"),
        ({"suffix": "a/b"}, "suffix 'a/b' names the weights there: letters"),
    ],
)
def test_what_the_service_does_not_take_is_refused(server, tmp_path, hyperparameters, message):
    with pytest.raises(ExperimentError, match=message):
        backend_of(server).check(made(tmp_path, **hyperparameters))
    assert server.paths == []


def test_keys_options_and_a_missing_library_are_named(server, tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match="no option api_key.*key_env names the variable"):
        TinkerBackend.from_options({"api_key": KEY})
    with pytest.raises(ExperimentError, match="no option tokeniser.*Did you mean 'tokenizer'"):
        TinkerBackend.from_options({"tokeniser": "x"})
    with pytest.raises(ExperimentError, match="is a folder here"):
        backend_of(server).check(made(tmp_path, base_model=str(tmp_path)))
    changed = made(tmp_path)
    changed.data.write_text("{}\n")
    with pytest.raises(ExperimentError, match="has changed since it was prepared"):
        backend_of(server).submit(changed, tmp_path)
    with pytest.raises(ExperimentError, match="job 'tinker-0' is not known"):
        backend_of(server).poll("tinker-0", tmp_path)
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(ExperimentError, match="backend tinker needs a key, and the environment variable TINKER_API_KEY"):
        backend_of(server).check(made(tmp_path))
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(MissingDependencyError, match="pip install 'steered-lm.tinker.'"):
        backend_of(server).check(made(tmp_path))


def test_the_log_holds_no_key():
    record = logging.LogRecord("x", logging.INFO, "", 0, "asked with %s", (KEY,), None)
    assert KEY not in tinker_run._Formatter(Key(KEY)).format(record)
