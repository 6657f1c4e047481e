import csv
import hashlib
import json
import logging
import math
import warnings
import weakref

import peft
import pytest
import torch
from fault_server import FaultServer, guesses, says
from hub_folder import save_small_data
from tiny_harness import STORIES, save_vectors, spec_of
from tiny_models import vectors_for
from typer.testing import CliRunner

from steered_lm.benchmarks.folder import VARIABLE
from steered_lm.cli import app
from steered_lm.content import TINY_CHAT
from steered_lm.cost import measuring
from steered_lm.cost import run as cost_run
from steered_lm.cost.arms import check_names, prompted_arms, trained_name
from steered_lm.cost.config import CostConfig
from steered_lm.cost.measures import TRAIT_GROUPS, plan_task
from steered_lm.cost.run import run_cost
from steered_lm.cost.sweep import Sweep
from steered_lm.errors import JudgeError, ModelError, SpecError, UserError
from steered_lm.extract.build import ExtractConfig, build_vectors
from steered_lm.extract.contrast import load_contrast_set
from steered_lm.harness.items import BROKEN
from steered_lm.report.cost_analysis import analyse_cost
from steered_lm.report.cost_data import UNSTEERED
from steered_lm.report.cost_matrix import matrix_axes
from steered_lm.report.cost_page import build_cost, cost_csv
from steered_lm.steering.spec import Site, SteeringSpec, VectorsRef
from steered_lm.steering.vectors import TraitVectors
from steered_lm.study import ModelConfig, load_lm, load_model
from steered_lm.tiny_chat.evaluate import load

