"""Perplexity, KL divergence, calibration and fluency against computations by hand."""

import json
import math

import numpy as np
import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tiny_harness import save_model, save_vectors, spec_of
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import SpecError, UserError
from steered_lm.harness.model import SteeredHFLM
from steered_lm.measure.divergence import calibrate_alpha, calibrated, kl_to_unsteered, with_alpha
from steered_lm.measure.examples import read_examples
from steered_lm.measure.fluency import distinct_n, fluency, repetition
from steered_lm.measure.means import TokenMean, exponentiated
from steered_lm.measure.passages import Passage, read_passages, windows
from steered_lm.measure.perplexity import perplexities
from steered_lm.measure.texts import read_documents, text_file
from steered_lm.persona.style import words
from steered_lm.stats import mean_interval
from steered_lm.steering.compile import Layout
from steered_lm.steering.spec import SteeringSpec

LINES = ["The ferry leaves the harbour at seven.", "Bees have moods.", "It rained all night on the tin roof of the hut, and then it stopped."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return SteeredHFLM(pretrained=str(folder), device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def spec(folder):
    return spec_of(save_vectors(folder, folder / "v.safetensors"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, lm):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(LINES))
    return read_passages(path, lm.tokenizer, lm.prefix_token_id)


@torch.no_grad()
def log_probabilities(lm, window, spec):
    """All next-token log-probabilities that predict a window's tokens, from one unpadded pass."""
    ids = torch.tensor([(window.context + window.tokens)[:-1]])
    with lm.steerer.batch([spec], Layout.scored([window.response_start], [ids.shape[1]])):
        logits = lm.model(ids).logits[0].double()
    return logits.log_softmax(-1)[-len(window.tokens) :]


def test_perplexity_is_that_of_transformers_token_by_token_with_and_without_steering(lm, spec, texts):
    found = perplexities(lm.engine, texts, [None, spec, with_alpha(spec, -2.0)], length=lm.max_length)
    for one, steering in zip(found, [None, spec, with_alpha(spec, -2.0)], strict=True):
        by_hand = [-log_probabilities(lm, w, steering).gather(1, torch.tensor(w.tokens)[:, None]) for w in windows(texts, lm.max_length)]
        assert one.nll.totals == pytest.approx([float(values.sum()) for values in by_hand], rel=1e-5)
        assert one.value == pytest.approx(math.exp(float(torch.cat(by_hand).mean())), rel=1e-5)
    assert found[0].value != pytest.approx(found[1].value, rel=1e-3)


def test_each_token_of_a_long_text_is_predicted_once_and_windows_without_overlap_are_those_of_lm_eval(lm):
    tokens = tuple(range(3, 203))
    for length, overlap in ((16, 1), (16, 8), (16, 16), (300, 4)):
        cut = windows([Passage("a", (1,), tokens)], length, overlap)
        assert tuple(token for w in cut for token in w.tokens) == tokens
        assert all(len(w.context) + len(w.tokens) - 1 <= length for w in cut)
        assert all(len(w.context) >= overlap for w in cut[1:])
        upstream = [make_disjoint_window(pair) for pair in get_rolling_token_windows(list(tokens), 1, length, overlap)]
        assert [(list(w.context), list(w.tokens)) for w in cut] == upstream
    assert [w.name for w in windows([Passage("a", (1,), tokens)], 100)] == ["a", "a:1"]


def test_more_overlap_gives_a_long_text_the_context_that_hand_made_windows_have(lm, spec):
    passages = [Passage("a", (1,), tuple(lm.tok_encode(LINES[2]))[1:])]
    (found,) = perplexities(lm.engine, passages, [spec], length=20, overlap=10)
    by_hand = [-log_probabilities(lm, w, spec).gather(1, torch.tensor(w.tokens)[:, None]).sum() for w in windows(passages, 20, 10)]
    assert found.nll.totals == pytest.approx([float(value) for value in by_hand], rel=1e-5)


@pytest.mark.parametrize(("length", "overlap"), [(10, 0), (10, 11)])
def test_an_overlap_out_of_range_is_refused(length, overlap):
    with pytest.raises(UserError, match=f"overlap={overlap} is out of range. Allowed: 1 to the window's 10"):
        windows([Passage("a", (1,), (2,))], length, overlap)


def test_kl_is_the_sum_over_the_vocabulary_at_each_predicting_position_and_zero_without_steering(lm, spec, texts):
    unsteered, none, steered = kl_to_unsteered(lm.steerer, texts, [None, spec.with_weights({"formality": 0.0}), spec], length=lm.max_length)
    assert unsteered.totals == none.totals == (0.0, 0.0, 0.0)
    for window, total in zip(windows(texts, lm.max_length), steered.totals, strict=True):
        p, q = log_probabilities(lm, window, spec), log_probabilities(lm, window, None)
        by_hand = sum(float((row.exp() * (row - other)).sum()) for row, other in zip(p, q, strict=True))
        assert total == pytest.approx(by_hand, rel=1e-4)
    assert steered.mean > 0.01


def test_replies_are_steered_from_the_last_prompt_token_on_and_prompts_before_it(lm, spec, tmp_path):
    lines = [{"prompt": "Hello?", "response": "Good day to you."}, {"prompt": "And you?", "response": ""}, {"prompt": "Why", "response": "Bees."}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    passages = read_passages(tmp_path / "r.jsonl", lm.tokenizer, lm.prefix_token_id)
    assert [passage.name for passage in passages] == ["1", "3"]
    specs = [spec, SteeringSpec.model_validate({**spec.model_dump(), "positions": "prompt"})]
    found = kl_to_unsteered(lm.steerer, passages, specs, length=lm.max_length)
    scored = perplexities(lm.engine, passages, specs, length=lm.max_length)
    for steering, distance, one in zip(specs, found, scored, strict=True):
        for number, window in enumerate(windows(passages, lm.max_length)):
            p, q = log_probabilities(lm, window, steering), log_probabilities(lm, window, None)
            assert distance.totals[number] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
            assert one.nll.totals[number] == pytest.approx(-float(p.gather(1, torch.tensor(window.tokens)[:, None]).sum()), rel=1e-5)


def test_a_spec_that_steers_nothing_in_a_text_and_a_reply_that_does_not_fit_are_refused(lm, spec, texts):
    idle = SteeringSpec.model_validate({**spec.model_dump(), "positions": "prompt"})
    with pytest.raises(SpecError, match="positions='prompt' steers nothing in a plain text"):
        perplexities(lm.engine, texts, [idle], length=lm.max_length)
    with pytest.raises(UserError, match="item 'a' has 30 tokens, prompt and response together; the window takes 20"):
        kl_to_unsteered(lm.steerer, [Passage("a", (1,) * 10, (5,) * 20, prompted=True)], [spec], length=20)


def test_activations_driven_out_of_range_are_missing_and_not_a_number(lm, spec, texts):
    wild = SteeringSpec.model_validate({**spec.model_dump(), "alpha": 3e38, "weights": {"formality": 2.0}, "layers": (0, 1, 2)})
    (one,) = perplexities(lm.engine, texts, [wild], length=lm.max_length)
    (distance,) = kl_to_unsteered(lm.steerer, texts, [wild], length=lm.max_length)
    assert one.nll.totals == distance.totals == (None, None, None)
    assert one.estimate().missing == 3
    assert one.value is None


def test_calibration_finds_the_alpha_of_a_wanted_kl_and_keeps_its_sign(lm, spec, texts):
    for start in (0.5, 60.0, -4.0):
        found = calibrated(lm.steerer, texts, with_alpha(spec, start), 0.1, length=lm.max_length)
        again = kl_to_unsteered(lm.steerer, texts, [with_alpha(spec, found.alpha)], length=lm.max_length)[0].mean
        assert again == pytest.approx(0.1, rel=0.011)
        assert found.kl == pytest.approx(again)
        assert (found.alpha > 0) == (start > 0)
        assert len(found.tried) < 16
    with pytest.raises(SpecError, match="no weight that is not zero"):
        calibrated(lm.steerer, texts, spec.with_weights({"formality": 0.0}), 0.1, length=lm.max_length)


def test_calibration_of_a_known_curve_and_what_it_refuses():
    assert calibrate_alpha(lambda alpha: 0.5 * alpha**2, 0.02, tolerance=1e-9).alpha == pytest.approx(0.2, rel=1e-5)
    assert calibrate_alpha(lambda alpha: 0.5 * alpha**2, 0.005).tried == ((0.1, pytest.approx(0.005)),)
    with pytest.raises(UserError, match=r"kl=2 is not reached: at alpha=100 it is 1 nats a token"):
        calibrate_alpha(lambda alpha: 1 - math.exp(-alpha), 2.0)
    with pytest.raises(UserError, match=r"at alpha=0.4 the model's scores are NaN, and kl=1 was not reached"):
        calibrate_alpha(lambda alpha: alpha if alpha < 0.3 else None, 1.0)
    with pytest.raises(UserError, match=r"kl=0.02 is met by no alpha: the nearest, .* is 0.1\d* nats a token away\. What acts whatever alpha is"):
        calibrate_alpha(lambda alpha: 0.1 + alpha**2, 0.02)
    assert calibrate_alpha(lambda alpha: 0.1 + alpha**2, 0.14).alpha == pytest.approx(0.2, rel=0.05)
    with pytest.raises(UserError, match=r"kl=0.0 is not allowed"):
        calibrate_alpha(lambda alpha: alpha, 0.0)


def test_a_mean_over_tokens_weighs_items_by_length_and_its_interval_is_the_plain_one_for_equal_items():
    equal = TokenMean(items=("a", "b", "c"), totals=(2.0, 4.0, 9.0), tokens=(2, 2, 2))
    plain = mean_interval([1.0, 2.0, 4.5])
    assert (equal.estimate().value, equal.estimate().low) == pytest.approx((plain.value, plain.low))
    unequal = TokenMean(items=("a", "b", "c", "d"), totals=(2.0, 30.0, None, 8.0), tokens=(1, 10, 7, 5))
    found = unequal.estimate()
    assert (found.value, found.n, found.missing) == (pytest.approx(40 / 16), 3, 1)
    assert unequal.values == [2.0, 3.0, None, 1.6]
    assert exponentiated(found).low == pytest.approx(math.exp(found.low))
    assert exponentiated(found.model_copy(update={"value": 800.0})).reason == "the mean is too large to exponentiate"


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    rng, covered, rounds = np.random.default_rng(0), 0, 400
    for _ in range(rounds):
        sizes = rng.integers(5, 100, 30)
        totals = [float(size * (2.0 + rng.normal(0, 0.3))) for size in sizes]
        found = TokenMean(items=tuple(map(str, range(30))), totals=tuple(totals), tokens=tuple(map(int, sizes))).estimate()
        covered += found.low <= 2.0 <= found.high
    assert 0.91 < covered / rounds < 0.98


def test_paired_differences_are_of_the_items_that_both_sides_have():
    one = TokenMean(items=("a", "b", "c"), totals=(2.0, None, 9.0), tokens=(2, 3, 4))
    other = TokenMean(items=("a", "b", "c"), totals=(1.0, 3.0, 4.0), tokens=(2, 3, 4))
    found = one.minus(other)
    assert (found.mean, found.n, found.missing) == (pytest.approx(6 / 6), 2, 1)
    assert found.mean_a == pytest.approx(11 / 6)
    with pytest.raises(ValueError, match="must be of the same items"):
        one.minus(TokenMean(items=("a",), totals=(1.0,), tokens=(2,)))


def test_variety_repetition_and_length_of_responses():
    found = words("The cat, the cat and the dog's tail.")
    assert found == ["the", "cat", "the", "cat", "and", "the", "dog's", "tail"]
    assert distinct_n(found, 1) == 5 / 8
    assert distinct_n(found, 2) == 6 / 7
    assert repetition(found) == pytest.approx(1 / 7)
    made = fluency(["a b a b", "a b", "c", ""])
    assert made.distinct[2] == (2 / 3, 1.0, None, None)
    assert made.pooled == {1: 3 / 7, 2: 2 / 4, 3: 1.0}
    assert made.words == (4, 2, 1, 0)
    estimates = made.estimates()
    assert (estimates["repetition"].value, estimates["repetition"].missing) == (pytest.approx(1 / 6), 2)
    twice = fluency(["a b a b", "a b", "c d c d c d"], prompts=["p", "q", "p"]).estimates()["words"]
    assert (twice.value, twice.n) == ((5 + 2) / 2, 2)
    with pytest.raises(UserError, match="n=0 is not the size of an n-gram"):
        fluency(["a"], (0,))


def test_documents_are_paragraphs_lines_or_the_whole_file_and_jsonl_has_its_own(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert [read_documents(path, split) for split in ("paragraph", "line", "file")] == [
        ["one\ntwo", "three"],
        ["one", "two", "three"],
        ["one\ntwo\n\n\nthree"],
    ]
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert read_documents(tmp_path / "t.jsonl") == ["x", "y"]
    assert len(read_documents(text_file("english"))) == 10
    assert len(read_documents(text_file("tiny_talk"))) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist. .* a text of ours: english, tiny_talk"),
        ("", None, "is no file"),
        ("empty.txt", "\n \n", "holds no text"),
        ("bad.jsonl", "{", "line 1, is not JSON"),
        ("list.jsonl", "[1]", "is JSON, but no object"),
        ("other.jsonl", '{"body": "x"}', "has no text 'text'; it has body"),
    ],
)
def test_files_that_are_no_texts_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name)


def test_examples_come_from_prompts_messages_and_saved_samples(tmp_path):
    verdict = {"score": 4.0, "missing": None, "judge": "j"}
    lines = [
        {"prompt": "p", "response": "r", "system": "s", "score": 3},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": "x", "prompt": "p", "response": "", "verdict": verdict},
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = read_examples(tmp_path / "e.jsonl")
    assert [(e.id, [t.role for t in e.turns], e.response, e.score) for e in found] == [
        ("1", ["system", "user"], "r", 3.0),
        ("2", ["system", "user"], "a", None),
        ("x", ["user"], "", 4.0),
    ]
    sample = {"doc_id": 7, "doc": {"prompt": "p"}, "resps": [["text"]], "arguments": {"gen_args_0": {"arg_0": "p", "arg_1": {}}}, "metrics": []}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample))
    assert [(e.id, e.prompt, e.response) for e in read_examples(tmp_path / "samples.jsonl")] == [("7", "p", "text")]
    for bad, message in [
        ({"messages": [{"role": "user", "content": "q"}]}, "do not end with the assistant's text"),
        ({"prompt": "p"}, "has neither prompt and response nor messages; it has prompt"),
    ]:
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            read_examples(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="'.*none.jsonl' does not exist. Allowed: JSONL with prompt and response"):
        read_examples(tmp_path / "none.jsonl")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["measure", *map(str, arguments)])


