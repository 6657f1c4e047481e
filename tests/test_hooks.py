import pytest
import torch
import transformers as hf
from tiny_models import FAMILIES, random_model, spec_for, vectors_for

from steered_lm.errors import SpecError, VectorsError
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer, steer
from steered_lm.steering.spec import SteeringSpec, VectorsRef

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 30, 31, 32, 33, 34]]
NEW = 6


def left(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def right(rows):
    width = max(map(len, rows))
    return torch.tensor([r + [0] * (width - len(r)) for r in rows]), torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


@torch.no_grad()
def generate(model, rows, specs, *, use_cache=True, **options):
    ids, mask = left(rows)
    with Steerer(model) as steerer, steerer.batch(specs, Layout.generation(mask)):
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=use_cache, **options)
    return out[:, ids.shape[1] :].tolist()


@torch.no_grad()
def scored(model, rows, contexts, specs, side="right"):
    ids, mask = (right if side == "right" else left)(rows)
    layout = Layout.scored(contexts, [len(r) for r in rows], width=ids.shape[1], padding_side=side)
    with Steerer(model) as steerer, steerer.batch(specs, layout):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return [logits[i][mask[i].bool()] for i in range(len(rows))]


@pytest.mark.parametrize("kind", [hf.MambaConfig, hf.Mamba2Config])
@pytest.mark.filterwarnings("ignore:.*mamba_ssm.*")
def test_recurrent_models_are_steered_at_every_response_token_with_and_without_their_state(kind, tmp_path):
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 2} if kind is hf.Mamba2Config else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(
            hidden_size=32, num_hidden_layers=3, vocab_size=64, state_size=16, initializer_range=0.2, pad_token_id=0, eos_token_id=None, **sizes
        )
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    spec = spec_for(model, tmp_path, alpha=6.0)
    kept = generate(model, PROMPTS[:1], [spec])
    assert kept == generate(model, PROMPTS[:1], [spec], use_cache=False)
    assert kept != generate(model, PROMPTS[:1], [None])


