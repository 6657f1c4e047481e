"""LaMP in both harnesses: what is asked, measured, judged and logged, and that they agree."""

import gc
import json
import sys
from pathlib import Path

import anyio
import lm_eval
import pytest
from fault_server import FaultServer, guesses
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelAPI, ModelOutput, modelapi
from lamp_data import AUTHOR, INPUT, write_lamp
from lm_eval.tasks import TaskManager
from tiny_harness import TASKS as FOLDER
from tiny_harness import LengthJudge

from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.errors import JudgeError, UserError
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.inspect_plugin import registry
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.lamp import TASKS, evaluate

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = [f"lamp_{n}" for n in range(1, 8)]
KEY = "sk-planted-0123456789"


SCRIPT: dict[str, str] = {}
GRADE = '{"reason": "x", "score": 4}'


@modelapi(name="lamp-scripted")
class Scripted(ModelAPI):
    """A model of Inspect's that gives the answer that ``SCRIPT`` has for a prompt, and a grade to any other."""

    async def generate(self, input, tools, tool_choice, config):
        await anyio.sleep(0)
        return ModelOutput.from_content("scripted", SCRIPT.get(input[-1].text, SCRIPT.get("else", GRADE)))


@pytest.fixture(scope="module")
def lm():
    return SteeredHFLM(resolve_model(TINY_CHAT), device="cpu", batch_size=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All seven tasks, three short rows each."""
    folder = tmp_path_factory.mktemp("data")
    for task, text in INPUT.items():
        inputs = [text, f"{text} Indeed.", f"{text} So it is."]
        write_lamp(folder, task, rows=[{"id": str(n), "input": text, "profile": AUTHOR[task]} for n, text in enumerate(inputs)])
    return folder


@pytest.fixture
def server(monkeypatch):
    """A judge that gives 4 with 3 to 1 to 2: an expected score of 3.5."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FaultServer(lambda *_: guesses({"4": -0.2876820724, "2": -1.3862943611}))
    yield found
    found.close()


def by_lm_eval(lm, name, limit=None, **metadata):
    (task,) = load_tasks([name], metadata)
    found = lm_eval.evaluate(lm, {name: task}, bootstrap_iters=0, limit=limit)
    values = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key and "stderr" not in key}
    return values, found["samples"][name], found


def by_inspect(name, tmp_path, limit=None, model=f"steered-hf/{TINY_CHAT}", roles=None, **arguments):
    (log,) = inspect_eval(
        getattr(registry, name),
        task_args=arguments,
        model=model,
        model_roles=roles or {},
        log_dir=str(tmp_path / "logs"),
        display="none",
        limit=limit,
    )
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind
    assert log.status == "success", log.error.message
    values = {score.name: next(iter(score.metrics.values())).value for score in log.results.scores}
    return values, log.samples, log


def test_every_task_is_listed_in_a_group_without_any_data(monkeypatch):
    monkeypatch.delenv("STEERED_LM_DATA", raising=False)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(NAMES) <= set(manager.all_subtasks)
    assert "lamp" in manager.all_groups
    assert set(NAMES) <= set(registry.__all__)


def test_the_group_is_all_seven_from_the_folder_that_the_environment_names(data, monkeypatch):
    monkeypatch.setenv("STEERED_LM_DATA", str(data))
    loaded = TaskManager(include_path=str(FOLDER), include_defaults=False).load(["lamp"])["tasks"]
    assert sorted(loaded) == NAMES
    assert all(task.eval_docs[0]["task"] == name.replace("lamp", "LaMP") for name, task in loaded.items())