SHARED_DATA = STORIES.parents[1]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Vectors of two axes of the tiny chat model."""
    model, tokenizer = load()
    sets = [load_contrast_set(trait) for trait in ("formality", "emotional_tone")]
    built = build_vectors(model, tokenizer, sets, (3,), ExtractConfig(pairs=24, held_out_pairs=12), model_id=TINY_CHAT)
    return built.save(tmp_path_factory.mktemp("vectors") / "v.safetensors")


@pytest.fixture
def spec(vectors, tmp_path):
    made = SteeringSpec(vectors=VectorsRef.to(vectors), weights={"formality": 1.0}, layers=(3,), alpha=0.4)
    return made.save(tmp_path / "formal.yaml")


def settings(spec, tmp_path, **more):
    return CostConfig(**{"steering": (spec,), "out": tmp_path / "out", "tasks": ("tiny_knowledge",), "text": "none", "limit": 12, **more})


def counted(monkeypatch):
    """The (task, arms) that are really evaluated."""
    calls = []
    real = measuring.evaluate_items

    def evaluate(lm, task, candidates, **options):
        calls.append((task.task_name, [candidate.name for candidate in candidates]))
        return real(lm, task, candidates, **options)

    monkeypatch.setattr(measuring, "evaluate_items", evaluate)
    return calls


# ------------------------------------------------------------------------------------------------ sweeps


def test_a_sweep_names_its_setting_and_its_values():
    spec = SteeringSpec(weights={"formality": 0.0})
    assert Sweep.of_text("alpha=0:0.3:0.1", spec).values == (0.0, 0.1, 0.2, 0.3)
    assert Sweep.of_text("layer=1:3", spec).values == (1, 2, 3)
    assert Sweep.of_text("kl=0.5,0.02", spec).values == (0.02, 0.5)
    found = Sweep.of_text("formality=-1:1:0.5", spec)
    assert (found.setting, found.name, found.values) == ("weight", "weight of formality", (-1.0, -0.5, 0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha", "has no values"),
        ("alpha=", "has no values"),
        ("alpha=0:x", "no number"),
        ("alpha=0:1:0", "step must be above 0"),
        ("alpha=2:1:0.5", "end not below the start"),
        ("alpha=0:1000:0.1", "Take a larger step"),
        ("alpha=1,1", "names a value twice"),
        ("alpha=0:1,2", "neither a range nor a list"),
        ("alpha=inf", "must be finite"),
        ("layer=1.5", "whole numbers"),
        ("kl=-1:1:1", "not negative"),
        ("formalty=0:1:0.5", r"neither a setting nor a trait of the spec\..* Did you mean 'formality'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Sweep.of_text(text, SteeringSpec(weights={"formality": 0.0}))


def test_a_sweep_that_sites_of_the_spec_override_is_refused(vectors):
    site = {"layers": (2,), "alpha": 1.0}
    spec = SteeringSpec(vectors=VectorsRef.to(vectors), weights={"formality": 1.0}, layers=(3,), sites=[site])
    with pytest.raises(SpecError, match="sites of the spec have alpha of their own"):
        Sweep.of_text("alpha=0:1:0.5", spec).at(spec, 0.5)
    assert Sweep.of_text("formality=0:1:0.5", spec).at(spec, 0.5).weights == {"formality": 0.5}


# ------------------------------------------------------------------------------------------------ the run


def test_every_arm_answers_the_same_items_and_zero_is_the_unsteered_model(spec, tmp_path):
    data = run_cost(settings(spec, tmp_path, sweep="alpha=0:3:1.5"))
    (measure,) = data.measures
    assert [arm.name for arm in data.arms] == [UNSTEERED, "formal, alpha 1.5", "formal, alpha 3"]
    assert [arm.x for arm in data.arms] == [None, 1.5, 3.0]
    assert (measure.name, measure.role, measure.kind, measure.chance) == ("tiny_knowledge", "cost", "accuracy", 0.25)
    assert len(measure.items) == len(set(measure.items)) == 12
    analysis = analyse_cost(data)
    strongest = analysis.change("formal, alpha 3", "tiny_knowledge")
    assert strongest.difference.mean < -0.3
    assert strongest.difference.high < 0


def test_a_sweep_gives_what_single_runs_give(spec, tmp_path):
    whole = run_cost(settings(spec, tmp_path, sweep="alpha=0.5,1.5,3", traits=("formality",)))
    for alpha in (0.5, 1.5, 3.0):
        alone = SteeringSpec.load(spec)
        path = SteeringSpec.model_validate({**alone.model_dump(), "alpha": alpha}).save(tmp_path / f"at{alpha}.yaml")
        single = run_cost(settings(path, tmp_path, out=tmp_path / f"out{alpha}", traits=("formality",)))
        for measure, again in zip(whole.measures, single.measures, strict=True):
            assert again.values[f"at{alpha}"] == measure.values[f"formal, alpha {alpha:g}"]
            assert again.values[UNSTEERED] == measure.values[UNSTEERED]


def test_the_trade_off_shows_on_the_tiny_model(spec, tmp_path):
    data = run_cost(settings(spec, tmp_path, sweep="alpha=0:2:1", traits=("formality",), text="tiny_talk", limit=None, tasks=()))
    analysis = analyse_cost(data)
    names = [UNSTEERED, "formal, alpha 1", "formal, alpha 2"]

    def levels(measure):
        return [analysis.level(name, measure).value for name in names]

    assert levels("trait formality") == sorted(levels("trait formality"))
    assert levels("trait formality")[0] < levels("trait formality")[-1]
    for measure in ("tiny_knowledge", "tiny_truth"):
        assert levels(measure) == sorted(levels(measure), reverse=True)
        assert levels(measure)[-1] < levels(measure)[0] - 0.1
    for measure in ("perplexity of tiny_talk", "kl", "repetition"):
        assert levels(measure) == sorted(levels(measure))
    assert analysis.level(UNSTEERED, "kl").value == 0.0
    formality = next(measure for measure in data.measures if measure.trait == "formality")
    for shares in formality.bands.values():
        assert sum(shares) == pytest.approx(1.0)
    assert [reply.arm for reply in data.samples[0].replies] == names


def test_finished_arms_are_reused_and_only_new_ones_run(spec, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    first = run_cost(settings(spec, tmp_path, sweep="alpha=1,2"))
    assert calls == [("tiny_knowledge", [UNSTEERED, "formal, alpha 1", "formal, alpha 2"])]
    again = run_cost(settings(spec, tmp_path, sweep="alpha=1,2,3"))
    assert calls[1:] == [("tiny_knowledge", ["formal, alpha 3"])]
    assert again.measures[0].values["formal, alpha 2"] == first.measures[0].values["formal, alpha 2"]
    run_cost(settings(spec, tmp_path, sweep="alpha=1,2,3", limit=6))
    assert len(calls) == 3, "other items are another measurement"


def test_an_interrupted_sweep_goes_on_where_it_was(spec, tmp_path, monkeypatch):
    real = measuring.evaluate_items
    calls = []

    def killed_at_the_second(lm, task, candidates, **options):
        calls.append(task.task_name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(lm, task, candidates, **options)

    chosen = settings(spec, tmp_path, sweep="alpha=1,2", tasks=("tiny_knowledge", "tiny_truth"))
    monkeypatch.setattr(measuring, "evaluate_items", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_cost(chosen)
    data = run_cost(chosen)
    assert calls == ["tiny_knowledge", "tiny_truth", "tiny_truth"]
    monkeypatch.setattr(measuring, "evaluate_items", real)
    unbroken = run_cost(settings(spec, tmp_path, sweep="alpha=1,2", tasks=("tiny_knowledge", "tiny_truth"), out=tmp_path / "other"))
    assert [m.values for m in data.measures] == [m.values for m in unbroken.measures]


def test_another_checkpoint_with_the_same_embeddings_is_measured_anew(spec, tmp_path, monkeypatch):
    run_cost(settings(spec, tmp_path))
    model, tokenizer = load()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    calls = counted(monkeypatch)
    run_cost(settings(spec, tmp_path, model=ModelConfig(model=str(tmp_path / "tuned"))))
    assert calls == [("tiny_knowledge", [UNSTEERED, "formal"])]


def test_a_damaged_file_is_measured_again_and_said(spec, tmp_path, monkeypatch, caplog):
    run_cost(settings(spec, tmp_path))
    cell = next((tmp_path / "out" / "cells").glob("*/*.json"))
    cell.write_text(cell.read_text()[:40])
    calls = counted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        run_cost(settings(spec, tmp_path))
    assert len(calls) == 1
    assert "is damaged and measured again" in caplog.text


def test_at_equal_kl_specs_lie_equally_far_from_the_unsteered_model(spec, tmp_path):
    data = run_cost(settings(spec, tmp_path, sweep="kl=0,0.05,0.5", text="tiny_talk", limit=4))
    (kl,) = [measure for measure in data.measures if measure.name == "kl"]
    means = {arm: math.fsum(values) / sum(kl.tokens) for arm, values in kl.values.items()}
    assert means["formal, kl 0.05"] == pytest.approx(0.05, rel=0.02)
    assert means["formal, kl 0.5"] == pytest.approx(0.5, rel=0.02)
    assert [arm.x for arm in data.arms] == [None, 0.05, 0.5]
    assert data.arms[1].settings["alpha"] < data.arms[2].settings["alpha"]


def test_a_clamp_has_no_alpha_that_is_nothing(vectors, tmp_path):
    clamp = SteeringSpec(vectors=VectorsRef.to(vectors), weights={"formality": 1.0}, layers=(3,), operation="clamp").save(tmp_path / "clamp.yaml")
    with pytest.raises(SpecError, match="at kl=0 the spec still steers"):
        run_cost(settings(clamp, tmp_path, sweep="kl=0,0.1", text="tiny_talk"))
    with pytest.raises(UserError, match="kl=0.0001 is met by no alpha"):
        run_cost(settings(clamp, tmp_path, sweep="kl=0.0001,0.1", text="tiny_talk"))
    data = run_cost(settings(clamp, tmp_path, sweep="alpha=0,1"))
    assert [arm.x for arm in data.arms] == [None, 0.0, 1.0]
    (reach,) = analyse_cost(data).reaches
    assert (reach.stopped_at, reach.stopped_arm) == (0.0, "clamp, alpha 0"), "the arm at 0 steers, so it comes first"


def test_side_effects_are_each_vector_alone_on_every_trait(spec, tmp_path):
    data = run_cost(
        settings(spec, tmp_path, traits=("formality", "emotional_tone"), side_effects=True, kl=0.3, text="tiny_talk", limit=None, samples=3)
    )
    analysis = analyse_cost(data)
    assert [arm.trait for arm in data.arms] == [None, None, "formality", "emotional_tone"]
    cells = {(change.arm, change.measure): change.difference for change in analysis.matrix}
    assert len(cells) == 4
    knowledge = next(measure for measure in data.measures if measure.name == "tiny_knowledge")
    assert set(knowledge.values) == {UNSTEERED, "formal"}, "capabilities are not asked of the matrix's arms"
    for trait, other in (("formality", "emotional_tone"), ("emotional_tone", "formality")):
        own = cells[f"{trait} alone", f"trait {trait}"].mean
        assert own > 10
        assert own > cells[f"{other} alone", f"trait {trait}"].mean


def test_an_error_other_than_nan_is_not_taken_for_a_broken_arm(spec, tmp_path, monkeypatch):
    run_cost(settings(spec, tmp_path))

    def refused(*args, **options):
        raise ModelError("the prompt does not fit")

    monkeypatch.setattr("steered_lm.harness.items.evaluate_candidates", refused)
    with pytest.raises(ModelError, match="the prompt does not fit"):
        run_cost(settings(spec, tmp_path, sweep="alpha=1,2"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
def test_one_model_at_a_time_is_in_memory(spec, tmp_path, monkeypatch):
    alive = []
    real = cost_run.load_lm

    def load_one(*args, **options):
        assert [one for one in alive if one() is not None] == []
        made = real(*args, **options)
        alive.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(cost_run, "load_lm", load_one)
    for name in ("a", "b"):
        save_adapter(tmp_path / name, scale=0.5)
    run_cost(settings(spec, tmp_path, limit=2, peft={name: tmp_path / name for name in ("a", "b")}))
    assert len(alive) == 3


def test_a_broken_arm_is_missing_and_does_not_take_the_others_with_it(vectors, tmp_path, monkeypatch):
    base = SteeringSpec(vectors=VectorsRef.to(vectors), weights={"formality": 1.0}, layers=(3,), alpha=0.4)
    mild = base.save(tmp_path / "mild.yaml")
    wild = SteeringSpec.model_validate({**base.model_dump(), "alpha": 1e38, "unit": "raw"}).save(tmp_path / "wild.yaml")
    data = run_cost(settings(mild, tmp_path, steering=(mild, wild), model=ModelConfig(dtype="float16"), traits=("formality",)))
    knowledge, formality = data.measures[0], data.measures[1]
    assert all(value is None for value in knowledge.values["wild"])
    assert knowledge.reasons["wild"] == {BROKEN: 12}
    assert formality.reasons["wild"] == {BROKEN: 12}
    assert None not in knowledge.values["mild"]
    change = analyse_cost(data).change("wild", "tiny_knowledge")
    assert change.difference.mean is None
    assert change.difference.missing == 12


def test_a_judge_that_fails_stops_the_run_and_what_was_finished_stays(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FaultServer(lambda number, body, headers: says("I would rather not say a number"))
    try:
        chosen = settings(spec, tmp_path, traits=("evil",), judge="openai:m", judge_options={"base_url": server.url}, limit=3)
        with pytest.raises(JudgeError, match=r"pv_evil: 6 of 6 verdicts of trait score are missing \(100%; limit 20%\).*Finished tasks are kept"):
            run_cost(chosen)
        calls = counted(monkeypatch)
        server.script = lambda number, body, headers: guesses({"40": -0.1, "60": -3.0})
        data = run_cost(chosen)
    finally:
        server.close()
    assert [task for task, _ in calls] == ["pv_evil"]
    evil = next(measure for measure in data.measures if measure.trait == "evil")
    assert all(value is not None for values in evil.values.values() for value in values)


def of_coherence(body):
    """Whether a judge is asked about coherence, and not about the trait."""
    return "coheren" in json.dumps(body["messages"]).lower()


def twelve(tmp_path):
    """A spec whose vectors file has a random direction for each of the seven traits and the five axes, the axes first."""
    model, _ = load()
    base = vectors_for(model, (3,))
    generator = torch.Generator().manual_seed(1)
    names = (*TRAIT_GROUPS["axes"], *TRAIT_GROUPS["persona_vectors"])
    draws = {(name, 3): torch.randn(base.meta.d_model, generator=generator) for name in names}
    meta = base.meta.model_copy(update={"traits": names, "model_id": TINY_CHAT})
    file = TraitVectors({key: draw / draw.norm() for key, draw in draws.items()}, meta).save(tmp_path / "twelve.safetensors")
    return SteeringSpec(vectors=VectorsRef.to(file), weights={"evil": 1.0}, layers=(3,), alpha=0.4).save(tmp_path / "twelve.yaml")


def test_every_vector_is_measured_on_the_seven_traits_and_the_five_axes_by_a_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def by_lot(number, body, headers):
        drawn = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
        return guesses({"Well" if drawn[0] < 20 else str(20 + drawn[1] % 80): -0.01})

    server = FaultServer(by_lot)
    chosen = {"traits": ("persona_vectors", "axes"), "side_effects": True, "judge": "openai:m", "judge_options": {"base_url": server.url}}
    try:
        data = run_cost(settings(twelve(tmp_path), tmp_path, **chosen, limit=2, max_new_tokens=6, missing_limit=0.8))
    finally:
        server.close()
    names = [*TRAIT_GROUPS["persona_vectors"], *TRAIT_GROUPS["axes"]]
    arms, measures = matrix_axes(data)
    assert [arm.trait for arm in arms] == [measure.trait for measure in measures] == names, "own effects lie on the diagonal"
    report = build_cost(data)
    assert len(report.analysis.matrix) == 144
    values = [value for measure in measures for arm in arms for value in measure.values[arm.name]]
    gone = sum(value is None for value in values)
    assert 0 < gone < len(values) / 2, "some verdicts failed"
    assert gone == sum(sum(measure.reasons[arm.name].values()) for measure in measures for arm in arms)
    rows = [row for row in csv.DictReader(cost_csv(report).splitlines()) if row["vector_trait"]]
    assert len(rows) == 144 + 144, "trait scores and coherence"
    for measure in measures:
        for arm in arms:
            (row,) = [row for row in rows if (row["arm"], row["measure"]) == (arm.name, measure.name)]
            pairs = list(zip(measure.values[arm.name], measure.values[UNSTEERED], strict=True))
            assert int(row["missing"]) == sum(None in pair for pair in pairs)
            shared = [a - b for a, b in pairs if a is not None and b is not None]
            assert (float(row["difference"]) == pytest.approx(sum(shared) / len(shared))) if shared else row["difference"] == ""


def test_what_is_missing_of_coherence_is_told_apart_from_what_is_missing_of_the_trait(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FaultServer(lambda number, body, headers: guesses({"Well": -0.1} if of_coherence(body) else {"40": -0.1, "60": -3.0}))
    try:
        chosen = settings(spec, tmp_path, traits=("evil",), judge="openai:m", judge_options={"base_url": server.url}, limit=3)
        with pytest.raises(JudgeError, match=r"pv_evil: 6 of 6 verdicts of coherence are missing \(100%; limit 20%\), 6 because: probability 0.00"):
            run_cost(chosen)
        data = run_cost(chosen.model_copy(update={"missing_limit": 1.0}))
    finally:
        server.close()
    evil, coherence = (next(measure for measure in data.measures if measure.name == name) for name in ("trait evil", "coherence (evil)"))
    assert evil.reasons == {UNSTEERED: {}, "formal": {}}
    assert set(coherence.values["formal"]) == {None}
    assert [sum(coherence.reasons[arm].values()) for arm in (UNSTEERED, "formal")] == [3, 3]
    assert data.samples[0].replies[0].missing is None, "the reply has a score of the trait"


def test_of_several_responses_reasons_count_items_and_verdicts_are_counted_by_response(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def by_lot(number, body, headers):
        drawn = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0]
        return guesses({"Well" if drawn < 128 else "40": -0.01})

    server = FaultServer(by_lot)
    try:
        chosen = {"traits": ("evil",), "judge": "openai:m", "judge_options": {"base_url": server.url}, "samples": 2, "max_new_tokens": 8}
        data = run_cost(settings(spec, tmp_path, **chosen, limit=8, missing_limit=0.9))
    finally:
        server.close()
    evil = next(measure for measure in data.measures if measure.trait == "evil")
    for arm, values in evil.values.items():
        gone, judged = values.count(None), evil.judged[arm]
        assert judged.responses == 16
        assert sum(evil.reasons[arm].values()) == gone
        assert 2 * gone <= judged.missing <= 16 - (8 - gone)
    assert evil.judged[UNSTEERED].missing > 2 * evil.values[UNSTEERED].count(None), "some item has one of its two values"
    rows = [row for row in csv.DictReader(cost_csv(build_cost(data)).splitlines()) if row["measure"] == "trait evil"]
    assert [(row["responses"], row["responses_missing"]) for row in rows] == [("16", str(evil.judged[row["arm"]].missing)) for row in rows]
    assert data.samples[0].scored == "trait evil, mean of 2 responses of which this is the first"


def test_trained_models_go_by_the_names_of_their_experiments_or_folders(tmp_path):
    work = tmp_path / "1f" / "work"
    (work / "adapter").mkdir(parents=True)
    (work / "request.json").write_text(json.dumps({"name": "evil-severe", "seed": 0}))
    assert trained_name(work / "adapter") == "evil-severe"
    assert trained_name(tmp_path / "mine" / "adapter") == "mine"
    assert trained_name(tmp_path / "yours") == "yours"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
def test_a_trained_and_a_prompted_model_answer_the_same_items(spec, tmp_path):
    trained = tmp_path / "trained"
    save_adapter(trained, scale=0.5)
    system = "Use formal wording in every sentence."
    chosen = {"traits": ("formality",), "text": "tiny_talk", "peft": {"mild": trained}, "system": (system,), "sweep": "alpha=0.5,1"}
    data = run_cost(settings(spec, tmp_path, **chosen))
    names = [UNSTEERED, "formal, alpha 0.5", "formal, alpha 1", f"prompted: {system}", "trained: mild"]
    assert [arm.name for arm in data.arms] == names
    knowledge, formality, perplexity, kl = data.measures[:4]
    assert list(knowledge.values) == list(formality.values) == names
    assert list(perplexity.values) == [name for name in names if not name.startswith("prompted")], "a text has no system turn"
    assert list(kl.values) == names[:3]
    assert perplexity.values["trained: mild"] != perplexity.values[UNSTEERED]
    analysis = analyse_cost(data)
    assert analysis.change(f"prompted: {system}", "trait formality").difference.mean > 10
    unadapted = tmp_path / "same"
    save_adapter(unadapted, scale=0.0)
    same = run_cost(settings(spec, tmp_path, **{**chosen, "peft": {"same": unadapted}}))
    for measure in same.measures[:3]:
        assert measure.values["trained: same"] == pytest.approx(measure.values[UNSTEERED], rel=1e-5)
    with pytest.raises(UserError, match=r"peft='.*nowhere' holds no adapter"):
        run_cost(settings(spec, tmp_path, peft={"x": tmp_path / "nowhere"}))


def test_a_prompted_model_has_the_perplexity_of_replies_to_prompts(spec, tmp_path):
    system = "Use formal wording in every sentence."
    lines = [
        {"id": f"r{i}", "prompt": f"What do you say to {who}?", "response": "I was glad to see them."} for i, who in enumerate(("Ann", "Bob", "Cy"))
    ]
    given, with_system = tmp_path / "replies.jsonl", tmp_path / "prompted.jsonl"
    given.write_text("".join(json.dumps({**line, "system": "Be brief."}) + "\n" for line in lines))
    with_system.write_text("".join(json.dumps({**line, "system": system}) + "\n" for line in lines))
    data = run_cost(settings(spec, tmp_path, text=str(given), system=(system,)))
    alone = run_cost(settings(spec, tmp_path, text=str(with_system)))
    perplexity, kl = data.measures[-2:]
    assert perplexity.items == ("r0", "r1", "r2")
    assert perplexity.values[f"prompted: {system}"] == pytest.approx(alone.measures[-2].values[UNSTEERED], rel=1e-5)
    assert perplexity.values[f"prompted: {system}"] != pytest.approx(perplexity.values[UNSTEERED], rel=1e-3)
    assert list(kl.values) == [UNSTEERED, "formal"]
    with pytest.raises(UserError, match=r"item 'r0' has \d+ tokens, prompt and response together"):
        run_cost(settings(spec, tmp_path, text=str(given), system=("Be formal. " * 400,)))


def save_adapter(folder, scale):
    """An adapter that adds noise of that size to the attention's queries, as a stand-in for one that was trained."""
    model, _ = load()
    with warnings.catch_warnings():
        # what peft says when the command loads an adapter is tested; here it is the test's own call
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ real items


