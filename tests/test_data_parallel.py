import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import vectors_for
from transformers import AutoModelForCausalLM

from steered_lm.content import TINY_CHAT, resolve_model

SCRIPT = Path(__file__).with_name("data_parallel.py")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY_CHAT))
    return vectors_for(model, layers=(3,), norm=8.0).save(tmp_path_factory.mktemp("vectors") / "v.safetensors")


def run(processes, vectors, out):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(vectors), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_two_processes_share_the_work_and_give_the_results_of_one(vectors, tmp_path):
    one, two = (run(n, vectors, tmp_path / f"{n}.json") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["rows"] < 0.7 * one["rows"]
    assert {name: len(samples) for name, samples in two["samples"].items()} == {"persona_judge": 10, "tiny_truth": 42}
    assert two["samples"]["persona_judge"] == one["samples"]["persona_judge"]
    for item, answers in one["samples"]["tiny_truth"].items():
        values = [[value for ((value, _),) in found] for found in (answers, two["samples"]["tiny_truth"][item])]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    scores = ("persona_fit,none", "missing,none", "response_length,none")
    assert [two["results"]["persona_judge"][s] for s in scores] == pytest.approx([one["results"]["persona_judge"][s] for s in scores])
