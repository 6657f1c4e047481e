import asyncio
import gc
import json
import logging
import threading
import weakref
from pathlib import Path

import anyio
import pytest
import torch
import transformers as hf
from chat_folder import CONTEXT, save_chat_model
from inspect_ai.model import ChatMessageSystem, ChatMessageTool, ChatMessageUser, ContentImage, GenerateConfig, get_model
from inspect_ai.tool import ToolInfo
from tiny_models import vectors_for

import steered_lm.inspect_plugin.registry  # noqa: F401 - registers steered-hf, as the entry point does
from steered_lm.engine import GenerationRow, Sampling
from steered_lm.engine.sampling import Sampler
from steered_lm.errors import ModelError, SpecError, UserError, VectorsError
from steered_lm.inspect_plugin.batcher import Batcher
from steered_lm.inspect_plugin.generation import Replier
from steered_lm.inspect_plugin.provider import SteeredHFAPI
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.steering.hooks import steer
from steered_lm.steering.spec import SteeringSpec, VectorsRef

PROMPTS = ["my brother reads", "the lazy fox", "Yes?", "very good soup while my sister cooks the BIG jugs", "pack letters", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def specs(folder, tmp_path_factory) -> dict[str, Path]:
    """Spec files that steer the model in different ways."""
    where = tmp_path_factory.mktemp("specs")
    vectors = VectorsRef.to(vectors_for(hf.AutoModelForCausalLM.from_pretrained(folder)).save(where / "vectors.safetensors"))
    settings = {
        "formal": {"weights": {"formality": 1.0}, "layers": (1,), "alpha": 3.0},
        "warm": {"weights": {"emotional_tone": -2.0}, "layers": (0, 2), "alpha": 2.0, "positions": "all"},
        "ablated": {"weights": {"formality": 1.0}, "layers": (2,), "operation": "ablate"},
        # each addition is finite, their sum is not
        "wild": {"weights": {"formality": 2.0}, "layers": (0, 1, 2), "alpha": 3e38},
    }
    return {name: SteeringSpec(vectors=vectors, unit="raw", **given).save(where / f"{name}.yaml") for name, given in settings.items()}


@pytest.fixture(scope="module")
def plain(folder) -> SteeredHFAPI:
    return SteeredHFAPI(str(folder), dtype="float32", device="cpu")


def request(prompt, **config):
    return [ChatMessageUser(content=prompt)], [], "none", GenerateConfig(**{"max_tokens": 12, **config})


def ask(api, *requests):
    """The outputs (or the exceptions) of requests that are awaited at the same time."""

    async def together():
        return await asyncio.gather(*(api.generate(*r) for r in requests), return_exceptions=True)

    return asyncio.run(together())


def text(api, prompt, **config):
    (output,) = ask(api, request(prompt, **config))
    if isinstance(output, Exception):
        raise output
    return output.completion


def by_hand(folder, prompt, spec=None, new=12):
    """The greedy reply by transformers alone, steered by the core."""
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config = hf.GenerationConfig(eos_token_id=2, pad_token_id=0)
    ids = tokenizer(f"<s><|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False, return_tensors="pt")
    inputs = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "max_new_tokens": new, "do_sample": False}
    if spec is None:
        out = model.generate(**inputs)
    else:
        with steer(model, spec, attention_mask=ids["attention_mask"]):
            out = model.generate(**inputs)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_unsteered_reply_is_what_transformers_generates_greedily(folder, plain):
    assert [text(plain, prompt) for prompt in PROMPTS[:3]] == [by_hand(folder, prompt) for prompt in PROMPTS[:3]]


def test_a_spec_file_steers_the_replies_as_the_core_does(folder, specs, plain):
    api = SteeredHFAPI(str(folder), steering=str(specs["formal"]))
    (output,) = ask(api, request(PROMPTS[0]))
    assert output.completion == by_hand(folder, PROMPTS[0], specs["formal"]) != text(plain, PROMPTS[0])
    assert output.metadata["steering"] == SteeringSpec.load(specs["formal"]).digest


def test_the_inline_form_equals_the_spec_file(folder, specs):
    vectors = str(specs["formal"].parent / "vectors.safetensors")
    # -M splits at commas, so weights may arrive as a list
    api = SteeredHFAPI(str(folder), vectors=vectors, layer=1, weights=["formality:1", "emotional_tone:0"], alpha=3, unit="raw")
    assert text(api, PROMPTS[1]) == by_hand(folder, PROMPTS[1], specs["formal"])


def batch_sizes(caplog):
    """How many rows each batch had, from the log."""
    return [record.args[0] for record in caplog.records if record.name == "steered_lm.inspect_plugin.generation"]


def mixed_requests(specs):
    settings = [
        {},
        {"extra_body": {"steering": str(specs["warm"])}},
        {"extra_body": {"steering": str(specs["ablated"])}, "max_tokens": 5},
        {"extra_body": {"steering": None}, "temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "seed": 4, "top_p": 0.8, "top_k": 20, "num_choices": 2},
        {"extra_body": {"steering": str(specs["warm"])}, "stop_seqs": ["e", "o"]},
    ]
    return [request(prompt, **settings[(i + j) % len(settings)]) for i in range(2) for j, prompt in enumerate(PROMPTS)]


def test_mixed_specs_and_settings_share_a_batch_and_give_what_one_by_one_gives(folder, specs, caplog):
    api = SteeredHFAPI(str(folder), steering=str(specs["formal"]))
    with caplog.at_level(logging.DEBUG, "steered_lm.inspect_plugin.generation"):
        together = ask(api, *mixed_requests(specs))
    assert batch_sizes(caplog) == [14]
    alone = [ask(api, r)[0] for r in mixed_requests(specs)]
    facts = [[[(c.message.text, c.stop_reason) for c in o.choices], o.usage] for o in together]
    assert facts == [[[(c.message.text, c.stop_reason) for c in o.choices], o.usage] for o in alone]
    assert len({o.completion for o in together}) > 8


def tokens_of(outputs_of):
    """Every choice that is made while ``outputs_of`` runs: what was asked for, and the tokens; replies come in any order, so sorted."""
    found, reply = [], Replier._reply

    def noted(self, generated, request):
        first = request.rows[0]
        asked = (
            first.tokens,
            first.max_new_tokens,
            first.stop,
            None if first.spec is None else first.spec.digest,
            [r.sampling for r in request.rows],
        )
        found.append((asked, generated))
        return reply(self, generated, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replier, "_reply", noted)
        assert not [output for output in outputs_of() if isinstance(output, Exception)]
    return sorted(found, key=repr)


@pytest.fixture(scope="module")
def one_by_one(folder, specs):
    """The tokens of the mixed requests, each by itself on the reference path."""
    api = SteeredHFAPI(str(folder), steering=str(specs["formal"]), exact=True)
    return tokens_of(lambda: [ask(api, one)[0] for one in mixed_requests(specs)])


@pytest.mark.parametrize("options", [{}, {"gemm": "torch"}, {"gemm": "onednn"}, {"batch_size": 3}, {"memory_budget": "150KiB"}, {"exact": True}])
def test_concurrent_requests_have_the_tokens_of_the_same_requests_one_by_one(folder, specs, one_by_one, options):
    api = SteeredHFAPI(str(folder), steering=str(specs["formal"]), **options)
    assert tokens_of(lambda: ask(api, *mixed_requests(specs))) == one_by_one
    assert len(one_by_one) == 14


def test_concurrent_requests_share_the_steps_of_a_batch(folder, specs):
    requests = [request(prompt, max_tokens=12, extra_body={"steering": str(specs[name])}) for prompt in PROMPTS for name in ("formal", "warm")]
    together, alone = SteeredHFAPI(str(folder)), SteeredHFAPI(str(folder))
    ask(together, *requests)
    for one in requests:
        ask(alone, one)
    # the first of the 12 tokens comes from the prompt
    assert together.engine.report.steps == 11
    assert alone.engine.report.steps == 11 * len(requests)
    assert together.engine.report.row_steps == alone.engine.report.row_steps
    assert together.engine.report.prompt_passes < alone.engine.report.prompt_passes


def test_greedy_requests_that_are_alike_are_generated_once(folder):
    api = SteeredHFAPI(str(folder))
    # as the epochs of an evaluation are: without a seed each draws one of its own
    replies = [output.completion for output in ask(api, *[request("dog", max_tokens=5)] * 4)]
    assert api.engine.report.row_steps == 4
    assert replies == [replies[0]] * 4


def test_all_requests_that_wait_share_a_batch_by_default(folder, caplog):
    api = SteeredHFAPI(str(folder))
    assert api.max_connections() == 64
    with caplog.at_level(logging.DEBUG, "steered_lm.inspect_plugin.generation"):
        ask(api, *(request(f"{prompt} {number}", max_tokens=1) for prompt in PROMPTS for number in range(15)))
    assert batch_sizes(caplog) == [90]


@pytest.mark.parametrize("exact", [False, True])
def test_a_request_whose_scores_are_nan_fails_by_itself(folder, specs, exact):
    api = SteeredHFAPI(str(folder), exact=exact)
    wild = request("fox", extra_body={"steering": str(specs["wild"])})
    good, failed, also_good = ask(api, request("dog"), wild, request("fox", extra_body={"steering": str(specs["warm"])}))
    assert isinstance(failed, RefusalError)
    assert isinstance(failed.__cause__, ModelError)
    assert str(failed).startswith("the steered model gave NaN next-token scores")
    assert "Use a smaller alpha, or dtype=float32." in str(failed)
    assert good.completion == by_hand(folder, "dog")
    assert also_good.completion == by_hand(folder, "fox", specs["warm"])


def test_nan_without_steering_is_not_blamed_on_it(folder):
    api = SteeredHFAPI(str(folder))
    with torch.no_grad():
        api.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RefusalError, match="gave NaN next-token scores without any steering.*check the checkpoint"):
        text(api, "dog")


def test_a_request_that_does_not_fit_the_memory_budget_fails_by_itself(folder, plain):
    api = SteeredHFAPI(str(folder), memory_budget="80KiB")
    first, failed, last = ask(api, request("dog"), request("dog " * 100), request("fox"))
    assert isinstance(failed, RefusalError)
    assert "Raise memory_budget" in str(failed)
    assert (first.completion, last.completion) == (text(plain, "dog"), text(plain, "fox"))


def test_exact_replies_come_from_the_models_own_generate_and_equal_the_engines(folder, specs, plain):
    api = SteeredHFAPI(str(folder), exact=True)
    called = []
    api.model.generate = lambda generate=api.model.generate, **kwargs: called.append(kwargs["input_ids"].shape[0]) or generate(**kwargs)
    outputs = ask(api, *(request(prompt) for prompt in PROMPTS))
    assert called == [1] * len(PROMPTS)
    assert api.engine.report.steps == 0
    assert [output.completion for output in outputs] == [by_hand(folder, prompt) for prompt in PROMPTS]
    assert [output.completion for output in outputs] == [output.completion for output in ask(plain, *(request(prompt) for prompt in PROMPTS))]


def with_defaults(where, **settings):
    """A model whose generation config has ``settings``."""
    folder = save_chat_model(where)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("exact", [False, True])
def test_the_checkpoints_repetition_penalty_applies_whatever_the_neighbours(tmp_path, plain, caplog, exact):
    folder = with_defaults(tmp_path, repetition_penalty=1.4, max_length=9, min_p=0.5)
    api = SteeredHFAPI(str(folder), exact=exact)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = api.tokenizer(f"<s><|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, temperature=1.0, top_p=1.0, min_p=None)
        expected.append(api.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert [output.completion for output in ask(api, *(request(prompt) for prompt in PROMPTS))] == expected
    assert expected != [text(plain, prompt) for prompt in PROMPTS]
    assert not [record for record in caplog.records if "does not apply" in record.getMessage()]


def test_other_defaults_of_the_checkpoint_are_named_once_and_apply_to_exact_replies_alone(tmp_path, plain, caplog):
    whole = text(plain, "dog")
    banned = plain.tokenizer(whole, add_special_tokens=False)["input_ids"][:1]
    folder = with_defaults(tmp_path, suppress_tokens=banned, no_repeat_ngram_size=0, min_new_tokens=3)
    with caplog.at_level(logging.WARNING, "steered_lm.inspect_plugin.generation"):
        api = SteeredHFAPI(str(folder))
        assert [text(api, "dog"), text(api, "dog")] == [whole, whole]
    (record,) = (record.getMessage() for record in caplog.records if record.name == "steered_lm.inspect_plugin.generation")
    assert f"generation config has min_new_tokens=3, suppress_tokens={banned}, which steered-hf does not apply. exact=true applies some" in record
    caplog.clear()
    assert text(SteeredHFAPI(str(folder), exact=True), "dog") != whole
    (record,) = (record.getMessage() for record in caplog.records if "does not apply" in record.getMessage())
    assert record == "the model's generation config has min_new_tokens=3, which steered-hf does not apply."


def test_batches_keep_to_the_batch_size(folder, caplog):
    api = SteeredHFAPI(str(folder), batch_size=4)
    with caplog.at_level(logging.DEBUG, "steered_lm.inspect_plugin.generation"):
        ask(api, *(request(prompt, max_tokens=2) for prompt in PROMPTS))
    assert batch_sizes(caplog) == [4, 2]
    assert api.max_connections() == 4


def test_temperature_zero_and_none_are_greedy_and_top_k_one_agrees(plain):
    greedy = text(plain, PROMPTS[0])
    assert text(plain, PROMPTS[0], temperature=0.0) == greedy
    assert text(plain, PROMPTS[0], temperature=1.5, top_k=1, seed=1) == greedy
    assert text(plain, PROMPTS[0], temperature=1.5, top_p=1e-6, seed=1) == greedy


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(plain):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (text(plain, PROMPTS[0], temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    (output,) = ask(plain, request(PROMPTS[0], temperature=1.0, num_choices=3))
    assert len({choice.message.text for choice in output.choices}) == 3
    assert text(plain, PROMPTS[0], temperature=1.0, seed=output.metadata["seed"]) == output.completion


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    for settings, kept in (({"temperature": 2.0}, 5), ({"temperature": 2.0, "top_k": 3}, 3), ({"temperature": 2.0, "top_p": 0.6}, 2)):
        rows = [GenerationRow((1,), 1, sampling=Sampling(seed=seed, **settings)) for seed in range(4000)]
        tokens, _ = Sampler(rows, 5, logits.device).choose(logits.repeat(4000, 1), range(4000))
        drawn = torch.tensor(tokens).bincount(minlength=5) / 4000
        wanted = (logits / 2.0).softmax(0) * torch.tensor([1.0] * kept + [0.0] * (5 - kept))
        wanted = wanted / wanted.sum()
        assert ((drawn - wanted).abs() <= 4 * (wanted * (1 - wanted) / 4000).sqrt()).all()


def test_a_model_that_the_engine_does_not_take_is_answered_in_ordinary_batches_by_the_same_rules(tmp_path, caplog):
    tokenizer = hf.AutoTokenizer.from_pretrained(save_chat_model(tmp_path))
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4, vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.MambaForCausalLM(config)
    model.save_pretrained(tmp_path)
    requests = [request(prompt, max_tokens=4 + number) for number, prompt in enumerate(PROMPTS)]
    reference = [output.completion for output in ask(SteeredHFAPI(str(tmp_path), exact=True), *requests)]
    assert len({*reference, ""}) == len(PROMPTS) + 1
    model.generation_config.update(suppress_tokens=tokenizer(reference[0], add_special_tokens=False)["input_ids"])
    model.save_pretrained(tmp_path)
    assert text(SteeredHFAPI(str(tmp_path), exact=True), PROMPTS[0]) != reference[0]
    assert [output.completion for output in ask(SteeredHFAPI(str(tmp_path)), *requests)] == reference
    assert len([record for record in caplog.records if "runs in ordinary batches" in record.getMessage()]) == 1


def test_a_reply_ends_before_a_stop_sequence_even_across_tokens(plain):
    whole = text(plain, PROMPTS[0])
    stop = whole[4:9]
    (output,) = ask(plain, request(PROMPTS[0], stop_seqs=[stop, "never"]))
    assert output.completion == whole[: whole.index(stop)]
    assert output.stop_reason == "stop"
    assert output.usage.output_tokens < 12


def test_usage_counts_the_tokens_of_prompt_and_reply_without_padding(plain):
    outputs = ask(plain, request(PROMPTS[2]), request(PROMPTS[3], max_tokens=3))
    for output, prompt, most in zip(outputs, PROMPTS[2:4], (12, 3), strict=True):
        assert output.usage.input_tokens == len(plain.tokenizer(f"<s><|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)["input_ids"])
        assert (output.usage.output_tokens, output.stop_reason) == (most, "max_tokens")


def test_the_context_length_ends_a_reply_and_refuses_a_longer_prompt(plain):
    (output,) = ask(plain, request("dog " * 115, max_tokens=500))
    assert output.stop_reason == "model_length"
    assert output.usage.total_tokens == CONTEXT
    with pytest.raises(RefusalError, match=f"takes {CONTEXT} in all"):
        text(plain, "dog " * 300)


def test_a_system_turn_reaches_the_prompt(plain):
    async def reply():
        return await plain.generate(
            [ChatMessageSystem(content="cook soup"), ChatMessageUser(content=PROMPTS[0])], [], "none", GenerateConfig(max_tokens=8)
        )

    assert asyncio.run(reply()).completion != text(plain, PROMPTS[0], max_tokens=8)


def test_a_model_without_a_chat_template_is_refused_unless_the_plain_format_or_a_template_is_given(tmp_path):
    bare = save_chat_model(tmp_path, template=None)
    with pytest.raises(RefusalError, match="has no chat template"):
        text(SteeredHFAPI(str(bare)), PROMPTS[0])
    assert text(SteeredHFAPI(str(bare), prompt_format="plain"), PROMPTS[0])
    file = tmp_path / "template.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    from_file, inline = (SteeredHFAPI(str(bare), chat_template=value) for value in (str(file), file.read_text()))
    assert text(from_file, PROMPTS[0]) == text(inline, PROMPTS[0])
    with pytest.raises(RefusalError, match="renders to an empty prompt"):
        text(SteeredHFAPI(str(bare), chat_template="{% if messages is none %}{% endif %}"), PROMPTS[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": [ChatMessageTool(content="42", tool_call_id="1")]}, "does not call tools"),
        ({"tools": [ToolInfo(name="bash", description="runs")]}, r"does not call tools \(bash given\)"),
        ({"messages": [ChatMessageUser(content=[ContentImage(image="a.png")])]}, "holds image; steered-hf takes text alone"),
        ({"config": {"logprobs": True}}, "does not support logprobs"),
        ({"config": {"num_choices": 2}}, "num_choices=2 with greedy decoding"),
        ({"config": {"temperature": -1.0}}, "temperature >= 0"),
        ({"config": {"max_tokens": 0}}, "max_tokens=0 leaves nothing"),
        ({"config": {"extra_body": {"steer": 1}}}, "extra_body has steer"),
        ({"config": {"extra_body": {"steering": 3}}}, "allowed|Allowed: a spec file's path"),
        ({"config": {"extra_body": {"steering": "none.yaml"}}}, "'none.yaml' does not exist"),
        ({"config": {"extra_body": {"steering": None}, "cache": True}}, "cache and extra_body"),
    ],
)
def test_what_the_provider_does_not_do_is_refused_clearly(plain, given, message):
    messages = given.get("messages", [ChatMessageUser(content="dog")])
    with pytest.raises(RefusalError, match=message):
        asyncio.run(plain.generate(messages, given.get("tools", []), "none", GenerateConfig(**{"max_tokens": 4, **given.get("config", {})})))


def test_a_bad_spec_fails_its_own_request_and_no_other_of_the_batch(plain, specs):
    vectors = str(specs["formal"].parent / "vectors.safetensors")
    bad = {"steering": {"vectors": vectors, "layer": 1, "weights": "formalty:1"}}
    good, failed, also_good = ask(plain, request("dog"), request("dog", extra_body=bad), request("fox"))
    assert isinstance(failed, RefusalError)
    assert isinstance(failed.__cause__, VectorsError)
    assert "Did you mean 'formality'?" in str(failed)
    assert good.completion == text(plain, "dog")
    assert also_good.completion == text(plain, "fox")


@pytest.mark.parametrize(
    ("arguments", "cause", "message"),
    [
        ({"steerin": "x.yaml"}, ModelError, "steerin: Extra inputs are not permitted.*Allowed keys: steering"),
        ({"base_url": "http://localhost"}, ModelError, "steered-hf runs the model itself"),
        ({"steering": "nowhere.yaml"}, SpecError, "'nowhere.yaml' does not exist"),
        ({"layer": 1, "weights": "formality:1"}, SpecError, "inline steering lacks vectors"),
        ({"batch_size": 0}, ModelError, "batch_size=0 is not a number of rows. Allowed: 1 or more, or auto."),
        ({"batch_size": "many"}, ModelError, "batch_size='many' is not a number of rows"),
        ({"memory_budget": "4 apples"}, ModelError, "memory_budget='4 apples' is not a size. Allowed: a positive number of GiB"),
        ({"memory_budget": -1}, ModelError, "memory_budget=-1 is not a size"),
        ({"gemm": "mkl"}, ModelError, "gemm: Input should be 'auto', 'torch' or 'onednn' \\(got 'mkl'\\)"),
        ({"exact": "maybe"}, ModelError, "exact: Input should be a valid boolean.*got 'maybe'"),
        ({"dtype": "float8"}, ModelError, "dtype='float8' is not known"),
        ({"chat_template": "none.jinja"}, ModelError, "neither a Jinja template nor a file"),
        ({"tokenizer": "/no/such/folder"}, ModelError, "no tokenizer can be loaded"),
    ],
)
def test_wrong_model_arguments_are_refused_when_the_model_is_asked_for(folder, arguments, cause, message):
    with pytest.raises(RefusalError, match=message) as caught:
        get_model(f"steered-hf/{folder}", memoize=False, **arguments)
    assert isinstance(caught.value.__cause__, cause)


def test_a_spec_that_does_not_fit_the_model_is_refused_before_anything_is_generated(folder, specs, tmp_path):
    vectors = str(specs["formal"].parent / "vectors.safetensors")
    for arguments, message in (({"weights": "charm:1", "layer": 1}, "trait 'charm'"), ({"weights": "formality:1", "layer": 7}, "layer=7")):
        with pytest.raises(RefusalError, match=message):
            SteeredHFAPI(str(folder), vectors=vectors, **arguments)
    other = save_chat_model(tmp_path, seed=1)
    with pytest.raises(RefusalError, match="allow_foreign_vectors=true"):
        SteeredHFAPI(str(other), steering=str(specs["formal"]))
    assert text(SteeredHFAPI(str(other), steering=str(specs["formal"]), allow_foreign_vectors=True), "dog")


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(RefusalError, match="steered-lm/tiny-chat"):
        SteeredHFAPI(str(tmp_path / "nothing"))


def test_a_spec_file_that_changed_after_the_model_was_loaded_is_refused_not_ignored(folder, specs, tmp_path):
    spec = SteeringSpec.load(specs["formal"])
    file = spec.save(tmp_path / "spec.yaml")
    model = get_model(f"steered-hf/{folder}", steering=str(file))
    assert get_model(f"steered-hf/{folder}", steering=str(file)) is model
    assert text(model.api, "dog")
    spec.model_copy(update={"alpha": -1.0}).save(file)
    with pytest.raises(RefusalError, match="changed after this model was loaded"):
        text(model.api, "dog")


@pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")  # inspect_ai passes it to tenacity
def test_inspects_output_cache_tells_specs_apart(folder, specs, plain, monkeypatch, tmp_path):
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    config = GenerateConfig(max_tokens=8, cache=True)
    steered = (get_model(f"steered-hf/{folder}", memoize=False, steering=str(specs[name])) for name in ("formal", "warm"))

    async def replies():
        return [(await model.generate("dog", config=config)).completion for model in steered]

    assert asyncio.run(replies()) == [by_hand(folder, "dog", specs[name], new=8) for name in ("formal", "warm")]


def test_closing_detaches_every_hook_and_lets_go_of_the_model(folder, specs):
    api = SteeredHFAPI(str(folder), steering=str(specs["warm"]))
    model = api.model
    text(api, "dog")
    assert any(module._forward_hooks for module in model.modules())
    api.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RefusalError, match="was closed"):
        text(api, "dog")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_requests_that_wait_while_a_batch_runs_form_the_next_one():
    batches = []

    def run(batch, deliver):
        batches.append(list(batch))
        return [2 * item for item in batch]

    batcher = Batcher(run, max_size=3)

    async def main():
        return await asyncio.gather(*(batcher.submit(i) for i in range(8)))

    for _ in range(2):  # a second event loop finds nothing of the first
        batches.clear()
        assert asyncio.run(main()) == [2 * i for i in range(8)]
        assert batches == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_what_a_run_raises_reaches_every_request_of_the_batch_and_the_batcher_goes_on():
    def run(batch, deliver):
        if 13 in batch:
            raise UserError("thirteen")
        return [KeyError("seven") if item == 7 else item for item in batch]

    batcher = Batcher(run, max_size=8)

    async def main():
        first = await asyncio.gather(batcher.submit(1), batcher.submit(13), return_exceptions=True)
        return first, await asyncio.gather(batcher.submit(1), batcher.submit(7), return_exceptions=True)

    (one, thirteen), (fine, seven) = asyncio.run(main())
    assert isinstance(one, UserError)
    assert isinstance(thirteen, UserError)
    assert fine == 1
    assert isinstance(seven, KeyError)


def test_a_cancelled_request_leaves_the_others_their_results():
    batcher = Batcher(lambda batch, deliver: list(batch), max_size=8, window=0.05)
    results = []

    async def main():
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()

            async def leader():
                with scope:
                    results.append(await batcher.submit("leader"))

            async def follower():
                results.append(await batcher.submit("follower"))

            group.start_soon(leader)
            await anyio.sleep(0.01)
            group.start_soon(follower)
            await anyio.sleep(0.01)
            scope.cancel()

    anyio.run(main)
    assert results == ["follower"]


def test_a_result_that_is_delivered_early_reaches_its_request_while_the_batch_goes_on():
    told = threading.Event()

    def run(batch, deliver):
        deliver(batch.index("short"), "short")
        assert told.wait(10), "the short request heard nothing while the batch ran"
        return list(batch)

    batcher = Batcher(run, max_size=8)

    async def short():
        await asyncio.sleep(0)  # the long request runs the batch
        assert await batcher.submit("short") == "short"
        told.set()

    async def main():
        return await asyncio.gather(batcher.submit("long"), short())

    assert asyncio.run(main()) == ["long", None]


def test_a_cancelled_request_that_runs_the_batch_still_finishes_it_for_the_others():
    begun, go_on = threading.Event(), threading.Event()

    def run(batch, deliver):
        begun.set()
        assert go_on.wait(10)
        return list(batch)

    batcher = Batcher(run, max_size=8)

    async def main():
        leader = asyncio.ensure_future(batcher.submit("leader"))
        follower = asyncio.ensure_future(batcher.submit("follower"))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        leader.cancel()
        go_on.set()
        assert await asyncio.wait_for(follower, 10) == "follower"
        with pytest.raises(asyncio.CancelledError):
            await leader

    asyncio.run(main())


def test_a_short_reply_arrives_before_the_long_ones_of_its_batch(folder):
    api = SteeredHFAPI(str(folder))
    order = []

    async def one(name, **config):
        await api.generate([ChatMessageUser(content=f"tell me of {name}")], [], "none", GenerateConfig(**config))
        order.append((name, api.engine.report.steps))

    async def main():
        # the first one runs the batch and stays to its end
        await asyncio.gather(one("dog", max_tokens=40), one("fox", max_tokens=40), one("cat", max_tokens=1))

    asyncio.run(main())
    assert order[0][0] == "cat"
    assert order[0][1] < order[-1][1]
