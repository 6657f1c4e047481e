import math
import random

import pytest
import torch
from tiny_models import FAMILIES, SPECIAL_FAMILIES, random_model, scored_alone, spec_for, special_model, steering_kinds

from steered_lm.engine import Engine, ScoreRequest, tree
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec

DRAW = random.Random(1)


def draws(length):
    return tuple(DRAW.randrange(3, 64) for _ in range(length))


FEW_SHOT, PRIMER = draws(21), draws(12)
# two groups that begin alike, one context the beginning of another, some that share nothing, two of one token
CONTEXTS = [
    *(FEW_SHOT + draws(length) for length in (1, 3, 5, 4)),
    *(PRIMER + draws(length) for length in (1, 2, 6)),
    FEW_SHOT[:15],
    draws(7),
    draws(2),
    *(draws(1) for _ in range(2)),
]
LONG = draws(4)
# single tokens, several, one the beginning of two others, one twice
ENDINGS = [draws(1), draws(1), LONG[:1], LONG[:2], LONG, draws(3), LONG[:2]]


@pytest.fixture(autouse=True)
def common_beginnings_pay_off(monkeypatch):
    """Beginnings as short as those here get a pass of their own, as real ones do."""
    monkeypatch.setattr(tree, "_WORTH", 4)


def engine(steerer, **settings):
    return Engine(steerer, None, **{"gemm": "torch", **settings})


def mixed(specs, contexts=CONTEXTS):
    return [ScoreRequest(context, ending, spec) for context in contexts for spec in specs for ending in ENDINGS]


def assert_equal(found, expected):
    assert [result.loglikelihood for result in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [result.is_greedy for result in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_FAMILIES])
