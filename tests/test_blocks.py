import pytest
import torch
import transformers as hf
from tiny_models import FAMILIES, random_model
from torch import nn

from steered_lm.errors import ModelError
from steered_lm.steering.blocks import find_blocks, hidden_size, layer_count, parent_of


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_structure_in_every_family(family):
    model = random_model(family)
    blocks = find_blocks(model)
    seen = []
    handles = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(blocks)]
    model(torch.tensor([[1, 5, 6]]))
    for handle in handles:
        handle.remove()
    assert seen == [0, 1, 2]
    assert (layer_count(model), hidden_size(model)) == (3, 32)
    assert blocks in list(parent_of(model, blocks).children())


def test_experts_as_many_as_layers_are_not_taken_for_blocks():
    blocks = find_blocks(random_model("mixtral"))
    assert type(blocks[0]).__name__ == "MixtralDecoderLayer"


def test_an_override_names_the_list_and_is_checked():
    model = random_model()
    assert find_blocks(model, "model.layers") is model.model.layers
    with pytest.raises(ModelError, match=r"blocks='model.layerz' is not a submodule"):
        find_blocks(model, "model.layerz")
    with pytest.raises(ModelError, match="is a Embedding, not an nn.ModuleList"):
        find_blocks(model, "model.embed_tokens")


def test_models_without_blocks_and_encoder_decoders_are_refused():
    config = hf.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_blocks(hf.T5ForConditionalGeneration(config))
    model = nn.Linear(2, 2)
    model.config = hf.LlamaConfig(num_hidden_layers=3)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="found no list of 3 decoder blocks in Linear.*blocks=<dotted path"):
        find_blocks(model)
