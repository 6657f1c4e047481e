"""``steered_perplexity`` in lm-eval: the metrics are lm-eval's own, and token perplexity is that of transformers."""

import math
from copy import deepcopy

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tiny_harness import rolling, save_model, save_vectors, spec_of

from steered_lm.errors import UserError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.rolling import TokenLikelihood
from steered_lm.search.protocol import Candidate

TEXT = "The ferry leaves the old harbour at seven in the morning.\n\nBees have moods, {{ and }} one should\nnot hurry them.\n"
PARTS = [part.strip() for part in TEXT.split("\n\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("model"))
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def spec(folder):
    return spec_of(save_vectors(folder, folder / "v.safetensors"))


@pytest.fixture(scope="module")
def model(folder):
    return SteeredHFLM(pretrained=str(folder), device="cpu", batch_size=4, add_bos_token=False)


def run(lm, folder, **metadata):
    (task,) = load_tasks(["steered_perplexity"], {"text": str(folder / "text.txt"), **metadata})
    found = evaluate(lm, {"tasks": {task.task_name: task}}, bootstrap_iters=0, log_samples=True)
    return found["results"]["steered_perplexity"], found["samples"]["steered_perplexity"]


@torch.no_grad()
def by_hand(model, text):
    tokens = model.tokenizer(text, add_special_tokens=False).input_ids
    logits = model.model(torch.tensor([[model.prefix_token_id, *tokens[:-1]]])).logits[0].double()
    return -float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()), len(tokens)


def test_the_metrics_equal_a_computation_by_transformers_and_lm_eval_s_definitions(model, folder):
    found, samples = run(model, folder)
    sums, sizes = zip(*(by_hand(model, part) for part in PARTS), strict=True)
    assert [sample["resps"][0][0] for sample in samples] == pytest.approx([-value for value in sums], rel=1e-5)
    total = sum(sums)
    assert found["token_perplexity,none"] == pytest.approx(math.exp(total / sum(sizes)), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(total / sum(len(part.split()) for part in PARTS)), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(total / sum(map(len, PARTS))), rel=1e-5)
    assert found["bits_per_byte,none"] == pytest.approx(total / sum(map(len, PARTS)) / math.log(2), rel=1e-5)


def test_stock_hf_gives_the_same_but_for_token_perplexity_which_it_cannot_count(model, folder):
    found, _ = run(model, folder)
    stock, _ = run(HFLM(pretrained=str(folder), device="cpu", batch_size=1, add_bos_token=False), folder)
    for name in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert stock[name] == pytest.approx(found[name], rel=1e-5)
    assert "token_perplexity,none" not in stock


def test_steering_changes_it_and_candidates_are_scored_by_their_own_specs(model, folder, spec):
    (task,) = load_tasks(["steered_perplexity"], {"text": str(folder / "text.txt")})
    task.candidates = (Candidate(name="plain"), Candidate(name="steered", spec=spec))
    task.build_all_requests()
    values = model.loglikelihood_rolling(task.instances)
    assert values[::2] == pytest.approx([-by_hand(model, part)[0] for part in PARTS], rel=1e-5)
    with model.steerer.batch([spec], _all_response(len(model.tok_encode(PARTS[0])))):
        steered = by_hand(model, PARTS[0])[0]
    assert values[1] == pytest.approx(-steered, rel=1e-5)
    assert values[1] != pytest.approx(values[0], rel=1e-3)


def _all_response(length):
    from steered_lm.steering.compile import Layout

    return Layout.scored([0], [length])


@pytest.mark.parametrize("exact", [False, True])
def test_rolling_likelihoods_say_how_many_tokens_they_are_of_on_both_paths_and_when_copied(folder, exact):
    lm = SteeredHFLM(pretrained=str(folder), device="cpu", batch_size=2, exact=exact, add_bos_token=False)
    values = lm.loglikelihood_rolling(rolling([*PARTS, "x" * 400]), disable_tqdm=True)
    assert [value.tokens for value in values] == [len(PARTS[0]), len(PARTS[1]), 400]
    copied = deepcopy(values[0])
    assert isinstance(copied, TokenLikelihood)
    assert (copied, copied.tokens) == (values[0], values[0].tokens)


def test_the_default_text_is_ours_and_bad_options_are_refused(folder):
    (task,) = load_tasks(["steered_perplexity"])
    assert len(task.documents()) == 10
    assert len(load_tasks(["steered_perplexity"], {"text": "tiny_talk"})[0].documents()) == 40
    for metadata, message in [
        ({"text": "nowhere.txt"}, "text='nowhere.txt' does not exist"),
        ({"split": "words"}, "split: .*'paragraph', 'line' or 'file'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tasks(["steered_perplexity"], metadata)
