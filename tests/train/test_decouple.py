"""Second-stage classifiers as runs of their own: what they see, and what they leave."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from analysis.runs import read_run
from pipeline.kept import is_kept_with
from pipeline.plan import EvalPlan, Stream, TrainPlan
from pipeline.resident_loader import Decoded
from shards.build import build
from shards.index import open_dataset
from train import afg, calibrate, decouple
from train.bbn import BBN
from train.engine.config import Input
from train.engine.guards import StallGuard
from train.engine.launch import run as run_stage_one
from train.engine.predictions import read_predictions
from train.engine.weights import class_weights
from train.features import stage_two
from train.features.mixing import Mixture
from train.features.passes import Passes
from train.features.shift import shift
from train.networks.model_files import load_model

QUICK = ["--optim.epochs", "2", "--reference.crt_epochs", "2"]


def summary_of(run: str) -> dict:
    return json.loads(Path(run, "summary.json").read_text())


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        decouple.run(list(arguments))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith("train/decouple.py: error: ")
    assert "\n" not in error
    return error


def test_a_seed_that_numpy_cannot_have_is_refused(here, capsys):
    assert "loop.seed=4294967296 must be below 2**32" in fails_with(capsys, "--loop.seed", str(2**32))


@pytest.mark.parametrize("classifier", ["crt", "lws", "tau", "ncm", "mislas", "adjusted", "oversampling", "plain"])
def test_each_classifier_can_be_a_run_of_its_own(here, classifier):
    decouple.run(["--classifier", classifier, "--run", "runs/one", "--optim.epochs", "2"])
    summary = json.loads((here / "runs/one/summary.json").read_text())
    assert (summary["method"], summary["stage"], summary["from"]) == ("decouple", 2, "ce")
    assert summary["title"] == f"CE + {decouple.TITLES[classifier][0]}"
    assert summary["setting_selected_on"] == "val"
    assert read_run(here / "runs/one").epochs is not None
    assert load_model("runs/one").classifier.out_features == 10


def test_crt_sees_the_data_as_it_is_or_in_balance_with_class_weights_or_without(here, monkeypatch):
    trained, real = [], Passes._train
    monkeypatch.setattr(
        Passes, "_train", lambda self, source, recipes: trained.append((source, recipes)) or real(self, source, recipes)
    )
    quick = [*QUICK, "--method.rates", "[1.0]"]
    decouple.run([*quick, "--run", "runs/rs"])
    decouple.run([*quick, "--run", "runs/rw", "--method.q", "1", "--method.weights", "inverse"])
    titles = [summary_of(run)["title"] for run in ("runs/rs", "runs/rw")]
    assert titles == ["CE + cRT", "CE + cRT, q=1, RW"]
    (balanced, (rs,)), (plain, (rw,)) = trained
    assert (balanced.sampling, plain.sampling, rw.weights) == ("oversampled", "each-once", "inverse")
    # As many images are seen: 120 of each of ten classes twice, in passes over all of them.
    images = open_dataset("data/digits").train_counts
    assert rw.epochs == round(2 * 10 * images.max() / images.sum()) > rs.epochs


def test_settings_of_other_classifiers_are_refused(here, capsys):
    error = fails_with(capsys, "--classifier", "tau", "--method.q", "1")
    assert "method.q=1 is for classifier crt, lws or mislas, and it is tau" in error
    assert "method.weights=inverse is for" in fails_with(
        capsys, "--classifier", "oversampling", "--method.weights", "inverse"
    )
    assert "did you mean inverse" in fails_with(capsys, "--method.weights", "inverted")
    assert "input.branch=conventional names a branch" in fails_with(capsys, "--input.branch", "conventional")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["ce"]


def test_one_branch_of_bbn(workplace, capsys):
    """A branch's classifier sees its features alone, and the run that is left is a plain network of that branch."""
    run_stage_one(BBN, ["--run", "runs/bbn", "--optim.epochs", "1", "--optim.lr", "0.02", "--input.batch_size", "32"])
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    bilateral = load_model("runs/bbn")
    halves = bilateral.features(images).chunk(2, dim=1)
    for branch, half in zip(("conventional", "rebalancing"), halves, strict=True):
        run = f"runs/{branch}"
        decouple.run([*QUICK, "--from", "runs/bbn", "--run", run, "--input.branch", branch, "--method.rates", "[1.0]"])
        assert summary_of(run)["title"] == f"BBN + cRT, {branch} branch"
        network = load_model(run)
        assert network.spec["kind"] == "plain"
        torch.testing.assert_close(network.features(images), half)
        assert_predictions_are_the_models(run)
    # Both branches come from one bank.
    assert "extracting them again" not in capsys.readouterr().out


