import math

import pytest
import torch
import transformers as hf
from lm_eval.models.huggingface import HFLM
from tiny_harness import TASKS, LengthJudge, save_model, save_vectors, scoring, spec_of, tokenizer, writing

from steered_lm.errors import JudgeError, ModelError, PersonaError, RunError, SpecError, UserError, VectorsError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import HarnessObjective, evaluate_choices
from steered_lm.harness.requests import ChatStr
from steered_lm.persona.load import load_persona
from steered_lm.search.protocol import Candidate

CPU = {"device": "cpu", "batch_size": 16}
UNSTEERED = [Candidate(name="unsteered")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vectors(folder):
    return save_vectors(folder, folder / "vectors.safetensors")


@pytest.fixture(scope="module")
def lm(folder):
    return SteeredHFLM(str(folder), **CPU)


@pytest.fixture(scope="module")
def persona():
    return load_persona("edmund")


def load(folder, **arguments):
    return SteeredHFLM(str(folder), **CPU, **arguments)


def test_a_missing_spec_or_vectors_file_is_refused(folder):
    with pytest.raises(SpecError, match="does not exist"):
        load(folder, steering="nowhere.yaml")
    with pytest.raises(VectorsError, match="does not exist"):
        load(folder, vectors="nowhere.safetensors", layer=1, weights="formality:1")


def test_vectors_of_another_model_are_refused_unless_asked_for(folder, vectors, tmp_path):
    other = save_model(tmp_path, seed=1)
    inline = {"vectors": str(vectors), "layer": 1, "weights": "formality:1"}
    with pytest.raises(VectorsError, match="fingerprint differs"):
        load(other, **inline)
    assert load(other, allow_foreign_vectors=True, **inline).spec is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": 7}, VectorsError, "layer=7 is not in"),
        ({"weights": "formalty:1"}, VectorsError, "Did you mean 'formality'"),
        ({"weights": "formality"}, SpecError, "is not trait:number"),
        ({"positions": "reply"}, SpecError, "positions"),
        ({"alpha": "much"}, SpecError, "alpha"),
    ],
)
def test_inline_steering_that_does_not_fit_is_refused_at_once(folder, vectors, arguments, error, message):
    with pytest.raises(error, match=message):
        load(folder, **{"vectors": str(vectors), "layer": 1, "weights": "formality:1", **arguments})


def test_vectors_that_changed_since_the_spec_was_written_are_refused(folder, tmp_path):
    path = save_vectors(folder, tmp_path / "v.safetensors")
    file = spec_of(path).save(tmp_path / "spec.yaml")
    save_model(tmp_path / "other", seed=3)
    save_vectors(tmp_path / "other", path)
    with pytest.raises(SpecError, match="changed since the spec was written"):
        load(folder, steering=str(file))


def test_misspelt_arguments_are_named_and_not_handed_to_transformers(folder):
    with pytest.raises(ModelError, match="Did you mean 'steering'"):
        load(folder, stering="spec.yaml")
    with pytest.raises(ModelError, match=r"prompt_format='chta' is not known.*'chat'"):
        load(folder, prompt_format="chta")
    with pytest.raises(ModelError, match="blocks='model.layer'"):
        load(folder, blocks="model.layer")


def test_encoder_decoders_are_refused(tmp_path):
    hf.T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8, d_kv=8, vocab_size=259).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="decoder-only"):
        load(tmp_path)


