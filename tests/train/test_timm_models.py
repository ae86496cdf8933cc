"""Backbones from timm: cut before the last block, the same features as timm's own, through every command."""

import argparse
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_ranks import on_ranks
from torch import Tensor, nn

from shards.errors import UserError
from train import afg, bbn, decouple, erm, export, predict, sdn
from train.engine.config import Input, Loop, Optim, make_parser
from train.engine.launch import run
from train.engine.method import make_method
from train.engine.model import Model
from train.engine.recipes import choose
from train.networks.batch_norm import StreamBatchNorm2d
from train.networks.depths import part_of
from train.networks.model_files import load_model, read_description, save_model
from train.networks.networks import HiddenMix, build_network

# timm's own models for tests, a family each: batch norm, layer norm over channels, tokens.
FAMILIES = {"resnet": "test_resnet", "convnext": "test_convnext", "vit": "test_vit"}
SIZE = 32


def images(batch: int, size: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


def made(name: str, seed: int = 0, size: int = SIZE, classes: int = 10) -> nn.Module:
    """Make one of timm's models with random weights and statistics, for pictures of this size."""
    torch.manual_seed(seed)
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    model = timm.create_model(name, num_classes=classes, **sized).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A file of random weights for each family, in timm's names."""
    folder = tmp_path_factory.mktemp("weights")
    for family, name in FAMILIES.items():
        save_file(made(name).state_dict(), folder / f"{family}.safetensors")
    return {family: str(folder / f"{family}.safetensors") for family in FAMILIES}


def network_of(family: str, files: dict[str, str], kind: str = "plain", classes: int = 10, **more):
    torch.manual_seed(1)
    return build_network(kind, f"timm/{FAMILIES[family]}", classes, files[family], image_size=SIZE, **more)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_parameters_are_timms(family, files):
    model, batch = made(FAMILIES[family]), images(3)
    plain, bilateral = (network_of(family, files, kind).eval() for kind in ("plain", "bilateral"))
    with torch.no_grad():
        expected_BD = model.forward_head(model.forward_features(plain.normalize(batch)), pre_logits=True)
        assert expected_BD.std() > 0.01
        torch.testing.assert_close(plain.features(batch), expected_BD, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            bilateral.features(batch), torch.cat([expected_BD, expected_BD], 1), rtol=0, atol=1e-6
        )
        plain.classifier.load_state_dict(model.get_classifier().state_dict())
        torch.testing.assert_close(plain.predict(batch), model(plain.normalize(batch)), rtol=0, atol=1e-5)
    assert count(plain) == count(model)
    one_more = count(bilateral.rebalancing) + 10 * expected_BD.shape[1]
    assert count(bilateral) == count(model) + one_more
    assert count(bilateral.rebalancing) > 0
    cfg = timm.get_pretrained_cfg(FAMILIES[family])
    assert plain.normalize.mean.flatten().tolist() == pytest.approx(cfg.mean)
    assert plain.normalize.std.flatten().tolist() == pytest.approx(cfg.std)
    # What a branch is, block by block: the last one alone, and nothing of the trunk.
    names = {re.sub(r"^model\.", "", name) for name, _ in plain.branch.named_parameters()}
    last = {
        "resnet": r"layer4\.\d+\.",
        "convnext": r"stages\.3\.blocks\.\d+\.|head\.norm\.",
        "vit": r"blocks\.\d+\.|norm\.",
    }
    assert all(re.match(last[family], name) for name in names), names
    blocks = {match[0] for name in names if (match := re.search(r"(blocks|layer4)\.\d+", name))}
    assert len(blocks) == 1, blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reaches_every_parameter_and_branches_differ_without_weights(family):
    torch.manual_seed(0)
    network = build_network("bilateral", f"timm/{FAMILIES[family]}", 3, image_size=SIZE)
    for (name, one), other in zip(
        network.conventional.named_parameters(), network.rebalancing.parameters(), strict=True
    ):
        assert one.ndim < 2 or not one.any() or not torch.equal(one, other), name
        if one.ndim > 1 and one.any():
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.5), name
    logits_c_BC, logits_r_BC = network(images(4), images(4, seed=1))
    assert logits_c_BC.shape == logits_r_BC.shape == (4, 3)
    (logits_c_BC.square().sum() + logits_r_BC.square().sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


def test_batch_norm_of_two_streams_is_two_passes(files, monkeypatch):
    together = network_of("resnet", files, "bilateral", 3).train()
    apart = network_of("resnet", files, "bilateral", 3).train()
    assert any(isinstance(module, StreamBatchNorm2d) for module in together.trunk.modules())
    streams = images(4), images(4, seed=1)
    monkeypatch.setattr("train.networks.networks.CPU_WEIGHTS_PER_VALUE", 0)
    one = together(*streams)
    monkeypatch.setattr("train.networks.networks.CPU_WEIGHTS_PER_VALUE", 1e9)
    other = apart(*streams)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(together.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_norms_with_an_activation_keep_it():
    torch.manual_seed(0)
    name = "test_efficientnet"
    plain = build_network("plain", f"timm/{name}", 3, image_size=SIZE).eval()
    before = plain.features(images(2))
    plain.set_grad_checkpointing(False)  # which puts our batch norm in the trunk
    assert any(isinstance(module, StreamBatchNorm2d) for module in plain.trunk.modules())
    torch.testing.assert_close(plain.features(images(2)), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_depths_of_parameters(family, files):
    network = network_of(family, files, "bilateral")
    depths = network.parameter_depths()
    assert depths.keys() == {name for name, _ in network.named_parameters()}
    deepest = max(depths.values())
    for name, depth in depths.items():
        part = part_of(name)
        assert (depth == deepest) == (part == "classifier"), name
        assert (depth == deepest - 1) == (part == "branch"), name
    assert set(depths.values()) == set(range(deepest + 1))
    stem = [name for name, depth in depths.items() if depth == 0]
    assert any("conv1" in name or "stem" in name or "patch_embed" in name for name in stem)
    order = [depth for name, depth in depths.items() if part_of(name) == "trunk"]
    assert order == sorted(order)


def test_depths_of_our_own_resnets():
    depths = build_network("bilateral", "resnet32", 3).parameter_depths()
    assert depths["trunk.conv1.weight"] == 0
    assert depths["trunk.layer1.0.conv1.weight"] == 1
    assert depths["trunk.layer3.3.conv1.weight"] == 14
    assert depths["conventional.conv1.weight"] == depths["rebalancing.bn2.bias"] == 15
    assert depths["classifier.weight"] == 16


@pytest.mark.parametrize("backbone", ["resnet32", *(f"timm/{name}" for name in FAMILIES.values())])
def test_gradient_checkpointing_changes_nothing_but_memory(backbone):
    steps = []
    for on in (False, True):
        torch.manual_seed(0)
        network = build_network("bilateral", backbone, 3, image_size=SIZE).train()
        network.set_grad_checkpointing(on)
        logits_c_BC, logits_r_BC = network(images(4), images(4, seed=1))
        (logits_c_BC - logits_r_BC).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        steps.append((logits_c_BC.detach(), gradients, dict(network.named_buffers())))
    for one, other in zip(*steps, strict=True):
        if isinstance(one, Tensor):
            one, other = {"logits": one}, {"logits": other}
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnextv2_atto", 64),
        ("efficientnet_lite0", 64),
        ("eva02_tiny_patch14_224", 56),
        ("vit_small_patch16_dinov3", 64),
        ("maxvit_pico_rw_256", 256),
        ("poolformer_s12", 64),
        ("inception_next_atto", 64),
        ("mixer_s32_224", 224),
        ("mobilenetv3_small_050", 64),
        ("regnety_002", 64),
        ("repvit_m0_9", 64),
        ("resnet26d", 64),
        ("seresnext26t_32x4d", 64),
        ("resnetv2_18", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("vit_small_patch14_dinov2", 56),
        ("vit_base_patch16_siglip_224", 32),
        ("deit3_small_patch16_224", 32),
        ("vit_little_patch16_reg4_gap_256", 64),
    ],
)
def test_the_rule_in_other_families(name, size):
    torch.manual_seed(0)
    whole = build_network("plain", f"timm/{name}", 3, image_size=size).eval()
    assert whole.is_cut
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.uniform_(-0.2, 0.2)  # no layer scale hides a block
        own = timm.create_model(name, num_classes=0, **timm_settings(name, size)).eval()
        state = {k.partition(".model.")[2]: v for k, v in whole.state_dict().items() if ".model." in k}
        own.load_state_dict(state, strict=True)
        batch = images(2, size)
        expected_BD = own.forward_head(own.forward_features(whole.normalize(batch)), pre_logits=True)
        torch.testing.assert_close(whole.features(batch), expected_BD, rtol=1e-5, atol=1e-5)
    last = count(whole.branch)
    assert 0 < last < 2 * count(whole.trunk)  # MobileNets have a wide layer after the last block
    depths = whole.parameter_depths()
    assert max(depths.values()) > 4


def timm_settings(name: str, size: int) -> dict:
    return {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size or "dinov3" in name else {}


def test_models_that_the_rule_does_not_know_are_trained_whole(tmp_path):
    torch.manual_seed(0)
    network = build_network("plain", "timm/test_mambaout", 3, image_size=64).eval()
    assert not list(network.trunk.parameters())
    save_model(network, tmp_path)
    torch.testing.assert_close(load_model(tmp_path).predict(images(2, 64)), network.predict(images(2, 64)))
    with pytest.raises(
        UserError, match="cannot be cut before its last block, so that it has no branches; train it with"
    ):
        build_network("bilateral", "timm/test_mambaout", 3, image_size=64)
    optim, loop = SimpleNamespace(freeze=None), SimpleNamespace(grad_checkpointing=True)
    config = SimpleNamespace(model=SimpleNamespace(backbone="timm/test_mambaout"), optim=optim, loop=loop)
    with pytest.raises(UserError, match="timm/test_mambaout is not cut, and has no trunk; leave it out"):
        make_method(lambda *_: SimpleNamespace(model=network), config, np.array([1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "timm/convnext_tinny"},
            r"'timm/convnext_tinny' is unknown to timm; did you mean timm/convnext_tiny",
        ),
        ({"backbone": "timm/xyz"}, r"'timm/xyz' is unknown to timm$"),
        ({"backbone": "convnext_tiny"}, r"'convnext_tiny' is unknown; did you mean timm/convnext_tiny"),
        ({"backbone": "resnet51"}, r"'resnet51' is unknown; did you mean resnet50\?; choose one of: resnet32"),
        (
            {"backbone": "timm/resnet18.a1_in2k"},
            r"resnet18 has no weights 'a1_in2k'; did you mean timm/resnet18.a1_in1k\?",
        ),
        ({"backbone": "timm/test_vit", "image_size": 40}, "patches of 16 pixels, and 40 is no multiple; give 32 or 48"),
        ({"backbone": "timm/test_vit", "image_size": 9}, "patches of 16 pixels, and 9 is no multiple; give 16"),
        (
            {"backbone": "timm/test_vit", "weights": "lost.pth"},
            r"'lost\.pth' are no file; give one, or --model\.weights",
        ),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build_network("plain", num_classes=3, **arguments)
    assert "\n" not in str(error.value)


def test_weights_of_another_model(files):
    for family, other in (("resnet", "vit"), ("vit", "convnext"), ("convnext", "resnet")):
        with pytest.raises(UserError, match=r"is of another model: .* give the state dict of timm's test_") as error:
            build_network("plain", f"timm/{FAMILIES[family]}", 3, files[other], image_size=SIZE)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"conv1.*give the state dict of torchvision's resnet18"):
        build_network("plain", "resnet18", 3, files["resnet"])


def test_files_of_training_programs(files, tmp_path):
    expected = network_of("resnet", files).state_dict()
    state = load_file(files["resnet"])
    path = tmp_path / "checkpoint.pth.tar"
    inside = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "arch": "x", "args": argparse.Namespace(lr=0.1), "state_dict": inside}, path)
    compiled = tmp_path / "compiled.safetensors"
    save_file({f"_orig_mod.{key}": value for key, value in state.items()}, compiled)
    for file in (path, compiled):
        found = build_network("plain", "timm/test_resnet", 10, str(file), image_size=SIZE).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected if key.startswith("trunk"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_one_of_timms_models_starts_another(family, files, tmp_path):
    own = network_of(family, files)
    save_model(own, tmp_path)
    fresh = build_network("bilateral", f"timm/{FAMILIES[family]}", 4, str(tmp_path), image_size=SIZE).eval()
    own.eval()
    for branch in (fresh.conventional, fresh.rebalancing):
        halves_BD = fresh.features(images(3)).chunk(2, dim=1)
        own_state = own.branch.state_dict()
        assert all(torch.equal(value, own_state[name]) for name, value in branch.state_dict().items())
        assert all(torch.equal(half_BD, own.features(images(3))) for half_BD in halves_BD)
    if family == "vit":
        with pytest.raises(UserError, match=r"pos_embed is .*; name a run whose backbone is .* of the same size$"):
            build_network("plain", "timm/test_vit", 4, str(tmp_path), image_size=64)


@pytest.mark.parametrize("kind", ["adaptformer", "lora"])
def test_no_run_starts_from_adapters(kind, files, tmp_path):
    save_model(network_of("vit", files, adapt={"kind": kind}), tmp_path)
    with pytest.raises(UserError, match=r"trained adapters \(model.adapt\), which are no part of timm/test_vit; name "):
        build_network("plain", "timm/test_vit", 4, str(tmp_path), image_size=SIZE)


def test_position_embeddings_fit_other_sizes(files):
    """Weights of a vision transformer for pictures of 32 pixels, used at 64, as timm resizes them."""
    network = build_network("plain", "timm/test_vit", 10, files["vit"], image_size=64).eval()
    state = load_file(files["vit"])
    assert network.trunk.model.pos_embed.shape[1] > state["pos_embed"].shape[1]
    assert network.features(images(2, 64)).shape == (2, network.classifier.in_features)


@pytest.mark.parametrize("failure", [OSError("no route\nto host"), RuntimeError("offline")])
def test_without_a_network_one_line_says_where_the_file_is(monkeypatch, failure):
    def offline(*_, **__):
        raise failure

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(UserError) as error:
        build_network("plain", "timm/resnet18.a1_in1k", 3, "default")
    said = str(error.value)
    assert "\n" not in said
    assert "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors" in said
    assert "copy model.safetensors to this machine and give --model.weights PATH" in said


def test_a_model_without_features_for_a_classifier(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **given: create(name, global_pool="", **given))
    with pytest.raises(UserError, match=r"timm/test_vit has no features for a classifier \(it gives 2 dimensions an"):
        build_network("plain", "timm/test_vit", 3, image_size=SIZE)


def test_stochastic_depth(files):
    network = network_of("vit", files, drop_path=0.5)
    assert network.branch.model.get_submodule("blocks.5").drop_path1.drop_prob == 0.5
    with pytest.raises(UserError, match=r"timm/vgg11 has no stochastic depth; set --model\.drop_path 0"):
        build_network("plain", "timm/vgg11", 3, drop_path=0.1)


def test_downloaded_weights_are_timms(monkeypatch, files):
    state = load_file(files["vit"])
    asked = []

    def from_hub(model_id, *_, **__):
        asked.append(model_id)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", from_hub)
    network = build_network("plain", "timm/test_vit.r160_in1k", 10, "default", image_size=SIZE)
    assert asked == ["timm/test_vit.r160_in1k"]
    own = network_of("vit", files).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in network.state_dict().items() if "classifier" not in key)


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
@pytest.mark.parametrize(
    "adapter", [{"kind": "adaptformer", "dim": 4}, {"kind": "lora", "rank": 2}, {"kind": "adaptformer"}]
)
def test_adapters_begin_as_the_network_and_train_alone(kind, adapter, files, tmp_path):
    bare, adapted = network_of("vit", files, kind).eval(), network_of("vit", files, kind, adapt=adapter).eval()
    torch.testing.assert_close(adapted.features(images(2)), bare.features(images(2)), rtol=0, atol=1e-6)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in bare.named_parameters() if part_of(name) != "classifier"}
    assert count(bare) < count(adapted) < 1.5 * count(bare)
    assert {"classifier.weight", "classifier.bias"} < trained
    assert any(name.startswith("trunk") for name in trained)
    assert all(re.search(r"classifier|\.(down|up|up_q|up_v)\.", name) for name in trained)
    assert len(trained) + len(frozen) == len(list(adapted.parameters()))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted.predict(images(4)).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(adapted.features(images(2)), bare.features(images(2)), atol=1e-3)
    depths = adapted.parameter_depths()
    assert depths.keys() == {name for name, _ in adapted.named_parameters()}
    assert {depth for name, depth in depths.items() if name in trained} == set(range(1, 1 + max(depths.values())))
    save_model(adapted, tmp_path)
    assert adapted.spec["adapt"]["kind"] == adapter["kind"]
    assert adapted.spec["adapt"].get("dim", 4) == 4
    torch.testing.assert_close(load_model(tmp_path).predict(images(2)), adapted.predict(images(2)))


