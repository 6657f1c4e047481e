"""Extraction from responses that a judge confirms, with a judge that follows rules and with the shipped tiny model."""

import json

import pytest
import torch
from typer.testing import CliRunner

from steered_lm import cli, judges
from steered_lm.config import content_hash
from steered_lm.errors import JudgeError, VectorsError
from steered_lm.extract.activations import Row, collect, generate_responses
from steered_lm.extract.build import ExtractConfig, build_vectors
from steered_lm.extract.confirm import confirm, matched
from steered_lm.extract.contrast import ContrastSet, load_contrast_set
from steered_lm.judges.base import REFUSAL, Verdict
from steered_lm.judges.trait_run import TraitJudges
from steered_lm.persona.meter import marker_counts
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import SideCounts, TraitVectors
from steered_lm.study import ModelConfig, load_model

LAYER = 3
CONFIG = ExtractConfig(method="mean_diff", pairs=16, held_out_pairs=10, max_new_tokens=48)


class RuleJudge:
    """Trait: the share of formal markers among those of formality, missing without any. Coherence: 0 for replies of fewer than 8 words."""

    def __init__(self, question):
        self.question, self.name = question, f"rule:{question.kind}"
        self.identity = content_hash(["rule", question.digest])
        self.calls = 0

    @classmethod
    def for_question(cls, question):
        return cls(question)

    def judge(self, requests):
        self.calls += 1
        return [self.verdict(request.response) for request in requests]

    def verdict(self, text):
        if self.question.kind == "coherence":
            return self.scored(100.0 if len(text.split()) >= 8 else 0.0)
        high, low = marker_counts(text)["formality"]
        return self.scored(100.0 * high / (high + low)) if high + low else Verdict(missing=REFUSAL, scale=(0, 100), judge=self.name)

    def scored(self, value):
        return Verdict(score=value, scale=(0, 100), judge=self.name)


class Fixed:
    """Gives each response the verdict that a table has for it; None is a failed judgement."""

    identity = name = "fixed"

    def __init__(self, scores):
        self.scores = scores

    def judge(self, requests):
        found = [self.scores[request.response] for request in requests]
        return [
            Verdict(missing=score if isinstance(score, str) else "no answer", scale=(0, 100), judge="fixed")
            if score is None or isinstance(score, str)
            else Verdict(score=score, scale=(0, 100), judge="fixed")
            for score in found
        ]


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def contrast():
    return load_contrast_set("formality")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tiny, contrast, cache):
    return build_vectors(*tiny, [contrast], [LAYER], CONFIG, cache=cache, judge=RuleJudge)


def test_each_side_is_filtered_on_its_own_and_everything_that_is_left_out_is_counted():
    trait = Fixed({"a": 50.0, "b": 49.9, "c": 90.0, "d": REFUSAL, "e": 10.0, "f": 49.0, "g": 50.0, "h": 5.0})
    coherence = Fixed({**dict.fromkeys("abdefgh", 80.0), "c": 49.0, "h": 50.0})
    found = confirm(TraitJudges(trait, coherence), ["q"] * 5, ["a", "b", "c", "d", ""], ["e", "f", "g", "h", " "])
    assert (found.positive, found.negative) == ([0], [0, 1, 3])
    assert found.counts["pos"] == SideCounts(generated=5, kept=1, off_trait=1, incoherent=1, missing=2)
    assert found.counts["neg"] == SideCounts(generated=5, kept=3, off_trait=1, incoherent=0, missing=1)


def test_failed_judgements_past_the_limit_stop_the_build_and_refusals_do_not():
    coherence = Fixed(dict.fromkeys("abcd", 80.0))
    with pytest.raises(JudgeError, match=r"2 of 4 verdicts are missing \(50%; limit 20%\)"):
        confirm(TraitJudges(Fixed({"a": 60.0, "b": None, "c": None, "d": 1.0}), coherence), ["q"] * 2, ["a", "b"], ["c", "d"])
    found = confirm(TraitJudges(Fixed({"a": 60.0, "b": REFUSAL, "c": REFUSAL, "d": 1.0}), coherence), ["q"] * 2, ["a", "b"], ["c", "d"])
    assert (found.positive, found.negative) == ([0], [1])


def test_kept_responses_are_matched_in_disjoint_pairs_the_same_question_first():
    assert matched([0, 2, 5, 7], [1, 2, 7, 8]) == [(1, 1), (3, 2), (0, 0), (2, 3)]
    assert matched([4], [1, 2, 4]) == [(0, 2)]
    assert matched([], [1]) == []


