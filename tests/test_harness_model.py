import copy
from contextlib import contextmanager

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_harness import STORIES, rolling, save_model, save_vectors, scoring, spec_of, tokenizer, writing

from steered_lm.errors import ModelError
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.requests import MODEL, CandidateStr, ChatStr, for_candidate
from steered_lm.search.protocol import Candidate
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import TraitVectors

PAIRS = [
    ("One day a cat", " sat on the mat"),
    ("One day a cat", " s"),
    ("One day a cat", " b"),
    ("Lily", " and Ben went to the park to play with a ball."),
    ("", "Once upon a time"),
    ("The end of the story is ", "near"),
    ("word " * 200, "the end"),
]
TEXTS = ["Once upon a time there was a little girl.", "A dog.", "The sun was up and so was Tim. " * 20]
CONTEXTS = ["Once upon a time", "A", "Lily and Ben went to the park. They saw"]
WEIGHTS = [{"formality": 1.0}, {"emotional_tone": -1.0}, {"formality": -0.5, "emotional_tone": 1.5}, {}, {"formality": 2.0}, {"emotional_tone": 0.7}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vectors(folder):
    return save_vectors(folder, folder / "vectors.safetensors")


@pytest.fixture(scope="module", params=["random", pytest.param("stories260K", marks=pytest.mark.shared)])
def either(request, tmp_path_factory, folder, vectors):
    """(model, vectors file) of the random model and of a trained one."""
    if request.param == "random":
        return folder, vectors
    return STORIES, save_vectors(STORIES, tmp_path_factory.mktemp("stories") / "vectors.safetensors")


def steered(model, spec=None, **options):
    lm = SteeredHFLM(str(model), **{"batch_size": 8, "device": "cpu", "max_length": 192, **options})
    lm.spec = spec
    lm.quiet = True
    return lm


def stock(model, **options):
    return HFLM(str(model), **{"batch_size": 8, "device": "cpu", "max_length": 192, **options})


def exact(model, spec=None, **options):
    return steered(model, spec, exact=True, **options)


def same(found, expected):
    """Texts and choices equal, log-likelihoods to rounding."""
    (values, windows, texts), (other_values, other_windows, other_texts) = found, expected
    assert [value for value, _ in values] == pytest.approx([value for value, _ in other_values], abs=1e-3)
    assert [greedy for _, greedy in values] == [greedy for _, greedy in other_values]
    assert windows == pytest.approx(other_windows, abs=1e-3)
    assert texts == other_texts
    return True


def answers(lm):
    quiet = {"disable_tqdm": True}
    return lm.loglikelihood(scoring(PAIRS), **quiet), lm.loglikelihood_rolling(rolling(TEXTS), **quiet), lm.generate_until(writing(CONTEXTS), **quiet)


def candidates(vectors):
    specs = [spec_of(vectors, weights=weights) for weights in WEIGHTS]
    return [*specs, None, spec_of(vectors, layers=(0, 2), operation="ablate", alpha=1.0)]


@contextmanager
def hooked(lm, layer, vector, start=0):
    """Add a vector to the positions from ``start`` on of the first pass, and to all of later, cached ones, by a hand-written hook."""
    passes = []

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 0 if passes else start :] += vector
        passes.append(1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_blocks(lm.model)[layer].register_forward_hook(hook)
    yield
    handle.remove()


def test_the_registry_knows_the_model_type():
    assert get_model("steered-hf") is SteeredHFLM


@pytest.mark.parametrize("batch_size", [1, 8])
def test_zero_weights_equal_stock_hf_to_the_bit_by_reference_and_to_rounding_by_the_engine(either, batch_size):
    model, vectors = either
    plain = answers(stock(model, batch_size=batch_size))
    for spec in (None, spec_of(vectors, weights={"formality": 0.0}), spec_of(vectors, alpha=0.0)):
        assert answers(exact(model, spec, batch_size=batch_size)) == plain
        assert same(answers(steered(model, spec, batch_size=batch_size)), plain)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_zero_row_in_a_steered_batch_still_equals_stock_hf_to_the_bit(folder, vectors, batch_size):
    pairs = PAIRS[3:4] * 4
    marked = [
        (CandidateStr(context, spec=spec_of(vectors, weights={"formality": w})), text) for w, (context, text) in zip((1, 0, 2, 0), pairs, strict=True)
    ]
    mixed = exact(folder, batch_size=batch_size).loglikelihood(scoring(marked))
    # Four equal rows, as in the mixed batch: matrix products of another batch size may round differently.
    plain = stock(folder, batch_size=batch_size, logits_cache=False).loglikelihood(scoring(pairs), disable_tqdm=True)
    assert [mixed[1], mixed[3]] == [plain[1], plain[3]]
    assert mixed[0] != plain[0] != mixed[2]


def test_a_one_vector_spec_equals_a_hand_written_hook_everywhere(either):
    model, vectors = either
    lm = stock(model, batch_size=1)
    with hooked(lm, 1, 4.0 * TraitVectors.load(vectors).vector("formality", 1)):
        by_hand = answers(lm)
    spec = spec_of(vectors, positions="all")
    assert answers(exact(model, spec, batch_size=1)) == by_hand
    assert same(answers(steered(model, spec)), by_hand)
    assert by_hand != answers(exact(model, batch_size=1))


@pytest.mark.parametrize("context", ["One day a cat", "word " * 200])
def test_response_positions_start_at_the_last_prompt_token_also_after_left_truncation(folder, vectors, context):
    lm = stock(folder, batch_size=1)
    continuation = " sat on the mat"
    pair = (context.rstrip(), continuation)
    length = min(len(lm.tok_encode(pair[0])), lm.max_length + 1 - len(continuation))
    with hooked(lm, 1, 4.0 * TraitVectors.load(vectors).vector("formality", 1), start=length - 1):
        by_hand = lm.loglikelihood(scoring([pair]), disable_tqdm=True)
    assert exact(folder, spec_of(vectors)).loglikelihood(scoring([pair])) == by_hand
    assert steered(folder, spec_of(vectors)).loglikelihood(scoring([pair]))[0][0] == pytest.approx(by_hand[0][0], abs=1e-3)


@pytest.mark.parametrize("make", [exact, steered])
@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_a_mixed_batch_equals_separate_runs_on_the_reference_path(either, positions, make):
    model, vectors = either
    specs = [None if spec is None else spec.model_copy(update={"positions": positions}) for spec in candidates(vectors)]
    together, alone = make(model, batch_size=32), exact(model, batch_size=32)
    texts = together.generate_until(writing([CandidateStr(c, spec=s) for s in specs for c in CONTEXTS]))
    values = together.loglikelihood(scoring([(CandidateStr(c, spec=s), t) for s in specs for c, t in PAIRS]))
    windows = together.loglikelihood_rolling(rolling([CandidateStr(t, spec=s) for s in specs for t in TEXTS]))
    written, scored, rolled = [], [], []
    for spec in specs:
        alone.spec = spec
        written += alone.generate_until(writing(CONTEXTS))
        scored += alone.loglikelihood(scoring(PAIRS))
        rolled += alone.loglikelihood_rolling(rolling(TEXTS))
    assert texts == written
    assert len(set(texts)) > len(CONTEXTS)
    assert [v for v, _ in values] == pytest.approx([v for v, _ in scored], abs=1e-4)
    assert [g for _, g in values] == [g for _, g in scored]
    assert windows == pytest.approx(rolled, abs=1e-3)


def test_positions_differ_and_prompt_and_response_do_not_overlap(folder, vectors):
    values = {p: steered(folder, spec_of(vectors, positions=p)).loglikelihood(scoring(PAIRS[3:4]))[0][0] for p in ("response", "prompt", "all")}
    assert len({*values.values(), steered(folder).loglikelihood(scoring(PAIRS[3:4]))[0][0]}) == 4


def test_equal_contexts_with_different_steering_are_not_merged(folder, vectors):
    marked = [(CandidateStr("One day a cat", spec=spec), token) for spec in (None, spec_of(vectors)) for token in ("x", "y", "z")]
    lm = steered(folder)
    separate = [
        steered(folder, spec).loglikelihood(scoring(PAIRS[:1] + [("One day a cat", t) for t in "xyz"]))[1:] for spec in (None, spec_of(vectors))
    ]
    assert [v for v, _ in lm.loglikelihood(scoring(marked))] == pytest.approx([v for part in separate for v, _ in part], abs=1e-4)
    assert [v for v, _ in exact(folder).loglikelihood(scoring(marked))] == pytest.approx([v for part in separate for v, _ in part], abs=1e-4)


def test_equal_tokens_with_another_border_are_not_merged_under_response_steering(folder, vectors):
    pairs = [("abc", "de"), ("abcd", "f")]
    spec = spec_of(vectors)
    apart = [exact(folder, spec).loglikelihood(scoring([pair]))[0][0] for pair in pairs]
    for make in (steered, exact):
        assert [v for v, _ in make(folder, spec).loglikelihood(scoring(pairs))] == pytest.approx(apart, abs=1e-4)


def test_a_request_without_a_candidate_takes_the_models_spec_and_none_is_unsteered(folder, vectors):
    spec = spec_of(vectors)
    requests = writing([CONTEXTS[0], CandidateStr(CONTEXTS[0], spec=None), CandidateStr(CONTEXTS[0])])
    own, none, marked = steered(folder, spec).generate_until(requests)
    assert own == marked != none
    assert none == stock(folder).generate_until(writing(CONTEXTS[:1]), disable_tqdm=True)[0]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"until": ["e", "a b"]}, {"num_beams": 2, "until": ["th"]}])
