"""The OpenAI-compatible judge against a real HTTP server: what it asks for, what it makes of answers and of refusals."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, FaultServer, fault, guesses, says

from steered_lm.errors import JudgeError
from steered_lm.judges import make_judge
from steered_lm.judges.base import Judge, JudgeRequest, StreamingJudge
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

KEY = "sk-planted-0123456789abcdef"
PERSONA = "A lighthouse keeper who talks in short, weathered sentences."
FIT = Question(Rubric.load(), PERSONA, "keeper")
GOOD = says({"reason": "weathered and short", "score": 4}, usage=(700, 20))
SURE = guesses({"4": math.log(0.75), "5": math.log(0.15), "Well": math.log(0.05)}, usage=(700, 1))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer(lambda *_: SURE)
    yield found
    found.close()


def make(server: FaultServer, question: Question = FIT, **options: Any) -> OpenAIJudge:
    quick = {"backoff": 0.01, "timeout": 5.0, "attempts": 3, "base_url": server.url}
    return OpenAIJudge.for_question(question, **{"model": "judge-1", **quick, **options})


def requests(count: int = 1) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="How is the sea?", response=f"Grey. Number {i}.") for i in range(count)]


def no_logprobs(number: int, body: dict[str, Any], headers: Any) -> Answer:
    return fault(400, "logprobs is not supported with this model") if "logprobs" in body else GOOD


def test_the_score_is_the_expected_value_over_the_score_tokens(server: FaultServer) -> None:
    judge = make(server)
    (verdict,) = judge.judge(requests())
    assert verdict.score == pytest.approx((4 * 0.75 + 5 * 0.15) / 0.9)
    assert verdict.mass == pytest.approx(0.9)
    assert (verdict.judge, verdict.cached, verdict.mode, verdict.scale) == ("openai:judge-1", False, "logprobs", (1, 5))
    assert isinstance(judge, Judge)
    assert isinstance(judge, StreamingJudge)


def test_a_request_for_one_token_holds_rubric_persona_prompt_and_reply_apart(server: FaultServer) -> None:
    make(server).judge(requests())
    (body,) = server.bodies
    system, user = body["messages"]
    assert system["content"] == FIT.system(token=True)
    assert PERSONA in system["content"]
    assert json.loads(user["content"]) == {"message": "How is the sea?", "reply": "Grey. Number 0."}
    asked = {name: body.get(name) for name in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs", "response_format")}
    assert asked == {"model": "judge-1", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20, "response_format": None}
    assert server.paths == ["/v1/chat/completions"]


def test_a_request_for_json_holds_the_rubrics_schema(server: FaultServer) -> None:
    server.script = lambda *_: GOOD
    (verdict,) = make(server, mode="json").judge(requests())
    (body,) = server.bodies
    assert body["messages"][0]["content"] == FIT.system()
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "strict": True, "schema": FIT.rubric.answer_schema},
    }
    assert "logprobs" not in body and "max_tokens" not in body
    assert (verdict.score, verdict.mode, verdict.explanation) == (4, "json", "weathered and short")


def test_the_key_is_sent_as_a_bearer_and_without_one_nothing_is(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str | None] = []

    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        sent.append(headers["authorization"])
        return SURE

    server.script = script
    make(server).judge(requests())
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make(server, key_env="none").judge(requests())[0].score is not None
    assert sent == [f"Bearer {KEY}", None]


# -- what an endpoint does not take --


def test_an_endpoint_that_refuses_log_probabilities_is_asked_for_json_from_then_on(server: FaultServer) -> None:
    server.script = no_logprobs
    judge = make(server, concurrency=1)
    verdicts = judge.judge(requests(3)) + judge.judge(requests(1))
    assert [(v.score, v.mode) for v in verdicts] == [(4, "json")] * 4
    assert ["logprobs" in b for b in server.bodies] == [True, False, False, False, False]
    assert [v.usage.requests for v in verdicts if v.usage] == [2, 1, 1, 1]


def test_an_endpoint_that_forgets_log_probabilities_is_asked_for_json(server: FaultServer) -> None:
    server.script = lambda number, body, headers: says("4", "length") if "logprobs" in body else GOOD
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [(v.score, v.mode) for v in verdicts] == [(4, "json")] * 2
    assert ["logprobs" in b for b in server.bodies] == [True, False, False]


def test_an_endpoint_that_takes_neither_is_asked_for_text(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        plain = "logprobs" not in body and "response_format" not in body
        return says('```json\n{"reason": "short", "score": 2}\n```') if plain else fault(422, "unexpected field")

    server.script = script
    judge = make(server, concurrency=1)
    verdicts = judge.judge(requests(2))
    assert [(v.score, v.mode, v.explanation) for v in verdicts] == [(2, "text", "short")] * 2
    assert len(server.bodies) == 4


def test_an_endpoint_that_takes_a_schema_and_forgets_it_is_read_as_text_without_asking_again(server: FaultServer) -> None:
    server.script = lambda number, body, headers: fault(400, "no") if "logprobs" in body else says('```json\n{"reason": "short", "score": 2}\n```')
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [(v.score, v.mode) for v in verdicts] == [(2, "text")] * 2
    assert len(server.bodies) == 3


@pytest.mark.parametrize("mode", ["logprobs", "json", "text"])
def test_a_mode_that_is_asked_for_is_not_left(server: FaultServer, mode: str) -> None:
    server.script = lambda *_: fault(400, "never")
    (verdict,) = make(server, mode=mode).judge(requests())
    assert (verdict.missing, verdict.explanation, len(server.bodies)) == ("HTTP 400", "never", 1)


def test_a_model_that_thinks_before_it_answers_is_missing_and_no_reason_to_ask_otherwise(server: FaultServer) -> None:
    server.script = lambda *_: guesses({"<think>": -0.01, "4": -5.0})
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert {v.missing for v in verdicts} == {"probability 0.01 on score tokens, below 0.25"}
    assert [v.mode for v in verdicts] == ["logprobs"] * 2
    assert len(server.bodies) == 2


def test_log_probabilities_that_fail_once_they_have_worked_are_missing(server: FaultServer) -> None:
    server.script = lambda number, *_: says("4") if number == 1 else SURE
    verdicts = make(server, concurrency=1).judge(requests(3))
    assert [v.missing for v in verdicts] == [None, "the endpoint gave no log-probabilities", None]
    assert len(server.bodies) == 3


def test_a_temperature_that_is_refused_is_dropped(server: FaultServer) -> None:
    server.script = lambda number, body, headers: fault(400, "Unsupported value: 'temperature'") if "temperature" in body else SURE
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [v.mode for v in verdicts] == ["logprobs"] * 2
    assert ["temperature" in b for b in server.bodies] == [True, False, False]


def test_a_limit_of_tokens_under_its_old_name_is_renamed(server: FaultServer) -> None:
    refusal = fault(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
    server.script = lambda number, body, headers: refusal if "max_tokens" in body else SURE
    verdicts = make(server, concurrency=1).judge(requests(2))
    assert [v.mode for v in verdicts] == ["logprobs"] * 2
    assert [b.get("max_completion_tokens") for b in server.bodies] == [None, 16, 16]


def test_a_single_refused_request_is_missing_and_does_not_change_how_the_others_are_asked(server: FaultServer) -> None:
    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        return fault(400, "content policy") if "Number 0" in body["messages"][1]["content"] else SURE

    server.script = script
    verdicts = make(server, concurrency=1).judge(requests(3))
    assert [v.missing for v in verdicts] == ["HTTP 400", None, None]
    assert "content policy" in verdicts[0].explanation
    assert [v.mode for v in verdicts[1:]] == ["logprobs"] * 2


def test_a_request_that_is_refused_after_others_were_taken_is_asked_once(server: FaultServer) -> None:
    server.script = lambda number, *_: fault(400, "content policy") if number == 1 else SURE
    verdicts = make(server, concurrency=1).judge(requests(3))
    assert [v.missing for v in verdicts] == [None, "HTTP 400", None]
    assert len(server.bodies) == 3


# -- what is no score --


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("<html>maintenance</html>", headers={"content-type": "text/html"}), "garbage instead of an answer"),
        (Answer("{broken"), "garbage instead of an answer"),
        (Answer("[" * 100_000), "garbage instead of an answer"),
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
        (says({"reason": "x", "score": 4}, finish="content_filter"), "answer cut off: content_filter"),
        (says(None, refusal="I cannot help with that."), "the judge refused to answer"),
    ],
)
def test_what_is_no_score_is_missing_and_never_a_number(server: FaultServer, answer: Answer, reason: str) -> None:
    server.script = lambda *_: answer
    (verdict,) = make(server, mode="json").judge(requests())
    assert (verdict.score, verdict.missing) == (None, reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (guesses({"4": float("nan"), "5": -1.0}), "a log-probability of nan is none"),
        (guesses({"4": 0.7}), "a log-probability of 0.7 is none"),
        (guesses({"4": None}), "garbage instead of an answer"),  # type: ignore[dict-item]
        (says("4", logprobs={"content": [{"token": "4"}]}), "garbage instead of an answer"),
        (says("4", logprobs={"content": [{"token": "4", "top_logprobs": [{"token": 4, "logprob": 0}]}]}), "garbage instead of an answer"),
        (says("4", logprobs={"content": []}), "the endpoint gave no log-probabilities"),
        (says("4", logprobs="none"), "the endpoint gave no log-probabilities"),
        (says(None, refusal="I cannot help with that."), "the judge refused to answer"),
    ],
)
def test_log_probabilities_that_are_none_are_missing_and_never_a_number(server: FaultServer, answer: Answer, reason: str) -> None:
    server.script = lambda *_: answer
    (verdict,) = make(server, mode="logprobs").judge(requests())
    assert (verdict.score, verdict.missing) == (None, reason)


@pytest.mark.parametrize("request_", [JudgeRequest(prompt="Hello", response=""), JudgeRequest(prompt="Hello", response=" \n")])
def test_an_empty_response_is_missing_without_asking(server: FaultServer, request_: JudgeRequest) -> None:
    (verdict,) = make(server).judge([request_])
    assert (verdict.score, verdict.missing) == (None, "empty response")
    assert server.bodies == []


# -- other kinds --


def test_an_error_in_a_body_that_was_sent_as_a_success_is_garbage_with_its_words_and_without_the_key(server: FaultServer) -> None:
    server.script = lambda *_: Answer({"error": {"message": f"no provider takes {KEY}"}})
    (verdict,) = make(server).judge(requests())
    assert (verdict.missing, verdict.explanation) == ("garbage instead of an answer", "no chat completion: no provider takes [key]")


@pytest.mark.parametrize("proxy", ["http://me:pass-planted-1234@127.0.0.1:{port}", "http://me:pass-planted-1234@127.0.0.1:none"])
def test_a_proxys_password_is_in_no_verdict(server: FaultServer, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    # the scripted server refuses CONNECT, as a proxy does that does not know the user
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy.format(port=server.root.rpartition(":")[2]))
    (verdict,) = make(server, base_url="https://judge.invalid/v1", attempts=1).judge(requests())
    assert verdict.missing == "no connection to https://judge.invalid/v1, 1 attempts"
    assert "proxy" in verdict.explanation
    assert "pass-planted-1234" not in verdict.model_dump_json()


def test_a_trait_is_scored_from_0_to_100_and_a_refusal_is_missing(server: FaultServer) -> None:
    question = Question.of_trait("humorous")
    server.script = lambda number, *_: guesses({"80": math.log(0.5), "60": math.log(0.5)}) if number == 0 else guesses({"REF": -0.01})
    kept, refused = make(server, question, concurrency=1).judge(requests(2))
    assert (kept.score, kept.scale) == (pytest.approx(70), (0, 100))
    assert (refused.missing, refused.scale) == ("the response is a refusal", (0, 100))
    assert "humorous" in server.bodies[0]["messages"][0]["content"]


def test_a_pair_is_asked_in_both_orders(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(Rubric.load("pairwise"), PERSONA, "keeper")

    def script(number: int, body: dict[str, Any], headers: Any) -> Answer:
        shown = json.loads(body["messages"][1]["content"])
        return guesses({"A" if shown["reply_a"] == "Grey." else "B": -0.05})

    server.script = script
    judge = make_judge("openai:judge-1", question, base_url=server.url)
    (verdict,) = judge.judge([JudgeRequest(prompt="How is the sea?", response="Grey.", other="It is lovely!")])
    assert (verdict.choice, verdict.score, verdict.consistent, verdict.mode) == ("A", 1, True, "logprobs")
    assert len(server.bodies) == 2


def test_a_pair_with_one_response_is_refused_before_anything_is_asked(server: FaultServer) -> None:
    with pytest.raises(JudgeError, match="Give both responses"):
        make(server, Question(Rubric.load("pairwise"), PERSONA)).judge(requests())
    assert server.bodies == []


# -- options --


def test_without_a_key_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match=r"needs a key, and the environment variable OPENAI_API_KEY is not set\. Set it"):
        OpenAIJudge.for_question(FIT, model="m")
    with pytest.raises(JudgeError, match="variable MY_KEY is not set"):
        OpenAIJudge.for_question(FIT, model="m", key_env="MY_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": KEY}, "no option api_key.*environment only"),
        ({"key_env": KEY}, "not an environment variable's name"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "without user, password or query"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "without user, password or query"),
        ({"concurency": 3}, "Did you mean 'concurrency'"),
        ({"concurrency": 0}, "concurrency: .*greater than or equal to 1"),
        ({"mode": "guess"}, "mode: .*'auto', 'logprobs', 'json' or 'text'"),
        ({"max_dollars": 1.0}, "max_dollars needs input_price and output_price"),
        ({"input_price": 1.0}, "give input_price and output_price together"),
    ],
)
def test_a_wrong_option_is_refused_without_showing_what_may_be_a_key(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(JudgeError, match=message) as caught:
        OpenAIJudge.for_question(FIT, **{"model": "m", **options})
    assert KEY not in str(caught.value)


def test_the_identity_follows_what_can_change_a_verdict_and_nothing_else(server: FaultServer) -> None:
    rubric = Rubric.load()
    newer = rubric.model_copy(update={"version": rubric.version + 1})
    judges = [
        make(server),
        make(server, model="n"),
        make(server, base_url="http://elsewhere/v1"),
        make(server, mode="json"),
        make(server, Question(rubric, "A baker.")),
        make(server, Question(newer, PERSONA)),
    ]
    assert len({j.identity for j in judges}) == 6
    same = make(server, concurrency=2, timeout=9.0, attempts=1, max_requests=5, input_price=1.0, output_price=1.0)
    assert same.identity == judges[0].identity
    assert make(server, base_url=f"{server.url}/").identity == judges[0].identity


def test_a_cache_is_told_what_the_verdicts_are_about(server: FaultServer) -> None:
    assert make(server).facts == {"model": "judge-1", "rubric": "persona_fit", "rubric_version": str(FIT.rubric.version), "about": "keeper"}


def test_a_rubric_that_leaves_a_level_out_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rubric.yaml"
    levels = "levels: {1: a, 2: b, 3: c, 5: e}"
    head = "name: x\nkind: persona_fit\nversion: 1\ninstructions: rate\nanswer: json\nanswer_token: one digit\nshows: {reply: response}\n"
    file.write_text(head + levels)
    with pytest.raises(JudgeError, match=r"describe each of \[1, 2, 3, 4, 5\]"):
        Rubric.load(file)
