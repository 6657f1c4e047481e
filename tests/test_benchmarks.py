import json
import logging
import shutil
from pathlib import Path

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_folder import SHARED_DATA, choice_row, free_row, save_as_hub, save_small_data, subject_row, write_lines
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_harness import STORIES, TASKS, save_model, save_vectors, spec_of

from steered_lm.benchmarks.folder import VARIABLE
from steered_lm.benchmarks.mmlu import CATEGORIES, CATEGORY_OF, local_subjects, mmlu_rows, select_subjects
from steered_lm.benchmarks.truthful import prepared, prompt
from steered_lm.benchmarks.truthfulqa import truthfulqa_rows
from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.errors import JudgeError, UserError
from steered_lm.harness.model import SteeredHFLM
from steered_lm.harness.population import evaluate_choices
from steered_lm.judges.base import Verdict
from steered_lm.search.protocol import Candidate

UPSTREAM = Path(lm_eval.__file__).parent / "tasks"
THEIRS = [UPSTREAM / "truthfulqa", UPSTREAM / "mmlu" / "default"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # without it, datasets asks the network for a repository whose folder does not lie here
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def data(tmp_path):
    return save_small_data(tmp_path / "data")


@pytest.fixture
def local(data, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(data))
    return data


def ours(*names, **metadata):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load(list(names))


def stock(*names):
    return TaskManager(include_path=THEIRS, include_defaults=False).load(list(names))["tasks"]


def contexts(task, shots=0, count=3):
    return [task.fewshot_context(doc, num_fewshot=shots) for doc in list(task.eval_docs)[:count]]


# ------------------------------------------------------------------------------------------------ rows and folders


def test_rows_come_from_the_option_or_the_variable_with_ids_of_their_content(data, monkeypatch):
    rows = truthfulqa_rows("multiple_choice", str(data))
    assert [row["question"] for row in rows] == [choice_row(number)["question"] for number in range(6)]
    assert len({row["id"] for row in rows}) == 6 and all(row["gold"] == 0 for row in rows)
    monkeypatch.setenv(VARIABLE, str(data))
    assert truthfulqa_rows("multiple_choice") == rows
    (astronomy, *_) = mmlu_rows("astronomy", "test")
    assert (astronomy["choices"], astronomy["gold"]) == (["3", "1", "2", "4"], 0)
    assert len(mmlu_rows("virology", "dev")) == 5


def test_the_same_content_has_the_same_id_wherever_it_lies_and_repeated_rows_stay_apart(tmp_path):
    rows = [subject_row("astronomy", number) for number in (1, 2, 1)]
    write_lines(tmp_path / "one" / "mmlu" / "test.jsonl", rows)
    write_lines(tmp_path / "two" / "mmlu" / "test.jsonl", rows[1:])
    first = [row["id"] for row in mmlu_rows("astronomy", "test", str(tmp_path / "one"))]
    assert first[2] == f"{first[0]}-2"
    assert [row["id"] for row in mmlu_rows("astronomy", "test", str(tmp_path / "two"))] == [first[1], first[0]]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "shards"])
def test_the_hubs_layout_is_read_too(tmp_path, data, kind):
    rows = {split: [subject_row("astronomy", number) for number in range(5)] for split in ("test", "dev")}
    for split, made in rows.items():
        base = tmp_path / "hub" / "cais" / "mmlu" / "astronomy"
        base.mkdir(parents=True, exist_ok=True)
        if kind == "jsonl":
            write_lines(base / f"{split}.jsonl", made)
        elif kind == "json":
            (base / f"{split}.json").write_text(json.dumps(made))
        else:
            pq.write_table(pa.Table.from_pylist(made), base / (f"{split}.parquet" if kind == "parquet" else f"{split}-00000-of-00001.parquet"))
    assert mmlu_rows("astronomy", "test", str(tmp_path / "hub")) == mmlu_rows("astronomy", "test", str(data))[:5]
    assert local_subjects(str(tmp_path / "hub")) == ["astronomy"]


