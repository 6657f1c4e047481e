"""The run log: what survives a kill, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steered_lm.errors import RunError
from steered_lm.judges.base import Verdict
from steered_lm.search.protocol import CandidateScore, ItemScore, SearchSpace
from steered_lm.search.runlog import LOG_NAME, RunLog, RunSettings, installed_versions, score_from_json, score_to_json

LINES = ({"generation": 0, "text": "naïve ✓\r\n"}, {"generation": 1, "points": [[0.1, -1.0 / 3]]}, {"generation": 2})


def settings(**changes: Any) -> RunSettings:
    base = {"persona": "keeper", "model": "tiny", "judge": "length", "space": SearchSpace(names=("a", "b")), "budget": 16, "versions": {"numpy": "2"}}
    return RunSettings(**{**base, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with RunLog.open(tmp_path / "run", settings()) as log:
        for line in LINES:
            log.append("generation", line)
    return tmp_path / "run"


def test_what_was_appended_is_read_back_in_order(folder: Path) -> None:
    with RunLog.open(folder, settings()) as log:
        assert log.of_kind("generation") == [{"kind": "generation", **line} for line in LINES]
        assert log.of_kind("test") == []
        assert len(log.run_id) == 64
    header = json.loads((folder / LOG_NAME).read_text().split("\n")[0])
    assert (header["kind"], header["format"], header["persona"], header["run_id"]) == ("header", 1, "keeper", log.run_id)


def test_a_last_line_torn_at_any_byte_is_dropped_and_the_log_goes_on(folder: Path) -> None:
    path = folder / LOG_NAME
    data = path.read_bytes()
    second_end = data.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(second_end, len(data)):
        path.write_bytes(data[:cut])
        with RunLog.open(folder, settings()) as log:
            assert len(log.of_kind("generation")) == 2
            log.append("generation", LINES[2])
        assert path.read_bytes() == data


def test_a_torn_header_starts_the_log_anew(folder: Path) -> None:
    path = folder / LOG_NAME
    path.write_bytes(path.read_bytes()[:40])
    with RunLog.open(folder, settings()) as log:
        assert log.lines == []
    assert json.loads(path.read_text())["kind"] == "header"


@pytest.mark.parametrize("damage", [b"{broken\n", b"[1, 2]\n", b'{"generation": 1}\n', b"\n", b"\xff\xfe\n"])
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(folder: Path, damage: bytes) -> None:
    path = folder / LOG_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"is damaged: line 3 is not a JSON object.*delete everything from line 3 on"):
        RunLog.open(folder, settings())
    assert path.read_bytes() == before


def test_a_file_that_is_no_run_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text('{"kind": "generation"}\n')
    with pytest.raises(RunError, match="does not begin with a header"):
        RunLog.open(tmp_path, settings())


def test_another_runs_folder_is_refused_with_the_settings_that_differ(folder: Path) -> None:
    before = (folder / LOG_NAME).read_bytes()
    other = settings(seed=4, versions={"numpy": "3"}, space=SearchSpace(names=("a", "b"), high=2.0), extra={"max_new_tokens": 32})
    with pytest.raises(RunError, match="holds another run") as caught:
        RunLog.open(folder, other)
    for part in (
        "seed: 0 there, 4 now",
        "versions.numpy: '2' there, '3' now",
        "space.high: 1.0 there, 2.0 now",
        "extra.max_new_tokens: nothing there, 32 now",
    ):
        assert part in str(caught.value)
    assert "give another folder" in str(caught.value)
    assert "persona" not in str(caught.value)
    assert (folder / LOG_NAME).read_bytes() == before


def test_results_without_a_log_are_another_runs(tmp_path: Path) -> None:
    (tmp_path / "best_spec.yaml").write_text("version: 1\n")
    with pytest.raises(RunError, match=r"holds best_spec\.yaml but no run\.jsonl"):
        RunLog.open(tmp_path, settings())
    with pytest.raises(RunError, match="is a file. Give a folder"):
        RunLog.open(tmp_path / "best_spec.yaml", settings())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock on Windows")
def test_a_log_that_another_process_holds_is_refused_and_free_once_it_is_killed(folder: Path) -> None:
    code = "import fcntl, sys; h = open(sys.argv[1], 'ab'); fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder / LOG_NAME)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RunError, match="in use by another running process"):
        RunLog.open(folder, settings())
    holder.kill()
    holder.communicate()
    RunLog.open(folder, settings()).close()


def test_scores_survive_the_log() -> None:
    verdicts = [Verdict(score=2.5, explanation="a", judge="j", cached=True), Verdict(missing="HTTP 500", judge="j")]
    score = CandidateScore(items=tuple(ItemScore(item=str(i), prompt="p", response="é" * i, verdict=v) for i, v in enumerate(verdicts)))
    data = json.loads(json.dumps(score_to_json(score)))
    assert score_from_json(data) == score
    assert (data["mean"], data["missing"], data["items"][1]["length"]) == (2.5, 1, 1)
    assert score_to_json(CandidateScore(items=score.items[1:]))["mean"] is None


def test_versions_are_those_of_installed_libraries() -> None:
    assert set(installed_versions("numpy", "a-library-that-is-not-there")) == {"numpy"}
