import random

import numpy as np
import pytest
import torch
from tiny_harness import LengthJudge, save_model, save_vectors, spec_of

from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import HarnessObjective, evaluate_choices
from steered_lm.judges.base import JudgeRequest
from steered_lm.persona.load import load_persona
from steered_lm.search.protocol import Candidate

TASK_NAMES = ["tiny_knowledge", "tiny_truth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return SteeredHFLM(str(folder), device="cpu", batch_size=64)


@pytest.fixture(scope="module")
def persona():
    return load_persona("josie")


@pytest.fixture(scope="module")
def candidates(folder):
    vectors = save_vectors(folder, folder / "vectors.safetensors")
    weights = [{"formality": 1.0}, {"emotional_tone": -1.0}, {"formality": -1.0, "emotional_tone": 0.5}, {}]
    made = [Candidate(name=f"c{i}", spec=spec_of(vectors, weights=w)) for i, w in enumerate(weights)]
    return [*made, Candidate(name="unsteered"), Candidate(name="prompted", system="Talk like a sailor.")]


@pytest.fixture
def objective(lm, persona):
    return HarnessObjective(lm, persona, LengthJudge(), max_new_tokens=10)


def texts(score):
    return [item.response for item in score.items]


def test_a_population_gets_what_each_candidate_gets_alone(objective, candidates):
    together = objective(candidates, split="tune")
    alone = [objective([candidate], split="tune")[0] for candidate in candidates]
    assert together == alone
    assert len({tuple(texts(score)) for score in together}) == len(candidates) - 1
    assert texts(together[3]) == texts(together[4])


def test_the_order_of_the_population_changes_nothing(objective, candidates):
    assert objective(candidates[::-1], split="tune")[::-1] == objective(candidates, split="tune")


def test_one_judge_call_serves_the_whole_population_and_items_keep_their_order(objective, persona, candidates):
    scores = objective(candidates, split="validate")
    (call,) = objective.judge.calls
    items = persona.items("validate")
    assert len(call) == len(candidates) * len(items)
    for score in scores:
        assert [(i.item, i.prompt) for i in score.items] == [(i.item, i.prompt) for i in items]
        judged = [objective.judge.judge([JudgeRequest(prompt=item.prompt, response=item.response)])[0] for item in score.items]
        assert [item.verdict for item in score.items] == judged


def test_the_prompted_arm_sees_its_system_turn(objective, lm, candidates):
    objective(candidates, split="tune")
    task = objective._tasks["tune"]
    rendered = [lm.rendered(instance.args[0]) for instance in task.instances[: len(candidates)]]
    assert [r.startswith("<s><|system|>\nTalk like a sailor.</s><|user|>") for r in rendered] == [False] * 5 + [True]


def test_the_models_own_spec_is_not_used(lm, objective, candidates):
    plain = objective(candidates, split="tune")
    lm.spec = candidates[0].spec
    try:
        assert objective(candidates, split="tune") == plain
    finally:
        lm.spec = None


def test_global_generators_are_left_alone_and_results_repeat(objective, candidates):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = objective(candidates, split="tune")
    assert objective(candidates, split="tune") == first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_generation_prints_nothing_and_says_where_its_time_went(objective, candidates, capsys):
    objective(candidates, split="tune")
    capsys.readouterr()
    objective(candidates, split="tune")
    assert capsys.readouterr() == ("", "")
    timing = objective.history[-1]
    assert timing.total >= timing.model > 0
    assert 0 <= timing.overhead < 0.5


def test_missing_verdicts_stay_missing_in_the_score(lm, persona, candidates):
    plain = HarnessObjective(lm, persona, LengthJudge(), max_new_tokens=10)([candidates[4]], split="tune")[0]
    judge = LengthJudge(missing_on=plain.items[0].response)
    (score,) = HarnessObjective(lm, persona, judge, max_new_tokens=10)([candidates[4]], split="tune")
    assert score.missing >= 1
    assert len(score.scores) == len(score.items) - score.missing
    assert score.items[0].verdict.missing == "nothing to judge"


def test_choices_of_several_candidates_equal_separate_runs_and_are_paired(lm, candidates):
    together = evaluate_choices(lm, TASK_NAMES, candidates)
    assert list(together) == [candidate.name for candidate in candidates]
    for candidate in candidates[:2]:
        (alone,) = evaluate_choices(lm, TASK_NAMES, [candidate]).values()
        ours = together[candidate.name]
        assert [(i.task, i.item) for i in ours] == [(i.task, i.item) for i in alone] == [(i.task, i.item) for i in together["unsteered"]]
        for a, b in zip(ours, alone, strict=True):
            assert a.loglikelihoods == pytest.approx(b.loglikelihoods, abs=1e-4)
    assert [i.loglikelihoods for i in together["c3"]] == [i.loglikelihoods for i in together["unsteered"]]
    assert together["c0"] != together["unsteered"]


def test_an_answer_is_correct_when_the_right_choice_is_the_likeliest(lm):
    (answers,) = evaluate_choices(lm, "tiny_truth", [Candidate(name="unsteered")]).values()
    (task,) = load_tasks(["tiny_truth"])
    assert [a.item for a in answers] == [doc["id"] for doc in task.eval_docs]
    for answer, doc in zip(answers, task.eval_docs, strict=True):
        assert answer.correct == (answer.loglikelihoods.index(max(answer.loglikelihoods)) == doc["gold"])
        assert len(answer.loglikelihoods) == len(doc["choices"])


def test_sampling_depends_on_its_own_seed_and_on_nothing_else(lm, persona):
    def replies(seed, noise):
        torch.manual_seed(noise)
        objective = HarnessObjective(lm, persona, LengthJudge(), max_new_tokens=10, temperature=1.0, seed=seed)
        before = torch.get_rng_state()
        (score,) = objective([Candidate(name="unsteered")], split="tune")
        assert torch.equal(torch.get_rng_state(), before)
        return [item.response for item in score.items]

    assert replies(1, noise=5) == replies(1, noise=6)
    assert replies(1, noise=5) != replies(2, noise=5)
