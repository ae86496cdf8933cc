"""Write a model card: what a model was trained on, how, how well it does for head, middle and tail, and its limits.

    tailstream card --run runs/birds-bbn-1 [--seed-run runs/birds-bbn-2 …] [--out README.md]

Markdown with the metadata that model hubs read from a card's head. Figures come from the run's files and not from any
image. Their spread: with runs of other seeds the standard deviation over all of them, else the standard error over the
evaluated images of each class. What only people know (licence, intended use) is left as lines to fill in.
"""

import html
import json
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from analysis.metrics import percent
from shards.atomic import write_text
from shards.cli import Parser, program_name
from shards.errors import UserError, user_errors_exit_2
from shards.groups import GROUPS, class_groups
from train.engine import runs
from train.predict import check_new, printable

if TYPE_CHECKING:  # a command line is read without torch: see train/engine/launch.py
    from train.engine.inference import Model

FIGURES = {"top1": "overall", "balanced_accuracy": "balanced", "many": "many", "medium": "medium", "few": "few"}
MOST_CLASSES = 200  # named in the card; model.json names all
# Settings that make another experiment, by section: all of it, or these. The rest says how the machine works.
RESULT_OF: dict[str, tuple[str, ...]] = {"model": (), "method": (), "optim": (), "reference": ()}
RESULT_OF["input"] = ("batch_size", "augment", "eval_augment", "views", "branch", "shift_batch_norm")
NOT_THE_RESULT = {"method.baselines", "method.chunk"}


