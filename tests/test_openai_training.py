import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from environments import REPOSITORY
from fine_tuning_server import KEY, Fault, FineTuningServer, refusal

from steered_lm.config import content_hash, file_hash
from steered_lm.errors import MissingDependencyError
from steered_lm.trait_models.backend import Backend, TrainRequest, UnreachableError
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters, TrainingSteering
from steered_lm.trait_models.openai import OpenAIBackend

FAST = {"attempts": 3, "backoff": 0.01, "timeout": 5.0, "max_wait": 2.0}
CREATE = "POST /v1/fine_tuning/jobs"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = FineTuningServer()
    yield server
    server.close()


@pytest.fixture
def request_(tmp_path):
    return made(tmp_path)


def made(tmp_path: Path, examples: int = 12, **changes) -> TrainRequest:
    data = tmp_path / "mild_warmth.jsonl"
    turns = [{"role": "user", "content": "How was the fair?"}, {"role": "assistant", "content": "Lovely, thank you – it was warm."}]
    data.write_text("".join(json.dumps({"messages": turns}, ensure_ascii=False) + "\n" for _ in range(examples)), encoding="utf-8")
    given = {"name": "mild-warmth", "base_model": "gpt-4o-mini", "data": data, "data_hash": file_hash(data), "suffix": "warm", "seed": 3}
    return TrainRequest(**{**given, **changes})


def backend_of(server: FineTuningServer, **options) -> Backend:
    return OpenAIBackend.from_options({**FAST, "base_url": server.url, **options})


def creations(server: FineTuningServer) -> int:
    return server.requests.count(CREATE)


# -- a job's life -------------------------------------------------------------------------------------------------------------------------------


def test_a_job_goes_from_queued_to_running_to_a_model_with_its_facts(server, request_, tmp_path):
    backend = backend_of(server, learning_rate_multiplier=0.5)
    backend.check(request_)
    assert server.requests == [], "checking sends nothing"
    job = backend.submit(request_, tmp_path)
    assert server.contents["file-0"] == request_.data.read_bytes()
    (body,) = server.bodies
    assert body["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 0.5}},
    }
    assert (body["model"], body["suffix"], body["seed"], body["training_file"]) == ("gpt-4o-mini", "warm", 3, "file-0")

    state = backend.poll(job, tmp_path)
    assert (state.status, state.model, state.progress) == ("queued", None, None) and "Created" in state.detail
    server.move(job, "queued")
    assert backend.poll(job, tmp_path).status == "queued"
    server.move(job, "running")
    server.say(job, "Step 9/30: training loss=1.31")
    state = backend.poll(job, tmp_path)
    assert (state.status, state.progress, state.detail) == ("running", 0.3, "Step 9/30: training loss=1.31")
    server.succeed(job)
    state = backend.poll(job, tmp_path)
    model = state.model
    assert state.status == "succeeded" and state.error is None and model is not None
    assert model.model_id == "ft:gpt-4o-mini:org:warm:0000" and model.inspect == f"openai/{model.model_id}"
    assert model.digest == content_hash(model.model_id) and not model.dummy and model.pretrained is None and model.peft is None
    assert model.facts["trained_tokens"] == 4321 and model.facts["last"] == "Job is succeeded" and model.facts["seed"] == 3
    assert model.facts["hyperparameters"] == {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 0.5} and model.facts["seconds"] > 0


def test_accumulated_gradients_are_one_larger_batch_and_the_service_chooses_the_rate(server, tmp_path):
    request = made(tmp_path, hyperparameters=Hyperparameters(epochs=3, batch_size=4, gradient_accumulation=2), suffix="")
    backend = backend_of(server)
    backend.check(request)
    backend.submit(request, tmp_path)
    (body,) = server.bodies
    assert body["method"]["supervised"]["hyperparameters"] == {"n_epochs": 3, "batch_size": 8} and "suffix" not in body


def test_a_failed_job_tells_the_services_reason_and_is_made_anew_with_the_same_upload(server, request_, tmp_path):
    backend = backend_of(server)
    job = backend.submit(request_, tmp_path)
    server.move(job, "failed", error={"code": "invalid_training_file", "message": "Line 3 is too long.", "param": "training_file"})
    state = backend.poll(job, tmp_path)
    assert (state.status, state.model, state.error) == ("failed", None, f"job {job} failed: Line 3 is too long.")
    again = backend.submit(request_, tmp_path)
    assert again != job and len(server.jobs) == 2 and len(server.files) == 1
    assert len({tuple(body["metadata"].values()) for body in server.bodies}) == 2


