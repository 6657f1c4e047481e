"""A panel: several judges as one, with real members, and with scripted ones where their scores have to be known."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges import make_judge
from steered_lm.judges.base import EMPTY, PREFERENCE, REFUSAL, Choice, Judge, JudgeRequest, OnVerdict, StreamingJudge, Usage, Verdict
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge
from steered_lm.judges.panel import Panel, PanelFile, combine, commonest, majority
from steered_lm.judges.question import Question
from steered_lm.persona.load import load_persona

REQUESTS = [JudgeRequest(prompt=f"What of {i}?", response=f"It is {i}.") for i in range(4)]
CHEAP = "{judge: 'openai:cheap', key_env: none, base_url: 'http://127.0.0.1:9/v1'}"  # a member that is quickly made, and never asked
PAIR = JudgeRequest(prompt="Why?", response="Because I say so.", other="Nobody knows.")


def scored(*scores: float | None, scale: tuple[float, float] = (1.0, 5.0), reason: str = "HTTP 500") -> list[Verdict]:
    return [
        Verdict(score=score, missing=reason if score is None else None, scale=scale, judge=f"judge {k}", usage=Usage(requests=1, input_tokens=10 * k))
        for k, score in enumerate(scores)
    ]


def chosen(*choices: Choice) -> list[Verdict]:
    return [
        Verdict(
            score={"A": 1.0, "B": -1.0, "tie": 0.0}[c], scale=PREFERENCE, judge=f"judge {k}", choice=c, confidence=0.5 + k / 10, consistent=k != 2
        )
        for k, c in enumerate(choices)
    ]


class Scripted:
    """A judge that says what it is told to; it may wait, fail or stream."""

    def __init__(self, name: str, answer: Callable[[int], Verdict], *, remote: bool = False) -> None:
        self.name, self.identity, self.remote, self._answer = name, content_hash(name), remote, answer

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        return [self._answer(index) for index in range(len(requests))]


class Streaming(Scripted):
    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        verdicts = []
        for index in range(len(requests)):
            verdicts.append(self._answer(index))
            on_verdict(index, verdicts[-1])
        return verdicts


def says(name: str, score: float) -> Scripted:
    return Scripted(name, lambda index: Verdict(score=score, judge=name))


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        ("mean", (1, 2, 5), 8 / 3),
        ("median", (1, 2, 5), 2),
        ("median", (1, 2), 1.5),
        ("majority", (4, 1, 4), 4),
        ("majority", (3.6, 4.4, 1), 4),
        ("majority", (1, 2, 5), 2),
        ("majority", (1, 1, 5, 5, 2), 2),
    ],
)
def test_a_rule_makes_one_score_of_the_members(rule: Any, scores: tuple[float, ...], expected: float) -> None:
    verdict = combine(scored(*scores), rule, quorum=2, judge="panel:p")
    assert verdict.score == pytest.approx(expected)
    assert [part.score for part in verdict.parts] == list(scores)
    assert verdict.usage == Usage(requests=len(scores), input_tokens=10 * sum(range(len(scores))))


def test_fewer_scores_than_the_quorum_are_missing_with_the_members_reasons() -> None:
    verdict = combine(scored(4, None, None), "median", quorum=2, judge="panel:p")
    assert verdict.score is None
    assert verdict.missing == "1 of 3 judges have a score, 2 are needed (judge 1: HTTP 500; judge 2: HTTP 500)"
    assert verdict.usage is not None and verdict.usage.requests == 3
    assert combine(scored(4, None, None), "median", quorum=1, judge="panel:p").score == 4
    assert combine(scored(4, 2, None), "mean", quorum=2, judge="panel:p").score == 3


@pytest.mark.parametrize("reason", [EMPTY, REFUSAL])
def test_what_all_members_say_is_missing_is_said_in_their_words(reason: str) -> None:
    assert combine(scored(None, None, reason=reason), "mean", quorum=1, judge="p").missing == reason


@pytest.mark.parametrize(
    ("choices", "choice"),
    [(("A", "A", "B"), "A"), (("B", "tie", "B"), "B"), (("A", "B"), "tie"), (("A", "B", "tie"), "tie"), (("tie", "tie", "A"), "tie")],
)
def test_the_choice_of_a_pair_is_the_commonest_one_and_a_tie_where_several_are(choices: tuple[Choice, ...], choice: Choice) -> None:
    verdict = combine(chosen(*choices), "majority", quorum=2, judge="p")
    assert (verdict.choice, verdict.score) == (choice, {"A": 1.0, "B": -1.0, "tie": 0.0}[choice])
    assert verdict.scale == PREFERENCE


def test_a_pairs_confidence_is_that_of_the_members_who_won_and_it_is_consistent_when_all_are() -> None:
    verdict = combine(chosen("A", "A", "B"), "mean", quorum=2, judge="p")
    assert (verdict.choice, verdict.confidence, verdict.consistent) == ("A", pytest.approx(0.55), False)
    assert verdict.score == pytest.approx(1 / 3)
    assert combine(chosen("A", "B"), "mean", quorum=2, judge="p").confidence is None
    assert combine(chosen("A", "A"), "mean", quorum=2, judge="p").consistent is True


def test_members_on_different_scales_are_refused() -> None:
    mixed = [*scored(3), *scored(80, scale=(0.0, 100.0))]
    with pytest.raises(JudgeError, match=r"different scales \(judge 0 1 to 5, judge 0 0 to 100\)"):
        combine(mixed, "mean", quorum=1, judge="p")


def test_commonest_and_majority_say_when_several_are() -> None:
    assert commonest(["x", "y", "x"]) == "x"
    assert commonest(["x", "y"]) is None and commonest([]) is None
    assert majority([1, 1, 2, 2, 5]) == 2


def test_remote_members_are_asked_at_the_same_time() -> None:
    both_there = threading.Barrier(2, timeout=30)

    def answer(index: int) -> Verdict:
        both_there.wait()
        return Verdict(score=2, judge="remote")

    panel = Panel([Scripted("a", answer, remote=True), Scripted("b", answer, remote=True), says("here", 5)])
    assert [v.score for v in panel.judge(REQUESTS)] == [2, 2, 2, 2]
    assert panel.remote and isinstance(panel, Judge) and isinstance(panel, StreamingJudge)


def test_each_verdict_is_handed_over_once_as_its_last_member_answers() -> None:
    seen: list[tuple[int, float | None]] = []
    first_seen = threading.Event()

    def slow(index: int) -> Verdict:
        if index == 1:
            assert first_seen.wait(30), "the first verdict was held back until the second request was answered"
        return Verdict(score=index + 1, judge="slow")

    def hand_over(index: int, verdict: Verdict) -> None:
        seen.append((index, verdict.score))
        first_seen.set()

    panel = Panel([Streaming("slow", slow, remote=True), Streaming("fast", lambda index: Verdict(score=5, judge="fast"), remote=True)], "mean")
    verdicts = panel.judge_each(REQUESTS, hand_over)
    assert seen == [(index, verdict.score) for index, verdict in enumerate(verdicts)] == [(0, 3.0), (1, 3.5), (2, 4.0), (3, 4.5)]


def test_a_members_failure_is_raised_after_the_others_have_finished() -> None:
    finished = []

    def fail(index: int) -> Verdict:
        raise JudgeError("no key")

    def note(index: int) -> Verdict:
        finished.append(index)
        return Verdict(score=3, judge="b")

    with pytest.raises(JudgeError, match="no key"):
        Panel([Scripted("a", fail, remote=True), Scripted("b", note, remote=True), Scripted("c", note)]).judge(REQUESTS)
    assert sorted(finished) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_member_that_belongs_to_the_callers_event_loop_is_asked_in_the_calling_thread(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def judge(name: str) -> Scripted:
        def answer(index: int) -> Verdict:
            seen[name] = threading.get_ident()
            return Verdict(score=3, judge=name)

        return Scripted(name, answer, remote=True)

    bound = judge("bound")
    bound.bound_to_caller = True  # type: ignore[attr-defined]
    Panel([CachedJudge(bound, JudgeCache(tmp_path / "c.sqlite")), judge("free")]).judge(REQUESTS)
    assert seen["bound"] == threading.get_ident() != seen["free"]


INTERRUPTED = """
import sys, time
from pathlib import Path
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge
from steered_lm.judges.panel import Panel

