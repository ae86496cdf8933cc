"""Trains a paper's table on a dataset, and shows our figures beside the paper's: scripts/reproduce.sh runs it.

    scripts/reproduce.sh bbn-1 --data data/cifar10 --seeds 3
    scripts/reproduce.sh bbn-1 --data data/cifar10 --rows CE,BBN --epochs 20 --dry-run
    scripts/reproduce.sh bbn-1 --data data/cifar10 -- --loop.precision bf16       options of every stage one

The tables lie in scripts/papers.yaml. It prints what it will train and what that costs, skips what is finished,
resumes what was cut off, and stops cleanly on SIGTERM, Ctrl-C and the like: the run under way writes a checkpoint, and
the same command resumes it. Results go to RUNS/TABLE.txt and RUNS/TABLE.json; the latter keeps commands, commits,
hardware and the curve of every run.
"""

import argparse
import math
import os
import runpy
import shlex
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from analysis.ensemble import ensemble
from analysis.runs import Run, read_run
from bench.common import OneLineParser, header, write_results
from pipeline.fork_server import LEFT_ALONE, fork_server
from shards.cores import cores
from shards.errors import UserError, user_errors_exit_2
from shards.groups import imbalance_factor
from shards.index import Dataset, open_dataset
from train.engine.limits import SCHEDULE
from train.engine.runs import read_config
from train.networks.model_files import load_model
from train.networks.networks import build_network

ROOT = Path(__file__).resolve().parents[1]
PAPERS = Path(__file__).with_name("papers.yaml")
STREAMS = {"bbn": 2, "sdn": 2}
STOPPED = 75
# What makes two runs the same training: of the sections that name no settings, all of them.
COMPARED: dict[str, tuple[str, ...]] = {
    "input": ("image_size", "batch_size", "augment"),
    "model": (),
    "method": (),
    "optim": (),
}
# Each run is a process of its own, forked from one that has imported what takes seconds.
IMPORTED = ["accelerate", "train.engine.launch", "train.features.stage_two", "train.networks.networks"]


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: as the paper calls it.
        words: the launchable file and its options; empty for a mean of others.
        source: the row that a second stage starts from.
        mean_of: the rows whose probabilities are averaged.
        paper: the paper's figure for the data at hand, in percent.
    """

    name: str
    words: tuple[str, ...]
    source: str | None
    mean_of: tuple[str, ...]
    paper: float | None

    def folder(self, runs: Path, seed: int) -> Path:
        """Return where the run of a seed lies."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower().replace("+", "and"))
        return runs / f"{'-'.join(filter(None, plain.split('-')))}-{seed}"


def read_table(name: str, column: str | None) -> tuple[dict[str, Any], list[Row]]:
    """Read a table of papers.yaml, with the figures of one of its columns."""
    tables = yaml.safe_load(PAPERS.read_text(encoding="utf-8"))["tables"]
    if name not in tables:
        raise UserError(f"there is no table {name!r}; there are: {', '.join(tables)}")
    table = tables[name]
    columns = table["figures"]
    if column is not None and column not in columns:
        raise UserError(f"{name} has no column {column!r}; it has: {', '.join(columns) or 'none'}")
    rows = []
    for row, says in table["rows"].items():
        figures = dict(zip(columns, says.get("paper", []), strict=True)) if "paper" in says else {}
        words = tuple(shlex.split(says.get("run", "")))
        rows.append(Row(row, words, says.get("from"), tuple(says.get("mean_of", ())), figures.get(column)))
    return table, rows


def column_of(dataset: Dataset, columns: list[str]) -> str | None:
    """Return the paper's column that a dataset is of: its preset, with its imbalance factor where it has several."""
    preset, options = dataset.manifest["preset"], dataset.manifest["options"]
    profile = options.get("profile", "natural")
    # What was asked for comes first: the counts of small classes cannot have the very factor.
    factors = [options.get("imbalance_factor"), imbalance_factor(dataset.train_counts)]
    # Papers' factors are of the exponential profile, also where its images were chosen before.
    wanted = [preset] if profile == "natural" else []
    wanted += [f"{preset}-{factor:.0f}" for factor in factors if factor and profile in ("natural", "exp")]
    return next((column for column in wanted if column in columns), None)


