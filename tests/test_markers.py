"""The judge ``markers``, and the persona axes measured with it by the tasks of traits, on the shipped tiny model in both harnesses."""

import gc
import json
import math
import tomllib
from functools import partial
from statistics import fmean

import lm_eval
import pytest
from environments import REPOSITORY
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelAPI, ModelOutput, modelapi

import steered_lm.inspect_plugin.registry as registry
from steered_lm.commands.options import make_judges
from steered_lm.content import TINY_CHAT
from steered_lm.errors import JudgeError
from steered_lm.extract.build import ExtractConfig, build_vectors
from steered_lm.extract.confirm import confirm, judges_of
from steered_lm.extract.contrast import load_contrast_set
from steered_lm.harness.chat_task import load_tasks
from steered_lm.harness.model import SteeredHFLM
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.judges import _BUILT_IN, COMPUTED, ENTRY_POINTS, answers_kind, check_missing, judge_names, make_judge
from steered_lm.judges.base import EMPTY, FINDINGS, NO_MARKER, NOT_JUDGED, JudgeRequest
from steered_lm.judges.markers import MarkersJudge
from steered_lm.judges.question import Question
from steered_lm.judges.trait_run import COUNTS, MEANS, OF_COHERENCE, TraitJudges, TraitRun, not_judged, question_values, response_values
from steered_lm.judges.traits import TraitError, load_trait
from steered_lm.persona import load_persona, meter
from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.study import ModelConfig, load_model

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
LAYER = 3


@modelapi(name="seventy")
class Seventy(ModelAPI):
    """A grader that gives 70 to everything."""

    async def generate(self, input, tools, tool_choice, config):
        return ModelOutput.from_content("seventy", '{"reason": "so", "score": 70}')


def judged(text, axis="formality", prompt="?"):
    (verdict,) = make_judge("markers", Question.of_trait(axis)).judge([JudgeRequest(prompt=prompt, response=text)])
    return verdict


# -- the judge


@pytest.mark.parametrize(
    ("axis", "text", "score"),
    [
        ("formality", "Indeed, it is so.", 100),
        ("formality", "Yeah, whatever.", 0),
        ("formality", "Indeed, yeah.", 50),
        ("formality", "Indeed, certainly, moreover: okay.", 75),
        ("emotional_tone", "A gloomy day, and one lovely moment, and a sad one.", 100 / 3),
        ("self_other_focus", "I see you, and I see me.", 75),
    ],
)
def test_the_share_of_high_markers_is_the_score(axis, text, score):
    verdict = judged(text, axis)
    assert verdict.score == pytest.approx(score)
    assert (verdict.scale, verdict.judge) == ((0, 100), "markers")
    assert f"markers of {axis}: " in verdict.explanation


@pytest.mark.parametrize(("text", "reason"), [("", EMPTY), (" \n", EMPTY), ("The harbour.", NO_MARKER), ("I love it.", NO_MARKER)])
def test_without_a_marker_of_the_axis_there_is_no_score(text, reason):
    assert (judged(text).score, judged(text).missing) == (None, reason)


def test_requests_are_answered_in_order_and_prompts_are_not_read():
    found = make_judge("markers", Question.of_trait("formality")).judge([JudgeRequest(prompt="yeah", response=t) for t in ("indeed", "yeah", "")])
    assert [verdict.score for verdict in found] == [100, 0, None]


def test_responses_without_a_marker_are_no_fault_of_the_judge_and_empty_ones_are():
    check_missing([judged("The harbour.")] * 9 + [judged("indeed")], 0.0, findings=FINDINGS)
    with pytest.raises(JudgeError, match="1 of 2 verdicts are missing.*1 x empty response"):
        check_missing([judged(""), judged("indeed")], findings=FINDINGS)


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        (lambda: Question.of_trait("evil"), "nothing about trait 'evil'"),
        (lambda: Question.of_trait("formal", "is formal"), "nothing about trait 'formal'"),
        (lambda: Question.of_kind("coherence"), "nothing about the kind 'coherence'"),
        (lambda: Question.of_persona(load_persona("walt")), "nothing about the kind 'persona_fit'"),
    ],
)
def test_other_questions_are_refused_with_what_it_can_judge_and_who_can_judge_them(question, asked):
    with pytest.raises(JudgeError, match=f"one of these traits: self_other_focus, formality, .*{asked}.*openai:<model>.*hf:<model>.*stylometric"):
        make_judge("markers", question())


