import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, random_model, vectors_for

from steered_lm.errors import VectorsError
from steered_lm.steering.vectors import TraitVectors, model_fingerprint, random_vectors


def test_a_saved_file_loads_as_itself(tmp_path):
    vectors = vectors_for(random_model())
    loaded = TraitVectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert loaded.meta == vectors.meta
    assert all(torch.equal(loaded.directions[key], vectors.directions[key]) for key in vectors.directions)


def test_a_trait_name_may_hold_a_slash(tmp_path):
    vectors = random_vectors(vectors_for(random_model()), seed=0, trait="a/b")
    assert TraitVectors.load(vectors.save(tmp_path / "v.safetensors")).meta.traits == ("a/b",)


def test_truncated_missing_and_plain_safetensors_are_refused(tmp_path):
    path = vectors_for(random_model()).save(tmp_path / "v.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(VectorsError, match="truncated or not a safetensors file"):
        TraitVectors.load(path)
    with pytest.raises(VectorsError, match="does not exist. Build it with: steered-lm vectors build"):
        TraitVectors.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(VectorsError, match="without trait-vectors metadata"):
        TraitVectors.load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(("change", "message"), [("nan", "holds NaN"), ("norm", "has norm 2"), ("shape", "has shape"), ("lost", "is damaged")])
def test_damaged_directions_are_refused_by_name(tmp_path, change, message):
    vectors = vectors_for(random_model())
    directions = dict(vectors.directions)
    key = ("formality", 1)
    if change == "lost":
        del directions[key]
    else:
        bad = {"nan": directions[key] * float("nan"), "norm": directions[key] * 2, "shape": directions[key][:5]}
        directions[key] = bad[change]
    with pytest.raises(VectorsError, match=message):
        TraitVectors(directions, vectors.meta)


def test_nan_in_a_file_is_refused_on_loading(tmp_path):
    path = vectors_for(random_model()).save(tmp_path / "v.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors["formality/1"][3] = float("nan")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(VectorsError, match="formality at layer 1 holds NaN"):
        TraitVectors.load(path)


def test_unknown_traits_and_layers_list_what_there_is():
    vectors = vectors_for(random_model(), layers=(1, 2))
    with pytest.raises(VectorsError, match=r"trait 'formalitty'.*Allowed: emotional_tone, formality. Did you mean 'formality'"):
        vectors.vector("formalitty", 1)
    with pytest.raises(VectorsError, match=r"layer=7 is not in .*Allowed: 1, 2"):
        vectors.vector("formality", 7)


def test_foreign_models_are_refused_by_shape_and_by_fingerprint():
    vectors = vectors_for(random_model())
    with pytest.raises(VectorsError, match="this model's fingerprint differs"):
        vectors.check_model(random_model(seed=1))
    vectors.check_model(random_model(seed=1), allow_foreign=True)
    other = vectors_for(random_model())
    meta = other.meta.model_copy(update={"d_model": 16})
    with pytest.raises(VectorsError, match="has d_model=32"):
        TraitVectors({k: torch.nn.functional.normalize(v[:16], dim=0) for k, v in other.directions.items()}, meta).check_model(random_model())


def test_fingerprint_is_the_same_in_bfloat16_and_differs_between_models():
    model = random_model()
    first = model_fingerprint(model)
    assert model_fingerprint(model.to(torch.bfloat16)) == first
    assert len({model_fingerprint(random_model(family)) for family in FAMILIES}) == len(FAMILIES)


def test_random_direction_is_seeded_and_of_unit_norm():
    vectors = vectors_for(random_model())
    first, again, other = (random_vectors(vectors, seed=s).vector("random", 1) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.norm()) == pytest.approx(1.0, abs=1e-6)


def test_scale_follows_unit_and_positions():
    vectors = vectors_for(random_model(), norm=4.0)
    assert vectors.scale(1, "raw", "all") == 1.0
    assert [vectors.scale(1, "residual", p) for p in ("all", "prompt", "response")] == [4.0, 2.0, 8.0]
