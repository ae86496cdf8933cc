"""A paper's table: planned, trained, resumed and shown beside the paper's figures."""

import json
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import reproduce
from shards.build import build
from shards.errors import UserError
from shards.groups import imbalance_factor
from train import afg, decouple
from train.bbn import BBN
from train.engine.config import PRESETS, Input, Loop, make_parser
from train.engine.mixing import make_mixing
from train.engine.model import Model
from train.engine.objectives import make_objective
from train.engine.optimisers import Optim
from train.engine.weights import make_weighting
from train.erm import ERM
from train.features.commands import stage_parser
from train.sdn import SDN

ROOT = Path(__file__).parents[2]
TABLES = yaml.safe_load((ROOT / "scripts/papers.yaml").read_text(encoding="utf-8"))["tables"]
LINES = [(name, row, says) for name, table in TABLES.items() for row, says in table["rows"].items()]


@pytest.mark.parametrize(("name", "row", "says"), LINES, ids=[f"{name}: {row}" for name, row, _ in LINES])
def test_every_line_names_a_launchable_file_and_has_a_figure_for_each_column(name, row, says):
    assert len(says.get("paper", TABLES[name]["figures"])) == len(TABLES[name]["figures"])
    assert ("run" in says) != ("mean_of" in says)
    for other in (says.get("from"), *says.get("mean_of", [])):
        assert other is None or other in TABLES[name]["rows"]
    if "run" in says:
        assert (ROOT / "train" / f"{shlex.split(says['run'])[0]}.py").is_file()


STAGE_ONES = {"erm": ERM, "bbn": BBN, "sdn": SDN}


@pytest.mark.parametrize("words", sorted({says["run"] for _, _, says in LINES if "run" in says}))
def test_every_line_is_understood(words):
    """Those of second stages are read only when stage one has been trained."""
    method, *options = shlex.split(words)
    if method in STAGE_ONES:
        kind = STAGE_ONES[method].Settings
        parser = make_parser(method, "", input=Input, model=Model, method=kind, optim=Optim, loop=Loop)
        parser.add_argument("--variant", type=str)
    else:
        parser = decouple.program().parser if method == "decouple" else stage_parser("afg", "", afg.Settings)
        options = decouple.in_full(options) if method == "decouple" else options
    settings = parser.parse_args(options)
    if settings.variant:
        presets = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in PRESETS.glob("*.yaml")]
        assert settings.variant in {name for preset in presets for name in preset.get("variants", {})}
    if method == "erm":
        make_objective(settings.method.objective, np.array([30, 3]))
        make_mixing(settings.method.mix)
        make_weighting(settings.method.weights)


def test_the_column_follows_from_the_data(digits, monkeypatch):
    wanted = f"cifar10-{imbalance_factor(digits.train_counts):.0f}"
    columns = ["cifar10-100", wanted, "inat2018"]
    assert reproduce.column_of(digits, columns) is None
    options = digits.manifest["options"] | {"imbalance_factor": None}
    for preset, profile, column in (
        ("inat2018", "natural", "inat2018"),
        ("inat2018", "exp", None),  # thinned
        ("cifar10", "exp", wanted),
        ("cifar10", "natural", wanted),
        ("cifar10", "step", None),
    ):
        monkeypatch.setitem(digits.manifest, "preset", preset)
        monkeypatch.setitem(digits.manifest, "options", options | {"profile": profile})
        assert reproduce.column_of(digits, columns) == column


def test_the_column_is_that_of_the_factor_that_was_asked_for(digits, monkeypatch):
    monkeypatch.setitem(digits.manifest, "preset", "cifar100")
    monkeypatch.setitem(digits.manifest, "options", digits.manifest["options"] | {"imbalance_factor": 100.0})
    assert reproduce.column_of(digits, ["cifar100-100"]) == "cifar100-100"


def test_rows_with_commas_in_their_names_can_be_chosen():
    _, rows = reproduce.read_table("bbn-2", None)
    assert [row.name for row in reproduce.chosen_rows(rows, "CE,BBN, 2x")] == ["CE", "BBN, 2x"]
    for table in TABLES:
        rows = reproduce.read_table(table, None)[1]
        for row in rows:
            assert row in reproduce.chosen_rows(rows, row.name)


