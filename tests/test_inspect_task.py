import gc
import json
import logging
import math
from pathlib import Path
from statistics import mean
from typing import ClassVar

import pytest
import transformers as hf
from chat_folder import save_chat_model
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelAPI, ModelOutput, modelapi
from tiny_models import vectors_for

import steered_lm.inspect_plugin.registry  # noqa: F401 - registers steered-hf, as the entry point does
from steered_lm.errors import JudgeError, PersonaError
from steered_lm.inspect_plugin.grader import read_score
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.inspect_plugin.tasks import persona_judge
from steered_lm.judges import make_judge
from steered_lm.judges.base import JudgeRequest
from steered_lm.persona import load_persona
from steered_lm.steering.spec import SteeringSpec, VectorsRef

# both inside inspect_ai: it passes an argument that tenacity deprecated, and leaves its own streams to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
PERSONA = "edmund"


@modelapi(name="scripted")
class Scripted(ModelAPI):
    """A grader that gives the answers of ``script`` in turn, or raises those that are exceptions, and keeps what it was asked."""

    script: ClassVar[tuple] = ()
    asked: ClassVar[list] = []

    async def generate(self, input, tools, tool_choice, config):
        answer = Scripted.script[len(Scripted.asked) % len(Scripted.script)]
        Scripted.asked.append([(message.role, message.text) for message in input])
        if isinstance(answer, Exception):
            raise answer
        return ModelOutput.from_content("scripted", answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(folder, tmp_path):
    def evaluate(task_args=None, script=None, **settings):
        roles = {}
        if script is not None:
            Scripted.script, Scripted.asked = script, []
            roles = {"model_roles": {"grader": "scripted/grader"}}
        given = {"max_tokens": 8, "persona": PERSONA, **(task_args or {})}
        (log,) = inspect_eval(
            persona_judge, task_args=given, model=f"steered-hf/{folder}", log_dir=str(tmp_path / "logs"), display="none", **roles, **settings
        )
        return log

    yield evaluate
    gc.collect()  # while this file's filters hold: every eval() leaves streams behind


def metrics(log):
    return {f"{score.name}/{name}": metric.value for score in log.results.scores for name, metric in score.metrics.items()}


def short(results):
    return {name.replace("steered_lm/", ""): value for name, value in results.items()}


def test_the_task_reports_the_judges_own_verdicts_on_the_personas_test_items(run, caplog):
    with caplog.at_level(logging.INFO, "steered_lm.inspect_plugin.loading"):
        log = run()
    # the model is loaded once: without an entry in its table, Inspect would ask for it a second time to learn its context length
    assert len([record for record in caplog.records if record.name == "steered_lm.inspect_plugin.loading"]) == 1
    items = load_persona(PERSONA).items("test")
    assert log.status == "success"
    assert {sample.id for sample in log.samples} == {item.item for item in items}
    judge = make_judge("stylometric", load_persona(PERSONA))
    by_id = {item.item: item for item in items}
    requests = [JudgeRequest(prompt=by_id[s.id].prompt, response=s.output.completion.strip()) for s in log.samples]
    scores = [verdict.score for verdict in judge.judge(requests)]
    assert [sample.scores["persona_fit"].value["persona_fit"] for sample in log.samples] == pytest.approx(scores)
    found = short(metrics(log))
    assert found["persona_fit/mean"] == pytest.approx(mean(scores))
    assert found["missing/total"] == 0
    assert found["response_length/mean"] == pytest.approx(mean(len(request.response.split()) for request in requests))
    assert "persona_fit/stderr" in found
    assert log.eval.task_version == 1
    assert log.eval.metadata["persona"] == PERSONA


def test_a_spec_given_as_model_argument_changes_the_replies_and_is_noted_in_the_log(run, folder, tmp_path):
    vectors = VectorsRef.to(vectors_for(hf.AutoModelForCausalLM.from_pretrained(folder)).save(tmp_path / "vectors.safetensors"))
    spec = SteeringSpec(vectors=vectors, weights={"formality": 1.0}, layers=(1,), unit="raw", alpha=6.0)
    file = spec.save(tmp_path / "spec.yaml")
    script = ('{"score": 3}',)
    steered, plain = run(script=script, model_args={"steering": str(file)}), run(script=script)
    assert all(sample.output.metadata["steering"] == spec.digest for sample in steered.samples)
    assert steered.eval.model_args == {"steering": str(file)}
    texts = [{sample.id: sample.output.completion for sample in log.samples} for log in (steered, plain)]
    assert texts[0].keys() == texts[1].keys()
    assert texts[0] != texts[1]


def test_the_grader_role_takes_the_judges_place_and_sees_rubric_and_reply_apart(run):
    log = run(script=('{"reason": "fits", "score": 4}', '{"reason": "so so", "score": 2}'))
    count = len(log.samples)
    assert short(metrics(log))["persona_fit/mean"] == pytest.approx((4 * ((count + 1) // 2) + 2 * (count // 2)) / count)
    assert {sample.scores["persona_fit"].metadata["judge"] for sample in log.samples} == {"grader:scripted/grader"}
    system, user = Scripted.asked[0]
    assert load_persona(PERSONA).judge_prompt.strip() in system[1]
    assert set(json.loads(user[1])) == {"message", "reply"}


def test_garbage_and_failed_calls_of_the_grader_are_missing_and_left_out_of_the_mean(run):
    script = ('{"score": 5}', "I would say 4", "", '{"score": 9}', OSError("no route"), '{"score": 3}')
    log = run({"missing_limit": 1}, script)
    found = short(metrics(log))
    values = [sample.scores["persona_fit"].value["persona_fit"] for sample in log.samples]
    scored = [value for value in values if not math.isnan(value)]
    assert found["missing/total"] == len(values) - len(scored) > 0
    assert set(scored) <= {5.0, 3.0}
    assert found["persona_fit/mean"] == pytest.approx(mean(scored))
    reasons = {sample.scores["persona_fit"].explanation for sample in log.samples}
    assert any("no score in the grader's answer 'I would say 4'" in reason for reason in reasons)
    assert any("the grader's call failed: OSError: no route" in reason for reason in reasons)


def test_when_all_verdicts_are_missing_the_mean_is_nan_and_never_a_number(run):
    log = run({"missing_limit": 1}, ("no idea",), epochs=2)
    found = short(metrics(log))
    assert math.isnan(found["persona_fit/mean"])
    assert math.isnan(found["persona_fit/stderr"])
    assert found["missing/total"] == len(log.samples) == 2 * len(load_persona(PERSONA).items("test"))


def test_too_many_missing_verdicts_end_the_run_with_their_reasons(run):
    log = run(None, ("no idea",))
    assert log.status == "error"
    assert "verdicts are missing, and missing_limit=0.2" in log.error.message
    assert "no score in the grader's answer 'no idea'" in log.error.message


def test_an_empty_reply_is_missing_and_no_grader_is_asked(run):
    log = run({"missing_limit": 1}, ('{"score": 5}',), stop_seqs=list("abcdefghijklmnopqrstuvwxyzPBIGY?!. "))
    assert Scripted.asked == []
    assert {sample.scores["persona_fit"].explanation for sample in log.samples} == {"empty response"}


@pytest.mark.parametrize(
    ("arguments", "cause", "message"),
    [
        ({"persona": "edmond"}, PersonaError, "persona='edmond' is neither .* Did you mean 'edmund'?"),
        ({"split": "tset"}, PersonaError, "split='tset' does not exist.*Did you mean 'test'?"),
        ({"judge": "stylometrik"}, JudgeError, "Did you mean 'stylometric'?"),
        ({"personna": "edmund"}, JudgeError, "no argument 'personna'.*Did you mean 'persona'?"),
        ({"judge_temper": 1}, JudgeError, "does not take options"),
        ({"judge_api_key": "x"}, JudgeError, "Set the key in the environment"),
        ({"missing_limit": 20}, JudgeError, "missing_limit=20 is not a share"),
    ],
)
def test_wrong_task_arguments_are_refused_before_the_model_runs(arguments, cause, message):
    with pytest.raises(RefusalError, match=message) as caught:
        persona_judge(**arguments)
    assert isinstance(caught.value.__cause__, cause)


def test_a_refusal_inside_eval_is_one_message(run):
    with pytest.raises(RefusalError, match="Did you mean 'edmund'"):
        run({"persona": "edmnd"})


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reason": "x", "score": 4}', 4.0),
        ('Sure!\n```json\n{"score": 2.0}\n```', 2.0),
        ('{"score": 1} and then {"score": 5}', 5.0),
        ('{a} {"score": 3}', 3.0),
        ('{"score": "4"}', None),
        ('{"score": true}', None),
        ('{"score": 3.5}', None),
        ('{"score": NaN}', None),
        ('{"score": 0}', None),
        ("4", None),
        ("", None),
    ],
)
def test_only_a_whole_score_of_the_scale_is_read_from_an_answer(text, score):
    assert read_score(text) == score