def test_beams_and_stop_sequences_work_row_by_row(folder, vectors, options):
    specs = candidates(vectors)
    together = steered(folder).generate_until(writing([CandidateStr(CONTEXTS[2], spec=s) for s in specs], **options))
    assert together == [steered(folder, s).generate_until(writing(CONTEXTS[2:], **options))[0] for s in specs]
    assert together[specs.index(None)] == stock(folder).generate_until(writing(CONTEXTS[2:], **options), disable_tqdm=True)[0]


def test_long_prompts_are_cut_on_the_left_and_steered_all_the_same(folder, vectors):
    long = "so " * 150 + "then"
    lm = steered(folder, spec_of(vectors))
    cut = lm.tok_decode(lm.tok_encode(long)[-(lm.max_length - 12) :])
    (whole,) = lm.generate_until(writing([long]))
    lm.add_bos_token = False
    assert [whole] == lm.generate_until(writing([cut]))


def test_chat_requests_need_no_flag_and_get_one_bos(folder):
    lm = steered(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
    rendered = lm.apply_chat_template(messages)
    chat = ChatStr("How are you?", messages=messages)
    ids = lm.tok_encode(chat)
    assert ids.count(1) == 1
    assert ids == lm.tok_encode(rendered)
    batch, mask = lm.tok_batch_encode([chat, ChatStr("Hi", messages=messages[1:])])
    assert batch[0].tolist() == ids
    assert int(mask.sum()) == len(ids) + len(lm.tok_encode(ChatStr("Hi", messages=messages[1:])))
    assert lm.generate_until(writing([chat])) == lm.generate_until(writing([rendered]))
    assert lm.loglikelihood(scoring([(chat, "Fine.")]))[0][0] == pytest.approx(_scored_by_hand(lm, rendered, "Fine."), abs=1e-4)


def _scored_by_hand(lm, prompt, reply):
    head, tail = lm.tokenizer.encode(prompt, add_special_tokens=False), lm.tokenizer.encode(reply, add_special_tokens=False)
    logits = lm._model_call(torch.tensor([head + tail]))[0].log_softmax(-1)
    return sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(tail))


