"""LaMP without a model: files, retrieval, prompts, metrics, the downloader, personas of its authors."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lamp_data import AUTHOR, INPUT, write_lamp
from rank_bm25 import BM25Okapi
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import JudgeError, PersonaError, UserError
from steered_lm.judges import make_judge
from steered_lm.lamp import TASKS, LampOptions, Row, evaluate, make_items, persona_from_profile, read_rows, task_named
from steered_lm.lamp.author import SHOWN, author_lines, author_question, author_request, refuse_stylometric
from steered_lm.lamp.download import download
from steered_lm.lamp.metrics import rating, score_answer
from steered_lm.lamp.retrieval import retrieve
from steered_lm.persona import SPLITS, load_persona

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "lamp"
TWEETS = TASKS["LaMP_7"]


def tweets(*texts: str, **dates: str) -> Row:
    profile = [{"id": f"p{n}", "text": text} | ({"date": dates[f"p{n}"]} if f"p{n}" in dates else {}) for n, text in enumerate(texts)]
    return Row("1", "Paraphrase the following tweet: red tree", tuple(profile), "a red tree!")


def ids(items: list[dict[str, str]]) -> list[str]:
    return [item["id"] for item in items]


# Prompts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LaMP_1", 'For an author who has written the paper with the title, and "Canal locks", and "Tide tables" "Locks", '
                   'which reference is related? [1]: "Canal boats" [2]: "Old tides"'),
        ("LaMP_2", 'the tag for the movie: "A crew sleeps." is "sci-fi", and the tag for the movie: "Two bakers meet." is "romance". '
                   "Which tag does this movie relate to? description: Two bakers open a shop."),
        ("LaMP_3", '1 is the score for "Broke in a day.", and 5 is the score for "The kettle sings.". '
                   "What is the score of the following review on a scale of 1 to 5? review: The kettle is loud."),
        ("LaMP_4", '"Bridge Opens" is the title for "It opened today.", and "Mill Turns" is the title for "The wheel turns.". '
                   "Generate a headline for the following article: The wheel broke."),
        ("LaMP_5", '"On locks" is a title for "We list locks.", and "On tides" is a title for "We list tides.". '
                   "Following the given patterns Generate a title for the following abstract of a paper: We list ferries and tides."),
        ("LaMP_6", '"Lunch" is the title for "Soup at noon?", and "Keys" is the title for "They are on the desk.". '
                   "Generate a subject for the following email: The keys are gone."),
        ("LaMP_7", '"so tired lol", and "kettle is ON!!" are written by a person. Following the given patterns '
                   "Paraphrase the following tweet without any explanation before or after it: The kettle is boiling."),
    ],
)  # fmt: skip
def test_prompts_are_lamps_own_to_the_letter(name, expected):
    assert TASKS[name].prompt(INPUT[name], AUTHOR[name]) == expected


def test_without_items_the_input_is_the_prompt():
    assert TWEETS.prompt(INPUT["LaMP_7"], []) == INPUT["LaMP_7"]


def test_braces_in_texts_are_texts():
    assert TWEETS.prompt("x: {text}", [{"id": "0", "text": "{0} {id}"}]).startswith('"{0} {id}" are written')


def test_items_can_be_shortened_by_words():
    assert TASKS["LaMP_3"].prompt("x", AUTHOR["LaMP_3"], item_words=2) == '1 is the score for "Broke in", and 5 is the score for "The kettle". x'
    assert TASKS["LaMP_1"].prompt("the title", AUTHOR["LaMP_1"], item_words=1) == 'the title, and "Canal", and "Tide"'
    assert TASKS["LaMP_4"].prompt("x", AUTHOR["LaMP_4"][:1], item_words=1) == '"Bridge Opens" is the title for "It". x'


@pytest.mark.parametrize(
    ("name", "query", "text"),
    [
        ("LaMP_1", "Canal boats Old tides", "Tide tables Tides by hand."),
        ("LaMP_2", "Two bakers open a shop.", "Two bakers meet."),
        ("LaMP_3", "The kettle is loud.", "The kettle sings."),
        ("LaMP_4", "The wheel broke.", "Mill Turns The wheel turns."),
        ("LaMP_5", "We list ferries and tides.", "On tides We list tides."),
        ("LaMP_6", "The keys are gone.", "They are on the desk."),
        ("LaMP_7", "The kettle is boiling.", "kettle is ON!!"),
    ],
)
def test_retrieval_reads_the_tasks_own_fields_with_the_tasks_own_query(name, query, text):
    assert TASKS[name].query(INPUT[name]) == query
    assert TASKS[name].search_text(AUTHOR[name][1]) == text


def test_an_input_without_what_a_profile_is_searched_with_is_an_error():
    with pytest.raises(UserError, match="lacks 'review:'"):
        TASKS["LaMP_3"].query("What is the score?")
    with pytest.raises(UserError, match="quotes 1 texts, not a title and two references"):
        TASKS["LaMP_1"].query('the title "A" and no more')


def test_tasks_have_several_spellings_and_no_others():
    assert task_named("LaMP-7") is task_named("lamp_7") is TWEETS
    with pytest.raises(UserError, match="task='LaMP_8' is none of LaMP's. Allowed: LaMP_1, LaMP_2"):
        task_named("LaMP_8")


# Retrieval


def test_bm25_orders_as_worked_out_by_hand():
    # "red" and "tree" are each in one of three texts: idf = ln(2.5 / 1.5) = 0.511. Lengths 3, 2, 4 (mean 3), k1 = 1.5, b = 0.75:
    # text 0 has 0.511 * 2.5 / (1 + 1.5 * (0.25 + 0.75)) = 0.511, text 2 has 0.511 * 2.5 / (1 + 1.5 * (0.25 + 1)) = 0.444, text 1 has nothing.
    row = tweets("red fox runs", "blue fox", "a tree stands tall")
    assert ids(retrieve(TWEETS, row, "bm25", 4)) == ["p0", "p2", "p1"]
    assert ids(retrieve(TWEETS, row, "bm25", 1)) == ["p0"]
    scores = BM25Okapi([item["text"].split() for item in row.profile]).get_scores(["red", "tree"])
    idf = math.log(2.5 / 1.5)
    assert list(scores) == pytest.approx([idf, 0.0, idf * 2.5 / 2.875])


def test_bm25_tokens_are_words_between_white_space_case_and_punctuation_kept():
    assert ids(retrieve(TWEETS, tweets("Red. tree, nothing", "blue", "plain red", "grey"), "bm25", 1)) == ["p2"]


def test_equally_near_items_come_last_first_whatever_the_processor():
    assert ids(retrieve(TWEETS, tweets(*["blue fox"] * 40), "bm25", 3)) == ["p39", "p38", "p37"]


def test_a_profile_without_a_word_can_be_searched():
    assert ids(retrieve(TWEETS, tweets(" ", ""), "bm25", 1)) == ["p1"]


def test_recency_goes_by_date_and_else_by_place():
    dated = tweets("a", "b", "c", p0="2012-03-09", p1="2012-11-01", p2="2012-03-10")
    assert ids(retrieve(TWEETS, dated, "recency", 2)) == ["p1", "p2"]
    assert ids(retrieve(TWEETS, tweets("a", "b", "c"), "recency", 2)) == ["p2", "p1"]
    with pytest.raises(UserError, match="1 of 2 items in the profile of row 1 have a date"):
        retrieve(TWEETS, tweets("a", "b", p1="2012-01-01"), "recency")
    with pytest.raises(UserError, match="has the date 'May 2012'"):
        retrieve(TWEETS, tweets("a", p0="May 2012"), "recency")


def test_random_draws_by_seed_and_row_without_repetition():
    row = tweets(*map(str, range(30)))
    drawn = [ids(retrieve(TWEETS, row, "random", 6, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6
    assert len(retrieve(TWEETS, row, "random", 99)) == 30


def test_none_retrieves_nothing_and_an_unknown_method_is_an_error():
    assert retrieve(TWEETS, tweets("a"), "none") == []
    with pytest.raises(UserError, match="retrieval='bm52' does not exist.*Did you mean 'bm25'"):
        retrieve(TWEETS, tweets("a"), "bm52")


# Metrics


def test_accuracy_and_macro_f1_by_hand():
    # [1]: one right, one missed: F1 = 2/3. [2]: one right, one missed, one too many: F1 = 1/2. "maybe" is no label, so it is wrong.
    golds = {"a": "[1]", "b": "[1]", "c": "[2]", "d": "[2]"}
    answers = {"a": " [1]\n", "b": "[2]", "c": "[2]", "d": "maybe"}
    assert evaluate(TASKS["LaMP_1"], answers, golds) == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3 + 1 / 2) / 2})


def test_macro_f1_is_over_all_labels_also_those_that_do_not_occur():
    found = evaluate(TASKS["LaMP_2"], {"a": "sci-fi", "b": "sci-fi"}, {"a": "sci-fi", "b": "comedy"})
    assert found == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3) / 15})


@pytest.mark.parametrize("answer", ["[1].", "1", "[1] because", "", "[3]", "SCI-FI"])
def test_labels_match_exactly_or_not_at_all(answer):
    assert score_answer(TASKS["LaMP_1"], answer, "[1]")["accuracy"] == 0.0


def test_mae_and_rmse_by_hand_with_the_worst_case_for_what_is_no_number():
    golds = {"a": "5", "b": "2", "c": "3", "d": "4"}
    answers = {"a": " 4.0 ", "b": "good", "c": "", "d": "three"}
    # 4 for 5; 5 for 2; 5 for 3, where both ends are as far; 1 for 4: errors 1, 3, 2, 3
    assert evaluate(TASKS["LaMP_3"], answers, golds) == pytest.approx({"mae": 9 / 4, "rmse": math.sqrt(23 / 4)})


def test_a_number_off_the_scale_is_taken_as_it_is_and_what_has_no_error_is_no_number():
    assert rating("12", 5.0) == 12.0
    assert rating("nan", 4.0) == rating("-inf", 4.0) == 1.0
    assert rating("4 stars", 1.0) == 5.0


@pytest.mark.parametrize(
    ("answer", "gold", "rouge1", "rouge_l"),
    [
        ("The cat lay on a mat.", "the cat sat on the mat", 2 / 3, 2 / 3),  # 4 of 6 words on both sides, in the same order
        ("d a b", "a b c d", 6 / 7, 4 / 7),  # 3 of 3 and 3 of 4 words; the longest common subsequence has 2
        ("run shoe", "running shoes", 0.0, 0.0),  # no stemming
        ("", "a b", 0.0, 0.0),
        (" Same! ", "same", 1.0, 1.0),
    ],
)
def test_rouge_by_hand(answer, gold, rouge1, rouge_l):
    assert score_answer(TASKS["LaMP_4"], answer, gold) == pytest.approx({"rouge1": rouge1, "rougeL": rouge_l})


def test_answers_to_other_questions_are_an_error():
    with pytest.raises(UserError, match="the ids of 1 answers are not those of 2 right answers"):
        evaluate(TWEETS, {"a": "x"}, {"a": "x", "b": "y"})


# Files


@pytest.mark.parametrize("place", ["LaMP_7", "LaMP_7/dev", "LaMP_7/new/dev", "lamp/LaMP_7", "."])
def test_files_are_found_in_the_layouts_they_come_in(tmp_path, place, monkeypatch):
    made = write_lamp(tmp_path / "made", "LaMP_7") / "LaMP_7"
    target = tmp_path / "data" / place
    target.mkdir(parents=True)
    for file in made.iterdir():
        file.rename(target / file.name)
    (row,) = read_rows(TWEETS, tmp_path / "data")
    assert (row.id, row.output, row.profile[0]["text"]) == ("10", "kettle's boiling!!", "so tired lol")
    monkeypatch.setenv("STEERED_LM_DATA", str(tmp_path / "data"))
    assert read_rows(TWEETS) == [row]


def test_rows_are_joined_by_id_whatever_the_order(tmp_path):
    rows = [{"id": i, "input": INPUT["LaMP_7"], "profile": AUTHOR["LaMP_7"]} for i in (1, "2", "3")]
    golds = [{"id": i, "output": f"out {i}"} for i in ("3", "1", 2)]
    assert [(row.id, row.output) for row in read_rows(TWEETS, write_lamp(tmp_path, "LaMP_7", rows=rows, golds=golds))] == [
        ("1", "out 1"), ("2", "out 2"), ("3", "out 3"),
    ]  # fmt: skip


def test_a_wrong_folder_is_an_error_that_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("STEERED_LM_DATA", raising=False)
    with pytest.raises(UserError, match="data is not given, and STEERED_LM_DATA is not set"):
        read_rows(TWEETS)
    with pytest.raises(UserError, match="data='.*nowhere' is not a folder"):
        read_rows(TWEETS, tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not hold LaMP_7. Looked there for LaMP_7/dev_questions.json, LaMP_7/dev/dev_questions.json"):
        read_rows(TWEETS, tmp_path)
    with pytest.raises(UserError, match="does not hold LaMP_6.*Avocado Research Email Collection, which needs a licence"):
        read_rows(TASKS["LaMP_6"], tmp_path)


def test_a_missing_split_or_missing_answers_are_errors(tmp_path):
    write_lamp(tmp_path, "LaMP_7")
    write_lamp(tmp_path, "LaMP_7", split="test")
    with pytest.raises(UserError, match="LaMP_7 has no split='train' in .* There are: dev, test."):
        read_rows(TWEETS, tmp_path, "train")
    for split, said in (("test", "LaMP publishes none for the split test; use dev"), ("dev", "Both files belong together")):
        (tmp_path / "LaMP_7" / f"{split}_outputs.json").unlink()
        with pytest.raises(UserError, match=f"{split}_outputs.json does not exist. {said}"):
            read_rows(TWEETS, tmp_path, split)


ROW = {"id": "10", "input": INPUT["LaMP_7"], "profile": AUTHOR["LaMP_7"]}


@pytest.mark.parametrize(
    ("task", "written", "message"),
    [
        ("LaMP_7", {"rows": [{**ROW, "profile": []}]}, r"row 0 \(id 10\) has no profile, so there is nothing to retrieve"),
        ("LaMP_7", {"rows": [{"id": "10", "input": "x"}]}, r"row 0 \(id 10\) has no profile"),
        ("LaMP_7", {"rows": [ROW, {"id": "11", "profile": []}]}, "row 1 lacks id or input"),
        ("LaMP_7", {"rows": [{**ROW, "profile": [{"id": "p0"}]}]}, "an item of its profile lacks text; LaMP_7 needs id, text"),
        ("LaMP_7", {"rows": []}, "is an empty list"),
        ("LaMP_7", {"rows": {"id": 1}, "golds": []}, "holds a dict, not a list of questions"),
        ("LaMP_7", {"rows": [ROW, ROW]}, "has the id 10 twice"),
        ("LaMP_7", {"golds": [{"id": "11", "output": "x"}]}, "1 ids of .*dev_questions.json are not in dev_outputs.json, such as 10"),
        (
            "LaMP_7",
            {"golds": [{"id": i, "output": "x"} for i in ("10", "11")]},
            "1 ids of .*dev_outputs.json are not in dev_questions.json, such as 11",
        ),
        ("LaMP_7", {"golds": [{"id": "10"}]}, '"golds"'),
        ("LaMP_7", {"named": "LaMP_4"}, "is of task 'LaMP_4', and LaMP_7 was asked for"),
        ("LaMP_1", {"golds": [{"id": "10", "output": "[3]"}]}, r"id 10 has the output '\[3\]', which is none of \[1\], \[2\]"),
        ("LaMP_2", {"golds": [{"id": "10", "output": "politics"}]}, "none of sci-fi, .* LaMP_2's older files are about news"),
        ("LaMP_3", {"golds": [{"id": "10", "output": "6"}]}, "'6', which is none of 1, 2, 3, 4, 5"),
    ],
)
def test_what_is_not_the_format_is_an_error_that_names_file_and_row(tmp_path, task, written, message):
    with pytest.raises(UserError, match=message):
        read_rows(TASKS[task], write_lamp(tmp_path, task, **written))


def test_a_file_that_is_no_json_is_an_error(tmp_path):
    (write_lamp(tmp_path, "LaMP_7") / "LaMP_7" / "dev_outputs.json").write_text("<html>")
    with pytest.raises(UserError, match="dev_outputs.json is not JSON"):
        read_rows(TWEETS, tmp_path)


# Downloads


@pytest.fixture
def host():
    """A host of files by path, which counts requests; a path that is not there is answered with a page and 200, ``/gone`` with 404."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = files.get(self.path, b"<html>no such page</html>")
            self.send_response(404 if "gone" in self.path else 200)
            self.send_header("Content-Length", str(len(body) + 9 * ("cut" in self.path)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/LaMP", files, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_split_is_downloaded_once_and_can_be_read(host, tmp_path, monkeypatch):
    url, files, asked = host
    made = write_lamp(tmp_path / "made", "LaMP_7") / "LaMP_7"
    for kind in ("questions", "outputs"):
        files[f"/LaMP/LaMP_7/dev/dev_{kind}.json"] = (made / f"dev_{kind}.json").read_bytes()
    monkeypatch.setenv("STEERED_LM_LAMP_URL", url + "/")
    paths = download(TWEETS, "dev", tmp_path / "data")
    assert [path.relative_to(tmp_path / "data").as_posix() for path in paths] == ["LaMP_7/dev_questions.json", "LaMP_7/dev_outputs.json"]
    assert read_rows(TWEETS, tmp_path / "data") == read_rows(TWEETS, tmp_path / "made")
    assert download(TWEETS, "dev", tmp_path / "data") == paths
    assert len(asked) == 2
    done = CliRunner().invoke(cli.app, ["lamp", "download", "--task", "LaMP_7", "--out", str(tmp_path / "again"), "--url", url])
    assert done.exit_code == 0 and "fetching http" in done.output
    assert read_rows(TWEETS, tmp_path / "again") == read_rows(TWEETS, tmp_path / "made")


@pytest.mark.parametrize(
    ("task", "split", "by_time", "path"),
    [
        ("LaMP_2", "train", False, "/LaMP/LaMP_2/new/train/train_questions.json"),
        ("LaMP_3", "test", True, "/LaMP/time/LaMP_3/test/test_questions.json"),
    ],
)
def test_addresses_are_those_of_the_authors_host(host, tmp_path, task, split, by_time, path):
    url, files, asked = host
    files[path] = b"[]"
    files[path.replace("questions", "outputs")] = b"{}"
    paths = download(TASKS[task], split, tmp_path, by_time=by_time, url=url)
    assert asked[0] == path
    assert len(paths) == (1 if split == "test" else 2)  # the answers of the test split are not given out
    assert paths[0] == tmp_path / ("time" if by_time else "") / task / f"{split}_questions.json"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/LaMP", "is not LaMP's file: its content is not JSON"),
        ("/gone", "was not given out: 404"),
        ("/cut", "cannot be fetched|broke off after"),
    ],
)
def test_what_is_no_such_file_is_not_kept(host, tmp_path, place, message):
    url, files, _ = host
    files["/cut/LaMP_7/dev/dev_questions.json"] = b"[1, 2"
    with pytest.raises(UserError, match=message):
        download(TWEETS, "dev", tmp_path, url=url.replace("/LaMP", place))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_cannot_be_downloaded_is_refused(tmp_path):
    with pytest.raises(UserError, match="LaMP_6 is made from the Avocado .* which needs a licence .* and is not downloaded"):
        download(TASKS["LaMP_6"], "dev", tmp_path)
    with pytest.raises(UserError, match="split='validation' does not exist. Allowed: dev, test, train"):
        download(TWEETS, "validation", tmp_path)
    with pytest.raises(UserError, match="is not on the web"):
        download(TWEETS, "dev", tmp_path, url="file:///etc")
    with pytest.raises(UserError, match="cannot be fetched"):
        download(TWEETS, "dev", tmp_path, url="http://127.0.0.1:9")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="folder '.*LaMP_7' cannot be made: Not a directory. Name another place"):
        download(TWEETS, "dev", tmp_path / "file")