@torch.no_grad()
def by_hand(model, row, layer, positions, vector):
    """Logits of one unpadded row with a vector added by a hand-written hook."""

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, positions] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_blocks(model)[layer].register_forward_hook(hook)
    logits = model(torch.tensor([row])).logits[0]
    handle.remove()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_one_vector_spec_equals_a_hand_written_hook(family, tmp_path):
    model = random_model(family)
    spec = spec_for(model, tmp_path, alpha=3.0, positions="all", unit="raw")
    vector = 3.0 * vectors_for(model).vector("formality", 1)
    row = PROMPTS[2]
    ours = scored(model, [row], [len(row)], [spec])[0]
    assert torch.equal(ours, by_hand(model, row, 1, slice(None), vector))
    assert not torch.allclose(ours, scored(model, [row], [len(row)], [None])[0])


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_agree_between_cached_uncached_padded_and_teacher_forced_passes(family, positions, tmp_path):
    model = random_model(family)
    spec = spec_for(model, tmp_path, positions=positions)
    specs = [spec] * len(PROMPTS)
    cached = generate(model, PROMPTS, specs)
    assert cached == generate(model, PROMPTS, specs, use_cache=False)
    alone = [generate(model, [p], [spec])[0] for p in PROMPTS]
    assert cached == alone
    rows = [p + g for p, g in zip(PROMPTS, alone, strict=True)]
    contexts = [len(p) for p in PROMPTS]
    on_right, on_left = scored(model, rows, contexts, specs), scored(model, rows, contexts, specs, side="left")
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        torch.testing.assert_close(on_right[i], on_left[i], atol=1e-4, rtol=1e-4)
        assert on_right[i][len(prompt) - 1 : -1].argmax(-1).tolist() == row[len(prompt) :]
        chosen = {"all": slice(None), "prompt": slice(0, len(prompt) - 1), "response": slice(len(prompt) - 1, None)}[positions]
        torch.testing.assert_close(on_right[i], by_hand(model, row, 1, chosen, 4.0 * vectors_for(model).vector("formality", 1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_what_separate_runs_give(family, tmp_path):
    model = random_model(family)
    base = spec_for(model, tmp_path)
    weights = [{"formality": 1.0}, {"formality": -1.0}, {"emotional_tone": 1.0}, {"formality": 0.5, "emotional_tone": -1.5}, {}]
    specs = [base.with_weights(w) for w in weights] + [
        base.model_copy(update={"operation": "ablate", "alpha": 1.0}),
        base.model_copy(update={"operation": "clamp", "layers": (0, 2)}),
        None,
    ]
    rows = [PROMPTS[i % 3] for i in range(8)]
    mixed = generate(model, rows, specs)
    assert mixed == [generate(model, [row], [spec])[0] for row, spec in zip(rows, specs, strict=True)]
    assert len({tuple(r) for r in mixed}) >= 4


def test_zero_weights_are_the_unsteered_model_to_the_bit(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    rows = [[*p, 3, 4] for p in PROMPTS]
    contexts = [len(p) for p in PROMPTS]
    plain = scored(model, rows, contexts, [None] * 3)
    zero = scored(model, rows, contexts, [spec.with_weights({"formality": 0.0})] * 3)
    beside = scored(model, rows, contexts, [spec.with_weights({"formality": 0.0}), spec, None])
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert torch.equal(plain[0], beside[0])
    assert torch.equal(plain[2], beside[2])
    assert not torch.equal(plain[1], beside[1])


def test_ablate_removes_the_projection_and_clamp_sets_it(tmp_path):
    model, vectors = random_model(), vectors_for(random_model())
    names = ("formality", "emotional_tone")
    row = PROMPTS[2]
    basis = torch.stack([vectors.vector(t, 1) for t in names])
    for operation, alpha, wanted in (("ablate", 1.0, [0.0, 0.0]), ("clamp", 2.0, [2.0, -3.0])):
        spec = spec_for(model, tmp_path, operation=operation, alpha=alpha, weights={"formality": 1.0, "emotional_tone": -1.5}, positions="response")
        seen = {}
        with Steerer(model) as steerer, steerer.batch([spec], Layout.scored([3], [6])):
            probe = find_blocks(model)[2].register_forward_pre_hook(lambda m, args, seen=seen: seen.update(h=args[0]))
            model(torch.tensor([row]))
            probe.remove()
        torch.testing.assert_close(seen["h"][0, 2:] @ basis.T, torch.tensor([wanted] * 4), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(seen["h"][0, :2] @ basis.T, torch.tensor([wanted] * 2), atol=1e-2)


def test_residual_unit_scales_by_the_stored_norm_of_the_steered_positions(tmp_path):
    model = random_model()
    raw = spec_for(model, tmp_path, alpha=4.0, unit="raw", positions="response")
    residual = raw.model_copy(update={"alpha": 0.5, "unit": "residual"})
    assert scored(model, PROMPTS[:1], [2], [raw])[0].equal(scored(model, PROMPTS[:1], [2], [residual])[0])


def test_beams_and_several_samples_a_prompt_keep_their_row_s_spec(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    specs = [spec, None, spec.with_weights({"emotional_tone": 2.0})]
    together = generate(model, PROMPTS, specs, num_beams=3)
    assert together == [generate(model, [p], [s], num_beams=3)[0] for p, s in zip(PROMPTS, specs, strict=True)]


def test_tokens_are_counted_and_padding_is_not_steered(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path, positions="all")
    ids, mask = left(PROMPTS)
    with Steerer(model) as steerer:
        with steerer.batch([spec] * 3, Layout.generation(mask)):
            model(input_ids=ids, attention_mask=mask)
        assert steerer.tokens == {1: sum(map(len, PROMPTS))}


def test_a_hook_that_does_not_fire_is_an_error(tmp_path):
    model = random_model()
    with (
        Steerer(model) as steerer,
        pytest.raises(RuntimeError, match="hook of block 1 did not fire"),
        steerer.batch([spec_for(model, tmp_path)], Layout.scored([1], [2])),
    ):
        pass


def test_outside_a_batch_and_after_an_error_the_model_is_unsteered(tmp_path):
    model = random_model()
    ids = torch.tensor([PROMPTS[0]])
    plain = model(ids).logits
    with Steerer(model) as steerer:
        with pytest.raises(ZeroDivisionError), steerer.batch([spec_for(model, tmp_path)], Layout.scored([2], [4])):
            raise ZeroDivisionError
        assert torch.equal(model(ids).logits, plain)
    assert not any(block._forward_hooks for block in find_blocks(model))


def test_one_batch_at_a_time_and_one_spec_a_row(tmp_path):
    model = random_model()
    layout = Layout.scored([1, 1], [2, 2])
    with Steerer(model) as steerer:
        with pytest.raises(ValueError, match="rows has 1 specs, the layout 2 rows"), steerer.batch([None], layout):
            pass
        spec = spec_for(model, tmp_path)
        with steerer.batch([spec] * 2, layout):
            model(torch.tensor([[1, 2], [1, 3]]))
            with pytest.raises(RuntimeError, match="already active"), steerer.batch([None, None], layout):
                pass


def test_foreign_changed_and_out_of_range_specs_are_refused_before_anything_runs(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    with pytest.raises(VectorsError, match="fingerprint differs"):
        Steerer(random_model(seed=1)).compile(spec)
    Steerer(random_model(seed=1), allow_foreign=True).compile(spec)
    with pytest.raises(VectorsError, match=r"layer=3 is not in .*Allowed: 0, 1, 2"):
        Steerer(model).compile(spec.model_copy(update={"layers": (3,)}))
    with pytest.raises(VectorsError, match=r"'warmth'.*Allowed: emotional_tone, formality"):
        Steerer(model).compile(spec.with_weights({"warmth": 1.0}))
    vectors_for(model, seed=5).save(tmp_path / "vectors.safetensors")
    with pytest.raises(SpecError, match="changed since the spec was written"):
        Steerer(model).compile(spec)


def test_clamping_linearly_dependent_directions_is_refused(tmp_path):
    model = random_model()
    vectors = vectors_for(model)
    same = type(vectors)({**vectors.directions, ("emotional_tone", 1): -vectors.vector("formality", 1)}, vectors.meta)
    ref = VectorsRef.to(same.save(tmp_path / "v.safetensors"))
    spec = SteeringSpec(vectors=ref, weights={"formality": 1.0, "emotional_tone": 1.0}, layers=(1,), operation="clamp")
    with pytest.raises(SpecError, match="linearly dependent"):
        Steerer(model).compile(spec)


def test_steer_is_the_one_line_form_for_generate_and_for_scoring(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    path = spec.save(tmp_path / "spec.yaml")
    ids, mask = left(PROMPTS)
    with torch.no_grad(), steer(model, path, attention_mask=mask):
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert out[:, ids.shape[1] :].tolist() == generate(model, PROMPTS, [spec] * 3)
    with torch.no_grad(), steer(model, spec, attention_mask=torch.ones(1, 6), response_start=[4]):
        logits = model(torch.tensor([PROMPTS[2]])).logits[0]
    assert torch.equal(logits, scored(model, [PROMPTS[2]], [4], [spec])[0])


def test_an_alpha_beyond_float32_is_refused(tmp_path):
    model = random_model()
    with pytest.raises(SpecError, match="is not finite in float32. Use a smaller alpha"):
        Steerer(model).compile(spec_for(model, tmp_path, alpha=1e39))