def test_chat_and_plain_strings_share_a_batch(folder, vectors):
    lm = steered(folder, spec_of(vectors))
    chat = ChatStr("How are you?", messages=[{"role": "user", "content": "How are you?"}])
    together = lm.generate_until(writing([chat, *CONTEXTS]))
    assert together == [lm.generate_until(writing([context]))[0] for context in (chat, *CONTEXTS)]


def test_plain_format_writes_lines_and_a_space_before_the_answer(folder):
    lm = steered(folder, prompt_format="plain")
    chat = ChatStr("Hi", messages=[{"role": "user", "content": "Hi"}])
    assert lm.rendered(chat) == "User: Hi\nAssistant:"
    assert lm.loglikelihood(scoring([(chat, "yes")])) == lm.loglikelihood(scoring([("User: Hi\nAssistant:", " yes")]))


def test_marked_strings_survive_copying_and_are_plain_text_to_others(folder, vectors):
    chat = ChatStr("Hi", messages=[{"role": "user", "content": "Hi"}], spec=spec_of(vectors), candidate="c")
    again = copy.deepcopy(chat)
    assert (again, again.messages, again.spec, again.candidate) == ("Hi", chat.messages, chat.spec, "c")
    assert copy.deepcopy(ChatStr("Hi")).spec is MODEL
    assert stock(folder).generate_until(writing([chat]), disable_tqdm=True) == stock(folder).generate_until(writing(["Hi"]), disable_tqdm=True)


