"""Made-up runs: folders as training leaves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from analysis.metrics import Tally, summarize


def write_config(
    path: Path, epochs: int, summary: dict[str, Any], settings: dict[str, Any], changed: list[str] | None
) -> None:
    """Write a configuration in the form of training's, of the run's own stage."""
    config: dict[str, Any] = {
        "about": {"method": "bbn", "dataset": "digits", "data": f"data/{path.name}"},
        "input": {"image_size": 16, "batch_size": 16, "loader": "auto", "augment": "shift", "threads": 2},
        "model": {"backbone": "resnet32", "weights": None},
        "method": {"adaptor": "parabolic_decay", "q": -1.0},
        "optim": {"epochs": epochs, "lr": 0.1, "milestones": [0.6, 0.8], "ema": None},
        "loop": {"seed": summary.get("seed", 0), "device": "auto", "track": "none"},
    }
    if summary.get("stage") == 2:
        config["about"] |= {"method": "afg", "from": f"runs/{summary['from']}"}
        config["method"] = {"beta": "select", "baselines": True}
        del config["model"]
    if changed is not None:
        config["about"]["changed"] = changed
    for key, value in settings.items():
        section, name = key.split(".")
        config[section][name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def write_run(
    path: Path,
    *,
    classes: list[str] | None = None,
    train_counts: list[int] | None = None,
    recall: float = 0.8,
    epochs: int = 3,
    alpha: bool = True,
    test_images_per_class: int = 20,
    test_counts: list[int] | None = None,
    test_ids: NDArray[np.int64] | None = None,
    data: str | None = None,
    predictions: bool = False,
    diagnostics: bool = False,
    settings: dict[str, Any] | None = None,
    changed: list[str] | None = None,
    **summary: Any,
) -> Path:
    """Write one run folder whose recall falls toward the tail from 1 to about `recall`.

    `settings` come over the configuration by dotted key; `changed` are the keys that differ from the preset. Of test
    images sorted by class, `test_ids` are the rows in the split of a dataset that lies at `data`.
    """
    counts_C = np.array(train_counts or [500, 101, 100, 20, 19, 3])
    size_C = np.log(counts_C) / np.log(counts_C.max()) if counts_C.max() > 1 else np.ones(len(counts_C))
    rng = np.random.default_rng(summary.get("seed", 0))
    total_C = np.array(test_counts) if test_counts else np.full(len(counts_C), test_images_per_class)
    correct_C = rng.binomial(total_C, np.clip(recall + (0.97 - recall) * size_C, 0, 1))
    last = summarize(Tally(correct_C, total_C, np.zeros((3, 15))), counts_C) | {"ece": 0.0625}

    path.mkdir(parents=True)
    write_config(path, epochs, summary, {"about.data": data or f"data/{path.name}", **(settings or {})}, changed)
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for epoch in range(1, epochs + 1):
            t = epoch / epochs
            row: dict[str, Any] = {"epoch": epoch, "step": 7 * epoch, "seconds": 1.5, "loss": 2 * np.exp(-3 * t)}
            row |= {"lr": 0.05 * (1 + np.cos(np.pi * t)), "images_per_second": 900.0}
            if alpha:
                row["alpha"] = 1 - t**2
            scaled = {key: None if value is None else value * (1 - 0.6 * np.exp(-4 * t)) for key, value in last.items()}
            row["eval"] = {"split": "val", **scaled}
            lines.write(json.dumps(row) + "\n")
    per_class = {
        "split": "test",
        "classes": classes or [f"class {j}" for j in range(len(counts_C))],
        "train_counts": counts_C.tolist(),
        "correct": correct_C.tolist(),
        "total": total_C.tolist(),
    }
    (path / "per_class.json").write_text(json.dumps(per_class), encoding="utf-8")
    complete = {
        "method": "bbn",
        "title": "BBN",
        "stage": 1,
        "from": None,
        "dataset": "digits",
        "seed": 0,
        "epochs": epochs,
        "last": last,
        "selected": {**last, "epoch": max(1, epochs - 1)},
        "selected_on": "val",
        "evaluated_on": "test",
        "images_per_second": 912.5,
        "seconds": 75.0,
        "environment": {"python": "3.11.9", "torch": "2.15.0", "device": "CPU, 2 cores", "commit": "0123abc"},
        "command": "accelerate launch train/bbn.py --data data/digits",
    }
    (path / "summary.json").write_text(json.dumps(complete | summary), encoding="utf-8")
    if predictions:
        write_predictions(path, correct_C, total_C, complete | summary, test_ids)
    if diagnostics:
        write_diagnostics(path, counts_C, complete | summary)
    return path


def write_diagnostics(path: Path, counts_C: NDArray[np.int64], summary: dict[str, Any]) -> None:
    """Write what stage one keeps of a bilateral network, and what AFG keeps of its features and its β per class."""
    size_C, rng = counts_C**0.25, np.random.default_rng(summary["seed"])
    arrays = {"norms": np.hypot(size_C, 3 / size_C), "norms_conventional": size_C, "norms_rebalancing": 3 / size_C}
    if summary["stage"] == 1:
        arrays["distances"] = 1 / (1 + size_C)
    else:
        arrays["beta"] = np.where(counts_C > 100, 0, 0.6 + 0.1 / size_C)
        labels = np.repeat(np.argsort(-counts_C, kind="stable")[[0, 1, -2, -1]], 10)
        features = rng.normal(size=(40, 8)) + 5 * rng.normal(size=(len(counts_C), 8))[labels]
        generated = np.tile([True, False], 20)
        np.savez(path / "feature_sample.npz", features=features.astype(np.float16), labels=labels, generated=generated)
    np.savez(path / "diagnostics.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})


def write_predictions(
    path: Path,
    correct_C: NDArray[np.int64],
    total_C: NDArray[np.int64],
    summary: dict[str, Any],
    ids_N: NDArray[np.int64] | None,
) -> None:
    """Write predictions of which so many are correct: of each class the same images are the easiest in every run."""
    num_classes = len(total_C)
    rng = np.random.default_rng(summary["seed"])
    labels_N = np.repeat(np.arange(num_classes), total_C)
    rank_N = np.concatenate([np.random.default_rng(j).permutation(n) for j, n in enumerate(total_C)])
    wrong_N = (labels_N + rng.integers(1, max(2, num_classes), len(labels_N))) % num_classes
    top_N = np.where(rank_N < correct_C[labels_N], labels_N, wrong_N)
    k = min(5, num_classes)
    order_NK = (top_N[:, None] + np.arange(k)) % num_classes
    scores_NK = np.sort(rng.dirichlet(np.full(k, 0.3), len(labels_N)).astype(np.float16), axis=1)[:, ::-1]
    shuffled = rng.permutation(len(labels_N))
    split = summary["evaluated_on"]
    arrays = {
        "ids": np.arange(len(labels_N)) * 3 if ids_N is None else ids_N,
        "labels": labels_N,
        "topk_labels": order_NK.astype(np.int32),
        "topk_scores": scores_NK,
    }
    np.savez_compressed(path / "predictions.npz", **{f"{split}_{name}": a[shuffled] for name, a in arrays.items()})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return `make(name, **changes)`, which writes a run under `tmp_path / "runs"`."""
    return lambda name, **changes: write_run(tmp_path / "runs" / name, **changes)