# Judging, and personas of authors


def test_a_judge_is_shown_the_authors_own_texts_spread_over_the_profile_without_the_right_answer():
    row = tweets(*[f"text {n}" for n in range(100)], "a red tree!")
    lines = author_lines(TWEETS, row)
    assert len(lines) == SHOWN
    assert lines[0] == "text 0" and lines[-1] == "text 95"
    assert author_lines(TWEETS, tweets("x", "a red tree!", " y ")) == ("x", "y")
    assert author_lines(TASKS["LaMP_2"], Row("1", "x", tuple(AUTHOR["LaMP_2"]), "")) == ()
    question = author_question()
    shown = json.loads(question.user(author_request("Say it.", " red!! ", lines)))
    assert shown == {"task": "Say it.", "text": "red!!", "author": list(lines)}
    assert question.bounds == (1.0, 5.0)
    assert "texts that the author really wrote" in question.system(token=True)


def test_the_judge_that_learns_one_persona_is_refused():
    with pytest.raises(JudgeError, match="cannot rate LaMP's many authors"):
        refuse_stylometric("stylometric")


SAID = (
    "the harbour froze overnight", "my kettle sings opera again", "buses late, hands cold", "found a penny under the piano",
    "neighbours argue about hedges", "rain rain rain and pancakes", "library smells like summer", "lost another umbrella today",
    "cats judge everyone equally", "burnt the toast, called it art", "sunday means long letters", "who invented monday mornings",
)  # fmt: skip


