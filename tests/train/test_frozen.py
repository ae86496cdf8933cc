"""Stage one without training: class means of a pretrained network's features."""

import json
import math
import os
import shlex
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pipeline.kept import is_kept_with
from pipeline.resident_loader import Decoded
from shards.errors import UserError
from train import afg, frozen, predict
from train.features.means import _even_share, best_scale, mean_classifier
from train.networks.backbones import _OWN_RESNETS

SMALL = ["--input.image_size", "16", "--input.loader", "resident"]


@pytest.fixture
def pretrained(workplace):
    """A file with a network's weights; random ones tell the digits apart well enough."""
    torch.manual_seed(0)
    save_file(_OWN_RESNETS["resnet32"]().state_dict(), "pretrained.safetensors")
    return ["--model.backbone", "resnet32", "--model.weights", "pretrained.safetensors", *SMALL]


def clusters(counts, spread=0.3, dimensions=8):
    generator = torch.Generator().manual_seed(0)
    centres_CD = F.normalize(torch.randn(len(counts), dimensions, generator=generator))
    labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    noise_ND = spread * torch.randn(len(labels_N), dimensions, generator=generator)
    return F.normalize(centres_CD[labels_N] + noise_ND), labels_N


def test_the_scale_is_the_best_of_a_leave_one_out_by_hand():
    counts = [9, 4, 2, 1]
    features_ND, labels_N = clusters(counts)
    means_CD = F.normalize(torch.stack([features_ND[labels_N == c].mean(0) for c in range(4)]))

    def loss(scale):
        of_class = []
        for c in range(3):  # a single image says nothing
            losses = []
            for i in torch.nonzero(labels_N == c).flatten().tolist():
                others = [j for j in torch.nonzero(labels_N == c).flatten().tolist() if j != i]
                rows_CD = means_CD.clone()
                rows_CD[c] = F.normalize(features_ND[others].sum(0), dim=0)
                losses.append(F.cross_entropy(scale * rows_CD @ features_ND[i], torch.tensor(c)).item())
            of_class.append(sum(losses) / len(losses))
        return sum(of_class) / len(of_class)

    scale = best_scale(features_ND, labels_N, means_CD)
    assert 1 < scale < 200
    assert loss(scale) <= min(loss(scale * factor) for factor in (0.97, 0.99, 1.01, 1.03)) + 1e-6


def test_the_classifier_is_its_equation():
    counts = [30, 10, 3]
    features_ND, labels_N = clusters(counts)
    for tau in (0.0, 0.5, 1.0):
        linear, scale = mean_classifier(features_ND.half(), labels_N, 3, tau)
        for c in range(3):
            mean_D = F.normalize(features_ND[labels_N == c].half().float().mean(0), dim=0)
            assert torch.allclose(linear.weight[c], scale * mean_D, atol=1e-3)
            assert linear.bias[c].item() == pytest.approx((1 - tau) * math.log(counts[c] / 43), abs=1e-5)


def test_a_few_images_of_many_tell_the_same_scale(monkeypatch):
    features_ND, labels_N = clusters([2000, 500, 100, 20])
    means_CD = F.normalize(torch.stack([features_ND[labels_N == c].mean(0) for c in range(4)]))
    of_all = best_scale(features_ND, labels_N, means_CD)
    monkeypatch.setattr("train.features.means.PAIRS", 2000)
    assert best_scale(features_ND, labels_N, means_CD) == pytest.approx(of_all, rel=0.3)


