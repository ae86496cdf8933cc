"""What a finished second stage leaves: the model with its new classifier, rows, predictions and the summary."""

import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.metrics import summarize
from train.engine import runs
from train.engine.diagnostics import write_diagnostics
from train.engine.evaluation import describe, device_name, report_faults, write_results
from train.engine.predictions import Collector, write_predictions
from train.features import passes
from train.features.candidates import Candidate
from train.features.classifiers import FEATURES_PER_BLOCK, measure
from train.features.shift import FOLDER as SHIFTED
from train.features.stage_two import Stage
from train.networks.model_files import SELECTED_FILE, save_model, save_selected_model


def close_stage(
    stage: Stage,
    title: str,
    last: Candidate,
    selected: dict[str, Any] | None = None,
    winner: nn.Linear | None = None,
    beta_C: Tensor | None = None,
    export: Callable[[], None] | None = None,
    **more: Any,
) -> None:
    """Evaluate the classifier on the test split and leave a finished run folder.

    Args:
        stage: from `open_stage`.
        title: what tables call the stage; stage one's title comes before it.
        last: the stage's own classifier, which takes the place of stage one's.
        selected: what is said of the selected one, whose figures and file are added.
        winner: the selected classifier.
        beta_C: β of each class, where there are several; nan for head classes, which borrow nothing.
        export: writes what lies outside of the run's folder; a stop in the middle of it can be resumed.
        more: further keys of summary.json.
    """
    ranks = stage.accelerator.num_processes  # each saw its share
    rows = [
        {**row, "images_per_second": ranks * row["images_per_second"]}
        for row in (last.trained.rows if last.trained else [])
    ]
    final, _ = measure(last.linear, stage.judge.test)
    if selected is not None and winner is not None:
        selected |= {"file": SELECTED_FILE, **stage.judge.report(winner)}
    seconds = time.perf_counter() - stage.started
    summary = {
        "method": stage.name,
        "title": f"{stage.source_title} + {title}",
        "stage": 2,
        "from": stage.source.resolve().name,
        "from_weights": stage.weights,
        "dataset": stage.dataset.name,
        "seed": stage.config.loop.seed,
        "epochs": len(rows),
        "last": summarize(final, stage.dataset.train_counts),
        "selected": selected,
        "selected_on": stage.watched if selected else None,
        "held_out_images_per_class": stage.judge.images_per_class,
        "evaluated_on": stage.tested,
        **more,
        "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows) if rows else None,
        "seconds": seconds,
        "faults": report_faults(stage.dataset, stage.accelerator),
        "environment": runs.environment(device_name(stage.accelerator.device), stage.accelerator.num_processes),
        "command": runs.command(),
    }
    if stage.accelerator.is_main_process:
        stage.network.classifier = last.linear
        save_model(stage.network, stage.run_folder)
        epochs = {"last": len(rows)}
        if winner is not None:
            stage.network.classifier = winner
            save_selected_model(stage.network, stage.run_folder)
            stage.network.classifier = last.linear
            epochs["selected"] = selected["epoch"] if selected else len(rows)
        keep_predictions(stage, last.linear, "last")
        if winner is not None:
            keep_predictions(stage, winner, "selected")
        describe(stage.run_folder, stage.network, stage.dataset, stage.input, summary, epochs)
        write_diagnostics(stage.run_folder, stage.network, beta=beta_C)
        (stage.run_folder / "metrics.jsonl").touch()
        for row in rows:
            runs.append_row(stage.run_folder, {**row, "seconds": seconds})
        if export is not None:
            export()
        write_results(stage.run_folder, summary, final, stage.dataset)
        for folder in (passes.FOLDER, SHIFTED):
            shutil.rmtree(stage.run_folder / folder, ignore_errors=True)


@torch.no_grad()
def keep_predictions(stage: Stage, linear: nn.Linear, weights: str) -> None:
    """Write what a classifier says of the features of test, and of val where there is one beside it."""
    kept = {}
    for name, bank in ((stage.tested, stage.judge.test), ("val", stage.judge.watched)):
        if bank is not None:
            collector = Collector(linear.out_features, logits=name != stage.tested)
            ids_N = stage.ids[name]
            for ids_B, features_BD, labels_B in zip(
                np.split(ids_N, range(FEATURES_PER_BLOCK, len(ids_N), FEATURES_PER_BLOCK)),
                *(part.split(FEATURES_PER_BLOCK) for part in bank),
                strict=True,
            ):
                collector.add(ids_B, labels_B, linear(features_BD.float()))
            kept[name] = collector.gather()
    write_predictions(stage.run_folder, kept, weights)