@pytest.mark.shared
def test_a_sweep_over_mmlu_and_truthfulqa_equals_single_runs_on_a_real_model(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(SHARED_DATA))
    base = spec_of(save_vectors(STORIES, tmp_path / "v.safetensors"), unit="residual", alpha=0.5, layers=(2,))
    path = base.save(tmp_path / "spec.yaml")
    common = {"model": ModelConfig(model=str(STORIES)), "limit": 2, "tasks": ("mmlu", "truthfulqa_mc1", "truthfulqa_mc2"), "num_fewshot": 1}
    sweep = run_cost(settings(path, tmp_path, sweep="alpha=0.2:1.4:0.2", **common))
    assert len(sweep.arms) == 8
    mmlu, mc1, mc2 = sweep.measures
    assert (len(mmlu.items), len(set(mmlu.groups)), len(mc1.items), mc2.kind) == (16, 8, 2, "score")
    for alpha in (0.2, 1.4):
        single = SteeringSpec.model_validate({**base.model_dump(), "alpha": alpha}).save(tmp_path / f"at{alpha}.yaml")
        alone = run_cost(settings(single, tmp_path, out=tmp_path / f"out{alpha}", **common))
        for measure, again in zip(sweep.measures, alone.measures, strict=True):
            assert again.items == measure.items
            assert again.values[f"at{alpha}"] == pytest.approx(measure.values[f"spec, alpha {alpha:g}"], abs=1e-4 if measure.kind == "score" else 0)
    assert len(set(mc2.values.values())) == 8, "every alpha answers in its own way"


