"""The optimiser: which parameters have which rate, how it goes over the run, and what excludes what."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_ranks import SETTINGS, _train_and_record, on_ranks, rows
from test_resume import SHORT, assert_alike, raise_at

from shards.errors import UserError
from train.bbn import BBN
from train.engine.config import Model, Optim
from train.engine.launch import run
from train.engine.loop import Training
from train.engine.optimisers import check_settings, lr_factor, make_optimizer, parameter_groups, warnings_about
from train.erm import ERM
from train.networks.backbones import _OWN_RESNETS
from train.networks.networks import build_network

COUNTS_C = np.array([9, 5, 2])
BRIEF = SHORT[:-2]  # without warm-up
TUNE = ["--optim.optimizer", "adamw", "--optim.lr", "0.001", "--optim.layer_decay", "0.75", "--optim.warmup_steps", "4",
        "--optim.schedule", "cosine", "--optim.lr_scale_classifier", "10"]  # fmt: skip

FREEZE = ["--optim.freeze", "trunk", "--model.weights", "pretrained.safetensors"]


@pytest.fixture
def pretrained(workplace):
    """Weights of a ResNet-32 in the folder to run in."""
    torch.manual_seed(1)
    save_file(_OWN_RESNETS["resnet32"]().state_dict(), "pretrained.safetensors")
    return workplace


def by_name(method, optim: Optim) -> dict[str, dict]:
    """Return the group that each parameter of a method is in."""
    names = {parameter: name for name, parameter in method.network.named_parameters()}
    found: dict[str, dict] = {}
    for group in parameter_groups(method, optim):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = group
    return found


def test_the_default_is_the_methods_own_groups_with_sgd(make_method):
    method = make_method(BBN, COUNTS_C)
    optimizer = make_optimizer(method, Optim(lr=0.3, momentum=0.8, weight_decay=0.01))
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert all(ours is theirs for ours, theirs in zip(group["params"], method.network.parameters(), strict=True))
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0.01)
    assert not make_optimizer(method, Optim(momentum=0.0)).param_groups[0]["nesterov"]


def test_each_layer_has_its_share_of_the_rate_of_the_one_above(make_method):
    groups = by_name(make_method(BBN, COUNTS_C), Optim(layer_decay=0.5))
    scale = {name: group["lr_scale"] for name, group in groups.items()}
    # Fourteen blocks in the trunk of ResNet-32, above them the branches, and the classifier.
    assert scale["classifier.weight"] == scale["classifier.bias"] == 1
    assert scale["conventional.conv1.weight"] == scale["rebalancing.bn2.bias"] == 0.5
    assert scale["trunk.layer3.3.conv1.weight"] == 0.5**2
    assert scale["trunk.layer3.0.bn1.weight"] == 0.5**5
    assert scale["trunk.layer1.0.conv2.weight"] == 0.5**15
    assert scale["trunk.conv1.weight"] == scale["trunk.bn1.weight"] == 0.5**16
    assert scale.keys() == dict(make_method(BBN, COUNTS_C).network.named_parameters()).keys()
    assert all("weight_decay" not in group for group in groups.values())  # SGD's is that of all


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [("resnet18", 32), ("timm/resnet18", 32), ("timm/convnext_atto", 32), ("timm/vit_tiny_patch16_224", 32)],
)
def test_rates_and_decays_are_timms(backbone, image_size):
    import timm
    from timm.optim import param_groups_layer_decay

    size = {"img_size": image_size} if "vit" in backbone else {}
    model = timm.create_model(backbone.removeprefix("timm/"), num_classes=3, **size)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    names = {parameter: name for name, parameter in model.named_parameters()}
    theirs = {}
    for group in param_groups_layer_decay(model, 0.05, exempt, layer_decay=0.75):
        for parameter in group["params"]:
            theirs[names[parameter]] = group["lr_scale"], group["weight_decay"]
    network = build_network("plain", backbone, 3, image_size=image_size)
    method = SimpleNamespace(model=network, parameter_groups=lambda: [{"params": [*network.parameters()]}])
    names = {parameter: name for name, parameter in network.named_parameters()}
    ours = {}
    for group in parameter_groups(method, Optim(optimizer="adamw", layer_decay=0.75)):
        for parameter in group["params"]:
            part, _, name = names[parameter].partition(".")
            if part == "classifier":
                name = f"{'fc' if 'resnet' in backbone else 'head.fc' if 'convnext' in backbone else 'head'}.{name}"
            elif part == "branch" and backbone == "resnet18":
                name = f"layer4.1.{name}"
            ours[name.removeprefix("model.")] = group["lr_scale"], group.get("weight_decay", 0.05)
    assert ours.keys() == theirs.keys()
    for name, (scale, weight_decay) in theirs.items():
        if name.startswith("head.norm"):  # of ConvNeXt: here each branch has its own
            scale *= 0.75
        assert ours[name] == pytest.approx((scale, weight_decay)), name


def test_parts_have_rates_of_their_own(make_method):
    optim = Optim(lr_scale_trunk=0.1, lr_scale_branches=2, lr_scale_classifier=10)
    for method in (make_method(BBN, COUNTS_C), make_method(ERM, COUNTS_C)):
        for name, group in by_name(method, optim).items():
            part = name.partition(".")[0]
            assert group["lr_scale"] == {"trunk": 0.1, "classifier": 10}.get(part, 2), name


def test_adamw_does_not_decay_biases_and_norms(make_method):
    method = make_method(BBN, COUNTS_C)
    optimizer = make_optimizer(method, Optim(optimizer="adamw", betas=(0.8, 0.9), weight_decay=0.05))
    assert type(optimizer) is torch.optim.AdamW
    assert len(optimizer.param_groups) == 2
    names = {parameter: name for name, parameter in method.network.named_parameters()}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        for parameter in group["params"]:
            spared = "bn" in names[parameter] or names[parameter].endswith("bias")
            assert group["weight_decay"] == (0.0 if spared else 0.05), names[parameter]


def test_a_methods_own_rates_are_multiplied(make_method, monkeypatch):
    method = make_method(ERM, COUNTS_C)
    head = torch.nn.Linear(4, 2)  # beside the network
    own = [{"params": iter(method.network.parameters()), "lr_scale": 3.0, "eps": 1e-6}]
    monkeypatch.setattr(method, "parameter_groups", lambda: [*own, {"params": [head.weight, head.bias]}])
    groups = parameter_groups(method, Optim(optimizer="adamw", layer_decay=0.5, lr_scale_classifier=10))
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales[method.network.classifier.weight] == 30
    assert scales[method.network.branch.conv1.weight] == 1.5
    assert scales[head.weight] == scales[head.bias] == 10
    assert {group.get("eps") for group in groups} == {1e-6, None}


def test_what_is_frozen_has_no_state(make_method):
    method = make_method(BBN, COUNTS_C)
    method.model.freeze_trunk()
    for optim in (Optim(freeze="trunk"), Optim(freeze="trunk", optimizer="adamw")):
        trained = {id(p) for group in make_optimizer(method, optim).param_groups for p in group["params"]}
        assert trained == {id(p) for name, p in method.network.named_parameters() if not name.startswith("trunk")}


def test_a_schedule_by_steps_is_that_of_epochs_of_one_step():
    for schedule in ("step", "cosine", "constant"):
        epochs = Optim(epochs=40, warmup_epochs=6, schedule=schedule)
        steps = Optim(epochs=10, warmup_steps=6, schedule=schedule)
        for step in range(40):
            assert lr_factor(steps, 1 + step // 4, step % 4, 4) == lr_factor(epochs, 1 + step)


def test_warm_up_in_steps_reaches_the_rate_and_cosine_ends_near_zero():
    optim = Optim(epochs=5, warmup_steps=10, warmup_start=0.0, schedule="cosine")
    factors = [lr_factor(optim, epoch, step, 20) for epoch in range(1, 6) for step in range(20)]
    np.testing.assert_allclose(factors[:11], [*np.arange(1, 11) / 10, 1])
    assert all(np.diff(factors[10:]) < 0)
    assert 0 < factors[-1] < 1e-3
    assert lr_factor(Optim(epochs=1, warmup_steps=0, schedule="cosine"), 1, 0, 3) == 1


def test_rates_that_will_hardly_do_are_warned_of():
    assert warnings_about(Optim(epochs=5, warmup_steps=100), 20) == []
    assert warnings_about(Optim(epochs=5, warmup_steps=100, warmup_epochs=9), 20) == []
    assert warnings_about(Optim(optimizer="adamw", lr=0.003), 20) == []
    (warning,) = warnings_about(Optim(epochs=5, lr=0.1, warmup_steps=200, warmup_start=0.0), 20)
    assert warning.startswith("warning: optim.warmup_steps=200 is more than the 100 steps: the rate rises to 0.05 only")
    (warning,) = warnings_about(Optim(epochs=5, warmup_epochs=1), 20)
    assert warning.startswith("warning: optim.warmup_epochs=1 warms nothing up")
    assert warning.endswith("give 2 or more, or --optim.warmup_steps 20")
    assert warnings_about(Optim(epochs=5, warmup_epochs=0), 20) == warnings_about(Optim(epochs=5, warmup_epochs=2), 20)
    assert warnings_about(Optim(epochs=1, warmup_epochs=1), 20) == []
    (warning,) = warnings_about(Optim(optimizer="adamw", lr=0.1), 20)
    assert warning.startswith("warning: optim.lr=0.1 suits SGD; AdamW usually has about 1e-3 ")


def test_every_step_has_its_rate(workplace, monkeypatch):
    seen = []
    original = Training._step

    def step(self, *arguments):
        loss = original(self, *arguments)
        seen.append({group["lr"] for group in self._optimizer.param_groups})
        return loss

    monkeypatch.setattr(Training, "_step", step)
    run(ERM, [*BRIEF, *TUNE, "--run", "runs/a"])
    optim = Optim(epochs=2, warmup_steps=4, schedule="cosine")
    assert len(seen) == 16
    for number, rates in enumerate(seen):
        factor = 0.001 * lr_factor(optim, 1 + number // 8, number % 8, 8)
        assert max(rates) == pytest.approx(10 * factor)
        assert min(rates) == pytest.approx(factor * 0.75**16)
    logged = [json.loads(row)["lr"] for row in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx([max(seen[7]) / 10, max(seen[15]) / 10])


@pytest.mark.parametrize(
    "settings",
    [
        [*TUNE, "--model.drop_path", "0.3", "--loop.grad_checkpointing", "true", "--optim.ema", "0.9"],
        [*TUNE[:4], *FREEZE, "--optim.accumulate", "2", "--optim.betas", "[0.8,0.99]"],
        ["--optim.momentum", "0.8", "--optim.weight_decay", "0.001"],  # given, they are of the command line's types
    ],
)
def test_a_tuned_run_resumes_to_the_same_bits(pretrained, monkeypatch, settings):
    run(BBN, [*BRIEF, *settings, "--run", "runs/whole"])
    raise_at(monkeypatch, 11, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(BBN, [*BRIEF, *settings, "--run", "runs/cut"])
    monkeypatch.undo()
    monkeypatch.chdir(pretrained)
    run(BBN, ["--resume", "--run", "runs/cut"])
    assert_alike(pretrained / "runs/whole", pretrained / "runs/cut")


def test_a_frozen_trunk_is_the_pretrained_one(pretrained):
    run(BBN, [*BRIEF, *FREEZE, "--optim.ema", "0.9", "--run", "runs/a"])
    started, ended = load_file("pretrained.safetensors"), load_file("runs/a/model.safetensors")
    for name, value in ended.items():
        if name.startswith("trunk."):
            assert torch.equal(value, started[name.removeprefix("trunk.")]), name
    assert not torch.equal(ended["conventional.conv1.weight"], started["layer3.4.conv1.weight"])
    (checkpoint,) = sorted(Path("runs/a/checkpoints").glob("step-*"))[-1:]
    states = torch.load(checkpoint / "state.pt", weights_only=True)
    trained = [name for name in ended if not name.startswith(("trunk.", "normalize.")) and "running" not in name]
    assert len(states["optimizer"]["state"]) == len([name for name in trained if "num_batches" not in name])


@pytest.mark.parametrize("settings", [TUNE, [*TUNE[:4], *FREEZE]])
def test_two_ranks_are_one(pretrained, settings):
    # Adam divides by the gradient's size, so that rounding grows as fast as at a larger rate of SGD.
    common = [*SETTINGS[:-6], *settings, "--optim.lr", "1e-5", "--loop.sync_batch_norm", "true", "--run"]
    for name, ranks in (("one", 1), ("two", 2)):
        assert on_ranks(pretrained, _train_and_record, [*common, f"runs/{name}"], ranks=ranks) == [0] * ranks
        for rank in range(ranks):
            (pretrained / f"steps-{rank}.npz").rename(pretrained / f"{name}-{rank}.npz")
    one, first, second = (np.load(pretrained / name) for name in ("one-0.npz", "two-0.npz", "two-1.npz"))
    for step in one.files:
        if "loss" in step:
            assert (first[step] + second[step]) / 2 == pytest.approx(one[step], rel=3e-4), step
    for ours, theirs in zip(rows(pretrained / "runs/one"), rows(pretrained / "runs/two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def fails_with(capsys, *arguments) -> str:
    """Run, expect exit status 2, and return the one line that it printed."""
    with pytest.raises(SystemExit) as stopped:
        run(ERM, [*BRIEF, *arguments])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert "\n" not in error
    return error.removeprefix("train/erm.py: error: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optimizer=adamw momentum=0.8", "optim.momentum=0.8 and optim.optimizer=adamw exclude each other; "),
        ("optimizer=adamw nesterov=false", "optim.nesterov=False and optim.optimizer=adamw exclude each other; "),
        ("betas=[0.8,0.99]", "optim.betas=(0.8, 0.99) and optim.optimizer=sgd exclude each other; "),
        ("warmup_steps=9 warmup_epochs=1", "optim.warmup_epochs=1 and optim.warmup_steps=9 exclude each other; "),
        ("schedule=cosine milestones=[0.5]", "optim.milestones=[0.5] and optim.schedule=cosine exclude each other; "),
        ("schedule=constant decay=0.5", "optim.decay=0.5 and optim.schedule=constant exclude each other; "),
        ("freeze=trunk layer_decay=0.75", "optim.freeze=trunk and optim.layer_decay=0.75 exclude each other: "),
        ("freeze=trunk lr_scale_trunk=0.1", "optim.freeze=trunk and optim.lr_scale_trunk=0.1 exclude each other: "),
    ],
)
def test_settings_that_exclude_each_other_are_named(workplace, capsys, settings, message):
    flags = [f"--optim.{setting}" for setting in settings.split()]
    assert fails_with(capsys, *flags).startswith(message)
    assert not (workplace / "runs").exists()


def test_freezing_and_checkpointing_exclude_each_other(workplace, capsys):
    error = fails_with(capsys, "--optim.freeze", "trunk", "--loop.grad_checkpointing", "true")
    assert error.startswith("optim.freeze=trunk and loop.grad_checkpointing exclude each other: ")


def test_freezing_wants_pretrained_weights(workplace, capsys):
    error = fails_with(capsys, "--optim.freeze", "trunk")
    assert error.startswith("optim.freeze=trunk without model.weights would keep a trunk of random weights; ")


def test_what_a_preset_says_is_overruled_in_silence():
    def check(given: str, weights: str | None = None, **optim) -> None:
        check_settings(Optim(**optim), Model(weights=weights), False, {f"optim.{given}"})

    check("optimizer", optimizer="adamw", nesterov=False, momentum=0.8)
    check("warmup_steps", warmup_steps=9, warmup_epochs=5)
    check("schedule", schedule="cosine", milestones=[0.5])
    check("freeze", "a file", freeze="trunk", layer_decay=0.75)
    with pytest.raises(UserError, match="exclude each other"):
        check("warmup_epochs", warmup_steps=9, warmup_epochs=5)
    with pytest.raises(UserError, match=r"optim.freeze=trunk and model.adapt=lora exclude each other: adapters lie in"):
        check_settings(Optim(freeze="trunk"), Model(weights="a file", adapt="lora"), False, {"optim.freeze"})


def test_a_run_keeps_its_optimiser_when_it_is_resumed(workplace, capsys):
    run(ERM, [*BRIEF, "--optim.epochs", "1", "--run", "runs/a"])
    config = (workplace / "runs/a/config.yaml").read_bytes()
    capsys.readouterr()
    for change in ("optimizer=adamw", "layer_decay=0.5", "lr_scale_branches=2"):
        with pytest.raises(SystemExit):
            run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2", f"--optim.{change}"])
        name, _, value = change.partition("=")
        error = capsys.readouterr().err
        assert f"error: runs/a was begun with optim.{name}=" in error
        assert f" and cannot be resumed with {value}" in error
        assert (workplace / "runs/a/config.yaml").read_bytes() == config
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2", "--optim.lr", "0.01"])
    assert len(rows(workplace / "runs/a")) == 2


def test_a_run_from_before_these_settings_is_resumed(workplace):
    run(ERM, [*BRIEF, "--optim.epochs", "1", "--run", "runs/a"])
    path = workplace / "runs/a/config.yaml"
    config = yaml.safe_load(path.read_text())
    old = {"epochs", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup_epochs", "warmup_start"}
    config["optim"] = {name: value for name, value in config["optim"].items() if name in old}
    config["model"] = {name: config["model"][name] for name in ("backbone", "weights")}
    path.write_text(yaml.safe_dump(config))
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    assert len(rows(workplace / "runs/a")) == 2