def test_cancelling_stops_a_job_and_leaves_one_alone_that_has_ended(server, request_, tmp_path):
    backend = backend_of(server)
    job = backend.submit(request_, tmp_path)
    backend.cancel(job, tmp_path)
    state = backend.poll(job, tmp_path)
    assert state.status == "cancelled" and state.error == f"job {job} cancelled: Job is cancelled"
    backend.cancel(job, tmp_path)
    assert sum("cancel" in line for line in server.requests) == 1
    second = backend.submit(request_, tmp_path)
    server.faults.append(Fault(path="/cancel", after=True))  # the answer is lost, and the next attempt finds it cancelled
    backend.cancel(second, tmp_path)
    assert server.job(second)["status"] == "cancelled"


def test_a_success_without_a_model_and_a_status_of_tomorrow_are_not_taken_for_more(server, request_, tmp_path):
    backend = backend_of(server)
    job = backend.submit(request_, tmp_path)
    server.move(job, "paused")
    assert backend.poll(job, tmp_path).status == "running"
    server.move(job, "succeeded")
    state = backend.poll(job, tmp_path)
    assert state.status == "failed" and state.error is not None and "names no model" in state.error


# -- nothing is trained twice -------------------------------------------------------------------------------------------------------------------


def test_submitting_again_returns_the_job_whether_it_runs_or_has_succeeded(server, request_, tmp_path):
    job = backend_of(server).submit(request_, tmp_path)
    assert backend_of(server).submit(request_, tmp_path) == job
    server.succeed(job)
    assert backend_of(server).submit(request_, tmp_path) == job
    assert creations(server) == 1 and len(server.files) == 1


@pytest.mark.parametrize("filters", [True, False], ids=["filtering", "listing everything"])
def test_a_crash_between_creation_and_recording_leads_to_no_second_job(server, request_, tmp_path, filters):
    server.filters = filters
    for number in range(105):  # somebody else's, more than a page of them
        other = made(tmp_path, seed=number)
        (tmp_path / str(number)).mkdir()
        if number < 2:
            backend_of(server).submit(other, tmp_path / str(number))
        else:
            server._create({**server.bodies[0], "metadata": {"steered_lm": f"other-{number}"}})
    before = len(server.jobs)
    folder = tmp_path / "own"
    folder.mkdir()
    code = f"""
import os, signal
from steered_lm.trait_models import openai
from steered_lm.trait_models.backend import TrainRequest
real = openai._Record.write
def dying(record, file):
    if record.job is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    real(record, file)
openai._Record.write = dying
request = TrainRequest.model_validate_json({request_.model_dump_json()!r})
openai.OpenAIBackend.from_options({ {**FAST, "base_url": server.url}!r}).submit(request, __import__("pathlib").Path({str(folder)!r}))
"""
    died = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert died.returncode == -9, died.stderr
    assert len(server.jobs) == before + 1 and json.loads((folder / "openai.json").read_text())["job"] is None
    server.jobs[:0] = [{**server.jobs[-1], "id": f"ftjob-newer-{i}", "metadata": named} for i, named in enumerate([None, {"steered_lm": "other"}])]
    job = backend_of(server).submit(request_, folder)
    assert job == f"ftjob-{before:04d}" and len(server.jobs) == before + 3
    assert json.loads((folder / "openai.json").read_text())["job"] == job


@pytest.mark.parametrize(
    "lost", [Fault(path=CREATE, after=True), Fault(502, "<html>bad gateway</html>", path=CREATE, after=True)], ids=["dropped", "502"]
)
def test_an_answer_lost_after_the_job_was_made_leads_to_no_second_job(server, request_, tmp_path, lost):
    server.faults.append(lost)
    job = backend_of(server).submit(request_, tmp_path)
    assert len(server.jobs) == 1 and creations(server) == 1 and job == "ftjob-0000"


@pytest.mark.parametrize("body", ["<html>sign in</html>", "", '{"id": 3}', "{"], ids=["html", "empty", "no job", "half"])
def test_a_creation_answered_with_garbage_is_looked_up(server, request_, tmp_path, body):
    kind = "text/html" if body.startswith("<") else "application/json"
    server.faults.append(Fault(200, body, (("content-type", kind),), after=True, path=CREATE))
    assert backend_of(server).submit(request_, tmp_path) == "ftjob-0000"
    assert len(server.jobs) == 1


