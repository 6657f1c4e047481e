"""Finished steps: found again by what decides them, shared by processes, pruned with care."""

import json
import multiprocessing
import os
import time

import pytest

from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.store import Failure, Job, Store, exclusive


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def step_of(store, name="train", label="a", **request):
    return store.step(name, {"config": {"rate": 0.1}, "data": "d" * 64, **request}, label=label)


def age(info_or_step, seconds):
    for file in info_or_step.folder.glob("*.json"):
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_a_step_is_found_again_by_its_request_whatever_its_label_or_the_order_of_its_keys(store):
    one = store.step("train", {"config": {"a": 1, "b": 2}, "data": "x"}, label="first")
    same = store.step("train", {"data": "x", "config": {"b": 2, "a": 1}}, label="second")
    assert one.folder == same.folder
    others = [
        store.step("evaluate", {"config": {"a": 1, "b": 2}, "data": "x"}, label="first"),
        store.step("train", {"config": {"a": 1, "b": 3}, "data": "x"}, label="first"),
        store.step("train", {"config": {"a": 1, "b": 2}, "data": "y"}, label="first"),
        store.step("train", {"config": {"a": 1, "b": 2}, "data": "x", "identity": {"peft": "2"}}, label="first"),
    ]
    assert len({one.folder, *(other.folder for other in others)}) == 5


def test_a_step_of_another_version_of_the_workflow_is_not_taken(store, monkeypatch):
    old = step_of(store)
    monkeypatch.setattr("steered_lm.trait_models.store.WORKFLOW", 2)
    assert step_of(store).folder != old.folder


def test_a_step_goes_from_nothing_over_a_job_and_a_failure_to_a_record(store):
    step = step_of(store)
    assert (step.record(), step.job(), step.failure(), step.attempts) == (None, None, None, 0)
    step.prepare()
    step.started("job-1")
    assert step.job() == Job(id="job-1", attempt=1)
    step.failed("no memory", attempt=1)
    assert step.job() is None
    assert step.failure() == Failure(error="no memory", attempt=1)
    step.started("job-2")
    assert step.job() == Job(id="job-2", attempt=2)
    step.finish({"score": 1})
    assert (step.record(), step.job(), step.failure()) == ({"score": 1}, None, None)
    request = json.loads((step.folder / "request.json").read_text())
    assert request["label"] == "a"
    assert request["data"] == "d" * 64


def test_a_damaged_record_is_an_error_that_names_the_file_and_what_to_do(store):
    step = step_of(store)
    step.prepare()
    (step.folder / "record.json").write_text('{"model": ')
    with pytest.raises(ExperimentError, match="record.json' is damaged: .* Remove the folder it lies in"):
        step.record()


def _hold(path, held, release):
    with exclusive(path):
        held.set()
        release.wait(20)


def test_a_lock_keeps_another_process_out_until_its_holder_ends_or_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    for end in ("release", "kill"):
        held, release = context.Event(), context.Event()
        holder = context.Process(target=_hold, args=(tmp_path / "lock", held, release))
        holder.start()
        assert held.wait(20)
        with exclusive(tmp_path / "lock", wait=False) as mine:
            assert not mine
        release.set() if end == "release" else holder.kill()
        with exclusive(tmp_path / "lock") as mine:
            assert mine
        holder.join(20)
        holder.close()


def made(store, label, *, name="train", finish=True, **request):
    step = step_of(store, name, label, label_of=label, **request)
    step.prepare()
    if finish:
        step.finish({"model": label})
    return step


def test_the_list_says_state_age_and_size_of_every_step(store):
    done, failed, running, begun = (made(store, label, finish=label == "done") for label in ("done", "failed", "running", "begun"))
    failed.failed("broken")
    running.started("job-1")
    (done.work / "weights").write_bytes(b"0" * 5000)
    made(store, "measured", name="evaluate")
    found = {info.label: info for info in store.steps()}
    assert {label: info.status for label, info in found.items()} == {
        "done": "finished",
        "failed": "failed",
        "running": "running",
        "begun": "unfinished",
        "measured": "finished",
    }
    assert found["done"].size > 5000 > found["begun"].size > 0
    assert found["begun"].folder == begun.folder
    assert [info.name for info in store.steps()] == ["train"] * 4 + ["evaluate"]
    age(done, 7200)
    assert time.time() - next(info for info in store.steps() if info.label == "done").changed == pytest.approx(7200, abs=60)


def test_what_may_go_depends_on_age_state_and_use_and_a_job_under_way_always_stays(store):
    old, new, failed, running = (made(store, label, finish=label in ("old", "new")) for label in ("old", "new", "failed", "running"))
    failed.failed("broken")
    running.started("job-1")
    for step in (old, running):
        age(step, 1000)

    def names(**conditions):
        return {info.label for info in store.prunable(**conditions)}

    assert names() == {"old", "new", "failed"}
    assert names(older_than=500) == {"old"}
    assert names(failed=True) == {"failed"}
    assert names(used=[old.folder, new.folder]) == {"failed"}
    assert names(used=[old.folder], also_used=True) == {"old", "new", "failed"}
    assert running.folder.is_dir()


def test_a_removed_step_is_gone_whole_and_its_data_go_with_the_last_step_that_used_them(store):
    one, two = made(store, "one", data="a" * 64), made(store, "two", data="a" * 64)
    data = store.data_file("a" * 64)
    data.parent.mkdir(parents=True)
    data.write_text("{}\n")
    infos = {info.label: info for info in store.steps()}
    assert store.remove(infos["one"])
    assert not one.folder.exists()
    assert data.exists()
    assert store.remove(infos["two"])
    assert not data.exists()
    assert list(two.folder.parent.iterdir()) == []


def test_a_step_that_another_process_works_on_is_not_removed(store):
    step = made(store, "busy")
    (info,) = store.steps()
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(step.lock_file, held, release))
    holder.start()
    assert held.wait(20)
    assert not store.remove(info)
    assert step.record() == {"model": "busy"}
    release.set()
    holder.join(20)
    holder.close()
    assert store.remove(info)
