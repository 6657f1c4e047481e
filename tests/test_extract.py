import json

import pytest
import torch
from tiny_models import FAMILIES, random_model

from steered_lm.errors import ModelError, UserError, VectorsError
from steered_lm.extract.activations import Row, collect, recorded
from steered_lm.extract.build import ExtractConfig, build_vectors
from steered_lm.extract.contrast import ContrastSet, available_traits, load_contrast_set, load_pair_lists
from steered_lm.extract.directions import describe, direction
from steered_lm.judges.traits import TRAITS as PUBLISHED
from steered_lm.judges.traits import load_trait
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import TraitVectors

TRAITS = ["emotional_tone", "formality", "narrative_mode", "relationship_distance", "self_other_focus"]


class CharTokenizer:
    """One token a character; enough of a tokenizer for extraction."""

    pad_token_id, eos_token_id, chat_template, name_or_path = 0, 2, None, "chars"

    def __call__(self, text, add_special_tokens=True):
        class Encoding:
            input_ids = ([1] if add_special_tokens else []) + [3 + ord(c) % 60 for c in text]

        return Encoding()

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(60 + int(t)) for t in tokens if int(t) > 2)


def texts(trait="formality", n=24):
    return ContrastSet.model_validate(
        {"trait": trait, "texts": [{"pos": f"{'ABC'[i % 3]}aaaa{i}", "neg": f"{'ABC'[i % 3]}zzzz{i}"} for i in range(n)]}
    )


def matched(n, d=16, shift=2.0, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    trait = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    return shift * trait + noise * torch.randn(n, d, generator=generator), trait


@pytest.mark.parametrize("trait", TRAITS)
def test_each_persona_trait_has_a_contrast_set_with_enough_variation_and_no_overlap(trait):
    contrast = load_contrast_set(trait)
    assert contrast.trait == trait
    instructions = contrast.instructions.build + contrast.instructions.held_out
    questions = contrast.questions.build + contrast.questions.held_out
    assert len(set(instructions)) >= 20
    assert len(set(questions)) >= 40
    build, held = contrast.pairs("build", 120), contrast.pairs("held_out", 60)
    assert len({(p.question, p.pos) for p in build}) == 120
    assert not {p.question for p in build} & {p.question for p in held}
    assert not {p.pos for p in build} & {p.pos for p in held}
    assert len({p.pos for p in build}) == len(contrast.instructions.build)
    assert len({p.question for p in build}) == len(contrast.questions.build)


def test_the_two_sides_of_a_pair_differ_in_a_few_words_only():
    for trait in TRAITS:
        for pair in load_contrast_set(trait).instructions.build:
            assert abs(len(pair.pos.split()) - len(pair.neg.split())) <= 4, (trait, pair)


def test_ours_are_listed_and_unknown_ones_get_near_misses():
    assert set(TRAITS) <= set(available_traits())
    with pytest.raises(UserError, match="traits='formalty' has no contrast set.*Did you mean 'formality'"):
        load_contrast_set("formalty")


def test_the_older_pair_list_format_is_read(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"R2": [{"pos": "Good day.", "neg": "Hi!"}] * 1, "mine": [{"pos": "a", "neg": "b"}]}))
    assert [c.trait for c in load_pair_lists(tmp_path / "p.json")] == ["formality", "mine"]
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a pair list"):
        load_pair_lists(tmp_path / "bad.json")


def published(folder, name, questions, pairs=3):
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    instruction = [{"pos": f"be {i}", "neg": f"do not be {i}"} for i in range(pairs)]
    file.write_text(json.dumps({"instruction": instruction, "questions": questions, "eval_prompt": "{question} {answer}"}))
    return file


@pytest.mark.parametrize("trait", PUBLISHED)
def test_the_traits_of_persona_vectors_are_contrast_sets_that_hold_out_a_pair_and_the_evaluation_s_questions(trait):
    found, files = load_contrast_set(trait), load_trait(trait)
    assert found.trait == trait
    assert found.description == files.description
    assert found.questions.build == files.extract.questions
    assert found.questions.held_out == files.evaluate.questions
    pairs = [(pair.pos, pair.neg) for pair in files.extract.instruction]
    assert [(pair.pos, pair.neg) for pair in found.instructions.build] == pairs[:-1]
    assert [(pair.pos, pair.neg) for pair in found.instructions.held_out] == pairs[-1:]
    assert len(found.pairs("held_out", 60)) == 20


