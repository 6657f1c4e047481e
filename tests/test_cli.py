"""The command line on the shipped tiny model, in this process."""

import json
import os
import signal

import pytest
from fault_server import FaultServer, guesses
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import UserError
from steered_lm.steering.vectors import TraitVectors
from steered_lm.study import Study, StudyConfig, parse_layers

TRAITS = "formality,emotional_tone"


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    done = invoke("vectors", "build", "--out", path, "--traits", TRAITS, "--pairs", 24, "--held-out-pairs", 16)
    assert done.exit_code == 0, done.output
    return path


def optimize(vectors, out, *more):
    return invoke(
        "optimize",
        "--persona",
        "walt",
        "--vectors",
        vectors,
        "--out",
        out,
        "--optimizer",
        "random_search",
        "--budget",
        8,
        "--max-new-tokens",
        48,
        *more,
    )


def test_vectors_build_writes_a_file_that_show_describes(vectors):
    meta = TraitVectors.load(vectors).meta
    assert meta.traits == ("formality", "emotional_tone")
    assert meta.model_id == "steered-lm/tiny-chat"
    shown = invoke("vectors", "show", vectors)
    assert "svd, response_mean" in shown.output


def test_personas_are_listed_and_shown():
    assert "walt" in invoke("persona", "list").output
    assert "ticket" in invoke("persona", "show", "walt").output


def test_optimize_writes_a_spec_a_result_and_a_log_and_goes_on_in_the_same_folder(vectors, tmp_path):
    first = optimize(vectors, tmp_path / "run")
    assert first.exit_code == 0, first.output
    assert "optimism gap" in first.output
    assert "judge stylometric is trusted for a difference of 0.5 at 10 prompts" in first.output
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["judge"] == "stylometric"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["chosen"]["weights"]) == set(TRAITS.split(","))
    lines = (tmp_path / "run" / "run.jsonl").read_text()
    again = optimize(vectors, tmp_path / "run")
    assert again.exit_code == 0
    assert (tmp_path / "run" / "run.jsonl").read_text() == lines
    with pytest.raises(UserError, match="another run"):
        raise optimize(vectors, tmp_path / "run", "--seed", 1).exception


def test_optimize_refuses_a_judge_that_its_audit_does_not_trust_before_anything_is_evaluated_and_goes_on_without_one(vectors, tmp_path):
    with pytest.raises(UserError, match=r"is not trusted for a difference of 3.5 at 10 prompts: anchors: .* or go on .*--audit warn"):
        raise optimize(vectors, tmp_path / "run", "--effect", 3.5).exception
    assert len((tmp_path / "run" / "run.jsonl").read_text().splitlines()) == 1
    (tmp_path / "run" / "audit.json").unlink()
    done = optimize(vectors, tmp_path / "run", "--audit", "off")
    assert done.exit_code == 0, done.output
    assert "trusted" not in done.output
    assert (tmp_path / "run" / "result.json").is_file()
    assert not (tmp_path / "run" / "audit.json").exists()


def test_ctrl_c_says_what_is_kept_and_the_command_to_use_names_the_same_judge(vectors, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def interrupting(number, body, headers):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return guesses({"3": -0.01}, usage=(10, 1))

    server = FaultServer(interrupting)
    judge = ("--judge", "openai:x", "--judge-base-url", server.url, "--judge-option", "key_env=none", "--judge-cache", tmp_path / "c.sqlite")
    try:
        stopped = optimize(vectors, tmp_path / "run", *judge, "--audit", "off")
        assert stopped.exit_code == 130
        assert f"interrupted. Finished generations are in {tmp_path / 'run'}, and finished verdicts in {tmp_path / 'c.sqlite'}" in stopped.output
        done = optimize(vectors, tmp_path / "run", *judge, "--audit", "off")
    finally:
        server.close()
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.partition("--metadata '")[2].partition("'")[0])
    assert told == {"persona": "walt", "judge": "openai:x", "judge_key_env": "none", "judge_base_url": server.url}


def test_a_study_may_warn_about_its_judge_and_asks_it_once_for_several_runs(vectors, tmp_path, caplog):
    study = Study(StudyConfig(persona="walt", vectors=vectors, audit="warn", effect=3.5))
    report = study.audit(tmp_path / "one")
    assert not report.trusted
    assert "not trusted for a difference of 3.5" in caplog.text
    assert study.audit(tmp_path / "two") is report
    assert (tmp_path / "one" / "audit.json").read_bytes() == (tmp_path / "two" / "audit.json").read_bytes()


def test_a_dry_run_of_optimize_counts_the_judgements_and_touches_nothing(vectors, tmp_path, monkeypatch):
    done = optimize(vectors, tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.output
    # walt has 10 tuning, 9 validation and 10 test items; random_search asks for 6 candidates; 3 finalists; the best and the unsteered model
    assert "1 x 6 candidates: at most 155 judgements (60 tuning, 27 validation, 20 test, 48 audit of the judge)" in done.output
    assert "computes on this machine" in done.output
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    remote = optimize(vectors, tmp_path / "run", "--dry-run", "--audit", "off", "--judge", "openai:m", "--judge-base-url", "http://127.0.0.1:9/v1")
    assert "at most 107 judgements" in remote.output
    assert "about 107 requests" in remote.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", 0], "budget=0 allows no evaluation"),
        (["--traits", "warmth"], "traits='warmth' is not in vectors="),
        (["--layers", 9], "layer=9 is not in vectors="),
        (["--judge", "openai:some-model"], "OPENAI_API_KEY"),
        (["--judge", "oracle"], "there is no judge 'oracle'"),
        (["--optimizer", "gradient"], "optimizer='gradient' is neither one of ours"),
        (["--effect", 0], "effect: .*greater than 0"),
        (["--unit", "metres"], "unit: .*'raw' or 'residual'"),
    ],
)
def test_bad_arguments_of_optimize_are_refused_in_one_sentence(vectors, tmp_path, monkeypatch, more, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=message):
        raise optimize(vectors, tmp_path / "run", *more).exception


def test_unknown_personas_get_near_misses(vectors, tmp_path):
    with pytest.raises(UserError, match=r"persona='wallt'.*Did you mean 'walt'"):
        raise invoke("optimize", "--persona", "wallt", "--vectors", vectors, "--out", tmp_path / "r").exception


def test_main_prints_a_user_error_without_traceback_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["steered-lm", "vectors", "show", "[no] such:x:file"])  # :x: is an emoji to rich
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "error: vectors='[no] such:x:file' does not exist" in shown
    assert "Traceback" not in shown


def test_layers_are_parsed_or_refused():
    assert [parse_layers(text, 7) for text in ("auto", "2", "1,3", "all")] == [(4,), (2,), (1, 3), tuple(range(7))]
    with pytest.raises(UserError, match="layers='middle' is not understood. Allowed: auto, all"):
        parse_layers("middle", 7)
