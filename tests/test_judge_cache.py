"""The judge cache: what is kept, for whom, and what happens to a file that is not ours."""

import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from steered_lm.errors import JudgeError
from steered_lm.judges.base import Judge, JudgeRequest, Verdict
from steered_lm.judges.cache import CachedJudge, JudgeCache, request_key


class LengthJudge:
    """Scores a response by its number of words, and counts what it was asked."""

    def __init__(self, identity: str = "length-1") -> None:
        self.identity = identity
        self.name = "length"
        self.asked: list[str] = []

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.asked += [r.response for r in requests]
        return [self._verdict(r.response) for r in requests]

    def _verdict(self, response: str) -> Verdict:
        if not response:
            return Verdict(missing="empty response", judge=self.name)
        return Verdict(score=min(5.0, len(response.split())), explanation=f"words of {response!r}", judge=self.name)


def requests(*responses: str) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="Hello", response=r) for r in responses]


@pytest.fixture
def cache(tmp_path: Path) -> JudgeCache:
    return JudgeCache(tmp_path / "deep" / "cache.sqlite")


def test_a_cached_score_is_not_asked_for_again_and_is_marked(cache: JudgeCache) -> None:
    inner = LengthJudge()
    first = CachedJudge(inner, cache).judge(requests("a b", "a"))
    second = CachedJudge(inner, JudgeCache(cache.path)).judge(requests("a", "a b"))
    assert inner.asked == ["a b", "a"]
    assert [v.cached for v in first + second] == [False, False, True, True]
    assert [v.model_copy(update={"cached": False}) for v in second] == first[::-1]


def test_a_request_that_repeats_within_a_batch_is_judged_once(cache: JudgeCache) -> None:
    inner = LengthJudge()
    verdicts = CachedJudge(inner, cache).judge(requests("a", "b c", "a", "a"))
    assert inner.asked == ["a", "b c"]
    assert [v.score for v in verdicts] == [1, 2, 1, 1]


def test_a_missing_verdict_is_asked_for_again(cache: JudgeCache) -> None:
    inner = LengthJudge()
    for _ in range(2):
        assert CachedJudge(inner, cache).judge(requests("", "a"))[0].missing == "empty response"
    assert inner.asked == ["", "a", ""]
    assert len(cache) == 1


def test_another_judge_or_another_prompt_is_another_request(cache: JudgeCache) -> None:
    request = JudgeRequest(prompt="Hello", response="a")
    others = [
        request_key("i", JudgeRequest(prompt="Hellо", response="a")),
        request_key("i", JudgeRequest(prompt="Hello", response="a ")),
        request_key("j", request),
    ]
    assert len({request_key("i", request), *others}) == 4
    CachedJudge(LengthJudge("one"), cache).judge([request])
    two = LengthJudge("two")
    CachedJudge(two, cache).judge([request])
    assert two.asked == ["a"]


def test_a_cached_judge_is_the_judge_that_it_wraps(cache: JudgeCache) -> None:
    judge = CachedJudge(LengthJudge(), cache)
    assert isinstance(judge, Judge)
    assert (judge.name, judge.identity) == ("length", "length-1")


def test_large_batches_go_through(cache: JudgeCache) -> None:
    texts = [f"reply {i}" for i in range(2500)]
    CachedJudge(LengthJudge(), cache).judge(requests(*texts))
    again = LengthJudge()
    verdicts = CachedJudge(again, cache).judge(requests(*texts))
    assert again.asked == []
    assert all(v.cached for v in verdicts)


def test_several_processes_write_to_one_new_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    code = """
import sys
from steered_lm.judges.base import Verdict
from steered_lm.judges.cache import JudgeCache
cache, number = JudgeCache(sys.argv[1]), int(sys.argv[2])
for i in range(40):
    cache.put_many({f"{number}-{i}": Verdict(score=3, judge="t"), f"common-{i}": Verdict(score=2, judge="t")})
    assert cache.get_many([f"{number}-{i}"])
"""
    root = str(Path(__file__).resolve().parents[1])
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=root, stderr=subprocess.PIPE) for n in range(4)]
    errors = [w.communicate()[1].decode() for w in workers]
    assert [w.returncode for w in workers] == [0] * 4, errors
    assert len(JudgeCache(path)) == 4 * 40 + 40


def test_the_file_uses_write_ahead_logging(cache: JudgeCache) -> None:
    with sqlite3.connect(cache.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_text("these are notes, not a database, and they are long enough to be read as a header of one\n" * 20)
    with pytest.raises(JudgeError, match="is damaged or no SQLite file.*Give another path"):
        JudgeCache(path)


def test_a_cut_off_cache_is_refused(cache: JudgeCache) -> None:
    CachedJudge(LengthJudge(), cache).judge(requests(*(f"reply {i}" for i in range(500))))
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[:4096] + b"\xff" * 6000)
    with pytest.raises(JudgeError, match="damaged"):
        CachedJudge(LengthJudge(), JudgeCache(cache.path)).judge(requests("reply 1"))


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bookmarks.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(JudgeError, match="another program"):
        JudgeCache(path)
    assert path.read_bytes() == before


def test_a_folder_as_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="cannot be used: .*Check the path"):
        JudgeCache(tmp_path)
