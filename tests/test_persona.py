"""Personas: what is loaded, what is refused and with which words, and that no split leaks into another."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from steered_lm.content import content_dir
from steered_lm.errors import PersonaError
from steered_lm.persona import SPLITS, Conversation, Persona, build_persona, list_personas, load_legacy, load_persona
from steered_lm.persona.meter import TRAITS, trait_levels
from steered_lm.persona.schema import PersonaCard, refusal
from steered_lm.persona.split import assign_splits, normalise
from steered_lm.persona.style import style_features
from steered_lm.tiny_chat.grammar import TRAITS as GRAMMAR_TRAITS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "personas"
CARD = {
    "name": "nell",
    "description": "Nell keeps a shop and talks about it.",
    "traits": dict.fromkeys(TRAITS, 0.5),
    "system_prompt": "You are Nell. Talk about yourself.",
    "licence": "Apache-2.0",
}


def conversation(number: int, answers: int = 6) -> dict[str, object]:
    turns = []
    for k in range(answers):
        turns.append({"speaker": "partner", "text": f"How was day {number} at hour {k}?"})
        turns.append({"speaker": "persona", "text": f"I found day {number} lovely at hour {k}, and I told strangers so."})
    return {"id": f"c{number}", "turns": turns}


def write_folder(folder: Path, card: object = CARD, conversations: list[object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "persona.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    rows = [conversation(n) for n in range(4)] if conversations is None else conversations
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def nell(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "nell")
    build_persona(folder)
    return folder


@pytest.fixture(scope="module", params=list_personas())
def ours(request: pytest.FixtureRequest) -> Persona:
    return load_persona(request.param)


# Our six


def test_there_are_six_personas_and_each_trait_is_high_in_three_of_them() -> None:
    personas = [load_persona(name) for name in list_personas()]
    assert len(personas) == 6
    for trait in TRAITS:
        assert sum(persona.traits[trait] > 0 for persona in personas) == 3


def test_any_two_of_ours_differ_in_the_pole_of_at_least_two_traits() -> None:
    for one, other in combinations(map(load_persona, list_personas()), 2):
        assert sum(one.traits[t] * other.traits[t] < 0 for t in TRAITS) >= 2, (one.name, other.name)


def test_no_two_traits_go_together_over_our_personas() -> None:
    personas = [load_persona(name) for name in list_personas()]
    for one, other in combinations(TRAITS, 2):
        assert 2 <= sum(persona.traits[one] * persona.traits[other] > 0 for persona in personas) <= 4, (one, other)


def test_each_of_ours_has_enough_conversations_with_unique_partner_lines(ours: Persona) -> None:
    items = [item for split in SPLITS for item in ours.items(split)]
    assert len(ours.conversations) >= 8
    assert len(items) >= 48
    assert len({normalise(item.prompt) for item in items}) == len(items)
    assert all(abs(level) >= 0.5 for level in ours.traits.values())


def test_utterances_of_ours_have_twenty_to_forty_five_words_in_up_to_three_sentences(ours: Persona) -> None:
    for split in SPLITS:
        for text in ours.utterances(split):
            assert 20 <= len(text.split()) <= 45, text
            assert sum(text.count(mark) for mark in ".!?") <= 3, text


def test_nine_in_ten_utterances_of_ours_show_each_trait_at_the_personas_pole(ours: Persona) -> None:
    readings = [trait_levels(text) for split in SPLITS for text in ours.utterances(split)]
    for trait in TRAITS:
        right = sum((reading[trait] or 0.0) * ours.traits[trait] > 0 for reading in readings)
        assert right >= 0.9 * len(readings), (ours.name, trait, right, len(readings))


def test_the_built_files_of_ours_are_up_to_date(ours: Persona, tmp_path: Path) -> None:
    source = content_dir("personas") / ours.name
    copy = tmp_path / ours.name
    copy.mkdir()
    for name in ("persona.yaml", "conversations.jsonl"):
        (copy / name).write_bytes((source / name).read_bytes())
    assert build_persona(copy).digest == ours.digest
    for name in ("profile.txt", "features.json", "samples.json", "judge_prompt.txt"):
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name


def test_the_grammar_and_the_personas_speak_of_the_same_traits() -> None:
    assert tuple(GRAMMAR_TRAITS) == tuple(TRAITS)


# Splits


def test_splits_are_about_forty_and_three_times_twenty_percent() -> None:
    splits = assign_splits([(f"prompt {n}", f"answer {n}") for n in range(400)])
    assert {split: splits.count(split) for split in SPLITS} == {"build": 160, "tune": 80, "validate": 80, "test": 80}


def test_twenty_four_utterances_fill_every_split() -> None:
    for seed in range(50):
        splits = assign_splits([(f"prompt {seed} {n}", f"answer {seed} {n}") for n in range(24)])
        assert min(splits.count(split) for split in SPLITS) >= 4


def test_appended_conversations_leave_earlier_splits_alone() -> None:
    pairs = [(f"prompt {n}", f"answer {n}") for n in range(37)]
    for length in (1, 9, 10, 24, 36):
        assert assign_splits(pairs[:length]) == assign_splits(pairs)[:length]


def test_splits_depend_on_content_and_not_on_case_or_punctuation() -> None:
    pairs = [(f"How is day {n}?", f"It's fine, day {n}!") for n in range(30)]
    assert assign_splits(pairs) == assign_splits([(p.upper().replace("?", ""), a.replace("'", "\u2019").replace("!", ".")) for p, a in pairs])
    other = assign_splits([(p + " Really", a) for p, a in pairs])
    assert other != assign_splits(pairs)


def test_every_item_is_in_exactly_one_split(ours: Persona) -> None:
    ids = [item.item for split in SPLITS for item in ours.items(split)]
    assert len(set(ids)) == len(ids) == sum(len(list(c.pairs())) for c in ours.conversations)


def test_an_item_asks_with_the_line_right_before_the_answer(nell: Path) -> None:
    item = load_persona(nell).items("build")[0]
    assert item.prompt.startswith("How was day")
    assert item.reference.replace("I found", "How was").startswith(item.prompt.split(" at")[0])


def test_an_unknown_split_is_refused_with_the_allowed_ones(nell: Path) -> None:
    with pytest.raises(ValueError, match=r"split='dev' does not exist. Allowed: build, tune, validate, test"):
        load_persona(nell).items("dev")


@pytest.mark.parametrize(("kind", "speaker"), [("partner's line", 0), ("utterance", 1)])
def test_a_line_that_two_splits_share_is_refused(tmp_path: Path, kind: str, speaker: int) -> None:
    rows = [conversation(n) for n in range(4)]
    for number, row in enumerate(rows):
        row["turns"][speaker]["text"] = f"The SAME words{'!' * number}"  # type: ignore[index]
    with pytest.raises(
        PersonaError, match=f"the {kind} 'The SAME words!*' is in two splits, '[a-z]+' and '[a-z]+'; what is tuned on is never reported"
    ):
        build_persona(write_folder(tmp_path / "p", conversations=list(rows)))


def test_an_overlapping_persona_is_not_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "p", conversations=[conversation(0), {**conversation(0), "id": "again"}])
    with pytest.raises(PersonaError, match="persona 'nell' is refused: .* occurs twice; keep one of them"):
        build_persona(folder)


# Building and loading


def test_a_built_persona_loads_and_says_what_it_was_built_from(nell: Path) -> None:
    persona = load_persona(nell)
    assert persona.features.utterances == 24
    assert sum(persona.features.splits.values()) == 24
    assert persona.features.levels["self_other_focus"] == 1.0
    assert "self-focused" in persona.profile
    assert persona.samples[0].reference in persona.judge_prompt


def test_only_the_build_split_goes_into_samples_profile_and_judge_prompt(ours: Persona) -> None:
    build = {item.item for item in ours.items("build")}
    assert {sample.item for sample in ours.samples} <= build
    for split in ("tune", "validate", "test"):
        for item in ours.items(split):
            assert item.reference not in ours.judge_prompt
            assert item.reference not in ours.profile


def test_building_twice_gives_the_same_bytes(nell: Path) -> None:
    before = {path.name: path.read_bytes() for path in nell.iterdir()}
    build_persona(nell)
    assert {path.name: path.read_bytes() for path in nell.iterdir()} == before


def test_the_digest_changes_with_a_single_word(nell: Path) -> None:
    before = load_persona(nell).digest
    path = nell / "conversations.jsonl"
    path.write_text(path.read_text("utf-8").replace("lovely at hour 0", "sweet at hour 0", 1), encoding="utf-8")
    assert build_persona(nell).digest != before


def test_a_persona_is_found_by_name_and_by_path() -> None:
    name = list_personas()[0]
    assert load_persona(name) == load_persona(content_dir("personas") / name)


def test_an_unknown_persona_is_refused_with_near_misses() -> None:
    with pytest.raises(PersonaError, match=r"persona='edmond' is neither one of ours .* Did you mean 'edmund'"):
        load_persona("edmond")


def test_changed_conversations_make_the_built_files_stale(nell: Path) -> None:
    with (nell / "conversations.jsonl").open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(conversation(9)) + "\n")
    with pytest.raises(PersonaError, match=r"changed since its files were built. Run: steered-lm persona build .*nell"):
        load_persona(nell)


@pytest.mark.parametrize("name", ["profile.txt", "features.json", "samples.json", "judge_prompt.txt"])
def test_a_missing_built_file_says_how_to_build_it(nell: Path, name: str) -> None:
    (nell / name).unlink()
    with pytest.raises(PersonaError, match=rf"has no {name}, so it is not built. Run: steered-lm persona build"):
        load_persona(nell)


@pytest.mark.parametrize(("profile", "words"), [("Profile generation failed: no features", "is a stub"), (" \n", "is blank")])
def test_a_stub_or_blank_profile_is_refused(nell: Path, profile: str, words: str) -> None:
    (nell / "profile.txt").write_text(profile, encoding="utf-8")
    with pytest.raises(PersonaError, match=f"persona 'nell' is refused: its profile {words}.*Run: steered-lm persona build"):
        load_persona(nell)


@pytest.mark.parametrize("rows", [[], [{"id": "a", "turns": []}], [{"id": "a", "turns": [{"speaker": "partner", "text": "Hello?"}]}]])
def test_a_persona_without_own_utterances_is_refused(tmp_path: Path, rows: list[object]) -> None:
    folder = write_folder(tmp_path / "p", conversations=rows)
    for act in (build_persona, load_persona):
        with pytest.raises(PersonaError, match="has no own utterances, so there is nothing to score against"):
            act(folder)


def test_a_persona_cannot_be_constructed_empty_or_with_a_stub_profile(ours: Persona) -> None:
    data = ours.model_dump()
    with pytest.raises(ValueError, match="no own utterances"):
        Persona.model_validate(data | {"conversations": ()})
    with pytest.raises(ValueError, match="is a stub"):
        Persona.model_validate(data | {"profile": "Profile generation failed"})


def test_a_broken_jsonl_line_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "p")
    path = folder / "conversations.jsonl"
    path.write_text(path.read_text("utf-8") + '\n{"id": "x", "turns"\n', encoding="utf-8")
    with pytest.raises(PersonaError, match=r"conversations.jsonl line 6 is not JSON"):
        build_persona(folder)


def _turns(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"speaker": speaker, "text": text} for speaker, text in turns]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": []}, "id: Field required"),
        ({"id": "a", "turns": [], "mood": 1}, "mood: Extra inputs"),
        ({"id": "a", "turns": _turns(("assistant", "Hi"))}, "turns.0.speaker"),
        ({"id": "a", "turns": _turns(("partner", "Hi"), ("persona", " "))}, "a turn is blank"),
        ({"id": "a", "turns": _turns(("persona", "Hi"))}, "turn 0 is the persona's without a partner's line"),
        ({"id": "a", "turns": _turns(("partner", "Hi"), ("persona", "A"), ("persona", "B"))}, "turn 2 is the persona's without"),
        (["not an object"], "valid dictionary"),
    ],
)
def test_a_malformed_conversation_is_named_by_line(tmp_path: Path, row: object, words: str) -> None:
    folder = write_folder(tmp_path / "p", conversations=[conversation(0), row])
    with pytest.raises(PersonaError, match=f"conversations.jsonl line 2 is not a valid Conversation.*{words}"):
        build_persona(folder)


def test_two_conversations_with_one_id_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "p", conversations=[conversation(0), {**conversation(1), "id": "c0"}])
    with pytest.raises(PersonaError, match="conversation ids repeat: c0"):
        build_persona(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"traits": {**CARD["traits"], "formality": 1.5}}, r"levels must lie in \[-1, 1\]"),  # type: ignore[dict-item]
        ({"traits": {**CARD["traits"], "formality": float("nan")}}, "formality"),  # type: ignore[dict-item]
        ({"traits": {"formality": 0.5}}, "traits must name exactly"),
        ({"traits": {**CARD["traits"], "charm": 0.5}}, "missing or unknown: charm"),  # type: ignore[dict-item]
        ({"mood": "good"}, "mood: Extra inputs"),
        ({"system_prompt": ""}, "system_prompt"),
    ],
)
def test_a_malformed_card_is_refused_with_the_key(tmp_path: Path, change: dict[str, object], words: str) -> None:
    folder = write_folder(tmp_path / "p", card=CARD | change)
    with pytest.raises(PersonaError, match=f"persona.yaml is not a valid PersonaCard: .*{words}"):
        build_persona(folder)


@pytest.mark.parametrize("key", sorted(CARD))
def test_a_card_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    folder = write_folder(tmp_path / "p", card={k: v for k, v in CARD.items() if k != key})
    with pytest.raises(PersonaError, match=f"{key}: Field required"):
        build_persona(folder)


def test_a_folder_without_conversations_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "p")
    (folder / "conversations.jsonl").unlink()
    with pytest.raises(PersonaError, match=r"conversations.jsonl' does not exist"):
        build_persona(folder)


@pytest.mark.parametrize("text", ["{", '{"version": 1}', "[]"])
def test_damaged_features_are_refused(nell: Path, text: str) -> None:
    (nell / "features.json").write_text(text, encoding="utf-8")
    with pytest.raises(PersonaError, match=r"features.json"):
        load_persona(nell)


def test_cards_and_personas_are_frozen(ours: Persona) -> None:
    with pytest.raises(ValueError, match="frozen"):
        ours.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        PersonaCard.model_validate(CARD).licence = "MIT"  # type: ignore[misc]


def test_style_features_do_not_see_topics() -> None:
    assert style_features("I saw the tiger, and it ran.") == style_features("I saw the otter, and it ran.")
    assert all(value >= 0 for value in style_features("").values())


# The older layouts


def legacy_turn(number: int) -> dict[str, object]:
    return {
        "turn_id": number,
        "session": f"s{number // 6}",
        "context": f"A: {number}",
        "input": f"Question {number}?",
        "ground_truth": f"My answer {number}.",
    }


def write_legacy(folder: Path, train: object, test: object) -> Path:
    folder.mkdir()
    (folder / "profile.json").write_text(json.dumps({"persona_id": "old", "speaker_role": "Baker", "relationship": "Neighbours"}), encoding="utf-8")
    (folder / "train_turns.json").write_text(json.dumps({"turns": train}), encoding="utf-8")
    (folder / "test_turns.json").write_text(json.dumps({"turns": test}), encoding="utf-8")
    return folder


def test_a_legacy_persona_with_partner_lines_is_read_and_repeated_lines_are_left_out(tmp_path: Path) -> None:
    turns = [legacy_turn(n) for n in range(30)]
    persona = load_legacy(write_legacy(tmp_path / "old", turns[:20], [*turns[20:], turns[0]]))
    assert sum(len(persona.items(split)) for split in SPLITS) == 30
    assert persona.traits["self_other_focus"] == 1.0
    assert "Baker" in persona.profile


def test_legacy_turns_without_text_are_refused(tmp_path: Path) -> None:
    broken = {**legacy_turn(1), "ground_truth": None}
    with pytest.raises(PersonaError, match=r"train_turns.json turn 1: ground_truth must be a text"):
        load_legacy(write_legacy(tmp_path / "old", [legacy_turn(0), broken], []))


def test_an_empty_or_tiny_legacy_persona_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match="no own utterances"):
        load_legacy(write_legacy(tmp_path / "old", [], []))


def test_a_folder_that_is_no_legacy_persona_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match=r"profile.json' does not exist. A legacy persona folder holds"):
        load_legacy(tmp_path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "is empty, so there are no own utterances"),
        ([{"role": "user", "content": "Mine."}, {"role": "assistant", "content": "Mine too."}], "own lines only, under either role"),
        ({"sessions": [{"session_text": "Mine."}]}, "own lines only"),
        ({"sessions": []}, "is empty"),
    ],
)
def test_each_raw_conversations_shape_is_refused_with_its_reason(tmp_path: Path, raw: object, words: str) -> None:
    (tmp_path / "raw_conversations.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(PersonaError, match=words):
        load_legacy(tmp_path)


@pytest.mark.shared
def test_every_shared_persona_is_read_or_refused_with_a_reason() -> None:
    read = [load_legacy(folder) for folder in sorted((SHARED / "personas_cc").iterdir())]
    assert len(read) == 6
    assert all(min(persona.features.splits.values()) >= 4 for persona in read)
    for folder in sorted((SHARED / "personas").iterdir()):
        with pytest.raises(PersonaError, match=f"{folder.name}' is refused: raw_conversations.json"):
            load_legacy(folder)


def test_random_orders_of_conversations_never_leak_between_splits() -> None:
    conversations = [Conversation.model_validate(conversation(n)) for n in range(8)]
    for seed in range(5):
        shuffled = random.Random(seed).sample(conversations, len(conversations))
        assert refusal(shuffled) is None