def test_identity_depends_on_the_axis_what_is_asked_and_the_marker_words(tmp_path, monkeypatch):
    formality = MarkersJudge.for_question(Question.of_trait("formality"))
    questions = [Question.of_trait("emotional_tone"), Question.of_trait("formality", "is stiff."), load_trait("formality").question("file")]
    names = {formality.identity, *(MarkersJudge.for_question(question).identity for question in questions)}
    assert len(names) == 4
    assert formality.identity == MarkersJudge.for_question(Question.of_trait("formality")).identity
    (tmp_path / "markers.yaml").write_bytes((REPOSITORY / "steered_lm" / "persona" / "markers.yaml").read_bytes() + b"# one more\n")
    before = formality.identity
    monkeypatch.setattr(meter, "__file__", str(tmp_path / "meter.py"))
    assert formality.identity != before


def test_it_is_registered_where_the_others_are_and_keeps_scores_in_a_cache(tmp_path):
    assert "markers" in judge_names()
    points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"][ENTRY_POINTS]
    assert points == _BUILT_IN
    request = [JudgeRequest(prompt="?", response="indeed")]
    for cached in (False, True):
        judge = make_judge("markers", Question.of_trait("formality"), cache=tmp_path / "c.sqlite")
        assert [(verdict.score, verdict.cached) for verdict in judge.judge(request)] == [(100, cached)]


def test_options_for_endpoints_are_not_given_to_judges_that_compute():
    assert {"markers", "stylometric"} == set(COMPUTED)
    (judge,) = make_judges(["markers"], Question.of_trait("formality"), ["base_url=http://127.0.0.1:9/v1"])
    assert judge.name == "markers"
    with pytest.raises(JudgeError, match=r"judge='markers:big' does not take options \['model'\]"):
        make_judge("markers:big", Question.of_trait("formality"))


def test_backends_say_which_kinds_they_answer_and_the_others_answer_all():
    answered = {name: [answers_kind(name, kind) for kind in ("trait", "coherence", "persona_fit")] for name in ("markers", "stylometric", "openai:m")}
    assert answered == {"markers": [True, False, False], "stylometric": [False, False, True], "openai:m": [True, True, True]}


# -- without coherence


def test_coherence_that_nobody_judges_has_no_value_and_is_not_counted():
    judges = TraitRun(trait="formality", judge="markers").judges(load_trait("formality"), {})
    assert judges.coherence is None
    (found,) = judges.judge([JudgeRequest(prompt="?", response="indeed")])
    assert (found.trait.score, found.coherence) == (100, not_judged("markers"))
    values = question_values([response_values(found.record())])
    assert math.isnan(values["coherence"])
    assert (values["trait_score"], values["coherence_missing"]) == (100, 0)


def test_responses_cannot_be_confirmed_without_coherence():
    with pytest.raises(JudgeError, match="a response is confirmed by its coherence, too, and markers cannot judge that"):
        judges_of(load_contrast_set("formality"), partial(make_judge, "markers"))
    judge = make_judge("markers", Question.of_trait("formality"))
    with pytest.raises(JudgeError, match="judge markers does not judge coherence, which is needed here"):
        confirm(TraitJudges(judge, None), ["?"], ["indeed"], ["yeah"])


# -- in the harnesses


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spec")
    made = build_vectors(
        *load_model(ModelConfig(device="cpu")), [load_contrast_set("formality")], [LAYER], ExtractConfig(pairs=24, held_out_pairs=12)
    )
    vectors = VectorsRef.to(made.save(folder / "v.safetensors"))
    return SteeringSpec(vectors=vectors, weights={"formality": 1.0}, layers=(LAYER,), alpha=0.4).save(folder / "spec.yaml")


@pytest.fixture(scope="module")
def plain():
    return SteeredHFLM(TINY_CHAT, device="cpu", batch_size=16)


