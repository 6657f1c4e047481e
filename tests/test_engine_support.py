import logging
import random

import peft
import pytest
import torch
import transformers as hf
from test_engine_score import assert_equal
from tiny_models import (
    FAMILIES,
    RECURRENT_FAMILIES,
    SPECIAL_FAMILIES,
    generated_alone,
    random_model,
    scored_alone,
    spec_for,
    special_model,
    steering_kinds,
    vectors_for,
)

from steered_lm.engine import Engine, GenerationRow, ScoreRequest
from steered_lm.errors import ModelError
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import VectorsRef

DRAW = random.Random(2)


def draws(length):
    return tuple(DRAW.randrange(3, 64) for _ in range(length))


LONG = draws(9)
PROMPTS = [LONG + draws(4), LONG + draws(6), draws(1), draws(3)]
ENDINGS = [draws(1), draws(1), draws(3)]


def engine(steerer, **settings):
    return Engine(steerer, None, **{"gemm": "torch", **settings})


def assert_equal_to_one_by_one(steerer, kinds, **settings):
    """Both kinds of work, over unequal texts with a common beginning in some of them."""
    rows = [GenerationRow(PROMPTS[i % 4], 6, kind) for i, kind in enumerate(kinds)]
    run = engine(steerer, **settings)
    assert [result.tokens for result in run.generate(rows)] == [generated_alone(steerer, row) for row in rows]
    requests = [ScoreRequest(PROMPTS[i % 4], ending, kind) for i, kind in enumerate(kinds) for ending in ENDINGS]
    requests += [ScoreRequest(prompt, ending, kinds[i]) for prompt in PROMPTS for ending in ENDINGS for i in (0, 1)]
    assert_equal(run.score(requests, max_length=60), [scored_alone(steerer, request, 60) for request in requests])
    return run


WINDOWED = {"mistral", "gemma2", "gemma3", "gpt_oss", "llama4"}
# what the engine cannot know about a family beforehand, and says after its trial
REASONS = {
    # the bias of ALiBi is made from a mask of two dimensions; a tree needs one of four
    "bloom": (None, "too many values to unpack"),
    "falcon_alibi": (None, "too many values to unpack"),
    # the same bias, from columns: rows with a gap in them are wrong
    "mpt": ("population generation differs from the plain model", "population generation differs from the plain model"),
    "gpt_neo": ("see 8 columns by a mask of their own", "see 8 columns by a mask of their own"),
    # its blocks shape their output like the input of the whole stack
    "gpt_bigcode": ("is invalid for input of size", "is invalid for input of size"),
}


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_FAMILIES])
def test_support_of_a_family_is_found_out(family):
    support = engine(Steerer(special_model(family))).support
    assert support.window == (8 if family in WINDOWED else None)
    for reason, expected in zip(support[:2], REASONS.get(family, (None, None)), strict=True):
        assert (reason is None) == (expected is None)
        assert expected is None or expected in reason


