"""Projections of responses and prompts: against a hand computation, the projection difference, the command and its page."""

import csv
import json
import math
import re

import pytest
import torch
from plotly.offline import get_plotlyjs
from tiny_harness import save_model, save_vectors
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steered_lm import cli
from steered_lm.errors import UserError, VectorsError
from steered_lm.extract.activations import Row, generate_responses
from steered_lm.extract.projections import Projections, project
from steered_lm.measure.examples import read_examples, rendered
from steered_lm.report.monitor import MonitorData, monitor_rows, render_monitor
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.vectors import TraitVectors

ROWS = [
    {"id": "a", "prompt": "How are you?", "response": "Fine, thank you.", "score": 2.0},
    {"id": "<b>", "prompt": "Well?", "response": "", "system": "Be brief."},
    {"id": "c", "messages": [{"role": "user", "content": "Tell me all."}, {"role": "assistant", "content": "There is much to tell."}], "score": 4.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("model"))
    save_vectors(path, path / "v.safetensors")
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), TraitVectors.load(folder / "v.safetensors")


@pytest.fixture(scope="module")
def rows(folder, loaded):
    return [Row(rendered(example, loaded[1]), example.response) for example in read_examples(folder / "data.jsonl")]


@torch.no_grad()
def by_hand(model, tokenizer, row, direction, layer):
    """Mean over the response's tokens, and the last prompt token, from one unpadded pass of transformers' own hidden states."""
    prompt = tokenizer(row.prompt, add_special_tokens=False).input_ids
    reply = tokenizer(row.response, add_special_tokens=False).input_ids
    hidden = model(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states[layer + 1][0]
    along = hidden @ direction
    return (float(along[len(prompt) :].mean()) if reply else None), float(along[len(prompt) - 1])


def test_projections_equal_a_hand_computation_at_every_trait_and_layer(loaded, rows):
    model, tokenizer, vectors = loaded
    found = project(model, tokenizer, find_blocks(model), rows, vectors, layers=[0, 1], batch_size=2).projections
    assert [(one.trait, one.layer) for one in found] == [(trait, layer) for trait in vectors.meta.traits for layer in (0, 1)]
    for one in found:
        wanted = [by_hand(model, tokenizer, row, vectors.vector(one.trait, one.layer), one.layer) for row in rows]
        assert one.prompt_last == pytest.approx([last for _, last in wanted], abs=1e-4)
        assert one.response[1] is None
        assert [one.response[0], one.response[2]] == pytest.approx([wanted[0][0], wanted[2][0]], abs=1e-4)
        assert one.norm == vectors.meta.residual_norms[one.layer].response
        assert one.own == ()


def test_the_projection_difference_is_against_the_model_s_own_greedy_responses(loaded, rows):
    model, tokenizer, vectors = loaded
    found = project(model, tokenizer, find_blocks(model), rows, vectors, traits=["formality"], layers=[1], own=True, max_new_tokens=8)
    replies = generate_responses(model, tokenizer, find_blocks(model), [row.prompt for row in rows], max_new_tokens=8, tick=lambda n: None)
    assert found.own_responses == replies
    assert any(replies)
    (one,) = found.projections
    wanted = [
        by_hand(model, tokenizer, Row(row.prompt, reply), vectors.vector("formality", 1), 1)[0] for row, reply in zip(rows, replies, strict=True)
    ]
    assert one.own == pytest.approx(wanted, abs=1e-3)
    assert one.difference == (pytest.approx(one.response[0] - one.own[0]), None, pytest.approx(one.response[2] - one.own[2]))
    mean = one.mean_difference()
    assert (mean.mean, mean.n, mean.missing) == (pytest.approx((one.difference[0] + one.difference[2]) / 2), 2, 1)
    assert one.estimate().value == pytest.approx((one.response[0] + one.response[2]) / 2)


def test_a_data_set_that_lies_further_along_a_direction_is_told_apart(loaded):
    made = Projections(trait="t", layer=0, norm=2.0, response=tuple(1.0 + 0.1 * i for i in range(12)), prompt_last=(None,) * 12, own=(0.5,) * 12)
    found = made.mean_difference()
    assert found.excludes_zero
    assert found.mean == pytest.approx(1.05)
    with pytest.raises(ValueError, match="own is empty"):
        made.model_copy(update={"own": ()}).mean_difference()


def test_unknown_traits_and_layers_are_refused(loaded, rows):
    model, tokenizer, vectors = loaded
    with pytest.raises(VectorsError, match="the trait 'formalty'.*Did you mean 'formality'"):
        project(model, tokenizer, find_blocks(model), rows, vectors, traits=["formalty"])
    with pytest.raises(VectorsError, match="layer=9 is not in vectors"):
        project(model, tokenizer, find_blocks(model), rows, vectors, layers=[9])


def test_a_row_that_the_model_cannot_read_is_refused(loaded, rows):
    model, tokenizer, vectors = loaded
    with pytest.raises(UserError, match=r"row 2 has \d+ tokens, prompt and response together; the model takes \d+"):
        project(model, tokenizer, find_blocks(model), [rows[0], Row(rows[0].prompt, "very long " * 2000)], vectors)
    most = model.config.max_position_embeddings
    text = tokenizer.decode(tokenizer("a" * 20 * most, add_special_tokens=False).input_ids[: most - 4])
    room = most - len(tokenizer(text, add_special_tokens=False).input_ids)
    (reply,) = generate_responses(model, tokenizer, find_blocks(model), [text], max_new_tokens=64, tick=lambda n: None)
    assert 0 < room < 16
    assert len(reply) <= room  # its tokens are bytes


def invoke(folder, out, *more):
    arguments = [folder / "data.jsonl", "--vectors", folder / "v.safetensors", "--model", folder, "--out", out, "--device", "cpu", *more]
    return CliRunner().invoke(cli.app, ["monitor", "project", *map(str, arguments)])


def test_the_command_writes_columns_and_a_page(folder, loaded, rows, tmp_path):
    done = invoke(folder, tmp_path / "m.jsonl", "--layers", "1", "--difference", "--max-new-tokens", "6")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "<b>", "c"]
    assert [line["score"] for line in lines] == [2.0, None, 4.5]
    response, last = by_hand(*loaded[:2], rows[0], loaded[2].vector("formality", 1), 1)
    first = lines[0]
    assert (first["formality/1/response"], first["formality/1/prompt_last"]) == pytest.approx((response, last), abs=1e-4)
    assert first["formality/1/response_of_norm"] == pytest.approx(response / loaded[2].meta.residual_norms[1].response, abs=1e-4)
    assert first["formality/1/difference"] == pytest.approx(first["formality/1/response"] - first["formality/1/own"])
    assert lines[1]["formality/1/response"] is None
    page = (tmp_path / "m.html").read_text()
    assert "the projection difference" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page.replace(get_plotlyjs(), ""))
    assert "default-src 'none'" in page
    done = invoke(folder, tmp_path / "m.csv", "--traits", "formality")
    assert done.exit_code == 0, done.output
    with (tmp_path / "m.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert float(table[0]["formality/1/response"]) == pytest.approx(response, abs=1e-4)
    assert table[1]["formality/0/response"] == ""
    assert "emotional_tone/1/response" not in table[0]


def test_bad_arguments_of_the_command_are_refused(folder, tmp_path):
    for out, more, message in [("m.txt", [], "neither .jsonl nor .csv"), ("m.csv", ["--layers", "top"], "--layers 'top' is not understood")]:
        with pytest.raises(UserError, match=message):
            raise invoke(folder, tmp_path / out, *more).exception
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(VectorsError, match="fingerprint differs"):
        raise invoke(folder, tmp_path / "m.csv", "--model", other).exception


def test_the_page_escapes_names_and_draws_the_numbers_that_it_was_given(tmp_path):
    one = Projections(trait="formality", layer=2, norm=4.0, response=(1.0, None, 3.0, 2.0, 5.0), prompt_last=(0.5, 0.1, 1.5, 2.5, 3.0))
    data = MonitorData(
        source="<i>.jsonl", model="m", vectors="v", ids=("<b>", "b", "c", "d", "e"), scores=(1.0, 2.0, None, 3.0, 5.0), projections=(one,)
    )
    (row,) = monitor_rows(data)
    assert row.difference is None
    assert row.with_score.value == pytest.approx(1.0)
    assert row.with_prompt.n == 4
    page = render_monitor(data, tmp_path / "p.html").read_text()
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.S)[1])
    assert plots["prompt-formality-2"]["data"][0]["x"] == [0.5, 1.5, 2.5, 3.0]
    assert plots["score-formality-2"]["data"][0]["y"] == [1.0, 3.0, 5.0]
    assert plots["histogram-formality-2"]["data"][0]["x"] == [1.0, 3.0, 2.0, 5.0]
    assert plots["prompt-formality-2"]["data"][0]["text"][0] == "&lt;b&gt;"
    assert "&lt;i&gt;.jsonl" in page
    assert "<i>.jsonl" not in page
    assert math.isclose(row.response.value, 2.75)


def test_several_replies_to_a_prompt_are_counted_as_one_and_the_page_says_so(tmp_path):
    prompts = tuple(f"p{number // 3}" for number in range(36))
    values = tuple(float(number % 7) for number in range(36))
    one = Projections(trait="formality", layer=2, norm=4.0, response=values, prompt_last=tuple(float(number // 3) for number in range(36)))
    data = MonitorData(
        source="log.eval", model="m", vectors="v", ids=tuple(map(str, range(36))), scores=values[::-1], projections=(one,), prompts=prompts
    )
    (row,) = monitor_rows(data)
    assert row.response.n == 12
    assert row.with_score.n == 36
    assert "12 groups" in row.with_score.method
    page = render_monitor(data, tmp_path / "p.html").read_text()
    assert "<th>prompts</th>" in page
    assert "The 36 rows reply to 12 prompts" in page
