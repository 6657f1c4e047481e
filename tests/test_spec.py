import json

import pytest
import yaml
from tiny_models import random_model, spec_for, vectors_for

from steered_lm.errors import SpecError, UserError, VectorsError
from steered_lm.steering.spec import SteeringSpec, VectorsRef, spec_from_args


@pytest.fixture
def vectors_file(tmp_path):
    return vectors_for(random_model()).save(tmp_path / "v.safetensors")


def inline(vectors, **more):
    return spec_from_args(None, {"vectors": str(vectors), "layer": 1, "alpha": 0.5, "weights": "formality:1;emotional_tone:-0.5", **more})


def test_inline_form_gives_the_same_spec_as_a_file(vectors_file, tmp_path):
    (tmp_path / "s.yaml").write_text("vectors: v.safetensors\nlayers: [1]\nalpha: 0.5\nweights: {formality: 1, emotional_tone: -0.5}\n")
    from_file = spec_from_args(str(tmp_path / "s.yaml"), {})
    assert from_file == inline(vectors_file)
    assert from_file.digest == inline(vectors_file).digest


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_saved_spec_loads_as_itself_and_its_vectors_path_is_relative(vectors_file, tmp_path, ending):
    spec = inline(vectors_file, positions="all", operation="clamp", unit="raw")
    path = spec.save(tmp_path / "sub" / f"s.{ending}")
    text = path.read_text()
    data = json.loads(text) if ending == "json" else yaml.safe_load(text)
    assert data["vectors"]["path"] == "../v.safetensors"
    assert SteeringSpec.load(path) == spec


def test_digest_ignores_path_and_comment_but_not_settings(vectors_file, tmp_path):
    spec = inline(vectors_file)
    other = tmp_path / "copy.safetensors"
    other.write_bytes(vectors_file.read_bytes())
    assert spec.model_copy(update={"vectors": VectorsRef.to(other), "comment": "x"}).digest == spec.digest
    assert spec.with_weights({"formality": 0.9}).digest != spec.digest


def test_zero_weights_and_zero_alpha_resolve_to_no_site(vectors_file):
    assert inline(vectors_file, weights="formality:0").resolved() == []
    assert inline(vectors_file, alpha=0).resolved() == []
    assert len(inline(vectors_file, alpha=0, operation="clamp").resolved()) == 1


def test_several_sites_take_what_they_do_not_name_from_the_spec(vectors_file):
    spec = SteeringSpec.model_validate({**inline(vectors_file).model_dump(), "sites": [{"layers": [2], "alpha": 2.0, "positions": "prompt"}]})
    first, second = spec.resolved()
    assert (first.layer, first.alpha, first.positions) == (1, 0.5, "response")
    assert (second.layer, second.alpha, second.positions, second.weights) == (2, 2.0, "prompt", first.weights)


def test_with_weights_validates_again(vectors_file):
    with pytest.raises(ValueError, match="finite"):
        inline(vectors_file).with_weights({"formality": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alfa": 1}, r"alfa: Extra inputs.*Allowed keys: version, vectors, weights, layers, alpha"),
        ({"positions": "everywhere"}, r"positions: .*'all', 'prompt' or 'response'.*got 'everywhere'"),
        ({"layers": [1, 1]}, "layers repeat"),
        ({"layers": []}, "weights need layers"),
        ({"sites": [{"layers": [1]}]}, "two sites name the same layer"),
        ({"vectors": None}, "weights need a vectors file"),
        ({"alpha": float("inf")}, "finite"),
    ],
)
def test_a_malformed_spec_file_is_refused_with_what_is_allowed(vectors_file, tmp_path, change, message):
    data = {"vectors": "v.safetensors", "layers": [1], "weights": {"formality": 1.0}, **change}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError, match=message):
        SteeringSpec.load(tmp_path / "s.yaml")


def test_missing_spec_and_missing_vectors_files_say_so(tmp_path):
    with pytest.raises(SpecError, match="no_such.yaml' does not exist"):
        SteeringSpec.load(tmp_path / "no_such.yaml")
    (tmp_path / "s.yaml").write_text("vectors: gone.safetensors\nlayers: [1]\nweights: {formality: 1}\n")
    with pytest.raises(VectorsError, match=r"gone.safetensors' does not exist. Build it with: steered-lm vectors build"):
        SteeringSpec.load(tmp_path / "s.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SpecError, match="holds a list, not a mapping"):
        SteeringSpec.load(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(SpecError, match="neither valid YAML nor JSON"):
        SteeringSpec.load(tmp_path / "bad.yaml")


def test_a_spec_whose_vectors_changed_since_is_refused(tmp_path):
    spec = spec_for(random_model(), tmp_path)
    vectors_for(random_model(), seed=1).save(tmp_path / "vectors.safetensors")
    assert spec.vectors is not None
    with pytest.raises(SpecError, match="changed since the spec was written"):
        spec.vectors.verify()


@pytest.mark.parametrize(
    ("steering", "arguments", "message"),
    [
        ("s.yaml", {"alpha": 1}, "Use either a spec file or the inline form"),
        (None, {"alpha": 1}, "inline steering lacks vectors, weights, layer. Example:"),
        (None, {"vectors": "v", "layer": 1, "weights": "formality=1"}, "'formality=1' is not trait:number"),
    ],
)
def test_malformed_inline_steering_is_refused(steering, arguments, message):
    with pytest.raises(UserError, match=message):
        spec_from_args(steering, arguments)


def test_no_steering_arguments_mean_no_spec():
    assert spec_from_args(None, {"vectors": None, "alpha": None}) is None


def test_layers_may_be_one_number_a_list_or_text(vectors_file):
    assert inline(vectors_file, layer=None, layers="0;2").layers == (0, 2)
    assert inline(vectors_file, layer=None, layers=[0, 2]).layers == (0, 2)