@pytest.mark.parametrize(("family", "sensitive"), [("mpt", True), ("gpt_neo", True), ("llama", False)])
def test_what_rules_a_family_out_is_a_gap_in_its_columns(family, sensitive):
    model = special_model(family)
    row = torch.tensor([draws(12)])
    left, gap = torch.nn.functional.pad(row, (4, 0)), torch.cat([row[:, :6], torch.zeros(1, 4, dtype=torch.int64), row[:, 6:]], dim=1)

    @torch.no_grad()
    def last(ids):
        mask = (ids > 0).long()
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)} if family != "mpt" else {}
        return model(ids, attention_mask=mask, **positions).logits[0, -1]

    assert torch.allclose(last(left), last(row), atol=1e-5)
    assert torch.allclose(last(gap), last(row), atol=1e-5) is not sensitive


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi"])
def test_what_rules_alibi_out_of_scoring_is_a_mask_of_four_dimensions(family):
    model = special_model(family)
    with pytest.raises(ValueError, match="too many values to unpack"):
        model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool).tril())


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_a_model_that_keeps_a_recurrent_state_falls_back_with_one_warning_and_equal_results(family, tmp_path, caplog):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    with caplog.at_level(logging.WARNING, "steered_lm"):
        run = assert_equal_to_one_by_one(steerer, kinds)
        run.generate([GenerationRow((5, 6), 2)])
    said = [record.getMessage() for record in caplog.records if record.name == "steered_lm.engine.engine"]
    assert len(said) == 1
    assert said[0].startswith(f"{type(model).__name__} runs in ordinary batches, correct but slower: it")
    assert "state" in said[0] or "LinearAttentionLayer" in said[0]
    assert (run.report.steps, run.report.score_passes) == (0, 0)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_a_recurrent_state_is_steered_at_the_positions_that_a_full_pass_would_steer(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    rows = [GenerationRow(PROMPTS[i % 3], 6, kind) for i, kind in enumerate(kinds)]
    found = engine(steerer).generate(rows)
    assert [result.tokens for result in found] == [generated_alone(steerer, row, use_cache=False) for row in rows]


def test_an_encoder_decoder_is_refused():
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder; steering takes decoder-only"):
        Steerer(hf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_texts_longer_than_the_window_are_generated_by_the_engine_and_scored_in_ordinary_batches(family, tmp_path, caplog):
    model = special_model(family)
    steerer = Steerer(model)
    with caplog.at_level(logging.WARNING, "steered_lm"):
        run = assert_equal_to_one_by_one(steerer, steering_kinds(model, tmp_path), max_rows=5)
    assert run.report.steps > 0
    assert run.report.score_passes == 0
    said = [record.getMessage() for record in caplog.records if record.name == "steered_lm.engine.engine"]
    assert said == [f"{type(model).__name__} runs in ordinary batches, correct but slower: texts are longer than its attention window"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_attentions_and_both_kinds_of_embeddings_work(attention, tied, tmp_path):
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    run = assert_equal_to_one_by_one(Steerer(model), steering_kinds(model, tmp_path))
    assert run.report.steps > 0 and run.report.score_passes > 0


def test_attention_that_takes_no_mask_of_ones_own_falls_back():
    model = random_model()
    model.config._attn_implementation = "flex_attention"
    assert engine(Steerer(model)).support.generation == "attn_implementation='flex_attention' takes no masks of one's own; sdpa and eager do"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_run_through(dtype, tmp_path):
    model = random_model().to(dtype)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    run = engine(steerer)
    assert run.support[:2] == (None, None)
    rows = [GenerationRow(PROMPTS[i % 4], 6, kind) for i, kind in enumerate(kinds)]
    assert [len(result.tokens) for result in run.generate(rows)] == [6] * 12
    requests = [ScoreRequest(prompt, ending, kind) for prompt in PROMPTS for ending in ENDINGS for kind in kinds]
    found = [result.loglikelihood for result in run.score(requests, max_length=60)]
    close = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float64: 1e-5}[dtype]
    assert found == pytest.approx([scored_alone(steerer, request, 60)[0] for request in requests], abs=close)
    assert run.report.steps > 0 and run.report.score_passes > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
def test_a_model_with_lora_adapters_equals_the_reference(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        settings = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(random_model(), settings).eval()
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    run = assert_equal_to_one_by_one(steerer, kinds)
    assert run.report.steps > 0 and run.report.score_passes > 0
    row = GenerationRow(PROMPTS[0], 6, kinds[1])
    bare = Steerer(random_model(), allow_foreign=True)
    assert engine(bare).generate([row]) != run.generate([row])


def test_a_model_of_one_block_is_steered_at_its_only_block(tmp_path):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    config.layer_types = None
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    vectors = VectorsRef.to(vectors_for(model, layers=(0,)).save(tmp_path / "one.safetensors"))
    spec = spec_for(random_model(), tmp_path).model_copy(update={"vectors": vectors, "layers": (0,)})
    kinds = [None, *(spec.model_copy(update={"positions": positions}) for positions in ("all", "prompt", "response"))]
    run = assert_equal_to_one_by_one(Steerer(model), kinds)
    assert run.report.steps > 0 and run.report.score_passes > 0
