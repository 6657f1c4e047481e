"""The OpenAI-compatible judge against a real HTTP server that misbehaves on purpose."""

import asyncio
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steered_lm.errors import JudgeError
from steered_lm.judges.base import Judge, JudgeRequest, StreamingJudge
from steered_lm.judges.cache import CachedJudge, JudgeCache
from steered_lm.judges.endpoint import Endpoint
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.rubric import Rubric

KEY = "sk-planted-0123456789abcdef"
PERSONA = "A lighthouse keeper who talks in short, weathered sentences."


class Answer:
    """What the server sends: a status, a body, headers, and how long it sits still before."""

    def __init__(self, body: Any = "", status: int = 200, headers: dict[str, str] | None = None, hang: float = 0.0) -> None:
        self.body = body if isinstance(body, str) else json.dumps(body)
        self.status, self.headers, self.hang = status, headers or {}, hang


def says(content: Any, finish: str = "stop", refusal: str | None = None) -> Answer:
    """A chat completion whose message has this content (objects become JSON)."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return Answer({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def fault(status: int, message: str = "no", **headers: str) -> Answer:
    return Answer({"error": {"message": message, "type": "test", "code": None}}, status, {k.replace("_", "-"): v for k, v in headers.items()})


GOOD = says({"reason": "weathered and short", "score": 4})


class FaultServer:
    """Answers each request with what ``script`` returns for (its number from 0, its JSON body, its headers)."""

    def __init__(self) -> None:
        self.script: Callable[[int, dict[str, Any], Any], Answer] = lambda number, body, headers: GOOD
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        answer = self.script(number, body, handler.headers)
        self._released.wait(answer.hang)
        with self._lock:
            self.in_flight -= 1
        try:
            handler.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(answer.body.encode())))
            handler.end_headers()
            handler.wfile.write(answer.body.encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # the client gave up waiting, as it should

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer()
    yield found
    found.close()


def make(server: FaultServer, **options: Any) -> OpenAIJudge:
    quick = {"backoff": 0.01, "timeout": 5.0, "attempts": 3, "base_url": server.url}
    return OpenAIJudge(Endpoint.from_options({"model": "judge-1", **quick, **options}), PERSONA)


def requests(count: int = 1) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="How is the sea?", response=f"Grey. Number {i}.") for i in range(count)]


def test_a_good_answer_becomes_a_score_with_reason_and_mode(server: FaultServer) -> None:
    judge = make(server)
    (verdict,) = judge.judge(requests())
    assert verdict.score == 4
    assert verdict.explanation == "weathered and short [json_schema, temperature 0]"
    assert (verdict.judge, verdict.cached) == ("openai:judge-1", False)
    assert isinstance(judge, Judge)
    assert isinstance(judge, StreamingJudge)


def test_the_request_holds_rubric_persona_schema_and_prompt_and_reply_apart(server: FaultServer) -> None:
    make(server).judge(requests())
    (body,) = server.bodies
    system, user = body["messages"]
    assert PERSONA in system["content"]
    assert Rubric.load().levels[3] in system["content"]
    assert json.loads(user["content"]) == {"message": "How is the sea?", "reply": "Grey. Number 0."}
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["strict"] is True


def test_verdicts_come_in_the_order_of_the_requests(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        index = int(json.loads(body["messages"][1]["content"])["reply"].split()[-1].rstrip("."))
        answer = says({"reason": str(index), "score": index % 5 + 1})
        answer.hang = 0.02 * (10 - index)
        return answer

    server.script = script
    verdicts = make(server).judge(requests(10))
    assert [v.explanation.split()[0] for v in verdicts] == [str(i) for i in range(10)]


def test_no_more_requests_than_allowed_are_in_flight(server: FaultServer) -> None:
    server.script = lambda *_: Answer(GOOD.body, hang=0.03)
    verdicts = make(server, concurrency=3).judge(requests(12))
    assert all(v.score == 4 for v in verdicts)
    assert server.most_in_flight == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_model_or_path_stops_at_once(server: FaultServer, status: int) -> None:
    server.script = lambda *_: fault(status)
    with pytest.raises(JudgeError, match=f"HTTP {status}, .*check the"):
        make(server, concurrency=1).judge(requests(20))
    assert len(server.bodies) == 1


def test_verdicts_finished_before_the_key_was_refused_are_in_the_cache(server: FaultServer, tmp_path: Path) -> None:
    server.script = lambda number, *_: GOOD if number < 4 else fault(401)
    cache = JudgeCache(tmp_path / "cache.sqlite")
    with pytest.raises(JudgeError, match="HTTP 401"):
        CachedJudge(make(server, concurrency=1), cache).judge(requests(6))
    assert len(cache) == 4
    server.script = lambda *_: GOOD
    verdicts = CachedJudge(make(server), cache).judge(requests(6))
    assert [v.cached for v in verdicts] == [True] * 4 + [False] * 2


def test_a_rate_limit_is_waited_out_as_long_as_the_endpoint_asks(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(429, Retry_After="0.4") if number == 0 else GOOD
    (verdict,) = make(server).judge(requests())
    assert verdict.score == 4
    assert server.times[1] - server.times[0] >= 0.4


def test_a_retry_date_is_understood_and_a_wait_beyond_the_limit_is_not_waited(server: FaultServer) -> None:
    server.script = lambda *_: fault(429, Retry_After=formatdate(time.time() + 3600, usegmt=True))
    started = time.monotonic()
    (verdict,) = make(server).judge(requests())
    assert (verdict.score, verdict.missing) == (None, "HTTP 429")
    assert len(server.bodies) == 1
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_lasts_is_missing_after_the_allowed_attempts(server: FaultServer, status: int) -> None:
    server.script = lambda *_: fault(status)
    (verdict,) = make(server).judge(requests())
    assert (verdict.score, verdict.missing) == (None, f"HTTP {status}")
    assert len(server.bodies) == 3


def test_a_passing_server_error_is_retried_to_a_score(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(500) if number < 2 else GOOD
    assert make(server).judge(requests())[0].score == 4
    assert len(server.bodies) == 3


def test_an_endpoint_that_fails_many_requests_in_a_row_is_left_alone(server: FaultServer) -> None:
    server.script = lambda *_: fault(500)
    verdicts = make(server, concurrency=1, attempts=1).judge(requests(30))
    assert [v.missing for v in verdicts[:8]] == ["HTTP 500"] * 8
    assert {v.missing for v in verdicts[8:]} == {"not asked, as 8 requests in a row had failed"}
    assert len(server.bodies) == 8


def test_a_hanging_endpoint_times_out_and_is_missing(server: FaultServer) -> None:
    server.script = lambda *_: Answer(GOOD.body, hang=30)
    (verdict,) = make(server, timeout=0.2, attempts=2).judge(requests())
    assert verdict.missing == "no answer within 0.2 s, 2 attempts"
    assert len(server.bodies) == 2


def test_a_refused_connection_is_missing(server: FaultServer) -> None:
    server.close()
    verdicts = make(server).judge(requests(2))
    assert {v.missing for v in verdicts} == {f"no connection to {server.url}, 3 attempts"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("<html>maintenance</html>", headers={"content-type": "text/html"}), "garbage instead of an answer"),
        (Answer("{broken"), "garbage instead of an answer"),
        (Answer(""), "garbage instead of an answer"),
        (Answer({}), "garbage instead of an answer"),
        (Answer([1, 2]), "garbage instead of an answer"),
        (Answer({"choices": []}), "garbage instead of an answer"),
        (Answer({"choices": [{}]}), "garbage instead of an answer"),
        (Answer({"choices": "4"}), "garbage instead of an answer"),
        (says(""), "empty answer"),
        (says(None), "empty answer"),
        (says("4"), "answer of another form"),
        (says("I would say 4 out of 5."), "unparsable answer"),
        (says({"reason": "x"}), "answer of another form"),
        (says({"reason": "x", "score": 4, "sure": True}), "answer of another form"),
        (says({"reason": "x", "score": 0}), "score outside 1 to 5, or no integer"),
        (says({"reason": "x", "score": 6}), "score outside 1 to 5, or no integer"),
        (says({"reason": "x", "score": 3.5}), "score outside 1 to 5, or no integer"),
        (says({"reason": "x", "score": "4"}), "score outside 1 to 5, or no integer"),
        (says({"reason": "x", "score": True}), "score outside 1 to 5, or no integer"),
        (says('{"reason": "x", "score": NaN}'), "score outside 1 to 5, or no integer"),
        (says({"reason": "x", "score": 4}, finish="length"), "answer cut off: length"),
        (says(None, refusal="I cannot help with that."), "the judge refused to answer"),
    ],
)
def test_what_is_no_score_is_missing_and_never_a_number(server: FaultServer, answer: Answer, reason: str) -> None:
    server.script = lambda *_: answer
    (verdict,) = make(server).judge(requests())
    assert (verdict.score, verdict.missing) == (None, reason)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_is_missing_without_asking(server: FaultServer, response: str) -> None:
    (verdict,) = make(server).judge([JudgeRequest(prompt="Hello", response=response)])
    assert (verdict.score, verdict.missing) == (None, "empty response")
    assert server.bodies == []


def test_an_endpoint_that_refuses_the_schema_is_asked_plainly_from_then_on(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        return fault(400, "response_format is not supported") if "response_format" in body else says('```json\n{"reason": "short", "score": 2}\n```')

    server.script = script
    judge = make(server, concurrency=1)
    verdicts = judge.judge(requests(3)) + judge.judge(requests(1))
    assert [(v.score, v.explanation) for v in verdicts] == [(2, "short [plain_json, temperature 0]")] * 4
    assert ["response_format" in b for b in server.bodies] == [True, False, False, False, False]


def test_an_endpoint_that_refuses_temperature_zero_is_asked_without_it(server: FaultServer) -> None:
    server.script = lambda number, body, headers: fault(400, "Unsupported value: 'temperature'") if "temperature" in body else GOOD
    (verdict,) = make(server).judge(requests())
    assert (verdict.score, verdict.explanation) == (4, "weathered and short [json_schema, temperature default]")


def test_a_single_refused_request_is_missing_and_does_not_change_how_the_others_are_asked(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        return fault(400, "content policy") if "Number 0" in body["messages"][1]["content"] else GOOD

    server.script = script
    verdicts = make(server, concurrency=1).judge(requests(3))
    assert [v.missing for v in verdicts] == ["HTTP 400", None, None]
    assert "content policy" in verdicts[0].explanation
    assert "json_schema" in verdicts[2].explanation


def test_it_works_inside_a_running_event_loop(server: FaultServer, tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "cache.sqlite")

    async def caller() -> list[float | None]:
        return [v.score for v in CachedJudge(make(server), cache).judge(requests(3))]

    assert asyncio.run(caller()) == [4, 4, 4]
    assert len(cache) == 3


def test_the_key_appears_nowhere(server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        echo = headers["authorization"]
        assert KEY in echo
        kinds = [
            says({"reason": f"you sent {echo}", "score": 3}),
            says(f"no score, {echo}"),
            fault(400, echo),
            fault(500, echo),
            says(None, refusal=echo),
        ]
        return kinds[number] if number < len(kinds) else fault(401, f"Incorrect API key provided: {echo}")

    server.script = script
    caplog.set_level(logging.DEBUG)
    judge = make(server, concurrency=1, attempts=1)
    path = tmp_path / "cache.sqlite"
    seen = []
    cached = CachedJudge(judge, JudgeCache(path))
    for request in requests(4):
        seen += [v.model_dump_json() for v in cached.judge([request])]
    try:
        judge.judge(requests())
        pytest.fail("the key was refused, and the judge went on")
    except JudgeError as error:
        seen += [traceback.format_exc(), repr(error), repr(error.__cause__), repr(error.__context__)]
    seen += [repr(judge), repr(vars(judge)), judge.identity, judge.name, caplog.text]
    files = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert "[key]" in "".join(seen)
    assert KEY not in "".join(seen)
    assert KEY.encode() not in files


def test_without_a_key_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match=r"needs a key, and the environment variable OPENAI_API_KEY is not set\. Set it"):
        OpenAIJudge(Endpoint.from_options({"model": "m"}), PERSONA)
    with pytest.raises(JudgeError, match="variable MY_KEY is not set"):
        OpenAIJudge(Endpoint.from_options({"model": "m", "key_env": "MY_KEY"}), PERSONA)


def test_a_local_endpoint_needs_no_key(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make(server, key_env="none").judge(requests())[0].score == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": KEY}, "no option api_key.*environment only"),
        ({"key_env": KEY}, "not an environment variable's name"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "without user, password or query"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "without user, password or query"),
        ({"concurency": 3}, "Did you mean 'concurrency'"),
        ({"concurrency": 0}, "concurrency: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_refused_without_showing_what_may_be_a_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        Endpoint.from_options({"model": "m", **options})
    assert KEY not in str(caught.value)


def test_the_identity_follows_model_persona_endpoint_and_rubric(server: FaultServer) -> None:
    base = Endpoint.from_options({"model": "m", "base_url": server.url})
    rubric = Rubric.load()
    judges = [
        OpenAIJudge(base, PERSONA),
        OpenAIJudge(base.model_copy(update={"model": "n"}), PERSONA),
        OpenAIJudge(base.model_copy(update={"base_url": "http://elsewhere/v1"}), PERSONA),
        OpenAIJudge(base, "A baker."),
        OpenAIJudge(base, PERSONA, rubric=rubric.model_copy(update={"version": rubric.version + 1})),
    ]
    assert len({j.identity for j in judges}) == 5
    assert OpenAIJudge(base.model_copy(update={"concurrency": 2, "timeout": 9.0}), PERSONA).identity == judges[0].identity


def test_a_rubric_that_leaves_a_level_out_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rubric.yaml"
    file.write_text("name: x\nkind: persona_fit\nversion: 1\ninstructions: rate\nanswer: json\nanswer_token: one digit\nshows: {reply: response}\nlevels: {1: a, 2: b, 3: c, 5: e}\n")
    with pytest.raises(JudgeError, match=r"describe each of \[1, 2, 3, 4, 5\]"):
        Rubric.load(file)