@pytest.mark.shared
def test_judged_answers_and_paraphrases_are_measures_too(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def by_rubric(number, body, headers):
        return guesses({"80" if "0 to 100" in json.dumps(body["messages"]) else "4": -0.01})

    path = spec_of(save_vectors(STORIES, tmp_path / "v.safetensors"), unit="residual", alpha=0.5, layers=(2,)).save(tmp_path / "spec.yaml")
    model = ModelConfig(model=str(STORIES), prompt_format="plain")
    server = FaultServer(by_rubric)
    try:
        chosen = {"judge": "openai:m", "judge_options": {"base_url": server.url}, "data": str(SHARED_DATA), "max_new_tokens": 8}
        data = run_cost(settings(path, tmp_path, model=model, tasks=("truthfulqa_gen", "lamp_7"), limit=2, **chosen))
    finally:
        server.close()
    found = {measure.name: measure for measure in data.measures if measure.role != "note"}
    roles = {name: (measure.role, measure.scale) for name, measure in found.items()}
    assert roles == {
        "truthfulqa_gen truthful": ("cost", (0.0, 100.0)),
        "truthfulqa_gen informative": ("cost", (0.0, 100.0)),
        "lamp_7 rouge1": ("cost", (0.0, 1.0)),
        "lamp_7 rougeL": ("cost", (0.0, 1.0)),
        "lamp_7 fit": ("benefit", (1.0, 5.0)),
    }
    assert found["lamp_7 fit"].values["spec"] == (4.0, 4.0)
    assert set(found["truthfulqa_gen truthful"].values["spec"]) == {80.0}
    assert "lamp_7 fit" in cost_csv(build_cost(data))


# ------------------------------------------------------------------------------------------------ bad input


def test_what_is_wrong_is_said_before_anything_runs(spec, tmp_path, monkeypatch):
    calls = counted(monkeypatch)

    def refused(error, message, **more):
        with pytest.raises(error, match=message):
            run_cost(settings(spec, tmp_path, **more))

    refused(UserError, r"task='tiny_knowlege' is none that costs can be read from\..* Did you mean 'tiny_knowledge'", tasks=("tiny_knowlege",))
    refused(
        UserError,
        r"task='coherence' is none that costs can be read from\. Allowed: .*mmlu, mmlu_humanities.*, mmlu_<subject>\.",
        tasks=("coherence",),
    )
    refused(UserError, r"task='persona_vectors' is a group of traits\. Give trait='persona_vectors'", tasks=("persona_vectors",))
    refused(UserError, r"Allowed: (?!.*persona_vectors).*pv_evil", tasks=("persona_vector",))
    refused(UserError, "subjects='virolgy' is neither", tasks=("mmlu_virolgy",))
    refused(UserError, "is asked for twice", tasks=("tiny_truth", "tiny_truth"))
    refused(UserError, r"trait='evil' needs a judge, and none is given", traits=("evil",))
    refused(UserError, "'evli' is", traits=("evli",), judge="openai:m")
    refused(UserError, r"trait='formalty' is none of ours.* Did you mean 'formality'", traits=("formalty",))
    refused(UserError, "persona='walter'", persona="walter")
    refused(UserError, "data=", tasks=("mmlu",), data=str(tmp_path / "nowhere"))
    refused(UserError, "num_fewshot=5: none of tiny_knowledge takes examples", num_fewshot=5)
    refused(UserError, "does not exist", text="nowhere.txt")
    refused(SpecError, "given twice", steering=(spec, spec))
    (tmp_path / "file").touch()
    refused(UserError, r"out='.*file' cannot be written: Not a directory\. Name a folder that can", out=tmp_path / "file")
    refused(UserError, r"out='.*more' cannot be written", out=tmp_path / "file" / "more")
    refused(UserError, "layer", sweep="layer=2:3")
    local = str(save_small_data(tmp_path / "data"))
    refused(UserError, "num_fewshot=9 is not possible: dev has 5 questions about 'virology'", tasks=("mmlu_virology",), data=local, num_fewshot=9)
    base = SteeringSpec.load(spec)
    prompts = SteeringSpec.model_validate({**base.model_dump(), "positions": "prompt"}).save(tmp_path / "prompts.yaml")
    refused(SpecError, r"text='tiny_talk': positions='prompt' steers nothing.*text='none'", steering=(prompts,), text="tiny_talk")
    sites = SteeringSpec.model_validate({**base.model_dump(), "layers": (), "sites": (Site(layers=(3,), alpha=0.2),)}).save(tmp_path / "sites.yaml")
    refused(SpecError, r"steering='sites': sweep over alpha: sites of the spec have alpha of their own", steering=(spec, sites), sweep="alpha=1,2")
    refused(UserError, r"'trait evil' is asked for twice", traits=("persona_vectors", "evil"), judge="openai:m")
    assert calls == []
    plain = SteeringSpec().save(tmp_path / "plain.yaml")
    refused(SpecError, "it is the unsteered model", steering=(plain,))
    with pytest.raises(ValueError, match="sets alpha, and so does sweep"):
        settings(spec, tmp_path, sweep="alpha=0:1:0.5", kl=0.1)
    with pytest.raises(ValueError, match="needs traits to measure"):
        settings(spec, tmp_path, side_effects=True)
    with pytest.raises(ValueError, match=r"dtype\n.*'auto', 'float32', 'bfloat16' or 'float16'"):
        ModelConfig(dtype="float8")
    with pytest.raises(ValueError, match=r"seed\n.*greater than or equal to 0"):
        settings(spec, tmp_path, seed=-1)
    with pytest.raises(ValueError, match=r"system=' ' is blank"):
        settings(spec, tmp_path, system=(" ",))
    with pytest.raises(ValueError, match=r"system='Be kind\.' is given twice"):
        settings(spec, tmp_path, system=("Be kind.", "Be kind."))
    refused(UserError, "two arms would be called 'formal, alpha 0.123456'", sweep="alpha=0.1234561,0.1234562")
    assert calls == []


def test_a_model_adapter_or_device_that_is_not_there_is_told(tmp_path):
    (tmp_path / "model").mkdir()
    nowhere = ModelConfig(model=str(tmp_path / "model"))
    for had in (load_lm, load_model):
        with pytest.raises(ModelError, match="' cannot be loaded: .*Give a hub id, a folder, or steered-lm/tiny-chat"):
            had(nowhere)
        with pytest.raises(ModelError, match="device='cuda:99' is not there: this machine has .* Leave it out, or give cpu"):
            had(ModelConfig(device="cuda:99"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"peft='.*' cannot be loaded with model='steered-lm/tiny-chat': KeyError: 'peft_type'"):
        load_lm(ModelConfig(), peft=str(tmp_path))


def test_system_turns_that_begin_alike_are_arms_of_their_own():
    turns = [f"Answer as a formal person of the old school would {what}." for what in ("speak", "write", "sing")]
    arms = prompted_arms([*turns, "Be kind."])
    assert [arm.name[-5:] for arm in arms] == [" wou…", "… (2)", "… (3)", "kind."]
    assert [arm.system for arm in arms] == [*turns, "Be kind."]
    check_names(arms)


def test_names_of_tasks_are_ours_with_and_without_prefix(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(SHARED_DATA)) if SHARED_DATA.is_dir() else monkeypatch.delenv(VARIABLE, raising=False)
    assert plan_task("steered_truthfulqa_mc1") == plan_task("truthfulqa_mc1")
    assert plan_task("pv_evil").trait == "evil"
    assert plan_task("mmlu_virology").tasks == ("steered_mmlu_virology",)
    assert all(task.startswith("steered_mmlu_") for task in plan_task("mmlu_stem").tasks)


def test_the_unsteered_models_own_failure_is_an_error(spec, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ModelError("scores are NaN")

    monkeypatch.setattr("steered_lm.harness.items.evaluate_candidates", broken)
    with pytest.raises(ModelError, match="scores are NaN"):
        run_cost(settings(spec, tmp_path))


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_page_table_and_data(spec, tmp_path):
    out = tmp_path / "cost"
    arguments = ["cost", "--steering", str(spec), "--sweep", "alpha=1,2", "--task", "tiny_knowledge", "--trait", "formality"]
    found = CliRunner().invoke(app, [*arguments, "--text", "tiny_talk", "--limit", "8", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "it/s" not in found.output, "a library drew a bar of its own"
    assert (out / "cost.html").is_file()
    data = json.loads((out / "cost.json").read_text())["data"]
    assert {measure["name"] for measure in data["measures"]} >= {"tiny_knowledge", "trait formality", "perplexity of tiny_talk", "kl"}
    assert "alpha 2" in found.output
    again = CliRunner().invoke(app, ["report", "render", str(out / "cost.json"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "cost.html").read_text() == (out / "cost.html").read_text()


def test_no_generator_of_the_callers_is_touched(spec, tmp_path):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run_cost(settings(spec, tmp_path, traits=("formality",), samples=2, limit=3))
    assert torch.equal(torch.random.get_rng_state(), before)
