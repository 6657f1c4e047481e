"""The judge cache: what is kept, for whom, and what happens to a file that is not ours."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from steered_lm.errors import JudgeError
from steered_lm.judges.base import Judge, JudgeRequest, Usage, Verdict
from steered_lm.judges.cache import CacheFilter, CacheSession, JudgeCache
from steered_lm.judges.cached import CachedJudge, request_key

ROOT = str(Path(__file__).resolve().parents[1])


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
    # a repeat cost nothing, and a sum over verdicts must not count it again
    assert [v.cached for v in verdicts] == [False, False, True, True]


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
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=ROOT, stderr=subprocess.PIPE) for n in range(4)]
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


def test_a_cache_of_an_older_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    JudgeCache(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(JudgeError, match="has version 1, this library reads 2. Give another path"):
        JudgeCache(path)


def test_every_field_of_a_request_and_the_judge_s_identity_change_the_key() -> None:
    request = JudgeRequest(prompt="p", response="r")
    values = {"prompt": "q", "response": "s", "other": "r", "references": ("r",), "false_references": ("r",)}
    assert values.keys() == JudgeRequest.model_fields.keys()
    keys = [request_key("i", request), request_key("j", request), *(request_key("i", request.model_copy(update={n: v})) for n, v in values.items())]
    assert len(set(keys)) == len(keys)
    assert request_key("i", request) == request_key("i", JudgeRequest(prompt="p", response="r"))


FULL = (
    Verdict(score=61.25, scale=(0, 100), explanation="61 “ok”\n", judge="a", mode="logprobs", mass=0.97, usage=Usage(requests=2, dollars=0.5)),
    Verdict(score=-0.5, scale=(-1, 1), judge="b", choice="B", confidence=0.75, consistent=False, parts=(Verdict(score=1, judge="c"),)),
    Verdict(score=1, scale=(-1, 1), judge="d", choice="A", parts=(Verdict(missing="empty answer", judge="e", usage=Usage(requests=1)),)),
    Verdict(score=1, judge="f"),
)


@pytest.mark.parametrize("verdict", FULL, ids=lambda verdict: verdict.judge)
def test_all_of_a_verdict_is_kept(cache: JudgeCache, verdict: Verdict) -> None:
    cache.put_many({"key": verdict})
    assert cache.get_many(["key"]) == {"key": verdict.model_copy(update={"cached": True})}


def test_half_a_character_in_an_answer_loses_no_verdict(cache: JudgeCache) -> None:
    part = Verdict(score=2, judge="x", explanation="so \ud83d")
    cache.put_many({"key": Verdict(score=2, judge="panel", parts=(part,)), "whole": Verdict(score=3, judge="x", explanation="so 😀")})
    found = cache.get_many(["key", "whole"])
    assert (found["key"].score, found["key"].parts[0].explanation) == (2, "so ?")
    assert found["whole"].explanation == "so 😀"


def test_a_row_that_holds_no_verdict_is_refused_and_never_becomes_a_score(cache: JudgeCache) -> None:
    for text in ("{}", "nonsense", '{"judge":"x","score":9}', '{"judge":"x","missing":null}'):
        cache.put_many({"key": Verdict(score=2, judge="x")})
        with sqlite3.connect(cache.path) as db:
            db.execute("UPDATE verdicts SET verdict = ?", (text,))
        db.close()
        with pytest.raises(JudgeError, match="is damaged: row 'key' holds no verdict"):
            cache.get_many(["key"])


class FactsJudge(LengthJudge):
    """Says what it is, and what asking it would take."""

    facts = {"model": "gpt-x", "rubric": "trait", "rubric_version": "3", "about": "humorous", "surplus": "is not kept"}  # noqa: RUF012

    def estimate(self, requests: Sequence[JudgeRequest]) -> Usage:
        return Usage(requests=len(requests), input_tokens=10 * len(requests))


def test_the_facts_of_a_judge_are_kept_for_people_and_grouped(cache: JudgeCache) -> None:
    before = int(time.time())
    CachedJudge(FactsJudge(), cache).judge(requests("a", "b b"))
    cache.put_many({"k": Verdict(score=2, judge="plain", usage=Usage(requests=1, input_tokens=7, output_tokens=2, dollars=0.25))})
    first, second = cache.stats()
    assert first[:6] == ("length", "gpt-x", "trait", "3", "humorous", 2)
    assert before <= first.first <= first.last <= time.time()
    assert first[8:] == (0, 0, None)
    assert second[:6] == ("plain", "", "", "", "", 1)
    assert second[8:] == (7, 2, 0.25)


def test_an_estimate_counts_what_is_not_cached_once(cache: JudgeCache) -> None:
    judge = CachedJudge(FactsJudge(), cache)
    judge.judge(requests("a", "b"))
    assert judge.estimate(requests("a", "b", "c", "c", "d")) == Usage(requests=2, input_tokens=20)
    assert CachedJudge(LengthJudge(), cache).estimate(requests("z")) is None


def test_pruning_removes_what_is_meant_and_nothing_else(cache: JudgeCache) -> None:
    cache.put_many({f"old {i}": Verdict(score=2, judge="a") for i in range(2000)}, {"rubric": "trait", "rubric_version": "1"})
    with sqlite3.connect(cache.path) as db:
        db.execute("UPDATE verdicts SET created = 1000")
    db.close()
    cache.put_many({"new": Verdict(score=2, judge="a")}, {"rubric": "trait", "rubric_version": "2"})
    cache.put_many({"other": Verdict(score=2, judge="b")})
    size = cache.path.stat().st_size
    assert cache.count(CacheFilter(created_before=1001)) == 2000
    assert cache.count(CacheFilter(judge="a", rubric="trait", rubric_version="2")) == 1
    assert cache.prune(CacheFilter(judge="a", created_before=1001)) == 2000
    assert cache.path.stat().st_size < size
    assert cache.get_many(["old 1", "new", "other"]).keys() == {"new", "other"}


def test_an_export_holds_every_verdict_and_no_request(cache: JudgeCache) -> None:
    CachedJudge(FactsJudge(), cache).judge([JudgeRequest(prompt="a secret prompt", response="some words")])
    (row,) = cache.export()
    assert row["verdict"]["score"] == 2
    assert (row["judge"], row["model"], row["rubric"], row["rubric_version"], row["about"]) == ("length", "gpt-x", "trait", "3", "humorous")
    assert row["key"] == request_key("length-1", JudgeRequest(prompt="a secret prompt", response="some words"))
    assert "secret" not in str(row)


class StreamingJudge(LengthJudge):
    """Hands over verdicts one by one, and ends like ``ending`` after ``last`` of them."""

    def __init__(self, last: int, ending: type[BaseException]) -> None:
        super().__init__()
        self.last, self.ending = last, ending

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict) -> list[Verdict]:
        for index, request in enumerate(requests):
            if index == self.last:
                raise self.ending
            on_verdict(index, self._verdict(request.response))
        return []


@pytest.mark.parametrize("ending", [JudgeError, KeyboardInterrupt])
def test_what_arrived_before_a_batch_failed_is_kept(cache: JudgeCache, ending: type[BaseException]) -> None:
    with pytest.raises(ending):
        CachedJudge(StreamingJudge(2, ending), cache).judge(requests("a", "b", "c"))
    again = LengthJudge()
    CachedJudge(again, cache).judge(requests("a", "b", "c"))
    assert again.asked == ["c"]


def test_a_verdict_whose_transaction_was_interrupted_is_kept(cache: JudgeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = CacheSession.put_many, []

    def interrupted(session, verdicts, facts=None):
        calls.append(verdicts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(session, verdicts, facts)

    monkeypatch.setattr(CacheSession, "put_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(StreamingJudge(9, JudgeError), cache).judge(requests("a", "b", "c"))
    again = LengthJudge()
    CachedJudge(again, cache).judge(requests("a", "b", "c"))
    assert again.asked == ["c"]


def test_verdicts_may_arrive_from_several_threads(cache: JudgeCache) -> None:
    class Threaded(LengthJudge):
        def judge_each(self, requests, on_verdict):
            found = [self._verdict(request.response) for request in requests]
            shares = [range(start, len(found), 4) for start in range(4)]
            threads = [threading.Thread(target=lambda share=share: [on_verdict(i, found[i]) for i in share]) for share in shares]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found

    CachedJudge(Threaded(), cache).judge(requests(*(f"reply {i}" for i in range(200))))
    assert len(cache) == 200


_SLOW = """
import sys, time
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge

