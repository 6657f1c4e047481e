from pathlib import Path

import pytest

from steered_lm.trait_models.backend import Backend, TrainRequest
from steered_lm.trait_models.dummy import DummyBackend
from steered_lm.trait_models.experiment import ExperimentError


def request(name: str = "mild-warmth", **changes) -> TrainRequest:
    return TrainRequest(**{"name": name, "base_model": "tiny", "data": Path("mild_warmth.jsonl"), "data_hash": "ab" * 32, **changes})


def test_a_dummy_job_succeeds_at_once_and_its_model_is_the_base_model_marked_as_a_dummy(tmp_path):
    backend: Backend = DummyBackend.from_options({})
    backend.check(request())
    job = backend.submit(request(), tmp_path)
    state = backend.poll(job, tmp_path)
    assert state.status == "succeeded" and state.progress == 1 and "nothing was trained" in state.detail
    model = state.model
    assert model is not None and model.dummy and model.backend == "dummy" and model.facts["dummy"] is True
    assert (model.pretrained, model.peft, model.inspect, model.model_id) == ("tiny", None, None, "dummy:mild-warmth")
    assert backend.identity(request())["dummy"] is True


def test_polls_delay_the_end_and_are_counted_across_processes(tmp_path):
    job = DummyBackend.from_options({"polls": 2}).submit(request(), tmp_path)
    seen = [DummyBackend.from_options({"polls": 2}).poll(job, tmp_path) for _ in range(4)]
    assert [state.status for state in seen] == ["running", "running", "succeeded", "succeeded"]
    assert [state.progress for state in seen] == [0, 0.5, 1, 1]


def test_named_models_fail_while_others_succeed_and_a_failed_job_is_tried_anew(tmp_path):
    backend = DummyBackend.from_options({"fail": ["severe-warmth"], "polls": 1})
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    jobs = [backend.submit(request("severe-warmth"), tmp_path / "a"), backend.submit(request(), tmp_path / "b")]
    for _ in range(2):
        failed, succeeded = backend.poll(jobs[0], tmp_path / "a"), backend.poll(jobs[1], tmp_path / "b")
    assert (failed.status, succeeded.status) == ("failed", "succeeded")
    assert failed.model is None and failed.error is not None and "'severe-warmth'" in failed.error
    mended = DummyBackend.from_options({"polls": 1})
    assert backend.submit(request("severe-warmth"), tmp_path / "a") == jobs[0]
    assert [mended.poll(jobs[0], tmp_path / "a").status for _ in range(2)] == ["running", "succeeded"]


def test_a_running_job_goes_on_when_it_is_submitted_again_and_another_request_is_another_job(tmp_path):
    backend = DummyBackend.from_options({"polls": 2})
    job = backend.submit(request(), tmp_path)
    backend.poll(job, tmp_path)
    assert backend.submit(request(), tmp_path) == job
    assert backend.poll(job, tmp_path).progress == 0.5
    other = backend.submit(request(seed=1), tmp_path)
    assert other != job and backend.poll(other, tmp_path).progress == 0


def test_a_cancelled_job_says_so_and_one_that_has_ended_stays_as_it_is(tmp_path):
    backend = DummyBackend.from_options({"polls": 1})
    job = backend.submit(request(), tmp_path)
    backend.cancel(job, tmp_path)
    state = backend.poll(job, tmp_path)
    assert state.status == "cancelled" and state.error == "the dummy job was cancelled"
    assert backend.submit(request(), tmp_path) == job
    assert [backend.poll(job, tmp_path).status for _ in range(2)] == ["running", "succeeded"]
    backend.cancel(job, tmp_path)
    assert backend.poll(job, tmp_path).status == "succeeded"


def test_unknown_options_and_jobs_are_refused(tmp_path):
    with pytest.raises(ExperimentError, match="no option pols. Allowed: fail, polls. Did you mean 'polls'?"):
        DummyBackend.from_options({"pols": 1})
    with pytest.raises(ExperimentError, match="training.options of backend dummy.*polls"):
        DummyBackend.from_options({"polls": -1})
    with pytest.raises(ExperimentError, match="dummy job 'dummy-0' is not known"):
        DummyBackend.from_options({}).poll("dummy-0", tmp_path)