def test_a_file_in_the_published_form_is_a_contrast_set_and_alone_holds_out_a_quarter_of_its_questions(tmp_path):
    whole = [f"question {i}?" for i in range(8)]
    alone = load_contrast_set(str(published(tmp_path, "odd", whole)))
    assert (alone.trait, alone.questions.build, alone.questions.held_out) == ("odd", tuple(whole[:6]), tuple(whole[6:]))
    published(tmp_path / "eval", "odd", ["another?"])
    both = load_contrast_set(str(published(tmp_path / "extract", "odd", whole)))
    assert (both.questions.build, both.questions.held_out) == (tuple(whole), ("another?",))
    with pytest.raises(UserError, match="too little to hold some of it out"):
        load_contrast_set(str(published(tmp_path, "small", whole, pairs=1)))
    with pytest.raises(UserError, match=r"'evli' has no contrast set\..*Did you mean 'evil'"):
        load_contrast_set("evli")


def test_overlapping_splits_are_refused():
    pair = {"pos": "Be a.", "neg": "Be b."}
    data = {"trait": "t", "instructions": {"build": [pair], "held_out": [pair]}, "questions": {"build": ["x"], "held_out": ["y"]}}
    with pytest.raises(UserError, match="stands in both splits"):
        ContrastSet.parse(data, source="test")


def test_svd_and_mean_diff_find_a_planted_direction_and_its_sign():
    differences, trait = matched(200)
    for method in ("svd", "mean_diff"):
        found = direction(differences, method).vector
        assert float(found @ trait) > 0.97
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)
        assert float(direction(-differences, method).vector @ trait) < -0.97


def test_svd_is_the_first_right_singular_vector_of_uncentred_differences():
    differences, _ = matched(40)
    _, values, right = torch.linalg.svd(differences)
    found = direction(differences, "svd")
    assert abs(float(found.vector @ right[0])) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(found.singular_values, values, atol=1e-4, rtol=1e-4)


def test_pca_looks_at_variation_around_the_mean_and_misses_a_common_shift():
    differences, trait = matched(200, shift=3.0, noise=0.3)
    differences[:, 0] += 3.0 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    pca = direction(differences, "pca").vector
    assert abs(float(pca[0])) > 0.95
    assert abs(float(direction(differences, "mean_diff").vector @ trait)) > 0.9


