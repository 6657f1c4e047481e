"""The local backend: trains, survives kills to the same bits, cancels its own process alone, refuses what cannot be trained."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_harness import save_model, save_vectors
from tiny_models import FAMILIES
from training_data import conversations, request_for, write
from transformers import AutoModelForCausalLM, BertConfig, T5Config
from transformers.pytorch_utils import Conv1D

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.engine import GenerationRow
from steered_lm.errors import MissingDependencyError, SpecError, VectorsError
from steered_lm.steering.spec import SteeringSpec, VectorsRef
from steered_lm.tiny_chat import WEIGHTS
from steered_lm.trait_models import base_model, checkpoint, peft, peft_job
from steered_lm.trait_models.base_model import fingerprint, load_tokenizer, skeleton, target_pattern
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters, TrainingSteering
from steered_lm.trait_models.job_lock import JobLock
from steered_lm.trait_models.peft import PeftBackend, train
from steered_lm.trait_models.peft_job import JobFile
from steered_lm.trait_models.trainer import data_order, learning_rate, response_loss


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), conversations(12))


@pytest.fixture
def backend():
    return PeftBackend.from_options({"threads": 1})


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for(backend, job, folder, done, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not done(state := backend.poll(job, folder)):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


@pytest.mark.slow
def test_a_killed_job_says_where_it_stopped_and_goes_on_to_the_same_bits(backend, tmp_path):
    settings = {"epochs": 2.0, "save_steps": 2, "lora_dropout": 0.1, "batch_size": 2, "gradient_accumulation": 2}
    data = write(tmp_path, conversations(28))
    request = request_for(data, **settings)
    unbroken = train(request, tmp_path / "unbroken")

    folder = tmp_path / "job"
    job = backend.submit(request, folder)
    wait_for(backend, job, folder, lambda state: (JobFile.read(folder).step or 0) >= 3)
    first = JobFile.read(folder).process()
    assert backend.submit(request, folder) == job, "it is running already"
    assert JobFile.read(folder).process() == first
    os.kill(first.pid, signal.SIGKILL)
    stopped = wait_for(backend, job, folder, lambda state: state.status != "running")
    assert stopped.status == "failed" and 0 < stopped.progress < 1
    assert f"stopped at step {JobFile.read(folder).step} of 14; submit again to go on" in stopped.error
    (saved,) = (folder / "checkpoints").glob("step-*")

    # another process, another backend
    again = PeftBackend.from_options({"threads": 1})
    assert again.submit(request, folder) == job
    assert wait_for(again, job, folder, lambda state: state.status != "queued").status == "running"
    assert JobFile.read(folder).process() != first
    done = wait_for(again, job, folder, lambda state: state.status not in ("queued", "running"))
    assert done.status == "succeeded" and done.progress == 1.0
    assert f"going on from step {int(saved.stem[5:])} of 14" in (folder / "log.txt").read_text()
    assert same(weights(folder), weights(tmp_path / "unbroken"))
    assert done.model.digest == unbroken.digest and done.model.facts.keys() == unbroken.facts.keys()
    losses = [json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("job", "unbroken")]
    assert losses[0] == losses[1] and len(losses[0]) == 14
    assert not (folder / "checkpoints").exists()

    before = JobFile.read(folder)
    assert again.submit(request, folder) == job
    assert JobFile.read(folder) == before, "what has succeeded is not trained again"


def test_training_that_is_interrupted_anywhere_goes_on_to_the_same_bits(data, tmp_path):
    request = request_for(data, epochs=3.0, save_steps=2, lora_dropout=0.1)
    unbroken = train(request, tmp_path / "unbroken")
    seen = []

    def stop(progress):
        seen.append(progress.step)
        if len(seen) in (1, 4, 8):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(request, tmp_path / "broken", callback=stop)
        assert PeftBackend().poll(peft_job.job_id(request), tmp_path / "broken").status == "failed"
    # a checkpoint that is damaged is passed over
    (newest,) = (tmp_path / "broken" / "checkpoints").glob("step-*")
    (newest.parent / "step-000099.safetensors").write_bytes(newest.read_bytes()[:-10])
    assert train(request, tmp_path / "broken", callback=stop).digest == unbroken.digest
    assert seen == [1, *range(1, 4), *range(3, 7), *range(7, 10)]


def test_a_job_that_was_killed_before_it_could_say_that_it_is_done_does_not_train_again(data, tmp_path):
    request = request_for(data)
    done = train(request, tmp_path)
    state = JobFile.read(tmp_path)
    state.but(status="running", digest=None, facts={}).write(tmp_path)
    assert PeftBackend().poll(state.job, tmp_path).status == "failed"
    assert train(request, tmp_path, callback=lambda _: pytest.fail("trained again")) == done
    assert JobFile.read(tmp_path).but(started=state.started) == state


def test_nothing_that_training_writes_is_pickle_and_random_states_are_left_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", None)
    names = set()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(
        request_for(data, save_steps=1),
        tmp_path / "job",
        callback=lambda _: names.update(p.name for p in (tmp_path / "job").rglob("*") if p.is_file()),
    )
    assert torch.equal(torch.get_rng_state(), before)
    names.update(path.name for path in (tmp_path / "job").rglob("*") if path.is_file())
    assert {"step-000001.safetensors", "adapter_model.safetensors", "adapter_config.json", "state.json"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"safetensors", "json", "lock"}
    assert str(WEIGHTS) not in (tmp_path / "job" / "adapter" / "adapter_config.json").read_text()


def test_seeds_give_other_weights_and_the_same_seed_the_same(data, tmp_path):
    runs = [train(request_for(data, seed=seed), tmp_path / f"{n}").digest for n, seed in enumerate((0, 0, 1))]
    assert runs[0] == runs[1] != runs[2]


def test_accumulated_gradients_are_those_of_the_whole_batch(data, tmp_path):
    settings = {"save_steps": 1000, "weight_decay": 0.0}
    train(request_for(data, batch_size=6, **settings), tmp_path / "whole")
    train(request_for(data, batch_size=2, gradient_accumulation=3, **settings), tmp_path / "parts")
    losses = [json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_data_order_is_a_new_shuffle_each_pass_and_rates_rise_and_fall():
    order = data_order(10, 2.5, seed=3)
    assert [sorted(order[:10]), sorted(order[10:20]), len(order)] == [list(range(10)), list(range(10)), 25]
    assert order[:10] != order[10:20] and order == data_order(10, 2.5, seed=3) != data_order(10, 2.5, seed=4)
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own use of transformers
def test_a_trained_model_has_learnt_and_loads_in_steered_hf_where_it_is_steered_on_top(tmp_path):
    from steered_lm.harness.model import SteeredHFLM

    data = write(tmp_path, conversations(24, formality=1.0))
    trained = train(request_for(data, epochs=3.0, lora_rank=8), tmp_path / "job")
    tokenizer = load_tokenizer(TINY_CHAT)
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS)
    untrained = response_loss(base, tokenizer, data)
    adapted = PeftModel.from_pretrained(base, trained.peft).eval()
    assert response_loss(adapted, tokenizer, data) < untrained - 0.1

    vectors = save_vectors(WEIGHTS, tmp_path / "v.safetensors")
    arguments = {"pretrained": trained.pretrained, "peft": trained.peft, "device": "cpu", "batch_size": 1}
    steered = {"vectors": str(vectors), "layer": 3, "alpha": 4.0, "weights": "formality:1"}
    ids = torch.tensor([tokenizer("<s><|user|>What is rain?<|end|><|assistant|>", add_special_tokens=False).input_ids])
    plain = SteeredHFLM(**arguments)
    with torch.inference_mode():
        torch.testing.assert_close(plain.model(ids).logits, adapted(ids).logits)
    prompt = tuple(ids[0].tolist())

    def reply(lm):
        return lm.engine.generate([GenerationRow(prompt, 12, lm.spec)])[0].tokens

    assert reply(SteeredHFLM(**arguments, **steered)) != reply(plain)


def test_a_cancelled_job_ends_and_says_so(backend, data, tmp_path):
    request = request_for(data, epochs=200.0)
    job = backend.submit(request, tmp_path)
    assert backend.poll(job, tmp_path).status in ("queued", "running")
    backend.cancel(job, tmp_path)
    state = backend.poll(job, tmp_path)
    assert state.status == "cancelled" and "submit again" in state.error
    assert not JobLock.held(tmp_path) and JobFile.read(tmp_path).process() is None
    backend.cancel(job, tmp_path)
    assert backend.poll(job, tmp_path) == state


def test_cancel_ends_no_process_but_its_own(backend, data, tmp_path, monkeypatch):
    monkeypatch.setattr(peft, "_PATIENCE", 0.3)
    request = request_for(data)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with JobLock.take(tmp_path):
            state = peft_job.prepare(request, tmp_path)
            # the number of a process that has long been somebody else's
            state.but(status="running", pid=other.pid, started=psutil.Process(other.pid).create_time() - 100).write(tmp_path)
            with pytest.raises(ExperimentError, match="does not end"):
                backend.cancel(state.job, tmp_path)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_one_folder_holds_one_job(backend, data, tmp_path):
    request = request_for(data)
    with pytest.raises(ExperimentError, match="which holds no job"):
        backend.poll("peft-0", tmp_path)
    with JobLock.take(tmp_path):
        with pytest.raises(ExperimentError, match="is in use by another training"):
            train(request, tmp_path)
        peft_job.prepare(request, tmp_path)
    with pytest.raises(ExperimentError, match="holds the job peft-"):
        backend.submit(request_for(data, seed=1), tmp_path)
    assert peft_job.job_id(request) == peft_job.job_id(request.model_copy(update={"name": "other", "suffix": "x", "data": tmp_path / "moved"}))
    stopped = backend.poll(peft_job.job_id(request), tmp_path)
    assert stopped.status == "failed" and "stopped before its first step" in stopped.error


def test_what_fails_while_training_is_told_by_poll(backend, data, tmp_path):
    request = request_for(data).model_copy(update={"data_hash": "0" * 64})
    with pytest.raises(ExperimentError, match="changed since it was validated"):
        train(request, tmp_path / "changed")
    state = backend.poll(peft_job.job_id(request), tmp_path / "changed")
    assert state.status == "failed" and "changed since it was validated" in state.error
    with pytest.raises(ExperimentError, match="the loss of step .* is nan.*Lower learning_rate"):
        train(request_for(data, learning_rate=1e30, epochs=3.0), tmp_path / "diverged")


def test_an_adapter_that_was_damaged_is_trained_again(data, tmp_path):
    request = request_for(data)
    first = train(request, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(request, tmp_path) == first.model_copy(update={"facts": JobFile.read(tmp_path).facts})
    assert file_hash(file) == first.digest


def refusal(backend, request):
    with pytest.raises((ExperimentError, SpecError, VectorsError)) as caught:
        backend.check(request)
    return str(caught.value)


def test_what_cannot_be_trained_is_refused_before_anything_is_submitted(backend, data, tmp_path):
    backend.check(request_for(data))
    assert "base_model='no/such/folder' cannot be loaded" in refusal(backend, request_for(data, base_model="no/such/folder"))
    for name, config in (("bert", BertConfig(architectures=["BertForMaskedLM"])), ("t5", T5Config(architectures=["T5ForConditionalGeneration"]))):
        config.save_pretrained(tmp_path / name)
        assert "only decoder-only (causal) language models are trained" in refusal(backend, request_for(data, base_model=str(tmp_path / name)))
    quantised = save_model(tmp_path / "quantised")
    settings = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "holds quantised weights (gptq), which are not trained" in refusal(backend, request_for(data, base_model=str(quantised)))
    empty = save_model(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert "has a config.json and no weights" in refusal(backend, request_for(data, base_model=str(empty)))
    said = refusal(backend, request_for(data, target_modules=("q_proj", "k_prj")))
    assert "target_modules name 'k_prj'" in said and "'k_proj'" in said
    assert "line 1 has" in refusal(backend, request_for(data, max_length=8))
    long = write(tmp_path, [[{"role": "user", "content": "why? " * 200}, {"role": "assistant", "content": "So."}]])
    assert "more than max_length=256" in refusal(backend, request_for(long)), "the tiny model has 256 positions"
    assert "dtype='float16' trains on a CUDA device alone" in refusal(backend, request_for(data, dtype="float16", device="cpu"))
    assert "device='cuda:99' is not available here" in refusal(backend, request_for(data, device="cuda:99"))
    assert "is no device" in refusal(backend, request_for(data, device="gpu"))
    with pytest.raises(ExperimentError, match="Allowed keys: threads"):
        PeftBackend.from_options({"thread": 1})


def test_steering_that_does_not_fit_is_refused_before_anything_is_submitted(backend, data, tmp_path):
    small = save_model(tmp_path / "small")
    foreign = save_vectors(small, tmp_path / "foreign.safetensors")
    own = save_vectors(WEIGHTS, tmp_path / "own.safetensors")

    def steered(vectors, **settings):
        spec = SteeringSpec(vectors=VectorsRef.to(vectors), **{"weights": {"formality": 1.0}, "layers": (1,), **settings}).save(tmp_path / "s.yaml")
        return request_for(data, steering=TrainingSteering(spec=spec))

    backend.check(steered(own))
    assert "a model of another shape" in refusal(backend, steered(foreign))
    assert "weights name the trait 'formal'" in refusal(backend, steered(own, weights={"formal": 1.0}))
    assert "does not exist" in refusal(backend, request_for(data, steering=TrainingSteering(spec=tmp_path / "none.yaml")))


def test_a_model_without_a_chat_template_is_taken(backend, data, tmp_path):
    base = save_model(tmp_path / "base", template=None)
    long = write(tmp_path, [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]] * 4)
    request = request_for(long, base_model=str(base))
    backend.check(request)
    assert train(request, tmp_path / "job").facts["response_tokens"] == 4 * len(" So.") + 4


def test_bfloat16_trains_on_a_cpu_with_an_adapter_in_float32(data, tmp_path):
    trained = train(request_for(data, dtype="bfloat16", device="cpu"), tmp_path)
    assert trained.facts["dtype"] == "bfloat16" and trained.facts["loss"] < 3
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16_and_in_float16(data, tmp_path):
    for dtype in ("auto", "float16"):
        trained = train(request_for(data, dtype=dtype, device="cuda"), tmp_path / dtype)
        assert trained.facts["loss"] < 3 and trained.facts["device"].startswith("cuda")


def test_identity_tells_base_models_versions_and_steering_apart(backend, data, tmp_path, monkeypatch):
    folders = [save_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert fingerprint(str(folders[0])) != fingerprint(str(folders[1])) != fingerprint(TINY_CHAT) == fingerprint(str(WEIGHTS))
    with monkeypatch.context() as patched:
        patched.setattr(base_model, "_WHOLE", 10_000)
        sampled = fingerprint(str(folders[0]))
        file = folders[0] / "model.safetensors"
        assert file.stat().st_size > 10_000
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        assert fingerprint(str(folders[0])) != sampled
    found = backend.identity(request_for(data))
    assert json.dumps(found) and found["versions"].keys() == {"steered-lm", "torch", "transformers", "peft"} and "+" not in str(found["versions"])
    vectors = VectorsRef.to(save_vectors(WEIGHTS, tmp_path / "v.safetensors"))
    spec = SteeringSpec(vectors=vectors, weights={"formality": 1.0}, layers=(1,)).save(tmp_path / "s.yaml")
    kinds = [backend.identity(request_for(data, steering=TrainingSteering(spec=spec, method=method))) for method in ("preventative", "ablation")]
    assert found != kinds[0] != kinds[1]
    with pytest.raises(ExperimentError, match="cannot be loaded"):
        fingerprint("no/such/folder")


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_the_blocks_are_targets_in_every_family(family):
    model = skeleton(FAMILIES[family]())
    inside = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in path.split("."))
    }
    pattern = target_pattern(model, None)
    assert inside == {path for path, _ in model.named_modules() if re.fullmatch(pattern, path)} and inside


def test_hyperparameters_of_the_adapter_are_pefts_own(data, tmp_path):
    trained = train(request_for(data, lora_rank=2, rslora=False, target_modules=("q_proj", "mlp.up_proj")), tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"], settings["base_model_name_or_path"]) == (2, 4, False, TINY_CHAT)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in weights(tmp_path)} == {"q_proj", "up_proj"}
    assert trained.facts["learning_rate"] == 5e-3
    assert base_model.adapter_alpha(Hyperparameters(lora_rank=8)) == 8 and base_model.adapter_alpha(Hyperparameters(lora_alpha=3.0)) == 3


def test_peft_is_imported_on_demand_and_its_absence_names_the_install_line(backend, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'steered-lm\[peft\]'"):
        backend.check(request_for(data))


def test_looking_at_jobs_loads_neither_torch_nor_transformers(tmp_path):
    code = "import sys, steered_lm.trait_models.peft; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "set()\n"


def test_checkpoints_of_another_job_are_not_gone_on_from(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    found = checkpoint.Checkpoint({"adapter/a": torch.ones(2)}, {"job": "a", "step": 3})
    checkpoint.save(found, tmp_path / "checkpoints")
    assert checkpoint.latest(tmp_path / "checkpoints", "b") is None
    assert checkpoint.latest(tmp_path / "checkpoints", "a").facts == found.facts
