"""The tasks of traits by the stock commands, from an installed wheel, in a folder that is not the checkout."""

import json
import subprocess

import pytest
from environments import clean_environ
from fault_server import FaultServer, says

from steered_lm.content import TINY_CHAT
from steered_lm.judges.traits import TRAITS

pytestmark = pytest.mark.slow


@pytest.fixture
def command(installed_python, tmp_path):
    def run(name, *arguments):
        parts = [str(installed_python.parent / name), *map(str, arguments)]
        environment = clean_environ(COLUMNS="200", CUDA_VISIBLE_DEVICES="")
        return subprocess.run(parts, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture
def judge():
    def answer(number, body, headers):
        coherence = "how coherent" in body["messages"][0]["content"]
        return says({"reason": "by rule", "score": 70 if coherence else 30})

    server = FaultServer(answer)
    yield {"judge": "openai:rule", "judge_base_url": server.url, "judge_key_env": "none", "judge_mode": "json"}
    server.close()


def test_lm_eval_lists_the_tasks_and_runs_the_group_with_verdicts_in_its_samples(listed_tasks, command, judge, tmp_path):
    assert all(name in listed_tasks.stdout for name in ("persona_vectors", "pv_trait", *(f"pv_{trait}" for trait in TRAITS)))
    metadata = json.dumps({**judge, "max_gen_toks": 24, "missing_limit": 0.5})
    arguments = ["--model_args", f"pretrained={TINY_CHAT}", "--tasks", "persona_vectors", "--limit", "3", "--metadata", metadata]
    done = command("lm_eval", "--model", "steered-hf", *arguments, "--output_path", "out", "--log_samples")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    for trait in TRAITS:
        scores = found["results"][f"pv_{trait}"]
        assert (scores["trait_score,none"], scores["coherence,none"], scores["share_21_40,none"]) == (30, 70, 1)
        (samples,) = tmp_path.rglob(f"samples_pv_{trait}_*.jsonl")
        (logged,) = json.loads(json.loads(samples.read_text().splitlines()[0])["filtered_resps"][0])
        assert (logged["trait"]["score"], logged["coherence"]["score"]) == (30, 70)


def test_inspect_resolves_a_task_and_its_log_holds_the_verdicts(command, judge, tmp_path):
    options = [part for name, value in {**judge, "max_tokens": 24, "missing_limit": 0.5}.items() for part in ("-T", f"{name}={value}")]
    shared = ["eval", "steered_lm/pv_humorous", "--model", f"steered-hf/{TINY_CHAT}", "--display", "plain", "--limit", "3"]
    done = command("inspect", *shared, *options, "--log-dir", "logs", "--log-format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.json")
    log = json.loads(file.read_text())
    assert log["status"] == "success"
    metadata = log["samples"][0]["scores"]["trait_expression"]["metadata"]
    assert (metadata["trait"]["score"], metadata["coherence"]["score"]) == (30, 70)
    refused = command("inspect", *shared)
    assert refused.returncode != 0
    assert "pv_humorous needs a judge" in refused.stdout + refused.stderr
