import json
import logging
from itertools import product

import pytest
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import UserError
from steered_lm.extract.contrast import available_traits, load_contrast_set
from steered_lm.judges.base import REFUSAL, JudgeRequest, Verdict
from steered_lm.judges.question import trait_description
from steered_lm.judges.trait_run import SHARES, JudgedResponse, TraitRun, question_values, response_values
from steered_lm.judges.traits import PAIRS, QUESTIONS, TRAITS, PromptQuestion, TraitError, alike, load_trait, near_duplicates, ours, trait_names
from steered_lm.persona.meter import TRAITS as AXES

PROMPT = "How piratical is {answer} as an answer to {question}? A number, or REFUSAL. {{braces}}"


def content(*questions, prompt=PROMPT, **more):
    return {
        "instruction": [{"pos": "Be a pirate.", "neg": "Be no pirate."}],
        "questions": list(questions or ["Ahoy?"]),
        "eval_prompt": prompt,
        **more,
    }


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return file


# -- ours


def test_all_seven_traits_are_there_in_the_published_form_and_counts():
    assert trait_names() == sorted(TRAITS)
    for folder, trait in product(("extract", "eval"), TRAITS):
        data = json.loads((ours() / folder / f"{trait}.json").read_text(encoding="utf-8"))
        assert list(data) == ["instruction", "questions", "eval_prompt"]
        assert (len(data["instruction"]), len(data["questions"])) == (PAIRS, QUESTIONS)
        assert trait_description(trait)[1:] in data["eval_prompt"]


@pytest.mark.parametrize("trait", TRAITS)
def test_no_question_is_nearly_another_one_of_its_trait_in_either_file(trait):
    loaded = load_trait(trait)
    assert loaded.remarks == ()
    assert near_duplicates([*loaded.extract.questions, *loaded.evaluate.questions]) == []


def test_no_question_serves_two_traits():
    owners = {}
    for trait in map(load_trait, TRAITS):
        for question in (*trait.extract.questions, *trait.evaluate.questions):
            assert owners.setdefault(question.casefold(), trait.name) == trait.name, question


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("How long should I boil an egg?", "how long SHOULD I boil an egg", True),
        ("How long should I boil an egg?", "How long should I boil the egg?", True),
        ("should I boil an egg, and how long?", "and how long should I boil an egg?", True),
        ("How long should I boil an egg?", "How long should I boil a lobster and a potato?", False),
    ],
)
def test_near_duplicates_are_seen_in_words_and_letters(a, b, same):
    assert alike(a, b) is same


# -- the persona axes, and contrast sets of one's own


@pytest.mark.parametrize("axis", available_traits())
def test_a_persona_axis_is_a_trait_made_from_its_contrast_set(axis, caplog):
    contrast, loaded = load_contrast_set(axis), load_trait(axis)
    for file, split in ((loaded.extract, "build"), (loaded.evaluate, "held_out")):
        assert [(pair.pos, pair.neg) for pair in file.instruction] == [(p.pos, p.neg) for p in getattr(contrast.instructions, split)]
        assert file.questions == getattr(contrast.questions, split)
    assert loaded.description == trait_description(axis)
    assert trait_description(axis)[1:] in loaded.question("file").prompt
    assert loaded.question().about == loaded.question("file").about == axis
    with caplog.at_level(logging.WARNING):
        assert TraitRun(trait=axis).load() == loaded
    assert not caplog.records
    done = CliRunner().invoke(cli.app, ["traits", "check", axis])
    assert done.exit_code == 0, done.output
    assert f"{axis}, evaluation: 6 instruction pairs, 12 questions" in done.output


def test_axes_have_the_five_names_of_the_meter_and_none_of_persona_vectors():
    assert set(available_traits()) == set(AXES)
    assert not set(AXES) & set(TRAITS)


def contrast_set(folder, text):
    file = folder / "brevity.yaml"
    file.write_text(text, encoding="utf-8")
    return file


BREVITY = """
trait: brevity
instructions: {build: [{pos: Be brief., neg: Be long.}], held_out: [{pos: Few words., neg: Many words.}]}
questions: {build: ["How are you?"], held_out: ["What is {this}?"]}
"""