def test_truthfulqa_is_read_in_the_hubs_layout(tmp_path, data):
    target = tmp_path / "hub" / "truthfulqa" / "truthful_qa" / "generation" / "validation-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([free_row(number) for number in range(6)]), target)
    assert truthfulqa_rows("generation", str(tmp_path / "hub")) == truthfulqa_rows("generation", str(data))


def test_a_changed_file_is_read_again(data):
    before = truthfulqa_rows("multiple_choice", str(data))
    write_lines(data / "truthfulqa" / "multiple_choice.jsonl", [choice_row(99)])
    assert len(before) == 6 and [row["question"] for row in truthfulqa_rows("multiple_choice", str(data))] == ["Is 99 a number?"]


def test_a_wrong_folder_and_a_missing_file_are_named(tmp_path, data, monkeypatch):
    with pytest.raises(UserError, match=r"data='/nowhere' is not a folder. It names the one that holds truthfulqa/ and mmlu/"):
        truthfulqa_rows("generation", "/nowhere")
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(UserError, match=f"{VARIABLE}='/nowhere' is not a folder"):
        mmlu_rows("astronomy", "test")
    (data / "truthfulqa" / "multiple_choice.jsonl").rename(data / "truthfulqa" / "multiple_choices.jsonl")
    with pytest.raises(
        UserError, match=r"has no TruthfulQA multiple_choice. Looked for truthfulqa/multiple_choice.jsonl, .* It holds: .*multiple_choices.jsonl"
    ):
        truthfulqa_rows("multiple_choice", str(data))
    (data / "mmlu" / "dev.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no MMLU dev questions about 'astronomy'. Looked for mmlu/dev.jsonl"):
        mmlu_rows("astronomy", "dev", str(data))
    shutil.rmtree(data / "mmlu")
    with pytest.raises(UserError, match="has no MMLU test questions"):
        local_subjects(str(data))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="It holds: nothing"):
        truthfulqa_rows("generation", str(tmp_path / "empty"))


def test_an_absent_and_a_misspelt_subject_are_told_apart(data):
    with pytest.raises(UserError, match=r"has no questions about 'anatomy'. It has 2 of 57 subjects: astronomy, virology"):
        mmlu_rows("anatomy", "test", str(data))
    with pytest.raises(UserError, match="subject='astronmy' is none of MMLU's 57.* Did you mean 'astronomy'"):
        mmlu_rows("astronmy", "test", str(data))
    write_lines(data / "mmlu" / "test.jsonl", [subject_row("astronmy", 1)])
    with pytest.raises(UserError, match="test.jsonl line 1 .*subject='astronmy' is none of MMLU's 57.* Did you mean 'astronomy'"):
        mmlu_rows("astronomy", "test", str(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["3", "1", "", "4"]}, "a choice is empty"),
        ({"choices": []}, "at least 4 items"),
        ({"choices": ["1", "2", "3", "4", "5"]}, "at most 4 items"),
        ({"answer": 4}, "answer=4 is not the index of a choice. Allowed: 0 to 3"),
        ({"answer": -1}, "answer=-1 is not the index of a choice"),
        ({"answer": "B"}, "valid integer"),
        ({"question": ""}, "at least 1 character"),
    ],
)
def test_a_malformed_mmlu_row_is_refused_by_line(data, change, says):
    write_lines(data / "mmlu" / "test.jsonl", [subject_row("astronomy", 1), subject_row("astronomy", 2) | change])
    with pytest.raises(UserError, match=f"test.jsonl line 2 is not a valid Row: .*{says}"):
        mmlu_rows("astronomy", "test", str(data))


