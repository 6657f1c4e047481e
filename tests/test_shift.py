"""Finetuning shifts against hand computations, their correlation with scores, and the screening of training files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from tiny_harness import save_model, save_vectors
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_lm.errors import VectorsError
from steered_lm.extract.activations import Row
from steered_lm.extract.projections import Projections, project
from steered_lm.stats import PairedDifference, pearson_interval
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import TraitVectors
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.shift import Shift, adapter_shift, finetuning_shift, screen, shift_against_score

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
ROWS = [Row("<|user|>\nHow are you?</s><|assistant|>\n", "Fine."), Row("<|user|>\nWell?</s><|assistant|>\n", "So so, you know."), Row("Again", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("model"))
    save_vectors(path, path / "v.safetensors")
    torch.manual_seed(0)
    options = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), options).save_pretrained(path / "adapter", save_embedding_layers=False)
    return path


@pytest.fixture(scope="module")
def parts(folder):
    return AutoTokenizer.from_pretrained(folder), TraitVectors.load(folder / "v.safetensors")


def by_hand(model, tokenizer, row, direction, layer):
    prompt, reply = (tokenizer(text, add_special_tokens=False).input_ids for text in row)
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states[layer + 1][0]
    along = hidden @ direction
    return float(along[len(prompt) :].mean()) if reply else None, float(along[len(prompt) - 1])


def test_a_shift_is_the_mean_projection_with_the_adapter_minus_that_without_on_the_same_rows(folder, parts):
    tokenizer, vectors = parts
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = [by_hand(base, tokenizer, row, vectors.vector("formality", 1), 1) for row in ROWS]
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    moved = [by_hand(adapted, tokenizer, row, vectors.vector("formality", 1), 1) for row in ROWS]
    for place, where in enumerate(("response", "prompt_last")):
        (shift,) = adapter_shift(adapted, tokenizer, ROWS, vectors, where=where, traits=["formality"], layers=[1])
        wanted = [new[place] - old[place] for new, old in zip(moved, plain, strict=True) if new[place] is not None]
        assert shift.difference.mean == pytest.approx(sum(wanted) / len(wanted), abs=1e-5) and abs(shift.difference.mean) > 1e-3
        assert (shift.difference.n, shift.difference.missing) == (len(wanted), 3 - len(wanted))
        assert shift.of_norm == pytest.approx(shift.difference.mean / vectors.scale(1, "residual", "response"))
    assert [(s.trait, s.layer) for s in adapter_shift(adapted, tokenizer, ROWS, vectors)] == [(t, n) for t in vectors.meta.traits for n in (0, 1, 2)]


def test_the_models_own_responses_are_projected_before_and_after(folder, parts):
    tokenizer, vectors = parts
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter").eval()
    choice = {"traits": ["formality"], "layers": [1]}
    (shift,) = adapter_shift(adapted, tokenizer, ROWS, vectors, where="own", max_new_tokens=4, **choice)

    def own(model):
        return project(model, tokenizer, find_blocks(model), ROWS, vectors, own=True, max_new_tokens=4, **choice).projections[0].own

    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    pairs = [(new, old) for new, old in zip(own(adapted), own(base), strict=True) if new is not None and old is not None]
    assert shift.difference.mean == pytest.approx(sum(new - old for new, old in pairs) / len(pairs), abs=1e-5)


def projections(values, trait="formality"):
    return Projections(trait=trait, layer=1, norm=2.0, response=tuple(values), prompt_last=tuple(values))


def test_intervals_are_paired_and_what_does_not_match_is_refused():
    values = [0.1, 5.0, -3.0, 2.0, 8.0, -1.0, 4.0, 0.5]
    (shift,) = finetuning_shift([projections(values)], [projections([v + 1 + 0.01 * i for i, v in enumerate(values)])])
    assert shift.difference.excludes_zero and shift.difference.low > 0.9 and shift.difference.high < 1.2
    with pytest.raises(ExperimentError, match="other directions"):
        finetuning_shift([projections(values)], [projections(values, trait="evil")])
    with pytest.raises(ExperimentError, match="before has 8 values and after 2"):
        finetuning_shift([projections(values)], [projections(values[:2])])
    with pytest.raises(ExperimentError, match="with own=True"):
        finetuning_shift([projections(values)], [projections(values)], where="own")


def shift_of(mean, trait="formality"):
    return Shift(
        trait=trait, layer=1, where="response", norm=2.0, difference=PairedDifference(mean=mean, n=5, missing=0, confidence=0.95, method="given")
    )


def test_shifts_are_correlated_with_scores_over_models():
    moved, scores = [0.0, 0.5, 1.1, 1.4, 2.2, 3.0], [10.0, 12.0, 30.0, 25.0, None, 90.0]
    found = shift_against_score([shift_of(value) for value in moved], scores)
    kept = [0, 1, 2, 3, 5]
    assert found.pearson.value == pytest.approx(stats.pearsonr([moved[i] for i in kept], [scores[i] for i in kept]).statistic)
    assert found.spearman.value == pytest.approx(0.9)
    assert (found.spearman.n, found.spearman.missing) == (5, 1)
    assert found.pearson.low < found.pearson.value < found.pearson.high
    assert shift_against_score(moved, scores) == found
    with pytest.raises(ExperimentError, match="several directions: evil at layer 1 .* Correlate one at a time"):
        shift_against_score([shift_of(1.0), shift_of(2.0, "evil")], [1.0, 2.0])


def test_pearsons_interval_is_fishers():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 7.0, 5.0]
    found, wanted = pearson_interval(x, y), stats.pearsonr(x, y)
    low, high = wanted.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((wanted.statistic, low, high))
    assert pearson_interval([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]).low is None
    assert "lie on a line" in pearson_interval(x, x).reason
    assert pearson_interval([1.0, 1.0], [1.0, 2.0]).value is None


def test_a_training_file_is_screened_by_projection_difference(folder, parts, tmp_path):
    tokenizer, vectors = parts
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [[{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"{name} is here."}] for name in ("Ann", "Bob", "Cy")]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = screen(data, model, tokenizer, vectors, traits=["formality"], layers=[1], max_new_tokens=4)
    assert found.ids == ["1", "2", "3"]
    ranked = found.ranked("formality", 1)
    assert [value for _, value in ranked] == sorted((v for v in found.projections[0].difference if v is not None), reverse=True) and ranked
    with pytest.raises(ExperimentError, match="was not projected. Allowed: formality at layer 1"):
        found.ranked("formality", 2)
    with pytest.raises(VectorsError):
        screen(data, AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "other", seed=1)), tokenizer, vectors)
