from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import random_model, spec_for

from steered_lm.engine import Engine, GenerationRow
from steered_lm.engine.attention import SharedPrompts, reading
from steered_lm.engine.cache import EngineCache
from steered_lm.steering.hooks import Steerer

PROMPTS, WIDTH, HEADS, GROUP, SIZE = 3, 7, 2, 2, 8


@pytest.fixture
def parts():
    """Keys and values of three prompts (one with a gap) and of the own tokens of five rows that read them, and the queries."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(PROMPTS, WIDTH, dtype=torch.int64)
    mask[1, 2:5] = 0
    own_mask = torch.ones(5, 1, 1, 4, dtype=torch.bool)
    own_mask[3, ..., :2] = False
    return {
        "prompt": (draw(PROMPTS, HEADS, WIDTH, SIZE), draw(PROMPTS, HEADS, WIDTH, SIZE), mask),
        "own": (draw(5, HEADS, 4, SIZE), draw(5, HEADS, 4, SIZE), own_mask),
        "query": draw(5, HEADS * GROUP, 1, SIZE),
    }


def stored(keys, values, mask):
    cache = EngineCache(1, WIDTH)
    cache.update(keys, values, 0)
    cache.advance(WIDTH)
    shared = SharedPrompts(1)
    shared.replace([], cache, mask)
    return shared


def expected(parts, reads):
    (keys, values, mask), (own_keys, own_values, own_mask) = parts["prompt"], parts["own"]
    key, value = torch.cat([keys[reads], own_keys], dim=2), torch.cat([values[reads], own_values], dim=2)
    seen = torch.cat([(mask[reads] > 0)[:, None, None], own_mask], dim=-1)
    spread = (part.repeat_interleave(GROUP, dim=1) for part in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(parts["query"], *spread, attn_mask=seen)


@pytest.mark.parametrize("reads", [[2, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 2, 0, 1]])
def test_attention_in_two_parts_equals_attention_over_both(parts, reads):
    shared = stored(*parts["prompt"])
    shared.assign(reads)
    found = shared.attend(0, parts["query"], *parts["own"], None)
    assert torch.allclose(found, expected(parts, reads), atol=1e-6)


def test_prompts_that_nobody_reads_any_more_make_room_for_wider_ones(parts):
    shared = stored(*parts["prompt"])
    keys, values, _ = parts["prompt"]
    wide = EngineCache(1, WIDTH + 3)
    wide.update(keys.repeat(1, 1, 2, 1)[:1, :, : WIDTH + 3], values.repeat(1, 1, 2, 1)[:1, :, : WIDTH + 3], 0)
    wide.advance(WIDTH + 3)
    shared.replace([2, 0], wide, torch.ones(1, WIDTH + 3, dtype=torch.int64))
    assert (len(shared), shared.width) == (3, WIDTH + 3)
    shared.assign([0, 1, 0, 1, 0])
    found = shared.attend(0, parts["query"], *parts["own"], None)
    assert torch.allclose(found, expected(parts, [2, 0, 2, 0, 2]), atol=1e-6)
    assert wide.block_caches[0].keys is None


def test_reading_leaves_everything_as_it_was(parts):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with reading(stored(*parts["prompt"])):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_two_threads_with_models_of_their_own_do_not_disturb_each_other(tmp_path):
    work = []
    for seed in range(2):
        model = random_model("llama", seed=seed)
        (tmp_path / str(seed)).mkdir()
        spec = spec_for(model, tmp_path / str(seed), layers=(1,))
        rows = [GenerationRow(tuple(range(3, 20)), 24, spec.model_copy(update={"alpha": float(a)})) for a in range(12)]
        engine = Engine(Steerer(model), None, gemm="torch")
        work.append((engine, rows, engine.generate(rows)))

    def run(part):
        engine, rows, expected = part
        return [engine.generate(rows) == expected for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(found) for found in pool.map(run, work))


@pytest.mark.parametrize("positions", ["response", "all", "prompt"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "mixtral"])
def test_sharing_prompts_changes_no_token_and_takes_less_memory(family, layer, positions, tmp_path):
    model = random_model(family)
    base = spec_for(model, tmp_path, layers=(layer,), positions=positions)
    prompts = [tuple(range(3, 3 + size)) for size in (30, 24, 9)]
    rows = [GenerationRow(p, 6, base.model_copy(update={"alpha": float(a)})) for p in prompts for a in range(-4, 5)]
    with Steerer(model) as steerer:
        engine = Engine(steerer, None, gemm="torch")
        assert engine.support.sharing
        together, size = engine.generate(rows), engine.report.cache_bytes
        engine._support = engine.support._replace(sharing=False)
        engine.report.cache_bytes = 0
        assert engine.generate(rows) == together
        assert size < (0.5 if positions == "response" else 0.95) * engine.report.cache_bytes
        alone = Engine(steerer, None, gemm="torch")
        assert [alone.generate([row])[0] for row in rows] == together


def test_steered_and_unsteered_prompts_share_what_they_can(tmp_path):
    model = random_model("llama")
    base = spec_for(model, tmp_path, layers=(1,))
    specs = [None, *(base.model_copy(update={"alpha": float(a), "positions": p}) for a in (-3, 2, 5) for p in ("all", "response", "prompt"))]
    rows = [GenerationRow(tuple(range(3, 3 + size)), 3 + i % 5, spec) for size in (20, 13, 2) for i, spec in enumerate(specs)]
    with Steerer(model) as steerer:
        engine = Engine(steerer, None, gemm="torch")
        assert engine.support.sharing
        together = engine.generate(rows)
        assert [engine.generate([row])[0] for row in rows] == together


def test_a_population_larger_than_the_batch_brings_its_prompts_along(tmp_path):
    model = random_model("llama")
    base = spec_for(model, tmp_path, layers=(0,))
    prompts = [tuple(range(3 + i, 9 + 2 * i)) for i in range(5)]
    rows = [GenerationRow(p, 2 + (i + a) % 7, base.model_copy(update={"alpha": float(a)})) for i, p in enumerate(prompts) for a in range(1, 7)]
    with Steerer(model) as steerer:
        whole, small = Engine(steerer, None, gemm="torch"), Engine(steerer, None, gemm="torch", max_rows=8)
        assert small.generate(rows) == whole.generate(rows)
        assert whole.report.prompt_passes == 1 < small.report.prompt_passes
        assert small.report.row_steps == whole.report.row_steps == sum(row.max_new_tokens for row in rows)
