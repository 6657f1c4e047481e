"""The tasks ``pv_<trait>`` of both harnesses, judged by an endpoint on loopback that scores by a rule on the text."""

import gc
import hashlib
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import lm_eval
import pytest
import torch
from chat_folder import save_chat_model
from fault_server import FaultServer, says
from inspect_ai import eval as inspect_eval
from lm_eval.tasks import TaskManager
from tiny_harness import TASKS
from tiny_models import vectors_for
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import steered_lm.inspect_plugin.registry as registry
from steered_lm import cli
from steered_lm.commands.logs import saved_examples
from steered_lm.errors import JudgeError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.judges.base import REFUSAL
from steered_lm.judges.trait_run import COUNTS, MEANS, question_values, response_values
from steered_lm.judges.traits import TRAITS, TraitError, load_trait
from steered_lm.search.protocol import Candidate
from steered_lm.steering.spec import SteeringSpec, VectorsRef

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def lot(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def trait_rule(response: str):
    """0 to 100; every fifth text is a refusal and every seventh gets an answer that cannot be read."""
    number = lot(response)
    return "REFUSAL" if number % 5 == 0 else "well" if number % 7 == 0 else number % 101


def coherence_rule(response: str) -> int:
    return lot(f"{response} coherent") % 101


@pytest.fixture
def judge():
    """A server that judges by the rules, and what to tell a task about it."""

    def answer(number, body, headers):
        system, user = (message["content"] for message in body["messages"])
        response = json.loads(user)["response"]
        return says({"reason": "by lot", "score": coherence_rule(response) if "how coherent" in system else trait_rule(response)})

    server = FaultServer(answer)
    server.options = {"judge": "openai:rule", "judge_base_url": server.url, "judge_key_env": "none", "judge_mode": "json", "missing_limit": 1}
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder):
    vectors = VectorsRef.to(vectors_for(AutoModelForCausalLM.from_pretrained(folder), (0, 1, 2)).save(folder / "v.safetensors"))
    return SteeringSpec(vectors=vectors, weights={"formality": 1.0}, layers=(1,), unit="raw", alpha=6.0).save(folder / "spec.yaml")


@pytest.fixture(scope="module")
def lm(folder, spec):
    return SteeredHFLM(str(folder), device="cpu", batch_size=32, steering=str(spec))


@pytest.fixture
def inspect_run(folder, spec, tmp_path):
    def evaluate(task, **given):
        settings = {"model": f"steered-hf/{folder}", "model_args": {"steering": str(spec)}, "log_dir": str(tmp_path / "logs"), "display": "none"}
        (log,) = inspect_eval(task, task_args={"max_tokens": 8, **given}, **settings)
        return log

    yield evaluate
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def run(lm, name, options=None, **metadata):
    tasks = load_tasks([name], {"max_gen_toks": 8, **metadata})
    found = lm_eval.evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, bootstrap_iters=10, **(options or {}))
    return found["results"][name], found["samples"][name], found["configs"][name]["metadata"]


def expected(texts_by_question):
    """The mean over questions of the mean over scored responses, its standard error, and the counts, from the rules alone."""
    verdicts = [[trait_rule(text) if text else "well" for text in texts] for texts in texts_by_question]
    means = [fmean(numbers) for own in verdicts if (numbers := [score for score in own if isinstance(score, int)])]
    flat = [score for own in verdicts for score in own]
    return {"mean": fmean(means), "stderr": stdev(means) / math.sqrt(len(means)), "refusals": flat.count("REFUSAL"), "missing": flat.count("well")}


def inspect_metrics(log):
    named = {score.name: {name.split("/")[-1]: metric.value for name, metric in score.metrics.items()} for score in log.results.scores}
    assert set(named) == {*MEANS, *COUNTS}
    return named