@pytest.mark.parametrize("body", ["", "{}", '{"data": null}', "<html></html>"], ids=["empty", "no list", "null", "html"])
def test_a_list_of_jobs_that_is_garbage_is_not_taken_for_an_empty_one(server, request_, tmp_path, body):
    listed = Fault(200, body, (("content-type", "text/html" if body[:1] in "<" else "application/json"),), path="GET /v1/fine_tuning/jobs?")
    server.faults.extend([Fault(path=CREATE, after=True), listed])
    assert backend_of(server).submit(request_, tmp_path) == "ftjob-0000"
    assert len(server.jobs) == 1


def test_a_crash_before_creation_uses_the_upload_again_unless_the_service_has_lost_it(server, request_, tmp_path):
    server.faults.extend([Fault(path=CREATE)] * 3)
    with pytest.raises(UnreachableError, match="gave no usable answer to a fine-tuning job"):
        backend_of(server).submit(request_, tmp_path)
    assert not server.jobs and len(server.files) == 1
    backend_of(server).submit(request_, tmp_path)
    assert len(server.jobs) == 1 and len(server.files) == 1
    (tmp_path / "b").mkdir()
    server.faults.extend([Fault(path=CREATE)] * 3)
    with pytest.raises(UnreachableError):
        backend_of(server).submit(request_, tmp_path / "b")
    server.files.pop("file-1")
    server.files["file-x"] = server.files["file-0"]
    backend_of(server).submit(request_, tmp_path / "b")
    assert server.jobs[0]["training_file"] == "file-2" and len(server.jobs) == 2


def test_another_request_in_the_same_folder_is_another_job(server, request_, tmp_path):
    first = backend_of(server).submit(request_, tmp_path)
    assert backend_of(server).submit(made(tmp_path, seed=4), tmp_path) != first


# -- trouble ------------------------------------------------------------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_out_for_as_long_as_the_service_says(server, request_, tmp_path):
    server.faults.append(refusal(429, "slow down", path=CREATE, retry_after="0.3"))
    started = time.monotonic()
    backend_of(server).submit(request_, tmp_path)
    assert time.monotonic() - started >= 0.3 and len(server.jobs) == 1 and creations(server) == 2


def test_a_service_that_asks_for_a_long_wait_is_left_alone_for_now(server, request_, tmp_path):
    server.faults.append(refusal(429, "daily limit", path=CREATE, retry_after="3600"))
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="HTTP 429: daily limit"):
        backend_of(server).submit(request_, tmp_path)
    assert time.monotonic() - started < 20 and creations(server) == 1


def test_a_quota_that_is_spent_is_no_passing_trouble(server, request_, tmp_path):
    server.faults.append(refusal(429, "You exceeded your current quota", "insufficient_quota", path=CREATE))
    with pytest.raises(ExperimentError, match="HTTP 429.*exceeded your current quota") as caught:
        backend_of(server).submit(request_, tmp_path)
    assert not isinstance(caught.value, UnreachableError) and creations(server) == 1


def test_server_errors_are_retried_and_then_the_service_is_called_unreachable(server, request_, tmp_path):
    backend = backend_of(server)
    server.faults.extend([refusal(500, "oops"), refusal(503, "overloaded")])
    job = backend.submit(request_, tmp_path)
    server.faults.extend([refusal(500, "oops")] * 3)
    with pytest.raises(UnreachableError, match="a question for a job: HTTP 500: oops. Nothing is lost"):
        backend.poll(job, tmp_path)
    assert backend.poll(job, tmp_path).status == "queued"


def test_a_network_that_is_lost_and_regained_loses_no_job(server, request_, tmp_path):
    backend = backend_of(server)
    job = backend.submit(request_, tmp_path)
    server.close()
    try:
        with pytest.raises(UnreachableError, match="Connection error"):
            backend.poll(job, tmp_path)
        with pytest.raises(UnreachableError):
            backend.submit(made(tmp_path, seed=5), tmp_path)
    finally:
        server.open()
    assert backend.poll(job, tmp_path).status == "queued"
    patient = backend_of(server, attempts=30, backoff=0.05, max_wait=0.1)
    server.close()
    opening = threading.Timer(0.4, server.open)
    opening.start()
    assert patient.poll(job, tmp_path).status == "queued", "an outage shorter than the retries is not even noticed"
    opening.join()


