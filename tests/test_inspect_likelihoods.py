"""Log-likelihoods in Inspect: those of lm-eval, item by item, and the same scores of them."""

import asyncio
import gc
import json
import logging
import math
from functools import partial
from pathlib import Path

import pytest
from chat_folder import save_chat_model
from hub_folder import save_small_data
from inspect_ai import eval as inspect_eval
from inspect_ai import eval_retry
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig
from lm_eval.evaluator import evaluate
from tiny_harness import rolling, save_model, save_vectors, scoring, spec_of

from steered_lm.benchmarks.folder import VARIABLE
from steered_lm.benchmarks.truthful import true_mass
from steered_lm.benchmarks.upstream import upstream_module
from steered_lm.content import TINY_CHAT, content_dir, resolve_model
from steered_lm.engine.encoding import Encoder
from steered_lm.errors import JudgeError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.requests import ChatStr
from steered_lm.inspect_plugin.lamp import macro_f1, root
from steered_lm.inspect_plugin.likelihood_tasks import bits_per_byte, byte_perplexity, token_perplexity, word_perplexity
from steered_lm.inspect_plugin.likelihoods import Likelihood, LikelihoodRequest
from steered_lm.inspect_plugin.logs import read_log
from steered_lm.inspect_plugin.provider import SteeredHFAPI
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.inspect_plugin.registry import mmlu, perplexity, tiny_knowledge, tiny_truth, truthfulqa_mc1, truthfulqa_mc2

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
TASKS = {
    "steered_truthfulqa_mc2": truthfulqa_mc2,
    "steered_perplexity": perplexity,
    "tiny_knowledge": tiny_knowledge,
    "tiny_truth": tiny_truth,
    "steered_truthfulqa_mc1": partial(truthfulqa_mc1, by="likelihood"),
    "steered_mmlu_astronomy": partial(mmlu, subjects="astronomy", fewshot=2, by="likelihood"),
}
PLAIN = [
    ("Q: what jumps?\nA:", " the fox"),
    ("my brother ", "reads"),
    ("", "soup"),
    ("", "<s>soup"),
    ("<s>a dog", " a dog"),
    ("  ", "x"),
    ("e" * 400, "s"),
]
TEXT = "the lazy dog jumps over jugs. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder):
    made = spec_of(save_vectors(folder, folder / "v.safetensors"), positions="all")
    made.save(folder / "spec.yaml")
    made.model_copy(update={"alpha": 3e38, "layers": (0, 1, 2), "weights": {"formality": 2.0}}).save(folder / "wild.yaml")
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def steered(folder, spec):
    return SteeredHFAPI(str(folder), steering=str(spec), device="cpu")


@pytest.fixture
def run(tmp_path):
    def evaluate(tasks, model=f"steered-hf/{TINY_CHAT}", **settings):
        return inspect_eval(tasks, model=model, log_dir=str(tmp_path / "logs"), display="none", **settings)

    yield evaluate
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def ask(api, *calls):
    """The answers (or the exceptions) of calls that are awaited at the same time."""

    async def together():
        return await asyncio.gather(*(api.loglikelihoods(*call) for call in calls), return_exceptions=True)

    return asyncio.run(together())


def plain_requests(pairs=PLAIN):
    return [LikelihoodRequest(text, context) for context, text in pairs]


def metrics_of(log):
    return {name: metric.value for score in log.results.scores for name, metric in score.metrics.items()}