def targets(labels, count=4):
    return {"choices": [f"choice {number}" for number in range(count)], "labels": labels}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mc1_targets": targets([1, 1, 0, 0])}, "mc1_targets must have a single true choice, it has 2"),
        ({"mc1_targets": targets([0, 0, 0, 0])}, "no choice is true"),
        ({"mc1_targets": targets([0, 1, 0, 0])}, "must come first, as in the published data"),
        ({"mc1_targets": targets([1, 0, 2, 0])}, "labels must be 0 or 1, one for each of 4 choices"),
        ({"mc1_targets": targets([1, 0])}, "labels must be 0 or 1, one for each of 4 choices"),
        ({"mc2_targets": {"choices": [], "labels": []}}, "at least 2 items"),
        ({"mc2_targets": {"choices": ["a", " "], "labels": [1, 0]}}, "a choice is empty"),
    ],
)
def test_malformed_choices_are_refused_by_line(data, change, says):
    write_lines(data / "truthfulqa" / "multiple_choice.jsonl", [choice_row(1), choice_row(2) | change])
    with pytest.raises(UserError, match=f"multiple_choice.jsonl line 2 .*{says}"):
        truthfulqa_rows("multiple_choice", str(data))


def test_malformed_answers_and_files_are_refused(data):
    file = write_lines(data / "truthfulqa" / "generation.jsonl", [free_row(1) | {"incorrect_answers": []}])
    with pytest.raises(UserError, match="line 1 is not a valid GenerationRow: incorrect_answers"):
        truthfulqa_rows("generation", str(data))
    write_lines(file, [free_row(1) | {"correct_answers": [" "]}])
    with pytest.raises(UserError, match="correct_answers has no text"):
        truthfulqa_rows("generation", str(data))
    for text, says in [
        ("{", "line 1 is not JSON"),
        ("", "has no rows"),
        ("[1]", r"line 1 is no object but \[1\]"),
        ("\udcff", "is not UTF-8"),
    ]:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=says):
            truthfulqa_rows("generation", str(data))
    file.rename(file.with_suffix(".parquet"))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        truthfulqa_rows("generation", str(data))


def test_subjects_are_chosen_by_name_by_category_or_all():
    assert select_subjects("all") == list(CATEGORY_OF)
    assert select_subjects("astronomy, other,astronomy") == ["astronomy", *CATEGORIES["other"]]
    assert select_subjects(["Social Sciences"]) == list(CATEGORIES["social_sciences"])
    with pytest.raises(UserError, match="subjects='astronmy' is neither a subject of MMLU nor a category.* Did you mean 'astronomy'"):
        select_subjects("anatomy,astronmy")


# ------------------------------------------------------------------------------------------------ lm-eval's tasks


def test_our_tasks_are_upstreams_subjects_in_upstreams_categories():
    theirs, mine = (TaskManager(include_path=path, include_defaults=False) for path in (THEIRS, str(TASKS)))
    subjects = [name for name in theirs.all_subtasks if name.startswith("mmlu_")]
    assert {name.removeprefix("mmlu_") for name in subjects} == set(CATEGORY_OF)
    for name in subjects:
        (tag,) = theirs.task_index[name].tags
        assert mine.task_index[f"steered_{name}"].tags == {f"steered_{tag}"}
        assert tag == f"mmlu_{CATEGORY_OF[name.removeprefix('mmlu_')]}_tasks"
    assert {name.removeprefix("steered_") for name in mine.all_groups if "mmlu" in name} == {name for name in theirs.all_groups if "mmlu" in name}
    assert mine.task_index["steered_truthfulqa"].tags == {f"steered_{name}" for name in theirs.task_index["truthfulqa"].tags}


def test_definitions_and_contexts_are_upstreams_own(data, local, tmp_path, monkeypatch):
    monkeypatch.chdir(save_as_hub(data, tmp_path / "hub"))
    names = ["truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen", "mmlu_astronomy", "mmlu_virology"]
    theirs, mine = stock(*names), ours(*[f"steered_{name}" for name in names])["tasks"]
    for name in names:
        before, after = theirs[name].config.to_dict(), mine[f"steered_{name}"].config.to_dict()
        assert {key for key in before | after if before.get(key) != after.get(key)} == {"task", "metadata"}
        assert after["metadata"]["version"] == before["metadata"]["version"]
        for shots in (0, 5) if "mmlu" in name else (0,):
            assert contexts(mine[f"steered_{name}"], shots) == contexts(theirs[name], shots)
    rows = [prepared(row) for row in truthfulqa_rows("generation")]
    assert [prompt(row) for row in rows[:3]] == contexts(theirs["truthfulqa_gen"])
    assert [row["correct_answers"] for row in rows] == [doc["correct_answers"] for doc in theirs["truthfulqa_gen"].eval_docs]