def test_both_harnesses_report_the_same_numbers_and_verdicts_for_the_same_steered_model(lm, judge, inspect_run):
    results, samples, metadata = run(lm, "pv_sycophantic", **judge.options)
    log = inspect_run(registry.pv_sycophantic, **judge.options)
    assert log.status == "success"
    trait = load_trait("sycophantic")
    assert [sample["doc"]["question"] for sample in samples] == list(trait.evaluate.questions) == [sample.input[0].text for sample in log.samples]
    texts = [sample["resps"][0][0].strip() for sample in samples]
    assert texts == [sample.output.completion.strip() for sample in log.samples]
    hoped = expected([[text] for text in texts])
    assert hoped["refusals"] > 0
    assert hoped["missing"] > 0
    assert results["trait_score,none"] == pytest.approx(hoped["mean"])
    assert results["trait_score_stderr,none"] == pytest.approx(hoped["stderr"])
    assert (results["refusals,none"], results["missing,none"]) == (hoped["refusals"], hoped["missing"])
    assert sum(results[f"share_{band},none"] for band in ("0_20", "21_40", "41_60", "61_80", "81_100")) == pytest.approx(1)
    theirs = inspect_metrics(log)
    for name in MEANS:
        assert theirs[name]["question_mean"] == pytest.approx(results[f"{name},none"])
        assert theirs[name]["question_stderr"] == pytest.approx(results[f"{name}_stderr,none"])
    for name in COUNTS:
        assert theirs[name]["total"] == results[f"{name},none"]
    logged = [json.loads(sample["filtered_resps"][0])[0] for sample in samples]
    assert [one["trait"]["missing"] == REFUSAL for one in logged] == [trait_rule(text) == "REFUSAL" for text in texts]
    for sample, ours in zip(log.samples, logged, strict=True):
        own = sample.scores["trait_expression"].metadata
        assert [own[part][key] for part in ("trait", "coherence") for key in ("score", "missing", "judge")] == [
            ours[part][key] for part in ("trait", "coherence") for key in ("score", "missing", "judge")
        ]
    assert metadata["trait_digest"] == trait.digest == log.eval.metadata["trait_digest"]
    assert {metadata["judge_identity"], metadata["coherence_identity"]} > {metadata["judge_identity"]}
    json.dumps(metadata)


def test_several_sampled_replies_a_question_are_the_same_in_both_harnesses(lm, judge, inspect_run):
    asked = {**judge.options, "samples": 3, "temperature": 1.5}
    torch.manual_seed(7)
    results, samples, _ = run(lm, "pv_humorous", **asked)
    log = inspect_run(registry.pv_humorous, seed=7, **asked)
    texts = {sample["doc"]["id"]: [text.strip() for text in sample["resps"][0]] for sample in samples}
    theirs = {sample_id: [None] * 3 for sample_id in texts}
    for sample in log.samples:
        theirs[sample.id][sample.epoch - 1] = sample.output.completion.strip()
    assert theirs == texts
    assert len({text for own in texts.values() for text in own}) > 30
    assert inspect_metrics(log)["trait_score"]["question_mean"] == pytest.approx(results["trait_score,none"])


def test_logs_of_both_harnesses_read_back_hold_the_turns_and_the_trait_scores(lm, judge, inspect_run, tmp_path):
    asked = {**judge.options, "system": "pos", "samples": 2}
    _, samples, _ = run(lm, "pv_humorous", {"limit": 3}, **asked)
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(sample, default=str)}\n" for sample in samples))
    log = inspect_run(registry.pv_humorous, **asked)
    trait = load_trait("humorous").items()
    for path, size in ((tmp_path / "samples.jsonl", 6), (log.location, 2 * len(trait.questions))):
        found = saved_examples(Path(path))
        assert len(found) == len({example.id for example in found}) == size
        assert {len(example.turns) for example in found} == {2}
        for example in found:
            number = trait.questions.index(example.prompt)
            assert example.turns[0].content == trait.instruction[number % 5].pos
            score = trait_rule(example.response) if example.response else None
            assert example.score == (score if isinstance(score, int) else None)
        done = CliRunner().invoke(cli.app, ["measure", "fluency", str(path)])
        assert done.exit_code == 0, done.output
        assert f" {size // 2} " in done.output  # means are over prompts


