import asyncio
import gc
import json
from typing import Any, ClassVar

import lm_eval
import pytest
from chat_folder import save_chat_model
from hub_folder import choice_row, free_row, save_small_data, write_lines
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelAPI, ModelOutput, modelapi
from lm_eval.tasks import TaskManager
from tiny_harness import TASKS

from steered_lm.benchmarks.folder import VARIABLE
from steered_lm.harness.model import SteeredHFLM
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.inspect_plugin.registry import mmlu, truthfulqa_gen, truthfulqa_mc1

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


@modelapi(name="answering")
class Answering(ModelAPI):
    """Replies by a function of the conversation, and keeps what it was asked."""

    reply: ClassVar[Any] = None
    asked: ClassVar[list] = []

    async def generate(self, input, tools, tool_choice, config):
        Answering.asked.append([(message.role, message.text) for message in input])
        await asyncio.sleep(0)
        return ModelOutput.from_content("answering", Answering.reply([message.text for message in input]))


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    folder = save_small_data(tmp_path / "data")
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def run(tmp_path):
    def evaluate(task, reply, model="answering/m", **task_args):
        Answering.reply, Answering.asked = staticmethod(reply), []
        settings = task_args.pop("settings", {})
        (log,) = inspect_eval(task, task_args=task_args, model=model, log_dir=str(tmp_path / "logs"), display="none", **settings)
        assert log.status == "success", log.error
        return log, {name: metric.value for score in log.results.scores for name, metric in score.metrics.items()}

    yield evaluate
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def lines_of(prompt):
    """The choices of a prompt by letter."""
    return {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ") "}


def right_number(messages):
    """Answer a question of ``subject_row``, whose gold is the number at the index ``number % 4``."""
    number = int(messages[-1].split("what follows ")[1].split("?")[0])
    gold = str(number + (3, 1, 2, 4)[number % 4])
    return f"ANSWER: {next(letter for letter, text in lines_of(messages[-1]).items() if text == gold)}"


def yes(messages):
    return f"ANSWER: {next(letter for letter, text in lines_of(messages[-1]).items() if text.startswith('Yes'))}"


def documents(name):
    return list(TaskManager(include_path=str(TASKS), include_defaults=False).load([name])["tasks"][name].eval_docs)


def test_both_harnesses_have_the_same_items():
    for task, name in ((truthfulqa_mc1, "steered_truthfulqa_mc1"), (truthfulqa_gen, "steered_truthfulqa_gen")):
        assert [sample.id for sample in task().dataset] == [doc["id"] for doc in documents(name)]
    pairs = zip(mmlu(subjects="astronomy").dataset, documents("steered_mmlu_astronomy"), strict=True)
    assert all(sample.id == doc["id"] and sample.choices == doc["choices"] and sample.target == "ABCD"[doc["answer"]] for sample, doc in pairs)


def test_generation_asks_upstreams_prompt_word_for_word():
    (task,) = TaskManager(include_path=str(TASKS), include_defaults=False).load(["steered_truthfulqa_gen"])["tasks"].values()
    assert [sample.input for sample in truthfulqa_gen().dataset] == [task.fewshot_context(doc, num_fewshot=0) for doc in task.eval_docs]


def test_the_true_choice_moves_with_the_seed_and_the_order_of_an_item_is_its_own(data):
    targets = [sample.target for sample in truthfulqa_mc1(seed=1).dataset]
    assert len(set(targets)) > 1
    assert targets != [sample.target for sample in truthfulqa_mc1(seed=2).dataset]
    orders = {sample.id: sample.choices for sample in truthfulqa_mc1(seed=1).dataset}
    write_lines(data / "truthfulqa" / "multiple_choice.jsonl", [choice_row(4), choice_row(2)])
    assert all(orders[sample.id] == sample.choices for sample in truthfulqa_mc1(seed=1).dataset)
    for sample in truthfulqa_mc1(seed=1).dataset:
        assert sample.choices["ABCD".index(sample.target)].startswith("Yes")
        published = choice_row(4 if "4" in sample.choices["ABCD".index(sample.target)] else 2)["mc1_targets"]["choices"]
        assert [published[index] for index in sample.metadata["order"]] == sample.choices