def chosen_rows(rows: list[Row], names: str | None) -> list[Row]:
    """Return the rows that are asked for, and those that they need, in the table's order."""
    if names is None:
        return rows
    by_name = {row.name: row for row in rows}
    wanted: set[str] = set()

    def take(name: str) -> None:
        if name not in by_name:
            raise UserError(f"the table has no row {name!r}; it has: {', '.join(by_name)}")
        wanted.add(name)
        for other in (by_name[name].source, *by_name[name].mean_of):
            if other is not None:
                take(other)

    parts = [part.strip() for part in names.split(",")]
    while parts:  # a name may have commas of its own
        longest = next((n for n in range(len(parts), 1, -1) if ", ".join(parts[:n]) in by_name), 1)
        take(", ".join(parts[:longest]))
        del parts[:longest]
    return [row for row in rows if row.name in wanted]


def command(row: Row, asked: argparse.Namespace, seed: int) -> list[str]:
    """Return the command that trains a row."""
    method, *options = row.words
    words = [sys.executable, str(ROOT / "train" / f"{method}.py"), "--data", asked.data, *options]
    words += ["--loop.seed", str(seed)]
    if row.source is None:
        words += ["--optim.epochs", str(asked.epochs)] * (asked.epochs is not None) + asked.options
    return words


def resolved(row: Row, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration that a stage one would run with; this also finds mistakes before anything is trained."""
    with tempfile.TemporaryDirectory() as folder:
        said, errors = Path(folder, "said"), Path(folder, "errors")
        child = started([*command(row, asked, 0)[1:], "--print_config"], said, errors)
        child.join()
        if child.exitcode:
            lines = errors.read_text().strip().splitlines() or [str(child.exitcode)]
            raise UserError(f"{row.name}: {lines[-1]}")
        config: dict[str, Any] = yaml.safe_load(said.read_text())
    return config


def environment(asked: argparse.Namespace) -> dict[str, str]:
    """Return what a run's process shall see."""
    return {"OMP_NUM_THREADS": str(asked.threads), "PYTHONPATH": str(ROOT)}


def measured_rate(config: dict[str, Any], classes: int, threads: int) -> float:
    """Return the images per second of a plain step, forward and backward, from a few of them."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # As many as a step works on at once, and no more than it takes to know the rate.
    most = 128 if device == "cuda" else 16
    at_once = config["input"]["batch_size"] // config["optim"]["accumulate"]
    size, batch = config["input"]["image_size"], max(2, min(at_once, most))
    network = build_network("plain", config["model"]["backbone"], classes, image_size=size).to(device)
    images_BHWC = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    labels_B = torch.zeros(batch, dtype=torch.int64, device=device)
    seconds = math.inf
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=config["loop"]["precision"] in ("bf16", "fp16")):
            logits_BC = network(images_BHWC)
        F.cross_entropy(logits_BC, labels_B).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    if device == "cuda":
        del network, images_BHWC, labels_B, logits_BC
        torch.cuda.empty_cache()  # the runs need it: this process only waits for them
    return batch / seconds


def check_begun(row: Row, asked: argparse.Namespace, dataset: Dataset, config: dict[str, Any]) -> None:
    """Refuse to show, or to resume, runs as what they are not (UserError): of other images, or with other settings."""
    for seed in range(asked.seeds):
        folder = row.folder(asked.runs, seed)
        if not (folder / "config.yaml").exists():
            continue
        saved = read_config(folder)
        about = saved["about"]
        if about.get("fingerprint") not in (None, dataset.fingerprint):
            raise UserError(f"{folder} was trained on other images than {asked.data} has; give another --runs")
        if "model" in about.get("preset", {}).get("fitted", {}):
            continue  # pretrained weights were out of reach, which --print_config does not try: it had another recipe
        by_budget = () if config["loop"].get("budget") is None else SCHEDULE
        for section, keys in COMPARED.items():
            for key in keys or config[section].keys() - set(by_budget):
                wanted = config[section][key]
                if (ours := saved.get(section, {}).get(key, wanted)) != wanted:
                    raise UserError(
                        f"{folder} was begun with {section}.{key}={ours}, and {wanted} is wanted; give another --runs"
                    )


def plan(rows: list[Row], asked: argparse.Namespace, dataset: Dataset) -> None:
    """Print what is finished, what is left, and what it costs."""
    rate, total = None, 0.0
    for row in rows:
        if not row.words:
            continue
        left = [s for s in range(asked.seeds) if not (row.folder(asked.runs, s) / "summary.json").exists()]
        state = f"{asked.seeds - len(left)} of {asked.seeds} finished"
        if row.source is not None:
            print(f"  {row.name}: {state}; a second stage on the features of {row.source}")
            continue
        config = resolved(row, asked)
        check_begun(row, asked, dataset, config)
        batch, epochs = config["input"]["batch_size"], config["optim"]["epochs"]
        streams = STREAMS.get(row.words[0], 1) + ("partner_q=" in str(config["method"].get("mix")))
        images = max(1, int(dataset.train_counts.sum()) // batch) * batch * epochs * streams
        rate = rate or (measured_rate(config, len(dataset.classes), asked.threads) if left else None)
        hours = len(left) * images / rate / 3600 if rate else 0.0
        total += hours
        print(f"  {row.name}: {state}; {epochs} epochs, {images:,} images a run, {hours:.1f} hours left")
    if rate:
        print(f"{total:.1f} hours left at {rate:,.0f} images/s with {asked.threads} threads (measured on a few steps)")


def started(words: list[str], log: Path, errors: Path | None = None) -> BaseProcess:
    """Return a process that runs a launchable file with its options."""
    child = fork_server(IMPORTED).Process(target=launch, args=(words, log, errors))
    child.start()
    return child


def launch(words: list[str], log: Path, errors: Path | None) -> None:
    """Run a launchable file with its options in this process, whose output goes to a log, and errors to their own."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_ALONE)
    for path, descriptor in ((log, 1), (errors or log, 2)):
        with path.open("a") as output:
            os.dup2(output.fileno(), descriptor)
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    runpy.run_path(words[0], run_name="__main__")


def train(row: Row, asked: argparse.Namespace, seed: int) -> None:
    """Train one run, or resume it, unless it is finished.

    Raises:
        SystemExit: it was stopped by a signal, which left a checkpoint.
        UserError: it failed.
    """
    folder = row.folder(asked.runs, seed)
    if (folder / "summary.json").exists():
        return
    words = [*command(row, asked, seed), "--run", str(folder)]
    if row.source is not None:
        words += ["--from", str(next(r for r in asked.chosen if r.name == row.source).folder(asked.runs, seed))]
    if (folder / "config.yaml").exists():
        words.append("--resume")
    log = folder.with_name(f"{folder.name}.log")
    print(f"{row.name}, seed {seed}: {log}", flush=True)
    child = started(words[1:], log)
    # What reaches every process is heard twice by the run, for which a second SIGINT means: at once.
    obeyed = [number for number in LEFT_ALONE if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, lambda *_: child.terminate()) for number in obeyed}
    child.join()
    status = child.exitcode
    for number, handler in before.items():
        signal.signal(number, handler)
    if status == STOPPED:
        print(f"stopped, with a checkpoint of {folder}; the same command resumes it")
        sys.exit(STOPPED)
    if status:
        raise UserError(f"{row.name} ended with {status}; {log} says why: {log.read_text()[-300:].strip()}")


