"""How a step is computed: in parts, clipped, averaged, in another memory layout, compiled; and watched."""

import copy
import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.batch import Batch
from train.bbn import BBN
from train.engine.checkpoints import read_selected
from train.engine.config import Loop
from train.engine.launch import run
from train.engine.loop import Training, prepare_network, split_batch
from train.erm import ERM
from train.networks.backbones import _OWN_RESNETS, Normalize
from train.networks.batch_norm import StreamBatchNorm2d
from train.networks.networks import build_network

SHORT = ["--optim.epochs", "1", "--input.batch_size", "64", "--input.image_size", "8", "--optim.lr", "0.02"]


def loss_of(workplace, *arguments) -> float:
    run(ERM, [*SHORT, "--run", "runs/a", *arguments])
    loss = json.loads((workplace / "runs/a/metrics.jsonl").read_text())["loss"]
    (workplace / "runs/a").rename(workplace / f"runs/{len(list((workplace / 'runs').iterdir()))}")
    return loss


def freeze_statistics(network: nn.Module) -> nn.Module:
    """Let batch norm use its running statistics, so that a batch may be cut without a difference."""
    network.eval()
    network.train = lambda mode=True: network
    return network


def test_parts_of_a_batch_are_its_images_in_order():
    images = torch.arange(6).view(6, 1, 1, 1)
    batch = {"a": Batch(images, torch.arange(6), np.arange(6)), "b": Batch(images + 6, torch.arange(6), np.arange(6))}
    parts = split_batch(batch, 3)
    assert [part["b"].images_BHWC.flatten().tolist() for part in parts] == [[6, 7], [8, 9], [10, 11]]
    assert [part["a"].ids_B.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part["a"].labels_B.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert split_batch(batch, 1) == [batch]


@pytest.mark.parametrize(
    "settings",
    [[], ["--method.weights", "inverse", "--method.mix", "remix"], ["--method.mix", "manifold", "--method.q", "0"]],
)
def test_a_step_in_parts_is_the_step_but_for_batch_norm(workplace, monkeypatch, settings):
    build = build_network
    monkeypatch.setattr(
        "train.networks.networks.build_network", lambda *a, **head: freeze_statistics(build(*a, **head))
    )
    small = ["--optim.lr", "1e-3", *settings]
    whole, parts = loss_of(workplace, *small), loss_of(workplace, *small, "--optim.accumulate", "4")
    assert parts == pytest.approx(whole, rel=1e-4)
    ours, theirs = (load_file(workplace / f"runs/{name}/model.safetensors") for name in ("1", "2"))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4)


def test_clipping_bounds_the_gradient(workplace, monkeypatch):
    norms = []

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    loss_of(workplace, "--loop.estimate", "false")
    free, norms[:] = max(norms), []
    loss_of(workplace, "--optim.clip_norm", "0.1", "--loop.estimate", "false")
    assert free > 1
    np.testing.assert_allclose(norms, 0.1, rtol=1e-3)


def test_the_average_is_what_is_evaluated_and_kept(workplace, monkeypatch):
    decay, names = 0.8, ("classifier.weight", "trunk.bn1.running_var")
    expected: dict[str, torch.Tensor] = {}
    step = Training._step

    def step_and_average(self, *arguments):
        result = step(self, *arguments)
        for name in names:
            value = self._network.state_dict()[name].detach().clone()
            expected[name] = decay * expected[name] + (1 - decay) * value if name in expected else value
        return result

    monkeypatch.setattr(Training, "_step", step_and_average)
    run(ERM, [*SHORT, "--optim.ema", str(decay), "--run", "runs/a"])
    kept = load_file("runs/a/model.safetensors")
    for name in names:
        torch.testing.assert_close(kept[name], expected[name])
    selected = load_file("runs/a/checkpoints/selected.safetensors")
    assert all(torch.equal(kept[key], selected[key]) for key in kept)
    (trained,) = (workplace / "runs/a/checkpoints").glob("step-*/model.safetensors")
    assert not torch.equal(load_file(trained)["classifier.weight"], kept["classifier.weight"])


def test_the_best_epoch_is_remembered_where_a_resumed_run_takes_it_again(workplace):
    run(ERM, [*SHORT, "--optim.epochs", "2", "--loop.checkpoint_every", "1", "--run", "runs/a"])
    folder = workplace / "runs/a"
    (folder / "summary.json").unlink()
    shutil.rmtree(sorted((folder / "checkpoints").glob("step-*"))[-1])
    best = {"epoch": 2, "balanced_accuracy": 0.99}  # as if the machine computed otherwise this time
    path = folder / "checkpoints/selected.safetensors"
    save_file(load_file(path), path, {"selected": json.dumps(best)})
    run(ERM, ["--resume", "--run", "runs/a"])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert read_selected(folder)[1:] == (2, 0.99)


def test_what_a_method_keeps_is_used_with_the_average_too(workplace, monkeypatch):
    """A method that predicts by what it learnt in its epochs, as of now and not as of the beginning."""

    class Shifting(ERM):
        shift = 0.0
        seen: ClassVar[list[float]] = []

        def end_of_epoch(self, sums, progress):
            self.shift = float(progress.epoch)
            return {}

        def predict(self, images_BHWC):
            self.seen.append(self.shift)
            return super().predict(images_BHWC)

    run(Shifting, [*SHORT, "--optim.epochs", "2", "--loop.eval_every", "1", "--optim.ema", "0.9", "--run", "runs/a"])
    assert sorted(set(Shifting.seen) - {0.0}) == [1.0, 2.0]  # 0: the estimate, before the first epoch


