"""The tiny chat model's language and facts; no torch."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steered_lm.persona.meter import TRAITS as METER_TRAITS
from steered_lm.persona.meter import marker_counts, trait_levels
from steered_lm.tiny_chat import grammar
from steered_lm.tiny_chat.facts import fact_exchanges, knowledge_items, truth_items, write_items
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, TOPICS_TRAIN, TRAITS, parse, sample_dialogue, sample_reply, slot_phrases, system_turn

ROOT = Path(__file__).parents[1]
CONTRAST_SETS = {t: yaml.safe_load((ROOT / f"steered_lm/extract/contrast_sets/{t}.yaml").read_text("utf-8")) for t in TRAITS}


def _replies(n: int, seed: int = 0) -> list[tuple[str, str, dict[str, float]]]:
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        topic = rng.choice(TOPICS_TRAIN + TOPICS_HELD_OUT)
        levels = {t: rng.choice((0.0, 0.5, 1.0)) for t in TRAITS}
        out.append((topic, sample_reply(topic, levels, rng), levels))
    return out


def test_every_drawn_reply_parses_and_shows_its_levels() -> None:
    for topic, reply, levels in _replies(500):
        parsed = parse(reply, topic)
        assert parsed is not None, reply
        assert parse(reply) is not None
        for trait, level in levels.items():
            if level != 0.5:
                assert parsed.levels[trait] == 2 * level - 1, (trait, reply)


@pytest.mark.parametrize("damage", ["swap", "drop", "double", "lower", "cut"])
def test_a_damaged_reply_does_not_parse(damage: str) -> None:
    for topic, reply, _ in _replies(200, seed=1):
        words = reply.split()
        i = len(words) // 2
        broken = {
            "swap": [*words[:i], words[i + 1], words[i], *words[i + 2 :]],
            "drop": words[:2] + words[3:] if "the" in words[2] else [*words[:-1], "."],
            "double": [*words[:i], words[i], *words[i:]],
            "lower": [words[0].lower() if words[0] != "I" else "i", *words[1:]],
            "cut": words[:-2],
        }[damage]
        assert parse(" ".join(broken), topic) is None, " ".join(broken)


def test_a_reply_about_another_topic_does_not_parse() -> None:
    reply = sample_reply("the bakery", {}, random.Random(0))
    assert parse(reply, "the bakery") is not None
    assert parse(reply, "the garden") is None
    misspelt = parse(reply.replace("the bakery", "the bakerry"))
    assert misspelt is not None
    assert misspelt.topic == "the bakerry"
    assert parse(reply.replace("the bakery", "the bakery the bakery the bakery")) is None


def test_every_trait_shows_at_least_three_times_and_in_every_clause() -> None:
    lexicon = grammar._LEXICON
    for clause in lexicon["openings"] + lexicon["followups"]:
        assert set(re.findall(r"\{([A-Z])\.", clause)) == set(grammar.CODES), clause


def test_every_slot_phrase_marks_its_own_trait_and_pole_only() -> None:
    for trait, pole, phrase in slot_phrases():
        for other, (high, low) in marker_counts(phrase).items():
            if other == trait:
                assert (high > 0, low > 0) == (pole == "high", pole == "low"), (trait, pole, phrase)
            else:
                assert high == low == 0, (trait, phrase, other)


def test_the_trait_meter_agrees_with_the_parser() -> None:
    for topic, reply, levels in _replies(300, seed=2):
        measured = trait_levels(reply)
        for trait, level in levels.items():
            if level != 0.5:
                assert measured[trait] == 2 * level - 1, (trait, topic, reply)
    assert METER_TRAITS == TRAITS


def test_the_trait_meter_is_silent_without_markers_and_ignores_case() -> None:
    assert trait_levels("Nothing here.") == dict.fromkeys(TRAITS, None)
    assert trait_levels("INDEED. It is.")["formality"] == 1.0
    assert trait_levels("It is.")["narrative_mode"] is None
    assert trait_levels("Yeah, it\u2019s fine, indeed.")["formality"] == pytest.approx(-1 / 3)


def test_splits_share_no_topic_no_phrasing_and_no_system_wording() -> None:
    prompts = grammar._PROMPTS
    assert not set(TOPICS_TRAIN) & set(TOPICS_HELD_OUT)
    assert len(TOPICS_TRAIN) >= 250
    assert len(TOPICS_HELD_OUT) >= 40
    assert not set(prompts["prompts"]["train"]) & set(prompts["prompts"]["held_out"])
    for frames in prompts["frames"].values():
        assert not set(frames["train"]) & set(frames["held_out"])
        assert len(frames["held_out"]) >= len(frames["train"]) // 4
    for trait in TRAITS:
        for pole in ("high", "low"):
            words = prompts["wordings"][trait][pole]
            assert len(words["adjectives"]) >= 6
            assert len(words["held_out"]) >= len(words["train"]) / 4
            assert not set(words["train"]) & set(words["held_out"])


def test_dialogues_are_a_function_of_the_seed() -> None:
    first, second = ([sample_dialogue(random.Random(s)) for s in range(20)] for _ in range(2))
    assert first == second
    assert len({str(d.messages()) for d in first}) == 20


def test_contrast_sets_are_large_split_and_matched() -> None:
    for trait, contrast in CONTRAST_SETS.items():
        build, held_out = contrast["instructions"]["build"], contrast["instructions"]["held_out"]
        assert contrast["trait"] == trait
        assert len(build) >= 15
        assert len(held_out) >= 5
        assert len(build) + len(held_out) >= 20
        texts = [p[side] for p in build + held_out for side in ("pos", "neg")]
        assert len(set(texts)) == len(texts)
        for pair in build + held_out:
            assert abs(len(pair["pos"].split()) - len(pair["neg"].split())) <= 2, pair
        questions = contrast["questions"]
        assert len(questions["build"]) >= 30
        assert len(questions["held_out"]) >= 10
        assert len(set(questions["build"]) | set(questions["held_out"])) == len(questions["build"]) + len(questions["held_out"]) >= 40


def test_contrast_set_sentences_are_no_system_turn_of_training() -> None:
    wanted = {p[s] for c in CONTRAST_SETS.values() for part in c["instructions"].values() for p in part for s in ("pos", "neg")}
    prompts = grammar._PROMPTS
    trained = set()
    for trait in TRAITS:
        for pole in ("high", "low"):
            words = prompts["wordings"][trait][pole]
            trained |= {f.format(k=k) for f in prompts["frames"]["adjective"]["train"] for k in words["adjectives"]}
            trained |= {f.format(vp=v, Vp=v[0].upper() + v[1:]) for f in prompts["frames"]["imperative"]["train"] for v in words["train"]}
    assert not wanted & trained


def test_system_turns_ask_in_words_of_the_asked_pole() -> None:
    words = grammar._PROMPTS["wordings"]["formality"]["low"]
    for seed in range(50):
        text = system_turn({"formality": "low"}, random.Random(seed), "held_out").lower()
        assert any(w.lower() in text for w in words["adjectives"] + words["held_out"])


def test_choice_items_are_well_formed_and_their_wordings_are_new() -> None:
    asked = {q for q, _ in fact_exchanges()}
    knowledge, truth = knowledge_items(), truth_items()
    assert len(knowledge) >= 60
    assert len({i["subject"] for i in knowledge}) >= 4
    assert len(truth) >= 40
    for item in knowledge:
        assert len(set(item["choices"])) == 4
        assert 0 <= item["answer"] < 4
        assert item["question"] not in asked
    for item in truth:
        targets = item["mc1_targets"]
        assert len(set(targets["choices"])) == 4
        assert sorted(targets["labels"]) == [0, 0, 0, 1]
        assert item["question"] not in asked


def test_shipped_items_are_what_the_facts_give(tmp_path: Path) -> None:
    write_items(tmp_path)
    for name in ("tiny_knowledge", "tiny_truth"):
        assert (tmp_path / name / "items.jsonl").read_bytes() == (ROOT / "tasks" / name / "items.jsonl").read_bytes()


def test_the_grammar_imports_no_torch() -> None:
    code = "import sys, steered_lm.tiny_chat.grammar, steered_lm.tiny_chat.facts, steered_lm.persona.meter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