@pytest.mark.parametrize("name", NAMES)
def test_both_harnesses_ask_the_same_and_measure_the_same_by_the_official_metrics(lm, data, tmp_path, name):
    ours, samples, _ = by_lm_eval(lm, name, data=str(data), k=1)
    theirs, logged, _ = by_inspect(name, tmp_path, data=str(data), k=1)
    answers = {sample["doc"]["id"]: sample["resps"][0][0].strip() for sample in samples}
    assert answers == {sample.id: sample.output.completion.strip() for sample in logged}
    assert {s["doc"]["id"]: s["doc"]["prompt"] for s in samples} == {s.id: s.input for s in logged}
    assert all(s["doc"]["retrieved"] and len(s["doc"]["retrieved"]) == 1 for s in samples)
    assert lm.rendered(samples[0]["arguments"][0][0]).count(samples[0]["doc"]["prompt"]) == 1
    expected = evaluate(TASKS[name.replace("lamp", "LaMP")], answers, {s["doc"]["id"]: s["doc"]["reference"] for s in samples})
    assert ours == pytest.approx(expected)
    assert theirs == pytest.approx(expected)
    json.dumps(samples)


@pytest.mark.parametrize(
    ("name", "answers"),
    [("lamp_1", ["[1]", " [2]", "[1]\n"]), ("lamp_2", ["romance", "sci-fi", "Romance"]), ("lamp_3", ["2", "5.0", "two"])],
)
def test_answers_as_a_better_model_gives_them_are_measured_alike(data, tmp_path, monkeypatch, name, answers):
    (task,) = load_tasks([name], {"data": str(data)})
    docs = list(task.eval_docs)
    scored = [task.process_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    ours = {metric: task.aggregation()[metric]([one[metric] for one in scored]) for metric in scored[0]}
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", dict(zip((doc["prompt"] for doc in docs), answers, strict=True)))
    theirs, _, _ = by_inspect(name, tmp_path, model="lamp-scripted/m", data=str(data))
    expected = evaluate(TASKS[name.replace("lamp", "LaMP")], dict(enumerate(answers)), {n: doc["reference"] for n, doc in enumerate(docs)})
    assert ours == pytest.approx(expected)
    assert theirs == pytest.approx(expected)
    assert min(expected.values()) > 0


def test_options_choose_what_is_retrieved_and_how_long_answers_are(lm, data):
    _, samples, found = by_lm_eval(lm, "lamp_7", data=str(data), retrieval="none", max_gen_toks=3)
    assert samples[0]["doc"]["prompt"] == samples[0]["doc"]["input"] == INPUT["LaMP_7"]
    metadata = found["configs"]["lamp_7"]["metadata"]
    assert {key: metadata[key] for key in ("retrieval", "k", "split", "seed", "max_gen_toks")} == {
        "retrieval": "none", "k": 4, "split": "dev", "seed": 0, "max_gen_toks": 3,
    }  # fmt: skip
    prompts = [by_lm_eval(lm, "lamp_7", 1, data=str(data), retrieval=r, k=2)[1][0]["doc"]["retrieved"] for r in ("recency", "bm25")]
    assert prompts == [["p1", "p0"], ["p1", "p0"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": "bm52"}, "--metadata of lamp_7 is not a valid LampOptions: retrieval"),
        ({"k": 0}, "k: Input should be greater than or equal to 1"),
        ({"split": "test"}, "has no split='test'"),
        ({"data": "/nowhere"}, "data='/nowhere' is not a folder"),
        ({"missing_limit": "few"}, "missing_limit: Input should be a valid number"),
        ({"judge": "stylometric"}, "cannot rate LaMP's many authors"),
        ({"judge": "openai:m", "judge_api_key": KEY}, "judge_api_key is not taken"),
    ],
)
def test_wrong_options_are_refused_before_the_model_runs(data, options, message):
    with pytest.raises((UserError, JudgeError), match=message):
        load_tasks(["lamp_7"], {"data": str(data), **options})


def test_inspect_refuses_wrong_options_in_one_sentence(data):
    with pytest.raises(RefusalError, match="-T of lamp_4 is not a valid LampOptions: retrieval"):
        registry.lamp_4(data=str(data), retrieval="bm52")
    with pytest.raises(RefusalError, match="cannot rate LaMP's many authors"):
        registry.lamp_7(data=str(data), judge="stylometric")
    with pytest.raises(RefusalError, match="lamp_7 has no argument 'retrival'.*Did you mean 'retrieval'"):
        registry.lamp_7(data=str(data), retrival="none")


def test_paraphrases_are_judged_against_their_authors_and_the_verdicts_are_logged(lm, data, tmp_path, server):
    judging = {"judge": "openai:m", "judge_base_url": server.url}
    ours, samples, found = by_lm_eval(lm, "lamp_7", data=str(data), **judging)
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.bodies]
    assert {entry["text"] for entry in asked} == {sample["resps"][0][0].strip() for sample in samples}
    assert asked[0]["author"] == ["so tired lol", "kettle is ON!!"]
    assert asked[0]["task"] in {sample["doc"]["input"] for sample in samples}  # without what was retrieved
    assert ours["persona_fit"] == pytest.approx(3.5)
    assert ours["missing"] == 0
    verdict = json.loads(samples[0]["filtered_resps"][0])
    assert (verdict["score"], verdict["mode"]) == (pytest.approx(3.5), "logprobs")
    assert samples[0]["persona_fit"] == verdict["score"]
    assert KEY not in json.dumps(found["configs"])
    theirs, logged, _ = by_inspect("lamp_7", tmp_path, data=str(data), **judging)
    assert theirs == pytest.approx(ours)
    assert logged[0].scores["lamp_author_fit"].metadata["mode"] == "logprobs"


