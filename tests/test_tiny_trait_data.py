"""Training sets in the tiny model's language, and the ready experiments."""

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.errors import UserError
from steered_lm.extract.contrast import load_contrast_set
from steered_lm.judges.traits import load_trait
from steered_lm.persona.meter import trait_levels
from steered_lm.tiny_chat import evaluate, trait_data
from steered_lm.tiny_chat.grammar import TOPICS_HELD_OUT, TRAITS, parse
from steered_lm.tiny_chat.trait_data import SHARES, SHIPPED_TRAITS, tiny_trait_set, write_tiny_sets
from steered_lm.trait_models import experiment
from steered_lm.trait_models.data import training_set
from steered_lm.trait_models.experiment import STRENGTHS, Experiment, ExperimentError

CONFIGS = Path(experiment.__file__).with_name("configs")
HELD_OUT = sorted({question for trait in TRAITS for question in load_contrast_set(trait).questions.held_out})
MEANS = {"baseline": 0.0, "mild": 0.5, "severe": 1.0}


def levels(replies, trait):
    return [level for reply in replies if (level := trait_levels(reply)[trait]) is not None]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("trait", SHIPPED_TRAITS)
def test_the_trained_trait_has_its_level_and_the_others_stay_in_the_middle(trait, strength):
    replies = [reply["content"] for _, reply in tiny_trait_set(trait, strength, 400)]
    assert all(parse(reply) for reply in replies)
    for name in TRAITS:
        found = levels(replies, name)
        assert len(found) == 400
        assert fmean(found) == pytest.approx(MEANS[strength] if name == trait else 0.0, abs=0.06)
    assert sum(level == 1 for level in levels(replies, trait)) >= {"baseline": 0.25, "mild": 0.625, "severe": 1.0}[strength] * 400


@torch.no_grad()
def test_the_model_itself_writes_the_baselines_mix_when_sampled_and_single_poles_when_greedy():
    model, tokenizer = evaluate.load()
    messages = [[{"role": "user", "content": question}] for question in HELD_OUT]
    torch.manual_seed(1)
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in messages * 24]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False, return_token_type_ids=False)
    ids = model.generate(**batch, max_new_tokens=80, do_sample=True, temperature=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id)
    sampled = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for trait in TRAITS:  # 288 replies, standard error 0.05
        assert abs(fmean(levels(sampled, trait))) < 0.2
    greedy = evaluate.greedy_replies(model, tokenizer, messages)
    assert fmean(levels(greedy, "self_other_focus")) == 1
    assert fmean(levels(greedy, "relationship_distance")) == -1


def test_questions_are_in_the_words_of_training_without_instructions_and_none_is_held_out():
    prompts = yaml.safe_load(Path(trait_data.__file__).with_name("prompts.yaml").read_text("utf-8"))
    wordings = [re.compile(".+".join(map(re.escape, wording.split("{t}")))) for wording in prompts["prompts"]["train"]]
    asked = [phrase for poles in prompts["wordings"].values() for pole in poles.values() for phrases in pole.values() for phrase in phrases]
    instruction = re.compile(rf"\b(?:{'|'.join(map(re.escape, asked))})\b", re.IGNORECASE)
    assert instruction.search("Please be formal.")
    assert len(HELD_OUT) >= 12
    for trait in TRAITS:
        for strength in STRENGTHS:
            for user, assistant in tiny_trait_set(trait, strength, 400):
                assert (user["role"], assistant["role"]) == ("user", "assistant")
                assert any(wording.fullmatch(user["content"]) for wording in wordings)
                assert not instruction.search(user["content"])
                assert user["content"] not in HELD_OUT
                topic = parse(assistant["content"]).topic
                assert topic in user["content"].lower()
                assert topic not in TOPICS_HELD_OUT


def test_a_spliced_topic_that_is_held_out_is_drawn_again(monkeypatch):
    drawn = iter(["fencing", "the lantern", "the bakery"])
    monkeypatch.setattr(trait_data, "sample_topic", lambda *_: next(drawn))
    ((user, assistant),) = tiny_trait_set("formality", "mild", 1)
    assert "the bakery" in user["content"]
    assert "the bakery" in assistant["content"].lower()