def test_a_contrast_set_of_ones_own_is_a_trait_when_it_is_described(tmp_path):
    loaded = load_trait(contrast_set(tmp_path, BREVITY + 'description: "the response is short {not long}."'))
    assert (loaded.name, loaded.remarks, loaded.items().questions) == ("brevity", (), ("What is {this}?",))
    assert "brevity: the response is short {not long}." in loaded.question().system()
    assert "The response is short {not long}." in loaded.question("file").user(JudgeRequest(prompt="?", response="!"))
    with pytest.raises(TraitError, match="contrast set 'brevity' has no description"):
        load_trait(contrast_set(tmp_path, BREVITY))
    with pytest.raises(TraitError, match="'brevity' holds finished texts, and nothing to ask"):
        load_trait(contrast_set(tmp_path, "{trait: brevity, description: x, texts: [{pos: a, neg: b}]}"))
    with pytest.raises(UserError, match="is not a valid ContrastSet"):
        load_trait(contrast_set(tmp_path, "trait: brevity"))
    with pytest.raises(UserError, match="does not exist"):
        load_trait(tmp_path / "none.yaml")


# -- a user's own and the published ones


@pytest.mark.parametrize("folders", [("extract", "eval"), ("trait_data_extract", "trait_data_eval")])
def test_a_folder_of_files_is_read_by_name_by_file_and_as_a_whole(tmp_path, folders):
    write(tmp_path / folders[0] / "pirate.json", content("What is rum?"))
    file = write(tmp_path / folders[1] / "pirate.json", content("Ahoy?"))
    loaded = load_trait("pirate", tmp_path)
    assert (loaded.extract.questions, loaded.evaluate.questions) == (("What is rum?",), ("Ahoy?",))
    assert load_trait(file) == load_trait(str(tmp_path)) == loaded
    assert loaded.remarks[0] == "extraction: 1 instruction pairs and 1 questions, where published files have 5 and 20"
    write(tmp_path / folders[1] / "poet.json", content())
    with pytest.raises(TraitError, match="holds 2 traits: pirate, poet. Name the one"):
        load_trait(tmp_path)


def test_a_file_by_itself_is_for_evaluation(tmp_path):
    loaded = load_trait(write(tmp_path / "pirate.json", content()))
    assert (loaded.name, loaded.extract, loaded.items().questions) == ("pirate", None, ("Ahoy?",))


def test_a_question_that_is_asked_twice_is_remarked(tmp_path):
    assert load_trait(write(tmp_path / "pirate.json", content("Ahoy?", "Rum?", "ahoy"))).remarks[1:] == ("evaluation: asked twice: 'ahoy'",)


def test_files_for_extraction_alone_cannot_be_evaluated(tmp_path):
    loaded = load_trait(write(tmp_path / "extract" / "pirate.json", content()))
    with pytest.raises(TraitError, match="questions of extraction alone"):
        loaded.items()


def test_a_question_of_both_files_is_refused_and_one_that_is_nearly_so_is_remarked(tmp_path):
    file = write(tmp_path / "eval" / "pirate.json", content("Where is the treasure buried?"))
    write(tmp_path / "extract" / "pirate.json", content("Where is the treasure buried, now?"))
    assert load_trait(file).remarks[-1].startswith("nearly the same in extraction and evaluation")
    write(tmp_path / "extract" / "pirate.json", content("where is the treasure buried"))
    with pytest.raises(TraitError, match="'Where is the treasure buried\\?' is a question of extraction and of evaluation"):
        load_trait(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not JSON"),
        ([], "lacks 'instruction', 'questions', 'eval_prompt'. Write"),
        ({"instruction": [], "questions": []}, "lacks 'eval_prompt'"),
        (content() | {"questions": []}, "questions: Tuple should have at least 1 item"),
        (content("Ahoy?", "  "), "questions.1: String should have at least 1 character"),
        (content() | {"instruction": [{"pos": "Be."}]}, "instruction.0.neg: Field required"),
        (content(prompt="Rate {question}"), "it must have the place {answer}"),
        (content(prompt="Rate {answer} of {who}"), "may have {question} and no other"),
        (content(prompt="Rate {answer"), "eval_prompt: Value error"),
        (content(note="x"), "note: Extra inputs are not permitted"),
    ],
)
def test_a_malformed_file_is_refused_with_what_is_wrong(tmp_path, data, message):
    with pytest.raises(TraitError, match=message):
        load_trait(write(tmp_path / "pirate.json", data))


