"""``steered-lm judge cache`` and ``steered-lm judge rejudge`` on plain JSONL; logs of the harnesses are in ``test_judge_samples``."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fault_server import FaultServer, guesses, remote, right_score
from typer.testing import CliRunner

from steered_lm.commands import cache as cache_command
from steered_lm.commands import rejudge as rejudge_command
from steered_lm.commands.judge import judge_app
from steered_lm.errors import UserError
from steered_lm.judges.base import Usage, Verdict
from steered_lm.judges.cache import CacheFilter, JudgeCache
from steered_lm.stats import mean_interval, paired_difference

KEY = "sk-planted-0123456789abcdef"
ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [f"What about day {number}?" for number in range(12)]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    for module in (cache_command, rejudge_command):
        monkeypatch.setattr(module.console, "_width", 240)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    found = FaultServer(scripted)
    yield found
    found.close()


def scripted(number, body, headers):
    """Score a response by its length, and say something else about those that hold ``odd``."""
    response = json.loads(body["messages"][-1]["content"])["response"]
    return guesses({"Well" if "odd" in response else str(score_of(response)): -0.01}, usage=(1000, 1))


def score_of(response: str) -> int:
    return 10 * (1 + len(response) % 7)


def invoke(*arguments, fails=None):
    done = CliRunner().invoke(judge_app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(done.exception, UserError), done.output
        assert fails in str(done.exception)
        assert KEY not in done.output + str(done.exception)
    else:
        assert done.exception is None, (done.output, done.exception)
    return done.output


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def samples(tmp_path):
    return write(tmp_path / "mine.jsonl", [{"prompt": p, "response": "so it was " * (i + 1), "id": f"s{i}"} for i, p in enumerate(PROMPTS)])


def openai(server, *options):
    given = (f"base_url={server.url}", "input_price=2", "output_price=10", "backoff=0.01", *options)
    return ("--kind", "coherence", "--judge", "openai:judge-1", *(part for option in given for part in ("--judge-option", option)))


def test_every_sample_gets_a_line_with_its_verdict_and_the_tables_show_means_and_cost(server, samples, tmp_path):
    out = tmp_path / "out.jsonl"
    told = invoke("rejudge", samples, *openai(server), "--out", out)
    rows = read(out)
    wanted = [score_of(row["response"]) for row in rows]
    assert [row["verdict"]["score"] for row in rows] == pytest.approx(wanted)
    assert [(row["id"], row["prompt"], row["judge"], row["rubric"]) for row in rows] == [
        (f"s{i}", p, "openai:judge-1", "coherence@1") for i, p in enumerate(PROMPTS)
    ]
    assert rows[0]["file"] == str(samples)
    found = mean_interval(wanted, bounds=(0, 100))
    assert f"{found.value:.3f}" in told
    assert f"{found.low:.3f} to {found.high:.3f}" in told
    # 12 x (1000 tokens x 2 dollars + 1 token x 10 dollars) / a million
    assert "│    0 of 12 │       12 │    12,000 │         12 │  0.0241 │" in told
    assert KEY not in told + out.read_text()


def test_what_is_in_the_cache_is_not_paid_for_again_and_an_output_is_not_replaced_unasked(server, samples, tmp_path):
    out = tmp_path / "out.jsonl"
    invoke("rejudge", samples, *openai(server), "--out", out, "--limit", "5")
    assert (len(server.bodies), len(read(out))) == (5, 5)
    invoke("rejudge", samples, *openai(server), "--out", out, fails="exists. Name another file, or add --overwrite")
    told = invoke("rejudge", samples, *openai(server), "--out", out, "--overwrite")
    assert (len(server.bodies), len(read(out))) == (12, 12)
    assert "5 of 12" in told
    assert sum(row["verdict"]["cached"] for row in read(out)) == 5
    assert KEY.encode() not in (tmp_path / "out.cache.sqlite").read_bytes()
    (group,) = JudgeCache(tmp_path / "out.cache.sqlite").stats()
    assert (group.judge, group.model, group.verdicts, group.input_tokens) == ("openai:judge-1", "judge-1", 12, 12_000)


def test_a_dry_run_counts_what_is_not_cached_and_asks_nothing(server, samples, tmp_path):
    told = invoke("rejudge", samples, *openai(server), "--dry-run")
    assert "│       12 │" in told
    assert server.bodies == []
    assert list(tmp_path.iterdir()) == [samples]
    cache = tmp_path / "cache.sqlite"
    invoke("rejudge", samples, *openai(server), "--dry-run", "--cache", cache)
    assert not cache.exists()
    invoke("rejudge", samples, *openai(server), "--out", tmp_path / "o.jsonl", "--cache", cache, "--limit", "9")
    told = invoke("rejudge", samples, *openai(server), "--dry-run", "--cache", cache)
    assert "│        3 │" in told
    assert len(server.bodies) == 9


def test_missing_verdicts_are_written_counted_and_end_the_command(server, tmp_path):
    rows = [{"prompt": p, "response": "odd" if i < 4 else "" if i == 4 else "fine"} for i, p in enumerate(PROMPTS)]
    out = tmp_path / "out.jsonl"
    invoke(
        "rejudge", write(tmp_path / "m.jsonl", rows), *openai(server), "--out", out, fails="judge openai:judge-1: 5 of 12 verdicts are missing (42%;"
    )
    written = read(out)
    assert [row["verdict"]["score"] is None for row in written] == [True] * 5 + [False] * 7
    assert written[4]["verdict"]["missing"] == "empty response"
    told = invoke("rejudge", tmp_path / "m.jsonl", *openai(server), "--out", out, "--overwrite", "--missing-limit", "0.5")
    assert "5 of 12" in told
    assert "4 x probability 0.00 on score tokens, below 0.25; 1 x empty response" in told


def test_two_judges_are_compared_with_each_other_and_with_the_scores_of_the_log(server, samples, tmp_path):
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    invoke("rejudge", samples, *openai(server), "--out", out)
    told = invoke("rejudge", out, *openai(server), "--judge", "openai:judge-2", "--out", again, "--cache", tmp_path / "out.cache.sqlite")
    rows = read(again)
    assert Counter(row["judge"] for row in rows) == {"openai:judge-1": 12, "openai:judge-2": 12}
    assert all(row["old"]["score"] == row["verdict"]["score"] for row in rows)
    assert len(server.bodies) == 24  # the first judge's verdicts were there
    assert "New scores against those of the logs" in told
    assert "Krippendorff's alpha (ordinal, 12 items): 1.000" in told
    gap = paired_difference([1.0] * 12, [1.0] * 12, seed=0)
    assert str(gap.reason) in told
    assert told.count("openai:judge-1 │ 1    │ openai:judge-1 │    12 │") == 1


def test_pairs_come_from_lines_that_hold_both_or_from_the_other_system_s_log(server, samples, tmp_path):
    server.script = lambda number, body, headers: guesses({"A": -0.01, "B": -6.0}, usage=(10, 1))
    other = write(tmp_path / "other.jsonl", [{"prompt": p, "response": "no", "id": f"s{i}"} for i, p in enumerate(PROMPTS)])
    judge = ("--kind", "pairwise", "--persona", "edmund", *openai(server)[2:])
    told = invoke("rejudge", samples, *judge, "--against", other, "--out", tmp_path / "o.jsonl")
    rows = read(tmp_path / "o.jsonl")
    # a judge that always names the first one prefers nobody, and takes two requests a pair
    assert [row["verdict"]["score"] for row in rows] == pytest.approx([0.0] * 12)
    assert {row["verdict"]["consistent"] for row in rows} == {False}
    assert {row["other"] for row in rows} == {"no"}
    assert len(server.bodies) == 24
    assert "24 │       240 │         24" in told
    # nor does its table let a place pass for twelve honest ties
    assert re.search(r"│ 1 +│ +0 │ +0 │ +12 │ +12 of 12 │", told)
    estimate = invoke("rejudge", samples, *judge, "--against", other, "--dry-run", "--cache", tmp_path / "o.cache.sqlite")
    assert "│        0 │" in estimate
    invoke("rejudge", samples, *judge, "--out", tmp_path / "p.jsonl", fails="sample 's0'")
    fewer = write(tmp_path / "fewer.jsonl", [{"prompt": PROMPTS[0], "response": "no", "id": "s0"}])
    invoke("rejudge", samples, *judge, "--against", fewer, "--out", tmp_path / "p.jsonl", fails="sample 's1'")
    swapped = write(tmp_path / "swapped.jsonl", [{"prompt": "Hm?", "response": "no", "id": f"s{i}"} for i in range(12)])
    invoke("rejudge", samples, *judge, "--against", swapped, "--out", tmp_path / "p.jsonl", fails="has another prompt there")


def test_a_budget_that_is_reached_keeps_what_was_paid_for(server, samples, tmp_path):
    out = tmp_path / "out.jsonl"
    invoke("rejudge", samples, *openai(server, "max_requests=7", "concurrency=2"), "--out", out, fails="the same command goes on from there")
    assert not out.exists()
    assert len(server.bodies) == len(JudgeCache(tmp_path / "out.cache.sqlite")) == 7
    invoke("rejudge", samples, *openai(server, "max_requests=7", "concurrency=2"), "--out", out)
    assert len(server.bodies) == len(read(out)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "stylometric", "--persona", "edmund"], "rejudge needs --out"),
        (["--judge", "stylometric", "--out", "o.jsonl"], "--kind persona_fit needs --persona"),
        (["--judge", "stylometrik", "--persona", "edmund", "--out", "o.jsonl"], "Did you mean 'stylometric'?"),
        (["--judge", "openai:x", "--judge-option", "max_dollars=", "--persona", "edmund", "--out", "o.jsonl"], "max_dollars= has no value"),
        (["--judge", "openai:x", "--judge-option", f"x=[{KEY}", "--persona", "edmund", "--out", "o.jsonl"], "x: its value is no YAML scalar"),
        (["--judge", "openai:x", "--judge-option", "x=2026-99-01", "--persona", "edmund", "--out", "o.jsonl"], "x: its value is no YAML scalar"),
        (
            ["--judge", "openai:x", "--judge-option", "max_dollars=1", "--persona", "edmund", "--out", "o.jsonl"],
            "Endpoint: max_dollars needs input_price and output_price, in dollars per million tokens: see the provider's price list.",
        ),
        (["--judge", "stylometric", "--judge", "stylometric", "--persona", "edmund", "--out", "o.jsonl"], "the same judge twice"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_judged(arguments, message, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("rejudge", samples, *arguments, fails=message)
    assert not Path("o.jsonl").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("rejudge", "mine.jsonl", "--judge", "stylometric", "--persona", "edmund", "--out", "."),
        ("rejudge", "mine.jsonl", "--judge", "stylometric", "--persona", "edmund", "--out", "o.jsonl", "--missing-limit", "20"),
        ("audit", "--judge", "stylometric", "--persona", "edmund", "--out", "."),
        ("audit", "--judge", "stylometric", "--persona", "edmund", "--seed", "-1"),
    ],
)
def test_what_would_fail_after_the_judges_were_paid_is_refused_before(arguments, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(judge_app, arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl"]


def test_ctrl_c_keeps_finished_verdicts_and_the_same_command_goes_on(tmp_path):
    rows = [{"prompt": "And then?", "response": f"Reply number {number}."} for number in range(60)]
    samples, log, out = write(tmp_path / "m.jsonl", rows), tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    with remote(delay=0.05, faults=3, log=log) as endpoint:
        options = (f"base_url={endpoint.url}", "concurrency=4", "backoff=0.01", "timeout=2")
        command = [sys.executable, "-m", "steered_lm.cli", "judge", "rejudge", samples, "--judge", "openai:m", "--persona", "edmund", "--out", out]
        command += [part for option in options for part in ("--judge-option", option)]
        with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            deadline = time.monotonic() + 60
            while len(endpoint.asked()) < 20 and time.monotonic() < deadline:
                time.sleep(0.02)
            run.send_signal(signal.SIGINT)
            said = "".join(run.communicate(timeout=60))
        assert run.returncode == 130, said
        assert "interrupted. Finished verdicts are in" in said
        assert not out.exists()
        kept, before = len(JudgeCache(tmp_path / "out.cache.sqlite")), len(endpoint.asked())
        assert 10 <= kept < 60
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = endpoint.asked()
    answered_before = {reply for reply, what in asked[:before] if what == "ok"}
    again = {reply for reply, _ in asked[before:]}
    # four were under way when it was interrupted
    assert len(answered_before & again) <= 4
    assert len(again) == 60 - kept
    verdicts = {row["response"]: row["verdict"] for row in read(out)}
    assert all(v["score"] == pytest.approx(right_score(reply)) for reply, v in verdicts.items() if v["score"] is not None)
    assert all(v["missing"] for v in verdicts.values() if v["score"] is None)


def test_what_was_spent_leaves_cached_verdicts_and_cached_parts_out():
    paid, free = Usage(requests=1, input_tokens=5), Usage(requests=9)
    fresh, kept = Verdict(score=1, judge="a", usage=paid), Verdict(score=1, judge="a", usage=free, cached=True)
    whole = Verdict(score=1, judge="panel", usage=paid + free, parts=(fresh, kept))
    assert rejudge_command.spent([fresh, kept, whole, Verdict(missing="x", judge="a", usage=paid), Verdict(score=1, judge="b")]) == Usage(
        requests=3, input_tokens=15
    )


# -- the cache's commands -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    made = JudgeCache(tmp_path / "cache.sqlite")
    usage = Usage(requests=1, input_tokens=1500, output_tokens=1, dollars=0.25)
    trait = {"model": "gpt-x", "rubric": "trait", "rubric_version": "1", "about": "humorous"}
    made.put_many({f"k{i}": Verdict(score=50, scale=(0, 100), judge="openai:gpt-x", usage=usage) for i in range(3)}, trait)
    with sqlite3.connect(made.path) as db:
        db.execute("UPDATE verdicts SET created = ?", (int(time.time()) - 40 * 86_400,))
    db.close()
    made.put_many({"new": Verdict(score=50, scale=(0, 100), judge="openai:gpt-x", usage=usage)}, {**trait, "rubric_version": "2"})
    made.put_many({"other": Verdict(score=2, judge="stylometric")})
    return made


def test_stats_show_judges_rubrics_and_what_they_cost(cache):
    told = invoke("cache", "stats", cache.path)
    assert "5 verdicts" in told
    (first,) = [line for line in told.splitlines() if "trait@1" in line]
    assert all(part in first for part in ("openai:gpt-x", "humorous", "│        3 │", "4,500", "0.7500"))
    (other,) = [line for line in told.splitlines() if "stylometric" in line]
    assert [cell.strip() for cell in other.split("│")[2:5]] == ["-", "-", "1"]


def test_prune_takes_what_is_meant_and_a_dry_run_nothing(cache):
    assert "3 of 5 verdicts would be removed" in invoke("cache", "prune", cache.path, "--older-than", "30d", "--dry-run")
    assert len(cache) == 5
    assert "removed 3 of 5 verdicts" in invoke("cache", "prune", cache.path, "--older-than", "30d")
    assert "removed 0 of 2" in invoke("cache", "prune", cache.path, "--rubric", "trait@1")
    assert "removed 1 of 2" in invoke("cache", "prune", cache.path, "--rubric", "trait", "--judge", "openai:gpt-x", "--model", "gpt-x")
    assert cache.count(CacheFilter(judge="stylometric")) == len(cache) == 1


def test_prune_without_a_condition_or_with_a_wrong_age_is_refused(cache):
    invoke("cache", "prune", cache.path, fails="prune needs at least one of --older-than")
    for age in ("30", "d", "-3d", "1 month"):
        invoke("cache", "prune", cache.path, f"--older-than={age}", fails="is no age. Write a number and m")
    assert len(cache) == 5


def test_export_gives_json_lines_on_the_terminal_or_in_a_file(cache, tmp_path):
    out = tmp_path / "deep" / "verdicts.jsonl"
    printed = [json.loads(line) for line in invoke("cache", "export", cache.path).splitlines()]
    assert "wrote 5 verdicts" in invoke("cache", "export", cache.path, "--out", out)
    assert read(out) == printed
    assert {row["key"] for row in printed} == {"k0", "k1", "k2", "new", "other"}
    assert {row["verdict"]["score"] for row in printed} == {50.0, 2.0}


@pytest.mark.parametrize("command", ["stats", "export", "prune"])
def test_files_that_are_no_cache_are_refused(command, tmp_path):
    more = ["--judge", "x"] if command == "prune" else []
    foreign, text = tmp_path / "foreign.sqlite", tmp_path / "notes.txt"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (a)")
    db.close()
    text.write_text("notes " * 500)
    invoke("cache", command, tmp_path / "none.sqlite", *more, fails="does not exist. Give the file")
    invoke("cache", command, foreign, *more, fails="another program")
    invoke("cache", command, text, *more, fails="damaged or no SQLite file")
    assert not (tmp_path / "none.sqlite").exists()