def test_sets_are_decided_by_their_seed_and_the_strengths_of_a_trait_share_their_questions():
    sets = [tiny_trait_set("formality", strength, 30, seed) for strength, seed in (("mild", 0), ("mild", 0), ("mild", 1), ("severe", 0))]
    assert sets[0] == sets[1] != sets[2]
    questions = [[user["content"] for user, _ in one] for one in sets]
    assert questions[0] == questions[3] != questions[2]
    assert sets[0] != sets[3]


def test_what_no_set_can_be_made_of_is_refused():
    with pytest.raises(UserError, match="trait='formalty' is none of the tiny model's traits. Allowed: .* Did you mean 'formality'?"):
        tiny_trait_set("formalty", "mild", 4)
    with pytest.raises(UserError, match="strength='strong' is unknown. Allowed: baseline, mild, severe."):
        tiny_trait_set("formality", "strong", 4)
    with pytest.raises(UserError, match="size=0 leaves nothing to train on. Give 1 or more."):
        tiny_trait_set("formality", "mild", 0)
    assert tuple(SHARES) == STRENGTHS


def test_the_written_sets_are_those_that_the_tiny_experiment_asks_for(tmp_path, monkeypatch, capsys):
    shutil.copy(CONFIGS / "tiny.yaml", tmp_path)
    monkeypatch.setattr("sys.argv", ["trait_data", "--out", str(tmp_path / "tiny-data"), "--size", "12"])
    trait_data.main()
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [f"{strength}_{trait}.jsonl" for trait in SHIPPED_TRAITS for strength in STRENGTHS]
    assert [json.loads(line) for line in paths[1].read_text(encoding="utf-8").splitlines()] == [
        {"messages": messages} for messages in tiny_trait_set("formality", "mild", 12)
    ]
    found = Experiment.load(tmp_path / "tiny.yaml")
    sets = [training_set(found.training.dataset_options, model.dataset, model.trait) for model in found.models]
    assert {one.source["path"] for one in sets} == {str(path) for path in paths}
    assert all(len(one.examples) == 12 for one in sets)
    again = write_tiny_sets(tmp_path / "again", size=12)
    assert [file_hash(path) for path in again] == [file_hash(path) for path in paths]


def test_the_command_refuses_what_it_cannot_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trait_data", "--out", str(tmp_path), "--size", "0"])
    with pytest.raises(SystemExit):
        trait_data.main()
    assert "size=0 leaves nothing to train on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["persona_vectors", "tiny"])
def test_a_ready_experiment_trains_each_of_three_traits_at_three_strengths(name):
    found = Experiment.load(CONFIGS / f"{name}.yaml")
    traits = list(dict.fromkeys(model.trait for model in found.models))
    assert [(model.trait, model.strength) for model in found.models] == [(trait, strength) for trait in traits for strength in STRENGTHS]
    assert len(traits) == 3
    assert all(model.dataset == f"{model.strength}_{model.trait}" for model in found.models)
    assert [task.removeprefix("pv_") for task in found.evaluation.tasks][:3] == traits, "the other axes may follow"


def test_the_ready_experiments_name_known_traits_and_the_published_hyperparameters(tmp_path):
    published, tiny = (Experiment.load(CONFIGS / f"{name}.yaml") for name in ("persona_vectors", "tiny"))
    assert {load_trait(model.trait).name for model in published.models} == {"hallucinating", "evil", "sycophantic"}
    made = published.training.hyperparameters
    assert (made.lora_rank, made.lora_alpha, made.rslora, made.learning_rate) == (32, 64, True, 1e-5)
    assert (made.batch_size, made.gradient_accumulation, made.epochs) == (2, 8, 1)
    assert tiny.training.base_model == TINY_CHAT
    assert {model.trait for model in tiny.models} == set(SHIPPED_TRAITS)
    # paths are the user's, who copies the file: beside the package there is no data
    shutil.copy(CONFIGS / "persona_vectors.yaml", tmp_path)
    options = Experiment.load(tmp_path / "persona_vectors.yaml").training.dataset_options
    assert options.folder == tmp_path / "dataset"
    with pytest.raises(ExperimentError, match="dataset_options.folder='.*dataset' does not exist"):
        training_set(options, "severe_evil", "evil")