def test_a_mixed_set_equals_one_request_at_a_time(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    # five specs on every context, and seven more on one context each
    requests = mixed([kinds[i] for i in (0, 1, 3, 6, 10)], [CONTEXTS[i] for i in (0, 1, 4, 5, 7, 8, 10)])
    requests += [ScoreRequest(CONTEXTS[i], ending, kind) for i, kind in enumerate(kinds) for ending in ENDINGS[:4]]
    DRAW.shuffle(requests)
    run = engine(steerer)
    assert_equal(run.score(requests, max_length=60), [scored_alone(steerer, request, 60) for request in requests])


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss", "llama4"])
def test_a_window_that_holds_every_text_leaves_scoring_to_the_tree(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    context, endings = draws(4), [draws(1), draws(3), draws(4), draws(4)]
    requests = [ScoreRequest(start, ending, kind) for start in (context, context[:2], draws(3)) for kind in kinds[:5] for ending in endings]
    run = engine(steerer)
    assert_equal(run.score(requests, max_length=60), [scored_alone(steerer, request, 60) for request in requests])
    assert run.report.score_passes > 0


@pytest.mark.parametrize(("count", "budget"), [(1, 120_000), (5, 200_000)])
def test_results_do_not_depend_on_how_much_runs_at_once(count, budget, tmp_path):
    model = random_model()
    steerer = Steerer(model)
    requests = mixed(steering_kinds(model, tmp_path)[1 : 1 + 2 * count : 2])
    whole = engine(steerer)
    expected = whole.score(requests, max_length=60)
    assert_equal(expected, [scored_alone(steerer, request, 60) for request in requests])
    for settings in ({"max_rows": 1}, {"max_rows": 2}, {"memory_budget": budget}):
        small = engine(steerer, **settings)
        assert_equal(small.score(requests, max_length=60), expected)
        assert small.report.score_passes >= whole.report.score_passes + 2
    assert small.report.cache_bytes < small.report.planned_bytes <= budget


def test_specs_that_do_not_fit_together_run_one_half_after_the_other(tmp_path):
    model = random_model()
    steerer, kinds = Steerer(model), steering_kinds(model, tmp_path)
    requests = mixed([kind.with_weights({"formality": i / 3}) for kind in (kinds[1], kinds[2]) for i in range(1, 9)], CONTEXTS[:5])
    whole = engine(steerer, max_rows=1)
    expected = whole.score(requests, max_length=60)
    budget = whole.report.planned_bytes * 6 // 10
    small = engine(steerer, memory_budget=budget)
    assert_equal(small.score(requests, max_length=60), expected)
    assert small.report.planned_bytes <= budget


@pytest.mark.parametrize("max_length", [6, 17, 24])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_text_that_is_too_long_loses_its_beginning(family, max_length, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    contexts, endings = [CONTEXTS[2], CONTEXTS[6], CONTEXTS[8]], [*ENDINGS[:5], draws(max_length)]
    requests = [ScoreRequest(context, ending, kinds[i]) for context in contexts for i in (0, 1, 2, 3, 10) for ending in endings]
    # where the response starts moves with the beginning that is cut off
    requests += [ScoreRequest(CONTEXTS[2], ENDINGS[4], kinds[i], response_start=start) for start in (0, 9, 23) for i in (1, 2, 10)]
    assert_equal(engine(steerer).score(requests, max_length=max_length), [scored_alone(steerer, request, max_length) for request in requests])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_rolling_requests_are_response_from_their_first_token_on(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    texts = [draws(30), draws(11), draws(1)]
    rolling = [ScoreRequest((1,), text, kind, response_start=0) for text in texts for kind in kinds]
    windows = [ScoreRequest(draws(6), text, kind, response_start=start) for text in texts[1:] for kind in kinds[:5] for start in (0, 3, 6)]
    ordinary = [ScoreRequest((1,), text, kind) for text in texts for kind in kinds[:3]]
    requests = [*rolling, *windows, *ordinary]
    run = engine(steerer)
    assert_equal(run.score(requests, max_length=60), [scored_alone(steerer, request, 60) for request in requests])


def test_the_greedy_continuation_is_known_as_such_and_a_tie_with_one_other_token_is_not(tmp_path):
    model = random_model()
    steerer = Steerer(model)
    for spec in (None, spec_for(model, tmp_path), spec_for(model, tmp_path, positions="all")):
        context, greedy = CONTEXTS[5], ()
        for _ in range(4):
            best = [scored_alone(steerer, ScoreRequest(context, (*greedy, token), spec), 60) for token in range(64)]
            greedy = (*greedy, next(token for token, (_, is_greedy) in enumerate(best) if is_greedy))
        wrong = [(*greedy[:place], (greedy[place] + 1) % 64, *greedy[place + 1 :]) for place in range(4)]
        endings = [greedy[:length] for length in range(1, 5)] + wrong
        found = engine(steerer).score([ScoreRequest(context, ending, spec) for ending in endings], max_length=60)
        assert [result.is_greedy for result in found] == [True] * 4 + [False] * 4


def test_what_requests_share_runs_once(tmp_path):
    model = random_model()
    base = spec_for(model, tmp_path)
    specs = [base.with_weights({"formality": weight}) for weight in (0.5, 1.0, 1.5, -1.0, -2.0)]
    contexts = [FEW_SHOT + FEW_SHOT + draws(5) for _ in range(6)]
    requests = [ScoreRequest(context, ending, spec) for context in contexts for ending in [(token,) for token in range(3, 7)] for spec in specs]
    run = engine(Steerer(model))
    run.score(requests + requests, max_length=64)
    # the common beginning once; the rest of each context but its last token once; the last token once below the steered block, per spec above
    assert run.report.lower_tokens == 42 + 6 * 4 + 6
    assert run.report.upper_tokens == 42 + 6 * 4 + 6 * 5


def test_results_are_told_once_each_and_come_back_in_order(tmp_path):
    model = random_model()
    requests = mixed(steering_kinds(model, tmp_path)[:4])
    told = []
    run = engine(Steerer(model), max_rows=2)
    found = run.score(requests, max_length=60, done=lambda numbers, results: told.extend(zip(numbers, results, strict=True)))
    assert sorted(number for number, _ in told) == list(range(len(requests)))
    assert all(found[number] == result for number, result in told)
    assert run.score([], max_length=60) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_bad_requests_are_refused(family):
    run = engine(Steerer(special_model(family)))
    good = ScoreRequest(draws(20), (5,))
    for bad in (ScoreRequest((), (5,)), ScoreRequest((5,), ())):
        with pytest.raises(ValueError, match="context and continuation must hold at least one token each; give an empty context the model's BOS"):
            run.score([good, bad], max_length=60)
    with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than max_length=8. Split it, or raise max_length."):
        run.score([good, ScoreRequest((5,), draws(9))], max_length=8)


def test_log_softmax_follows_the_dtype_that_is_asked_for(tmp_path):
    model = random_model()
    steerer = Steerer(model)
    requests = mixed([None, spec_for(model, tmp_path)])
    expected = [value for value, _ in (scored_alone(steerer, request, 60) for request in requests)]
    fine, coarse = (engine(steerer, softmax_dtype=dtype).score(requests, max_length=60) for dtype in (torch.float64, torch.bfloat16))
    assert [result.loglikelihood for result in fine] == pytest.approx(expected, abs=1e-5)
    assert 1e-3 < max(abs(result.loglikelihood - value) for result, value in zip(coarse, expected, strict=True)) < 0.5


def test_weight_zero_scores_as_the_unsteered_model_does(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    run = engine(Steerer(model))
    kinds = (spec.with_weights({"formality": 0.0}), None, spec)
    zero, plain, steered = ([result.loglikelihood for result in run.score(mixed([kind]), max_length=60)] for kind in kinds)
    assert zero == plain
    assert not any(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(plain, steered, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_steering_that_overflows_scores_nan_and_leaves_the_other_requests_alone(family, tmp_path):
    model = special_model(family)
    spec, steerer = spec_for(model, tmp_path), Steerer(model)
    # the projection times alpha passes float32's range only for some tokens
    wild = SteeringSpec.model_validate({**spec.model_dump(), "operation": "ablate", "alpha": 3.3e38, "layers": (0,), "positions": "response"})
    requests = [ScoreRequest(context, (token, token), kind) for context in CONTEXTS[7:9] for token in range(3, 40) for kind in (wild, spec, None)]
    found = engine(steerer).score(requests, max_length=60)
    expected = [scored_alone(steerer, request, 60) for request in requests]
    assert [result.loglikelihood for result in found] == pytest.approx([value for value, _ in expected], abs=1e-4, nan_ok=True)
    count = sum(math.isnan(value) for value, _ in expected)
    assert 0 < count < len(requests) / 3