def test_where_not_every_class_can_be_looked_at_those_left_out_lie_all_over(monkeypatch):
    counts_C = torch.full((10,), 3)
    rows = _even_share(counts_C, 5)
    assert len(rows) == 5
    assert (rows // 3).tolist() == [0, 2, 4, 7, 9]


def test_classes_of_one_image_each_have_the_usual_scale():
    features_ND, labels_N = clusters([1, 1, 1])
    assert best_scale(features_ND, labels_N, features_ND) == 30


def test_a_class_without_an_image_that_decodes_is_refused():
    features_ND, labels_N = clusters([3, 2])
    with pytest.raises(UserError, match="1 of 3 classes have no training image that decodes"):
        mean_classifier(features_ND, labels_N, 3)


def test_it_is_a_stage_one_run_whose_features_serve_the_second_stage(workplace, pretrained, capsys):
    frozen.run(["--run", "runs/frozen", *pretrained])
    summary = json.loads((workplace / "runs/frozen/summary.json").read_text())
    assert (summary["stage"], summary["title"], summary["epochs"]) == (1, "class means", 0)
    assert summary["last"]["balanced_accuracy"] > 0.5
    bank = workplace / "runs/frozen/features/train/features.npy"
    taken = bank.stat().st_mtime_ns
    capsys.readouterr()
    afg.run(["--from", "runs/frozen", "--run", "runs/afg", "--optim.epochs", "2", "--method.baselines", "false"])
    assert bank.stat().st_mtime_ns == taken
    assert "extracting them again" not in capsys.readouterr().out
    assert json.loads((workplace / "runs/afg/summary.json").read_text())["title"] == "class means + AFG"
    frozen.run(["--run", "runs/frozen", "--resume"])
    assert "runs/frozen is finished" in capsys.readouterr().out


def test_a_dry_run_says_what_it_takes_and_writes_nothing(workplace, pretrained, capsys):
    frozen.run([*pretrained, "--dry-run"])
    printed = capsys.readouterr().out
    assert "have no features yet" in printed
    assert "for the features" in printed
    assert "classifiers, each" not in printed
    assert printed.endswith("nothing was written (--dry-run)\n")
    assert not (workplace / "runs").exists()


def test_a_run_that_was_cut_off_is_resumed_with_its_features(workplace, pretrained, capsys, monkeypatch):
    with monkeypatch.context() as cut:
        cut.setattr("train.features.means.mean_classifier", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            frozen.run(["--run", "runs/a", *pretrained])
    assert not (workplace / "runs/a/summary.json").exists()
    taken = (workplace / "runs/a/features/train/features.npy").stat().st_mtime_ns
    frozen.run(["--run", "runs/a", "--resume"])
    assert json.loads((workplace / "runs/a/summary.json").read_text())["images_per_second"] is None  # none was taken
    assert (workplace / "runs/a/features/train/features.npy").stat().st_mtime_ns == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "random weights know nothing"),
        (["--loop.seed", str(2**32)], "loop.seed=4294967296 must be below 2**32"),
        (["--model.adapt", "lora"], "model.adapt=lora is for training, and nothing is trained here; leave it out"),
        (["--model.drop_path", "0.1"], "model.drop_path=0.1 is for training"),
    ],
)
def test_what_cannot_be_or_would_do_nothing_is_refused(workplace, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        frozen.run(["--run", "runs/a", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_a_recipe_of_evaluation_that_no_model_could_be_used_with_is_refused(workplace, pretrained, capsys):
    with pytest.raises(SystemExit, match="2"):
        frozen.run(["--run", "runs/a", *pretrained, "--input.eval_augment", "imagenet"])
    assert "input.eval_augment=imagenet shows an image another way each time" in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_its_model_predicts(workplace, pretrained, capsys):
    frozen.run(["--run", "runs/frozen", *pretrained])
    capsys.readouterr()
    (workplace / "a.png").write_bytes(_picture())
    predict.main(["--run", "runs/frozen", "a.png", "--format", "jsonl"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["file"] == "a.png"


def _picture() -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def test_a_run_that_was_cut_off_is_no_model_yet(workplace, pretrained, capsys, monkeypatch):
    monkeypatch.setattr("train.features.means.mean_classifier", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        frozen.run(["--run", "runs/a", *pretrained])
    (workplace / "a.png").write_bytes(_picture())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        predict.main(["--run", "runs/a", "a.png"])
    assert exit_.value.code == 2
    assert "not finished" in capsys.readouterr().err


def test_a_signal_leaves_a_command_that_resumes(workplace, pretrained, capsys, monkeypatch):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as cut:
        cut.setattr("train.features.means.mean_classifier", stopped)
        with pytest.raises(SystemExit) as exit_:
            frozen.run(["--run", "runs/a b", *pretrained])
    assert exit_.value.code == 75
    printed = capsys.readouterr().out.rpartition("resume with: tailstream train frozen ")[2]
    frozen.run(shlex.split(printed))
    assert (workplace / "runs/a b/summary.json").exists()


def test_decoded_training_images_go_once_their_features_are_there(workplace, pretrained, monkeypatch):
    from train.engine import evaluation

    kept, finish = [], evaluation.finish

    def look(method, config, dataset, *others):
        kept.append([is_kept_with(dataset.splits[s], (Decoded, torch.device("cpu"))) for s in ("train", "test")])
        finish(method, config, dataset, *others)

    monkeypatch.setattr(evaluation, "finish", look)
    frozen.run(["--run", "runs/frozen", *pretrained, "--loop.stall_minutes", "3"])
    assert kept == [[False, True]]


def test_few_classes_of_many_dimensions_take_no_more_memory(monkeypatch):
    monkeypatch.setattr("train.features.means.PAIRS", 800)
    asked, share = [], _even_share

    def look(counts_C, most):
        asked.append(most)
        return share(counts_C, most)

    monkeypatch.setattr("train.features.means._even_share", look)
    features_ND, labels_N = clusters([300, 200], dimensions=8)
    means_CD = F.normalize(torch.stack([features_ND[labels_N == c].mean(0) for c in range(2)]))
    best_scale(features_ND, labels_N, means_CD)
    assert asked == [100]