def test_low_rank_changes_are_those_of_the_weights(files):
    adapted = network_of("vit", files, adapt={"kind": "lora", "rank": 3, "scale": 0.5})
    layer = adapted.branch.model.get_submodule("blocks.5").attn.qkv
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    down_q, down_v = layer.down.weight.chunk(2)
    zero = torch.zeros_like(layer.up_q.weight @ down_q)
    change = torch.cat([layer.up_q.weight @ down_q, zero, layer.up_v.weight @ down_v])
    tokens_BND = torch.randn(2, 5, layer.qkv.in_features)
    expected = nn.functional.linear(tokens_BND, layer.qkv.weight + 0.5 * change, layer.qkv.bias)
    torch.testing.assert_close(layer(tokens_BND), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_for_vision_transformers():
    with pytest.raises(
        UserError, match=r"model\.adapt=lora fits the blocks of vision transformers .* none of model\.backbone=resnet32"
    ):
        build_network("plain", "resnet32", 3, adapt={"kind": "lora"})


@pytest.mark.parametrize(
    ("mix", "message"), [("manifold", "shows none; choose mixup, or manifold"), ("manifold(depth=1)", "shows")]
)
def test_hidden_maps_of_timms_models_are_not_mixed(mix, message, make_method, files):
    with pytest.raises(UserError, match=message):
        make_method(erm.ERM, np.array([4, 2]), model={"backbone": "timm/test_vit", "weights": files["vit"]}, mix=mix)


def test_pictures_are_mixed_at_depth_0(files):
    network = network_of("vit", files).eval()
    mix = HiddenMix(0, torch.tensor([1, 0]), torch.tensor([0.5, 1.0]))
    mixed_BC = network(images(2), mix)
    torch.testing.assert_close(mixed_BC[1], network(images(2))[1])
    assert not torch.allclose(mixed_BC[0], network(images(2))[0])


# Through the commands: digits at 32 pixels.
SHORT = ["--input.image_size", "32", "--input.batch_size", "96", "--optim.epochs", "2", "--optim.lr", "0.01"]
SHORT += ["--loop.threads", "1", "--optim.warmup_epochs", "0", "--loop.estimate", "false"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_start_to_export(family, files, workplace, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    backbone = ["--model.backbone", f"timm/{FAMILIES[family]}", "--model.weights", files[family]]
    run(bbn.BBN, [*SHORT, *backbone, "--run", "runs/bbn", "--optim.epochs", "1"])
    run(bbn.BBN, ["--run", "runs/bbn", "--resume", "--optim.epochs", "2"])
    said = capsys.readouterr().out
    assert "after epoch 1" in said
    spec = json.loads((workplace / "runs/bbn/model.json").read_text())["network"]
    assert spec == {"kind": "bilateral", "backbone": backbone[1], "num_classes": 10, "image_size": 32}
    reported = read_description("runs/bbn")
    cfg = timm.get_pretrained_cfg(FAMILIES[family])
    assert (reported.image_size, reported.crop_share) == (32, pytest.approx(cfg.crop_pct))
    assert reported.interpolation.startswith(cfg.interpolation)
    assert reported.mean == pytest.approx(cfg.mean)
    afg.run(["--from", "runs/bbn", "--run", "runs/afg", "--optim.epochs", "2", "--method.baselines", "false"])
    said = capsys.readouterr().out
    assert ("features have negative values" in said) == (family != "resnet")
    bank = torch.from_numpy(np.load(workplace / "runs/bbn/features/train/features.npy"))
    assert (bank < 0).any() == (family != "resnet")
    decouple.run(["--from", "runs/bbn", "--run", "runs/ncm", "--classifier", "ncm"])
    assert "negative" not in capsys.readouterr().out
    picture = workplace / "one.png"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(picture)
    for name in ("bbn", "afg"):
        predict.main(["--run", f"runs/{name}", str(picture), "--format", "jsonl"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    export.main(["--run", "runs/afg", "--format", "pt2"])
    assert "wrote runs/afg/model.pt2" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["erm", "sdn"])
def test_other_methods(command, files, workplace):
    backbone = ["--model.backbone", "timm/test_vit", "--model.weights", files["vit"]]
    method, more = {
        "erm": (erm.ERM, ["--model.adapt", "adaptformer(dim=4)", "--method.objective", "adjusted(cosine=True)"]),
        "sdn": (sdn.SDN, []),
    }[command]
    run(method, [*SHORT, *backbone, *more, "--run", "runs/a", "--optim.epochs", "1"])
    before = load_file(files["vit"])
    after = load_file("runs/a/model.safetensors")
    same = torch.equal(after["trunk.model.patch_embed.proj.weight"], before["patch_embed.proj.weight"])
    assert same == (command == "erm")
    model = load_model("runs/a")
    assert model.predict(images(2)).shape == (2, 10)


def test_own_view_is_the_default_and_flags_come_over_it(digits):
    parser = make_parser("erm", "", input=Input, model=Model, method=erm.ERM.Settings, optim=Optim, loop=Loop)

    def chosen(*flags: str):
        argv = ["--model.backbone", "timm/test_vit", *flags]
        return choose(parser, argv, digits, "erm", None, gpu=False)

    own, given = chosen(), chosen("--input.eval_augment", "none", "--input.image_size", "32")
    assert (own.settings.input.image_size, own.settings.input.eval_augment) == (160, "centre(0.95)+bicubic")
    assert own.settings.input.augment == "shift+bicubic"
    assert (given.settings.input.image_size, given.settings.input.eval_augment) == (32, "none")
    assert any("pretrained on pictures of 160×160 pixels, shown as centre(0.95)+bicubic" in note for note in own.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.adapt", "lora"], "model.adapt=lora trains small layers beside frozen ones"),
        (["--model.adapt", "lora", "--run", "runs/new", "--resume"], "lora trains small layers beside frozen ones"),
        (["--model.adapt", "lore"], "model.adapt=lore is unknown; choose one of"),
        (["--model.adapt", "lora(dim=3)"], "lora has no setting 'dim'; its settings are: rank, scale"),
        (["--model.backbone", "timm/test_vitt"], "did you mean timm/test_vit"),
        (["--input.image_size", "30"], "30 is no multiple"),
    ],
)
def test_mistakes_of_a_command_line(arguments, message, workplace, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(erm.ERM, ["--model.backbone", "timm/test_vit", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (workplace / "runs").exists()


def _train(rank: int, argv: list[str]) -> None:
    run(bbn.BBN, argv)


@pytest.mark.slow  # two more processes that import timm
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_learn_what_one_does(family, files, workplace):
    backbone = ["--model.backbone", f"timm/{FAMILIES[family]}", "--model.weights", files[family]]
    argv = [*SHORT, *backbone, "--optim.epochs", "1", "--loop.sync_batch_norm", "true", "--loop.device", "cpu"]
    argv += ["--optim.lr", "0.0001"]  # at a usual rate batch norm multiplies rounding errors with every step
    run(bbn.BBN, [*argv, "--run", "runs/one"])
    assert on_ranks(workplace, _train, [*argv, "--run", "runs/two"]) == [0, 0]
    one, two = (load_file(f"runs/{name}/model.safetensors") for name in ("one", "two"))
    start = load_file(files[family])
    assert one.keys() == two.keys()
    compared = 0
    for name, value in one.items():
        if (began := start.get(name.partition(".model.")[2])) is not None and value.is_floating_point():
            moved = (value - began).norm()
            assert (value - two[name]).norm() <= 0.1 * moved + 1e-6, name
            compared += bool(moved > 1e-4)
    assert compared > 10


@pytest.mark.parametrize("name", ["test_nfnet", "resmlp_12_224"])
def test_gains_that_begin_as_a_constant_keep_it(name):
    torch.manual_seed(0)
    network = build_network("plain", f"timm/{name}", 3, image_size=32).eval()
    assert network.features(images(2)).std() > 0
    gains = [p for n, p in network.branch.named_parameters() if n.endswith((".gain", ".alpha"))]
    assert any((gain == 1).all() for gain in gains)


def test_what_goes_with_the_blocks_before_it_has_their_depth():
    depths = build_network("plain", "timm/densenet121", 3, image_size=32).parameter_depths()
    features = "branch.model.features."
    transition = depths[f"{features}transition1.conv.weight"]
    assert transition == depths[f"{features}denseblock1.denselayer6.conv1.weight"]
    assert transition == depths[f"{features}denseblock2.denselayer1.conv1.weight"] - 1
    assert depths[f"{features}norm5.weight"] == max(depths.values()) - 1


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stochastic_depth_is_what_the_settings_say(rate):
    network = build_network("bilateral", "timm/swin_tiny_patch4_window7_224", 3, image_size=224, drop_path=rate)
    rates = [module.drop_prob for module in network.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(rates, default=0.0) == pytest.approx(rate)


def test_depths_of_a_model_that_says_them_by_a_function():
    depths = build_network("plain", "timm/cait_xxs24_224", 3, image_size=224).parameter_depths()
    first, last = (depths[f"branch.model.blocks.{number}.norm1.weight"] for number in (0, 23))
    assert depths["branch.model.patch_embed.proj.weight"] < first < last < max(depths.values())


def test_a_model_with_several_maps_at_its_end_is_trained_whole():
    network = build_network("plain", "timm/crossvit_tiny_240", 3, image_size=240).eval()
    own = network.branch.model
    with torch.no_grad():
        shown = network.normalize(images(2, 240))
        expected_BD = own.forward_head(own.forward_features(shown), pre_logits=True)
        torch.testing.assert_close(network.features(images(2, 240)), expected_BD)


def test_whole_files_load_whatever_their_heads_are_made_of(tmp_path):
    state = made("repvit_m0_9", size=64).state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    network = build_network("plain", "timm/repvit_m0_9", 3, str(tmp_path / "whole.safetensors"), image_size=64)
    own = {key.partition(".model.")[2]: value for key, value in network.state_dict().items() if ".model." in key}
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    save_file(state | {"stages.9.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is of another model"):
        build_network("plain", "timm/repvit_m0_9", 3, str(tmp_path / "other.safetensors"), image_size=64)