def test_a_persona_is_made_of_an_authors_texts_and_can_be_loaded(tmp_path):
    row = tweets(*SAID, SAID[0].upper(), "a RED tree!", "...", "lol ok")
    made = persona_from_profile(TWEETS, row, tmp_path / "p", licence="CC0-1.0")
    assert made == load_persona(tmp_path / "p")
    assert (made.name, made.licence) == ("LaMP_7-1", "CC0-1.0")
    # a repeated text, the row's own answer, and texts without a word to ask for are left out
    found = [item for split in SPLITS for item in made.items(split)]
    assert {item.reference for item in found} == set(SAID)
    assert all(made.items(split) for split in SPLITS)
    (kettle,) = [item for item in found if "kettle" in item.reference]
    assert kettle.prompt == "Write a tweet. Mention: kettle, opera, again."
    assert made.traits == {trait: level or 0.0 for trait, level in made.features.levels.items()}
    with pytest.raises(PersonaError, match="holds a persona already"):
        persona_from_profile(TWEETS, row, tmp_path / "p")


def test_profiles_that_are_no_persona_are_refused_and_leave_nothing_behind(tmp_path):
    with pytest.raises(PersonaError, match="row 1 of LaMP_7 has 9 different texts by its author, and a persona needs 10"):
        persona_from_profile(TWEETS, tweets(*SAID[:9]), tmp_path / "few")
    with pytest.raises(PersonaError, match="LaMP_2 profiles hold no text of their author's own"):
        persona_from_profile(TASKS["LaMP_2"], Row("1", "x", tuple(AUTHOR["LaMP_2"]), ""), tmp_path / "none")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="folder '.*file' cannot be made: File exists"):
        persona_from_profile(TWEETS, tweets(*SAID), tmp_path / "file")
    (tmp_path / "folder" / "conversations.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="'.*conversations.jsonl' is a folder, and a file is to be written there"):
        persona_from_profile(TWEETS, tweets(*SAID), tmp_path / "folder")


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_6"])
def test_other_tasks_authors_become_personas_too(tmp_path, name):
    task = TASKS[name]
    profile = [{**{field: f"{text} ({field})" for field in task.fields}, "id": str(n), "score": "4"} for n, text in enumerate(SAID)]
    made = persona_from_profile(task, Row("1", "x", tuple(profile), "nothing"), tmp_path / "p")
    assert made.features.utterances == len(SAID)


def test_the_command_makes_a_persona(tmp_path):
    profile = [{"id": str(n), "text": text} for n, text in enumerate(SAID)]
    data = write_lamp(tmp_path / "data", "LaMP_7", rows=[{"id": "10", "input": "x", "profile": profile}])
    arguments = ["persona", "from-lamp", "--data", str(data), "--out", str(tmp_path / "p"), "--name", "ann"]
    done = CliRunner().invoke(cli.app, [*arguments, "--id", "10"])
    assert done.exit_code == 0, done.output
    assert load_persona(tmp_path / "p").name == "ann"
    wrong = CliRunner().invoke(cli.app, [*arguments, "--id", "99"])
    assert "--id '99' is no row of LaMP_7" in str(wrong.exception)


# The shared rows


@pytest.mark.shared
def test_the_shared_rows_are_read_and_searched_as_the_official_code_searches_them():
    rows = read_rows(TWEETS, SHARED)
    assert len(rows) == len(make_items(TWEETS, LampOptions(data=str(SHARED), k=4))) == 150
    for row in rows:
        scores = BM25Okapi([item["text"].split() for item in row.profile]).get_scores(row.input.partition(":")[2].split())
        by_id = dict(zip(ids(list(row.profile)), scores, strict=True))
        # equal scores may be in any order there
        assert [by_id[one] for one in ids(retrieve(TWEETS, row, "bm25", 4))] == sorted(scores, reverse=True)[:4]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_2", "LaMP_4", "LaMP_5"])
def test_the_shared_handmade_rows_are_read(name):
    items = make_items(TASKS[name], LampOptions(data=str(SHARED / "handmade")))
    assert len(items) == 2
    golds = {item.id: item.reference for item in items}
    assert set(evaluate(TASKS[name], golds, golds).values()) <= {1.0, 2 / 15}  # macro-F1 over 15 tags of which two occur


@pytest.mark.shared
def test_a_shared_author_becomes_a_persona_that_the_offline_judge_can_learn(tmp_path):
    row = max(read_rows(TWEETS, SHARED), key=lambda row: len(row.profile))
    made = persona_from_profile(TWEETS, row, tmp_path / "p")
    judge = make_judge("stylometric", made)
    assert judge.held_out_auc.auc > 0.9  # tweets are unlike our personas' talk