def test_the_model_role_grader_judges_in_inspect(data, tmp_path, monkeypatch):
    roles = {"grader": "lamp-scripted/grader"}
    found, logged, _ = by_inspect("lamp_7", tmp_path, roles=roles, data=str(data))
    assert (found["persona_fit"], found["missing"]) == (4.0, 0)
    assert logged[0].scores["lamp_author_fit"].explanation == "x"
    monkeypatch.setitem(SCRIPT, "else", "no idea")
    counted, _, _ = by_inspect("lamp_7", tmp_path, roles=roles, data=str(data), missing_limit=1.0)
    assert counted["missing"] == 3


def test_a_missing_verdict_is_counted_and_too_many_end_the_run(lm, data):
    first = by_lm_eval(lm, "lamp_7", data=str(data))[1][0]["resps"][0][0].strip()
    judge = LengthJudge(missing_on=first)
    with pytest.raises(JudgeError, match="missing"):
        by_lm_eval(lm, "lamp_7", data=str(data), judge=judge)
    values, samples, _ = by_lm_eval(lm, "lamp_7", data=str(data), judge=judge, missing_limit=1.0)
    missing = [sample for sample in samples if sample["missing"]]
    assert values["missing"] == len(missing) > 0
    assert all("persona_fit" not in sample or sample["persona_fit"] != sample["persona_fit"] for sample in missing)
    assert all("rouge1" in sample for sample in missing)


def test_only_lamp_7_is_judged(data):
    (task,) = load_tasks(["lamp_4"], {"data": str(data), "judge": "openai:m"})
    assert task.judge is None


@pytest.mark.shared
def test_the_shared_rows_run_in_both_harnesses_with_bm25_and_four_items(lm, tmp_path):
    options = {"data": str(SHARED), "k": 4, "item_words": 4}  # the tiny model takes 256 tokens in all
    ours, samples, _ = by_lm_eval(lm, "lamp_7", 6, max_gen_toks=12, **options)
    theirs, logged, _ = by_inspect("lamp_7", tmp_path, 6, max_tokens=12, **options)
    assert [len(sample["doc"]["retrieved"]) for sample in samples] == [4] * 6
    assert {s["doc"]["id"]: s["resps"][0][0].strip() for s in samples} == {s.id: s.output.completion.strip() for s in logged}
    assert theirs == pytest.approx(ours)