class Slow:
    remote = True
    def __init__(self, name):
        self.name = self.identity = name
    def judge(self, requests):
        raise NotImplementedError
    def judge_each(self, requests, on_verdict):
        on_verdict(0, Verdict(score=4, judge=self.name))
        print("one is finished\\n", end="", flush=True)  # one write: print() writes the line's end on its own, and two threads are here
        time.sleep(60)

cache = JudgeCache(Path(sys.argv[1]))
requests = [JudgeRequest(prompt="p", response=text) for text in ("one", "two")]
Panel([CachedJudge(Slow("a"), cache), CachedJudge(Slow("b"), cache)]).judge(requests)
"""


def test_ctrl_c_ends_a_panel_at_once_and_what_members_had_finished_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "c.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["one is finished\n"] * 2
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
        assert time.monotonic() - started < 20
    assert "KeyboardInterrupt" in errors
    assert len(JudgeCache(tmp_path / "c.sqlite")) == 2


def test_a_panels_identity_is_its_members_rule_and_quorum_in_any_order() -> None:
    a, b, c = says("a", 1), says("b", 2), says("c", 3)
    panel = Panel([a, b, c])
    assert panel.identity == Panel([c, a, b], name="another").identity == Panel([a, b, c], quorum=2).identity
    others = [Panel([a, b]), Panel([a, b, c], "mean"), Panel([a, b, c], quorum=3)]
    assert len({panel.identity, *(other.identity for other in others)}) == 4
    assert panel.name == "panel(median of a, b, c)"


def test_a_panel_of_one_twice_the_same_or_with_too_high_a_quorum_is_refused() -> None:
    with pytest.raises(JudgeError, match="1 judge is no panel"):
        Panel([says("a", 1)])
    with pytest.raises(JudgeError, match="a is there twice with the same options"):
        Panel([says("a", 1), says("b", 2), says("a", 3)])
    with pytest.raises(JudgeError, match=r"quorum=3 of 2 judges. Allowed: 1 to 2"):
        Panel([says("a", 1), says("b", 2)], quorum=3)


class _Counting:
    """An OpenAI-compatible server that answers every question with the same score or choice, and counts them by model."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.answer: dict[str, Any] = {"reason": "so it is", "score": 4}
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked[body["model"]] = outer.asked.get(body["model"], 0) + 1
                message = {"role": "assistant", "content": json.dumps(outer.answer), "refusal": None}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
                payload = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
                data = json.dumps(payload).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[_Counting]:
    counting = _Counting()
    yield counting
    counting.server.shutdown()
    counting.server.server_close()


