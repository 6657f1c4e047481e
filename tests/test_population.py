import logging
import random
import threading
import time

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api import task as lm_eval_task
from tiny_harness import LengthJudge, save_model, save_vectors, spec_of
from transformers.utils import logging as transformers_logging

from steered_lm.errors import JudgeError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import HarnessObjective, evaluate_choices
from steered_lm.harness.quiet import quiet, quiet_loading
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge
from steered_lm.judges.stream import is_remote
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
    assert timing.prompt > 0 and timing.decode > 0 and timing.judge >= 0
    assert timing.total == pytest.approx(timing.prompt + timing.decode + timing.judge + timing.overhead)
    assert 0 <= timing.overhead < 0.5
    assert timing.judge_hidden == 0
    assert set(objective.timings) == {"prompt", "decode", "judge", "overhead", "judge_hidden"}


class RemoteJudge(LengthJudge):
    """The same verdicts, but each call waits as one over a network does."""

    remote = True

    def judge(self, requests):
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.05)
        return super().judge(requests)


def test_a_judge_that_waits_works_while_the_model_writes_and_changes_no_score(folder, persona, candidates):
    small = SteeredHFLM(str(folder), device="cpu", batch_size=8)
    remote, local = RemoteJudge(), LengthJudge()
    found = HarnessObjective(small, persona, remote, max_new_tokens=40)
    assert found(candidates, split="tune") == HarnessObjective(small, persona, local, max_new_tokens=40)(candidates, split="tune")
    assert len(local.calls) == 1 < len(remote.calls)
    assert sorted(r.response for call in remote.calls for r in call) == sorted(r.response for r in local.calls[0])
    timing = found.history[-1]
    assert timing.judge_hidden > 0.05
    assert timing.total == pytest.approx(timing.prompt + timing.decode + timing.judge + timing.overhead)
    assert small.answered is None


def test_what_a_remote_judge_raises_reaches_the_caller(folder, persona, candidates):
    class BrokenJudge(RemoteJudge):
        def judge(self, requests):
            raise JudgeError("the endpoint refused the key")

    objective = HarnessObjective(SteeredHFLM(str(folder), device="cpu", batch_size="auto"), persona, BrokenJudge(), max_new_tokens=10)
    with pytest.raises(JudgeError, match="refused the key"):
        objective(candidates, split="tune")


def test_a_cached_remote_judge_is_remote(tmp_path):
    cache = JudgeCache(tmp_path / "cache.sqlite")
    assert is_remote(CachedJudge(RemoteJudge(), cache))
    assert not is_remote(CachedJudge(LengthJudge(), cache))


def test_the_reference_path_gives_the_same_scores(folder, persona, candidates):
    by_engine, by_reference = (
        HarnessObjective(SteeredHFLM(str(folder), device="cpu", batch_size=8, exact=exact), persona, LengthJudge(), max_new_tokens=10)
        for exact in (False, True)
    )
    assert by_engine(candidates, split="tune") == by_reference(candidates, split="tune")
    assert by_reference.timings["decode"] > 0 == by_reference.timings["prompt"]


def test_sampled_responses_depend_on_seed_and_candidate_not_on_the_batch(folder, persona, candidates):
    def sampled(batch_size, seed, chosen=candidates):
        lm = SteeredHFLM(str(folder), device="cpu", batch_size=batch_size)
        return HarnessObjective(lm, persona, LengthJudge(), max_new_tokens=10, temperature=1.0, seed=seed)(chosen, split="tune")

    found = sampled("auto", 3)
    assert found == sampled(7, 3)
    assert found[1:2] == sampled("auto", 3, candidates[1:2])
    assert found != sampled("auto", 4)
    # a system against itself is not the same text twice
    assert texts(found[3]) != texts(found[4])


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


def test_while_quiet_libraries_draw_nothing_but_lm_eval_still_warns_and_after_that_all_is_as_before(lm, capsys, caplog):
    theirs, bar = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    before = (theirs.level, lm.quiet, transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
    with quiet(lm), quiet_loading():
        assert list(lm_eval_task.tqdm([1, 2])) == [1, 2]
        datasets.Dataset.from_list([{"a": 1}]).map(lambda row: row)
        theirs.info("a notice")
        theirs.warning("a warning")
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["a warning"]
    assert before == (theirs.level, lm.quiet, transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
    assert lm_eval_task.tqdm is bar