def plain(text: object) -> str:
    """Return text as Markdown shows it, on one line: no markup, HTML, table cell or direction of its own."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]()#+!|~$" else c for c in html.escape(line, quote=False))


def code(text: object) -> str:
    """Return text as code within a line of Markdown: entities would be shown as such there."""
    return f"`{printable(text).replace('`', ' ')}`"


def standard_errors(model: "Model", name: str) -> dict[str, float | None]:
    """Return the standard error of each figure, over the evaluated images of each class.

    A class's accuracy p from m images has the variance p(1 − p)/m, with one image right and one wrong added (else a
    class without mistakes would have none); the mean of k classes has the sum of theirs over k².
    """
    from train.engine.predictions import read_predictions

    labels_N, topk_NK = read_predictions(model.run, model.weights, f"{name}_labels", f"{name}_topk_labels")
    classes = len(model.description.classes)
    total_C = np.bincount(labels_N, minlength=classes)
    right_C = np.bincount(labels_N[labels_N == topk_NK[:, 0]], minlength=classes)
    share_C = (right_C + 1) / (total_C + 2)
    variance_C = share_C * (1 - share_C) / np.maximum(total_C, 1)
    seen_C, groups_C = total_C > 0, class_groups(np.array(model.description.train_counts))
    found: dict[str, float | None] = {
        "top1": math.sqrt(float((variance_C * total_C**2).sum())) / max(1, int(total_C.sum()))
    }
    chosen = {"balanced_accuracy": seen_C, **{group: seen_C & (groups_C == group) for group in GROUPS}}
    for figure, chosen_C in chosen.items():
        count = int(chosen_C.sum())
        found[figure] = math.sqrt(float(variance_C[chosen_C].sum())) / count if count else None
    return found


def figures_table(models: "Sequence[Model]") -> list[str]:
    """Return the lines of the table of figures, and the sentence that says what their spread is."""
    from train.engine.predictions import FILES

    first = models[0]
    figures = [model.description.weights[model.weights]["figures"] for model in models]
    if len(models) > 1:
        said = f"± is the standard deviation over {len(models)} runs of other seeds."
        all_of = {key: [one.get(key) for one in figures] for key in FIGURES}
        spread = {key: None if None in values else statistics.stdev(values) for key, values in all_of.items()}
    elif (first.run / FILES[first.weights]).exists():
        said = "± is the standard error over the evaluated images; one run says nothing about other seeds."
        spread = standard_errors(first, first.description.evaluated_on)
    else:
        said, spread = "The spread is unknown: this is one run.", dict.fromkeys(FIGURES)
    cells = []
    for key in FIGURES:
        values = [one.get(key) for one in figures]
        mean = statistics.fmean(values) if None not in values else None
        error = spread[key] if mean is not None else None
        cells.append(percent(mean) + ("" if error is None else f" ± {100 * error:.1f}"))
    groups = ["more than 100", "20 to 100", "fewer than 20"]
    counts = np.unique_counts(class_groups(np.array(first.description.train_counts)))
    sizes = dict(zip(counts.values.tolist(), counts.counts.tolist(), strict=True))
    parts = [f"{name}: {images} training images, {sizes.get(name, 0)} classes"
             for name, images in zip(GROUPS, groups, strict=True)]  # fmt: skip
    return [
        f"| {' | '.join(FIGURES.values())} |",
        f"|{' ---: |' * len(FIGURES)}",
        f"| {' | '.join(cells)} |",
        "",
        f"Top-1 accuracy in percent on the {plain(first.description.evaluated_on)} split; balanced, many, medium and"
        f" few are means over classes ({'; '.join(parts)}). {said}",
    ]


def card(models: "Sequence[Model]") -> str:
    """Return the card of the first model; the others are runs of other seeds."""
    model, about = models[0], models[0].description
    figures, counts = about.weights[model.weights]["figures"], about.train_counts
    folder = printable(model.run.resolve().name)
    dataset_name = printable(about.dataset["name"])
    name, dataset = plain(folder), plain(dataset_name)
    metadata: dict[str, Any] = {
        "license": "other",
        "library_name": "tailstream",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "long-tailed", "pytorch", model.network.spec["backbone"]],
        "metrics": ["accuracy"],
    }
    results = [{"type": "accuracy", "name": shown, "value": round(100 * figures[key], 2)}
               for key, shown in FIGURES.items() if figures.get(key) is not None]  # fmt: skip
    where = {"type": dataset_name, "name": dataset_name, "split": about.evaluated_on}
    metadata["model-index"] = [
        {
            "name": folder,
            "results": [{"task": {"type": "image-classification"}, "dataset": where, "metrics": results}],
        }
    ]
    calibration = model.calibration
    honest = "Probabilities are the network's own; nothing was calibrated."
    if calibration is not None:
        honest = f"Probabilities are calibrated on val: temperature {calibration.temperature:.2f}, prior adjustment"
        honest += f" {calibration.tau:.2f}, made for the class shares of val."
    error = (
        ""
        if figures.get("ece") is None
        else f" The network's own have an expected calibration error of {figures['ece']:.3f}."
    )
    epoch = about.weights[model.weights]["epoch"]
    chosen = f"the last epoch, epoch {epoch}" if epoch else "those of a stage without epochs of training"
    if model.weights == "selected":
        chosen = f"the epoch that did best on val, epoch {epoch}"
        if "name" in figures:  # of a second stage
            chosen = f"{plain(figures['name'])}, the classifier that did best on val"
    unsure = "Every image gets one of the classes below, also one that shows none of them."
    least_C = model.calibrated.thresholds()
    if least_C.any():
        to = f" to {least_C.max():.3f}, by class," if least_C.min() < least_C.max() else ""
        unsure = (
            f"Predictions of a probability below {least_C.min():.3f}{to} get no label; above it, an image that shows"
            " none of the classes gets one of them all the same."
        )
    recipe = f"centre square of {100 * (about.crop_share or 1):g} % of the shorter side, {about.interpolation}"
    named = [f"{plain(one)} ({count:,})" for one, count in zip(about.classes, counts, strict=True)][:MOST_CLASSES]
    more = "" if len(named) == len(counts) else f", and {len(counts) - len(named):,} more in model.json"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Recognises {len(about.classes):,} class{'es' * (len(about.classes) > 1)} of images, trained with"
        f" {plain(about.method)} on a long-tailed dataset ({dataset}) by tailstream.",
        "",
        "- **Licence:** *fill in: of the weights, and whether that of the training images allows it*",
        "- **Contact:** *fill in*",
        "",
        "## Use",
        "",
        f"```bash\ntailstream predict --run {shlex.quote(folder)} PICTURES…\n```",
        "",
        f"The network sees {about.image_size}×{about.image_size} pixels: {recipe}. {honest}{error}",
        "",
        "*Fill in: what it is meant for, and what it must not be used for.*",
        "",
        "## Training",
        "",
        f"- **Data:** {dataset}, {sum(counts):,} images of {len(counts):,} classes, {max(counts):,} to {min(counts):,}"
        f" a class; fingerprint {code(about.dataset['fingerprint'] or 'unknown')}",
        f"- **Method:** {plain(about.method)}; network {code(json.dumps(model.network.spec))}",
        f"- **Weights:** {chosen}",
        f"- **Code:** tailstream, commit {code(about.commit or 'unknown')}",
        *_how(model),
        "",
        "## Results",
        "",
        *figures_table(models),
        "",
        "## Limits",
        "",
        f"- {unsure}",
        "- Classes with few training images are recognised less often, and few images may have measured that.",
        "- The class shares where it is used may differ from those above: see `--prior` of tailstream predict.",
        "- *Fill in: where the images come from, whom or what they leave out, known mistakes.*",
        "",
        "## Classes",
        "",
        "Training images in parentheses: " + ", ".join(named) + more + ".",
        "",
    ]
    return "\n".join(lines)


def _how(model: "Model") -> list[str]:
    """Return lines about the run, as far as its files are there."""
    if not (model.run / "summary.json").exists():
        return []
    summary = runs.read_summary(model.run)
    environment = summary["environment"]
    lines = [f"- **Seed:** {summary['seed']}; **epochs:** {summary['epochs']}; **time:** {summary['seconds']:,.0f} s"]
    lines.append(f"- **Hardware:** {plain(environment['device'])}, {plain(environment['processor'])}")
    lines.append(f"- **Command:** {code(summary['command'])}")
    return lines


def _stages(run: Path) -> Iterator[dict[str, Any]]:
    """Yield a run's configuration, and that of the stage one that it began with, as far as they are there."""
    while (run / "config.yaml").exists():
        config: dict[str, Any] = {"about": {}, "input": {}, "loop": {}} | runs.read_config(run)
        yield config
        if "from" not in config["about"]:
            return
        named = Path(config["about"]["from"])  # a whole path comes first, as in analysis/settings.py
        whole = named.is_absolute() and (named / "config.yaml").exists()
        run = named if whole else run.resolve().parent / named.name