def best_epoch(run: Run) -> dict[str, Any] | None:
    """Return the best epoch by the split that was reported: what papers call their result, and never ours."""
    seen = [row for row in run.epochs if row.get("eval", {}).get("split") == run.summary["evaluated_on"]]
    best = max(seen, key=lambda row: row["eval"]["top1"], default=None)
    return None if best is None else {"epoch": best["epoch"], "top1": best["eval"]["top1"]}


def settings_of(run: Run) -> dict[str, Any]:
    """Return what a run's configuration says of it: its seed, and what its dataset's training split comes down to."""
    config = yaml.safe_load(run.config)
    return {"seed": run.summary["seed"], "split": config["about"].get("fingerprint")}


def shape_of(run: Run) -> dict[str, Any]:
    """Return how large a run's network is: parameters, and multiply-adds times two of one image."""
    size = yaml.safe_load(run.config)["input"].get("image_size")
    if size is None:  # a second stage
        return {}
    network = load_model(run.path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.predict(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    return {"parameters": sum(p.numel() for p in network.parameters()), "flops": counter.get_total_flops()}


def results(table: dict[str, Any], rows: list[Row], asked: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return our figures beside the paper's, as text and as data; rows that are not finished yet are left out."""
    error = table["prints"] == "error"

    def shown(value: float) -> float:
        return 100 * (1 - value if error else value)

    lines = [f"{table['title']} ({table['prints']}, %; {table['source']})", ""]
    lines.append(f"{'':<34}{'ours, last epoch':>20}{'n':>3}{'best by test':>14}{'paper':>8}")
    data: dict[str, Any] = {}
    left_out: list[str] = []
    for row in rows:
        found: dict[int, float] = {}
        best: list[float] = []
        kept: dict[str, Any] = {}
        for seed in range(asked.seeds):
            if row.mean_of:
                others = [next(r for r in rows if r.name == name).folder(asked.runs, seed) for name in row.mean_of]
                if all((other / "summary.json").exists() for other in others):
                    try:
                        found[seed] = ensemble([read_run(other) for other in others])["top1"] or 0.0
                    except UserError as error:  # runs keep the likeliest classes of many only
                        left_out.append(f"{row.name}, seed {seed}, is left out: {error}")
                continue
            folder = row.folder(asked.runs, seed)
            if not (folder / "summary.json").exists():
                continue
            run = read_run(folder)
            found[seed] = run.last["top1"] or 0.0
            top = best_epoch(run)
            best += [top["top1"]] if top else []
            kept[run.name] = {
                **{
                    key: run.summary.get(key) for key in ("last", "selected", "images_per_second", "seconds", "command")
                },
                "environment": run.summary["environment"],
                "best_by_test": top,
                **settings_of(run),
                **shape_of(run),
                "curve": [[e["epoch"], e["loss"], e.get("eval", {}).get("top1")] for e in run.epochs],
            }
        data[row.name] = {"paper": row.paper, "runs": kept, "top1": list(found.values())}
        if found:
            ours = [shown(value) for value in found.values()]
            spread = f" ± {statistics.stdev(ours):.2f}" if len(ours) > 1 else ""
            own = f"{statistics.mean(shown(b) for b in best):.2f}" if best else "–"
            paper = "–" if row.paper is None else f"{row.paper:.2f}"
            figures = f"{statistics.mean(ours):.2f}{spread}"
            lines.append(f"{row.name:<34}{figures:>20}{len(ours):>3}{own:>14}{paper:>8}")
    return "\n".join([*lines, *left_out]), data


def main() -> None:
    """Read the command line and reproduce the table."""
    parser = OneLineParser("scripts/reproduce.sh", __doc__)
    parser.add_argument("table", nargs="?", help="a name of scripts/papers.yaml, such as bbn-1")
    parser.add_argument("--list", action="store_true", help="list the tables")
    parser.add_argument("--data", help="the dataset's folder")
    parser.add_argument("--runs", type=Path, help="the folder of all runs (default: runs/TABLE)")
    parser.add_argument(
        "--rows", help="some of the table's rows, separated by commas; what they start from comes along"
    )
    parser.add_argument("--column", help="the paper's figures to show, such as cifar10-100 (default: by the dataset)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--epochs", type=int, help="of every stage one, whose schedule scales (default: the preset's)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of a run")
    parser.add_argument("--dry-run", action="store_true", help="only print what it would train, and what that costs")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked = parser.parse_args(sys.argv[1:split])
    asked.options = sys.argv[split + 1 :]
    if asked.list:
        for name, table in yaml.safe_load(PAPERS.read_text(encoding="utf-8"))["tables"].items():
            print(f"{name:<14}{table['title']}")
        return
    if asked.table is None:
        parser.error("name a table, such as bbn-1; --list shows them")
    if asked.data is None or min(asked.seeds, asked.threads, asked.epochs or 1) < 1:
        parser.error("--data DIR is needed, and --seeds, --epochs and --threads are at least 1")
    with user_errors_exit_2("scripts/reproduce.sh"):
        dataset = open_dataset(asked.data)
        table, _ = read_table(asked.table, None)
        column = asked.column or column_of(dataset, table["figures"])
        table, every = read_table(asked.table, column)
        rows = chosen_rows(every, asked.rows)
        asked.chosen, asked.runs = rows, asked.runs or Path("runs", asked.table)
        print(f"{table['title']} on {dataset.name}; the paper's column: {column or 'none'} -> {asked.runs}")
        os.environ |= environment(asked)
        plan(rows, asked, dataset)
        if asked.dry_run:
            return
        asked.runs.mkdir(parents=True, exist_ok=True)
        for seed in range(asked.seeds):
            for row in rows:
                if row.words:
                    train(row, asked, seed)
        text, data = results(table, rows, asked)
        (asked.runs / f"{asked.table}.txt").write_text(text + "\n", encoding="utf-8")
        about = {"table": table["title"], "source": table["source"], "column": column, "dataset": dataset.name}
        counts = dataset.train_counts.tolist()
        write_results(
            asked.runs / f"{asked.table}.json",
            header(torch=torch.__version__) | about | {"train_counts": counts, "rows": data},
        )
        print(text)


if __name__ == "__main__":
    main()