def test_more_examples_than_there_are_is_refused(local):
    (task,) = ours("steered_mmlu_astronomy")["tasks"].values()
    for shots in (6, -1):
        with pytest.raises(UserError, match=f"num_fewshot={shots} is not possible: dev has 5 questions about 'astronomy'. Allowed: 0 to 5"):
            contexts(task, shots)


def test_without_a_folder_the_same_items_come_from_the_hub_and_stock_names_never_read_the_folder(data, tmp_path, monkeypatch):
    names = ["steered_truthfulqa_mc1", "steered_truthfulqa_gen", "steered_mmlu_astronomy"]
    from_folder = ours(*names, data=str(data))["tasks"]
    other = save_small_data(tmp_path / "other", rows=2)
    monkeypatch.chdir(save_as_hub(data, tmp_path / "hub"))
    from_hub = ours(*names)["tasks"]
    for name in names:
        assert [doc["id"] for doc in from_hub[name].eval_docs] == [doc["id"] for doc in from_folder[name].eval_docs]
        digests = {tasks[name].config.metadata["items_digest"] for tasks in (from_hub, from_folder)}
        assert len(digests) == 1
    monkeypatch.setenv(VARIABLE, str(other))
    assert [len(task.eval_docs) for task in stock("truthfulqa_mc1", "mmlu_astronomy").values()] == [6, 6]
    assert [len(task.eval_docs) for task in ours("steered_truthfulqa_mc1", "steered_mmlu_astronomy")["tasks"].values()] == [2, 2]


def test_a_hub_that_cannot_be_had_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"'cais/mmlu' \\(astronomy\\) could not be had from the hub.*name a folder with local copies by {VARIABLE}"):
        ours("steered_mmlu_astronomy")


def test_groups_hold_what_the_folder_has_and_say_what_it_lacks(local, caplog):
    with caplog.at_level(logging.WARNING, "steered_lm"):
        loaded = ours("steered_mmlu")
    assert loaded["group_map"] == {
        "steered_mmlu": ["steered_mmlu_stem", "steered_mmlu_other"],
        "steered_mmlu_stem": ["steered_mmlu_astronomy"],
        "steered_mmlu_other": ["steered_mmlu_virology"],
    }
    assert "steered_mmlu leaves out humanities, social_sciences" in caplog.text
    assert "steered_mmlu_stem runs 1 of 19 subjects; the folder of local data lacks abstract_algebra, anatomy" in caplog.text
    with pytest.raises(UserError, match="has no subject of MMLU's humanities: formal_logic, .* It has: astronomy, virology"):
        ours("steered_mmlu_humanities")


def test_groups_average_over_subjects_as_upstreams_do(local, tmp_path):
    lm = SteeredHFLM(str(save_model(tmp_path / "model")), device="cpu", batch_size=16, max_length=192)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["steered_mmlu"], task_manager=manager, num_fewshot=5, bootstrap_iters=0)
    parts = [found["results"][f"steered_mmlu_{subject}"]["acc,none"] for subject in ("astronomy", "virology")]
    assert found["groups"]["steered_mmlu"]["acc,none"] == pytest.approx(sum(parts) / 2)
    assert found["n-shot"]["steered_mmlu_astronomy"] == 5
    (sample, *_) = found["samples"]["steered_mmlu_astronomy"]
    assert sample["arguments"][0][0].count("Answer:") == 6