def assert_predictions_are_the_models(run: str) -> None:
    """What is kept of the test split is what the saved network says of its pictures."""
    tested = summary_of(run)["evaluated_on"]
    network, plan = load_model(run), EvalPlan(open_dataset("data/digits").splits[tested], 64, 16)
    with Input(loader="torch").open_loader(plan, torch.device("cpu")) as loader, torch.no_grad():
        logits_NC = torch.cat([network.predict(batch["eval"].images_BHWC) for batch in loader])
    names = (f"{tested}_{name}" for name in ("ids", "topk_labels", "topk_scores"))
    ids_N, kept_labels_NK, kept_scores_NK = read_predictions(Path(run), "last", *names)
    assert ids_N.tolist() == list(range(len(logits_NC)))
    scores, labels = logits_NC.softmax(1).sort(descending=True)
    np.testing.assert_allclose(kept_scores_NK, scores, atol=5e-3)  # features are kept in half precision
    assert (kept_labels_NK[:, 0] == labels[:, 0].numpy()).mean() > 0.99


@pytest.mark.parametrize("classifier", ["tau", "crt"])
def test_nothing_is_fitted_where_nothing_is_generated(here, monkeypatch, classifier):
    for name in ("fit", "find_support"):
        monkeypatch.setattr(stage_two, name, lambda *_: pytest.fail("fitted"))
    monkeypatch.setattr(Mixture, "unit", property(lambda _: pytest.fail("read")))
    decouple.run(["--classifier", classifier, *QUICK, "--run", "runs/one"])


def test_features_of_any_sign_are_classified(here, monkeypatch):
    """Nothing is generated here, so that no power is taken of them."""
    taken = stage_two.feature_bank

    def centred(*arguments):
        features, labels = taken(*arguments)
        return features - features.float().mean().half(), labels

    monkeypatch.setattr(stage_two, "feature_bank", centred)
    decouple.run(["--classifier", "ncm", "--run", "runs/ncm"])
    assert summary_of("runs/ncm")["last"]["balanced_accuracy"] > 0.1


