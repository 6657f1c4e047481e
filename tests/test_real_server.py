"""The ``openai`` judge at a real OpenAI-compatible server, ``transformers serve``, which gives no log-probabilities and takes no schema."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers as hf
from chat_folder import save_chat_model
from environments import clean_environ

from steered_lm.judges import make_judge
from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.question import Question

RUBRIC = """
name: short
kind: coherence
version: 1
scale: [1, 5]
subject: null
shows: {reply: response}
instructions: Rate.
levels: {1: a, 2: b, 3: c, 4: d, 5: e}
answer: One digit.
answer_token: One digit.
"""


def model_that_says(text: str, folder: Path) -> Path:
    """A chat model whose tokens follow from the last one alone: after the assistant's mark come ``text``'s, then the end."""
    save_chat_model(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list("12345"))
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chain = [tokenizer.convert_tokens_to_ids("<|assistant|>"), *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream is the last token's embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        width = model.config.hidden_size
        model.model.embed_tokens.weight.copy_(torch.eye(width)[torch.arange(len(tokenizer)) % width])
        model.lm_head.weight.zero_()
        for place, (before, after) in enumerate(pairwise(chain)):
            model.model.embed_tokens.weight[before] = -torch.eye(width)[place]
            model.lm_head.weight[after] -= 2 * torch.eye(width)[place]
    model.generation_config = hf.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_that_says("4", tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", model]
    with log.open("wb") as said:
        server = subprocess.Popen([str(part) for part in command], stdout=said, stderr=subprocess.STDOUT, env=clean_environ(), start_new_session=True)
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture
def question(tmp_path: Path) -> Question:
    file = tmp_path / "rubric.yaml"
    file.write_text(RUBRIC, encoding="utf-8")
    return Question.of_kind(file)


def requests(count: int) -> list[JudgeRequest]:
    return [JudgeRequest(prompt="?", response=f"fox {number}") for number in range(count)]


def test_a_server_without_log_probabilities_or_schemas_is_read_as_text(url: str, model: Path, question: Question) -> None:
    judge = make_judge(f"openai:{model}", question, base_url=url, key_env="none", concurrency=4)
    verdicts = judge.judge(requests(12))
    assert [(v.score, v.missing, v.mode) for v in verdicts] == [(4.0, None, "text")] * 12
    assert all(v.usage is not None and v.usage.input_tokens > 20 and v.usage.output_tokens >= 1 for v in verdicts)
    # one question went down the ladder, and the others asked at once as it had ended
    assert sum(v.usage.requests for v in verdicts if v.usage) < 12 + 3 * 4


def test_the_same_model_by_the_hf_judge_gives_the_same_score(model: Path, question: Question) -> None:
    (verdict,) = make_judge(f"hf:{model}", question, device="cpu", dtype="float32").judge(requests(1))
    assert verdict.mode == "logprobs"
    assert verdict.score == pytest.approx(4.0, abs=0.05)
    assert verdict.mass is not None and verdict.mass > 0.9


def test_a_mode_that_the_server_does_not_have_is_missing_with_the_reason(url: str, model: Path, question: Question) -> None:
    judge = make_judge(f"openai:{model}", question, base_url=url, key_env="none", mode="logprobs")
    (verdict,) = judge.judge(requests(1))
    assert (verdict.score, verdict.missing) == (None, "the endpoint gave no log-probabilities")
