import asyncio
import gc
import json
import logging
import math
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import anyio
import pytest
import transformers as hf
from chat_folder import save_chat_model
from fault_server import Answer as Response
from fault_server import FaultServer, fault
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ContentText, Logprob, Logprobs, ModelAPI, ModelOutput, ModelUsage, TopLogprob, modelapi
from inspect_ai.util import LimitExceededError
from tiny_models import vectors_for

import steered_lm.inspect_plugin.registry  # noqa: F401 - registers steered-hf, as the entry point does
from steered_lm.errors import JudgeError, PersonaError
from steered_lm.inspect_plugin.refusal import RefusalError
from steered_lm.inspect_plugin.tasks import persona_judge
from steered_lm.judges import make_judge
from steered_lm.judges.answers import SPLIT
from steered_lm.judges.base import EMPTY, JUDGE_REFUSED, JudgeRequest, Usage
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric
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
    """A grader that gives the answers of ``script`` in turn, or raises those that are exceptions, and keeps what it was asked for them.

    To a request for log-probabilities it gives ``first``, which is an answer without any when there is none to give. ``sent`` keeps each request's
    system turn and settings.
    """

    script: ClassVar[tuple] = ()
    first: ClassVar[Any] = "1"
    asked: ClassVar[list] = []
    sent: ClassVar[list] = []

    async def generate(self, input, tools, tool_choice, config):
        Scripted.sent.append((input[0].text, config))
        if config.logprobs:
            answer = Scripted.first
        else:
            answer = Scripted.script[len(Scripted.asked) % len(Scripted.script)]
            Scripted.asked.append([(message.role, message.text) for message in input])
        await anyio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, ModelOutput) else ModelOutput.from_content("scripted", answer)


def set_script(answers, first="1"):
    Scripted.script, Scripted.first, Scripted.asked, Scripted.sent = answers, first, [], []


@pytest.fixture
def script():
    """Sets what the scripted model answers."""
    return lambda *answers, first="1": set_script(answers, first)


def first_token(*top: tuple[str, float], text: str | None = None, **settings) -> ModelOutput:
    """An answer with its first token's alternatives, by token and probability."""
    made = ModelOutput.from_content("scripted", top[0][0] if text is None else text, **settings)
    alternatives = [TopLogprob(token=token, logprob=math.log(p)) for token, p in top]
    made.choices[0].logprobs = Logprobs(content=[Logprob(token=top[0][0], logprob=math.log(top[0][1]), top_logprobs=alternatives)])
    made.usage = ModelUsage(input_tokens=30, output_tokens=1, total_tokens=31)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(folder, tmp_path):
    def evaluate(task_args=None, script=None, first="1", **settings):
        roles = {}
        if script is not None:
            set_script(script, first)
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
    assert log.eval.task_version == 2
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
    assert {"unparsable answer", "empty answer", "score outside 1 to 5, or no integer"} < reasons
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
    assert "x unparsable answer" in log.error.message


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


# The judge by itself -----------------------------------------------------------------------------------------------------------------------------

COHERENCE = Question.of_kind("coherence")
ONE = JudgeRequest(prompt="Hello?", response="Good day.")


def ask(judge, count=1):
    return judge.judge([JudgeRequest(prompt=f"Hello {n}?", response="Good day.") for n in range(count)])


def test_log_probabilities_are_read_where_the_provider_gives_them(script):
    script(first=first_token(("80", 0.5), ("90", 0.3), ("The", 0.2)))
    verdicts = ask(make_judge("inspect:scripted/m", COHERENCE), 3)
    for verdict in verdicts:
        assert verdict.score == pytest.approx((0.5 * 80 + 0.3 * 90) / 0.8)
        assert (verdict.mode, verdict.judge, verdict.scale) == ("logprobs", "inspect:scripted/m", (0.0, 100.0))
        assert verdict.mass == pytest.approx(0.8)
        assert verdict.usage == Usage(requests=1, input_tokens=30, output_tokens=1)
    assert Scripted.asked == []


def test_a_provider_without_log_probabilities_is_asked_for_json_from_then_on(script):
    script('{"reason": "Sound.", "score": 70}')
    judge = make_judge("inspect:scripted/m", COHERENCE)
    verdicts = ask(judge, 3)
    assert [(v.score, v.mode, v.explanation) for v in verdicts] == [(70, "json", "Sound.")] * 3
    # only the first of them had been asked in vain, and that is on its bill
    assert sorted(v.usage.requests for v in verdicts) == [1, 1, 2]
    script('{"reason": "Sound.", "score": 70}', first=first_token(("80", 0.9), ("90", 0.1)))
    assert ask(judge)[0].mode == "json"


