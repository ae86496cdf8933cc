"""Batch norm with statistics per stream: one pass over both streams is two passes, also over ranks."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from shards.errors import UserError
from train.networks import networks
from train.networks.batch_norm import StreamBatchNorm2d, split_statistics, use_stream_batch_norm
from train.networks.networks import build_network


def made_maps(*shape: int, seed: int = 0) -> Tensor:
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_pair(channels: int) -> tuple[nn.BatchNorm2d, StreamBatchNorm2d]:
    plain = nn.BatchNorm2d(channels)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    holder = nn.Sequential(copy.deepcopy(plain))
    use_stream_batch_norm(holder)
    return plain, holder[0]


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_a_pass_per_stream(streams, memory, dtype):
    plain, norm = norm_pair(5)
    maps = made_maps(4 * streams, 5, 3, 2).to(dtype, memory_format=memory)
    gradient = made_maps(4 * streams, 5, 3, 2, seed=1).to(dtype)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    with split_statistics(norm, streams):
        out = norm(ours)
    expected = torch.cat([plain(part) for part in theirs.chunk(streams)])
    assert out.dtype == dtype
    assert out.stride() == expected.stride()
    assert torch.equal(out, expected)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for mine, other in zip(norm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for (name, mine), other in zip(norm.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, other), name
    assert norm.num_batches_tracked == streams


def test_compiled_it_is_the_same():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), StreamBatchNorm2d(4), nn.ReLU())
    reference = copy.deepcopy(layers)
    layers.compile(backend="aot_eager", fullgraph=True)
    maps = made_maps(4, 3, 5, 5)
    for network in (layers, reference):
        with split_statistics(network, 2):
            network(maps).square().sum().backward()
    for mine, other in zip(layers.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(layers.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_are_those_of_finite_differences():
    _, norm = norm_pair(2)
    norm.double()
    with split_statistics(norm, 2):
        assert torch.autograd.gradcheck(norm, made_maps(4, 2, 2, 2).double().requires_grad_())


def test_evaluation_and_stored_state_are_batch_norms():
    plain, norm = norm_pair(3)
    assert list(norm.state_dict()) == list(plain.state_dict())
    norm.load_state_dict(plain.state_dict())
    maps = made_maps(5, 3, 2, 2)  # an odd number: evaluation splits nothing
    with split_statistics(norm, 2):
        assert torch.equal(norm.eval()(maps), plain.eval()(maps))


def test_streams_of_unequal_size_are_our_bug():
    _, norm = norm_pair(3)
    with split_statistics(norm, 2), pytest.raises(AssertionError):
        norm(made_maps(5, 3, 2, 2))


@pytest.mark.parametrize("streams", [1, 2])
def test_one_value_has_no_variance(streams):
    network = nn.Sequential(StreamBatchNorm2d(3))
    with split_statistics(network, streams):
        with pytest.raises(UserError, match="a part of one image, whose maps are 1x1 here, has no variance"):
            network(torch.randn(streams, 3, 1, 1))
        assert network[0].running_var.tolist() == [1, 1, 1]
        network(torch.randn(streams, 3, 1, 2))
        network.eval()(torch.randn(streams, 3, 1, 1))


def test_a_network_keeps_its_parameters_and_a_split_ends_with_its_block():
    network = build_network("bilateral", "resnet18", 3)
    before = dict(network.named_parameters())
    use_stream_batch_norm(network, synchronised=True)
    assert all(after is before[name] for name, after in network.named_parameters())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(norm, StreamBatchNorm2d) and norm.synchronised for norm in norms)
    with split_statistics(network, 2):
        assert {norm.streams for norm in norms} == {2}
    assert {norm.streams for norm in norms} == {1}


@pytest.mark.parametrize(("backbone", "size"), [("resnet32", 16), ("resnet18", 40)])
def test_the_bilateral_step_is_two_passes(backbone, size, monkeypatch):
    torch.manual_seed(0)
    together = build_network("bilateral", backbone, 4)
    apart = copy.deepcopy(together)
    generator = torch.Generator().manual_seed(0)
    images_c, images_r = torch.randint(0, 256, (2, 6, size, size, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(6) % 4
    logits = []
    for network, limit in ((together, 0), (apart, 2**40)):
        monkeypatch.setattr(networks, "CPU_WEIGHTS_PER_VALUE", limit)
        logits_c, logits_r = network(images_c, images_r // 2)
        logits.append(0.3 * logits_c + 0.7 * logits_r)
        nn.functional.cross_entropy(logits[-1], labels).backward()
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
        assert error < 1e-3, (name, error)
    for ours, theirs in zip(together.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _half_a_step(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    _, norm = norm_pair(3)
    norm.load_state_dict(torch.load(folder / "norm.pt"))
    norm.synchronised = True
    streams = [part.chunk(2)[rank] for part in torch.load(folder / "maps.pt").chunk(2)]
    maps = torch.cat(streams).requires_grad_()
    with split_statistics(norm, 2):
        out = norm(maps)
    (out.sin() * maps.detach()).sum().backward()
    torch.save([out.detach(), maps.grad, norm.weight.grad, norm.bias.grad, norm.state_dict()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_synchronised_statistics_are_those_of_the_global_batch(tmp_path):
    _, norm = norm_pair(3)
    maps = made_maps(8, 3, 4, 2)
    torch.save(norm.state_dict(), tmp_path / "norm.pt")
    torch.save(maps, tmp_path / "maps.pt")
    mp.start_processes(_half_a_step, (tmp_path,), nprocs=2, start_method="forkserver")
    maps.requires_grad_()
    with split_statistics(norm, 2):
        out = norm(maps)
    (out.sin() * maps.detach()).sum().backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def both(index: int) -> Tensor:  # stream by stream, a half of each from each rank
        return torch.cat([rank[index].chunk(2)[stream] for stream in range(2) for rank in ranks])

    torch.testing.assert_close(both(0), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both(1), maps.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], norm.weight.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(ranks[0][3] + ranks[1][3], norm.bias.grad, rtol=1e-4, atol=1e-2)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(ranks[0][4][name], value, rtol=1e-5, atol=1e-4)
        assert torch.equal(ranks[0][4][name], ranks[1][4][name])
