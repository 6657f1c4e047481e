"""Answers of language models read as scores or as missing.

``recorded/`` holds chat completions in the form that OpenAI documents, written by hand so that every rule has a case; the probabilities are
theirs (``logprob`` is the natural logarithm), and the expected values here were worked out from them on paper. ``llama_cpp.json`` is what a real
server of llama.cpp answered.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer as Response
from fault_server import FaultServer, says

from steered_lm.judges.answers import LEAST_MASS, SPLIT, UNPARSABLE, Answer, expected, read, read_json, read_text, read_top
from steered_lm.judges.base import JUDGE_REFUSED, REFUSAL, JudgeRequest, Usage, Verdict
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

RECORDED = Path(__file__).with_name("recorded")
TRAIT, FIT, PAIR, COHERENCE = (Rubric.load(kind) for kind in ("trait", "persona_fit", "pairwise", "coherence"))
LONG_SHORT = Rubric.load("persona_fit").model_copy(update={"scale": (1, 10), "levels": dict.fromkeys(range(1, 11), "x")})


def recorded(name: str) -> Answer:
    data: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    (choice,) = data["choices"]
    message, probabilities = choice["message"], choice["logprobs"]
    top = None if probabilities is None else [(one["token"], one["logprob"]) for one in probabilities["content"][0]["top_logprobs"]]
    usage = Usage(requests=1, input_tokens=data["usage"]["prompt_tokens"], output_tokens=data["usage"]["completion_tokens"])
    cut = choice["finish_reason"] if choice["finish_reason"] != "stop" else None
    refusal = message.get("refusal")  # llama.cpp has no such field
    return Answer(message["content"] or refusal or "", top, refusal is not None, cut, usage)


def logs(**probabilities: float) -> list[tuple[str, float | None]]:
    return [(token.removeprefix("n"), math.log(p)) for token, p in probabilities.items()]


# Expected values over the recorded probabilities ------------------------------------------------------------------------------------------------


def test_a_real_servers_answer_is_read_as_the_expected_value_of_its_score_tokens():
    answer = recorded("llama_cpp")
    assert (answer.text, answer.cut, len(answer.top)) == ("4", "length", 20)
    reading = read(FIT, answer, "logprobs")
    # exp(-0.36415392) = 0.694784 on 4, exp(-3.39175415) = 0.033650 on 5, and no other digit among the twenty
    assert reading.mass == pytest.approx(0.728434, abs=1e-6)
    assert reading.score == pytest.approx((4 * 0.694784 + 5 * 0.033650) / 0.728434, abs=1e-5)
    assert reading.score == pytest.approx(4.046194, abs=1e-5)


def test_a_score_of_0_to_100_is_the_expected_value_over_the_number_tokens():
    answer = recorded("trait")
    assert len(answer.top) == 20
    reading = read(TRAIT, answer, "logprobs")
    # 85 has .5, and .001 with a space; "The", "REF", "I", a line break and "**" are no scores
    mass = 0.5 + 0.001 + 0.2 + 0.1 + 0.05 + 0.04 + 0.02 + 0.02 + 0.01 + 0.01 + 0.01 + 0.008 + 0.007 + 0.005 + 0.002
    total = (
        42.585  # 85: .501
        + 18.0  # 90: .2
        + 8.0  # 80: .1
        + 3.75  # 75: .05
        + 3.8  # 95: .04
        + 1.4  # 70: .02
        + 1.76  # 88: .02
        + 1.0  # 100: .01
        + 0.87  # 87: .01
        + 0.92  # 92: .01
        + 0.48  # 60: .008
        + 0.574  # 82: .007
        + 0.39  # 78: .005
        + 0.13  # 65: .002
    )
    assert mass == pytest.approx(0.983)
    assert total == pytest.approx(83.659)
    assert reading.score == pytest.approx(85.10580, abs=1e-5)
    assert reading.score == pytest.approx(total / mass)
    assert reading.mass == pytest.approx(0.983)
    assert reading.missing is None


def test_a_score_of_1_to_5_leaves_out_numbers_beyond_the_scale():
    reading = read(FIT, recorded("fit"), "logprobs")
    # 4 x .6 + 3 x .25 + 5 x .1 + 2 x .03 + 1 x .005 = 3.715 of .985; "0", "6", "10" and "3." do not count
    assert reading.score == pytest.approx(3.715 / 0.985)
    assert reading.score == pytest.approx(3.771574, abs=1e-6)
    assert reading.mass == pytest.approx(0.985)


def test_tokens_that_differ_in_spaces_add_up_and_what_only_looks_like_a_number_does_not_count():
    reading = read(COHERENCE, recorded("duplicates"), "logprobs")
    # 7: .3 + .2; 10: .1 + .05; 100: .02. Not: "7." "087" "٧" "101" "-7" "7/" "½" "²" "１" "1e1" "0x7" "07" "_7" and words
    assert reading.mass == pytest.approx(0.67)
    assert reading.score == pytest.approx((3.5 + 1.5 + 2.0) / 0.67)
    assert reading.score == pytest.approx(10.447761, abs=1e-6)


def test_minus_9999_and_minus_infinity_are_a_probability_of_zero():
    reading = read(TRAIT, recorded("no_probability"), "logprobs")
    assert reading.score == pytest.approx(0.75 * 0 + 0.25 * 10)
    assert reading.mass == pytest.approx(1.0)


def test_a_preference_is_the_expected_value_over_three_letters_and_names_the_likeliest():
    reading = read(PAIR, recorded("pairwise"), "logprobs")
    # A .54 + .03, B .17 + .0005, C .18; "a", "A.", "(A", "AB" and "Tie" are other answers
    assert reading.mass == pytest.approx(0.9205)
    assert reading.score == pytest.approx((0.57 - 0.1705) / 0.9205)
    assert reading.score == pytest.approx(0.434003, abs=1e-6)
    assert reading.choice == "A"
    assert reading.confidence == pytest.approx(0.57 / 0.9205)


@pytest.mark.parametrize(
    ("probabilities", "score", "choice", "confidence"),
    [
        ({"A": 0.2, "B": 0.7, "C": 0.1}, -0.5, "B", 0.7),
        ({"A": 0.1, "B": 0.1, "C": 0.8}, 0.0, "tie", 0.8),
        ({"A": 0.4, "B": 0.4, "C": 0.2}, 0.0, "tie", 0.4),  # neither is the likeliest
        ({"B": 0.5}, -1.0, "B", 1.0),
    ],
)
def test_the_choice_of_a_pair_is_the_likeliest_letter_and_none_when_two_are(probabilities, score, choice, confidence):
    reading = read_top(PAIR, logs(**probabilities))
    assert (reading.score, reading.confidence) == (pytest.approx(score), pytest.approx(confidence))
    assert reading.choice == choice


# Missing ----------------------------------------------------------------------------------------------------------------------------------------


def test_too_little_probability_on_scores_is_missing_and_the_mass_is_kept():
    reading = read(TRAIT, recorded("low_mass"), "logprobs")
    # 85 .12, 80 .06, 90 .04, 75 .004, 50 .001, 95 .001, 70 .0003
    assert reading.mass == pytest.approx(0.2263)
    assert (reading.score, reading.missing) == (None, "probability 0.23 on score tokens, below 0.25")


def test_the_least_mass_is_a_quarter():
    assert LEAST_MASS == 0.25
    assert read_top(FIT, [("3", math.log(0.2501))]).score == 3
    assert read_top(FIT, [("3", math.log(0.2499))]).score is None


def test_the_word_for_a_refusal_is_recognised_by_its_first_letters_in_any_case():
    reading = read(TRAIT, recorded("refusal_word"), "logprobs")
    # "REF" .7 + .0003, "RE" .1, "Re" .03 against .12 + .01 + .01 + .004 + .003 + .001 + .0003 + .0001; "REFER" and "R" are not it
    assert (reading.score, reading.missing) == (None, REFUSAL)
    assert reading.mass == pytest.approx(0.1484)


def test_a_refusal_needs_a_quarter_of_the_probability_and_more_than_the_scores_have():
    assert read_top(TRAIT, logs(REF=0.3, n90=0.4)).score == 90
    assert read_top(TRAIT, logs(REF=0.4, n90=0.3)).missing == REFUSAL
    assert read_top(TRAIT, logs(ref=0.4, n90=0.3)).missing == REFUSAL
    assert read_top(TRAIT, logs(REF=0.9, n5=0.05)).missing == REFUSAL  # whether its numbers are split does not matter then
    assert read_top(TRAIT, logs(REF=0.2, n90=0.1)).missing == "probability 0.10 on score tokens, below 0.25"
    assert read_top(TRAIT, logs(R=0.4, n90=0.3)).score == 90  # one letter is too little to tell
    # a rubric without such a word takes it for any other
    assert read_top(COHERENCE, logs(REF=0.4, n90=0.3)).score == 90


@pytest.mark.parametrize("name", ["nan", "null"])
def test_a_log_probability_that_is_none_makes_the_answer_missing(name):
    reading = read(TRAIT, recorded(name), "logprobs")
    assert (reading.score, reading.missing) == (None, f"a log-probability of {'nan' if name == 'nan' else None} is none")


@pytest.mark.parametrize("bad", [0.5, math.inf])
def test_a_log_probability_above_zero_is_none_but_for_rounding(bad):
    assert read_top(FIT, [("3", bad)]).missing == f"a log-probability of {bad} is none"
    assert read_top(FIT, [("3", 1e-6)]).score == 3
    assert read_top(FIT, [("3", 1e-6)]).mass == 1.0


def test_probabilities_that_add_up_to_more_than_one_are_no_distribution():
    assert read_top(FIT, logs(n3=0.7, n4=0.7)).missing == "the probabilities of the likeliest tokens add up to 1.40"
    assert read_top(FIT, logs(n3=0.7, n4=0.31)).mass == 1.0  # rounding in sixteen bits


def test_no_log_probabilities_are_missing_and_never_read_from_the_text():
    assert read(TRAIT, recorded("no_logprobs"), "logprobs").missing == "the endpoint gave no log-probabilities"
    assert read(TRAIT, Answer("85", []), "logprobs").missing == "the endpoint gave no log-probabilities"
    assert read(TRAIT, recorded("no_logprobs"), "text").score == 85


def test_scores_written_digit_by_digit_are_missing_since_8_may_begin_87():
    reading = read(TRAIT, recorded("digits"), "logprobs")
    assert (reading.score, reading.missing) == (None, SPLIT)
    # one token of output, so that only the absence of whole numbers tells
    assert read(TRAIT, recorded("digits")._replace(text="8", cut="length"), "logprobs").missing == SPLIT
    assert read_top(LONG_SHORT, logs(n1=0.6, n5=0.3)).missing == SPLIT
    # the answer itself tells, whatever else is likely
    assert read_top(TRAIT, logs(n8=0.6, n10=0.3), "87").missing == SPLIT
    assert read_top(TRAIT, logs(n8=0.6, n10=0.3), "8").score == pytest.approx((4.8 + 3) / 0.9)
    assert read_top(TRAIT, logs(n87=0.6, n8=0.3), " 87.").score == pytest.approx((52.2 + 2.4) / 0.9)


def test_scales_of_one_digit_and_letters_cannot_be_split():
    assert read_top(FIT, logs(n4=0.9), "4").score == 4
    assert read_top(PAIR, logs(A=0.9), "A").score == 1


def test_digits_of_another_script_are_no_sign_of_whole_numbers():
    assert read_top(TRAIT, [("8", math.log(0.6)), ("٨٧", math.log(0.3))]).missing == SPLIT


def test_a_refusal_of_the_judge_is_missing_in_every_mode():
    for mode in ("logprobs", "json", "text"):
        reading = read(TRAIT, recorded("judge_refuses"), mode)
        assert (reading.score, reading.missing) == (None, JUDGE_REFUSED)
        assert "can't help" in reading.text
    # even when it comes with numbers
    assert read(TRAIT, recorded("trait")._replace(refused=True), "logprobs").missing == JUDGE_REFUSED


def test_what_is_cut_off_is_missing_but_a_first_token_is_whole():
    assert read(FIT, recorded("cut_json"), "json").missing == "answer cut off: length"
    assert read(FIT, Answer("4", cut="length"), "text").missing == "answer cut off: length"
    assert recorded("trait").cut == "length"
    assert read(TRAIT, recorded("filtered"), "logprobs").missing == "answer cut off: content_filter"


def test_nan_in_a_distribution_never_becomes_a_score():
    assert expected(FIT, {"3": math.nan}).missing == "a probability is NaN"
    assert expected(FIT, {"3": 0.9}, refusal=math.nan).missing == "a probability is NaN"


def test_an_expected_value_stays_on_the_scale_whatever_rounding_does():
    # 1 + 1.1e-16 rounds to 1, while the small shares add 1e-14 to 100
    assert expected(COHERENCE, dict.fromkeys(map(str, range(90, 100)), 1.1e-17) | {"100": 1.0}).score == 100
    assert expected(COHERENCE, dict.fromkeys(COHERENCE.options, 1 / 101)).score == pytest.approx(50)


# JSON -------------------------------------------------------------------------------------------------------------------------------------------


def test_a_recorded_json_answer_gives_its_score_and_its_reason():
    reading = read(FIT, recorded("json"), "json")
    assert (reading.score, reading.text) == (4.0, "Warm and personal throughout, with one stiff phrase.")
    assert reading.mass is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        ("  \n", "empty answer"),
        ("4", "answer of another form"),
        ("I would say 4", UNPARSABLE),
        ('Sure! {"reason": "x", "score": 4}', UNPARSABLE),
        ('{"reason": "x", "score": 4} {"reason": "y", "score": 2}', UNPARSABLE),
        ('```json\n{"reason": "x", "score": 4}\n```', UNPARSABLE),
        ('{"reason": "x", "score": 4', UNPARSABLE),
        ('{"score": 4, "score": 5}', UNPARSABLE),
        ("[" * 100_000, UNPARSABLE),
        ('[{"reason": "x", "score": 4}]', "answer of another form"),
        ('{"reason": "x", "score": 4, "confidence": 1}', "answer of another form"),
        ('{"reason": "x"}', "answer of another form"),
        ('{"reason": 7, "score": 4}', "answer of another form"),
        ('{"reason": "x", "Score": 4}', "answer of another form"),
        ('{"reason": "x", "score": true}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": 4.0}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": "4"}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": null}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": NaN}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": [4]}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": 0}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": 6}', "score outside 1 to 5, or no integer"),
        ('{"reason": "x", "score": "REFUSAL"}', "score outside 1 to 5, or no integer"),
    ],
)
def test_json_that_is_not_exactly_the_asked_form_is_missing(text, reason):
    reading = read(FIT, Answer(text), "json")
    assert (reading.score, reading.missing) == (None, reason)


def test_json_may_leave_out_the_reason_and_reach_both_ends_of_the_scale():
    assert read_json(FIT, ' {"score": 1}\n').score == 1
    assert read_json(FIT, '{"score": 5, "reason": ""}').score == 5
    assert read_json(COHERENCE, '{"score": 0}').score == 0
    assert read_json(COHERENCE, '{"score": 100}').score == 100
    assert read_json(COHERENCE, '{"score": 101}').score is None


def test_json_with_the_word_for_a_refusal_is_one_where_the_rubric_has_it():
    reading = read_json(TRAIT, '{"reason": "It declines.", "score": "REFUSAL"}')
    assert (reading.score, reading.missing, reading.text) == (None, REFUSAL, "It declines.")
    assert read_json(COHERENCE, '{"reason": "x", "score": "REFUSAL"}').missing == "score outside 0 to 100, or no integer"


@pytest.mark.parametrize(("choice", "score"), [("A", 1.0), ("B", -1.0), ("tie", 0.0)])
def test_a_pair_in_json_has_a_choice_and_a_confidence(choice, score):
    reading = read_json(PAIR, json.dumps({"reason": "x", "choice": choice, "confidence": 80}))
    assert (reading.score, reading.choice, reading.confidence) == (score, choice, 0.8)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"choice": "C", "confidence": 80}, "choice is none of A, B and tie"),
        ({"choice": "a", "confidence": 80}, "choice is none of A, B and tie"),
        ({"choice": ["A"], "confidence": 80}, "choice is none of A, B and tie"),
        ({"choice": "A", "confidence": 101}, "confidence outside 0 to 100, or no integer"),
        ({"choice": "A", "confidence": -1}, "confidence outside 0 to 100, or no integer"),
        ({"choice": "A", "confidence": True}, "confidence outside 0 to 100, or no integer"),
        ({"choice": "A", "confidence": 0.8}, "confidence outside 0 to 100, or no integer"),
        ({"choice": "A"}, "answer of another form"),
        ({"choice": "A", "confidence": 80, "score": 1}, "answer of another form"),
    ],
)
def test_a_pair_in_another_form_is_missing(answer, reason):
    reading = read_json(PAIR, json.dumps(answer))
    assert (reading.score, reading.choice, reading.missing) == (None, None, reason)


# Text -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("4", 4.0),
        (" 4\n", 4.0),
        ('```json\n{"reason": "x", "score": 2}\n```', 2.0),
        ('```\n{"score": 2}\n```', 2.0),
        ('```json\n{\n  "reason": "x",\n  "score": 2\n}\n```', 2.0),
        ('{"reason": "x", "score": 3}', 3.0),
        ("4.", None),
        ("4.0", None),
        ("04", None),
        ("٤", None),
        ("4/5", None),
        ("Score: 4", None),
        ("6", None),
        ("True", None),
        ("true", None),
        ("NaN", None),
        ('Sure!\n```json\n{"score": 2}\n```', None),
        ('```json\n{"score": 2}\n```\n```json\n{"score": 5}\n```', None),
        ('{"score": 2} and then {"score": 5}', None),
    ],
)
def test_text_is_one_score_or_one_object_in_a_fence_at_most(text, score):
    reading = read(FIT, Answer(text), "text")
    assert reading.score == score
    assert (reading.missing is None) == (score is not None)


def test_text_takes_the_word_for_a_refusal_and_no_letter_for_a_pair():
    assert read_text(TRAIT, " REFUSAL. ").missing == REFUSAL
    assert read_text(TRAIT, "It is a REFUSAL").missing == UNPARSABLE
    assert read_text(FIT, "REFUSAL").missing == UNPARSABLE
    assert read_text(PAIR, "A").missing == UNPARSABLE  # a confidence was asked for
    assert read_text(PAIR, '```{"choice": "B", "confidence": 0}```').confidence == 0


# Verdicts ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_verdict_carries_scale_mode_mass_choice_and_usage():
    answer = recorded("pairwise")
    verdict = read(PAIR, answer, "logprobs").verdict(PAIR, "openai:m", "logprobs", answer.usage)
    assert (verdict.judge, verdict.scale, verdict.mode, verdict.choice) == ("openai:m", (-1.0, 1.0), "logprobs", "A")
    assert verdict.mass == pytest.approx(0.9205)
    assert verdict.confidence == pytest.approx(0.57 / 0.9205)
    assert verdict.usage == Usage(requests=1, input_tokens=412, output_tokens=1)
    missing = read(TRAIT, recorded("low_mass"), "logprobs").verdict(TRAIT, "openai:m", "logprobs")
    assert (missing.score, missing.mass, missing.scale, missing.usage) == (None, pytest.approx(0.2263), (0.0, 100.0), None)


def test_an_explanation_is_short_and_can_be_stored():
    reading = read_json(FIT, json.dumps({"reason": "half \ud800 of a character", "score": 4}))
    verdict = reading.verdict(FIT, "j", "json")
    assert verdict.explanation == "half ? of a character"
    assert len(read_text(FIT, "x" * 2000).verdict(FIT, "j", "text").explanation) == 500


# The same responses over HTTP -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer(lambda *_: says("nothing"))
    yield found
    found.close()


def judged(server: FaultServer, rubric: Rubric, mode: str) -> Verdict:
    question = Question(rubric, "A keeper of bees." if rubric.subject else "")
    judge = OpenAIJudge.for_question(question, model="m", base_url=server.url, mode=mode, attempts=1)
    return judge.judge([JudgeRequest(prompt="?", response="Good day.", other="Hey.")])[0]


@pytest.mark.parametrize(
    ("name", "rubric", "score", "mass"),
    [
        ("trait", TRAIT, 83.659 / 0.983, 0.983),
        ("fit", FIT, 3.715 / 0.985, 0.985),
        ("duplicates", COHERENCE, 7.0 / 0.67, 0.67),
        ("no_probability", TRAIT, 2.5, 1.0),
        ("pairwise", PAIR, 0.3995 / 0.9205, 0.9205),
        ("low_mass", TRAIT, None, 0.2263),
        ("refusal_word", TRAIT, None, 0.1484),
        ("nan", TRAIT, None, None),
        ("null", TRAIT, None, None),
        ("digits", TRAIT, None, None),
        ("judge_refuses", TRAIT, None, None),
        ("filtered", TRAIT, None, None),
        ("no_logprobs", TRAIT, None, None),
    ],
)
def test_a_recorded_response_that_an_endpoint_sends_gives_the_same_score(server, name, rubric, score, mass):
    server.script = lambda *_: Response((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    verdict = judged(server, rubric, "logprobs")
    assert verdict.score == (None if score is None else pytest.approx(score))
    assert verdict.mass == (None if mass is None else pytest.approx(mass))
    assert verdict.mode == "logprobs" or verdict.missing is not None


def test_an_endpoint_whose_scores_are_split_is_asked_for_json(server):
    digits = Response((RECORDED / "digits.json").read_text(encoding="utf-8"))
    server.script = lambda number, body, headers: digits if "logprobs" in body else says({"reason": "x", "score": 87})
    verdict = judged(server, TRAIT, "auto")
    assert (verdict.score, verdict.mode) == (87, "json")
