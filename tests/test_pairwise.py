"""Pairs in both orders: a preference for a place cancels, and is seen."""

from collections.abc import Callable, Sequence

import pytest

from steered_lm.errors import JudgeError
from steered_lm.judges.base import PREFERENCE, JudgeRequest, Usage, Verdict
from steered_lm.judges.pairwise import BothOrders, combine

GOOD, BAD = "good", "bad"


class Prefers:
    """A judge of pairs whose preference is a function of the pair, as given."""

    name, identity = "prefers", "prefers-1"

    def __init__(self, preference: Callable[[str, str], float | None]) -> None:
        self.preference = preference
        self.seen: list[tuple[str, str | None]] = []

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.seen += [(r.response, r.other) for r in requests]
        found = [self.preference(r.response, r.other or "") for r in requests]
        return [
            Verdict(missing="HTTP 500", scale=PREFERENCE, judge=self.name)
            if score is None
            else Verdict(score=score, scale=PREFERENCE, judge=self.name, usage=Usage(requests=1, input_tokens=10))
            for score in found
        ]


def pair(first: str = GOOD, second: str = BAD) -> JudgeRequest:
    return JudgeRequest(prompt="Hello?", response=first, other=second)


def quality(first: str, second: str) -> float:
    return float((first == GOOD) - (second == GOOD))


def one(**facts: object) -> Verdict:
    return Verdict.model_validate({"judge": "t", "scale": PREFERENCE, **facts})


def test_each_pair_is_asked_in_both_orders_and_the_preference_is_that_of_the_first_response() -> None:
    judge = Prefers(quality)
    verdicts = BothOrders(judge).judge([pair(), pair(BAD, GOOD)])
    assert judge.seen == [(GOOD, BAD), (BAD, GOOD), (BAD, GOOD), (GOOD, BAD)]
    assert [(v.score, v.choice, v.consistent) for v in verdicts] == [(1.0, "A", True), (-1.0, "B", True)]
    assert verdicts[0].usage == Usage(requests=2, input_tokens=20)


def test_a_judge_that_always_names_the_first_place_prefers_nobody_and_contradicts_itself() -> None:
    verdicts = BothOrders(Prefers(lambda first, second: 1.0)).judge([pair(), pair(GOOD, GOOD), pair(BAD, GOOD)])
    assert [(v.score, v.choice, v.consistent) for v in verdicts] == [(0.0, "tie", False)] * 3


def test_a_place_bias_on_top_of_a_true_preference_cancels_exactly() -> None:
    (verdict,) = BothOrders(Prefers(lambda first, second: 0.5 * quality(first, second) + 0.25)).judge([pair()])
    assert verdict.score == 0.5
    assert [part.score for part in verdict.parts] == [0.75, -0.25]
    assert verdict.consistent is True


def test_ties_in_both_orders_are_a_consistent_tie_and_in_one_order_are_not() -> None:
    assert combine(one(score=0), one(score=0), "t").consistent is True
    half = combine(one(score=1, choice="A"), one(score=0, choice="tie"), "t")
    assert (half.score, half.choice, half.consistent) == (0.5, "tie", False)


def test_the_likeliest_answer_counts_as_the_choice_and_not_the_sign_of_the_mean() -> None:
    nearly = combine(one(score=0.02, choice="tie", confidence=0.9), one(score=0.01, choice="tie", confidence=0.7), "t")
    assert (nearly.choice, nearly.consistent, nearly.confidence) == ("tie", True, pytest.approx(0.8))
    assert nearly.score == pytest.approx(0.005)


def test_a_pair_with_one_order_missing_is_missing_and_says_which() -> None:
    (verdict,) = BothOrders(Prefers(lambda first, second: 1.0 if first == GOOD else None)).judge([pair()])
    assert verdict.score is None
    assert verdict.missing == "swapped: HTTP 500"
    assert verdict.usage == Usage(requests=1, input_tokens=10)
    assert combine(one(missing="x"), one(missing="y"), "t").missing == "as given: x; swapped: y"


def test_orders_that_were_read_in_different_ways_name_no_mode_and_one_fresh_order_is_not_cached() -> None:
    mixed = combine(one(score=1, mode="json", cached=True), one(score=-1, mode="text"), "t")
    assert (mixed.mode, mixed.cached) == (None, False)
    assert combine(one(score=1, mode="json", cached=True), one(score=-1, mode="json", cached=True), "t").cached is True


def test_a_request_with_one_response_is_refused_by_its_number() -> None:
    with pytest.raises(JudgeError, match=r"requests\[1\].other is None: .* Give both"):
        BothOrders(Prefers(quality)).judge([pair(), JudgeRequest(prompt="", response="alone")])


def test_no_pairs_give_no_verdicts_and_the_identity_differs_from_the_single_orders() -> None:
    judge = BothOrders(Prefers(quality))
    assert judge.judge([]) == []
    assert judge.identity != judge.inner.identity
    assert judge.name == "prefers"
