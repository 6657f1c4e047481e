import json
from itertools import count

import pytest
from fault_server import Answer, FaultServer, fault, says
from typer.testing import CliRunner

from steered_lm.cli import app
from steered_lm.errors import JudgeError, UserError
from steered_lm.judges.question import trait_description
from steered_lm.judges.trait_writer import TraitWriter, eval_prompt
from steered_lm.judges.traits import TRAITS, TraitError, load_trait

KEY = "sk-planted-0123456789"
ABOUT = "the response talks like a pirate {arr}."
SUBJECTS = "bread kite river tax violin garden moth bridge soap ladder frost opera candle goose ferry button"


def questions(first=0, number=40):
    """Questions that are all different: those of traits of ours."""
    found = [q for trait in map(load_trait, ("evil", "impolite", "optimistic")) for q in (*trait.extract.questions, *trait.evaluate.questions)]
    return found[first : first + number]


def pairs(number=5):
    return [{"pos": f"{word} {word}s speak as pirates do", "neg": f"{word} {word}s speak as clerks do"} for word in SUBJECTS.split()[:number]]


def draft(first=0, number=40, of_pairs=5):
    return {"instruction": pairs(of_pairs), "questions": questions(first, number)}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("PIRATE_KEY", KEY)
    found = FaultServer(lambda *_: says(draft()))
    yield found
    found.close()


def writer(server, **options):
    return TraitWriter.of("openai:m", **{"base_url": server.url, "key_env": "PIRATE_KEY", "backoff": 0.001, "attempts": 3, **options})


def test_a_whole_answer_becomes_a_trait_of_two_files_without_overlap(server):
    made = writer(server).write("pirate", ABOUT)
    assert made.remarks == ()
    assert (*made.extract.questions, *made.evaluate.questions) == (*questions()[::2], *questions()[1::2])
    assert [pair.pos for pair in made.extract.instruction] == [pair["pos"] for pair in pairs()]
    assert made.description == ABOUT
    (body,) = server.bodies
    assert json.loads(body["messages"][1]["content"]) == {"trait": "pirate", "meaning": ABOUT, "number of pairs": 5, "number of questions": 40}
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["instruction", "questions"]
    assert "temperature" not in body


def test_what_is_lacking_or_repeated_is_asked_for_again_with_what_is_there_already(server):
    replies = [
        draft(0, 25, of_pairs=3) | {"note": "x"},
        {"instruction": [*pairs(4), {"pos": "only one side"}], "questions": [*questions(20, 10), " ", 7, questions()[3].upper()]},
        "```json\n" + json.dumps(draft(30, 60)) + "\n```",
    ]
    server.script = lambda number, body, headers: says(replies[number])
    made = writer(server).write("pirate", ABOUT)
    assert sorted([*made.extract.questions, *made.evaluate.questions]) == sorted(questions())
    assert made.remarks == ()
    asked = [json.loads(body["messages"][1]["content"]) for body in server.bodies]
    assert [(one["number of pairs"], one["number of questions"]) for one in asked] == [(5, 40), (2, 15), (1, 10)]
    assert asked[1]["there already"]["questions"] == questions(0, 25)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            "I'd rather not.",
            r"0 usable pairs of 5 and 0 usable questions of 40. The last one was an answer that is no JSON object: \"I'd rather not.\"",
        ),
        ({"questions": questions(), "instruction": "none"}, "0 usable pairs of 5 and 40 usable questions of 40"),
        ({"questions": ["What of bread?"] * 40, "instruction": pairs()}, "5 usable pairs of 5 and 1 usable questions of 40. 199 more ask nearly"),
        ('{"questions": [', "an answer that is no JSON object"),
    ],
)
def test_output_that_stays_unusable_is_an_error_that_says_what_there_was(server, reply, message):
    server.script = lambda *_: says(reply)
    with pytest.raises(TraitError, match=f"after 5 answers of openai:m there are.*{message}"):
        writer(server).write("pirate", ABOUT)
    assert len(server.bodies) == 5