def test_scores_of_several_tokens_are_asked_for_in_json(script):
    script('{"reason": "Sound.", "score": 87}', first=first_token(("8", 0.9), ("9", 0.1), text="87"))
    (verdict,) = ask(make_judge("inspect:scripted/m", COHERENCE))
    assert (verdict.score, verdict.mode) == (87, "json")
    script(first=first_token(("8", 0.9), ("9", 0.1), text="87"))
    (verdict,) = ask(make_judge("inspect:scripted/m", COHERENCE, mode="logprobs"))
    assert (verdict.score, verdict.missing) == (None, SPLIT)


class RequestError(Exception):
    """What clients of providers raise."""

    def __init__(self, status_code):
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


@pytest.mark.parametrize("refusal", [RequestError(400), RequestError(422), ValueError("no such setting"), NotImplementedError("logprobs")])
def test_a_provider_that_refuses_the_request_for_log_probabilities_is_asked_for_json(script, refusal):
    script('{"reason": "Sound.", "score": 70}', first=refusal)
    assert [(v.score, v.mode) for v in ask(make_judge("inspect:scripted/m", COHERENCE), 2)] == [(70, "json")] * 2


@pytest.mark.parametrize("problem", [RequestError(503), OSError("no route"), json.JSONDecodeError("garbage", "<html>", 0)])
def test_a_call_that_fails_is_missing_and_does_not_change_how_the_others_are_asked(script, problem):
    script('{"reason": "Sound.", "score": 70}', first=problem)
    judge = make_judge("inspect:scripted/m", COHERENCE)
    (verdict,) = ask(judge)
    assert (verdict.score, verdict.missing) == (None, f"the grader's call failed: {type(problem).__name__}: {problem}")
    script(first=first_token(("80", 0.9), ("90", 0.1)))
    assert ask(judge)[0].mode == "logprobs"
    # once one mode has answered, no fault changes it
    script('{"reason": "Sound.", "score": 70}', first=RequestError(400))
    assert ask(judge)[0].missing == "the grader's call failed: RequestError: HTTP 400"
    assert Scripted.asked == []


@pytest.mark.parametrize(
    ("answer", "score", "mode"),
    [
        ('{"reason": "x", "score": 70}', 70, "json"),
        ('```json\n{"reason": "x", "score": 70}\n```', 70, "text"),
        ('{"reason": "x", "score": 70.0}', None, "json"),
        ('{"reason": "x", "score": true}', None, "json"),
        ('Sure! {"reason": "x", "score": 70}', None, "text"),
        ("I would say 70", None, "text"),
    ],
)
def test_an_answer_is_read_strictly_and_the_verdict_says_how(script, answer, score, mode):
    script(answer)
    (verdict,) = ask(make_judge("inspect:scripted/m", COHERENCE))
    assert (verdict.score, verdict.mode) == (score, mode)


def test_a_mode_that_is_asked_for_is_kept(script):
    script('```json\n{"reason": "x", "score": 70}\n```')
    assert ask(make_judge("inspect:scripted/m", COHERENCE, mode="json"))[0].missing == "unparsable answer"
    assert ask(make_judge("inspect:scripted/m", COHERENCE, mode="text"))[0].score == 70
    assert ask(make_judge("inspect:scripted/m", COHERENCE, mode="logprobs"))[0].missing == "the endpoint gave no log-probabilities"


def test_a_schema_and_the_prompt_of_the_mode_are_sent(script):
    script('{"reason": "x", "score": 70}')
    ask(make_judge("inspect:scripted/m", COHERENCE))
    (token, first), (full, second) = Scripted.sent
    assert (token, full) == (COHERENCE.system(token=True), COHERENCE.system())
    assert (first.logprobs, first.top_logprobs, first.response_schema, first.temperature) == (True, 20, None, 0.0)
    assert (second.logprobs, second.max_tokens, second.temperature) == (None, None, 0.0)
    assert second.response_schema.strict is True
    schema = second.response_schema.json_schema.model_dump(exclude_none=True)
    assert schema == COHERENCE.rubric.answer_schema