@pytest.mark.parametrize("is_steered", [False, True], ids=["unsteered", "steered"])
def test_both_harnesses_give_the_same_items_log_likelihoods_and_scores(run, tmp_path, monkeypatch, is_steered):
    monkeypatch.setenv(VARIABLE, str(save_small_data(tmp_path / "data")))
    steering = {}
    # what Inspect itself takes for each task is most of this test's time
    tasks = TASKS if is_steered else {name: TASKS[name] for name in ("steered_truthfulqa_mc2", "steered_perplexity", "tiny_truth")}
    if is_steered:
        vectors = save_vectors(resolve_model(TINY_CHAT), tmp_path / "v.safetensors")
        steering = {"steering": str(spec_of(vectors, layers=(3,), alpha=2.0).save(tmp_path / "spec.yaml"))}
    logs = run([task() for task in tasks.values()], model_args={"device": "cpu", **steering}, limit=9)
    lm = SteeredHFLM(TINY_CHAT, device="cpu", batch_size=8, **steering)
    loaded = {task.task_name: task for task in load_tasks(list(tasks))}
    if is_steered:
        loaded["steered_mmlu_astronomy"].set_config("num_fewshot", 2)
    theirs = evaluate(lm, {"tasks": loaded}, limit=9, bootstrap_iters=2, log_samples=True)
    for log, name in zip(logs, tasks, strict=True):
        assert log.status == "success", log.error
        items = theirs["samples"][name]
        ours = {sample.id: next(iter(sample.scores.values())) for sample in log.samples}
        assert set(ours) == {item["doc"]["id"] for item in items}
        assert len(items) == (6 if name.startswith(("steered_truthfulqa", "steered_mmlu")) else 9)
        for item in items:
            score = ours[item["doc"]["id"]]
            expected = [resp[0] if isinstance(resp[0], float) else resp[0][0] for resp in item["resps"]]
            assert score.metadata["loglikelihoods"] == pytest.approx(expected, abs=1e-4, rel=1e-6)
        metrics, found = metrics_of(log), theirs["results"][name]
        if name == "steered_perplexity":
            assert set(metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"}
            assert metrics == pytest.approx({metric: found[f"{metric},none"] for metric in metrics}, rel=1e-5)
        else:
            accuracy = metrics.get("mean", metrics.get("accuracy"))
            assert accuracy == pytest.approx(found["acc,none"], abs=1e-4)
            assert metrics["stderr"] == pytest.approx(found["acc_stderr,none"], abs=1e-4)


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_s_plain_prompt_is_upstream_s_word_for_word(tmp_path, monkeypatch, shots):
    monkeypatch.setenv(VARIABLE, str(save_small_data(tmp_path / "data")))
    (task,) = load_tasks(["steered_mmlu_virology"])
    samples = mmlu(subjects="virology", fewshot=shots, by="likelihood").dataset
    for sample, doc in zip(samples, task.eval_docs, strict=True):
        assert sample.input == task.fewshot_context(doc, num_fewshot=shots)
        assert (sample.id, sample.target) == (doc["id"], ["ABCD"[doc["answer"]]])


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_texts_become_the_tokens_that_lm_eval_makes_of_them(folder, tmp_path, prompt_format):
    for place in (folder, save_chat_model(tmp_path / "other"), resolve_model(TINY_CHAT)):
        lm = SteeredHFLM(str(place), device="cpu", prompt_format=prompt_format)
        encoder = Encoder(lm.tokenizer, lm.model.config)
        assert (encoder.max_length, encoder.prefix) == (lm.max_length, lm.prefix_token_id)
        for context, continuation in PLAIN:
            if context:
                assert encoder.pair(context, continuation) == tuple(map(tuple, lm._encode_pair(context, continuation)))
            marked = ChatStr(context, messages=[{"role": "user", "content": context}])
            assert encoder.chat_pair(lm.rendered(marked), continuation, prompt_format) == tuple(map(tuple, lm._encode_pair(marked, continuation)))
        assert encoder.encode(TEXT) == tuple(lm.tok_encode(TEXT))


@pytest.mark.parametrize("exact", [False, True])
def test_the_provider_gives_lm_eval_s_log_likelihoods_on_both_paths(folder, spec, exact):
    api = SteeredHFAPI(str(folder), steering=str(spec), device="cpu", exact=exact)
    lm = SteeredHFLM(str(folder), steering=str(spec), device="cpu", exact=exact, batch_size=1)
    (found,) = ask(api, (plain_requests(),))
    expected = lm.loglikelihood(scoring(PLAIN), disable_tqdm=True)
    # on the reference path both are the model's own forward pass, and only add up in another precision
    near = {"rel": 1e-6} if exact else {"abs": 1e-4}
    assert [one.loglikelihood for one in found] == pytest.approx([value for value, _ in expected], **near)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    ((whole, empty),) = ask(api, ([LikelihoodRequest(TEXT), LikelihoodRequest("")],))
    (expected_whole,) = lm.loglikelihood_rolling(rolling([TEXT]), disable_tqdm=True)
    assert whole.tokens == expected_whole.tokens > 1000
    assert whole.loglikelihood == pytest.approx(float(expected_whole), rel=1e-6)
    assert empty.loglikelihood == pytest.approx(float(lm.loglikelihood_rolling(rolling([""]), disable_tqdm=True)[0]), rel=1e-6)


def test_a_conversation_is_rendered_and_the_steering_of_one_call_is_its_own(folder, steered):
    unsteered = SteeredHFAPI(str(folder), device="cpu")
    turns = (ChatMessageSystem(content="cook"), ChatMessageUser(content="what jumps?"))
    request = LikelihoodRequest("the fox", turns)
    rendered = LikelihoodRequest("the fox", "<s><|system|>\ncook</s><|user|>\nwhat jumps?</s><|assistant|>\n")
    own, none = ask(steered, ([request],), ([request], GenerateConfig(extra_body={"steering": None})))
    assert none == ask(unsteered, ([request],))[0]
    lm = SteeredHFLM(str(folder), device="cpu")
    marked = ChatStr("what jumps?", messages=[{"role": "system", "content": "cook"}, {"role": "user", "content": "what jumps?"}])
    assert none[0].loglikelihood == pytest.approx(lm.loglikelihood(scoring([(marked, "the fox")]), disable_tqdm=True)[0][0], abs=1e-4)
    assert none[0].loglikelihood != pytest.approx(own[0].loglikelihood, rel=1e-3)
    # white space at the end of plain text is scored with what follows; that of a template is not
    assert none[0].tokens == len("the fox") == ask(unsteered, ([rendered],))[0][0].tokens - 1
    assert ask(steered, ([],)) == [[]]


def test_calls_of_the_same_time_share_a_batch(steered, caplog):
    calls = [([request],) for request in plain_requests()]
    with caplog.at_level(logging.DEBUG, "steered_lm.inspect_plugin.scoring"):
        together = ask(steered, *calls)
    assert [record.args[0] for record in caplog.records if record.name == "steered_lm.inspect_plugin.scoring"] == [len(PLAIN)]
    alone = [ask(steered, call)[0] for call in calls]
    for one, other in zip(together, alone, strict=True):
        assert one[0].loglikelihood == pytest.approx(other[0].loglikelihood, abs=1e-4)


def test_replies_and_log_likelihoods_asked_for_at_once_take_turns_and_are_those_of_each_alone(steered, monkeypatch):
    running, met = [], []

    def watched(method):
        def run(*args, **kwargs):
            running.append(method)
            met.append(len(running))
            try:
                return method(*args, **kwargs)
            finally:
                running.remove(method)

        return run

    for name in ("generate", "score"):
        monkeypatch.setattr(steered.engine, name, watched(getattr(steered.engine, name)))
    prompts = ["what jumps?", "who reads?", "what is soup?"]

    def reply(prompt):
        return steered.generate([ChatMessageUser(content=prompt)], [], "none", GenerateConfig(max_tokens=24))

    async def all_of(*waiting):
        return await asyncio.gather(*waiting)

    async def both():
        return await asyncio.gather(all_of(*map(reply, prompts)), all_of(*(steered.loglikelihoods([one]) for one in plain_requests())))

    replies, values = asyncio.run(both())
    assert max(met) == 1
    assert len(met) >= 2
    assert [one.completion for one in replies] == [one.completion for one in asyncio.run(all_of(*map(reply, prompts)))]
    (alone,) = ask(steered, (plain_requests(),))
    assert [one.loglikelihood for (one,) in values] == pytest.approx([one.loglikelihood for one in alone], abs=1e-4)


def test_what_cannot_be_scored_fails_its_own_call_and_no_other_of_the_batch(folder, steered):
    fine = plain_requests()[:2]
    wild = GenerateConfig(extra_body={"steering": str(folder / "wild.yaml")})
    missing = GenerateConfig(extra_body={"steering": "nowhere.yaml"})
    found = ask(steered, (fine,), (fine, wild), ([LikelihoodRequest("", "dog")],), ([LikelihoodRequest("s" * 300, "dog")],), (fine, missing), (fine,))
    says = [
        "gave NaN log-likelihoods: the steering drives",
        "must hold at least one token",
        "300 tokens is longer than max_length=192",
        "does not exist",
    ]
    for error, text in zip(found[1:5], says, strict=True):
        assert isinstance(error, RefusalError)
        assert text in str(error)
    assert found[0] == found[5] == ask(steered, (fine,))[0]
    assert all(isinstance(one, Likelihood) and math.isfinite(one.loglikelihood) for one in found[0])


def test_too_little_memory_for_all_is_met_in_halves_and_named_when_it_is_too_little_for_one(folder):
    calls = [([request],) for request in plain_requests([(f"{'e' * 20 * size}", "dog") for size in range(1, 8)])]
    roomy = ask(SteeredHFAPI(str(folder), device="cpu"), *calls)
    tight = ask(SteeredHFAPI(str(folder), device="cpu", memory_budget="130KiB"), *calls)
    fits = [one for one in tight if not isinstance(one, RefusalError)]
    assert 0 < len(fits) < len(calls)
    assert all("Raise memory_budget" in str(one) for one in tight[len(fits) :])
    assert [one[0].loglikelihood for one in fits] == pytest.approx([one[0].loglikelihood for one in roomy[: len(fits)]], abs=1e-4)


def test_a_closed_model_is_refused(folder):
    api = SteeredHFAPI(str(folder), device="cpu")
    api.close()
    assert "was closed" in str(ask(api, (plain_requests(),))[0])


def test_models_without_log_likelihoods_are_refused_before_and_during_an_evaluation(run):
    says = r"steered_lm/tiny_truth needs log-likelihoods, which model 'mockllm/model' cannot give.*--model steered-hf/.*lm_eval --tasks tiny_truth"
    with pytest.raises(RefusalError, match=says):
        run("steered_lm/tiny_truth", model="mockllm/model")
    (log,) = run(tiny_truth(), model="mockllm/model", limit=1)
    assert log.status == "error"
    assert "steered_lm/tiny_truth needs log-likelihoods" in log.error.message


def test_bad_options_are_refused_plainly(run, tmp_path):
    for task, arguments, says in [
        (perplexity, {"split": "words"}, "split: .*'paragraph', 'line' or 'file'"),
        (perplexity, {"text": "nowhere.txt"}, "text='nowhere.txt' does not exist"),
        (truthfulqa_mc2, {"data": "/nowhere"}, "data='/nowhere' is not a folder"),
        (truthfulqa_mc1, {"by": "likelihod"}, "by='likelihod' is not known.*Did you mean 'likelihood'"),
        (mmlu, {"by": "likelihood", "seed": 1}, "seed=1 does not go with by='likelihood'"),
    ]:
        with pytest.raises(RefusalError, match=says):
            task(**arguments)
    (log,) = run(perplexity(), limit=1, system_message="be kind")
    assert "--system-message is not taken by steered_lm/perplexity" in log.error.message


def test_an_interrupted_evaluation_resumes_with_limit_and_epochs_to_the_same_aggregate(run, monkeypatch):
    whole = SteeredHFAPI.loglikelihoods
    asked = []

    async def breaks(self, requests, config):
        asked.append(requests)
        if len(asked) == 4:
            raise RuntimeError("the power went")
        return await whole(self, requests, config)

    settings = {"limit": 3, "log_format": "json", "task_args": {"text": "tiny_talk"}, "model_args": {"device": "cpu"}}
    monkeypatch.setattr(SteeredHFAPI, "loglikelihoods", breaks)
    (broken,) = run(perplexity, epochs=2, max_samples=1, **settings)
    assert broken.status == "error"
    before, done = len(asked), sum(sample.error is None for sample in broken.samples)
    (resumed,) = eval_retry(broken, log_dir=broken.location.rpartition("/")[0], display="none")
    assert (resumed.status, len(resumed.samples), len(asked) - before) == ("success", 6, 6 - done)
    assert done > 0
    (once,) = run(perplexity, **settings)
    assert metrics_of(resumed) == pytest.approx(metrics_of(once), rel=1e-5)
    logged = json.loads(Path(resumed.location.removeprefix("file://")).read_text(encoding="utf-8"))
    with pytest.raises(JudgeError, match="holds log-likelihoods and no text: only samples of tasks that generate"):
        read_log(Path(resumed.location.removeprefix("file://")))
    (score,) = logged["samples"][0]["scores"].values()
    assert set(score["value"]) == {"loglikelihood", "tokens", "words", "bytes"}
    total = sum(sample.scores["predicted_text"].value["loglikelihood"] for sample in once.samples)
    count = sum(sample.scores["predicted_text"].value["tokens"] for sample in once.samples)
    assert metrics_of(once)["token_perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-9)


def test_metrics_of_no_sample_are_nan_and_raise_nothing_which_inspect_would_warn_of():
    for made in (word_perplexity, byte_perplexity, bits_per_byte, token_perplexity, macro_f1, root):
        assert math.isnan(made()([]))


def test_mc2_is_upstream_s_share_and_stays_one_where_probabilities_underflow():
    values, labels = [-3.0, -1.5, -2.0], [1, 0, 1]
    upstream = upstream_module("truthfulqa/utils.py").process_results_mc2({"mc2_targets": {"labels": labels}}, [(value, False) for value in values])
    assert true_mass(labels, values) == pytest.approx(upstream["acc"], rel=1e-12)
    assert true_mass(labels, [value - 5000 for value in values]) == pytest.approx(upstream["acc"], rel=1e-12)


def test_the_items_are_those_of_the_files_that_lm_eval_s_tasks_read():
    for task, name in ((tiny_knowledge, "tiny_knowledge"), (tiny_truth, "tiny_truth")):
        lines = (content_dir("tasks") / name / "items.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(task().dataset) == len(lines)
        assert all(sum(sample.metadata["labels"]) == len(sample.target) == 1 for sample in task().dataset)