def test_letters_are_scored_and_replies_without_one_are_counted(run):
    _, metrics = run(truthfulqa_mc1, yes)
    assert (metrics["accuracy"], metrics["unanswered"]) == (1.0, 0.0)
    _, metrics = run(truthfulqa_mc1, lambda messages: "ANSWER: A", seed=3)
    assert metrics["accuracy"] == sum(sample.target == "A" for sample in truthfulqa_mc1(seed=3).dataset) / 6 < 1
    _, metrics = run(truthfulqa_mc1, lambda messages: "I cannot say.")
    assert (metrics["accuracy"], metrics["unanswered"]) == (0.0, 6.0)


@pytest.mark.parametrize("seed", [None, 0])
def test_mmlu_asks_examples_in_the_form_of_the_question(run, seed):
    log, metrics = run(mmlu, right_number, fewshot=5, seed=seed)
    assert metrics["accuracy"] == metrics["stem"] == metrics["other"] == 1.0
    for asked in Answering.asked:
        assert [role for role, _ in asked] == ["user", "assistant"] * 5 + ["user"]
        for (_, question), (_, answer) in zip(asked[:-1:2], asked[1::2], strict=True):
            assert question.splitlines()[0] == asked[-1][1].splitlines()[0]
            assert right_number([question]) == answer
        # examples are of the question's own subject
        assert len({text.split("In ")[1].split(",")[0] for role, text in asked if role == "user"}) == 1
    assert log.eval.metadata["subjects"] == ["astronomy", "virology"]
    _, metrics = run(mmlu, right_number, subjects="virology")
    assert {len(asked) for asked in Answering.asked} == {1}
    assert "stem" not in metrics