def test_faults_that_pass_are_tried_again_and_a_refused_schema_is_left_out(server):
    faults = iter([fault(503), fault(429, "slow", Retry_After="0.01"), Answer("<html>"), fault(400, "no response_format here")])
    server.script = lambda number, body, headers: next(faults, says(draft()))
    assert writer(server, attempts=6).write("pirate", ABOUT).remarks == ()
    assert ["response_format" in body for body in server.bodies] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("answer", "asked", "message"),
    [(fault(401, f"bad key {KEY}"), 1, "HTTP 401: bad key"), (fault(500), 3, "HTTP 500"), (Answer(hang=30), 3, "no answer within 0.5 s")],
)
def test_an_endpoint_that_does_not_answer_is_an_error_without_the_key(server, answer, asked, message):
    server.script = lambda *_: answer
    with pytest.raises(TraitError, match=f"did not answer: {message}") as caught:
        writer(server, timeout=0.5).write("pirate", ABOUT)
    assert KEY not in str(caught.value)
    assert server.asked(asked) == asked


def test_wrong_names_models_and_options_are_refused_without_asking(server):
    with pytest.raises(TraitError, match="name='Pi rate' is no name"):
        writer(server).write("Pi rate", ABOUT)
    with pytest.raises(TraitError, match="description is empty"):
        writer(server).write("pirate", " ")
    with pytest.raises(TraitError, match="model='hf:m' cannot write traits. Write openai:<model>"):
        TraitWriter.of("hf:m")
    with pytest.raises(JudgeError, match="has no option base_ulr.*Did you mean 'base_url'"):
        TraitWriter.of("openai:m", base_ulr="x")
    assert server.bodies == []


def test_our_own_files_have_the_prompt_that_new_ones_get():
    for trait in TRAITS:
        loaded = load_trait(trait)
        assert loaded.extract.eval_prompt == loaded.evaluate.eval_prompt == eval_prompt(trait, trait_description(trait))


# -- the command


def command(*arguments):
    return CliRunner().invoke(app, ["traits", *map(str, arguments)], env={"COLUMNS": "200"})


def test_new_writes_files_that_check_and_a_task_can_read_and_never_overwrites(server, tmp_path):
    given = ["new", "--name", "pirate", "--description", ABOUT, "--model", "openai:m", "--out", tmp_path]
    options = ["--option", f"base_url={server.url}", "--option", "key_env=PIRATE_KEY"]
    done = command(*given, *options)
    assert done.exit_code == 0, done.output
    assert "--tasks pv_trait" in done.output
    loaded = load_trait(tmp_path / "eval" / "pirate.json")
    assert loaded == load_trait("pirate", tmp_path)
    assert loaded.question().subject == f"pirate: {ABOUT}"
    assert "{arr}" in loaded.question("file").prompt.format(question="", answer="")
    checked = command("check", tmp_path)
    assert checked.exit_code == 0
    assert "pirate, evaluation: 5 instruction pairs, 20 questions" in checked.output
    again = command(*given, *options)
    assert isinstance(again.exception, UserError)
    assert "exists already" in str(again.exception)
    blocked = command(*given[:-1], tmp_path / "eval" / "pirate.json" / "traits", *options)
    assert isinstance(blocked.exception, UserError)
    assert "cannot be a folder, since" in str(blocked.exception)
    assert len(server.bodies) == 1


def test_check_ends_with_1_where_counts_differ(tmp_path):
    file = tmp_path / "pirate.json"
    numbers = count()
    file.write_text(
        json.dumps(
            {
                "instruction": [{"pos": "a", "neg": "b"}],
                "questions": [f"Ahoy, {next(numbers)}?" for _ in range(3)],
                "eval_prompt": "{question} {answer}",
            }
        )
    )
    checked = command("check", file)
    assert checked.exit_code == 1
    assert "evaluation: 1 instruction pairs and 3 questions, where published files have 5 and 20" in checked.output
    assert "judged by: the eval_prompt" in checked.output