def test_a_model_that_declines_to_judge_or_is_cut_off_is_missing(script):
    script(ModelOutput.from_content("scripted", "I cannot help with that.", stop_reason="content_filter"))
    (verdict,) = ask(make_judge("inspect:scripted/m", COHERENCE, mode="json"))
    assert (verdict.score, verdict.missing, verdict.explanation) == (None, JUDGE_REFUSED, "I cannot help with that.")
    script(first=first_token(("80", 0.9), ("90", 0.1), stop_reason="content_filter"))
    assert ask(make_judge("inspect:scripted/m", COHERENCE))[0].missing == JUDGE_REFUSED
    script(first=first_token(("80", 0.9), ("90", 0.1), stop_reason="max_tokens"))
    assert ask(make_judge("inspect:scripted/m", COHERENCE))[0].score == pytest.approx(81)
    script(ModelOutput.from_content("scripted", '{"reason": "x", "score": 7', stop_reason="max_tokens"))
    assert ask(make_judge("inspect:scripted/m", COHERENCE, mode="json"))[0].missing == "answer cut off: length"
    script(ModelOutput(model="scripted", choices=[]))
    assert ask(make_judge("inspect:scripted/m", COHERENCE, mode="json"))[0].missing == "empty answer"


def test_a_refusal_does_not_settle_how_the_others_are_asked(script):
    script('{"reason": "x", "score": 70}', first=ModelOutput.from_content("scripted", [ContentText(text="I cannot.", refusal=True)]))
    judge = make_judge("inspect:scripted/m", COHERENCE)
    (verdict,) = ask(judge)
    assert (verdict.score, verdict.missing, verdict.explanation) == (None, JUDGE_REFUSED, "I cannot.")
    script('{"reason": "x", "score": 70}')
    assert [(v.score, v.mode) for v in ask(judge)] == [(70, "json")]


def test_inspects_own_openai_provider_gives_the_score_of_a_recorded_response(monkeypatch):
    recorded = (Path(__file__).with_name("recorded") / "trait.json").read_text("utf-8")
    server = FaultServer(lambda *_: Response(recorded))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        verdicts = ask(make_judge("inspect:openai/gpt-4.1-mini", Question.of_trait("humorous")), 3)
        server.script = lambda *_: fault(401, "no such key: sk-planted-0123456789")
        (refused,) = ask(make_judge("inspect:openai/gpt-4.1-mini", Question.of_trait("humorous")))
    finally:
        server.close()
    # worked out by hand in test_answers.py
    assert [(v.score, v.mode) for v in verdicts] == [(pytest.approx(83.659 / 0.983), "logprobs")] * 3
    assert verdicts[0].usage == Usage(requests=1, input_tokens=412, output_tokens=1)
    assert server.bodies[0]["top_logprobs"] == 20
    assert refused.missing.startswith("the grader's call failed: AuthenticationError")
    assert "planted" not in str(refused)


def test_our_own_provider_is_asked_for_text_since_it_gives_nothing_else(folder):
    short = COHERENCE.rubric.model_copy(update={"instructions": "Rate.", "levels": {}, "answer": "A number.", "answer_token": "A number."})
    judge = make_judge(f"inspect:steered-hf/{folder}", Question(short))
    (verdict,) = ask(judge)
    assert (verdict.score, verdict.mode) == (None, "text")
    assert verdict.missing in ("unparsable answer", "answer cut off: length")


def test_an_empty_response_is_missing_and_nobody_is_asked(script):
    script('{"reason": "x", "score": 70}')
    (verdict,) = make_judge("inspect:scripted/m", COHERENCE).judge([JudgeRequest(prompt="?", response=" ")])
    assert (verdict.missing, verdict.scale, verdict.usage) == (EMPTY, (0.0, 100.0), None)
    assert Scripted.asked == []
    assert make_judge("inspect:scripted/m", COHERENCE).judge([]) == []


def test_the_judge_works_inside_an_event_loop_and_in_one_thread_after_another(script):
    script('{"reason": "x", "score": 70}')
    judge = make_judge("inspect:scripted/m", COHERENCE)

    async def inside():
        return ask(judge, 30), await judge.grade(ONE)

    many, one = asyncio.run(inside())
    assert {v.score for v in (*many, one)} == {70}
    assert len(many) == 30
    assert {v.score for v in ask(judge, 30)} == {70}


def test_verdicts_are_handed_over_as_they_come_and_a_failure_ends_the_call(script):
    script('{"reason": "x", "score": 70}', '{"reason": "x", "score": 60}')
    seen = {}
    judge = make_judge("inspect:scripted/m", COHERENCE)
    verdicts = judge.judge_each([ONE, JudgeRequest(prompt="?", response=""), ONE], seen.__setitem__)
    assert [seen[index] for index in range(3)] == verdicts
    script(LimitExceededError("token", value=2, limit=1))
    with pytest.raises(LimitExceededError):
        judge.judge([ONE, ONE])


