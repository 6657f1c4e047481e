import random
from contextlib import nullcontext

import peft
import pytest
import torch
from tiny_models import generated_alone, random_model, scored_alone, spec_for, special_model, steering_kinds

from steered_lm.engine import Engine, GenerationRow, Sampling, ScoreRequest
from steered_lm.engine.adapters import BASE, Adapters, by_adapter
from steered_lm.engine.generation_plan import Demand
from steered_lm.errors import ModelError
from steered_lm.steering.hooks import Steerer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers

DRAW = random.Random(1)
NAMES = ("evil", "humorous", "apathetic")
CHOICES = ("evil", None, "humorous", BASE, "apathetic")  # None is "evil" too: the first that was added stays active
COMMON = tuple(DRAW.randrange(3, 64) for _ in range(10))
BEGIN_ALIKE = [COMMON + tuple(DRAW.randrange(3, 64) for _ in range(length)) for length in (1, 2, 5, 9)]
UNEQUAL = [tuple(DRAW.randrange(3, 64) for _ in range(length)) for length in (1, 2, 6, 17)]
ENDS = (3, 9, 17, 30, 41, 58)


def adapted(model, names=NAMES, **settings):
    """The model with an adapter of each name, which change it much."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=names[0])
        for number, name in enumerate(names[1:]):
            # ranks differ, and the last one leaves layers out
            layers = {"target_modules": ["q_proj", "down_proj"]} if number and "target_modules" not in settings else {}
            wrapped.add_adapter(name, peft.LoraConfig(**{**options, "r": 3 + number, **layers}))
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.4)
    return wrapped.eval()


def engine(steerer, **settings):
    return Engine(steerer, None, **{"gemm": "torch", **settings})


def alone(steerer, what, call):
    """What ``call`` gives when the model is set to the adapter of ``what`` and nothing else runs."""
    model = steerer.model
    before = list(model.active_adapters)
    model.set_adapter(before[0] if what.adapter in (None, BASE) else what.adapter)
    try:
        with model.disable_adapter() if what.adapter == BASE else nullcontext():
            return call(what)
    finally:
        model.set_adapter(before[0])


def one_by_one(steerer, rows, end_ids=()):
    return [alone(steerer, row, lambda row: generated_alone(steerer, row, end_ids)) for row in rows]


def mixed_rows(prompts, kinds, tokens=7):
    """Rows in which every prompt meets every adapter, with steering of all kinds, three lengths, and a few twins."""
    pairs = [(prompt, name) for prompt in prompts for name in CHOICES]
    rows = [GenerationRow(prompt, tokens - 2 * (i % 3), kinds[i % len(kinds)], adapter=name) for i, (prompt, name) in enumerate(pairs)]
    DRAW.shuffle(rows)
    return [*rows, rows[2], rows[7]]


@pytest.mark.parametrize("prompts", [BEGIN_ALIKE, UNEQUAL], ids=["begin alike", "unequal"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_rows_with_adapters_and_steering_of_their_own_equal_set_adapter_and_one_row_at_a_time(family, prompts, tmp_path):
    bare = special_model(family)
    kinds = steering_kinds(bare, tmp_path)
    model = adapted(bare, **({"target_modules": ["o_proj", "down_proj"]} if family == "phi3" else {}))
    steerer, rows = Steerer(model), mixed_rows(prompts, kinds)
    expected = one_by_one(steerer, rows)
    assert len(set(expected)) >= 12
    for most in (None, 3, 7):
        run = engine(steerer, max_rows=most)
        found = run.generate(rows)
        assert [result.tokens for result in found] == expected, most
        # rows of all adapters ran in the same steps
        assert run.report.steps < len(rows) * 7 / (most or len(rows)) + 7


@pytest.mark.parametrize("prompts", [BEGIN_ALIKE, UNEQUAL[1:]], ids=["begin alike", "unequal"])
def test_each_adapter_reads_its_own_copy_of_a_prompt(prompts, tmp_path):
    bare = random_model()
    kinds = [None, *(spec_for(bare, tmp_path, alpha=alpha) for alpha in (4.0, -6.0))]
    steerer = Steerer(adapted(bare))
    rows = [GenerationRow(prompt, 8, kind, adapter=name) for prompt in prompts for kind in kinds for name in CHOICES]
    expected = one_by_one(steerer, rows)
    by_name = {name: [text for text, row in zip(expected, rows, strict=True) if row.adapter == name] for name in CHOICES}
    assert len({tuple(texts) for texts in by_name.values()}) == 4
    for most in (None, 4):
        run = engine(steerer, max_rows=most)
        assert [result.tokens for result in run.generate(rows)] == expected, most
        assert run.support.sharing
        # the last prompt token is each row's first step: every block's prompts were shared; None and "evil" are the same row
        assert run.report.row_steps == 8 * len(rows) * 4 // 5


def test_rows_keep_their_adapter_when_others_end_and_waiting_ones_come_in(tmp_path):
    bare = random_model()
    kinds = steering_kinds(bare, tmp_path)
    steerer = Steerer(adapted(bare))
    rows = mixed_rows(BEGIN_ALIKE + UNEQUAL, kinds, tokens=12)
    expected = one_by_one(steerer, rows, ENDS)
    assert len({len(text) for text in expected}) > 4
    for most in (None, 5):
        found = engine(steerer, end_ids=ENDS, max_rows=most).generate(rows)
        assert [result.tokens for result in found] == expected, most


def test_a_sampled_row_with_an_adapter_does_not_depend_on_the_rows_beside_it():
    run = engine(Steerer(adapted(random_model())))
    rows = [GenerationRow(BEGIN_ALIKE[i % 4], 8, sampling=Sampling(temperature=0.8, seed=i), adapter=name) for i, name in enumerate(CHOICES * 3)]
    together = run.generate(rows)
    assert [run.generate([row])[0] for row in rows] == together
    assert len(set(together)) > 12


def test_conv1d_layers_of_gpt2_take_adapters():
    model = adapted(special_model("gpt2"), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    steerer = Steerer(model)
    rows = [GenerationRow(prompt, 6, adapter=name) for prompt in UNEQUAL for name in CHOICES]
    run = engine(steerer)
    assert [result.tokens for result in run.generate(rows)] == one_by_one(steerer, rows)
    assert run.report.steps == 5


def test_none_is_the_active_adapter_and_a_call_leaves_the_model_as_it_was():
    model = adapted(random_model())
    run = engine(Steerer(model))
    named = {name: run.generate([GenerationRow((5, 6, 7), 8, adapter=name)])[0] for name in (*NAMES, BASE)}
    assert len(set(named.values())) == 4
    model.set_adapter("humorous")
    bare = GenerationRow((5, 6, 7), 8)
    assert run.generate([bare])[0] == named["humorous"]
    assert run.generate([bare, bare._replace(adapter="apathetic")]) == [named["humorous"], named["apathetic"]]
    with model.disable_adapter():
        assert run.generate([bare, bare._replace(adapter="evil")]) == [named[BASE], named["evil"]]
    assert model.active_adapters == ["humorous"]
    assert not any("forward" in vars(module) for module in model.modules())
    model.base_model.set_adapter(["evil", "humorous"])
    both = run.generate([bare])[0]
    assert both not in named.values()
    with pytest.raises(ModelError, match=r"'evil' and 'humorous' act together.*Name it, or '__base__'"):
        run.generate([bare, bare._replace(adapter="apathetic")])


def test_a_broken_adapter_reaches_no_other_row():
    model = adapted(random_model())
    model.base_model.model.model.layers[1].mlp.down_proj.lora_B["humorous"].weight.data.fill_(float("nan"))
    rows = [GenerationRow(prompt, 8, adapter=name) for prompt in UNEQUAL for name in CHOICES]
    steerer = Steerer(model)
    expected = {row: one_by_one(steerer, [row])[0] for row in rows if row.adapter != "humorous"}
    for most, steps in ((None, 8), (3, 80)):
        run = engine(steerer, max_rows=most)
        for row, result in zip(rows, run.generate(rows), strict=True):
            assert result.ended == ("nan" if row.adapter == "humorous" else "length")
            assert row.adapter == "humorous" or result.tokens == expected[row]
        assert run.report.steps <= steps


def test_layers_that_are_given_tokens_instead_of_rows_run_one_adapter_after_the_other(caplog):
    model = adapted(special_model("opt"), target_modules=["q_proj", "fc1"])
    steerer = Steerer(model)
    rows = [GenerationRow(prompt, 6, adapter=name) for prompt in BEGIN_ALIKE for name in CHOICES]
    run = engine(steerer)
    assert [result.tokens for result in run.generate(rows)] == one_by_one(steerer, rows)
    assert [result.tokens for result in run.generate(rows[::-1])] == one_by_one(steerer, rows[::-1])
    # four adapters, two calls, and five steps after the first token
    assert run.report.steps == 4 * 2 * 5
    assert caplog.text.count("one adapter after the other") == 1
    assert "a layer is given 12 entries, and rows are 4" in caplog.text


def test_a_model_that_runs_in_ordinary_batches_runs_one_adapter_after_the_other():
    model = adapted(special_model("mamba"), target_modules=["x_proj", "in_proj"])
    steerer = Steerer(model)
    rows = [GenerationRow(prompt, 6, adapter=name) for prompt in UNEQUAL for name in CHOICES]
    run = engine(steerer)
    assert [result.tokens for result in run.generate(rows)] == one_by_one(steerer, rows)
    assert run.report.steps == 0


def test_scores_with_adapters_equal_set_adapter_and_one_request_at_a_time(tmp_path):
    bare = random_model()
    kinds = steering_kinds(bare, tmp_path)
    steerer = Steerer(adapted(bare))
    requests = [
        ScoreRequest(context, tuple(DRAW.randrange(3, 64) for _ in range(1 + i % 3)), kinds[i % len(kinds)], adapter=name)
        for i, (context, name) in enumerate((context, name) for context in BEGIN_ALIKE for name in CHOICES)
    ]
    told = {}
    found = engine(steerer).score(requests, max_length=60, done=lambda numbers, scored: told.update(zip(numbers, scored, strict=True)))
    expected = [alone(steerer, request, lambda request: scored_alone(steerer, request, 60)) for request in requests]
    assert [result.loglikelihood for result in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [result.is_greedy for result in found] == [greedy for _, greedy in expected]
    assert [told[number] for number in range(len(requests))] == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_gives_what_pefts_own_gives_for_each_entry(dtype):
    model = adapted(random_model().to(dtype))
    names = ["humorous", BASE, "evil", "humorous", "apathetic"]
    adapters = Adapters(model, "evil")
    adapters.passing = {5: by_adapter(names, torch.device("cpu"))}
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.lora_A["evil"].weight.dtype == torch.float32
    entries = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        with adapters.running():
            found = layer(entries)
        for name, entry, mine in zip(names, entries, found, strict=True):
            model.set_adapter("evil" if name == BASE else name)
            with model.disable_adapter() if name == BASE else nullcontext():
                torch.testing.assert_close(mine[None], layer(entry[None]), rtol=1e-5, atol=1e-5)


def test_a_plan_counts_a_prompt_once_for_each_adapter():
    rows = [GenerationRow(prompt, 9, adapter=name) for prompt in BEGIN_ALIKE for name in ("evil", "humorous", BASE)] * 4
    settings = {"blocks": 3, "lower": 1, "early": False, "prefixes": True, "sharing": True}
    several, one = Demand(rows, **settings), Demand([row._replace(adapter=None) for row in rows], **settings)
    assert (len(several.prompts), len(one.prompts)) == (12, 4)
    assert several.prefix == one.prefix == 10


def test_adapters_that_are_not_there_are_named():
    run = engine(Steerer(adapted(random_model())))
    with pytest.raises(ModelError, match=r"adapter='humourous' is not loaded.*apathetic, evil, humorous.*Did you mean 'humorous'"):
        run.generate([GenerationRow((5, 6), 2), GenerationRow((5, 6), 2, adapter="humourous")])
    with pytest.raises(ModelError, match=r"adapter='x' is not loaded"):
        run.score([ScoreRequest((5, 6), (7,), adapter="x")], max_length=60)
    with pytest.raises(ModelError, match=r"adapter='evil', but LlamaForCausalLM holds no LoRA layers.*PeftModel.from_pretrained"):
        engine(Steerer(random_model())).generate([GenerationRow((5, 6), 2, adapter="evil")])


def test_adapters_that_are_not_plain_lora_are_refused():
    row = GenerationRow((5, 6), 2, adapter="evil")
    dora = adapted(random_model(), ("evil",), use_dora=True)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj is of another kind, such as DoRA.*run once per adapter"):
        engine(Steerer(dora)).generate([row])
    embedded = adapted(random_model(), ("evil",), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match=r"embed_tokens is a peft\.tuners\.lora\.layer\.Embedding"):
        engine(Steerer(embedded)).generate([row])
    merged = adapted(random_model(), ("evil",))
    merged.merge_adapter()
    with pytest.raises(ModelError, match=r"q_proj has an adapter merged into it \(unmerge_adapter"):
        engine(Steerer(merged)).generate([row])
