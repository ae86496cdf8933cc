"""A paper's table: planned, trained, resumed and shown beside the paper's figures."""

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

import reproduce
from shards.errors import UserError
from shards.groups import imbalance_factor
from train import decouple

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


def test_the_column_follows_from_the_data(digits, monkeypatch):
    wanted = f"cifar10-{imbalance_factor(digits.train_counts):.0f}"
    columns = ["cifar10-100", wanted, "inat2018"]
    assert reproduce.column_of(digits, columns) is None
    monkeypatch.setitem(digits.manifest, "preset", "inat2018")
    assert reproduce.column_of(digits, columns) == "inat2018"
    monkeypatch.setitem(digits.manifest, "preset", "cifar10")
    assert reproduce.column_of(digits, columns) == wanted


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
            program.check(program.parser.instantiate(program.parser.parse_args(list(words[1:]))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bbn-3", "--data", "nowhere"], "nowhere"),
        (["bbn-3"], "--data DIR is needed"),
        (["bbn-3", "--data", "DIGITS", "--column", "x"], "has no column 'x'"),
        (["bbn-3", "--data", "DIGITS", "--dry-run", "--", "--optim.lrr", "1"], "optim.lrr"),
    ],
)
def test_mistakes_are_one_line(digits, reproduced, words, message):
    status, _, errors = reproduced(*[str(digits.root) if word == "DIGITS" else word for word in words])
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors


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