def test_wrong_arguments_are_refused_plainly(data):
    for task, arguments, says in [
        (mmlu, {"subjects": "astronmy"}, "subjects='astronmy' is neither .* Did you mean 'astronomy'"),
        (mmlu, {"subjects": "anatomy"}, "has no questions about 'anatomy'. It has 2 of 57 subjects: astronomy, virology"),
        (mmlu, {"fewshot": 6}, "fewshot=6 is not possible: MMLU has 5 examples a subject"),
        (mmlu, {"data": "/nowhere"}, "data='/nowhere' is not a folder"),
        (truthfulqa_mc1, {"data": str(data / "mmlu")}, "has no TruthfulQA multiple_choice"),
        (truthfulqa_gen, {"judge_model": "x"}, "judge_model is given and no judge"),
        (truthfulqa_gen, {"judges": "x"}, "truthfulqa_gen has no argument 'judges'.* Did you mean 'judge'"),
        (truthfulqa_gen, {"judge": "openai:x", "judge_api_key": "k"}, "judge_api_key is not taken"),
    ]:
        with pytest.raises(RefusalError, match=says):
            task(**arguments)
    lines = (data / "mmlu" / "dev.jsonl").read_text().splitlines()
    (data / "mmlu" / "dev.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(RefusalError, match="fewshot=5, but dev has 3 questions about 'astronomy'"):
        mmlu(subjects="astronomy", fewshot=5)


def answers_and_grades(messages):
    """Reply to a question, or grade: by rubric, whether the answer says yes."""
    if "Q: " in messages[-1]:
        return "A: Yes, it is" if "Is 3 " in messages[-1] else "\nA: Nobody knows."
    material = json.loads(messages[-1][messages[-1].index("{") : messages[-1].rindex("}") + 1])
    return json.dumps({"reason": "x", "score": 90 if material["answer"].startswith("Yes") else 10})


def test_free_answers_are_scored_by_overlap_and_by_the_grader(run):
    log, _ = run(truthfulqa_gen, answers_and_grades, judge="inspect", judge_mode="json", settings={"model_roles": {"grader": "answering/grader"}})
    by_question = {sample.metadata["question"]: sample.scores for sample in log.samples}
    right, wrong = by_question["Is 3 a number?"], by_question["Is 1 a number?"]
    assert right["truthfulness"].value == {
        "truthful": 90,
        "informative": 90,
        "truthful_and_informative": 1,
        "truthful_missing": 0,
        "informative_missing": 0,
    }
    assert wrong["truthfulness"].value["truthful"] == 10
    assert right["truthfulness"].answer == "Yes, it is"
    assert right["truthfulness"].metadata["truthful"]["explanation"] == "x"
    assert right["answer_overlap"].value["rouge1_acc"] == 1.0
    names = {f"{score.name}": score.metrics for score in log.results.scores}
    assert names["truthful"]["mean"].value == pytest.approx((90 + 5 * 10) / 6)
    assert names["truthful_and_informative"]["mean"].value == pytest.approx(1 / 6)
    assert [total.value for total in names["truthful_missing"].values()] == [0.0]
    assert "stderr" in names["bleu_acc"]


def test_overlap_equals_the_lm_eval_tasks_numbers(run):
    log, _ = run(truthfulqa_gen, answers_and_grades)
    (task,) = TaskManager(include_path=str(TASKS), include_defaults=False).load(["steered_truthfulqa_gen"])["tasks"].values()
    by_id = {sample.id: sample for sample in log.samples}
    for doc in task.eval_docs:
        theirs = task.process_results(doc, [by_id[doc["id"]].output.completion])
        assert by_id[doc["id"]].scores["answer_overlap"].value == pytest.approx({name: float(value) for name, value in theirs.items()})


def test_a_missing_verdict_is_counted_and_too_many_end_the_run(run, data, tmp_path):
    grader = {"settings": {"model_roles": {"grader": "answering/grader"}}, "judge": "inspect", "judge_mode": "json"}

    def half_graded(messages):
        return answers_and_grades(messages) if "Q: " in messages[-1] or '"true_answers"' in messages[-1] else "no score"

    log, _ = run(truthfulqa_gen, half_graded, missing_limit=1.0, **grader)
    (sample, *_) = log.samples
    value = sample.scores["truthfulness"].value
    assert (value["informative_missing"], value["truthful_missing"]) == (1, 0)
    assert value["truthful_and_informative"] != value["truthful_and_informative"]
    totals = {score.name: [m.value for m in score.metrics.values()] for score in log.results.scores}
    assert (totals["informative_missing"], totals["truthful_missing"]) == ([6.0], [0.0])
    Answering.reply = staticmethod(half_graded)
    (log,) = inspect_eval(
        truthfulqa_gen, task_args={"judge": "inspect", "judge_mode": "json"}, model="answering/m", display="none", log_dir=str(tmp_path / "more"),
        **grader["settings"],
    )  # fmt: skip
    assert log.status == "error"
    assert "of 6 verdicts are missing" in log.error.message


def test_steered_hf_answers_the_items(run, tmp_path):
    folder = save_chat_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    log, metrics = run(mmlu, None, model=f"steered-hf/{folder}", fewshot=5, max_tokens=4)
    assert len(log.samples) == 12
    assert metrics["accuracy"] + metrics["unanswered"] / 12 <= 1
    assert all(sample.output.usage.output_tokens <= 4 and sample.output.metadata == {"steering": None} for sample in log.samples)


def test_free_answers_are_the_same_in_both_harnesses(run, data, tmp_path):
    # in letters that the tiny model's tokenizer has
    questions = ("do dogs jump over foxes?", "does soup read letters?", "is my brother lazy?", "is the sister over very quick jugs?")
    write_lines(data / "truthfulqa" / "generation.jsonl", [free_row(0) | {"question": question} for question in questions])
    folder = save_chat_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    log, _ = run(truthfulqa_gen, None, model=f"steered-hf/{folder}", max_tokens=24)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    lm = SteeredHFLM(str(folder), device="cpu", batch_size=8)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["steered_truthfulqa_gen"], task_manager=manager, apply_chat_template=True, gen_kwargs={"max_gen_toks": 24}, bootstrap_iters=0
    )
    theirs = {sample["doc"]["id"]: sample["resps"][0][0] for sample in found["samples"]["steered_truthfulqa_gen"]}
    assert {sample.id: sample.output.completion for sample in log.samples} == theirs
    assert len(set(theirs.values())) > 1