def test_glags_second_stages_adapt_beta_as_its_table_does():
    commands = [says["run"] for says in TABLES["glag"]["rows"].values() if "from" in says]
    assert len(commands) == 4
    assert all("--variant glag" in command for command in commands)


def test_the_cost_of_a_transformer_is_measured_at_the_size_it_is_trained_at():
    config = {"input": {"image_size": 32, "batch_size": 2}, "model": {"backbone": "timm/test_vit"}}
    assert (
        reproduce.measured_rate(config | {"loop": {"precision": "no"}, "optim": {"accumulate": 1}}, 3, threads=1) > 0
    )  # its own size is 160


def test_rows_bring_what_they_start_from():
    _, rows = reproduce.read_table("bbn-6", "cifar10-50")
    chosen = [row.name for row in reproduce.chosen_rows(rows, "BBN,uniform + reversed")]
    assert chosen == ["uniform sampler", "reversed sampler", "uniform + reversed", "BBN"]
    assert [row.paper for row in rows if row.name == "BBN"] == [17.82]
    with pytest.raises(UserError, match="has no row 'BNN'; it has: uniform sampler"):
        reproduce.chosen_rows(rows, "BNN")
    with pytest.raises(UserError, match="there is no table 'bbn-9'; there are: bbn-1"):
        reproduce.read_table("bbn-9", None)
    with pytest.raises(UserError, match="bbn-3 has no column 'cifar10'; it has: cifar10-50"):
        reproduce.read_table("bbn-3", "cifar10")


def test_folders_of_rows_differ():
    for name in TABLES:
        _, rows = reproduce.read_table(name, None)
        folders = [row.folder(Path("runs"), 0).name for row in rows]
        assert len(set(folders)) == len(folders)
        assert all(folder.replace("-", "").isalnum() for folder in folders)