def test_unmatched_noise_is_reported_as_chance_and_a_trait_is_not():
    signal, _ = matched(100)
    good = describe(direction(signal[:60], "svd"), "svd", signal[:60], signal[60:])
    assert not good.at_chance
    assert good.held_out_right_side > 0.9
    assert set(good.cosine) == {"mean_diff", "pca"}
    noise, _ = matched(100, shift=0.0)
    bad = describe(direction(noise[:60], "svd"), "svd", noise[:60], noise[60:])
    assert bad.at_chance
    assert bad.explained_variance == pytest.approx(float(direction(noise[:60], "svd").singular_values[0] ** 2 / (noise[:60] ** 2).sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("data", "message"), [(torch.zeros(1, 4), "at least 2"), (torch.zeros(5, 4), "same activations"), (torch.full((5, 4), float("nan")), "NaN")]
)
def test_degenerate_differences_are_refused(data, message):
    with pytest.raises(VectorsError, match=message):
        direction(data, "svd")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma3"])
def test_pooled_activations_equal_unbatched_ones(family):
    model, tokenizer = random_model(family), CharTokenizer()
    blocks = find_blocks(model)
    rows = [Row("how are you", "fine"), Row("a", "bcdefgh"), Row("", "alone")]
    for pooling in ("response_mean", "prompt_mean", "prompt_last"):
        chosen = rows[:2] if pooling != "response_mean" else rows
        got = collect(model, tokenizer, blocks, chosen, [1, 2], pooling=pooling, batch_size=3, tick=lambda n: None)
        for i, row in enumerate(chosen):
            prompt = tokenizer(row.prompt, add_special_tokens=not row.prompt).input_ids
            ids = prompt + tokenizer(row.response, add_special_tokens=False).input_ids
            with recorded(blocks, [1, 2]) as store, torch.no_grad():
                model(torch.tensor([ids]))
            part = {
                "response_mean": slice(len(prompt), None),
                "prompt_mean": slice(0, len(prompt)),
                "prompt_last": slice(len(prompt) - 1, len(prompt)),
            }[pooling]
            for layer in (1, 2):
                torch.testing.assert_close(got.pooled[layer][i], store[layer][0, part].mean(0), atol=1e-4, rtol=1e-4)
        assert len(torch.cat(got.norms[1])) == sum(len(r.prompt) + len(r.response) + (not r.prompt) for r in chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_built_saved_and_accepted_by_their_model(family, tmp_path):
    model = random_model(family)
    vectors = build_vectors(model, CharTokenizer(), [texts(), texts("emotional_tone", 30)], [0, 2], ExtractConfig(allow_chance=True))
    loaded = TraitVectors.load(vectors.save(tmp_path / "v.safetensors"))
    loaded.check_model(model)
    stats = loaded.meta.stats["formality"][2]
    assert stats.pairs + stats.held_out_pairs == 24
    assert loaded.meta.residual_norms[2].response > 0


def test_instruction_pairs_run_through_generation_and_are_reproducible(tmp_path):
    contrast = load_contrast_set("formality")
    config = ExtractConfig(pairs=8, held_out_pairs=4, max_new_tokens=4, prompt_format="plain", allow_chance=True)
    model = random_model("gpt2")
    model.config.n_positions = 512
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(torch.randn(512, 32, generator=torch.Generator().manual_seed(0)))
    first = build_vectors(model, CharTokenizer(), [contrast], [1], config)
    again = build_vectors(model, CharTokenizer(), [contrast], [1], config.model_copy(update={"batch_size": 3}))
    torch.testing.assert_close(first.vector("formality", 1), again.vector("formality", 1), atol=1e-4, rtol=1e-4)


def test_a_direction_at_chance_is_refused_and_the_cache_keeps_what_was_computed(tmp_path):
    noise = ContrastSet.model_validate({"trait": "noise", "texts": [{"pos": f"a{i * 7919 % 97}", "neg": f"b{i * 104729 % 89}"} for i in range(30)]})
    model = random_model(seed=3)
    with pytest.raises(VectorsError, match=r"noise at layer 1: .* held-out pairs right .*allow_chance"):
        build_vectors(model, CharTokenizer(), [noise], [1], ExtractConfig(method="pca"), cache=tmp_path)
    calls = []
    kept = build_vectors(
        model, CharTokenizer(), [noise], [1], ExtractConfig(method="pca", allow_chance=True), cache=tmp_path, progress=lambda *a: calls.append(a)
    )
    assert calls == []
    assert kept.meta.stats["noise"][1].at_chance
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    options = ExtractConfig(method="pca", allow_chance=True)
    build_vectors(model, CharTokenizer(), [noise], [1], options, cache=tmp_path, progress=lambda *a: calls.append(a))
    assert calls, "another checkpoint with the same embeddings has activations of its own"


def test_layers_out_of_range_and_models_without_chat_template_are_refused():
    with pytest.raises(ModelError, match=r"layers=\[7\] is out of range: this model has blocks 0..2"):
        build_vectors(random_model(), CharTokenizer(), [texts()], [7])
    with pytest.raises(ModelError, match="has no chat template.*prompt_format='plain'"):
        build_vectors(random_model(), CharTokenizer(), [load_contrast_set("formality")], [1])
    with pytest.raises(VectorsError, match="finished texts have no prompt"):
        build_vectors(random_model(), CharTokenizer(), [texts()], [1], ExtractConfig(pooling="prompt_last"))
