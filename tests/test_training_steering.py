"""Steering while training: through the inference hooks, with gradients, at the right positions, and gone from what is saved."""

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, random_model, spec_for, vectors_for
from training_data import conversations, request_for, write
from transformers import AutoModelForCausalLM

from steered_lm.config import file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.steering.blocks import find_blocks
from steered_lm.steering.spec import Site, SteeringSpec, VectorsRef
from steered_lm.tiny_chat import WEIGHTS
from steered_lm.trait_models.base_model import adapted, load_adapted, load_tokenizer
from steered_lm.trait_models.checkpoint import trainable
from steered_lm.trait_models.experiment import Hyperparameters, TrainingSteering
from steered_lm.trait_models.loss_mask import ConversationEncoder
from steered_lm.trait_models.peft import train
from steered_lm.trait_models.trainer import Batch, padded, response_loss, summed_loss, token_count
from steered_lm.trait_models.training_steering import TrainingSteerer, positions

LAYER = 3


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS)
    return vectors_for(model, layers=(2, LAYER)).save(tmp_path_factory.mktemp("vectors") / "v.safetensors")


@pytest.fixture
def spec_file(vectors, tmp_path):
    def write_spec(**settings):
        fields = {"weights": {"formality": 1.0}, "layers": (LAYER,), "alpha": 2.0, "positions": "all", **settings}
        return SteeringSpec(vectors=VectorsRef.to(vectors), **fields).save(tmp_path / "spec.yaml")

    return write_spec


@pytest.fixture(scope="module")
def batch():
    encoder = ConversationEncoder(load_tokenizer(TINY_CHAT))
    rows = [messages for messages in conversations(40) if len(messages) >= 4][:1] + conversations(3)
    return padded([encoder.encode(messages) for messages in rows], torch.device("cpu"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    adapted = load_adapted(TINY_CHAT, Hyperparameters(lora_rank=4), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, weight in trainable(adapted).items():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return adapted


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in trainable(model).items()}


def by_hand(model, batch, change):
    """Loss and gradients under a hook of our own."""
    handle = find_blocks(model)[LAYER].register_forward_hook(
        lambda module, args, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
    )
    try:
        loss = summed_loss(model, batch)
        return loss.detach(), gradients(model, loss)
    finally:
        handle.remove()


def test_positions_are_those_that_predict_a_token_with_loss_the_others_and_both():
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100], [-100, 5, -100, -100, 6, 7]])
    assert positions("response", attention, labels).int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]]
    assert positions("prompt", attention, labels).int().tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]
    assert positions("all", attention, labels).int().tolist() == attention.tolist()


@pytest.mark.parametrize("where", ["all", "prompt", "response"])
def test_an_added_vector_gives_the_loss_and_the_gradients_of_a_hook_written_by_hand(spec_file, batch, model, where):
    spec = SteeringSpec.load(spec_file(positions=where, unit="raw", alpha=3.0))
    direction = 3.0 * vectors_for(model.base_model.model, layers=(2, LAYER)).vector("formality", LAYER)
    mask = positions(where, batch.attention, batch.labels)
    loss, wanted = by_hand(model, batch, lambda hidden: hidden + mask[..., None] * direction)
    steerer = TrainingSteerer(model, spec)
    with steerer.batch(batch.attention, batch.labels):
        steered = summed_loss(model, batch)
        found = gradients(model, steered)
    torch.testing.assert_close(steered.detach(), loss)
    torch.testing.assert_close(found, wanted)
    assert steerer.tokens == {LAYER: int(mask.sum())}
    below = [grad for name, grad in found.items() if ".layers.0." in name]
    assert below and all(grad.abs().max() > 0 for grad in below), "gradients reach the blocks under the steered one"
    plain = summed_loss(model, batch).detach()
    assert abs(plain - loss) > 1e-3, "the hooks are idle outside"


