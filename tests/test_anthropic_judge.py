"""Claude as judge: the real ``anthropic`` client against a server on loopback that speaks the Messages API."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from fault_server import Answer, FaultServer

from steered_lm.errors import JudgeError, MissingDependencyError
from steered_lm.judges import judge_names, make_judge
from steered_lm.judges.anthropic import AnthropicJudge
from steered_lm.judges.base import JudgeRequest, Usage
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

KEY = "sk-ant-planted-0123456789"
FIT = Question(Rubric.load(), "A lighthouse keeper who talks in short, weathered sentences.", "keeper")


def says(content: Any, stop: str = "end_turn", headers: dict[str, str] | None = None, **counts: int) -> Answer:
    """A message whose text has this content (objects become JSON)."""
    text = content if isinstance(content, str) else json.dumps(content)
    usage = {"input_tokens": 700, "output_tokens": 20, **counts}
    body = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": stop, "stop_sequence": None, "usage": usage}
    return Answer({**body, "content": [{"type": "text", "text": text}]}, headers=headers)


def fault(status: int, message: str = "no", **headers: str) -> Answer:
    body = {"type": "error", "error": {"type": "test_error", "message": message}}
    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


GOOD = says({"reason": "weathered", "score": 4})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer(lambda *_: GOOD)
    yield found
    found.close()


def make(server: FaultServer, question: Question = FIT, **options: Any) -> AnthropicJudge:
    quick = {"backoff": 0.01, "timeout": 5.0, "attempts": 3, "base_url": server.root}
    return AnthropicJudge.for_question(question, **{"model": "claude-test", **quick, **options})


def requests(count: int = 1) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="How is the sea?", response=f"Grey. Number {i}.") for i in range(count)]


def test_it_is_found_by_name(server: FaultServer) -> None:
    assert "anthropic" in judge_names()
    judge = make_judge("anthropic:claude-test", FIT, base_url=server.root)
    (verdict,) = judge.judge(requests())
    assert (verdict.score, verdict.judge) == (4, "anthropic:claude-test")


def test_it_asks_for_json_under_the_rubrics_schema(server: FaultServer) -> None:
    sent: list[str] = []

    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        sent.append(headers["x-api-key"] or headers["authorization"])
        return GOOD

    server.script = script
    (verdict,) = make(server, input_price=1.0, output_price=5.0).judge(requests())
    (body,) = server.bodies
    assert server.paths == ["/v1/messages"]
    assert KEY in sent[0]
    assert (body["model"], body["system"], body["temperature"]) == ("claude-test", FIT.system(), 0)
    assert [turn["role"] for turn in body["messages"]] == ["user"]
    assert json.loads(body["messages"][0]["content"]) == {"message": "How is the sea?", "reply": "Grey. Number 0."}
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": FIT.rubric.answer_schema}}
    assert (verdict.score, verdict.mode, verdict.explanation, verdict.scale) == (4, "json", "weathered", (1, 5))
    assert verdict.usage == Usage(requests=1, input_tokens=700, output_tokens=20, dollars=(700 + 20 * 5) / 1e6)


def test_tokens_that_the_provider_cached_are_counted(server: FaultServer) -> None:
    server.script = lambda *_: says({"reason": "x", "score": 4}, cache_read_input_tokens=100, cache_creation_input_tokens=10)
    (verdict,) = make(server).judge(requests())
    assert verdict.usage is not None and verdict.usage.input_tokens == 810


def test_a_model_without_schemas_is_asked_for_text_from_then_on(server: FaultServer) -> None:
    plain = says('```json\n{"reason": "short", "score": 2}\n```')
    server.script = lambda number, body, headers: fault(400, "output_config: not supported") if "output_config" in body else plain
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [(v.score, v.mode) for v in verdicts] == [(2, "text")] * 2
    assert ["output_config" in b for b in server.bodies] == [True, False, False]


def test_a_model_that_takes_no_temperature_is_asked_without(server: FaultServer) -> None:
    refusal = fault(400, "`temperature` is deprecated for this model.")
    server.script = lambda number, body, headers: refusal if "temperature" in body else GOOD
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [(v.score, v.mode) for v in verdicts] == [(4, "json")] * 2
    assert ["temperature" in b for b in server.bodies] == [True, False, False]


def test_there_are_no_log_probabilities_to_ask_for(server: FaultServer) -> None:
    with pytest.raises(JudgeError, match=r"mode='logprobs' is not possible with judge anthropic\. Allowed: auto, json, text"):
        make(server, mode="logprobs")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says("I cannot.", "refusal"), "the judge refused to answer"),
        (says('{"reason": "I', "max_tokens"), "answer cut off: length"),
        (says(""), "empty answer"),
        (says("about 4"), "unparsable answer"),
        (says({"reason": "x", "score": 9}), "score outside 1 to 5, or no integer"),
        (Answer("<html>maintenance</html>"), "garbage instead of an answer"),
        (Answer({"content": "4"}), "garbage instead of an answer"),
        (Answer([4]), "garbage instead of an answer"),
        (fault(500), "HTTP 500"),
        (fault(529, "overloaded"), "HTTP 529"),
    ],
)
def test_what_is_no_score_is_missing_and_never_a_number(server: FaultServer, answer: Answer, reason: str) -> None:
    server.script = lambda *_: answer
    (verdict,) = make(server).judge(requests())
    assert (verdict.score, verdict.missing) == (None, reason)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_stops_at_once(server: FaultServer, status: int) -> None:
    server.script = lambda *_: fault(status)
    with pytest.raises(JudgeError, match=f"HTTP {status}, .*check the"):
        make(server, concurrency=1).judge(requests(5))
    assert len(server.bodies) == 1


def test_faults_that_pass_are_retried_by_us_and_by_nobody_else(server: FaultServer) -> None:
    server.script = lambda number, *_: [fault(529), Answer(GOOD.body, hang=30), fault(429, Retry_After="0.1")][number] if number < 3 else GOOD
    (verdict,) = make(server, attempts=4, timeout=1.0).judge(requests())
    assert verdict.score == 4
    assert len(server.bodies) == 4
    assert server.times[3] - server.times[2] >= 0.1


def test_a_quota_that_is_used_up_holds_the_next_request(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        reset = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
        return says({"reason": "x", "score": 4}, headers={"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": reset})

    server.script = script
    make(server, concurrency=1, max_wait=0.4).judge(requests(2))
    assert server.times[1] - server.times[0] >= 0.4


def test_the_key_appears_nowhere(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        echoing = {"X_Echo": KEY, "request_id": KEY}
        kinds = [
            says({"reason": f"you sent {KEY}", "score": 3}, headers={"x-echo": KEY}),
            fault(400, f"bad {KEY}", **echoing),
            fault(500, f"bad {KEY}", **echoing),
            Answer(f"<html>{KEY}</html>", headers={"x-echo": KEY}),
            says(f"{KEY}", "refusal"),
        ]
        return kinds[number] if number < len(kinds) else fault(401, f"invalid x-api-key: {KEY}", **echoing)

    server.script = script
    caplog.set_level(logging.DEBUG)
    judge = make(server, concurrency=1, attempts=1, mode="json")
    seen = [v.model_dump_json() for request in requests(5) for v in judge.judge([request])]
    with pytest.raises(JudgeError, match="HTTP 401") as caught:
        judge.judge(requests())
    error = caught.value
    seen += ["".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())]
    seen += [repr(error), repr(error.__cause__), repr(error.__context__), repr(judge), repr(vars(judge)), judge.identity]
    seen += [caplog.text, repr([r.__dict__ for r in caplog.records])]
    assert len(server.bodies) == 6
    assert "[key]" in seen[0] and "[key]" in caplog.text  # the client did log the headers
    assert KEY not in "".join(seen)


def test_without_the_library_the_error_says_what_to_install(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'steered-lm\[anthropic\]'"):
        make(server)


def test_without_a_key_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="judge anthropic:claude-test needs a key, and the environment variable ANTHROPIC_API_KEY is not set"):
        AnthropicJudge.for_question(FIT, model="claude-test")
