"""The offline judge: it tells personas apart by traits, is calibrated and graded, repeats itself exactly and never makes a score up."""

import random
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from steered_lm.errors import JudgeError
from steered_lm.judges.base import Judge, JudgeRequest
from steered_lm.judges.stylometric import StylometricJudge, StylometricParams, auc_with_interval, mask_unknown, repetition
from steered_lm.persona import Persona, list_personas, load_persona
from steered_lm.persona.meter import TRAITS
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, sample_reply

HELD_OUT = ("tune", "validate", "test")


@cache
def ours() -> tuple[Persona, ...]:
    return tuple(load_persona(name) for name in list_personas())


@cache
def judge_of(name: str) -> StylometricJudge:
    return StylometricJudge.for_persona(load_persona(name), ours())


def scores(judge: StylometricJudge, texts: list[str]) -> np.ndarray:
    verdicts = judge.judge([JudgeRequest(prompt="What is it like?", response=text) for text in texts])
    return np.array([verdict.score for verdict in verdicts], dtype=np.float64)


def replies(levels: Mapping[str, float], count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [sample_reply(rng.choice(TOPICS_HELD_OUT), levels, rng) for _ in range(count)]


def towards(persona: Persona, share: float) -> dict[str, float]:
    """Slot probabilities that lie `share` of the way from the opposite of the persona's poles to its own."""
    return {trait: share if level > 0 else 1 - share for trait, level in persona.traits.items()}


@pytest.fixture(scope="module", params=list_personas())
def persona(request: pytest.FixtureRequest) -> Persona:
    return load_persona(request.param)


def test_it_is_a_judge(persona: Persona) -> None:
    assert isinstance(judge_of(persona.name), Judge)


def test_held_out_auc_is_at_least_nine_tenths_and_carries_its_interval_and_counts(persona: Persona) -> None:
    found = judge_of(persona.name).held_out_auc
    assert found.auc >= 0.9
    assert 0.8 < found.low < found.auc <= found.high <= 1.0
    assert found.own == sum(len(persona.items(split)) for split in HELD_OUT)
    assert found.others == sum(len(other.items(split)) for other in ours() if other.name != persona.name for split in HELD_OUT)


def test_replies_at_the_personas_poles_score_at_least_a_point_above_the_opposite_ones(persona: Persona) -> None:
    judge = judge_of(persona.name)
    own, opposite = (scores(judge, replies(towards(persona, share), 60)) for share in (1.0, 0.0))
    assert own.mean() - opposite.mean() >= 1.0
    assert own.min() > opposite.max()


def test_scores_rise_with_every_quarter_towards_the_persona_and_do_not_saturate(persona: Persona) -> None:
    judge = judge_of(persona.name)
    means = [scores(judge, replies(towards(persona, share), 60)).mean() for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(later > earlier + 0.03 for earlier, later in pairwise(means)), means
    assert means[2] > 1.25
    assert means[4] < 4.9


def test_each_trait_alone_moves_the_score_towards_the_persona(persona: Persona) -> None:
    judge = judge_of(persona.name)
    for trait in TRAITS:
        pole = float(persona.traits[trait] > 0)
        right, wrong = (scores(judge, replies({trait: level}, 100)).mean() for level in (pole, 1 - pole))
        assert right > wrong + 0.1, (persona.name, trait)


def test_one_trait_at_the_wrong_pole_costs_points(persona: Persona) -> None:
    judge = judge_of(persona.name)
    whole = scores(judge, replies(towards(persona, 1.0), 40)).mean()
    for trait in TRAITS:
        flipped = towards(persona, 1.0)
        flipped[trait] = 1 - flipped[trait]
        assert scores(judge, replies(flipped, 40)).mean() < whole - 0.3, (persona.name, trait)


def test_the_personas_own_held_out_utterances_score_above_the_middle_and_others_below(persona: Persona) -> None:
    judge = judge_of(persona.name)
    own = scores(judge, [text for split in HELD_OUT for text in persona.utterances(split)])
    others = scores(judge, [text for other in ours() if other.name != persona.name for split in HELD_OUT for text in other.utterances(split)])
    assert (own > 3).mean() >= 0.9
    assert (others < 3).mean() >= 0.9


def test_calibration_is_honest_on_held_out_utterances() -> None:
    """Brier score at even odds stays below 0.05, a fifth of a coin's 0.25."""
    for one in ours():
        judge = judge_of(one.name)
        parts = [(one, 1.0)] + [(other, 0.0) for other in ours() if other.name != one.name]
        errors: dict[float, list[float]] = {0.0: [], 1.0: []}
        for other, truth in parts:
            requests = [JudgeRequest(prompt="", response=text) for split in HELD_OUT for text in other.utterances(split)]
            found = [float(v.explanation.split("=")[1].split(";")[0]) for v in judge.judge(requests)]
            errors[truth] += [(p - truth) ** 2 for p in found]
        assert np.mean([np.mean(errors[0.0]), np.mean(errors[1.0])]) < 0.05, one.name


def test_topics_hardly_move_the_score(persona: Persona) -> None:
    judge, rng = judge_of(persona.name), random.Random(5)
    by_topic = []
    for topic in ("the ferry", "the library", "the drum", "the garden", "the train", "the snargle"):
        rng.seed(5)
        by_topic.append(scores(judge, [sample_reply(topic, towards(persona, 0.75), rng) for _ in range(30)]).mean())
    assert max(by_topic) - min(by_topic) < 0.4, by_topic


def test_the_prompt_is_not_looked_at() -> None:
    judge, own = judge_of("edmund"), load_persona("edmund").utterances("test")[0]
    first, second = judge.judge([JudgeRequest(prompt="Hi", response=own), JudgeRequest(prompt=own * 3, response=own)])
    assert first == second


@pytest.mark.parametrize(("response", "reason"), [("", "empty response"), (" \n\t", "empty response"), ("... 42!", "no words")])
def test_a_response_without_words_is_missing_with_a_reason(response: str, reason: str) -> None:
    before, verdict, after = judge_of("edmund").judge(
        [JudgeRequest(prompt="Hi", response=text) for text in ("I was glad.", response, "You are sad.")]
    )
    assert verdict.score is None
    assert reason in (verdict.missing or "")
    assert before.score is not None
    assert after.score is not None


def test_no_requests_give_no_verdicts() -> None:
    assert judge_of("edmund").judge([]) == []


def test_a_loop_of_the_personas_words_loses_its_points() -> None:
    own = load_persona("edmund").utterances("test")[0]
    looped = " ".join(own.split()[:4] * 12)
    natural, broken = scores(judge_of("edmund"), [own, looped])
    assert natural > 4
    assert broken < 1.1
    assert repetition(own) < 0.1
    assert repetition(looped) > 0.8


def test_the_explanation_says_the_probability_and_the_levels() -> None:
    (verdict,) = judge_of("edmund").judge([JudgeRequest(prompt="", response="Indeed, I found it lovely.")])
    assert verdict.explanation.startswith("p(edmund)=")
    assert "self_other_focus +1.00" in verdict.explanation
    assert "relationship_distance none" in verdict.explanation


def test_two_judges_of_one_persona_agree_exactly_whatever_the_order_of_the_others() -> None:
    one = load_persona("rudy")
    again = StylometricJudge.for_persona(one, ours()[::-1])
    texts = replies({}, 30)
    assert scores(again, texts).tolist() == scores(judge_of("rudy"), texts).tolist()
    assert again.identity == judge_of("rudy").identity
    assert again.held_out_auc == judge_of("rudy").held_out_auc


def test_a_verdict_does_not_depend_on_what_else_is_judged() -> None:
    judge, texts = judge_of("josie"), replies({}, 12)
    assert scores(judge, texts).tolist() == [float(scores(judge, [text])[0]) for text in texts]


def test_identity_tells_personas_others_seeds_and_params_apart() -> None:
    one, others = ours()[0], ours()[1:]
    judges = [
        judge_of(one.name),
        StylometricJudge.for_persona(others[0], ours()),
        StylometricJudge.for_persona(one, others[:-1]),
        StylometricJudge.for_persona(one, others, seed=1),
        StylometricJudge.for_persona(one, others, params=StylometricParams(temperature=1.0)),
    ]
    assert len({judge.identity for judge in judges}) == len(judges)
    assert all(judge.name == "stylometric" for judge in judges)


def test_a_judge_needs_another_persona() -> None:
    one = ours()[0]
    for others in ([], [one]):
        with pytest.raises(JudgeError, match="others holds no persona but 'edmund'"):
            StylometricJudge.for_persona(one, others)


def test_a_judge_needs_a_build_split_to_calibrate_on() -> None:
    one = ours()[0]
    small = Persona.model_validate(one.model_dump() | {"name": "small", "conversations": one.conversations[:1]})
    with pytest.raises(JudgeError, match="persona 'small' has . utterances in its build split; at least 5"):
        StylometricJudge.for_persona(small, [one])


def test_the_auc_is_the_share_of_pairs_in_order_and_ties_count_half() -> None:
    found = auc_with_interval(np.array([2.0, 1.0]), np.array([1.0, 0.0]), seed=0)
    assert found.auc == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert found.low <= found.auc <= found.high


def test_the_interval_covers_a_known_auc_about_as_often_as_it_says() -> None:
    """AUC of two unit normals one apart is Phi(1 / sqrt 2) = 0.760; 150 draws of 30 against 60."""
    generator, inside = np.random.default_rng(0), 0
    for _ in range(150):
        found = auc_with_interval(generator.normal(1, 1, 30), generator.normal(0, 1, 60), seed=1, resamples=400)
        inside += found.low <= 0.7602 <= found.high
    assert inside >= 0.88 * 150


def test_perfect_separation_still_has_an_interval() -> None:
    found = auc_with_interval(np.arange(10.0, 20.0), np.arange(0.0, 10.0), seed=0)
    assert found.auc == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 10))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"folds": 1}, {"tolerated_repetition": 0.8}, {"trait_weights": 1.0}])
def test_params_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StylometricParams.model_validate(wrong)


def test_unknown_words_are_masked() -> None:
    assert mask_unknown("I saw the Zeppelin\u2019s mast.", frozenset({"i", "saw", "the"})) == "i saw the * *."


def test_fitting_and_judging_are_fast() -> None:
    start = time.process_time()
    judge = StylometricJudge.for_persona(ours()[2], ours())
    fitted = time.process_time()
    scores(judge, replies({}, 1000))
    assert fitted - start < 3.0
    assert time.process_time() - fitted < 3.0


def test_importing_the_judge_loads_neither_torch_nor_a_harness() -> None:
    code = "import sys, steered_lm.judges.stylometric; print([m for m in ('torch', 'lm_eval', 'inspect_ai', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
