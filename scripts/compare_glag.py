"""GLAG's comparison (Zhang and Xiang 2022, Table 7) on a dataset, which must have a val split.

    python scripts/compare_glag.py data/cifar100 runs/glag
    python scripts/compare_glag.py data/cifar100 runs/glag --jobs 2 -- --optim.epochs 20    options of stage one

Stage one is trained with CE and with GraLoss, on a cosine and with the weight decay of the paper's section 5.1. On the
features of each, AFG is trained with β selected, adaptive and the paper's, without distillation, and with a smaller
head: where classes have thousands of images, more than 100 is not yet head, so a fifth of the largest class decides, as
100 of 500 do in the paper's CIFAR-100-LT. The first is compared with all of train/features/candidates.py.
`RUNS/table.txt` and `table.json` hold means and spreads over seeds, the latter each run's figures, too. Given again,
the command resumes where it was cut off.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from analysis.compare import group_runs
from analysis.runs import read_runs
from analysis.tables import blocks, json_row, table
from bench.common import OneLineParser, header, write_results
from shards.cores import cores
from shards.errors import UserError, user_errors_exit_2
from shards.index import Dataset, open_dataset

ROOT = Path(__file__).resolve().parents[1]
STAGE_ONE = {
    "ce": ["--method.objective", "ce"],
    "gradual": ["--method.objective", "gradual"],
}
SCHEDULE = ["--optim.schedule", "cosine", "--optim.weight_decay", "5e-4"]


def stage_two(dataset: Dataset) -> dict[str, list[str]]:
    """Return the options of each run of stage two."""
    alone = ["--method.baselines", "false"]
    return {
        "afg": [],
        "adaptive": ["--method.beta", "adaptive", *alone],
        "fixed": ["--method.beta", "0.6", *alone],
        "undistilled": ["--method.distill", "0", *alone],
        "fifth": ["--method.head_above", str(int(dataset.train_counts.max()) // 5), *alone],
    }


def launch(program: str, run: Path, options: list[str], threads: int) -> None:
    """Finish a run in a process of its own, whose output goes beside it, unless it is finished."""
    if (run / "summary.json").exists():
        return
    if (run / "config.yaml").exists():
        if program == "train/erm.py":
            options = [*options, "--resume"]
        else:
            shutil.rmtree(run)  # a second stage is short: it starts over
    command = [sys.executable, str(ROOT / program), "--run", str(run), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    log = run.with_suffix(".log")
    with log.open("a") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise UserError(f"{program} ended with {ended.returncode}; {log} says why: {log.read_text()[-300:].strip()}")
    print(f"{run} is finished", flush=True)


def finish(dataset: Dataset, runs: Path, objective: str, seed: int, options: list[str], threads: int) -> list[Path]:
    """Train one network, and all that is trained on its features; return the runs."""
    common = ["--data", dataset.place, "--loop.seed", str(seed)]
    first = runs / f"{objective}-{seed}"
    launch("train/erm.py", first, [*common, *STAGE_ONE[objective], *SCHEDULE, *options], threads)
    seconds = {first.with_name(f"{first.name}-{name}"): chosen for name, chosen in stage_two(dataset).items()}
    for run, chosen in seconds.items():
        launch("train/afg.py", run, [*common, "--from", str(first), *chosen], threads)
    return [first, *seconds]


def main() -> None:
    """Read the command line and run the comparison."""
    usage = "%(prog)s [-h] [--seeds SEEDS] [--jobs JOBS] data runs [-- OPTIONS OF STAGE ONE]"
    parser = OneLineParser("scripts/compare_glag.py", __doc__, usage=usage)
    parser.add_argument("data", help="the dataset's folder")
    parser.add_argument("runs", type=Path, help="the folder of all runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, which share the cores (default: 1)")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if asked.seeds < 1 or asked.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    with user_errors_exit_2("scripts/compare_glag.py"):
        dataset = open_dataset(asked.data)
        if "val" not in dataset.splits:
            raise UserError(f"{asked.data} has no val split to choose β on; build it with --val-fraction 0.1")
        asked.runs.mkdir(parents=True, exist_ok=True)
        threads = max(1, cores() // asked.jobs)
        pool = ThreadPoolExecutor(asked.jobs)
        try:
            jobs = [
                pool.submit(finish, dataset, asked.runs, objective, seed, options, threads)
                for seed in range(asked.seeds)
                for objective in STAGE_ONE
            ]
            runs = [run for job in jobs for run in job.result()]
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C, or one that failed, begins no more
        finished = read_runs(runs)
        entries = group_runs(finished)
        (asked.runs / "table.txt").write_text(table(blocks(entries, baselines=True)) + "\n")
        results = {
            "rows": [json_row(entry) for entry in entries],
            "runs": {
                run.name: {"commit": run.summary["environment"].get("commit")}
                | {key: run.summary.get(key) for key in ("last", "beta", "baselines")}
                for run in finished
            },
        }
        write_results(asked.runs / "table.json", header(torch=version("torch")) | results)
        print((asked.runs / "table.txt").read_text())


if __name__ == "__main__":
    main()