def test_ablation_takes_the_span_out_and_gradients_do_not_run_along_it(spec_file, batch, model):
    steering = TrainingSteering(spec=spec_file(weights={"formality": 1.0, "emotional_tone": 0.5}, alpha=0.3), method="ablation")
    directions = vectors_for(model.base_model.model, layers=(2, LAYER))
    basis = torch.stack([directions.vector(trait, LAYER) for trait in ("formality", "emotional_tone")])
    projector = torch.eye(basis.shape[1]) - torch.linalg.pinv(basis) @ basis
    keep = batch.attention.bool()[..., None]
    loss, wanted = by_hand(model, batch, lambda hidden: torch.where(keep, hidden @ projector, hidden))
    steerer = TrainingSteerer(model, steering.load())
    with steerer.batch(batch.attention, batch.labels):
        steered = summed_loss(model, batch)
        found = gradients(model, steered)
    torch.testing.assert_close(steered.detach(), loss, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_files_loss_is_that_of_its_examples_under_the_spec_and_nothing_stays_attached(spec_file, model, tmp_path):
    spec, tokenizer, rows = SteeringSpec.load(spec_file(positions="response", unit="raw", alpha=200.0)), load_tokenizer(TINY_CHAT), conversations(5)
    data = write(tmp_path, rows)
    direction = 200.0 * vectors_for(model.base_model.model, layers=(2, LAYER)).vector("formality", LAYER)
    examples = [ConversationEncoder(tokenizer).encode(messages) for messages in rows]
    whole = padded(examples, torch.device("cpu"))
    mask = positions("response", whole.attention, whole.labels)
    model.eval()
    wanted = by_hand(model, whole, lambda hidden: hidden + mask[..., None] * direction)[0].item() / token_count(examples)
    model.train()
    plain = response_loss(model, tokenizer, data)
    assert response_loss(model, tokenizer, data, spec=spec, batch_size=2) == pytest.approx(wanted, abs=1e-4)
    assert response_loss(model, tokenizer, data) == plain and abs(plain - wanted) > 1e-3
    assert model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_under_steering(family, tmp_path):
    base = random_model(family)
    spec = spec_for(base, tmp_path, positions="response")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapted(base, family, Hyperparameters(lora_rank=2))
    ids = torch.arange(3, 23).reshape(2, 10)
    attention = torch.ones_like(ids)
    attention[1, 8:] = 0
    batch = Batch(ids, attention, torch.where((torch.arange(10) > 4) & attention.bool(), ids, -100))
    steerer = TrainingSteerer(model, spec)
    plain = summed_loss(model, batch).item()
    with steerer.batch(batch.attention, batch.labels):
        loss = summed_loss(model, batch)
        found = gradients(model, loss)
    assert abs(loss.item() - plain) > 1e-3 and steerer.tokens == {1: 5 + 3}
    assert all(found[name].abs().max() > 0 for name in found if "lora_B" in name), "B starts at zero, so gradients are its alone"


def test_ablation_takes_every_site_of_a_spec(spec_file):
    path = spec_file(sites=(Site(layers=(2,), alpha=0.1, operation="add"),))
    sites = TrainingSteering(spec=path, method="ablation").load().resolved()
    assert {(site.layer, site.operation, site.alpha) for site in sites} == {(2, "ablate", 1.0), (LAYER, "ablate", 1.0)}
    assert {site.operation for site in TrainingSteering(spec=path).load().resolved()} == {"add"}


def test_weight_zero_trains_the_same_weights_to_the_bit_and_other_weights_do_not(spec_file, tmp_path):
    data = write(tmp_path, conversations(8))
    plain = train(request_for(data), tmp_path / "plain")
    zero = train(request_for(data, steering=TrainingSteering(spec=spec_file(weights={"formality": 0.0}))), tmp_path / "zero")
    steered = train(request_for(data, steering=TrainingSteering(spec=spec_file())), tmp_path / "steered")
    ablated = train(request_for(data, steering=TrainingSteering(spec=spec_file(), method="ablation")), tmp_path / "ablated")
    assert zero.digest == plain.digest
    assert len({plain.digest, steered.digest, ablated.digest}) == 3
    assert steered.facts["steered_layers"] == [LAYER] and "steered_layers" not in zero.facts


def test_the_saved_adapter_holds_lora_weights_of_the_decoder_blocks_and_nothing_else(spec_file, tmp_path):
    data = write(tmp_path, conversations(4))
    plain = train(request_for(data), tmp_path / "plain")
    steered = train(request_for(data, steering=TrainingSteering(spec=spec_file())), tmp_path / "steered")

    def shapes(folder):
        with safe_open(f"{folder}/adapter_model.safetensors", framework="pt") as handle:
            return {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118

    assert shapes(steered.peft) == shapes(plain.peft)
    assert all(".layers." in name and ("lora_A" in name or "lora_B" in name) for name in shapes(steered.peft))
    assert len(shapes(plain.peft)) == 6 * 7 * 2, "seven linear layers in each of six blocks"
    assert file_hash(tmp_path / "steered" / "adapter" / "adapter_model.safetensors") == steered.digest
