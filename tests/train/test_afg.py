"""Stage two from its command line, and the parts of its classifier training."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from train import afg, decouple
from train.afg import Settings, run
from train.engine import runs
from train.engine.config import PRESETS
from train.engine.launch import run as run_stage_one
from train.engine.predictions import read_predictions
from train.erm import ERM
from train.features import beta, stage_two
from train.features.beta import BETA_MOST, choose_beta, train_adaptive
from train.features.candidates import Families, Judge
from train.features.classifiers import measure
from train.features.commands import BETA_START, ClassifierOptim, ReferenceOptim
from train.features.files import write_features
from train.features.gaussians import find_support, fit, head_classes
from train.features.mixing import Mixture
from train.features.passes import Passes, Source
from train.features.recipes import Recipe
from train.networks.model_files import load_model

ROOT = Path(__file__).parents[2]


SHORT = ["--optim.epochs", "4"]


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(list(arguments))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith("train/afg.py: error: ")
    assert "\n" not in error
    return error


def test_stage_two_needs_no_arguments_and_leaves_a_whole_folder(here):
    run(SHORT)
    folder = here / "runs/digits-afg-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["title"], summary["stage"], summary["from"]) == ("afg", "CE + AFG", 2, "ce")
    assert summary["beta"]["selected_on"] == "val"
    assert list(summary["beta"]["tried"]) == ["0", "0.2", "0.4", "0.6", "0.8"]
    best = max(summary["beta"]["tried"].values())
    assert summary["beta"]["tried"][f"{summary['beta']['used']:g}"] == best
    with np.load(folder / "diagnostics.npz") as kept:
        assert set(kept) == {"norms"}  # its features are stage one's
    with np.load(here / "runs/ce/diagnostics.npz") as kept:
        assert set(kept) == {"norms", "distances"}
        assert ((kept["distances"] > 0) & (kept["distances"] < 2**0.5)).all()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["distillation"] == pytest.approx(summary["setting"]["distill"])
    assert {row["lr"] <= summary["setting"]["lr"] for row in rows} == {True}


@pytest.mark.parametrize(
    ("stage", "options", "classifiers"),
    [
        (
            run,
            [],
            "22 classifiers, each 40 epochs of ",
        ),  # 3 rates of 2 teachers, 4 more β, 3 rates of 4 baselines, β = 0
        (decouple.run, ["--classifier", "crt"], "3 classifiers, each 10 epochs of "),
        (decouple.run, ["--classifier", "plain"], "3 classifiers, each 40 epochs of 1 step of 512 features"),
        (decouple.run, ["--classifier", "tau"], None),
    ],
)
def test_a_dry_run_says_what_it_takes_and_writes_nothing(here, capsys, stage, options, classifiers):
    before = sorted(here.rglob("*"))
    stage([*options, "--dry-run"])
    printed = capsys.readouterr().out
    assert (
        "999 images, of which 999 have no features yet; 0.464 M parameters, of which 650 are the classifier" in printed
    )
    assert (classifiers or "s for the features\n") in printed
    assert printed.endswith("nothing was written (--dry-run)\n")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("stage", "bytes_each"), [(run, 4), (decouple.run, 0)])
def test_a_dry_run_counts_the_copy_that_features_are_generated_from(here, capsys, monkeypatch, stage, bytes_each):
    monkeypatch.setattr("train.features.estimate.resident_bytes", lambda: 0)
    stage(["--dry-run", "--input.views", "2"])
    size = bytes_each * 64 * 2 * open_dataset("data/digits").train_counts.sum()  # the bank is mapped
    assert f"of features, about {size / 1e6:.3g} MB of memory;" in capsys.readouterr().out


def test_the_baselines_are_in_the_summary_and_on_the_screen(here, capsys):
    run([*SHORT, "--run", "runs/afg"])
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    reported, rows = summary["baselines"], {row["name"]: row for row in summary["baselines"]["rows"]}
    assert reported["selected_on"] == "val"
    closed, trained = (
        ["logit adjustment", "tau-normalized"],
        ["LWS", "cRT", "no generation", "oversampling", "own Gaussian"],
    )
    assert list(rows) == ["stage one", *closed, *trained]
    for row in rows.values():
        assert row.keys() == {"name", "setting", *summary["last"]}
    first = json.loads((here / "runs/ce/summary.json").read_text())
    assert rows["stage one"]["top1"] == pytest.approx(first["last"]["top1"], abs=0.005)  # half precision
    assert rows["own Gaussian"]["setting"]["beta"] == 0
    selected, rivals = summary["selected"], summary["selection"]["rows"]
    assert [row["name"] for row in rivals] == [*rows, "AFG"]
    # The likeliest within an error of the best.
    within = [row for row in rivals if row["behind_best"] <= row["standard_error"] + 1e-12]
    assert selected["name"] == min(within, key=lambda row: row["loss"])["name"]
    assert summary["selected_on"] == "val"
    if selected["name"] in rows:
        assert {key: selected[key] for key in rows[selected["name"]]} == rows[selected["name"]]
    weights = load_file(here / "runs/afg" / selected["file"])
    assert weights.keys() == load_file(here / "runs/afg/model.safetensors").keys()
    weights = json.loads((here / "runs/afg/model.json").read_text())["weights"]
    assert weights["selected"]["file"] == "model-selected.safetensors"
    assert weights["selected"]["figures"]["name"] == summary["selected"]["name"]
    assert not (here / "runs/afg/candidates").exists()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in (*list(rows)[1:], "AFG"))


def test_several_views_of_an_image_make_no_class_larger(here, monkeypatch):
    heads = []
    monkeypatch.setattr(stage_two, "find_support", lambda *a: heads.append(a[2].tolist()) or find_support(*a))
    for views in ("0", "3"):
        run(["--optim.epochs", "1", "--method.beta", "0", "--method.baselines", "false", "--input.views", views])
    assert heads[0] == heads[1] == (open_dataset("data/digits").train_counts > 100).tolist()


def test_baselines_can_be_left_out(here, capsys):
    run([*SHORT, "--run", "runs/afg", "--method.beta", "0.4", "--method.baselines", "false"])
    assert json.loads((here / "runs/afg/summary.json").read_text())["baselines"]["rows"] == []
    assert "cRT" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "AFG"),
        ({"beta": "adaptive"}, "AFG, adaptive β"),
        ({"beta": 0.6}, "AFG, β=0.6"),
        ({"distill": 0.0, "head_above": 900}, "AFG, no distillation, head above 900"),
        ({"teacher": "stage-one"}, "AFG, teacher stage one"),
    ],
)
def test_tables_tell_runs_of_other_settings_apart(settings, expected):
    assert afg.title(afg.Settings(**settings)) == expected
    assert afg.title(afg.Settings(), used=0.6) == "AFG, β=0.6"


def test_the_only_beta_of_a_grid_is_the_one_that_is_named(here):
    quick = ["--optim.epochs", "1", "--method.baselines", "false", "--method.rates", "[1.0]"]
    run([*quick, "--run", "runs/afg", "--method.beta_grid", "[0.4]"])
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert (summary["title"], summary["beta"]["used"]) == ("CE + AFG, β=0.4", 0.4)


def test_adaptive_beta_runs_beside_its_control(here, capsys):
    run([*SHORT, "--run", "runs/afg", "--method.beta", "adaptive", "--method.baselines", "false"])
    rows = [json.loads(line) for line in (here / "runs/afg/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["beta"] == pytest.approx(0.6)
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert summary["beta"]["used"] == rows[-1]["beta"]
    assert summary["beta"]["selected_on"] == "val"
    with np.load(here / "runs/afg/diagnostics.npz") as kept:
        assert np.isnan(kept["beta"]).sum() == 1  # the one class with more than 100 images borrows nothing
        assert ((kept["beta"] >= 0) & (kept["beta"] <= BETA_MOST)).sum() == 9
    with np.load(here / "runs/afg/feature_sample.npz") as kept:
        assert kept["generated"].any()
    below = summary["beta"]["note"]
    printed = capsys.readouterr().out
    assert below is None or below in printed


@pytest.mark.parametrize("name", ["made.safetensors", "made.npy"])
def test_generated_features_can_be_exported(here, capsys, name):
    run([*SHORT, "--run", "runs/afg", "--method.beta", "0.4", "--method.baselines", "false", "--export", name])
    if name.endswith("npy"):
        features, labels = (torch.from_numpy(np.load(here / part)) for part in (name, "made.labels.npy"))
    else:
        features, labels = load_file(here / name).values()
    counts = open_dataset("data/digits").train_counts
    assert torch.bincount(labels, minlength=10).tolist() == (counts.max() - counts).tolist()
    assert (features.dtype, features.shape) == (torch.float16, (len(labels), 64))
    assert (features >= 0).all()
    assert f"wrote {len(labels):,} generated features to {name}" in capsys.readouterr().out
    assert not [path for path in here.iterdir() if "partial" in path.name]


def test_two_ranks_take_train_and_report_together(here):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    options = ["--method.beta", "0.4", "--method.baselines", "false", "--input.views", "2", "--optim.epochs", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train/afg.py"), *options, "--run", "runs/two"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    together = {path.name: np.load(path) for path in (here / "runs/ce/features/train").glob("*.npy")}
    assert together["seen.npy"].all()
    assert done.stdout.count("wrote runs/two") == 1
    summary = json.loads((here / "runs/two/summary.json").read_text())
    assert summary["environment"]["processes"] == 2
    shutil.rmtree(here / "runs/ce/features")
    run([*options, "--run", "runs/one"])
    alone = np.load(here / "runs/ce/features/train/features.npy")
    np.testing.assert_allclose(together["features.npy"].astype(float), alone, rtol=2e-3, atol=1e-3)
    alone = json.loads((here / "runs/one/summary.json").read_text())
    assert summary["last"]["top1"] == pytest.approx(alone["last"]["top1"], abs=0.1)


def test_a_run_that_is_stopped_while_it_exports_is_resumed_and_exports(here, capsys, monkeypatch):
    words = [*SHORT, "--run", "runs/afg", "--method.beta", "0.4", "--method.baselines", "false"]
    with monkeypatch.context() as patched:
        patched.setattr("train.features.files.write_features", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="75"):
            run([*words, "--export", "made.npy"])
    (said,) = re.findall(r"resume with: tailstream train afg (.*)", capsys.readouterr().out)
    assert not Path("runs/afg/summary.json").exists()
    run(shlex.split(said))
    assert Path("made.npy").exists()
    assert Path("runs/afg/summary.json").exists()


def test_an_export_that_does_not_fit_the_disk_leaves_nothing(tmp_path):
    def chunks():
        yield torch.ones(2, 3), torch.zeros(2).long()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"made.npy cannot be written \(No space left on device\); it takes 0\.00 GB"):
        write_features(tmp_path / "made.npy", chunks(), 4, 3)
    assert list(tmp_path.iterdir()) == []


def test_the_saved_model_predicts_what_was_measured_on_features(here):
    run([*SHORT, "--method.beta", "0.4", "--run", "runs/afg"])
    network, test = load_model("runs/afg"), open_dataset("data/digits").splits["test"]
    from pipeline.loader import open_loader
    from pipeline.plan import EvalPlan

    with open_loader(EvalPlan(test, 1000, 16), "torch", threads=0) as loader, torch.no_grad():
        (batch,) = [step["eval"] for step in loader]
        predicted_N = network.predict(batch.images_BHWC).argmax(1)
    reported = json.loads((here / "runs/afg/per_class.json").read_text())
    assert abs(int((predicted_N == batch.labels_B).sum()) - sum(reported["correct"])) <= 1  # the bank is half precision
    # The features are sorted by class, and the predictions by id.
    ids_N, labels_N, topk_NK = read_predictions(
        here / "runs/afg", "last", "test_ids", "test_labels", "test_topk_labels"
    )
    np.testing.assert_array_equal(ids_N, batch.ids_B)
    np.testing.assert_array_equal(labels_N, batch.labels_B)
    assert (topk_NK[:, 0] == predicted_N.numpy()).mean() > 0.99


def test_a_run_without_a_val_split_says_which_beta_it_takes(here, photo_folder, capsys):
    build("folder", source=photo_folder, out=here / "data/pictures", val_fraction=0.0, workers=1)
    small = ["--input.batch_size", "8", "--input.image_size", "32", "--model.backbone", "resnet32"]
    run_stage_one(ERM, ["--data", "data/pictures", "--run", "runs/pictures", "--optim.epochs", "1", *small])
    run(["--optim.epochs", "2", "--run", "runs/afg"])  # the newest finished run
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert summary["from"] == "pictures"
    assert summary["beta"] == {"used": 0.6, "tried": {}, "selected_on": None, "note": None}
    assert (summary["selected"], summary["selected_on"], summary["selection"]) == (None, None, None)
    assert summary["title"] == "CE + AFG, β=0.6"
    assert not (here / "runs/afg/model-selected.safetensors").exists()
    assert (
        "there is no val split: nothing is chosen or selected, and each setting is the first" in capsys.readouterr().out
    )
    rows = {row["name"]: row["setting"] for row in summary["baselines"]["rows"]}
    assert rows["logit adjustment"] == {"tau": 1.0}
    assert rows["cRT"] == {"lr": 0.2}


@pytest.mark.parametrize("per_class", [1, 2])
def test_a_val_split_of_few_images_selects_nothing(here, capsys, monkeypatch, per_class):
    taken = stage_two.feature_bank

    def few(*arguments):
        features, labels = taken(*arguments)
        if arguments[3] != "val":
            return features, labels
        kept = torch.cat([(labels == c).nonzero()[:per_class, 0] for c in range(10)])
        return features[kept], labels[kept]

    kept_ids = stage_two.bank_ids
    monkeypatch.setattr(stage_two, "feature_bank", few)
    monkeypatch.setattr(
        stage_two,
        "bank_ids",
        lambda home, split: kept_ids(home, split)[: 10 * per_class if split.name == "val" else None],
    )
    run(["--optim.epochs", "1", "--run", "runs/afg"])
    assert (
        f"val has {per_class}.0 images a class, and a choice needs 10: nothing is chosen or" in capsys.readouterr().out
    )
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert (summary["selected"], summary["beta"]["used"], summary["held_out_images_per_class"]) == (
        None,
        0.6,
        per_class,
    )


def test_a_class_of_one_image_is_trained_and_evaluated(here, capsys, monkeypatch):
    taken = stage_two.feature_bank

    def one(*arguments):
        features, labels = taken(*arguments)
        if arguments[3] != "train":
            return features, labels
        kept = torch.cat([(labels != 9).nonzero()[:, 0], (labels == 9).nonzero()[:1, 0]])
        return features[kept], labels[kept]

    monkeypatch.setattr(stage_two, "feature_bank", one)
    run(["--optim.epochs", "1", "--run", "runs/afg"])
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert summary["last"]["few"] is not None
    assert all(row["balanced_accuracy"] is not None for row in summary["baselines"]["rows"])


def test_the_papers_variant_is_there_for_every_dataset(here, capsys):
    run(["--optim.epochs", "1", "--run", "runs/afg", "--variant", "paper", "--method.baselines", "false"])
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert summary["title"] == "CE + AFG, β=0.6, teacher stage one"
    assert summary["setting"] == {"beta": 0.6, "lr": 0.1, "distill": 1.0, "teacher_tau": 0.0}
    message = fails_with(capsys, "--variant", "papr")
    assert "--variant papr" in message
    assert "for every dataset there is: paper" in message


def test_a_stopped_stage_two_keeps_what_is_finished_and_resumes(here, capsys, monkeypatch):
    """SIGTERM in the last pass: status 75, no summary; resumed, the finished passes are found and the figures equal."""
    run([*SHORT, "--run", "runs/whole"])
    real, passed = Passes._train, []

    def stopping(self, source, recipes):
        passed.append(source.sampling)
        if source.sampling == "each-once":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, source, recipes)

    monkeypatch.setattr(Passes, "_train", stopping)
    with pytest.raises(SystemExit) as stopped:
        run([*SHORT, "--run", "runs/cut"])
    assert stopped.value.code == 75
    assert "stopped by SIGTERM" in (said := capsys.readouterr().out)
    assert "--run runs/cut --resume" in said
    assert not (here / "runs/cut/summary.json").exists()
    monkeypatch.setattr(Passes, "_train", real)
    again = []
    monkeypatch.setattr(
        Passes, "_train", lambda self, source, recipes: again.append(source.sampling) or real(self, source, recipes)
    )
    run(["--resume"])  # the newest unfinished one, with the settings that it began with
    assert set(again) == {"each-once"}
    cut, whole = (json.loads((here / f"runs/{name}/summary.json").read_text()) for name in ("cut", "whole"))
    for key in ("last", "selected", "baselines", "beta"):
        assert cut[key] == whole[key]
    run(["--resume", "--run", "runs/cut"])
    assert "runs/cut is finished" in capsys.readouterr().out


def test_mistakes_are_reported_in_one_line(here, capsys, photos):
    assert "nowhere is not a run" in fails_with(capsys, "--from", "nowhere")
    assert "method.beta" in fails_with(capsys, "--method.beta", "1.5")
    assert "method.k" in fails_with(capsys, "--method.k", "0")
    assert "--method.lambda" in fails_with(capsys, "--method.lambda", "0.5")
    assert "method.lam" in fails_with(capsys, "--method.lam", "-1")
    assert "method.gamma" in fails_with(capsys, "--method.gamma", "-0.1")
    assert "method.beta_grid is empty; give at least one" in fails_with(capsys, "--method.beta_grid", "[]")
    assert "--export made.txt must end in .safetensors or .npy" in fails_with(capsys, "--export", "made.txt")
    assert "no is no folder that can be written to" in fails_with(capsys, "--export", "no/made.npy")
    for taken, asked in (("a.safetensors", "a.safetensors"), ("b.labels.npy", "b.npy")):
        (here / taken).touch()
        assert f"--export: {taken} already exists; name another file" in fails_with(capsys, "--export", asked)
    message = fails_with(capsys, "--from", "runs/ce", "--data", str(photos.root))
    assert "was trained for 10 classes" in message
    assert "has 3" in message
    assert "already holds a run" in fails_with(capsys, "--run", "runs/ce")
    (here / "runs/ce/summary.json").unlink()
    assert "no finished stage-one run under runs" in fails_with(capsys)
    assert "is not finished; resume it: tailstream train erm --run runs/ce --resume" in fails_with(
        capsys, "--from", "runs/ce"
    )
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["ce"]


def make_mixture(counts=(200, 30, 5), dimensions=8, **options) -> tuple[Mixture, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.tensor(counts))
    features = torch.rand(len(labels), dimensions, generator=generator) + torch.eye(len(counts), dimensions)[labels]
    gaussians = fit(features.half(), labels, len(counts))
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, 100))
    targets_C = gaussians.counts_C.max() - gaussians.counts_C
    torch.manual_seed(0)
    mixture = Mixture(features.half(), labels, gaussians, support, targets_C, **options)
    return mixture, nn.Linear(dimensions, len(counts))


def judge_of(mixture: Mixture) -> Judge:
    bank = (mixture.features_ND, mixture.labels_N)
    return Judge(bank, bank, mixture.gaussians.counts_C.numpy())


def families_of(mixture: Mixture, linear: nn.Linear, judge: Judge | None = None, **optim) -> Families:
    optim = ClassifierOptim(**{"epochs": 6, "batch_size": 64, **optim})
    passes = Passes(linear, mixture, 0)
    return Families(linear, mixture, judge or judge_of(mixture), passes, optim, ReferenceOptim(), rates=[1.0])


def test_distillation_pulls_head_classes_towards_the_teacher():
    mixture, linear = make_mixture()
    head = mixture.features_ND[mixture.labels_N == 0].float()
    teacher = linear(head).log_softmax(1)

    def divergence(distill: float) -> float:
        settings = Settings(distill=distill, beta=0.4, baselines=False, teacher="stage-one")
        best = choose_beta(families_of(mixture, linear, epochs=20, lr=0.5), settings).best
        kl = nn.functional.kl_div(best.linear(head).log_softmax(1), teacher, reduction="batchmean", log_target=True)
        return kl.item()

    assert divergence(20.0) < divergence(1.0) < divergence(0.0)


def test_adaptive_beta_follows_the_control_within_its_bounds(monkeypatch):
    """β rises where the held-out split recognises a class better than the control, and falls where it is worse."""
    mixture, linear = make_mixture((200, 30, 5, 3))
    families = families_of(mixture, linear)
    reported = []

    def watched(stack_linear, bank):
        total, loss = measure(stack_linear, bank)
        reported.append(total)
        if len(reported) <= 24:  # of the first 12 epochs, the control and the adaptive one by turns
            control = len(reported) % 2
            total.correct_C[:] = [5, 1, 2, 3] if control else [5, 2, 1, 3]
        return total, loss

    monkeypatch.setattr(beta, "measure", watched)
    recipe = Recipe("scaled", 13, 0.01, beta=0.0)
    found = train_adaptive(families.passes, Source("generated", 64), recipe, families.judge)
    beta_C = found.trained.beta_C
    assert beta_C[0] == 0  # head
    assert beta_C[1].item() == pytest.approx(0.9)  # always better: 0.6 + 12·0.05, bounded
    assert beta_C[2].item() == pytest.approx(0, abs=1e-6)  # always worse: 0.6 − 12·0.05
    assert beta_C[3].item() == pytest.approx(0.6)
    assert found.trained.rows[0]["beta"] == pytest.approx(0.6)
    # The classifier, the sample, the export and the summary have one β.
    assert found.trained.rows[-1]["beta"] == found.setting["beta"] == pytest.approx(beta_C[1:].mean().item())


def test_adaptive_beta_below_its_control_says_so(monkeypatch):
    mixture, linear = make_mixture()
    families = families_of(mixture, linear)
    real = train_adaptive
    monkeypatch.setattr(beta, "train_adaptive", lambda *a: replace(real(*a), score=(-1.0, 0.0)))
    choice = choose_beta(families, Settings(beta="adaptive"))
    assert "adaptive β ends below β = 0: -100.0 % balanced accuracy on val, against" in choice.note
    monkeypatch.setattr(beta, "train_adaptive", lambda *a: replace(real(*a), score=(2.0, 0.0)))
    assert choose_beta(families, Settings(beta="adaptive")).note is None


@pytest.mark.parametrize(
    ("beta", "watched", "betas", "on_held_out"),
    [
        ("select", True, [0.2, 0.2, 0.4, 0.0], True),  # with and without a teacher; 0 only for comparison
        ("adaptive", True, [0.0, 0.0], True),
        (0.3, True, [0.3, 0.3, 0.0], False),
        ("select", False, [0.6, 0.0], False),
        ("adaptive", False, [0.6, 0.0], False),
    ],
)
def test_which_betas_are_trained(beta, watched, betas, on_held_out, monkeypatch):
    mixture, linear = make_mixture()
    judge = judge_of(mixture) if watched else replace(judge_of(mixture), watched=None)
    families, asked = families_of(mixture, linear, judge, epochs=1), []
    real = Passes.train
    monkeypatch.setattr(
        Passes,
        "train",
        lambda self, source, recipes: asked.extend(r.beta for r in recipes) or real(self, source, recipes),
    )
    settings = Settings(beta=beta, beta_grid=[0.2, 0.4])
    choice = choose_beta(families, settings)
    assert asked == betas
    assert choice.on_held_out == on_held_out
    assert choice.own.setting["beta"] == 0
    asked.clear()
    choose_beta(families, replace(settings, baselines=False))
    assert asked == (betas if beta == "adaptive" and watched else betas[:-1])


def test_the_settings_are_the_papers_or_the_documented_ones():
    settings, optim = Settings(), ClassifierOptim()
    assert (settings.lam, settings.k, settings.gamma) == (0.5, 2, 0.0)
    assert (settings.beta, settings.beta_grid[0]) == ("select", 0.0)
    assert (settings.distill, settings.distill_base, settings.classifier) == (1.0, 2.0, "scaled")
    assert settings.head_above == 100
    assert (BETA_START, BETA_MOST) == (0.6, 0.9)
    assert (optim.epochs, optim.momentum, optim.weight_decay) == (40, 0.9, 5e-4)
    for name, distill in {"inat2018": 0.5, "inat2017": 0.5, "cifar100": 1.0, "imagenet-lt": 1.0}.items():
        text = (PRESETS / f"{name}.yaml").read_text()
        assert f"method: {{distill: {distill}}}" in text


def test_too_little_memory_is_one_line_and_leaves_nothing_locked(here, capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Passes, "_train", full)
    message = fails_with(capsys, *SHORT, "--run", "runs/afg")
    assert "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB); lower optim.batch_size" in message
    assert not runs._held
    assert not list(here.glob("runs/**/.lock"))


def test_a_full_disk_is_one_line_with_what_resumes(here, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "append_row", full)
    message = fails_with(capsys, *SHORT, "--run", "runs/afg", "--method.beta", "0.4", "--method.baselines", "false")
    assert "cannot write runs/afg (No space left on device); when that is solved, resume with" in message
    assert message.endswith("--run runs/afg --resume")


def test_settings_that_would_do_nothing_are_refused(here, capsys):
    assert "method.distill_base=0.5" in fails_with(capsys, "--method.distill_base", "0.5")
    assert "loop.seed=4294967296 must be below 2**32" in fails_with(capsys, "--loop.seed", str(2**32))
