"""What fine-tuning does to blocks: a frozen trunk, drop path, checkpointed gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from shards.errors import UserError
from train.networks import networks as networks_module
from train.networks.blocks import checkpoint_blocks, use_drop_path
from train.networks.networks import build_network

KINDS = ["plain", "bilateral"]
BLOCKS = {"resnet32": 14, "resnet10": 3, "resnet50": 15}  # of the trunk


def made(kind: str, backbone: str = "resnet32"):
    torch.manual_seed(0)
    return build_network(kind, backbone, 3).train()


def pictures(size: int = 16, number: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (number, size, size, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def loss_of(network) -> torch.Tensor:
    """Return a loss of both streams that the statistics of each stand behind."""
    images = pictures()
    inputs = (images,) if network.kind == "plain" else (images, images.flip(0, 1) // 2)
    outputs = network(*inputs)
    parts = (outputs,) if network.kind == "plain" else outputs
    return sum((number + 1) * F.cross_entropy(part, torch.tensor([0, 1, 2, 0])) for number, part in enumerate(parts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backbone", "blocks"), BLOCKS.items())
def test_layers_hold_every_parameter_below_the_classifier_once(kind, backbone, blocks):
    with torch.device("meta"):
        network = build_network(kind, backbone, 3)
    layers = network.layers
    assert len(layers) == 1 + blocks + 1
    assert len(layers[-1]) == network.branches
    found = [id(p) for modules in layers for module in modules for p in module.parameters()]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for name, p in network.named_parameters() if not name.startswith("classifier")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_stays_as_it_is(kind):
    network = made(kind)
    loss_of(network)  # statistics that are worth keeping
    network.freeze_trunk()
    before = copy.deepcopy(network.trunk.state_dict())
    network.train()
    assert network.training
    assert not any(module.training for module in network.trunk.modules())
    assert all(module.training for block in network.last_blocks for module in block.modules())
    loss_of(network).backward()
    assert all(torch.equal(value, before[name]) for name, value in network.trunk.state_dict().items())
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("trunk."), name
    assert not network.eval().training


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_frozen_trunk_is_kept_for_the_backward_pass(kind):
    network = made(kind)
    whole = kept_bytes(network)
    network.freeze_trunk()
    assert network._trunk_maps(pictures()).grad_fn is None
    assert kept_bytes(network) < 0.1 * whole


def kept_bytes(network) -> int:
    """Return how many bytes of activations a step keeps for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(network)
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same_bits(kind, passes, drop_path, monkeypatch):
    # In one pass each stream has its statistics, also when the backward pass computes them again.
    monkeypatch.setattr(networks_module, "CPU_WEIGHTS_PER_VALUE", 0 if passes == 1 else 10**9)
    results = []
    for checkpointed in (False, True):
        network = made(kind)
        if drop_path:
            use_drop_path(network, drop_path)
        if checkpointed:
            checkpoint_blocks(network)
        torch.manual_seed(2)
        loss = loss_of(network)
        loss.backward()
        drawn = torch.rand(1)  # the generator goes on from the same place
        results.append((loss, drawn, {n: p.grad for n, p in network.named_parameters()}, dict(network.named_buffers())))
    (loss, drawn, gradients, buffers), (loss_2, drawn_2, gradients_2, buffers_2) = results
    assert torch.equal(loss, loss_2)
    assert torch.equal(drawn, drawn_2)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_2[name]), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, buffers_2[name]), name
    assert buffers["trunk.bn1.num_batches_tracked"] == (1 if kind == "plain" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_the_inputs_of_blocks_only(kind):
    network = made(kind)
    whole = kept_bytes(network)
    checkpoint_blocks(network)
    assert kept_bytes(network) < 0.35 * whole


def test_a_copy_of_a_checkpointed_network_computes_with_its_own_weights():
    network = made("bilateral")
    use_drop_path(network, 0.5)
    checkpoint_blocks(network)
    other = copy.deepcopy(network)  # as an average of weights is made
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    loss_of(other).backward()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["resnet32", "resnet10", "resnet50"])
def test_drop_path_rises_with_depth_and_only_trains(kind, backbone, monkeypatch):
    plain = made(kind, backbone)
    network = copy.deepcopy(plain)
    use_drop_path(network, 0.4)
    assert network.state_dict().keys() == plain.state_dict().keys()
    images = pictures(32, 2)
    assert torch.equal(network.eval().predict(images), plain.eval().predict(images))
    rates: list[float] = []

    def keep_rate(maps, rate, mode, training):
        assert (mode, training) == ("row", True)
        rates.append(rate)
        return maps

    monkeypatch.setattr("torchvision.ops.stochastic_depth", keep_rate)
    network = copy.deepcopy(plain).train()
    use_drop_path(network, 0.4)
    network.features(images)
    blocks = BLOCKS[backbone]
    expected = [0.4 * number / blocks for number in range(blocks)] + [0.4] * network.branches
    assert rates == pytest.approx(expected)


def test_a_block_that_is_dropped_is_its_shortcut():
    network = made("plain")
    use_drop_path(network, 1.0)
    maps = torch.rand(6, 64, 4, 4)
    assert torch.equal(network.branch(maps), maps)
    network = made("plain")
    use_drop_path(network, 0.5)
    torch.manual_seed(0)
    kept_B = (network.branch(maps) != maps).flatten(1).any(1)
    assert 0 < kept_B.sum() < 6  # image by image


def test_a_network_without_blocks_is_named():
    network = made("plain")
    network.trunk, network.branch = torch.nn.Sequential(), torch.nn.Identity()
    with pytest.raises(UserError, match=r"model.drop_path=0.1: resnet32 has no residual blocks"):
        use_drop_path(network, 0.1)