class Slow:
    name, identity = "slow", "slow-1"
    def judge(self, requests):
        return self.judge_each(requests, lambda index, verdict: None)
    def judge_each(self, requests, on_verdict):
        found = []
        for index, request in enumerate(requests):
            print("asked", request.response, flush=True)
            time.sleep(0.002)
            found.append(Verdict(score=2, judge=self.name))
            on_verdict(index, found[-1])
            print("kept", request.response, flush=True)
        return found

requests = [JudgeRequest(prompt="p", response=f"r{i}") for i in range(int(sys.argv[2]))]
CachedJudge(Slow(), JudgeCache(sys.argv[1])).judge(requests)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_pays_for_no_finished_verdict_again(tmp_path: Path, number: signal.Signals) -> None:
    path, asked, kept = tmp_path / "cache.sqlite", [], set()
    for stopped in (True, True, False):
        count = 2_000 if stopped else len(asked) + 20
        command = [sys.executable, "-c", _SLOW, str(path), str(count)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            lines = []
            while stopped and sum(line.startswith("kept") for line in lines) < 25:
                lines.append(run.stdout.readline())
            if stopped:
                run.send_signal(number)
            lines += run.stdout.readlines()  # and not communicate(), which loses what readline() has read ahead
        assert run.returncode == (-number if stopped else 0), "".join(lines[-20:])
        said = [line.split() for line in lines]
        now = [words[1] for words in said if words[:1] == ["asked"] and len(words) == 2]
        assert not kept & set(now)
        kept |= {words[1] for words in said if words[:1] == ["kept"] and len(words) == 2}
        asked += now
    assert len(JudgeCache(path)) == len(set(asked)) >= len(kept) >= 50
    # the one that was under way each time it was stopped may be asked again, and no other
    assert len(asked) - len(set(asked)) <= 2


def test_a_cache_that_must_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="does not exist. Give the file"):
        JudgeCache.existing(tmp_path / "typo.sqlite")
    assert not list(tmp_path.iterdir())


def test_a_cache_whose_folder_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JudgeError, match=r"judge cache '.*x.sqlite' cannot be written: .*Name a file in another folder"):
        JudgeCache(tmp_path / "file" / "x.sqlite")