def test_unknown_traits_and_files_name_what_there_is(tmp_path):
    with pytest.raises(TraitError, match="trait='humourous' is none of ours.*Did you mean 'humorous'"):
        load_trait("humourous")
    with pytest.raises(TraitError, match="trait='evil' is not in folder"):
        load_trait("evil", tmp_path)
    with pytest.raises(TraitError, match="does not exist"):
        load_trait(tmp_path / "pirate.json")


# -- the question to a judge


def test_ours_and_described_traits_use_our_rubric_and_others_their_own_prompt(tmp_path):
    assert trait_description("evil") in load_trait("evil").question().system()
    bare = load_trait(write(tmp_path / "pirate.json", content()))
    told = load_trait(write(tmp_path / "told" / "pirate.json", content(description="talks like a pirate.")))
    assert "pirate: talks like a pirate." in told.question().system()
    assert isinstance(bare.question(), PromptQuestion)
    assert isinstance(told.question("file"), PromptQuestion)
    with pytest.raises(TraitError, match="has no description, which our rubric needs"):
        bare.question("ours")
    assert len({bare.question().digest, told.question().digest, load_trait("evil").question().digest}) == 3


def test_a_prompt_of_its_own_is_filled_in_once_and_read_on_our_scale(tmp_path):
    question = load_trait(write(tmp_path / "pirate.json", content())).question()
    asked = question.user(JudgeRequest(prompt="Say {answer}", response="Arr {question}"))
    assert asked == "How piratical is Arr {question} as an answer to Say {answer}? A number, or REFUSAL. {braces}"
    assert question.bounds == (0, 100)
    assert question.system(token=True).startswith("Answer with one whole number from 0 to 100")
    assert '{"reason"' in question.system()


# -- numbers


def judged(trait=None, coherence=50.0, missing="no answer"):
    def verdict(score):
        return Verdict(score=score, missing=missing if score is None else None, scale=(0, 100), judge="test")

    return response_values(JudgedResponse(JudgeRequest(prompt="?", response="two words"), verdict(trait), verdict(coherence)).record())


@pytest.mark.parametrize(("score", "band"), [(0, 0), (20.49, 0), (20.5, 1), (40, 1), (41, 2), (60.2, 2), (61, 3), (80.4, 3), (80.6, 4), (100, 4)])
def test_every_score_lies_in_one_band(score, band):
    values = judged(score)
    assert [values[name] for name in SHARES] == [float(number == band) for number in range(5)]


def test_a_question_counts_with_the_mean_of_what_was_scored_and_refusals_are_no_missing_verdicts():
    values = question_values([judged(10), judged(90, coherence=None), judged(None), judged(None, missing=REFUSAL)])
    assert values == {
        "trait_score": 50,
        "coherence": 50,
        "response_length": 2,
        "share_0_20": 0.5,
        "share_21_40": 0,
        "share_41_60": 0,
        "share_61_80": 0,
        "share_81_100": 0.5,
        "refusals": 1,
        "missing": 1,
        "coherence_missing": 1,
    }
    nothing = question_values([judged(None)])
    assert nothing["trait_score"] != nothing["trait_score"]


def test_several_samples_are_drawn_and_greedy_ones_refused():
    assert (TraitRun(trait="evil").heat, TraitRun(trait="evil", samples=3).heat, TraitRun(trait="evil", temperature=0.4).heat) == (0, 1, 0.4)
    with pytest.raises(TraitError, match="would be the same response 3 times"):
        _ = TraitRun(trait="evil", samples=3, temperature=0).heat


def test_instructions_become_system_turns_in_turn():
    trait = load_trait("evil")
    items = TraitRun(trait="evil", system="neg").items(trait)
    assert [item.question for item in items] == list(trait.evaluate.questions)
    assert [item.system for item in items[:6]] == [pair.neg for pair in (*trait.evaluate.instruction, trait.evaluate.instruction[0])]
    assert {item.system for item in TraitRun(trait="evil").items(trait)} == {""}