def panel_file(folder: Path, text: str, name: str = "trio.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def member(model: str, url: str) -> str:
    return f"{{judge: 'openai:{model}', base_url: '{url}', key_env: none}}"


@pytest.fixture(scope="module")
def walt() -> Question:
    return Question.of_persona(load_persona("walt"))


def test_a_panels_file_is_a_judges_name(tmp_path: Path, endpoint: _Counting, walt: Question) -> None:
    path = panel_file(tmp_path, f"judges: [stylometric, {member('one', endpoint.url)}, {member('two', endpoint.url)}]\nrule: mean\nquorum: 3\n")
    judge = make_judge(str(path), walt)
    verdicts = judge.judge(REQUESTS[:2])
    assert judge.name == "panel:trio" == verdicts[0].judge
    style, one, two = verdicts[0].parts
    assert (style.judge, one.judge, two.judge) == ("stylometric", "openai:one", "openai:two")
    assert (one.score, two.score) == (4, 4)
    assert style.score is not None and verdicts[0].score == pytest.approx((style.score + 8) / 3)


def test_a_further_member_does_not_pay_for_the_others_again(tmp_path: Path, endpoint: _Counting, walt: Question) -> None:
    cache = tmp_path / "cache.sqlite"
    one, two, three = (member(name, endpoint.url) for name in ("one", "two", "three"))
    make_judge(str(panel_file(tmp_path, f"judges: [{one}, {two}]")), walt, cache=cache).judge(REQUESTS)
    paid = dict(endpoint.asked)
    assert min(paid.values()) >= len(REQUESTS)
    verdicts = make_judge(str(panel_file(tmp_path, f"judges: [{one}, {two}, {three}]")), walt, cache=cache).judge(REQUESTS)
    assert {name: endpoint.asked[name] for name in paid} == paid
    assert endpoint.asked["three"] >= len(REQUESTS)
    assert [[part.cached for part in v.parts] for v in verdicts] == [[True, True, False]] * len(REQUESTS)
    assert not any(v.cached for v in verdicts)


def test_each_member_is_asked_about_a_pair_in_both_orders(tmp_path: Path, endpoint: _Counting) -> None:
    endpoint.answer = {"reason": "the first one", "choice": "A", "confidence": 90}  # always for the first place
    question = Question.of_persona(load_persona("walt"), "pairwise")
    path = panel_file(tmp_path, f"judges: [{member('one', endpoint.url)}, {member('two', endpoint.url)}]")
    (verdict,) = make_judge(str(path), question).judge([PAIR])
    assert (verdict.choice, verdict.score, verdict.consistent) == ("tie", 0.0, False)
    assert [[order.choice for order in part.parts] for part in verdict.parts] == [["A", "A"], ["A", "A"]]


def test_options_of_the_command_go_to_members_that_take_them_and_their_own_win(tmp_path: Path, endpoint: _Counting, walt: Question) -> None:
    own = member("own", endpoint.url)
    path = panel_file(tmp_path, f"judges: [stylometric, 'openai:shared', {own}]\nrule: median\n")
    judge = make_judge(str(path), walt, base_url=endpoint.url, key_env="none")
    assert [part.score for part in judge.judge(REQUESTS[:1])[0].parts][1:] == [4, 4]
    alone = panel_file(tmp_path, "judges: [stylometric, {judge: stylometric, seed: 5}]", "styles.yaml")
    with pytest.raises(JudgeError, match=r"styles.yaml': no judge of it takes the option base_url"):
        make_judge(str(alone), walt, base_url=endpoint.url)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("judges: [stylometric]", "judges: Tuple should have at least 2 items"),
        ("judges: [stylometric, {base_url: x}]", "judges.1.judge: Input should be a valid string"),
        ("judges: [stylometric, a]\nrule: best", "rule: Input should be 'mean', 'median' or 'majority'"),
        ("judges: [stylometric, a]\nquorum: 3", "quorum 3 is more than the 2 judges"),
        ("judges: [stylometric, a]\nrules: mean", "rules: Extra inputs are not permitted"),
        (f"judges: [{CHEAP}, nosuch]", r"judges.1: judge='nosuch': there is no judge 'nosuch'"),
        (f"judges: [{CHEAP}, {{judge: stylometric, model: x}}]", r"judges.1: judge='stylometric' does not take options \['model'\]"),
        (f"judges: [{CHEAP}, other.yaml]", r"judges.1: 'other.yaml' is a panel"),
        ("judges: [", "neither valid YAML nor JSON"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name_and_the_key(tmp_path: Path, walt: Question, text: str, said: str) -> None:
    path = panel_file(tmp_path, text)
    with pytest.raises(JudgeError, match=said) as caught:
        make_judge(str(path), walt)
    assert "trio.yaml" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path, walt: Question) -> None:
    with pytest.raises(JudgeError, match=r"panel .*none.yaml' does not exist"):
        make_judge(str(tmp_path / "none.yaml"), walt)


def test_a_key_put_into_the_file_by_mistake_is_never_shown(tmp_path: Path, walt: Question) -> None:
    for text in (
        f"judges: [{CHEAP}, {{judge: 'openai:m', api_key: sk-planted-1}}]",
        "judges: [{judge: 'openai:m', api_key: sk-planted-1}]\nquorum: 7",
        "api_key: sk-planted-1\njudges: [stylometric, {judge: 5, api_key: sk-planted-1}]",
        "sk-planted-1",
    ):
        with pytest.raises(JudgeError) as caught:
            make_judge(str(panel_file(tmp_path, text)), walt)
        chain: list[BaseException] = [caught.value]
        while (before := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__)) is not None:
            chain.append(before)
        assert not any("sk-planted" in str(problem) for problem in chain)


def test_a_panels_file_reads_names_and_mappings(tmp_path: Path) -> None:
    read = PanelFile.load(panel_file(tmp_path, "judges: [stylometric, {judge: 'hf:m', revision: main}]"))
    assert [(m.judge, m.options) for m in read.judges] == [("stylometric", {}), ("hf:m", {"revision": "main"})]
    assert (read.rule, read.quorum) == ("median", None)