def test_a_model_without_a_chat_template_is_told_about_the_plain_format(tmp_path):
    lm = load(save_model(tmp_path, template=None))
    chat = ChatStr("Hi", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(ModelError, match=r"no chat template.*prompt_format='plain'"):
        lm.generate_until(writing([chat]))
    lm.prompt_format = "plain"
    assert len(lm.generate_until(writing([chat]))) == 1


def test_steering_that_overflows_is_refused_before_anything_runs(lm, vectors, persona):
    wild = Candidate(name="wild", spec=spec_of(vectors, alpha=1e38, weights={"formality": 100.0}))
    with pytest.raises(SpecError, match="is not finite in float32. Use a smaller alpha"):
        HarnessObjective(lm, persona, LengthJudge())([*UNSTEERED, wild], split="tune")
    with pytest.raises(SpecError, match="is not finite in float32. Use a smaller alpha"):
        evaluate_choices(lm, "tiny_truth", [*UNSTEERED, wild])


def test_nan_from_the_model_is_an_error_that_names_the_candidate(folder, vectors, persona):
    lm = load(folder)
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(float("nan"))
    steered = Candidate(name="wild", spec=spec_of(vectors))
    with pytest.raises(ModelError, match="candidate '(wild|unsteered)' gave NaN next-token scores"):
        HarnessObjective(lm, persona, LengthJudge())([*UNSTEERED, steered], split="tune")
    with pytest.raises(ModelError, match="candidate '(wild|unsteered)' gave NaN log-likelihoods"):
        evaluate_choices(lm, "tiny_truth", [*UNSTEERED, steered])
    lm.spec = steered.spec
    with pytest.raises(ModelError, match=r"the steered model gave NaN log-likelihoods.*smaller alpha"):
        lm.loglikelihood(scoring([("a", "b")]))


def test_broken_weights_are_an_error_of_the_choices_too(folder):
    lm = load(folder)
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="candidate 'unsteered' gave log-likelihoods"):
        evaluate_choices(lm, "tiny_truth", UNSTEERED)


def test_a_candidate_without_any_score_has_an_unknown_fitness_and_reasons(lm, persona):
    (score,) = HarnessObjective(lm, persona, LengthJudge(missing_on=""))(UNSTEERED, split="tune")
    assert math.isnan(score.mean)
    assert score.missing == len(score.items)
    assert all("nothing to judge" in str(item.verdict.missing) for item in score.items)


def test_a_population_needs_our_model_type_a_fixed_batch_size_and_candidates(folder, lm, persona):
    with pytest.raises(ModelError, match="lm is a HFLM"):
        HarnessObjective(HFLM(str(folder), device="cpu"), persona, LengthJudge())
    with pytest.raises(ModelError, match="batch_size='auto'"):
        HarnessObjective(SteeredHFLM(str(folder), device="cpu", batch_size="auto", exact=True), persona, LengthJudge())
    with pytest.raises(RunError, match="candidates is empty"):
        HarnessObjective(lm, persona, LengthJudge())([], split="tune")
    with pytest.raises(RunError, match="two candidates are named 'unsteered'"):
        evaluate_choices(lm, "tiny_truth", UNSTEERED * 2)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"persona": "edmond"}, PersonaError, "Did you mean 'edmund'"),
        ({"split": "train"}, PersonaError, "split='train' does not exist"),
        ({"judge": "stylo"}, JudgeError, "stylometric"),
        ({"judge": "openai:some-model", "judge_api_key": "sk-1"}, JudgeError, "Set the key in the environment"),
        ({"max_gen_toks": "many"}, PersonaError, "max_gen_toks"),
    ],
)
def test_metadata_that_names_nothing_is_refused_before_the_model_runs(metadata, error, message):
    with pytest.raises(error, match=message):
        load_tasks(["persona_judge"], metadata)


def test_a_judge_without_its_key_is_refused_before_the_model_runs(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        load_tasks(["persona_judge"], {"judge": "openai:some-model"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Who?", "choices": ["a", "b"], "answer": 2}', "answer=2 is not the index"),
        ('{"question": "Who?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}', "labels must be one a choice"),
        ('{"question": "Who?", "choices": ["a", "b"]}', "either choices and answer, or mc1_targets"),
        ('{"question": "Who?", "choices": ["a", "b"], "answer": 0, "hint": ""}', "hint"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_a_malformed_item_is_named_by_file_and_line(tmp_path, line, message):
    text = (TASKS / "tiny_truth" / "tiny_truth.yaml").read_text(encoding="utf-8")
    (tmp_path / "tiny_truth.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "items.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(["tiny_truth"], folder=tmp_path)
    assert "items.jsonl line 1" in str(caught.value)


def test_a_task_without_its_items_is_told_where_they_belong(tmp_path):
    text = (TASKS / "tiny_truth" / "tiny_truth.yaml").read_text(encoding="utf-8")
    (tmp_path / "tiny_truth.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="metadata.items names it"):
        load_tasks(["tiny_truth"], folder=tmp_path)