def test_several_candidates_answer_the_same_items_in_one_evaluation(local, tmp_path):
    folder = save_model(tmp_path / "model")
    lm = SteeredHFLM(str(folder), device="cpu", batch_size=16, max_length=192)
    lm.quiet = True
    spec = spec_of(save_vectors(folder, tmp_path / "v.safetensors"))
    names = ["steered_truthfulqa_mc1", "steered_mmlu_astronomy"]
    both = evaluate_choices(lm, names, [Candidate(name="plain", spec=None), Candidate(name="steered", spec=spec)])
    alone = evaluate_choices(lm, names, [Candidate(name="plain", spec=None)])
    assert [item.item for item in both["plain"]] == [item.item for item in both["steered"]] == [item.item for item in alone["plain"]]
    for item, other in zip(both["plain"], alone["plain"], strict=True):
        assert item.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)
    assert [item.loglikelihoods for item in both["steered"]] != [item.loglikelihoods for item in both["plain"]]


# ------------------------------------------------------------------------------------------------ zero weights equal stock hf


@pytest.mark.shared
@pytest.mark.parametrize(("model", "shots", "limits"), [("stories260K", 0, (30, 5)), ("stories260K", 5, (0, 2)), (TINY_CHAT, 0, (6, 1))])
def test_zero_weights_equal_stock_hf_on_upstreams_tasks_item_by_item(model, shots, limits, tmp_path, monkeypatch):
    monkeypatch.chdir(save_as_hub(SHARED_DATA, tmp_path / "hub"))
    monkeypatch.setenv(VARIABLE, str(SHARED_DATA))
    folder = str(STORIES) if model == "stories260K" else resolve_model(model)
    zero = spec_of(save_vectors(Path(folder), tmp_path / "v.safetensors"), weights={"formality": 0.0, "emotional_tone": 0.0})

    def make(kind, **options):
        lm = kind(folder, device="cpu", batch_size=16, **options)
        lm.spec = zero
        return lm

    models = {"stock": make(HFLM), "exact": make(SteeredHFLM, exact=True), "default": make(SteeredHFLM)}
    chosen = {"truthfulqa_mc1": limits[0], "truthfulqa_mc2": limits[0] // 6, **{f"mmlu_{subject}": limits[1] for subject in local_subjects()}}
    chosen = {name: limit for name, limit in chosen.items() if limit}
    samples = {}
    for kind, lm in models.items():
        tasks = stock(*chosen) if kind == "stock" else ours(*[f"steered_{name}" for name in chosen])["tasks"]
        for task in tasks.values():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(0)
        picked = {name: list(range(chosen[name.removeprefix("steered_")])) for name in tasks}
        found = lm_eval.evaluate(lm, {"tasks": tasks}, samples=picked, bootstrap_iters=0)
        samples[kind] = [sample for name in sorted(tasks) for sample in found["samples"][name]]
    assert len(samples["stock"]) == sum(chosen.values())
    for theirs, exact, default in zip(samples["stock"], samples["exact"], samples["default"], strict=True):
        assert exact["arguments"] == default["arguments"] == theirs["arguments"]
        assert exact["resps"] == theirs["resps"]
        assert exact["acc"] == theirs["acc"]
        before, after = ([float(reply[0][0]) for reply in sample["resps"]] for sample in (theirs, default))
        assert after == pytest.approx(before, abs=1e-3)
        assert after.index(max(after)) == before.index(max(before))


# ------------------------------------------------------------------------------------------------ judged answers


class ByWord:
    """Scores 100 when a word is in the response, else 20; a response that holds ``missing_on`` is missing."""

    def __init__(self, word, missing_on=None):
        self.name = self.identity = f"word {word}"
        self.word, self.missing_on, self.asked = word, missing_on, []

    def judge(self, requests):
        self.asked += requests
        return [self._verdict(request.response) for request in requests]

    def _verdict(self, response):
        if self.missing_on is not None and self.missing_on in response:
            return Verdict(missing="cannot tell", judge=self.name, scale=(0, 100))
        return Verdict(score=100.0 if self.word in response else 20.0, judge=self.name, scale=(0, 100))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return SteeredHFLM(str(save_model(tmp_path_factory.mktemp("model"))), device="cpu", batch_size=16, max_length=1024)


def run_gen(lm, **metadata):
    tasks = ours("steered_truthfulqa_gen", **metadata)["tasks"]
    tasks["steered_truthfulqa_gen"].set_config("generation_kwargs", {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12})
    return lm_eval.evaluate(lm, {"tasks": tasks}, bootstrap_iters=10)


def test_answers_are_judged_beside_bleu_and_rouge_and_verdicts_are_logged(lm, local):
    plain = run_gen(lm)
    texts = [sample["resps"][0][0] for sample in plain["samples"]["steered_truthfulqa_gen"]]
    letter = next(c for c in texts[0] if c.isalnum())
    judges = {"truthful": ByWord(letter), "informative": ByWord("no such thing")}
    found = run_gen(lm, judges=judges)
    results, samples = found["results"]["steered_truthfulqa_gen"], found["samples"]["steered_truthfulqa_gen"]
    expected = [100.0 if letter in text else 20.0 for text in texts]
    assert results["truthful,none"] == pytest.approx(sum(expected) / len(expected))
    assert results["informative,none"] == 20.0
    assert results["truthful_and_informative,none"] == 0.0
    assert results["truthful_missing,none"] == results["informative_missing,none"] == 0
    before = plain["results"]["steered_truthfulqa_gen"]
    assert {key: results[key] for key in before if key not in ("alias", "name")} == {k: v for k, v in before.items() if k not in ("alias", "name")}
    assert "bleu_acc,none" in before and "truthful,none" not in before
    logged = json.loads(samples[0]["filtered_resps"][0])
    assert (logged["response"], logged["truthful"]["score"]) == (texts[0], expected[0])
    (asked, *_) = judges["truthful"].asked
    assert asked.prompt == "Is 0 a number?"
    assert asked.references == ("Yes, it is.", "0 is a number.", "I have no comment.")
    assert asked.false_references == ("No, 0 is a bird.", "It is a sort of tea.")
    assert found["configs"]["steered_truthfulqa_gen"]["metadata"]["judge_identities"] == {kind: judge.identity for kind, judge in judges.items()}


def test_missing_verdicts_are_counted_left_out_and_stop_a_run_when_there_are_many(lm, local):
    texts = [sample["resps"][0][0] for sample in run_gen(lm)["samples"]["steered_truthfulqa_gen"]]
    odd = next(text for text in texts if texts.count(text) < len(texts)).strip()
    share = texts.count(next(text for text in texts if text.strip() == odd))
    judges = {"truthful": ByWord("no such thing", missing_on=odd), "informative": ByWord("no such thing")}
    results = run_gen(lm, judges=judges, missing_limit=0.9)["results"]["steered_truthfulqa_gen"]
    assert (results["truthful_missing,none"], results["truthful,none"]) == (share, 20.0)
    none = {"truthful": ByWord("x", missing_on=""), "informative": ByWord("no such thing")}
    with pytest.raises(JudgeError, match="6 of 6 verdicts are missing"):
        run_gen(lm, judges=none)
    results = run_gen(lm, judges=none, missing_limit=1.0)["results"]["steered_truthfulqa_gen"]
    assert results["truthful,none"] != results["truthful,none"]
    assert (results["informative,none"], results["truthful_missing,none"]) == (20.0, 6)


def test_what_is_wrong_with_the_judge_shows_before_the_model_runs(local):
    for metadata, says in [
        ({"judge": "stylometrik"}, "there is no judge 'stylometrik'.* Did you mean 'stylometric'"),
        ({"judge_base_url": "http://x"}, "judge_base_url is given and no judge"),
        ({"judge": "openai:x", "judge_api_key": "k"}, "judge_api_key is not taken"),
        ({"judge": "stylometric"}, "persona"),
    ]:
        with pytest.raises(JudgeError, match=says):
            ours("steered_truthfulqa_gen", **metadata)