def test_several_samples_are_drawn_and_a_question_counts_once(lm, judge):
    results, samples, metadata = run(lm, "pv_humorous", samples=3, **judge.options)
    texts = [[text.strip() for text in sample["resps"][0]] for sample in samples]
    assert [len(own) for own in texts] == [3] * 20
    assert any(len(set(own)) > 1 for own in texts)
    hoped = expected(texts)
    assert results["trait_score,none"] == pytest.approx(hoped["mean"])
    assert results["trait_score_stderr,none"] == pytest.approx(hoped["stderr"])
    assert results["refusals,none"] == hoped["refusals"]
    assert len(json.loads(samples[0]["filtered_resps"][0])) == 3
    assert metadata["temperature"] == 1


def test_in_inspect_samples_are_epochs_and_a_question_counts_once(judge, inspect_run):
    log = inspect_run(registry.pv_humorous, samples=3, **judge.options)
    assert (log.eval.config.epochs, len(log.samples)) == (3, 60)
    texts = {}
    for sample in log.samples:
        texts.setdefault(sample.id, []).append(sample.output.completion.strip())
    assert any(len(set(own)) > 1 for own in texts.values())
    hoped, found = expected(list(texts.values())), inspect_metrics(log)
    assert found["trait_score"] == pytest.approx({"question_mean": hoped["mean"], "question_stderr": hoped["stderr"]})
    assert (found["refusals"]["total"], found["missing"]["total"]) == (hoped["refusals"], hoped["missing"])


def test_several_candidates_are_judged_in_one_evaluation_as_each_by_itself(folder, spec, lm, judge):
    steered, _, _ = run(lm, "pv_apathetic", **judge.options)
    plain, _, _ = run(SteeredHFLM(str(folder), device="cpu", batch_size=32), "pv_apathetic", **judge.options)
    (task,) = load_tasks(["pv_apathetic"], {"max_gen_toks": 8, **judge.options})
    task.candidates = (Candidate(name="steered", spec=SteeringSpec.load(spec)), Candidate(name="plain", spec=None))
    lm_eval.evaluate(lm, {"tasks": {"pv_apathetic": task}}, bootstrap_iters=0, log_samples=False)
    for number, alone in enumerate((steered, plain)):
        judged = [own for instance, own in zip(task.instances, task.judged, strict=True) if instance.idx == number]
        values = [question_values([response_values(one.record()) for one in own])["trait_score"] for own in judged]
        assert len(values) == 20
        assert fmean(value for value in values if not math.isnan(value)) == pytest.approx(alone["trait_score,none"])
    assert steered["trait_score,none"] != plain["trait_score,none"]


def test_a_file_of_ones_own_brings_questions_and_its_own_prompt(lm, folder, judge, inspect_run, tmp_path):
    prompt = '{{"response": "{answer}"}}'  # what the server reads
    data = {"instruction": [{"pos": "Be a pirate.", "neg": "Be none."}], "questions": ["Ahoy?", "Rum?"], "eval_prompt": prompt}
    (tmp_path / "pirate.json").write_text(json.dumps(data))
    given = {"trait": str(tmp_path / "pirate.json"), "system": "pos", **judge.options}
    results, samples, _ = run(lm, "pv_trait", **given)
    asked = [body["messages"] for body in judge.bodies]
    own = [user["content"] for system, user in asked if "how coherent" not in system["content"]]
    assert sorted(own) == sorted(json.dumps({"response": sample["resps"][0][0].strip()}, ensure_ascii=False) for sample in samples)
    context = samples[0]["arguments"][0][0]
    assert [turn["content"] for turn in context.messages] == ["Be a pirate.", "Ahoy?"]
    log = inspect_run(registry.pv_trait, **given)
    assert log.eval.task.endswith("pv_pirate")
    assert [message.text for message in log.samples[0].input] == ["Be a pirate.", "Ahoy?"]
    assert inspect_metrics(log)["coherence"]["question_mean"] == pytest.approx(results["coherence,none"])
    assert [sample.output.completion.strip() for sample in log.samples] == [sample["resps"][0][0].strip() for sample in samples]