@pytest.fixture
def inspect_run(tmp_path):
    def evaluate(roles=None, **given):
        settings = {"model": f"steered-hf/{TINY_CHAT}", "log_dir": str(tmp_path / "logs"), "display": "none", "model_roles": roles}
        (log,) = inspect_eval(registry.pv_trait, task_args=given, **settings)
        return log

    yield evaluate
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def run(lm, **metadata):
    (task,) = load_tasks(["pv_trait"], {"judge": "markers", **metadata})
    found = lm_eval.evaluate(lm, {"pv_trait": task}, bootstrap_iters=0)
    return found["results"]["pv_trait"], found["samples"]["pv_trait"], found["configs"]["pv_trait"]["metadata"]


def values_of(log):
    return {score.name: next(iter(score.metrics.values())).value for score in log.results.scores}


def test_both_harnesses_measure_an_axis_with_the_same_result_and_leave_coherence_out(plain, inspect_run):
    results, samples, metadata = run(plain, trait="formality")
    trait = load_trait("formality")
    assert [sample["doc"]["question"] for sample in samples] == list(trait.evaluate.questions)
    levels = [meter.trait_levels(sample["resps"][0][0])["formality"] for sample in samples]
    assert results["trait_score,none"] == pytest.approx(fmean(50 * (1 + level) for level in levels if level is not None))
    assert results["missing,none"] == levels.count(None)
    names = [name for name in (*MEANS, *COUNTS) if name not in OF_COHERENCE]
    assert {key.partition(",")[0].removesuffix("_stderr") for key in results} - {"alias", "sample_len", "name"} == set(names)
    assert metadata["trait_digest"] == trait.digest
    assert "judge_identity" in metadata
    assert "coherence_identity" not in metadata
    log = inspect_run(trait="formality", judge="markers")
    assert log.status == "success"
    assert log.eval.task.endswith("pv_formality")
    assert [sample.output.completion.strip() for sample in log.samples] == [sample["resps"][0][0].strip() for sample in samples]
    assert values_of(log) == pytest.approx({name: results[f"{name},none"] for name in names})
    logged = json.loads(samples[0]["filtered_resps"][0])[0]
    own = log.samples[0].scores["trait_expression"].metadata
    assert own["trait"]["score"] == logged["trait"]["score"]
    assert own["coherence"]["missing"] == logged["coherence"]["missing"] == NOT_JUDGED


def test_responses_without_a_marker_are_counted_as_missing_and_stop_neither_harness(plain, inspect_run):
    results, samples, _ = run(plain, trait="emotional_tone", max_gen_toks=1, missing_limit=0)
    assert all(sample["resps"][0][0].strip() for sample in samples)
    assert (results["missing,none"], results["refusals,none"]) == (12, 0)
    assert math.isnan(results["trait_score,none"])
    log = inspect_run(trait="emotional_tone", judge="markers", max_tokens=1, missing_limit=0)
    assert log.status == "success"
    assert values_of(log)["missing"] == 12
    assert log.samples[0].scores["trait_expression"].explanation == NO_MARKER


def test_steering_towards_an_axis_raises_its_score(plain, spec):
    before, _, _ = run(plain, trait="formality")
    after, _, _ = run(SteeredHFLM(TINY_CHAT, device="cpu", batch_size=16, steering=str(spec)), trait="formality")
    assert after["trait_score,none"] > before["trait_score,none"] + 20
    assert after["share_81_100,none"] > before["share_81_100,none"]


def test_a_grader_role_takes_the_place_of_markers_and_judges_coherence_too(inspect_run):
    log = inspect_run(roles={"grader": "seventy/grader"}, trait="formality", judge="markers", max_tokens=4)
    assert log.status == "success"
    assert {name: value for name, value in values_of(log).items() if name in ("trait_score", *OF_COHERENCE)} == {
        "trait_score": 70,
        "coherence": 70,
        "coherence_missing": 0,
    }


def test_what_markers_cannot_judge_is_refused_before_the_model_runs_in_both():
    with pytest.raises(JudgeError, match="They say nothing about trait 'evil'"):
        load_tasks(["pv_evil"], {"judge": "markers"})
    with pytest.raises(RefusalError, match="They say nothing about trait 'evil'"):
        registry.pv_evil(judge="markers")
    with pytest.raises(RefusalError, match=r"pv_formality needs a judge.*judge=markers \(offline\)"):
        registry.pv_trait(trait="formality")
    with pytest.raises(TraitError, match="trait='formalty' is none of ours.*Did you mean 'formality'"):
        load_tasks(["pv_trait"], {"trait": "formalty", "judge": "markers"})