def _shared(model: "Model") -> dict[str, Any]:
    """Return what runs of other seeds have in common, by name."""
    about = model.description
    found: dict[str, Any] = {"dataset": about.dataset["name"], "method": about.method, "weights": model.weights}
    found |= {"classes": about.classes, "images of the classes": about.train_counts}
    found |= {"image size": about.image_size, "split": about.evaluated_on, "network": model.network.spec}
    for config, of in zip(_stages(model.run), ("", "stage one's "), strict=False):
        if "from" in config["about"]:
            found["weights of stage one"] = config["about"].get("weights")
            config["input"].pop("batch_size", None)  # features do not depend on it
        for section, names in RESULT_OF.items():
            settings = config.get(section, {})
            found |= {f"{of}{section}.{name}": settings[name] for name in names or settings if name in settings}
    return {name: value for name, value in found.items() if name not in NOT_THE_RESULT}


def _difference(one: "Model", other: "Model") -> str | None:
    """Return in what two runs are no seeds of one experiment; a setting that one of them does not know counts not."""
    ours, theirs = _shared(one), _shared(other)
    return next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)


def _seed(model: "Model") -> Any:
    """Return what distinguishes a run's seeds: its own and stage one's, or their folders where these do not say."""
    stages = list(_stages(model.run))
    unknown = stages[-1]["about"].get("from") if stages else str(model.run.resolve())
    return unknown, *(one["loop"].get("seed") for one in stages)


def main(argv: list[str] | None = None) -> None:
    """Write a card as the command line says; a user's mistake exits with status 2."""
    program = program_name("python -m train.card", "card")
    parser = Parser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--seed-run", action="append", metavar="RUN", help="the same with another seed; may be repeated"
    )
    parser.add_argument("--out", type=Path | None, metavar="FILE", help="default: README.md in the run")
    asked = parser.parse_args(argv)
    with user_errors_exit_2(program):
        from train.engine.inference import open_model

        models = [open_model(Path(run), device="cpu") for run in (asked.run, *(asked.seed_run or []))]
        out = asked.out or asked.run / "README.md"
        check_new(out)
        for model in models[1:]:
            if (name := _difference(models[0], model)) is not None:
                raise UserError(f"{model.run} is another experiment than {models[0].run} ({name}); leave it out")
        seen: dict[Any, Model] = {}
        for model in models:
            if (same := seen.setdefault(_seed(model), model)) is not model:
                raise UserError(f"{model.run} has the seed of {same.run}, and says nothing about others; leave it out")
        write_text(out, card(models))
        print(f"wrote {printable(out)}; fill in the lines in italics")


if __name__ == "__main__":
    main()