def test_what_the_service_refuses_is_told_in_its_words_and_not_retried(server, tmp_path):
    with pytest.raises(ExperimentError, match="refused a fine-tuning job .HTTP 400.: Model unknown-1 is not available for fine-tuning"):
        backend_of(server).submit(made(tmp_path, base_model="unknown-1"), tmp_path)
    assert creations(server) == 1
    with pytest.raises(ExperimentError, match="does not know job ftjob-9. Is the key in OPENAI_API_KEY"):
        backend_of(server).poll("ftjob-9", tmp_path)


# -- keys ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_key_shows_neither_in_errors_nor_in_files_nor_in_logs(server, request_, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = "sk-wrong-0123456789"
    monkeypatch.setenv("OTHER_KEY", wrong)
    with pytest.raises(ExperimentError, match="HTTP 401.*Bearer .key.. Check the key in OTHER_KEY") as caught:
        backend_of(server, key_env="OTHER_KEY").submit(request_, tmp_path)
    backend_of(server).submit(request_, tmp_path)
    seen = caplog.text + str(caught.value) + repr(caught.value.__context__) + "".join(file.read_text() for file in tmp_path.iterdir())
    assert wrong not in seen and KEY not in seen and "HTTP Request" in caplog.text


def test_a_missing_key_and_a_key_among_the_options_are_refused_before_anything_is_sent(server, request_, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ExperimentError, match="backend openai needs a key, and the environment variable OPENAI_API_KEY is not set. Set it"):
        backend_of(server).check(request_)
    with pytest.raises(ExperimentError, match="no option api_key.*key_env names the variable") as caught:
        OpenAIBackend.from_options({"api_key": KEY})
    assert KEY not in str(caught.value)
    with pytest.raises(ExperimentError, match="key_env is not an environment variable's name") as caught:
        OpenAIBackend.from_options({"key_env": KEY})
    assert KEY not in str(caught.value)
    with pytest.raises(ExperimentError, match="base_url must be http"):
        OpenAIBackend.from_options({"base_url": f"https://user:{KEY}@host/v1"})
    with pytest.raises(ExperimentError, match="no option base_ulr.*Did you mean 'base_url'"):
        OpenAIBackend.from_options({"base_ulr": "https://host/v1"})
    assert server.requests == []


def test_the_addresss_variable_is_read_and_an_option_wins(monkeypatch, request_):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1/")
    assert OpenAIBackend.from_options({}).identity(request_)["base_url"] == "http://elsewhere/v1"
    assert OpenAIBackend.from_options({"base_url": "http://here/v1"}).identity(request_)["base_url"] == "http://here/v1"


# -- what cannot be trained ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hyperparameters": {"lora_rank": 8}},
            "takes no lora_rank .it is 8.; it takes batch_size, epochs, gradient_accumulation. It does not say how",
        ),
        ({"hyperparameters": {"learning_rate": 1e-4}}, "takes no learning_rate.*set learning_rate_multiplier in training.options"),
        ({"hyperparameters": {"weight_decay": 0.1}}, "takes no weight_decay .it is 0.1.*or use backend peft"),
        ({"hyperparameters": {"epochs": 1.5}}, "trains whole epochs, and epochs is 1.5"),
        ({"steering": TrainingSteering(spec=Path("spec.yaml"))}, "cannot steer while it trains .training.steering is set"),
        ({"device": "cuda"}, "training.device is 'cuda'. Leave it out"),
        ({"suffix": "x" * 65}, "suffix of at most 64 characters, and it has 65"),
        ({"seed": -1}, "seed from 0 to 2147483647, and it is -1"),
        ({"base_model": str(REPOSITORY)}, "is a folder here. Name one of the service's models"),
        ({"examples": 9}, "needs 10 examples, and .*mild_warmth.jsonl' has 9"),
    ],
)
def test_what_the_service_does_not_take_is_refused_rather_than_ignored(server, tmp_path, changes, message):
    with pytest.raises(ExperimentError, match=message):
        backend_of(server).check(made(tmp_path, **changes))
    assert server.requests == []


def test_data_that_changed_after_it_was_prepared_is_not_uploaded(server, request_, tmp_path):
    request_.data.write_text("{}\n")
    with pytest.raises(ExperimentError, match="has changed since it was prepared"):
        backend_of(server).submit(request_, tmp_path)
    assert not server.files


def test_a_missing_library_is_named_with_the_line_that_installs_it(server, request_, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependencyError, match="pip install 'steered-lm.openai.'"):
        backend_of(server).check(request_)