@pytest.fixture
def reproduced(tmp_path, monkeypatch, capsys):
    """Call it with a command line, in a folder of its own; returns the exit status, and what it printed to either."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("OMP_NUM_THREADS", "1"), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setenv(name, value)  # it sets them, too
    threads = torch.get_num_threads()

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scripts/reproduce.py", *words])
        try:
            reproduce.main()
            status = 0
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


def test_a_table_is_trained_once_and_shown(tmp_path, digits, reproduced):
    options = ["bbn-3", "--data", str(digits.root), "--rows", "reversed sampler", "--seeds", "1", "--epochs", "1"]
    short = ["--", "--input.image_size", "8", "--input.batch_size", "128", "--loop.eval_every", "1"]
    status, said, errors = reproduced(*options, "--threads", "1", *short)
    assert status == 0, errors
    assert "reversed sampler: 0 of 1 finished; 1 epochs, 768 images a run" in said
    table = json.loads((tmp_path / "runs/bbn-3/bbn-3.json").read_text())
    (run,) = table["rows"]["reversed sampler"]["runs"].values()
    assert run["parameters"] > 400_000
    assert run["flops"] > 1e6
    assert (run["seed"], len(run["split"])) == (0, 16)
    assert len(run["curve"]) == 1
    assert "reversed sampler" in (tmp_path / "runs/bbn-3/bbn-3.txt").read_text()
    assert "reversed sampler: 1 of 1 finished" in reproduced(*options, "--dry-run", *short)[1]
    # A finished run is not shown as what it is not.
    other = build("digits", out=tmp_path / "other", seed=1, workers=1)
    status, _, errors = reproduced(*options, "--data", str(other), *short)
    assert (status, "was trained on other images than" in errors) == (2, True)
    status, _, errors = reproduced(*options, "--epochs", "2", *short)
    assert (status, "was begun with optim.epochs=1, and 2 is wanted" in errors) == (2, True)
    status, _, errors = reproduced(*options, *short, "--optim.lr", "0.05")
    assert (status, "was begun with optim.lr=0.1, and 0.05 is wanted" in errors) == (2, True)
    # Nor is one that was cut off resumed, and then shown, as what it is not.
    (tmp_path / "runs/bbn-3/reversed-sampler-0/summary.json").unlink()
    assert reproduced(*options, "--epochs", "2", *short)[0] == 2
    assert reproduced(*options, "--dry-run", *short)[0] == 0


def test_runs_without_the_pretrained_weights_that_were_out_of_reach_go_on(tmp_path, digits):
    """What --print_config says then is another recipe, of more epochs: it does not try to reach them."""
    asked = SimpleNamespace(seeds=1, runs=tmp_path, data="data/x")
    row = reproduce.Row("CE", ("erm",), None, (), None)
    (tmp_path / "ce-0").mkdir()
    wanted = {"model": {"weights": "default"}, "method": {}, "optim": {"epochs": 30}, "loop": {}}
    wanted["input"] = dict.fromkeys(reproduce.COMPARED["input"], 8)
    saved = wanted | {"about": {"preset": {"fitted": {}}}, "model": {"weights": None}, "optim": {"epochs": 170}}
    for fitted in ({"model": {"weights": None}}, {}):
        saved["about"]["preset"]["fitted"] = fitted
        (tmp_path / "ce-0/config.yaml").write_text(yaml.safe_dump(saved))
        with nullcontext() if fitted else pytest.raises(UserError, match="weights=None, and default is wanted"):
            reproduce.check_begun(row, asked, digits, wanted)


def test_a_mean_that_cannot_be_had_leaves_the_other_rows(tmp_path, digits, reproduced, monkeypatch):
    def refuse(runs):
        raise UserError("a kept 100 of 8142 classes' probabilities")

    monkeypatch.setattr(reproduce, "ensemble", refuse)
    words = ["bbn-6", "--data", str(digits.root), "--rows", "uniform + reversed", "--seeds", "1", "--epochs", "1"]
    short = ["--input.image_size", "8", "--input.batch_size", "128"]
    status, said, errors = reproduced(*words, "--threads", "1", "--", *short)
    assert status == 0, errors
    assert "uniform + reversed, seed 0, is left out: a kept 100 of 8142" in said
    assert "reversed sampler" in (tmp_path / "runs/bbn-6/bbn-6.txt").read_text()


def test_figure_2_plans_nine_second_stages_that_parse(digits, reproduced):
    status, said, errors = reproduced("bbn-fig2", "--data", str(digits.root), "--seeds", "1", "--dry-run")
    assert status == 0, errors
    planned = [line for line in said.splitlines() if "a second stage on the features of" in line]
    manners = ("CE", "RW", "RS")
    assert [line.split(":")[0].strip() for line in planned] == [
        f"{features} features, {classifier} classifier" for features in manners for classifier in manners
    ]
    for table in ("bbn-fig2", "bbn-5"):
        _, rows = reproduce.read_table(table, None)
        for words in {row.words for row in rows if row.source}:
            program = decouple.program()
            program.check(program.parser.instantiate(program.parser.parse_args(decouple.in_full(words[1:]))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bbn-3", "--data", "nowhere"], "nowhere"),
        ([], "error: name a table, such as bbn-1; --list shows them"),
        (["bbn-3"], "--data DIR is needed"),
        (["bbn-3", "--seed", "x"], "invalid int value: 'x'"),
        (["bbn-3", "--data", "DIGITS", "--column", "x"], "has no column 'x'"),
        (["bbn-3", "--data", "DIGITS", "--dry-run", "--", "--optim.lrr", "1"], "optim.lrr"),
    ],
)
def test_mistakes_are_one_line(digits, reproduced, words, message):
    status, _, errors = reproduced(*[str(digits.root) if word == "DIGITS" else word for word in words])
    assert status == 2
    assert message in errors
    assert errors.startswith("scripts/reproduce.sh: error: ")
    assert errors.count("\n") == 1


def test_signals_that_reach_every_process_stop_the_run_under_way_with_a_checkpoint(tmp_path, digits, signalled):
    words = ["bbn-1", "--data", digits.root, "--rows", "CE", "--seeds", 1, "--epochs", 500, "--threads", 1]
    status, said = signalled(
        [ROOT / "scripts/reproduce.py", *words, "--runs", tmp_path, "--", "--input.image_size", 8],
        tmp_path / "ce-0/metrics.jsonl",
        (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP),
    )
    assert status == 75, said
    assert list(tmp_path.glob("ce-0/checkpoints/step-*"))
    assert f"stopped, with a checkpoint of {tmp_path}/ce-0" in said
