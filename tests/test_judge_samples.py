"""Reading saved samples: files that lm-eval and Inspect themselves wrote from runs of a tiny model, and plain JSONL."""

import gc
import json
import math
from pathlib import Path
from typing import ClassVar

import lm_eval
import pytest
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import read_eval_log, write_eval_log
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelAPI, ModelOutput, modelapi
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from tiny_harness import TASKS, LengthJudge
from typer.testing import CliRunner

import steered_lm.inspect_plugin.registry  # noqa: F401 - registers the task, as the entry point does
from steered_lm.commands import rejudge
from steered_lm.commands.judge import judge_app
from steered_lm.content import TINY_CHAT
from steered_lm.errors import JudgeError
from steered_lm.harness.model import SteeredHFLM
from steered_lm.inspect_plugin.logs import read_log
from steered_lm.inspect_plugin.tasks import persona_judge
from steered_lm.inspect_plugin.traits import pv_trait
from steered_lm.judges import make_judge
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.samples import read_samples, sample_files, sample_format
from steered_lm.persona.load import load_persona
from steered_lm.stats import paired_difference

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
QUESTIONS = (
    {"question": "Do geese fly south?", "correct_answers": ["Yes.", "They do."], "incorrect_answers": ["No."], "hint": "think of autumn"},
    {"question": "Is a whale a fish?", "correct_answers": ["No."], "incorrect_answers": ["Yes.", ""], "hint": "it breathes air"},
)
DATA = f"""
import datasets
def documents(**kwargs):
    return {{"test": datasets.Dataset.from_list({list(QUESTIONS)!r})}}
"""
TASK = """
task: {name}
output_type: generate_until
custom_dataset: !function data.documents
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{correct_answers[0]}}}}"
num_fewshot: 0
repeats: {repeats}
generation_kwargs:
  until: ["\\n\\n"]
  do_sample: {sampled}
  max_gen_toks: 8
filter_list: {filters}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FIRST = "{name: %s, filter: [{function: take_first}]}"
LONG = "Please tell me about the old harbour, and leave nothing out. " * 12


@modelapi(name="parrot")
class Parrot(ModelAPI):
    """Answers with what it was asked last, in capitals, and nothing to ``silence``."""

    asked: ClassVar[list] = []

    async def generate(self, input, tools, tool_choice, config):
        text = input[-1].text
        return ModelOutput.from_content("parrot", "" if "silence" in text else f" {text.upper()}\n")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What lm-eval wrote: a folder by task, and the samples as ``evaluate`` returned them."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "data.py").write_text(DATA)
    for name, repeats, filters in (
        ("geese", 1, [FIRST % "first"]),
        ("geese_twice", 2, [FIRST % "first"]),
        ("geese_filtered", 1, [FIRST % "a", FIRST % "b"]),
    ):
        text = TASK.format(name=name, repeats=repeats, sampled=str(repeats > 1).lower(), filters=f"[{', '.join(filters)}]")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    lm = SteeredHFLM(TINY_CHAT, device="cpu", batch_size=16)
    metadata = {"persona": load_persona("edmund"), "judge": LengthJudge(), "max_gen_toks": 24}
    manager = TaskManager(include_path=[str(TASKS), str(folder / "tasks")], include_defaults=False, metadata=metadata)
    tasks = manager.load(["persona_judge", "tiny_truth", "geese", "geese_twice", "geese_filtered"])["tasks"]
    samples = lm_eval.evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)["samples"]
    returned = json.loads(json.dumps(samples, default=str))
    tracker = EvaluationTracker(output_path=str(folder / "out"))
    tracker.date_id, tracker.general_config_tracker.model_name_sanitized = "2026-01-01", "tiny"
    for name, lines in samples.items():
        tracker.save_results_samples(name, lines)
    files = {name: folder / "out" / "tiny" / f"samples_{name}_2026-01-01.jsonl" for name in samples}
    return files, returned


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """What Inspect wrote: ``persona_judge`` of a parrot, and a task of two epochs with another scorer."""
    folder = tmp_path_factory.mktemp("inspect")
    settings = {"model": "parrot/x", "log_dir": str(folder), "display": "none"}
    (persona,) = inspect_eval(persona_judge, task_args={"persona": "walt", "max_tokens": 8}, **settings)
    chat = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content="Hi"),
        ChatMessageAssistant(content="Hello"),
        ChatMessageUser(content=LONG),
    ]
    samples = [
        Sample(
            input=chat, target="HARBOUR", id="chat", metadata={"asked": "the harbour", "correct_answers": ["It is old."], "incorrect_answers": []}
        ),
        Sample(input="silence please", target="x", id=7, metadata={"asked": "nothing"}),
    ]
    own = Task(dataset=MemoryDataset(samples), solver=generate(), scorer=includes(), name="own")
    (other,) = inspect_eval(own, epochs=2, **settings)
    assert persona.status == other.status == "success"
    yield Path(persona.location), Path(other.location)
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def test_persona_judge_s_samples_come_back_with_prompt_response_and_the_verdict_that_was_logged(logged):
    files, _ = logged
    samples = read_samples(files["persona_judge"])
    items = load_persona("edmund").items("test")
    assert [sample.request.prompt for sample in samples] == [item.prompt for item in items]
    assert [sample.id for sample in samples] == [str(number) for number in range(len(items))]
    requests = [sample.request for sample in samples]
    # the very requests of the run, so that a cache which the run filled answers them
    assert requests == [JudgeRequest(prompt=r.prompt, response=r.response) for r in requests]
    assert [sample.old for sample in samples] == LengthJudge().judge(requests)
    assert all(sample.old_scores == {} for sample in samples)
    assert sample_format(files["persona_judge"]) == "lm_eval"


def test_another_task_s_samples_have_its_question_references_and_metrics(logged):
    files, _ = logged
    samples = read_samples(files["geese"])
    assert [sample.request.prompt for sample in samples] == [q["question"] for q in QUESTIONS]
    assert samples[0].request.references == ("Yes.", "They do.")
    assert samples[1].request.false_references == ("Yes.",)
    assert all(sample.request.response and sample.old is None and sample.old_scores.keys() == {"exact_match"} for sample in samples)


def test_the_prompt_can_be_any_field_or_the_whole_text_that_the_model_was_given(logged):
    files, _ = logged
    assert [s.request.prompt for s in read_samples(files["geese"], prompt_field="hint")] == [q["hint"] for q in QUESTIONS]
    assert read_samples(files["geese"], prompt_field="arguments")[0].request.prompt == "Question: Do geese fly south?\nAnswer:"
    with pytest.raises(JudgeError, match="line 1, has no text 'hnt' .*Its texts: hint, question"):
        read_samples(files["geese"], prompt_field="hnt")


def test_samples_that_evaluate_returned_read_like_those_that_it_wrote(logged, tmp_path):
    files, returned = logged
    for name in ("persona_judge", "geese", "geese_twice"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in returned[name]))
        assert [s.model_copy(update={"file": ""}) for s in read_samples(path)] == [
            s.model_copy(update={"file": ""}) for s in read_samples(files[name])
        ]


def test_repeats_are_samples_of_their_own_and_the_document_s_metrics_are_nobody_s(logged):
    files, returned = logged
    samples = read_samples(files["geese_twice"])
    assert [(sample.id, sample.repeat) for sample in samples] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert [s.request.response for s in samples] == [text.strip() for line in returned["geese_twice"] for text in line["resps"][0]]
    assert all(sample.old_scores == {} for sample in samples)


def test_a_document_that_is_logged_once_for_each_filter_is_one_sample(logged):
    files, _ = logged
    assert len(files["geese_filtered"].read_text().splitlines()) == 4
    samples = read_samples(files["geese_filtered"])
    assert [sample.id for sample in samples] == ["0", "1"]
    assert samples[0].old_scores.keys() == {"exact_match,a", "exact_match,b"}


def test_extra_answers_of_a_data_parallel_run_are_left_out(logged, tmp_path):
    # lm-eval's own padding: the last document of a rank is answered again, and its list of responses grows
    files, _ = logged
    *rest, last = [json.loads(line) for line in files["geese"].read_text().splitlines()]
    last["resps"] = [last["resps"][0] * 3]
    path = tmp_path / "samples_padded.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (*rest, last)))
    assert [s.request for s in read_samples(path)] == [s.request for s in read_samples(files["geese"])]


def test_samples_of_a_task_that_scores_choices_are_refused(logged):
    files, _ = logged
    with pytest.raises(JudgeError, match="line 1, holds log-likelihoods and no text"):
        read_samples(files["tiny_truth"])


def test_a_folder_stands_for_the_logs_in_it(logged, inspected, tmp_path):
    files, _ = logged
    folder = files["geese"].parent.parent
    assert sample_files([folder]) == sorted(files.values())
    assert set(sample_files([inspected[0].parent])) == set(inspected)
    with pytest.raises(JudgeError, match="holds no samples_.*--log_samples"):
        sample_files([tmp_path])
    with pytest.raises(JudgeError, match="is named twice"):
        sample_files([folder, files["geese"]])


def test_inspect_s_persona_judge_comes_back_with_its_verdicts(inspected):
    path, _ = inspected
    assert sample_format(path) == "inspect"
    samples = read_log(path)
    items = {item.item: item for item in load_persona("walt").items("test")}
    assert {sample.id for sample in samples} == set(items)
    log = {str(sample.id): sample for sample in read_eval_log(path).samples}
    for sample in samples:
        assert sample.request == JudgeRequest(prompt=items[sample.id].prompt, response=items[sample.id].prompt.upper())
        assert sample.old.score == log[sample.id].scores["persona_fit"].value["persona_fit"]
        assert (sample.old.judge, sample.old.scale, sample.old_scores) == ("stylometric", (1.0, 5.0), {})


def test_a_missing_verdict_in_an_inspect_log_stays_missing(inspected, tmp_path):
    log = read_eval_log(inspected[0])
    score = log.samples[0].scores["persona_fit"]
    score.value["persona_fit"], score.value["missing"] = math.nan, 1
    score.metadata["missing"] = "empty response"
    write_eval_log(log, tmp_path / "log.eval")
    (old, *_) = [s.old for s in read_log(tmp_path / "log.eval") if s.id == str(log.samples[0].id)]
    assert old == Verdict(missing="empty response", judge="stylometric")


def test_an_inspect_log_in_json_reads_like_the_archive(inspected, tmp_path):
    for path in inspected:
        target = tmp_path / f"{path.stem}.json"
        write_eval_log(read_eval_log(path), target)
        assert sample_format(target) == "inspect"
        key = lambda sample: (sample.id, sample.repeat)  # noqa: E731
        found, wanted = sorted(read_log(target), key=key), sorted(read_log(path), key=key)
        assert [s.model_copy(update={"file": str(path)}) for s in found] == wanted


def test_epochs_chat_inputs_long_texts_scores_and_metadata_of_an_inspect_log_are_read(inspected):
    samples = {(sample.id, sample.repeat): sample for sample in read_log(inspected[1])}
    assert samples.keys() == {("chat", 0), ("chat", 1), ("7", 0), ("7", 1)}
    chat = samples["chat", 1]
    assert chat.request == JudgeRequest(prompt=LONG, response=LONG.upper().strip(), references=("It is old.",))
    assert chat.old_scores == {"includes": 1.0}
    assert chat.turns == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", LONG))
    assert samples["7", 0].request.response == ""
    assert samples["7", 0].old_scores == {"includes": 0.0}
    assert {s.request.prompt for s in read_log(inspected[1], prompt_field="asked")} == {"the harbour", "nothing"}
    with pytest.raises(JudgeError, match="--prompt-field 'correct_answers' is no text of its metadata. Its texts: asked"):
        read_log(inspected[1], prompt_field="correct_answers")


def test_a_torn_inspect_log_is_refused(inspected, tmp_path):
    path = tmp_path / "torn.eval"
    path.write_bytes(inspected[0].read_bytes()[:2000])
    with pytest.raises(JudgeError, match="torn.eval"):
        sample_format(path)


def test_real_logs_of_both_harnesses_are_judged_again_in_one_command(logged, inspected, tmp_path, monkeypatch):
    monkeypatch.setattr(rejudge.console, "_width", 240)
    files, _ = logged
    out = tmp_path / "out.jsonl"
    arguments = ["rejudge", files["persona_judge"], inspected[0], "--judge", "stylometric", "--persona", "walt", "--out", out]
    done = CliRunner().invoke(judge_app, list(map(str, arguments)))
    assert done.exception is None, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_lm_eval = [row for row in rows if row["file"] == str(files["persona_judge"])]
    of_inspect = [row for row in rows if row["file"] == str(inspected[0])]
    assert (len(of_lm_eval), len(of_inspect)) == tuple(len(load_persona(name).items("test")) for name in ("edmund", "walt"))
    # Inspect's log holds the same judge's verdicts on the same persona, and lm-eval's another judge's
    assert [row["verdict"]["score"] for row in of_inspect] == pytest.approx([row["old"]["score"] for row in of_inspect])
    assert {row["old"]["judge"] for row in of_lm_eval} == {"length"}
    judge = make_judge("stylometric", load_persona("walt"))
    wanted = [verdict.score for verdict in judge.judge([JudgeRequest(prompt=row["prompt"], response=row["response"]) for row in of_lm_eval])]
    assert [row["verdict"]["score"] for row in of_lm_eval] == pytest.approx(wanted)
    gap = paired_difference(wanted, [row["old"]["score"] for row in of_lm_eval], seed=0)
    assert f"{gap.mean:.3f} │ {gap.low:.3f} to {gap.high:.3f}" in done.output


def test_a_trait_s_log_is_compared_with_the_verdict_on_the_trait_that_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(rejudge.console, "_width", 240)
    settings = {"model": f"steered-hf/{TINY_CHAT}", "model_args": {"device": "cpu"}, "log_dir": str(tmp_path), "display": "none"}
    (log,) = inspect_eval(pv_trait, task_args={"trait": "formality", "judge": "markers"}, limit=3, **settings)
    arguments = ["rejudge", log.location, "--judge", "markers", "--kind", "trait", "--trait", "formality", "--out", tmp_path / "out.jsonl"]
    done = CliRunner().invoke(judge_app, list(map(str, arguments)))
    assert done.exception is None, done.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["old"]["score"] for row in rows] == [row["verdict"]["score"] for row in rows]
    assert any(row["old"]["score"] is not None for row in rows)
    assert "another scale" not in done.output
    assert "trait_expression/" not in done.output
    gc.collect()  # while this file's filters hold, as above


def test_plain_lines_are_read_with_all_that_a_request_can_hold(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "Hi", "response": "Hello", "other": "Go away", "id": "greeting", "note": "kept out"},
        {"prompt": "Is it?", "response": "No", "references": ["No"], "false_references": ["Yes"]},
    ]
    path.write_text(json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n")
    first, second = read_samples(path)
    assert (first.id, first.request) == ("greeting", JudgeRequest(prompt="Hi", response="Hello", other="Go away"))
    assert (second.id, second.request) == ("3", JudgeRequest(prompt="Is it?", response="No", references=("No",), false_references=("Yes",)))
    assert read_samples(path, prompt_field="response")[0].request.prompt == "Hello"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Allowed: lm-eval's samples_"),
        ("not json\n", "line 1, is not JSON"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n', "line 2, is not JSON"),
        ('{"prompt": "a", "response": "b"}\n[1]\n', "line 2, is JSON, but no object"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "line 2, has no text 'response'.*Its texts: prompt"),
        ('{"prompt": "a", "response": 3}\n', "line 1, has no text 'response'"),
        ('{"prompt": "a", "response": "b", "references": "c"}\n', "line 1 is not a valid JudgeRequest: references"),
        ('{"prompt": "a", "response": "b", "id": 1}\n{"prompt": "c", "response": "d", "id": 1}\n', "line 2, has id '1' a second time"),
        ('{"text": "a"}\n', "line 1, has neither doc and resps nor prompt and response; it has text"),
        ('{"doc": {"prompt": "a"}, "resps": [["b"]]}\n', "line 1, has no 'doc_id'"),
        ('{"doc_id": 0, "doc": "a", "resps": [["b"]], "arguments": [["a", {}]]}\n', "line 1, has a doc that is no object"),
        ('{"doc_id": 0, "doc": {}, "resps": "b"}\n', "line 1, holds log-likelihoods and no text"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(JudgeError, match=f"samples.jsonl'.*{message}"):
        read_samples(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    import zipfile

    archive, binary = tmp_path / "some.zip", tmp_path / "weights.bin"
    with zipfile.ZipFile(archive, "w") as handle:
        handle.writestr("a.txt", "a")
    binary.write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(JudgeError, match="is an archive, but no Inspect log"):
        sample_format(archive)
    with pytest.raises(JudgeError, match="is no text in UTF-8"):
        sample_format(binary)
    with pytest.raises(JudgeError, match="does not exist"):
        sample_format(tmp_path / "nothing.jsonl")