def test_a_run_is_resumed_from_what_it_began_with(here, capsys, monkeypatch):
    """The classifier that was asked for in short, the weights and the run; another is refused."""
    real = Passes._train
    monkeypatch.setattr(Passes, "_train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decouple.run([*QUICK, "--classifier", "lws", "--weights", "last", "--from", "runs/ce", "--run", "runs/cut"])
    monkeypatch.setattr(Passes, "_train", real)
    again = ["--run", "runs/cut", "--resume"]
    assert "runs/cut began with --weights last, not selected; leave --weights out" in fails_with(
        capsys, *again, "--weights", "selected"
    )
    assert "runs/cut began with --from runs/ce, not runs/other" in fails_with(capsys, *again, "--from", "runs/other")
    assert "--variant ldam comes too late for runs/cut" in fails_with(capsys, *again, "--variant", "ldam")
    decouple.run([*again, "--from", "./runs/ce"])
    summary = summary_of("runs/cut")
    assert (summary["title"], summary["from_weights"]) == ("CE + LWS", "last")


def test_a_second_stage_says_which_settings_are_not_its_presets(here):
    given = ["--method.q", "1", "--method.weights", "effective(beta=0.99)", "--method.rates", "[1.0]"]
    decouple.run([*QUICK, *given, "--classifier", "crt", "--from", "runs/ce", "--run", "runs/a"])
    changed = yaml.safe_load(Path("runs/a/config.yaml").read_text())["about"]["changed"]
    assert "method.rates" in changed
    assert {"method.classifier", "method.q", "method.weights", "reference.lr"}.isdisjoint(changed)
    assert summary_of("runs/a")["title"] == "CE + cRT, q=1, CB, beta=0.99"


def test_a_dataset_of_other_classes_in_the_same_number_is_refused(here, capsys):
    described = json.loads(Path("runs/ce/model.json").read_text())
    described["classes"] = [*described["classes"][:8], *described["classes"][:7:-1]]
    Path("runs/ce/model.json").write_text(json.dumps(described))
    message = fails_with(capsys, "--classifier", "ncm")
    assert "runs/ce was trained for other classes than" in message
    assert "'9' is '8' there" in message


def test_both_models_of_a_second_stage_can_be_calibrated(here, capsys):
    afg.run(["--optim.epochs", "2", "--reference.crt_epochs", "1", "--run", "runs/afg", "--method.rates", "[1.0]"])
    calibrate.main(["--run", "runs/afg"])
    said = capsys.readouterr().out
    assert "last weights, 136 images of val" in said
    assert "selected weights, 136 images of val" in said


def test_shifted_statistics_are_the_means_over_balanced_batches(here):
    dataset, input = open_dataset("data/digits"), Input(image_size=16, batch_size=40, augment="shift", loader="torch")
    network = load_model("runs/ce")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    seen = []
    handle = first.register_forward_pre_hook(lambda _, maps: seen.append(maps[0]))
    shift(network, dataset, input, Accelerator(cpu=True), seed=3)
    handle.remove()
    plan = TrainPlan(dataset.splits["train"], [Stream("shift", q=0, augment="shift")], 40, 16, 3, 1)
    steps = max(16, plan.steps_per_epoch)
    assert len(seen) == steps
    variances = torch.stack([maps.var((0, 2, 3)) for maps in seen])
    means = torch.stack([maps.mean((0, 2, 3)) for maps in seen])
    torch.testing.assert_close(first.running_mean, means.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.running_var, variances.mean(0), rtol=1e-4, atol=1e-4)
    labels = np.concatenate([dataset.splits["train"].samples["label"][plan.draws(s)[0].ids_B] for s in range(steps)])
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 0.6 * counts.max()  # in balance
    for name, value in network.state_dict().items():
        same = torch.equal(value, before[name])
        assert same != (name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")), name
    assert not any(layer.training for layer in network.modules())
    assert first.momentum == 0.1


def test_mislas_shifts_batch_norm_and_leaves_the_rest_of_the_network(here, monkeypatch):
    quick = ["--classifier", "mislas", *QUICK, "--method.rates", "[1.0]"]
    decouple.run([*quick, "--run", "runs/shifted"])
    decouple.run([*quick, "--run", "runs/plain", "--input.shift_batch_norm", "false"])
    assert summary_of("runs/shifted")["title"] == "CE + MiSLAS"
    assert summary_of("runs/plain")["title"] == "CE + MiSLAS, batch norm as it is"
    first, shifted, plain = (load_model(f"runs/{run}").state_dict() for run in ("ce", "shifted", "plain"))
    for name, value in first.items():
        if not name.startswith("classifier."):
            assert torch.equal(plain[name], value)
            assert torch.equal(shifted[name], value) != ("running" in name or "tracked" in name)
    assert_predictions_are_the_models("runs/shifted")
    assert {p.name for p in Path("runs/shifted").iterdir()} == {p.name for p in Path("runs/plain").iterdir()}
    # The shifted features are no bank of stage one's.
    monkeypatch.setattr("train.features.bank._fill", lambda *a: pytest.fail("taken again"))
    decouple.run([*QUICK, "--run", "runs/crt"])


def test_it_waits_for_images_as_long_as_it_is_told(here, monkeypatch):
    limits = []

    class Watched(StallGuard):
        def __init__(self, loader, streams, rank, limit_s):
            limits.append((streams, limit_s))
            super().__init__(loader, streams, rank, limit_s)

    for module in ("bank", "shift"):
        monkeypatch.setattr(f"train.features.{module}.StallGuard", Watched)
    decouple.run(["--classifier", "mislas", *QUICK, "--method.rates", "[1.0]", "--loop.stall_minutes", "3"])
    assert limits == [(("shift",), 180.0), *[(("eval",), 180.0)] * 3]


def test_a_stopped_mislas_resumes_with_the_shifted_network(here, monkeypatch):
    quick = ["--classifier", "mislas", *QUICK, "--method.rates", "[1.0]"]
    decouple.run([*quick, "--run", "runs/whole"])
    real = Passes._train
    monkeypatch.setattr(Passes, "_train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decouple.run([*quick, "--run", "runs/cut"])
    monkeypatch.setattr(Passes, "_train", real)
    monkeypatch.setattr("train.features.shift.shift", lambda *a: pytest.fail("shifted again"))
    decouple.run(["--resume", "--run", "runs/cut"])
    assert summary_of("runs/cut")["last"] == summary_of("runs/whole")["last"]


def test_a_variant_that_changes_nothing_of_the_stage_is_refused(here, capsys):
    shutil.copytree((here / "data/digits").resolve(), here / "data/cifar")
    manifest = here / "data/cifar/dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"preset": "cifar100"}))
    words = ["--from", "runs/ce", "--data", "data/cifar", "--dry-run"]
    message = fails_with(capsys, *words, "--variant", "glag")
    assert "--variant glag changes nothing of train/decouple.py here; leave it out" in message
    afg.run([*words, "--variant", "glag"])


def test_a_second_stage_is_no_stage_one(here, capsys):
    decouple.run(["--classifier", "ncm", "--run", "runs/ncm"])
    message = fails_with(capsys, "--classifier", "tau", "--from", "runs/ncm")
    assert "runs/ncm is of stage 2 itself; name the run that it began with: --from runs/ce" in message


def test_how_many_images_may_fail_is_stage_ones(here, monkeypatch):
    config = yaml.safe_load(Path("runs/ce/config.yaml").read_text())
    config["input"]["fault_limit"] = 77
    Path("runs/ce/config.yaml").write_text(yaml.safe_dump(config))
    seen, taken = [], stage_two.feature_bank

    def look(*arguments):
        seen.append(arguments[4].fault_limit)
        return taken(*arguments)

    monkeypatch.setattr(stage_two, "feature_bank", look)
    decouple.run(["--classifier", "ncm", "--run", "runs/ncm"])
    assert set(seen) == {77}
    decouple.run(["--classifier", "ncm", "--run", "runs/own", "--input.fault_limit", "3"])
    assert seen[-1] == 3


def test_a_second_stage_takes_the_settings_of_the_machine_that_messages_name(here, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    original = stage_two.feature_bank
    monkeypatch.setattr(stage_two, "feature_bank", lambda *of: seen.append(torch.get_num_threads()) or original(*of))
    machine = ["--loop.device", "cpu", "--loop.threads", "1", "--input.resident_gb", "1", "--input.decode", "whole"]
    try:
        decouple.run(["--classifier", "ncm", "--run", "runs/ncm", *machine])
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}


def test_features_are_not_kept_under_weights_that_did_not_make_them(here, monkeypatch, capsys):
    original = stage_two.feature_bank

    def meanwhile(*arguments):
        found = original(*arguments)
        for path in Path("runs/ce").glob("model*.safetensors"):  # stage one is trained on
            save_file({name: value * 2 for name, value in load_file(path).items()}, path)
        return found

    monkeypatch.setattr(stage_two, "feature_bank", meanwhile)
    message = fails_with(capsys, "--classifier", "ncm", "--run", "runs/ncm")
    assert "runs/ce was trained on while its features were taken; start again when it is finished" in message
    weights = {json.loads(path.read_text())["weights"] for path in Path("runs/ce/features").glob("*/bank.json")}
    assert len(weights) == 1


def test_a_dry_run_of_mislas_counts_its_smoothings_and_its_features(here, capsys):
    decouple.run(["--classifier", "ncm", "--run", "runs/ncm"])  # leaves stage one's features
    capsys.readouterr()
    decouple.run(["--classifier", "mislas", "--dry-run"])
    printed = capsys.readouterr().out
    assert "for 9 classifiers, each 10 epochs" in printed
    number = re.search(r"([\d,]+) images, of which ([\d,]+) have no features yet", printed)
    assert number[1] == number[2]


def test_who_takes_the_features_anew_meanwhile_changes_no_prediction(here, monkeypatch):
    trained = Passes._train

    def meanwhile(self, source, recipes):
        for path in Path("runs/ce/features").glob("*/seen.npy"):
            seen = np.load(path)
            seen[::2] = False
            np.save(path, seen)  # another stage has begun them anew
        return trained(self, source, recipes)

    monkeypatch.setattr(Passes, "_train", meanwhile)
    decouple.run([*QUICK, "--run", "runs/one", "--method.rates", "[1.0]"])
    assert_predictions_are_the_models("runs/one")


def test_stage_one_may_be_given_more_epochs_while_classifiers_train(here, monkeypatch):
    trained = Passes._train

    def meanwhile(self, source, recipes):
        Path("runs/ce/summary.json").unlink(missing_ok=True)
        return trained(self, source, recipes)

    monkeypatch.setattr(Passes, "_train", meanwhile)
    decouple.run([*QUICK, "--run", "runs/one", "--method.rates", "[1.0]"])
    assert summary_of("runs/one")["title"] == "CE + cRT"


def test_views_change_no_class_weights(here, monkeypatch):
    seen = []

    def look(weighting, counts_C):
        seen.append(counts_C.tolist())
        return class_weights(weighting, counts_C)

    monkeypatch.setattr("train.features.training.class_weights", look)
    quick = [*QUICK, "--method.weights", "effective", "--method.rates", "[1.0]"]
    for views in ("0", "3"):
        decouple.run([*quick, "--input.views", views])
    assert seen[0] == seen[1] == open_dataset("data/digits").train_counts.tolist()


def test_a_dataset_that_was_rebuilt_is_refused(here, capsys):
    build("digits", out=here / "data/other", seed=1, workers=1)
    capsys.readouterr()
    message = fails_with(capsys, "--classifier", "ncm", "--from", "runs/ce", "--data", "data/other")
    assert "does not hold the images that runs/ce was trained on" in message
    assert sorted(p.name for p in Path("runs").iterdir()) == ["ce"]


def test_a_classifier_outside_of_its_section_is_refused(here, capsys):
    Path("a.yaml").write_text("classifier: lws\n")
    assert "belongs in the section method" in fails_with(capsys, "--config", "a.yaml")


def test_decoded_images_go_once_their_features_are_there(here, monkeypatch):
    decoded, taken, splits = (Decoded, torch.device("cpu")), stage_two.feature_bank, {}

    def look(*arguments):
        assert not any(is_kept_with(split, decoded) for split in splits.values())
        found = taken(*arguments)
        splits[arguments[3]] = split = arguments[2].splits[arguments[3]]
        assert is_kept_with(split, decoded)
        return found

    monkeypatch.setattr(stage_two, "feature_bank", look)
    decouple.run(["--classifier", "ncm", "--run", "runs/ncm", "--input.loader", "resident"])
    assert splits.keys() == {"train", "val", "test"}
    assert not any(is_kept_with(split, decoded) for split in splits.values())
