"""What all judges behind an API share: concurrency, retries, quotas, budgets, Ctrl-C, keys, and two thousand judgements among faults."""

import asyncio
import json
import logging
import math
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import fault_server
import pytest
from environments import REPOSITORY
from fault_server import Answer, FaultServer, fault, guesses, says

from steered_lm.errors import JudgeError
from steered_lm.judges.base import JudgeRequest, Usage, Verdict
from steered_lm.judges.budget import BudgetReached
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge, request_key
from steered_lm.judges.limits import retry_after, until_refilled
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

KEY = "sk-planted-0123456789abcdef"
FIT = Question(Rubric.load(), "A lighthouse keeper who talks in short, weathered sentences.", "keeper")
SURE = guesses({"4": math.log(0.9)}, usage=(700, 1))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer(lambda *_: SURE)
    yield found
    found.close()


def make(url: str, **options: Any) -> OpenAIJudge:
    quick = {"backoff": 0.01, "timeout": 5.0, "attempts": 3, "base_url": url}
    return OpenAIJudge.for_question(FIT, **{"model": "judge-1", **quick, **options})


def requests(count: int = 1) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="How is the sea?", response=f"Grey. Number {i}.") for i in range(count)]


def number_of(body: dict[str, Any]) -> int:
    return int(json.loads(body["messages"][1]["content"])["reply"].split()[-1].rstrip("."))


# -- many at a time --