def test_what_an_attempt_without_a_checkpoint_selected_is_forgotten(workplace):
    run(ERM, [*SHORT, "--run", "runs/a"])
    folder = workplace / "runs/a"
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    path = folder / "checkpoints/selected.safetensors"
    save_file(load_file(path), path, {"selected": json.dumps({"epoch": 1, "balanced_accuracy": 0.999})})
    run(ERM, ["--resume", "--run", "runs/a", "--optim.lr", "0.01"])
    assert read_selected(folder)[2] < 0.999


def test_a_resumed_run_does_without_the_pretrained_weights(workplace):
    save_file(_OWN_RESNETS["resnet32"]().state_dict(), "pretrained.safetensors")
    run(ERM, [*SHORT, "--model.weights", "pretrained.safetensors", "--run", "runs/a"])
    (workplace / "pretrained.safetensors").unlink()
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    assert (
        yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["model"]["weights"] == "pretrained.safetensors"
    )


def test_a_resumed_run_takes_the_settings_that_it_is_given(workplace, monkeypatch):
    run(ERM, [*SHORT, "--run", "runs/a"])
    seen = []
    step = Training._step

    def look(self, *arguments):
        seen.extend((group["weight_decay"], group["momentum"]) for group in self._optimizer.param_groups)
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_step", look)
    changed = ["--optim.epochs", "2", "--optim.weight_decay", "0.003", "--optim.momentum", "0.5"]
    run(ERM, ["--resume", "--run", "runs/a", *changed])
    assert set(seen) == {(0.003, 0.5)}


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_layout(channels_last):
    network = build_network("bilateral", "resnet32", 3)
    reference = copy.deepcopy(network).eval()
    prepare_network(network, Loop(channels_last=channels_last))
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    weight = network.trunk.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    for module in network.modules():
        if isinstance(module, Normalize):
            assert module(images).is_contiguous() != channels_last
    torch.testing.assert_close(network.eval().predict(images), reference.predict(images), rtol=1e-4, atol=1e-4)


def test_synchronised_batch_norm_is_put_everywhere():
    network = build_network("bilateral", "resnet32", 3)
    prepare_network(network, Loop(sync_batch_norm=True))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(norm, StreamBatchNorm2d) and norm.synchronised for norm in norms)


def test_options_together_train_and_resume(workplace):
    run(BBN, [*SHORT, "--loop.precision", "bf16", "--loop.channels_last", "false", "--optim.accumulate", "2",
              "--optim.ema", "0.9", "--loop.sync_batch_norm", "true", "--run", "runs/a"])  # fmt: skip
    run(BBN, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    losses = [json.loads(line)["loss"] for line in (workplace / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loop.budget", "2x"], "--loop.budget cannot be '2x' (give a time such as 90m, 2h or 1d12h)"),
        (["--method.q", "abc"], "--method.q cannot be 'abc' (give a number or one of progressive)"),
        (["--method.adaptor", "seperate"], "separate; did you mean separate?)"),
        (["--optim.epochs", "0"], "--optim.epochs cannot be '0' (give a whole number of at least 1)"),
        (["--optim.milestones", "0.5"], "--optim.milestones cannot be '0.5' (give a list such as [0.5, 0.75])"),
        (["--optim.lr", "-1"], "--optim.lr cannot be '-1' (give a number above 0)"),
        (["--input.batch_size", "1.5"], "--input.batch_size cannot be '1.5' (give a whole number of at least 1)"),
        (["--loop.select", "maybe"], "--loop.select cannot be 'maybe' (give true or false)"),
        (["--optim.ema", "1"], "--optim.ema cannot be '1' (give a number above 0 and below 1)"),
        (["--optim.lr", "null"], "--optim.lr cannot be 'null' (give a number above 0)"),
    ],
)
def test_a_wrong_value_is_told_plainly(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        run(BBN, words)
    error = capsys.readouterr().err
    assert message in error
    assert not [inner for inner in ("typing.", "<class", "Parser key") if inner in error]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lr: }", "my.yaml: optim.lr has no value; give it one, or leave its line out"),
        ("method: {adaptor: null}", "my.yaml: method.adaptor has no value"),
        ("loop:\noptim: {lr: 0.1}", "my.yaml: the section loop holds no settings; give it some, or leave its line out"),
        ("optim: 5", "my.yaml: the section optim holds no settings"),
        ("run: 5", "my.yaml: --run cannot be '5' (give text; in a file, with quotes)"),
        ("loop: {budget: 90}", "my.yaml: --loop.budget cannot be '90' (give a time such as 90m, 2h or 1d12h)"),
        ("loop: {precision: no}", "cannot be 'False' (give one of auto, no, bf16, fp16; in a file, with quotes)"),
    ],
)
def test_a_file_with_a_wrong_value_is_told_plainly_too(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        run(BBN, ["--config", "my.yaml", "--loop.seed", "3"])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
