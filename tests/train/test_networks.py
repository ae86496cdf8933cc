"""Networks: sizes, BBN's Eq. 1, batch norm's bookkeeping, storage and its mistakes."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shards.errors import UserError
from train.networks import backbones
from train.networks import model_files as module
from train.networks.backbones import Normalize, make_backbone
from train.networks.model_files import load_model, load_weights, save_model
from train.networks.networks import BilateralNetwork, PlainNetwork, build_network


def images(batch: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


def mixed(logits: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    return alpha * logits[0] + (1 - alpha) * logits[1]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture
def bilateral() -> BilateralNetwork:
    torch.manual_seed(0)
    return build_network("bilateral", "resnet32", 10)


@pytest.fixture
def plain() -> PlainNetwork:
    torch.manual_seed(0)
    return build_network("plain", "resnet32", 10)


@pytest.fixture(scope="module")
def resnet18_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()


def test_normalize():
    layer = Normalize(((0.5, 0.0, 1.0), (0.5, 1.0, 2.0)))
    images_BHWC = torch.tensor([[[[255, 51, 0]]]], dtype=torch.uint8)
    torch.testing.assert_close(layer(images_BHWC).flatten(), torch.tensor([1.0, 0.2, -0.5]))
    assert not list(layer.parameters())
    assert list(layer.state_dict()) == ["mean", "std"]
    assert layer(images(2)).is_contiguous(memory_format=torch.channels_last)


def test_normalize_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Normalize()(images(1)).dtype == torch.float32


def test_normalisation_follows_the_backbone():
    assert make_backbone("resnet32").normalize.mean.flatten()[0].item() == pytest.approx(0.4914)
    assert make_backbone("resnet18").normalize.mean.flatten()[0].item() == pytest.approx(0.485)


TORCHVISION_RESNETS = backbones._torchvision_resnets()


# He et al. 2015: ResNet-32 has 0.46 M parameters, and the block of 64 channels that BBN doubles 2·(64·64·9 + 2·64).
# ResNet-10: stem 9,536, stages 73,984, 230,144, 919,040 and 3,673,088, classifier 513,000.
@pytest.mark.parametrize(
    ("backbone", "num_classes", "plain", "branch"),
    [
        ("resnet32", 10, 464_154, 73_984),
        ("resnet10", 1000, 5_418_792, 3_673_088),
        ("resnet50", 1000, 25_557_032, 4_462_592),
        ("resnet152", 1000, 60_192_808, 4_462_592),
        ("resnext50_32x4d", 1000, 25_028_904, 4_497_408),
        ("resnext101_32x8d", 1000, 88_791_336, 9_580_544),
    ],
)
def test_parameter_counts(backbone, num_classes, plain, branch):
    with torch.device("meta"):
        dim = build_network("plain", backbone, num_classes).classifier.in_features
        assert parameters(build_network("plain", backbone, num_classes)) == plain
        assert parameters(build_network("bilateral", backbone, num_classes)) == plain + branch + dim * num_classes


@pytest.mark.parametrize("backbone", TORCHVISION_RESNETS)
def test_every_torchvision_resnet_becomes_a_plain_and_a_bilateral_network(backbone):
    documented = torchvision.models.get_model_weights(backbone).DEFAULT.meta["num_params"]
    with torch.device("meta"):
        plain = build_network("plain", backbone, 1000).eval()
        bilateral = build_network("bilateral", backbone, 1000).eval()
        images_BHWC = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
        assert parameters(plain) == documented
        assert parameters(bilateral) == documented + parameters(plain.branch) + bilateral.classifier.in_features * 500
        assert plain.predict(images_BHWC).shape == (2, 1000)
        assert [logits.shape for logits in bilateral(images_BHWC, images_BHWC)] == [(2, 1000)] * 2


def test_resnet10s_branch_is_its_whole_last_stage():
    backbone = make_backbone("resnet10")
    assert [len(backbone.trunk.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 0]
    maps_BCHW = backbone.trunk(backbone.normalize(images(2, 64)))
    assert maps_BCHW.shape == (2, 256, 4, 4)
    assert backbone.make_branch()(maps_BCHW).shape == (2, 512, 2, 2)
    assert backbone.feature_dim == 512


@pytest.mark.parametrize("backbone", ["resnet10", "resnet32", "resnext50_32x4d"])
def test_a_step_of_either_kind_reaches_every_parameter(backbone):
    for kind in ("plain", "bilateral"):
        network = build_network(kind, backbone, 3)
        shown = images(4, 32), images(4, 32, seed=1)
        logits_BC = network(shown[0]) if kind == "plain" else mixed(network(*shown), 0.4)
        nn.functional.cross_entropy(logits_BC, torch.tensor([0, 1, 2, 0])).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_resnet50_is_split_as_in_bbn():
    backbone = make_backbone("resnet50")
    layers = ("layer1", "layer2", "layer3", "layer4")
    assert [len(backbone.trunk.get_submodule(name)) for name in layers] == [3, 4, 6, 2]
    branch = backbone.make_branch()
    assert branch.downsample is None
    assert (branch.conv1.in_channels, branch.conv2.out_channels, branch.conv3.out_channels) == (2048, 512, 2048)
    assert branch.conv2.stride == (1, 1)
    assert backbone.feature_dim == 2048


@pytest.mark.parametrize("size", [1, 5, 16, 32])
@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_any_size_and_a_single_image(kind, size):
    network = build_network(kind, "resnet32", 3).eval()
    assert network.predict(images(1, size)).shape == (1, 3)
    assert network.features(images(1, size)).shape == (1, network.classifier.in_features)


def test_branch_keeps_shape_and_trunk_ends_at_a_quarter(plain):
    maps_BCHW = plain.trunk(plain.normalize(images(2, 32)))
    assert maps_BCHW.shape == (2, 64, 8, 8)
    assert plain.branch(maps_BCHW).shape == maps_BCHW.shape


def test_shortcut_is_option_a():
    block = backbones.CifarBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    maps_BCHW = torch.rand(1, 2, 3, 3)
    out_BCHW = block(maps_BCHW)
    assert out_BCHW.shape == (1, 4, 2, 2)
    assert torch.equal(out_BCHW[:, 1:3], maps_BCHW[:, :, ::2, ::2])
    assert not out_BCHW[:, [0, 3]].any()


def test_plain_is_torchvision(resnet18_state, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18_state, path)
    network = build_network("plain", "resnet18", 1000, str(path)).eval()
    reference = torchvision.models.resnet18().eval()
    reference.load_state_dict(resnet18_state)
    network.classifier.load_state_dict(reference.fc.state_dict())
    images_BHWC = images(2, 40)
    torch.testing.assert_close(network(images_BHWC), reference(network.normalize(images_BHWC)))


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_predict_is_the_classifier_of_the_features(kind):
    network = build_network(kind, "resnet32", 10).eval()
    features_BD = network.features(images(3))
    assert (features_BD >= 0).all()
    assert torch.equal(network.predict(images(3)), network.classifier(features_BD))


def test_plain_forward_is_predict(plain):
    plain.eval()
    assert torch.equal(plain(images(3)), plain.predict(images(3)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_bilateral_forward_is_equation_1(bilateral, alpha):
    bilateral.eval()
    weight_c_CD, weight_r_CD = torch.randn(10, 64), torch.randn(10, 64)
    bias_C = torch.arange(10.0)
    with torch.no_grad():
        bilateral.classifier.weight.copy_(torch.cat([weight_c_CD, weight_r_CD], dim=1))
        bilateral.classifier.bias.copy_(bias_C)
    images_c, images_r = images(4), images(4, seed=1)
    features_c_BD = bilateral.features(images_c)[:, :64]
    features_r_BD = bilateral.features(images_r)[:, 64:]
    expected = 2 * (alpha * features_c_BD @ weight_c_CD.T + (1 - alpha) * features_r_BD @ weight_r_CD.T) + bias_C
    torch.testing.assert_close(mixed(bilateral(images_c, images_r), alpha), expected, rtol=1e-4, atol=1e-4)


def test_alpha_one_half_is_predict(bilateral):
    bilateral.eval()
    torch.testing.assert_close(mixed(bilateral(images(3), images(3)), 0.5), bilateral.predict(images(3)))


def test_branches_start_apart_unless_pretrained(bilateral, resnet18_state, tmp_path):
    assert not torch.equal(bilateral.conventional.conv1.weight, bilateral.rebalancing.conv1.weight)
    fresh = build_network("bilateral", "resnet18", 10)
    assert not torch.equal(fresh.conventional.conv1.weight, fresh.rebalancing.conv1.weight)
    path = tmp_path / "resnet18.safetensors"
    save_file(resnet18_state, path)
    pretrained = build_network("bilateral", "resnet18", 10, str(path))
    for branch in (pretrained.conventional, pretrained.rebalancing):
        assert torch.equal(branch.conv1.weight, resnet18_state["layer4.1.conv1.weight"])
    assert pretrained.conventional.conv1.weight is not pretrained.rebalancing.conv1.weight
    assert torch.equal(pretrained.trunk.layer4[0].conv1.weight, resnet18_state["layer4.0.conv1.weight"])


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_a_run_starts_from_another_one(kind, plain, bilateral, tmp_path):
    own = {"plain": plain, "bilateral": bilateral}[kind]
    save_model(own, tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        one, two = (build_network(k, "resnet32", 7, str(weights)) for k in ("plain", "bilateral"))
        block = own.branch if kind == "plain" else own.conventional
        for network in (one, two):
            assert_same_state(network.trunk, own.trunk)
            for branch in [network.branch] if network is one else [network.conventional, network.rebalancing]:
                assert_same_state(branch, block)
            assert network.classifier.out_features == 7
        assert two.conventional.conv1.weight is not two.rebalancing.conv1.weight
    torch.manual_seed(1)
    save_file(build_network("plain", "resnet32", 4).state_dict(), tmp_path / "model-selected.safetensors")
    fresh = build_network("plain", "resnet32", 7, str(tmp_path))
    assert not torch.equal(fresh.branch.conv1.weight, block.conv1.weight)  # what val selected is taken
    with pytest.raises(
        UserError, match=r"\(its trunk\) is of another model: .*; name a run whose backbone is resnet18"
    ):
        build_network("plain", "resnet18", 7, str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "default").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        with pytest.raises(UserError, match="'default' are neither a file, a run nor one of torchvision's names"):
            build_network("plain", "resnet32", 7, "default")
    with pytest.raises(UserError, match=r"empty holds no model\.safetensors"):
        build_network("plain", "resnet32", 7, str(tmp_path / "empty"))
    save_file(whole_state("resnet32", seed=3), tmp_path / "empty/model.safetensors")  # as a hub's folder has it
    with pytest.raises(UserError, match=r"empty is no run's folder: its model\.safetensors .*; name that file itself"):
        build_network("plain", "resnet32", 7, str(tmp_path / "empty"))
    build_network("plain", "resnet32", 7, str(tmp_path / "empty/model.safetensors"))


def assert_same_state(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    for key, value in theirs.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(ours[key], value), key


def test_running_statistics_see_the_reversed_stream_last(bilateral):
    reference = copy.deepcopy(bilateral)
    images_c, images_r = images(8), images(8, seed=1)
    bilateral(images_c, images_r)
    for branch, stream in ((reference.conventional, images_c), (reference.rebalancing, images_r)):
        branch(reference.trunk(reference.normalize(stream)))
    for (name, buffer), expected in zip(bilateral.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert bilateral.trunk.bn1.num_batches_tracked == 2
    assert bilateral.conventional.bn1.num_batches_tracked == 1


def test_each_stream_has_its_own_batch_statistics(bilateral):
    images_c, images_r = images(8), images(8, seed=1)
    together, _ = bilateral(images_c, images_r)
    torch.testing.assert_close(together, bilateral(images_c, images_c // 4)[0])


@pytest.mark.parametrize(("alpha", "silent"), [(1.0, "rebalancing"), (0.0, "conventional")])
def test_gradients_follow_alpha(bilateral, alpha, silent):
    mixed(bilateral(images(4), images(4, seed=1)), alpha).square().sum().backward()
    for name, parameter in bilateral.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(silent):
            assert not parameter.grad.any(), name
        elif name.endswith("conv1.weight"):
            assert parameter.grad.any(), name


def test_bf16_autocast(bilateral):
    with torch.autocast("cpu", torch.bfloat16):
        logits_BC = mixed(bilateral(images(4), images(4, seed=1)), 0.5)
        features_BD = bilateral.features(images(4))
    assert features_BD.dtype == torch.float32
    logits_BC.float().sum().backward()
    assert torch.isfinite(bilateral.trunk.conv1.weight.grad).all()


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_logits_do_not_tie_under_autocast(kind):
    network = build_network(kind, "resnet32", 2000).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits_BC = network.predict(images(32))
        trained_BC = network(images(32)) if kind == "plain" else network(images(32), images(32))[1]
    assert logits_BC.dtype == trained_BC.dtype == torch.float32
    two_B2 = logits_BC.topk(2).values
    assert (two_B2[:, 0] > two_B2[:, 1]).all()
    assert len(logits_BC[0].unique()) > 1990  # bfloat16 has some hundred values there


def test_forward_works_under_ddp(bilateral, tmp_path):
    alone = copy.deepcopy(bilateral)
    streams = images(4), images(4, seed=1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(bilateral)
        mixed(wrapped(*streams), 0.4).square().sum().backward()
    finally:
        dist.destroy_process_group()
    mixed(alone(*streams), 0.4).square().sum().backward()
    for wrapped_one, expected in zip(bilateral.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(wrapped_one.grad, expected.grad)


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_save_and_load(kind, tmp_path):
    network = build_network(kind, "resnet32", 7).to(memory_format=torch.channels_last)
    network.features(images(4))  # moves the running statistics
    folder = tmp_path / "run" / "deep"
    save_model(network, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads((folder / "model.json").read_text()) == {"format": 1, "network": network.spec}
    loaded = load_model(folder)
    assert type(loaded) is type(network)
    assert not loaded.training
    assert loaded.spec == network.spec == {"kind": kind, "backbone": "resnet32", "num_classes": 7}
    torch.testing.assert_close(loaded.predict(images(2)), network.eval().predict(images(2)))


def test_whoever_may_read_other_files_may_read_a_model(plain, tmp_path):
    save_model(plain, tmp_path)
    module.save_selected_model(plain, tmp_path)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_what_a_kill_left_of_a_save_is_gone_after_the_next(plain, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Nothing cleans up after it, as nothing does after kill -9."""

    def half_write(network, path):
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, "_save_state", half_write)
        patched.setattr(shutil, "rmtree", lambda *a, **o: None)
        with pytest.raises(Killed):
            save_model(plain, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    save_model(plain, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model(plain, tmp_path, monkeypatch):
    save_model(plain, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def half_write(network, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "_save_state", half_write)
    with pytest.raises(OSError, match="disk full"):
        save_model(plain, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_weights_of_another_model(plain, bilateral, tmp_path):
    save_model(bilateral, tmp_path)
    path = tmp_path / "model.safetensors"
    before = copy.deepcopy(plain.state_dict())
    shape = r"classifier\.weight is \(10, 128\) in it and \(10, 64\) here; build the network that the model\.json"
    with pytest.raises(UserError, match=rf"{path} is of another model: {shape}"):
        load_weights(plain, path)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())

    state = load_file(path)
    state["extra.weight"] = torch.zeros(3)
    save_file(state, path)
    with pytest.raises(UserError, match=r"extra\.weight is \(3,\) in it and absent here"):
        load_weights(bilateral, path)
    del state["extra.weight"], state["rebalancing.conv1.weight"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"rebalancing\.conv1\.weight is absent in it and \(64, 64, 3, 3\) here"):
        load_weights(bilateral, path)


def test_missing_and_damaged_files(plain, tmp_path):
    weights, spec = tmp_path / "model.safetensors", tmp_path / "model.json"
    with pytest.raises(
        UserError, match=r"model\.json does not exist, so .* holds no trained model; give a finished run"
    ):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_weights(plain, weights)
    save_model(plain, tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(SafetensorError\)"):
        load_model(tmp_path)
    weights.write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_model(tmp_path)
    spec.write_text("{")
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        load_model(tmp_path)
    spec.write_text('{"kind": "plain"}')
    with pytest.raises(UserError, match=r"model\.json must hold exactly kind, backbone and num_classes"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("plain", "resnet9", 10),
            r"backbone 'resnet9' is unknown; did you mean resnet.*\?; choose one of: resnet32, resnet10, .*resnext50",
        ),
        (("plain", "vgg16", 10), "backbone 'vgg16' is unknown"),
        (("triple", "resnet32", 10), "network kind 'triple' is unknown; choose one of: plain, bilateral"),
        (("plain", "resnet32", 0), "at least one class, got num_classes=0"),
        (
            ("plain", "resnet32", 10, "DEFAULT"),
            "weights 'DEFAULT' are neither a file, a run nor one of torchvision's names for resnet32: none",
        ),
        (
            ("plain", "resnet18", 10, "IMAGENET1K_V9"),
            "'IMAGENET1K_V9' are neither a file, a run nor one of torchvision's names for resnet18: IMAGENET1K_V1",
        ),
        (
            ("plain", "resnet10", 10, "DEFAULT"),
            "'DEFAULT' are neither a file, a run nor one of torchvision's names for resnet10: none",
        ),
        (("plain", "resnet18", 10, "lost.pth"), r"weights 'lost\.pth' are neither a file, a run nor"),
    ],
)
def test_unknown_names(settings, message):
    with pytest.raises(UserError, match=message):
        build_network(*settings)


def test_pretrained_files_that_do_not_fit(resnet18_state, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(resnet18_state, path)
    message = r"layer1\.0\.conv1\.weight is .* in it and .* here; give the state dict of torchvision's resnet50"
    with pytest.raises(UserError, match=message):
        build_network("plain", "resnet50", 10, str(path))
    torch.save({"weights": resnet18_state, "epoch": 3}, path)
    with pytest.raises(UserError, match="holds no plain state dict"):
        build_network("plain", "resnet18", 10, str(path))
    torch.save(nn.Linear(1, 1), path)  # a pickled module could run anything
    with pytest.raises(UserError, match="cannot be read: it is damaged, or holds more than weights"):
        build_network("plain", "resnet18", 10, str(path))
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.pth cannot be read"):
            build_network("plain", "resnet18", 10, str(path))


def whole_state(backbone: str, seed: int) -> dict[str, Tensor]:
    """Make a state dict of a whole network, with the names that torchvision and LDAM's code give its layers."""
    torch.manual_seed(seed)
    net = backbones._OWN_RESNETS[backbone]()
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.mark.parametrize(
    ("backbone", "last_block", "suffix", "classifier"),
    [
        ("resnet32", "layer3.4", ".pth", {"linear.weight": torch.ones(100, 64), "linear.bias": torch.ones(100)}),
        ("resnet10", "layer4.0", ".safetensors", {}),  # its own fc is of 1000 classes
    ],
)
def test_own_resnets_start_from_a_local_file(backbone, last_block, suffix, classifier, tmp_path):
    state = whole_state(backbone, seed=3) | classifier
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    network = build_network("bilateral", backbone, 10, str(path))
    for part, prefix in ((network.conventional, last_block), (network.rebalancing, last_block)):
        for key, value in part.state_dict().items():
            assert torch.equal(value, state[f"{prefix}.{key}"]), key
    for key, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert network.classifier.weight.shape == (10, network.classifier.in_features)


def test_files_of_another_resnet_say_what_is_wanted(resnet18_state, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file(resnet18_state, path)
    message = (
        r"layer1\.1\.bn1\.bias is \(64,\) in it and absent here;"
        r" give the state dict of a resnet10 \(conv1, bn1, layer1, layer2, layer3, layer4\)"
    )
    with pytest.raises(UserError, match=message):
        build_network("plain", "resnet10", 10, str(path))
    with pytest.raises(UserError, match=r"conv1\.weight is \(64, 3, 7, 7\) in it and \(16, 3, 3, 3\) here"):
        build_network("plain", "resnet32", 10, str(path))
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        build_network("plain", "resnet32", 10, str(tmp_path))  # a folder


def test_old_files_without_batch_counters(resnet18_state, tmp_path):
    path = tmp_path / "old.safetensors"
    save_file({k: v for k, v in resnet18_state.items() if not k.endswith("num_batches_tracked")}, path)
    network = build_network("plain", "resnet18", 10, str(path))
    assert torch.equal(network.trunk.conv1.weight, resnet18_state["conv1.weight"])


def test_named_weights(resnet18_state, monkeypatch):
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: resnet18_state)
    for name in ("DEFAULT", "default", "Default"):
        network = build_network("plain", "resnet18", 10, name)
        assert torch.equal(network.trunk.conv1.weight, resnet18_state["conv1.weight"])

    def offline(self, **_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(
        UserError, match=r"'DEFAULT' of resnet18 cannot be downloaded \(OSError\); get http.*\.pth"
    ) as e:
        build_network("plain", "resnet18", 10, "DEFAULT")
    assert "\n" not in str(e.value)


def test_no_warnings_under_channels_last(bilateral):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bilateral.to(memory_format=torch.channels_last)
        mixed(bilateral(images(4), images(4, seed=1)), 0.5).sum().backward()