def test_the_direction_is_the_difference_of_the_means_of_what_was_confirmed(tiny, contrast, built):
    model, tokenizer = tiny
    blocks = find_blocks(model)
    pairs = contrast.pairs("build", CONFIG.pairs)
    sides = []
    for shows in (True, False):
        turns = [[{"role": "system", "content": p.pos if shows else p.neg}, {"role": "user", "content": p.question}] for p in pairs]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        replies = generate_responses(model, tokenizer, blocks, prompts, max_new_tokens=CONFIG.max_new_tokens, tick=lambda n: None)
        kept = []
        for prompt, reply in zip(prompts, replies, strict=True):
            high, low = marker_counts(reply)["formality"]
            if len(reply.split()) >= 8 and high + low and (high / (high + low) >= 0.5) is shows:
                kept.append(Row(prompt, reply))
        pooled = collect(model, tokenizer, blocks, kept, [LAYER], pooling="response_mean", batch_size=8, tick=lambda n: None).pooled[LAYER]
        sides.append(pooled.double().mean(0))
        counts = built.meta.confirmed["formality"].counts["build/pos" if shows else "build/neg"]
        assert (counts.generated, counts.kept) == (16, len(kept))
        assert counts.kept + counts.off_trait + counts.incoherent + counts.missing == 16
    wanted = sides[0] - sides[1]
    torch.testing.assert_close(built.vector("formality", LAYER), (wanted / wanted.norm()).float(), atol=1e-4, rtol=1e-4)


def test_the_file_says_who_confirmed_what_and_how_well_the_direction_separates_held_out_responses(built, tmp_path):
    loaded = TraitVectors.load(built.save(tmp_path / "v.safetensors"))
    found = loaded.meta.confirmed["formality"]
    assert (found.trait_judge, found.coherence_judge) == ("rule:trait", "rule:coherence")
    assert set(found.counts) == {"build/pos", "build/neg", "held_out/pos", "held_out/neg"}
    stats = loaded.meta.stats["formality"][LAYER]
    assert stats.held_out_pairs == min(found.counts["held_out/pos"].kept, found.counts["held_out/neg"].kept)
    assert stats.held_out_right_side > 0.8


def test_a_repeated_build_takes_what_was_kept_from_the_cache_and_another_judge_does_not(tiny, contrast, cache, built):
    steps = []
    again = build_vectors(*tiny, [contrast], [LAYER], CONFIG, cache=cache, judge=RuleJudge, progress=lambda *step: steps.append(step))
    assert steps == []
    assert again.meta == built.meta
    torch.testing.assert_close(again.vector("formality", LAYER), built.vector("formality", LAYER))

    class Other(RuleJudge):
        def __init__(self, question):
            super().__init__(question)
            self.identity = content_hash(["other", question.digest])

    build_vectors(*tiny, [contrast], [LAYER], CONFIG, cache=cache, judge=Other, progress=lambda *step: steps.append(step))
    assert steps


def test_what_cannot_be_confirmed_is_refused(tiny, contrast):
    class Harsh(RuleJudge):
        def verdict(self, text):
            return self.scored(10.0)

    with pytest.raises(
        VectorsError, match=r"confirms too few build responses \(2 of each side are needed\): pos 0 of 16 \(0 on the wrong .*, 16 incoh"
    ):
        build_vectors(*tiny, [contrast], [LAYER], CONFIG, judge=Harsh)
    with pytest.raises(VectorsError, match="method='svd', pooling='response_mean' cannot be used with a judge"):
        build_vectors(*tiny, [contrast], [LAYER], judge=RuleJudge)
    texts = ContrastSet.model_validate({"trait": "formality", "texts": [{"pos": "a", "neg": "b"}]})
    with pytest.raises(VectorsError, match="comes as finished texts"):
        build_vectors(*tiny, [texts], [LAYER], CONFIG, judge=RuleJudge)
    with pytest.raises(JudgeError, match="has no description of ours"):
        build_vectors(*tiny, [contrast.model_copy(update={"trait": "gusto", "description": ""})], [LAYER], CONFIG, judge=RuleJudge)


def test_the_command_takes_a_judge_by_name_and_shows_the_counts(tmp_path, monkeypatch):
    monkeypatch.setitem(judges._BUILT_IN, "rule", f"{__name__}:RuleJudge")
    arguments = ["vectors", "build", "--out", tmp_path / "v.safetensors", "--traits", "formality", "--layers", LAYER, "--judge", "rule"]
    arguments += ["--pairs", 16, "--held-out-pairs", 10, "--max-new-tokens", 48, "--device", "cpu", "--judge-cache", tmp_path / "verdicts.sqlite"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "responses confirmed by rule:trait" in done.output
    meta = TraitVectors.load(tmp_path / "v.safetensors").meta
    assert meta.method == "mean_diff"
    assert str(meta.confirmed["formality"].counts["build/pos"].kept) in done.output
    assert json.loads(meta.model_dump_json())["confirmed"]["formality"]["counts"]["build/neg"]["generated"] == 16
    assert (tmp_path / "verdicts.sqlite").is_file()
