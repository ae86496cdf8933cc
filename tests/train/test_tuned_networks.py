"""What fine-tuning does to a network: a frozen trunk, drop path, checkpointed gradients."""

import copy
import gc

import pytest
import torch
from torch.nn import functional as F

from shards.errors import UserError
from train.networks.depths import part_of
from train.networks.networks import HiddenMix, build_network

KINDS = ["plain", "bilateral"]
BLOCKS = {"resnet32": 14, "resnet10": 3, "resnet50": 15}  # of the trunk


def made(kind: str, backbone: str = "resnet32", **settings):
    torch.manual_seed(0)
    return build_network(kind, backbone, 3, **settings).train()


def pictures(size: int = 16, number: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (number, size, size, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def loss_of(network) -> torch.Tensor:
    """Return a loss of both streams that the statistics of each stand behind."""
    images = pictures()
    inputs = (images,) if network.kind == "plain" else (images, images.flip(0, 1) // 2)
    outputs = network(*inputs)
    parts = (outputs,) if network.kind == "plain" else outputs
    return sum((number + 1) * F.cross_entropy(part, torch.tensor([0, 1, 2, 0])) for number, part in enumerate(parts))


def graph_tensors() -> list[torch.Tensor]:
    """Return every tensor of this process that a gradient flows through."""
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.requires_grad]


def kept_bytes(network) -> int:
    """Return how many bytes of maps a step keeps for its backward pass."""
    before = graph_tensors()  # of other tests; held, so that no map of this step gets the memory of one
    known = {tensor.untyped_storage().data_ptr() for tensor in [*before, *network.state_dict().values()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        loss = loss_of(network)
    for tensor in graph_tensors():  # what a checkpointed block takes is no saved tensor
        keep(tensor)
    del loss, before
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_stays_as_it_is(kind):
    network = made(kind)
    loss_of(network)  # statistics that are worth keeping
    network.freeze_trunk()
    before = copy.deepcopy(network.trunk.state_dict())
    network.train()
    assert network.training
    assert not any(module.training for module in network.trunk.modules())
    assert all(module.training for name, module in network.named_modules() if not name.startswith("trunk"))
    loss_of(network).backward()
    assert all(torch.equal(value, before[name]) for name, value in network.trunk.state_dict().items())
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (part_of(name) == "trunk"), name
    assert not network.eval().training


def test_a_network_without_a_trunk_is_named():
    network = made("plain")
    network.is_cut = False  # as most of timm's models are
    with pytest.raises(UserError, match=r"optim.freeze=trunk: resnet32 is not cut, and has no trunk; leave it out"):
        network.freeze_trunk()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_frozen_trunk_is_kept_for_the_backward_pass(kind):
    network = made(kind)
    whole = kept_bytes(network)
    network.freeze_trunk()
    assert network._trunk_maps(pictures()).grad_fn is None
    assert kept_bytes(network) < 0.15 * whole


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same_bits(kind, drop_path, monkeypatch):
    monkeypatch.setattr("train.networks.networks.CPU_WEIGHTS_PER_VALUE", 10**9)  # a pass for each stream, in both cases
    results = []
    for checkpointed in (False, True):
        network = made(kind, drop_path=drop_path)
        network.set_grad_checkpointing(checkpointed)
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


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_what_blocks_take(kind):
    network = made(kind)
    whole = kept_bytes(network)
    network.set_grad_checkpointing()
    assert kept_bytes(network) < 0.5 * whole


def test_a_copy_of_a_network_with_all_of_it_computes_with_its_own_weights():
    network = made("bilateral", drop_path=0.5)
    network.set_grad_checkpointing()
    other = copy.deepcopy(network)  # as an average of weights is made
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    loss_of(other).backward()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BLOCKS)
def test_drop_path_rises_with_depth_and_only_trains(kind, backbone, monkeypatch):
    rates: list[float] = []

    def keep_rate(maps, rate, mode, training):
        assert mode == "row"
        rates.extend([rate] * training)
        return maps

    monkeypatch.setattr("torchvision.ops.stochastic_depth", keep_rate)
    plain, network = made(kind, backbone), made(kind, backbone, drop_path=0.4)
    assert network.state_dict().keys() == plain.state_dict().keys()
    images = pictures(32, 2)
    network.features(images)
    blocks = BLOCKS[backbone]
    expected = [0.4 * number / blocks for number in range(blocks)] + [0.4] * network.branches
    assert rates == pytest.approx(expected)
    rates.clear()
    network.eval().features(images)
    assert rates == []


def test_a_block_that_is_dropped_is_its_shortcut():
    network = made("plain", drop_path=1.0)
    maps = torch.rand(6, 64, 4, 4)
    assert torch.equal(network.branch(maps), maps)
    network = made("plain", drop_path=0.5)
    torch.manual_seed(0)
    kept_B = (network.branch(maps) != maps).flatten(1).any(1)
    assert 0 < kept_B.sum() < 6  # image by image


def test_a_network_without_a_trunk_keeps_its_maps_and_says_so():
    network = build_network("plain", "timm/test_mambaout", 3, image_size=64)
    with pytest.raises(UserError, match=r"loop\.grad_checkpointing: timm/test_mambaout is not cut"):
        network.set_grad_checkpointing()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_checkpointing_and_mixed_maps(depth):
    network = made("plain")
    network.set_grad_checkpointing()
    blocks = [block for name, stage in network.trunk.named_children() if name.startswith("layer") for block in stage]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    mix = HiddenMix(depth, torch.tensor([1, 0, 3, 2]), torch.full((4,), 0.5))
    network(pictures(), mix).sum().backward()
    assert len(calls) == 2 * len(blocks)  # each once more in the backward pass
