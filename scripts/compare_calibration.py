"""What calibration and a prior do on the test split of finished runs, each of which must have a val split.

    .venv/bin/python scripts/compare_calibration.py RUN… [--out table.md] [--json results.json]

For the last weights, and for those that val chose: temperature and τ are fitted to val as `train.calibrate` does, then
test is looked at, as `predictions.npz` keeps it (at most 100 classes, for which it has all probabilities). Nothing is
written into the runs. The expected calibration error (15 bins) and the balanced accuracy on test are given

    as it is         the network's own probabilities
    calibrated       by temperature and τ; made for the class shares of val
    even             the network's own, divided by the class shares of train: `--prior uniform`, logit adjustment
    calibrated even  calibrated, then brought from the class shares of val to equal ones
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.metrics import percent, summarize, tally
from bench.common import OneLineParser, header, write_results
from shards.atomic import write_text
from shards.errors import UserError, user_errors_exit_2
from train.calibrate import calibrate
from train.card import plain
from train.engine.calibration import Calibration, probabilities
from train.engine.inference import open_model
from train.engine.predictions import kept_arrays, read_predictions, read_val_logits
from train.engine.runs import read_summary
from train.networks.model_files import choose_weights

WAYS = ("as it is", "calibrated", "even", "calibrated even")
LEAST_SCORE = np.finfo(np.float32).tiny  # what lies below it counts as this in a logarithm


def compare(run: Path) -> list[dict[str, Any]]:
    """Return a row for each kind of weights that a run has.

    Raises:
        UserError: no finished run, no val split, or more than 100 classes.
    """
    model, summary = open_model(run), read_summary(run)
    counts, tested = model.description.train_counts, summary["evaluated_on"]
    rows = []
    for weights in dict.fromkeys(["last", choose_weights(run, None)]):
        if "val_logits" not in kept_arrays(run, weights):
            raise UserError(f"{run} has no val split to calibrate on; leave it out")
        logits_MC, labels_M = read_val_logits(run, weights, len(counts))
        found, _ = calibrate(logits_MC, labels_M, counts)  # before anything of test is read
        test_NC, labels_N = test_logits(run, weights, tested, len(counts))
        own, even_C = Calibration.none(counts), np.full(len(counts), 1 / len(counts))
        ways: dict[str, tuple[Calibration, Any]] = {"as it is": (own, None), "calibrated": (found, None)}
        ways |= {"even": (own, even_C), "calibrated even": (found, even_C)}
        figures: dict[str, dict[str, Any]] = {}
        for way, (calibration, prior_C) in ways.items():
            p_NC = probabilities(test_NC, calibration, counts, prior_C)
            accuracies = summarize(tally(np.log(np.maximum(p_NC, LEAST_SCORE)), labels_N), counts)
            right_N = np.maximum(p_NC[np.arange(len(labels_N)), labels_N], LEAST_SCORE)
            figures[way] = accuracies | {"nll": float(-np.log(right_N).mean())}
        row = {"run": run.name, "dataset": summary["dataset"], "title": summary["title"], "seed": summary["seed"]}
        row |= {"weights": weights, "val_images": len(labels_M), "test_images": len(labels_N)}
        row |= {"temperature": found.temperature, "tau": found.tau, "figures": figures}
        rows.append(row | {"ece_not_higher": figures["calibrated"]["ece"] <= figures["as it is"]["ece"]})
    return rows


def test_logits(run: Path, weights: str, split: str, num_classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return logits of the evaluated images, (N, C), up to a constant each, out of what is kept of them; and labels."""
    names = [f"{split}_{what}" for what in ("labels", "topk_labels", "topk_scores")]
    labels_N, order_NK, scores_NK = read_predictions(run, weights, *names)
    if order_NK.shape[1] < num_classes:
        raise UserError(f"{run} keeps {order_NK.shape[1]} of {num_classes} classes of each image; compare smaller ones")
    logits_NC = np.empty(order_NK.shape)
    np.put_along_axis(logits_NC, order_NK.astype(np.int64), np.log(np.maximum(scores_NK, LEAST_SCORE)), axis=1)
    return logits_NC, labels_N


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: the calibration error and the balanced accuracy, in percent, of each way."""
    columns = [f"{what}, {way}" for what in ("ECE", "balanced") for way in WAYS]
    lines = [
        f"| dataset | run | weights | val / test | T | τ | {' | '.join(columns)} |",
        f"|{' --- |' * 3}{' ---: |' * (3 + len(columns))}",
    ]
    for row in rows:
        figures = row["figures"]
        cells = [f"{100 * figures[way]['ece']:.2f}" for way in WAYS]
        cells += [percent(figures[way]["balanced_accuracy"]) for way in WAYS]
        about = [plain(row["dataset"]), plain(f"{row['title']} ({row['run']})"), row["weights"]]
        about += [f"{row['val_images']:,} / {row['test_images']:,}", f"{row['temperature']:.2f}", f"{row['tau']:.2f}"]
        lines.append(f"| {' | '.join([*about, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line and compare."""
    parser = OneLineParser("scripts/compare_calibration.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="the table's file; it is printed, too")
    parser.add_argument("--json", type=Path, help="the file of all figures")
    asked = parser.parse_args()
    with user_errors_exit_2("scripts/compare_calibration.py"):
        rows = [row for run in asked.runs for row in compare(run)]
        print(table(rows))
        higher = [f"{row['run']} ({row['weights']})" for row in rows if not row["ece_not_higher"]]
        print(f"calibration error on test: {'higher for ' + ', '.join(higher) if higher else 'nowhere higher'}")
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(asked.out, table(rows) + "\n")
        if asked.json:
            write_results(asked.json, header(scipy=version("scipy")) | {"rows": rows})


if __name__ == "__main__":
    main()