def test_verdicts_are_handed_over_as_they_come_and_returned_in_order(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        answer = guesses({str(number_of(body) % 5 + 1): -0.1})
        answer.hang = 0.8 if number_of(body) == 0 else 0.0
        return answer

    server.script = script
    seen: list[int] = []
    verdicts = make(server.url).judge_each(requests(10), lambda index, verdict: seen.append(index))
    assert [v.score for v in verdicts] == [i % 5 + 1 for i in range(10)]
    assert sorted(seen) == list(range(10))
    assert seen[-1] == 0


def test_as_many_requests_as_allowed_are_in_flight_and_no_more(server: FaultServer) -> None:
    server.script = lambda *_: Answer(SURE.body, hang=0.05)
    verdicts = make(server.url, concurrency=6).judge(requests(24))
    assert all(v.score == 4 for v in verdicts)
    assert server.most_in_flight == 6


def test_it_works_inside_a_running_event_loop(server: FaultServer, tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "cache.sqlite")

    async def caller() -> list[float | None]:
        return [v.score for v in CachedJudge(make(server.url), cache).judge(requests(3))]

    assert asyncio.run(caller()) == [4, 4, 4]
    assert len(cache) == 3


def test_what_on_verdict_raises_stops_the_batch_and_reaches_the_caller(server: FaultServer) -> None:
    def full(index: int, verdict: Verdict) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        make(server.url, concurrency=1).judge_each(requests(9), full)
    assert len(server.bodies) == 1


INTERRUPTED = """
import asyncio, sys
from steered_lm.judges import make_judge
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

judge = make_judge("openai:m", Question(Rubric.load(), "A keeper."), cache=sys.argv[1], base_url=sys.argv[2], key_env="none", concurrency=4)
requests = [JudgeRequest(prompt="How is the sea?", response=f"Grey. Number {i}.") for i in range(40)]

async def inside():
    judge.judge(requests)

try:
    asyncio.run(inside()) if sys.argv[3] == "loop" else judge.judge(requests)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("where", ["plain", "loop"])
def test_ctrl_c_ends_at_once_and_keeps_the_verdicts_that_were_finished(server: FaultServer, tmp_path: Path, where: str) -> None:
    server.script = lambda number, *_: SURE if number < 8 else Answer(SURE.body, hang=60)
    path = tmp_path / "cache.sqlite"
    command = [sys.executable, "-c", INTERRUPTED, str(path), server.url, where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while (len(server.bodies) < 12 or len(JudgeCache(path)) < 8) and time.monotonic() < deadline:
            time.sleep(0.02)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (out.strip(), process.returncode) == ("interrupted", 0), err
    assert "Traceback" not in err
    assert time.monotonic() - started < 10  # and not after the hanging requests' 60 s
    assert len(JudgeCache(path)) == 8


# -- faults --


@pytest.mark.parametrize("status", [301, 308, 401, 402, 403, 404])
def test_a_refused_key_model_or_path_stops_at_once(server: FaultServer, status: int) -> None:
    server.script = lambda *_: fault(status, location="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match=f"HTTP {status}, .*(check the|set base_url|pay in)"):
        make(server.url, concurrency=1).judge(requests(20))
    assert len(server.bodies) == 1


def test_verdicts_finished_before_the_key_was_refused_are_in_the_cache(server: FaultServer, tmp_path: Path) -> None:
    server.script = lambda number, *_: SURE if number < 4 else fault(401)
    cache = JudgeCache(tmp_path / "cache.sqlite")
    with pytest.raises(JudgeError, match="HTTP 401"):
        CachedJudge(make(server.url, concurrency=1), cache).judge(requests(6))
    assert len(cache) == 4
    server.script = lambda *_: SURE
    verdicts = CachedJudge(make(server.url), cache).judge(requests(6))
    assert [v.cached for v in verdicts] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_a_fault_that_lasts_is_missing_after_the_allowed_attempts(server: FaultServer, status: int) -> None:
    server.script = lambda *_: fault(status, "overloaded")
    (verdict,) = make(server.url).judge(requests())
    assert (verdict.score, verdict.missing, verdict.explanation) == (None, f"HTTP {status}", "overloaded")
    assert verdict.usage == Usage(requests=3)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("passing", [fault(500), Answer("<html>"), Answer('{"choices": [')])
def test_a_fault_that_passes_is_retried_to_a_score(server: FaultServer, passing: Answer) -> None:
    server.script = lambda number, *_: passing if number < 2 else SURE
    (verdict,) = make(server.url).judge(requests())
    assert verdict.score == 4
    assert verdict.usage == Usage(requests=3, input_tokens=700, output_tokens=1)


def test_waits_between_attempts_grow(server: FaultServer) -> None:
    server.script = lambda *_: fault(500)
    make(server.url, attempts=4, backoff=0.1).judge(requests())
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert all(wait >= 0.05 * 2**i for i, wait in enumerate(waits))


def test_an_endpoint_that_fails_many_requests_in_a_row_is_left_alone(server: FaultServer) -> None:
    server.script = lambda *_: fault(500)
    verdicts = make(server.url, concurrency=1, attempts=1).judge(requests(30))
    assert [v.missing for v in verdicts[:8]] == ["HTTP 500"] * 8
    assert {v.missing for v in verdicts[8:]} == {"not asked, as 8 requests in a row had failed"}
    assert len(server.bodies) == 8


def test_an_endpoint_that_fails_now_and_then_is_asked_on(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(500) if number % 2 else SURE
    verdicts = make(server.url, concurrency=1, attempts=1).judge(requests(30))
    assert Counter(v.missing for v in verdicts) == {None: 15, "HTTP 500": 15}


def test_many_refused_requests_do_not_end_the_run_once_others_were_taken(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(400, "content policy") if 0 < number < 15 else SURE
    verdicts = make(server.url, concurrency=1).judge(requests(20))
    assert Counter(v.missing for v in verdicts) == {None: 6, "HTTP 400": 14}


def test_an_endpoint_that_never_takes_any_form_is_left_alone(server: FaultServer) -> None:
    server.script = lambda *_: fault(400, "no such model")
    verdicts = make(server.url, concurrency=1).judge(requests(30))
    assert Counter(v.missing for v in verdicts) == {"HTTP 400": 8, "not asked, as 8 requests in a row had failed": 22}


def test_a_storm_of_rate_limits_that_retries_survive_does_not_end_the_run(server: FaultServer) -> None:
    asked: Counter[int] = Counter()

    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        asked[number_of(body)] += 1
        return fault(429) if asked[number_of(body)] < 3 else SURE

    server.script = script
    verdicts = make(server.url, concurrency=8).judge(requests(40))
    assert [v.score for v in verdicts] == [4] * 40


def test_a_hanging_endpoint_times_out_and_is_missing(server: FaultServer) -> None:
    server.script = lambda *_: Answer(SURE.body, hang=30)
    (verdict,) = make(server.url, timeout=0.2, attempts=2).judge(requests())
    assert verdict.missing == "no answer within 0.2 s, 2 attempts"
    assert server.asked(2) == 2


def test_a_refused_connection_is_missing(server: FaultServer) -> None:
    server.close()
    verdicts = make(server.url).judge(requests(2))
    assert {v.missing for v in verdicts} == {f"no connection to {server.url}, 3 attempts"}


# -- quotas --


def test_a_rate_limit_holds_every_request_as_long_as_the_endpoint_asks(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        return fault(429, Retry_After="1") if number == 0 else Answer(SURE.body, hang=0.1)

    server.script = script
    verdicts = make(server.url, concurrency=4).judge(requests(12))
    assert [v.score for v in verdicts] == [4] * 12
    first, *others = server.times
    assert len([t for t in others if t < first + 0.5]) <= 3  # those that were under way
    assert min(t for t in others if t >= first + 0.5) >= first + 1


@pytest.mark.parametrize(
    "headers",
    [
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "800ms"},
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0.8s"},
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"},
    ],
)
def test_a_quota_that_is_used_up_holds_the_next_requests(server: FaultServer, headers: dict[str, str]) -> None:
    server.script = lambda number, *_: Answer(SURE.body, headers=headers if number == 1 else {"x-ratelimit-remaining-requests": "99"})
    judge = make(server.url, concurrency=1, max_wait=0.8)  # six minutes are waited for that long
    judge.judge(requests(2))
    judge.judge(requests(2))  # in another batch too
    assert server.times[1] - server.times[0] < 0.8
    assert server.times[2] - server.times[1] >= 0.8
    assert server.times[3] - server.times[2] < 0.8


def test_a_wait_beyond_the_limit_is_not_waited(server: FaultServer) -> None:
    server.script = lambda *_: fault(429, Retry_After=formatdate(time.time() + 3600, usegmt=True))
    started = time.monotonic()
    (verdict,) = make(server.url).judge(requests())
    assert (verdict.score, verdict.missing) == (None, "HTTP 429")
    assert len(server.bodies) == 1
    assert time.monotonic() - started < 20


def test_headers_are_read_as_providers_write_them() -> None:
    def date(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))

    assert retry_after({}) is None
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)}) == pytest.approx(100, abs=2)
    assert retry_after({"retry-after": formatdate(time.time() - 100, usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    for text, seconds in {"20ms": 0.02, "1s": 1, "6m0s": 360, "1h2m3.5s": 3723.5, "2d": 172800, "7": 7, "soon": 0, "": 0, "5x": 0}.items():
        assert until_refilled({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": text}) == pytest.approx(seconds)
    assert until_refilled({"x-ratelimit-remaining-tokens": "1", "x-ratelimit-reset-tokens": "9s"}) == 0
    several = {
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": date(30),
        "anthropic-ratelimit-output-tokens-remaining": "0",
        "anthropic-ratelimit-output-tokens-reset": date(50),
        "anthropic-ratelimit-input-tokens-remaining": "7",
        "anthropic-ratelimit-input-tokens-reset": date(90),
    }
    assert until_refilled(several) == pytest.approx(50, abs=2)
    assert until_refilled({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": date(-30)}) == 0


# -- money --


def test_every_verdict_and_the_judge_say_what_was_taken(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(500) if number == 0 else SURE
    judge = make(server.url, concurrency=1, input_price=2.0, output_price=10.0)
    verdicts = judge.judge(requests(2))
    price = (700 * 2 + 1 * 10) / 1e6
    assert [v.usage and (v.usage.requests, v.usage.input_tokens, v.usage.output_tokens) for v in verdicts] == [(2, 700, 1), (1, 700, 1)]
    assert [v.usage and v.usage.dollars for v in verdicts] == [pytest.approx(price)] * 2
    judge.judge(requests(1))
    assert (judge.usage.requests, judge.usage.input_tokens, judge.usage.output_tokens) == (4, 2100, 3)
    assert judge.usage.dollars == pytest.approx(3 * price)


def test_without_prices_dollars_are_unknown(server: FaultServer) -> None:
    judge = make(server.url)
    (verdict,) = judge.judge(requests())
    assert verdict.usage is not None and verdict.usage.dollars is None
    assert judge.usage.dollars is None


def test_a_budget_of_requests_counts_retries_and_keeps_what_is_finished(server: FaultServer, tmp_path: Path) -> None:
    server.script = lambda number, *_: fault(500) if number == 1 else Answer(SURE.body, hang=0.05)
    cache = JudgeCache(tmp_path / "cache.sqlite")
    judge = make(server.url, concurrency=4, max_requests=10)
    with pytest.raises(BudgetReached, match=r"max_requests=10\. Spent: 10 requests, .*9 of 30 verdicts.* Raise max_requests") as caught:
        CachedJudge(judge, cache).judge(requests(30))
    assert len(server.bodies) == 10
    assert (caught.value.usage.requests, caught.value.finished, caught.value.asked) == (10, 9, 30)
    assert len(cache) == 9
    with pytest.raises(BudgetReached):
        judge.judge(requests(1))  # the budget is the judge's, not the batch's
    again = CachedJudge(make(server.url, max_requests=25), cache).judge(requests(30))
    assert len(server.bodies) == 31
    assert [v.cached for v in again].count(True) == 9


@pytest.mark.parametrize("limit", ["max_tokens", "max_dollars"])
def test_a_budget_of_tokens_or_dollars_is_not_passed_by_many_at_a_time(server: FaultServer, limit: str) -> None:
    expected = make(server.url).estimate(requests(1))
    used = (expected.input_tokens, expected.output_tokens)
    server.script = lambda *_: Answer(guesses({"4": -0.1}, usage=used).body, hang=0.02)
    price = {"input_price": 2.0, "output_price": 8.0}
    budget = {"max_tokens": int(10.5 * sum(used)), "max_dollars": 10.5 * (used[0] * 2 + used[1] * 8) / 1e6}[limit]
    judge = make(server.url, concurrency=8, **price, **{limit: budget})
    with pytest.raises(BudgetReached, match=f"{limit}=") as caught:
        judge.judge(requests(40))
    assert caught.value.finished == len(server.bodies) == judge.usage.requests == 10


def test_an_estimate_that_is_too_high_waits_for_the_count_and_goes_on(server: FaultServer) -> None:
    server.script = lambda *_: Answer(guesses({"4": -0.1}, usage=(10, 1)).body, hang=0.01)
    room = int(2.5 * make(server.url).estimate(requests(1)).input_tokens)
    verdicts = make(server.url, concurrency=8, max_tokens=room).judge(requests(20))
    assert [v.score for v in verdicts] == [4] * 20
    assert server.most_in_flight <= 2


def test_an_estimate_that_is_too_low_passes_the_budget_by_what_is_under_way_at_most(server: FaultServer) -> None:
    used = 3 * make(server.url).estimate(requests(1)).input_tokens
    server.script = lambda *_: Answer(guesses({"4": -0.1}, usage=(used, 1)).body, hang=0.02)
    judge = make(server.url, concurrency=4, max_tokens=10 * used)
    with pytest.raises(BudgetReached):
        judge.judge(requests(40))
    assert 9 * used <= judge.usage.input_tokens <= 14 * used


def test_attempts_that_nobody_counted_are_in_the_budget_as_estimated(server: FaultServer) -> None:
    server.script = lambda *_: Answer(SURE.body, hang=30)
    room = int(2.5 * make(server.url).estimate(requests(1)).input_tokens)
    with pytest.raises(BudgetReached, match=r"and about [\d,]+ of attempts that the endpoint did not count"):
        make(server.url, timeout=0.1, attempts=9, max_tokens=room).judge(requests())
    assert server.asked(2) == 2


def test_a_budget_below_one_request_sends_nothing(server: FaultServer) -> None:
    with pytest.raises(BudgetReached, match="0 of 2 verdicts"):
        make(server.url, max_tokens=5).judge(requests(2))
    assert server.bodies == []


def test_an_estimate_asks_nothing_and_leaves_out_what_would_not_be_asked(server: FaultServer) -> None:
    judge = make(server.url, input_price=1.0, output_price=4.0)
    found = judge.estimate([*requests(3), JudgeRequest(prompt="Hello", response=" ")])
    one = math.ceil((len(FIT.system(token=True)) + len(FIT.user(requests(1)[0]))) / 4)
    assert (found.requests, found.input_tokens, found.output_tokens) == (3, 3 * one, 3)
    assert found.dollars == pytest.approx(3 * (one + 4) / 1e6)
    assert make(server.url, mode="json").estimate(requests(1)).output_tokens > 1
    assert server.bodies == []


# -- keys --


def test_the_key_appears_nowhere(server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        echo = headers["authorization"]
        assert KEY in echo
        shown = {"X_Echo": echo, "Set_Cookie": f"k={KEY}", "x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": KEY}
        kinds = [
            says({"reason": f"you sent {echo}", "score": 3}, usage=(1, 1)),
            says(f"no score, {echo}"),
            fault(400, echo, **shown),
            fault(500, echo, **shown),
            Answer(f"<html>{echo}</html>", headers={"x-echo": echo}),
            says(None, refusal=echo),
            says("3", finish=echo, logprobs={"content": [{"token": echo, "top_logprobs": [{"token": echo, "logprob": -0.1}]}]}),
        ]
        return kinds[number] if number < len(kinds) else fault(401, f"Incorrect API key provided: {echo}", **shown)

    server.script = script
    caplog.set_level(logging.DEBUG)
    judge = make(server.url, concurrency=1, attempts=1, mode="json")
    cached = CachedJudge(judge, JudgeCache(tmp_path / "cache.sqlite"))
    seen = []
    for request in requests(7):
        seen += [v.model_dump_json() + json.dumps(v.record()) for v in cached.judge([request])]
    assert len(server.bodies) == 7
    with pytest.raises(JudgeError, match="HTTP 401") as caught:
        judge.judge(requests())
    error = caught.value
    seen += ["".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())]
    seen += [repr(error), str(error), repr(error.__cause__), repr(error.__context__)]
    seen += [
        repr(judge),
        repr(vars(judge)),
        str(vars(judge)["_key"]),
        judge.identity,
        judge.name,
        caplog.text,
        repr([r.__dict__ for r in caplog.records]),
    ]
    files = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert seen[0].count("[key]") and "[key]" in "".join(seen[1:7])
    assert KEY not in "".join(seen)
    assert KEY.encode() not in files


# -- two thousand judgements --

COUNT, SEED = 2000, 4
STORM = {"concurrency": 64, "timeout": 2.5, "backoff": 0.005, "attempts": 3, "key_env": "none"}
LEGITIMATE = {
    "HTTP 429",
    "HTTP 500",
    "garbage instead of an answer",
    "no answer within 2.5 s, 3 attempts",
    "probability 0.02 on score tokens, below 0.25",
    "a log-probability of nan is none",
}


def check_storm(verdicts: list[Verdict], asked: list[tuple[str, str]]) -> None:
    """No verdict is lost, none is invented, and what is missing has a reason that the server's log bears out."""
    last = dict(asked)
    missing = Counter(v.missing for v in verdicts if v.missing is not None)
    assert len(verdicts) == COUNT
    for request, verdict in zip(requests(COUNT), verdicts, strict=True):
        if verdict.score is not None:
            assert verdict.score == fault_server.right_score(request.response)
        else:
            assert last[request.response] != "ok"
    assert set(missing) <= LEGITIMATE
    assert 0 < sum(missing.values()) < COUNT * 0.03


def test_two_thousand_judgements_among_faults_are_all_there_and_all_right(tmp_path: Path) -> None:
    with fault_server.remote(faults=SEED, log=tmp_path / "log") as server:
        verdicts = make(server.url, **STORM).judge(requests(COUNT))
        asked = server.asked()
    check_storm(verdicts, asked)
    shares = Counter("garbage" if what in fault_server.GARBAGE else what for _, what in asked)
    for name, share in fault_server.SHARES.items():
        assert shares[name] / len(asked) == pytest.approx(share, rel=0.35)


KILLED = """
import json, sys
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge
sys.path.insert(0, sys.argv[1])
from test_remote_judge import COUNT, STORM, make, requests

CachedJudge(make(sys.argv[2], **STORM), JudgeCache(sys.argv[3])).judge(requests(COUNT))
"""


def test_a_killed_run_that_starts_again_pays_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with fault_server.remote(faults=SEED, log=tmp_path / "log", delay=0.01) as server:
        command = [sys.executable, "-c", KILLED, str(REPOSITORY / "tests"), server.url, str(path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while len(server.asked()) < COUNT * 0.4:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                time.sleep(0.02)
            process.kill()
        judge = make(server.url, **STORM)
        keys = {request_key(judge.identity, request): request.response for request in requests(COUNT)}
        finished = {keys[key] for key in JudgeCache(path).get_many(keys)}
        before = server.asked()
        verdicts = CachedJudge(judge, JudgeCache(path)).judge(requests(COUNT))
        asked = server.asked()
    answered = {reply for reply, what in before if what == "ok"}
    assert 0 < len(finished) < COUNT
    assert len(answered - finished) <= STORM["concurrency"]  # under way at the kill
    assert finished.isdisjoint(reply for reply, _ in asked[len(before) :])
    assert [v.cached for v in verdicts].count(True) == len(finished)
    check_storm(verdicts, asked)