def test_without_a_grader_the_judge_says_what_to_give(script):
    judge = make_judge("inspect", COHERENCE)
    assert judge.name == "grader"
    for use in (lambda: judge.judge([ONE]), lambda: judge.identity):
        with pytest.raises(JudgeError, match="asks the model role grader, and there is none here. Give --model-role grader=<model>"):
            use()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inspect:nonsense/m", {}, "judge=inspect:nonsense/m cannot be used: Model API nonsense .* not recognized"),
        ("inspect:nonsense", {}, "should be in the format of <api_name>/<model_name>"),
        ("inspect:scripted/m", {"mode": "yaml"}, "judge inspect is not a valid InspectOptions: mode"),
        ("inspect:scripted/m", {"temperature": 1}, "temperature.*Allowed keys: model, mode"),
    ],
)
def test_a_model_or_an_option_that_inspect_does_not_know_is_refused(name, options, message):
    with pytest.raises(JudgeError, match=message):
        make_judge(name, COHERENCE, **options)


def test_the_identity_holds_question_model_and_mode():
    def identity(name="inspect:scripted/m", asked=COHERENCE, **options):
        return make_judge(name, asked, **options).identity

    others = [identity("inspect:scripted/n"), identity(asked=Question.of_kind("informative")), identity(mode="json")]
    assert identity() == identity()
    assert len({identity(), *others}) == 4


def test_a_key_of_the_environment_is_in_no_reason_and_no_explanation(script, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-planted-0123456789")
    script(OSError("refused sk-planted-0123456789"), '{"reason": "sk-planted-0123456789", "score": 7}')
    judge = make_judge("inspect:scripted/m", COHERENCE, mode="json")
    verdicts = [ask(judge)[0], ask(judge)[0]]
    assert "sk-planted" not in str(verdicts)
    assert [v.missing or v.explanation for v in verdicts] == ["the grader's call failed: OSError: refused [key]", "[key]"]


def test_pairs_are_asked_in_both_orders(script):
    script(first=first_token(("A", 0.8), ("B", 0.2)))
    question = Question(Rubric.load("pairwise"), "A keeper of bees.")
    (verdict,) = make_judge("inspect:scripted/m", question).judge([JudgeRequest(prompt="?", response="x", other="y")])
    # a judge that always prefers the first one
    assert [part.score for part in verdict.parts] == pytest.approx([0.6, 0.6])
    assert (verdict.score, verdict.choice, verdict.consistent) == (0.0, "tie", False)


def test_inside_an_evaluation_any_model_of_inspects_judges_by_name(run, script):
    script('{"reason": "x", "score": 4}', first=first_token(("4", 0.6), ("5", 0.4)))
    log = run({"judge": "inspect:scripted/m"})
    scores = [sample.scores["persona_fit"] for sample in log.samples]
    assert log.status == "success"
    assert [score.value["persona_fit"] for score in scores] == pytest.approx([4.4] * len(scores))
    assert {(score.metadata["judge"], score.metadata["mode"]) for score in scores} == {("inspect:scripted/m", "logprobs")}
    assert scores[0].metadata["mass"] == pytest.approx(1.0)
    # each sample's own log has the call that judged it
    assert all(sample.model_usage["scripted/m"].total_tokens == 31 for sample in log.samples)


def test_inside_an_evaluation_verdicts_of_inspects_models_can_be_cached(run, script, tmp_path):
    script('{"reason": "x", "score": 4}')
    given = {"judge": "inspect:scripted/m", "cache": str(tmp_path / "cache.sqlite"), "judge_mode": "json"}
    first = run(given)
    assert first.status == "success"
    assert len(Scripted.asked) == len(first.samples)
    second = run(given)
    assert len(Scripted.asked) == len(first.samples)
    assert {sample.scores["persona_fit"].metadata["cached"] for sample in second.samples} == {True}


def test_the_role_by_its_judges_name_takes_options_and_is_missed_when_there_is_none(run):
    log = run({"judge": "inspect", "judge_mode": "json"}, ('{"reason": "x", "score": 4}',), first=first_token(("5", 0.9)))
    assert {sample.scores["persona_fit"].metadata["mode"] for sample in log.samples} == {"json"}
    log = run({"judge": "inspect"})
    assert log.status == "error"
    assert "asks the model role grader, and there is none here" in log.error.message


def test_the_graders_log_probabilities_are_the_score(run):
    log = run(script=("unused",), first=first_token(("4", 0.5), ("2", 0.3), ("I", 0.2)))
    assert short(metrics(log))["persona_fit/mean"] == pytest.approx((4 * 0.5 + 2 * 0.3) / 0.8)
    assert Scripted.asked == []