def test_a_missing_text_and_an_unknown_split_are_said_before_a_model_is_loaded(tmp_path):
    for more, message in [(["--text", "none.txt"], "text='none.txt' does not exist"), (["--split", "word"], "split='word' is not known")]:
        assert message in str(invoke("perplexity", "--model", tmp_path / "none", *more).exception)


def test_the_commands_print_tables_and_write_every_number(folder, spec, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    spec.save(tmp_path / "s.yaml")
    common = ["--model", folder, "--text", tmp_path / "text.txt", "--split", "line", "--device", "cpu"]
    done = invoke("perplexity", *common, "--steering", tmp_path / "s.yaml", "--json", tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "p.json").read_text())
    plain, steered = written["arms"]
    assert plain["minus_unsteered"] is None
    assert len(steered["nll"]["totals"]) == len(steered["kl"]["totals"]) == 3
    tokens = sum(plain["nll"]["tokens"])
    gap = (sum(steered["nll"]["totals"]) - sum(plain["nll"]["totals"])) / tokens
    assert steered["minus_unsteered"]["mean"] == pytest.approx(gap)
    assert f"{plain['perplexity']['value']:.3f}" in done.output
    assert f"{tokens} tokens in 3 windows" in done.output
    done = invoke("calibrate", *common, "--steering", tmp_path / "s.yaml", "--kl", 0.05, "--out", tmp_path / "c.yaml", "--json", tmp_path / "c.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["kl"] == pytest.approx(0.05, rel=0.011)
    assert SteeringSpec.load(tmp_path / "c.yaml").alpha == found["alpha"]
    (tmp_path / "r.jsonl").write_text('{"prompt": "p", "response": "a b a b"}\n{"prompt": "p", "response": "c d"}\n')
    done = invoke("fluency", tmp_path / "r.jsonl", "--json", tmp_path / "f.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "f.json").read_text())[str(tmp_path / "r.jsonl")]["words"] == [4, 2]
    with pytest.raises(UserError, match="split='lines' is not known. .*Did you mean 'line'"):
        raise invoke("perplexity", *common[:4], "--split", "lines").exception


def test_below_the_first_steered_block_all_specs_share_one_pass(folder, spec, texts):
    lm = SteeredHFLM(pretrained=str(folder), device="cpu", batch_size=8)
    upper = SteeringSpec.model_validate({**spec.model_dump(), "layers": (2,)})
    perplexities(lm.engine, texts, [None, *(with_alpha(upper, alpha) for alpha in (1.0, 2.0, 3.0))], length=lm.max_length)
    facts = lm.engine.report
    assert facts.upper_tokens == 4 * facts.lower_tokens
