"""The stock commands, in subprocesses, from an installed wheel, in a folder that is not the checkout."""

import json
import os
import subprocess

import pytest
import yaml
from hub_folder import save_small_data
from lamp_data import write_lamp

from steered_lm.content import TINY_CHAT, resolve_model

TINY = resolve_model(TINY_CHAT)
PERSONA_JUDGE = ("--model", "steered-hf", "--model_args", f"pretrained={TINY},steering=spec.yaml", "--tasks", "persona_judge", "--batch_size", "16")
IN_INSPECT = ("mmlu", "truthfulqa_mc1", "truthfulqa_mc2", "lamp_7")


@pytest.fixture(scope="module")
def bench(installed_python, tmp_path_factory):
    """A folder with vectors and a spec file made by the installed ``steered-lm``, and a function that runs an installed command there."""
    folder = tmp_path_factory.mktemp("user")
    scripts = installed_python.parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "STEERED_LM"))}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}

    def run(name, *arguments, check=True):
        done = subprocess.run(
            [str(scripts / name), *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    run("steered-lm", "vectors", "build", "--out", "v.safetensors", "--traits", "formality,emotional_tone", "--pairs", "40", "--held-out-pairs", "24")
    spec = {"vectors": "v.safetensors", "weights": {"formality": 1.0, "emotional_tone": -1.0}, "layers": [3], "alpha": 0.4}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder, run


def results(folder):
    (file,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_persona_judge_*.jsonl")
    return json.loads(file.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.fixture(scope="module")
def by_lm_eval(bench):
    """Results and samples of ``persona_judge`` by the stock command, for a persona that is not the default."""
    folder, run = bench
    run("lm_eval", *PERSONA_JUDGE, "--metadata", '{"persona": "walt"}', "--output_path", "stock", "--log_samples")
    return results(folder / "stock")


@pytest.fixture(scope="module")
def by_inspect(bench):
    """Inspect's log of the same."""
    folder, run = bench
    run(
        "inspect", "eval", "steered_lm/persona_judge", "--model", f"steered-hf/{TINY_CHAT}", "-M", "steering=spec.yaml", "-T", "persona=walt",
        "--log-dir", "logs", "--log-format", "json", "--display", "plain",
    )  # fmt: skip
    (log,) = (folder / "logs").glob("*.json")
    return json.loads(log.read_text())


def check(found, samples):
    scores = found["results"]["persona_judge"]
    assert 1.0 <= scores["persona_fit,none"] <= 5.0
    assert scores["persona_fit_stderr,none"] > 0
    assert scores["missing,none"] == 0
    verdict = json.loads(samples[0]["filtered_resps"][0])
    assert 1.0 <= verdict["score"] <= 5.0


def test_lm_eval_runs_persona_judge_with_a_spec_and_writes_verdicts_into_the_samples(by_lm_eval):
    check(*by_lm_eval)


@pytest.mark.parametrize(
    ("command", "out"),
    [(["accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "lm_eval"], "accelerate"), (["steered-lm", "eval"], "fallback")],
)
def test_other_ways_to_start_lm_eval_do_the_same(bench, command, out):
    folder, run = bench
    run(*command, *PERSONA_JUDGE, "--output_path", out, "--log_samples")
    check(*results(folder / out))


def test_lm_eval_takes_the_inline_form_the_shipped_model_s_name_and_another_persona(bench):
    folder, run = bench
    steering = "vectors=v.safetensors,layer=3,alpha=0.4,weights=formality:1;emotional_tone:-0.5"
    metadata = json.dumps({"persona": "walt", "split": "validate"})
    run(
        "lm_eval", "--model", "steered-hf", "--model_args", f"pretrained={TINY_CHAT},{steering}", "--tasks", "persona_judge", "--metadata", metadata,
        "--batch_size", "16", "--output_path", "inline", "--log_samples",
    )  # fmt: skip
    from steered_lm.persona.load import load_persona

    _, samples = results(folder / "inline")
    assert len(samples) == len(load_persona("walt").items("validate"))


def test_lm_eval_lists_our_tasks(listed_tasks):
    ours = (
        "persona_judge",
        "tiny_knowledge",
        "tiny_truth",
        "lamp_7",
        "pv_humorous",
        "steered_truthfulqa_gen",
        "steered_mmlu_virology",
        "steered_perplexity",
    )
    assert all(name in listed_tasks.stdout for name in ours)


def test_a_wrong_spec_ends_lm_eval_with_our_sentence(bench):
    _, run = bench
    steering = f"pretrained={TINY},steering=nowhere.yaml"
    done = run("python", "-m", "lm_eval", "--model", "steered-hf", "--model_args", steering, "--tasks", "persona_judge", check=False)
    assert done.returncode != 0
    assert "steering='nowhere.yaml' does not exist" in done.stderr + done.stdout


def test_inspect_runs_persona_judge_with_a_spec(by_inspect):
    assert by_inspect["status"] == "success"
    metrics = {score["name"]: score["metrics"] for score in by_inspect["results"]["scores"]}
    assert 1.0 <= metrics["persona_fit"]["mean"]["value"] <= 5.0
    assert metrics["persona_fit"]["stderr"]["value"] > 0


def test_both_harnesses_give_the_same_score(by_lm_eval, by_inspect):
    metrics = {score["name"]: score["metrics"] for score in by_inspect["results"]["scores"]}
    scores = by_lm_eval[0]["results"]["persona_judge"]
    assert metrics["persona_fit"]["mean"]["value"] == pytest.approx(scores["persona_fit,none"], abs=1e-4)


@pytest.fixture(scope="module")
def on_local_files(bench):
    """LaMP, TruthfulQA and MMLU on one folder of data: results and samples of lm-eval by task, and Inspect's logs by task."""
    folder, run = bench
    save_small_data(folder / "local")
    write_lamp(folder / "local", "LaMP_7")
    tasks = "lamp_7,steered_truthfulqa_mc1,steered_truthfulqa_mc2,steered_mmlu_astronomy"
    arguments = ["--model", "steered-hf", "--model_args", f"pretrained={TINY_CHAT},steering=spec.yaml", "--metadata", '{"data": "local"}']
    run("lm_eval", *arguments, "--tasks", tasks, "--batch_size", "16", "--output_path", "choices", "--log_samples")
    (file,) = (folder / "choices").rglob("results_*.json")
    (samples,) = (folder / "choices").rglob("samples_steered_truthfulqa_mc1_*")
    run(
        "inspect", "eval", *(f"steered_lm/{name}" for name in IN_INSPECT), "--model", f"steered-hf/{TINY_CHAT}", "-M", "steering=spec.yaml",
        "-T", "data=local", "--log-dir", "choices_logs", "--log-format", "json", "--display", "plain",
    )  # fmt: skip
    logs = [json.loads(log.read_text()) for log in (folder / "choices_logs").glob("*.json")]
    return json.loads(file.read_text())["results"], samples.read_text().splitlines(), {log["eval"]["task"].partition("/")[2]: log for log in logs}


def test_lamp_runs_under_both_stock_commands_with_the_same_numbers(on_local_files):
    found, _, logs = on_local_files
    theirs = {score["name"]: score["metrics"]["mean"]["value"] for score in logs["lamp_7"]["results"]["scores"]}
    assert theirs == pytest.approx({name: found["lamp_7"][f"{name},none"] for name in ("rouge1", "rougeL")})


def test_both_harnesses_run_truthfulqa_and_mmlu_on_local_files(on_local_files):
    found, samples, logs = on_local_files
    assert {scores["sample_len"] for name, scores in found.items() if name != "lamp_7"} == {6}
    assert {task: log["status"] for task, log in logs.items()} == dict.fromkeys(IN_INSPECT, "success")
    ((_, mass),) = [(score["name"], score["metrics"]["mean"]["value"]) for score in logs["truthfulqa_mc2"]["results"]["scores"]]
    assert mass == pytest.approx(found["steered_truthfulqa_mc2"]["acc,none"], abs=1e-4)
    lm_eval = [json.loads(line)["doc"]["id"] for line in samples]
    assert sorted(lm_eval) == sorted(sample["id"] for sample in logs["truthfulqa_mc1"]["samples"])


def test_cost_measures_a_sweep_and_writes_its_page(bench):
    folder, run = bench
    arguments = ("--task", "tiny_knowledge", "--trait", "formality", "--text", "none", "--limit", "6", "--out", "cost")
    said = run("steered-lm", "cost", "--steering", "spec.yaml", "--sweep", "alpha=0.4,2", *arguments).stdout
    assert "alpha 2" in said
    assert (folder / "cost" / "cost.html").stat().st_size > 1e6
    data = json.loads((folder / "cost" / "cost.json").read_text())["data"]
    assert [arm["name"] for arm in data["arms"]] == ["unsteered", "spec, alpha 0.4", "spec, alpha 2"]
    assert {measure["name"] for measure in data["measures"]} >= {"tiny_knowledge", "trait formality"}
