import json
import logging

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_harness import TASKS, LengthJudge, save_model, save_vectors, spec_of

from steered_lm.errors import JudgeError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.persona.load import load_persona


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return SteeredHFLM(str(folder), device="cpu", batch_size=16)


@pytest.fixture(scope="module")
def persona():
    return load_persona("edmund")


def run(lm, persona, judge, *, options=None, **metadata):
    tasks = load_tasks(["persona_judge"], {"persona": persona, "judge": judge, "max_gen_toks": 8, **metadata})
    return lm_eval.evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, bootstrap_iters=10, **(options or {}))


def simply(lm, name, *, options=None, **metadata):
    """Run the way the command does, environment report and all."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager, bootstrap_iters=10, **(options or {}))


def test_every_prompt_of_the_split_is_answered_and_judged_in_one_call(lm, persona):
    judge = LengthJudge()
    found = simply(lm, "persona_judge", persona=persona, judge=judge, max_gen_toks=8, split="validate")
    items = persona.items("validate")
    (asked,) = judge.calls
    assert [request.prompt for request in asked] == [item.prompt for item in items]
    scores = [judge.judge([request])[0].score for request in asked]
    results = found["results"]["persona_judge"]
    assert results["persona_fit,none"] == pytest.approx(sum(scores) / len(scores))
    assert results["persona_fit_stderr,none"] > 0
    assert results["missing,none"] == 0
    assert results["response_length,none"] == pytest.approx(sum(len(r.response.split()) for r in asked) / len(asked))
    assert found["higher_is_better"]["persona_judge"] == {"persona_fit": True, "missing": False, "response_length": None}
    assert found["versions"]["persona_judge"] == 1.0


def test_samples_carry_the_response_and_the_verdict_as_json(lm, persona):
    (sample, *_) = run(lm, persona, LengthJudge())["samples"]["persona_judge"]
    verdict = json.loads(sample["filtered_resps"][0])
    assert verdict["score"] == sample["persona_fit"]
    assert verdict["explanation"] == f"{len(sample['resps'][0][0].strip())} characters"
    assert sample["doc"]["prompt"] == persona.items("test")[0].prompt
    assert sample["target"] == persona.items("test")[0].reference
    json.dumps(sample)


def test_the_results_file_names_persona_split_and_judge_and_can_be_written(lm, persona):
    found = run(lm, persona, LengthJudge(), split="tune")
    metadata = found["configs"]["persona_judge"]["metadata"]
    assert {k: metadata[k] for k in ("persona", "split", "judge", "judge_identity")} == {
        "persona": "edmund",
        "split": "tune",
        "judge": "length",
        "judge_identity": "length/1",
    }
    assert metadata["persona_digest"] == persona.digest
    json.dumps(metadata)


def test_a_missing_verdict_is_counted_and_never_becomes_a_number(lm, persona):
    plain = run(lm, persona, LengthJudge())["samples"]["persona_judge"]
    cut = plain[0]["resps"][0][0].strip()
    found = run(lm, persona, LengthJudge(missing_on=cut), missing_limit=0.5)
    samples = found["samples"]["persona_judge"]
    missing = [s for s in samples if s["missing"]]
    rest = [s["persona_fit"] for s in samples if not s["missing"]]
    assert missing
    assert all("persona_fit" not in s and json.loads(s["filtered_resps"][0])["missing"] == "nothing to judge" for s in missing)
    assert found["results"]["persona_judge"]["missing,none"] == len(missing)
    assert found["results"]["persona_judge"]["persona_fit,none"] == pytest.approx(sum(rest) / len(rest))


def test_all_missing_is_nan_with_a_warning_where_that_is_allowed_and_an_error_where_not(lm, persona, caplog):
    with caplog.at_level(logging.WARNING, "steered_lm"):
        found = run(lm, persona, LengthJudge(missing_on=""), missing_limit=1.0)["results"]["persona_judge"]
    assert found["persona_fit,none"] != found["persona_fit,none"]
    assert found["missing,none"] == len(persona.items("test"))
    assert "persona_fit is NaN" in caplog.text
    with pytest.raises(JudgeError, match="missing"):
        run(lm, persona, LengthJudge(missing_on=""))


def test_a_misspelt_option_is_warned_about_and_another_tasks_key_is_not(persona, caplog):
    with caplog.at_level(logging.WARNING):
        load_tasks(["persona_judge"], {"persona": persona, "jugde": "openai:x", "max_seq_lengths": [4096], "pretrained": "x"})
    assert [record.getMessage() for record in caplog.records if "--metadata" in record.getMessage()] == [
        "--metadata jugde is no option of persona_judge and changes nothing; did you mean judge?"
    ]


def test_the_chat_template_is_applied_once_with_and_without_the_flag(lm, persona):
    judged = [LengthJudge(), LengthJudge()]
    run(lm, persona, judged[0])
    run(lm, persona, judged[1], options={"apply_chat_template": True})
    assert judged[0].calls == judged[1].calls


def test_a_system_instruction_becomes_the_system_turn(lm, persona):
    (task,) = load_tasks(["persona_judge"], {"persona": persona, "judge": LengthJudge()})
    doc = task.eval_docs[0]
    context = task.fewshot_context(doc, num_fewshot=0, system_instruction="Be brief.")
    assert lm.rendered(context) == f"<s><|system|>\nBe brief.</s><|user|>\n{doc['prompt']}</s><|assistant|>\n"
    with_flag = task.fewshot_context(
        doc, num_fewshot=0, system_instruction="Be brief.", apply_chat_template=True, chat_template=lm.apply_chat_template
    )
    assert with_flag == lm.rendered(context)


def test_the_prompt_itself_is_what_other_model_types_read(folder, persona):
    judge = LengthJudge()
    found = run(HFLM(str(folder), device="cpu", batch_size=16), persona, judge)
    assert found["samples"]["persona_judge"][0]["arguments"][0][0] == persona.items("test")[0].prompt
    assert len(judge.calls) == 1


def test_steering_changes_the_responses(folder, persona):
    plain, steered = LengthJudge(), LengthJudge()
    run(SteeredHFLM(str(folder), device="cpu", batch_size=16), persona, plain)
    file = spec_of(save_vectors(folder, folder / "v.safetensors")).save(folder / "spec.yaml")
    run(SteeredHFLM(str(folder), device="cpu", batch_size=16, steering=str(file)), persona, steered)
    assert plain.calls != steered.calls


def test_only_predicting_asks_no_judge(lm, persona):
    judge = LengthJudge()
    simply(lm, "persona_judge", persona=persona, judge=judge, options={"predict_only": True})
    assert judge.calls == []


def test_metadata_chooses_length_and_the_request_cache_is_not_used(lm, persona, caplog):
    short, long = LengthJudge(), LengthJudge()
    run(lm, persona, short, options={"cache_requests": True}, max_gen_toks=2)
    assert "cache_requests is ignored" in caplog.text
    run(lm, persona, long, max_gen_toks=12)
    assert max(len(r.response) for r in short.calls[0]) < max(len(r.response) for r in long.calls[0])


def test_a_named_persona_and_judge_need_nothing_but_names(lm):
    found = run(lm, "walt", "stylometric", split="validate")
    assert 1 <= found["results"]["persona_judge"]["persona_fit,none"] <= 5
    assert found["configs"]["persona_judge"]["metadata"]["persona"] == "walt"


def test_tasks_that_need_no_data_of_the_user_share_a_tag():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    # what needs neither data of one's own nor a language model as judge
    assert set(manager.load(["steered_lm"])["tasks"]) == {"persona_judge", "steered_perplexity", "tiny_knowledge", "tiny_truth"}


@pytest.mark.parametrize("name", ["tiny_knowledge", "tiny_truth"])
def test_choices_are_scored_in_chat_form_from_any_folder(lm, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks([name])
    found = lm_eval.evaluate(lm, {"tasks": {name: task}}, limit=6)
    results, samples = found["results"][name], found["samples"][name]
    assert results["acc_stderr,none"] >= 0
    for sample in samples:
        values = [value for value, _ in sample["filtered_resps"]]
        assert sample["acc"] == float(values.index(max(values)) == sample["doc"]["gold"])
    assert lm.rendered(samples[0]["arguments"][0][0]) == f"<s><|user|>\n{samples[0]['doc']['question']}</s><|assistant|>\n"
    same = lm_eval.evaluate(lm, {"tasks": {name: task}}, limit=6, apply_chat_template=True)
    for ours, theirs in zip(samples, same["samples"][name], strict=True):
        # There lm-eval scores the template's last line break too, which is the same for every choice.
        shift = [mine - rendered for (mine, _), (rendered, _) in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True)]
        assert shift == pytest.approx([shift[0]] * len(shift), abs=1e-3)
        assert ours["acc"] == theirs["acc"]