def test_too_many_missing_verdicts_stop_both_and_refusals_do_not(lm, judge, inspect_run):
    judge.script = lambda number, body, headers: says(
        {"reason": "no", "score": "REFUSAL" if "shows one trait" in body["messages"][0]["content"] else 3}
    )
    strict = {**judge.options, "missing_limit": 0.1}
    results, _, _ = run(lm, "pv_evil", **strict)
    assert results["refusals,none"] == 20
    assert math.isnan(results["trait_score,none"])
    log = inspect_run(registry.pv_evil, **strict)
    assert log.status == "success"
    assert inspect_metrics(log)["refusals"]["total"] == 20
    assert math.isnan(inspect_metrics(log)["trait_score"]["question_mean"])
    judge.script = lambda number, body, headers: says("nothing that can be read")
    with pytest.raises(JudgeError, match="20 of 20 verdicts are missing"):
        run(lm, "pv_evil", **strict)
    assert "of 20 verdicts are missing, and missing_limit=0.1" in inspect_run(registry.pv_evil, **strict).error.message


def test_without_a_judge_both_say_what_to_give_and_responses_can_still_be_written(lm):
    with pytest.raises(JudgeError, match="pv_evil needs a judge.*openai:<model>.*hf:<model>"):
        run(lm, "pv_evil")
    with pytest.raises(RefusalError, match="pv_evil needs a judge"):
        registry.pv_evil()
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"max_gen_toks": 8})
    found = lm_eval.simple_evaluate(model=lm, tasks=["pv_evil"], task_manager=manager, predict_only=True)
    assert len(found["samples"]["pv_evil"]) == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge": "stylometric"}, "stylometric"),
        ({"judge": "openai:m", "judge_api_key": "sk-1"}, "Set the key in the environment"),
        ({"samples": 0}, "samples: Input should be greater than or equal to 1"),
        ({"samples": 2, "temperature": 0}, "would be the same response 2 times"),
        ({"system": "both"}, "system: Input should be 'pos' or 'neg'"),
        ({"rubric": "mine"}, "rubric: Input should be 'auto', 'ours' or 'file'"),
        ({"folder": "/nowhere"}, "trait='evil' is not in folder '/nowhere'"),
        ({"missing_limit": 2}, "missing_limit: Input should be less than or equal to 1"),
    ],
)
def test_wrong_options_are_refused_before_the_model_runs_in_both(given, message):
    with pytest.raises((TraitError, JudgeError), match=message):
        load_tasks(["pv_evil"], {"judge": "openai:m", "judge_key_env": "none", **given})
    with pytest.raises(RefusalError, match=message):
        registry.pv_evil(**{"judge": "openai:m", "judge_key_env": "none", **given})


def test_misspelt_options_and_a_trait_that_is_not_given_are_refused():
    with pytest.raises(RefusalError, match="no argument 'sample'.*Did you mean 'samples'"):
        registry.pv_evil(sample=3)
    with pytest.raises(RefusalError, match="pv_trait needs a trait"):
        registry.pv_trait()
    with pytest.raises(TraitError, match="pv_trait needs a trait"):
        load_tasks(["pv_trait"], {})


def test_group_and_tag_hold_the_seven_tasks():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    names = {f"pv_{trait}" for trait in TRAITS}
    assert "persona_vectors" in manager.all_groups
    assert set(manager.load(["persona_vectors"])["tasks"]) == names
    assert set(manager.load(["steered_lm_traits"])["tasks"]) == names
    assert "pv_trait" in manager.all_subtasks
    assert names <= set(registry.__all__)