def test_a_candidates_system_turn_replaces_the_context_s_own():
    chat = ChatStr("Hi", messages=[{"role": "system", "content": "old"}, {"role": "user", "content": "Hi"}])
    made = for_candidate(chat, Candidate(name="prompted", system="new"))
    assert [m["content"] for m in made.messages] == ["new", "Hi"]
    assert (made.spec, made.candidate) == (None, "prompted")
    assert for_candidate("Q: Why?\nA:", Candidate(name="prompted", system="new")) == "new\n\nQ: Why?\nA:"


@pytest.mark.parametrize("make", [exact, steered])
def test_batch_size_auto_works_with_one_spec_and_equals_a_fixed_one(folder, vectors, capsys, make):
    spec = spec_of(vectors)
    lm = make(folder, spec, batch_size="auto", max_batch_size=4)
    assert same(answers(lm), answers(exact(folder, spec, batch_size=4)))


def test_batch_size_auto_takes_all_candidates_at_once(folder, vectors):
    requests = writing([CandidateStr(context, spec=spec) for spec in candidates(vectors) for context in CONTEXTS])
    lm = steered(folder, batch_size="auto")
    assert lm.generate_until(requests) == steered(folder, batch_size=2).generate_until(requests)
    assert lm.engine.report.prompt_passes == 1
    assert lm.engine.report.steps == 12


def test_batch_size_auto_is_refused_on_the_reference_path_when_requests_carry_their_steering(folder, vectors):
    lm = exact(folder, batch_size="auto", max_batch_size=4)
    with pytest.raises(ModelError, match="batch_size='auto'"):
        lm.generate_until(writing([CandidateStr("Hi", spec=spec_of(vectors))]))
    with pytest.raises(ModelError, match="batch_size='auto'"):
        lm.loglikelihood(scoring([(CandidateStr("Hi", spec=None), " you")]))


def test_the_response_cache_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="use_cache cannot be used"):
        CachingLM(steered(folder), str(tmp_path / "cache.db"))


def test_a_built_model_is_taken_as_it_is(folder, vectors):
    built = stock(folder).model
    lm = SteeredHFLM(built, tokenizer=tokenizer(), batch_size=8, max_length=192)
    lm.spec = spec_of(vectors)
    assert lm.model is built
    assert same(answers(lm), answers(exact(folder, spec_of(vectors))))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
def test_peft_adapters_are_steered_on_top(folder, vectors, tmp_path):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = get_peft_model(stock(folder).model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path)
    with_adapter = {"peft": str(tmp_path)}
    assert answers(exact(folder, **with_adapter)) == answers(stock(folder, **with_adapter))
    spec = spec_of(vectors, positions="all")
    lm = stock(folder, batch_size=1, **with_adapter)
    with hooked(lm, 1, 4.0 * TraitVectors.load(vectors).vector("formality", 1)):
        by_hand = answers(lm)
    assert answers(exact(folder, spec, batch_size=1, **with_adapter)) == by_hand
    assert same(answers(steered(folder, spec, **with_adapter)), by_hand)


def test_bfloat16_runs_and_takes_vectors_built_in_float32(folder, vectors):
    lm = steered(folder, spec_of(vectors), dtype="bfloat16")
    assert next(lm.model.parameters()).dtype is torch.bfloat16
    values, _, texts = answers(lm)
    assert values != answers(steered(folder, dtype="bfloat16"))[0]
    assert len(texts) == len(CONTEXTS)


def test_model_arguments_name_a_spec_file_or_its_parts(folder, vectors, tmp_path):
    spec = spec_of(vectors, weights={"formality": 1.0, "emotional_tone": -0.5}, alpha=2.0)
    file = spec.save(tmp_path / "spec.yaml")
    from_file = SteeredHFLM.create_from_arg_string(f"pretrained={folder},steering={file}", {"device": "cpu"})
    inline = f"pretrained={folder},vectors={vectors},layer=1,weights=formality:1;emotional_tone:-0.5,unit=raw,alpha=2"
    assert from_file.spec.digest == SteeredHFLM.create_from_arg_string(inline, {"device": "cpu"}).spec.digest == spec.digest


def test_the_results_file_says_what_was_steered_and_on_how_many_tokens(folder, vectors):
    spec = spec_of(vectors)
    lm = steered(folder, spec)
    lm.generate_until(writing(CONTEXTS))
    info = lm.get_model_info()
    assert info["steering"]["digest"] == spec.digest
    assert info["steered_tokens"][1] >= len(CONTEXTS)
    assert info["prompt_format"] == "chat"
    assert steered(folder).get_model_info()["steering"] is None
