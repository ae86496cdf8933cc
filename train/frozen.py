"""Stage one without training: a pretrained network as it is, with its features' class means as classifier.

    tailstream train frozen --model.backbone timm/vit_small_patch14_dinov2.lvd142m --model.weights default

    images ── pretrained network ──> f/‖f‖ ──> z_c = s·cos(μ_c, f) + (1 − τ)·log π_c

One pass over the training images takes the features and keeps them with the run; their class means μ_c are the
classifier (nearest class mean by angle: Kang et al., ICLR 2020, section 4.2), the scale s is the one under which each
training image is likeliest, left out of its own class's mean, and τ adjusts for the classes' shares π_c of the training
images (Menon et al., ICLR 2021). The equations: train/features/means.py. No val split is looked at.

What it leaves is a run of stage one like any other: train/afg.py and train/decouple.py start from it, on the features
that lie there already; predict, export and report work on it. It takes as long as one evaluation of the training
images: minutes for 30,000 photographs.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from shards.cli import program_name
from shards.errors import UserError, user_errors_exit_2
from train.engine import runs
from train.engine.config import (
    Config,
    Input,
    Loop,
    Model,
    Optim,
    changed_settings,
    check_seed,
    find_dataset,
    find_dataset_of,
    make_parser,
    parse,
    peek,
    plain_sections,
    preset,
)
from train.engine.method import Method, Progress, StepResult
from train.engine.model import with_own_view
from train.features.commands import STALL_MINUTES, Work

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.batch import Batch
    from shards.index import Dataset


class Frozen(Method):
    """A pretrained network that is looked through and not trained."""

    name = "frozen"
    in_title = frozenset({"method.tau"})

    @dataclass
    class Settings:
        """The classifier.

        Attributes:
            tau: τ of the logit adjustment: 1 takes all classes for equally likely, 0 as likely as they were trained.
        """

        tau: NonNegativeFloat = 1.0

    def __init__(self, config: Any, train_counts_C: "NDArray[np.int64]") -> None:
        from train.networks.networks import build_network

        for name in ("adapt", "drop_path"):
            if value := getattr(config.model, name):
                raise UserError(f"model.{name}={value} is for training, and nothing is trained here; leave it out")
        tau = config.method.tau
        self.title = "class means" if tau == 1 else f"class means, tau={tau:g}"
        self.streams = ()
        network = config.network()
        if network["weights"] is None:
            raise UserError(
                "train/frozen.py takes a network as it is, and random weights know nothing: give pretrained ones, with"
                " --model.weights default or a file, and --model.backbone"
            )
        self.network = build_network("plain", num_classes=len(train_counts_C), unit_features=True, **network)

    def step(self, batch: "dict[str, Batch]", progress: Progress) -> StepResult:
        """Nothing is trained."""
        raise AssertionError("a frozen network takes no steps")


@dataclass
class Run:
    """How the run goes about it.

    Attributes:
        seed: kept with the run; nothing here is random.
        device: cpu, cuda, or auto (GPUs where there are any).
        precision: no (float32), bf16, fp16, or auto (accelerate's setting).
        threads: CPU threads that each process computes with; by default OMP_NUM_THREADS where it is set, else the cores
            divided among the processes of this machine.
        stall_minutes: how long to wait for a batch before the run ends with a message.
    """

    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    threads: PositiveInt | None = None
    stall_minutes: PositiveFloat = STALL_MINUTES


def run(argv: list[str] | None = None) -> None:
    """Run it from its command line; exits with 2 for a user's mistake, with 75 after a signal."""
    program = program_name("train/frozen.py", "train frozen")
    description = (__doc__ or "").split("\n")[0]
    parser = make_parser(program, description, input=Input, model=Model, method=Frozen.Settings, loop=Run)
    parser.add_argument("--resume", action="store_true", help="resume --run, or the newest unfinished run")
    parser.add_argument("--dry-run", action="store_true", help="say what the run takes, write nothing, and end")
    begun: list[Path] = []
    with user_errors_exit_2(program, each_line=True):
        asked = peek(parser, argv)
        from train.engine.guards import errors_in_one_line
        from train.engine.interrupts import EXIT_STATUS, Interrupted, Stops

        try:
            with Stops(), errors_in_one_line(begun, "lower input.batch_size"):
                _run(parser, argv, asked, begun)
        except Interrupted as stop:
            resume = "resume with: tailstream train frozen "
            again = resume + runs.resuming(begun[0], asked.data) if begun else "start again"
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped by {stop.signal}; features that were taken are kept; {again}", flush=True)
            sys.exit(EXIT_STATUS)
        finally:
            runs.unlock()


def _run(parser: ArgumentParser, argv: list[str] | None, asked: Namespace, begun: list[Path]) -> None:
    resumed = None
    if asked.resume:
        wanted = find_dataset(asked.data).name if asked.data and not asked.run else None
        resumed = Path(asked.run) if asked.run else runs.newest_run({1}, wanted, Frozen.name, finished=False)
    if resumed is not None and (resumed / "config.yaml").exists():
        saved, about = runs.read_begun(resumed, Frozen.name)
        if (resumed / "summary.json").exists():
            if os.environ.get("RANK", "0") == "0":
                print(f"{resumed} is finished")
            return
        dataset, usual = find_dataset_of(resumed, about, asked.data), saved
    else:
        dataset, usual = find_dataset(asked.data), {}
    whole = preset(dataset, "training", Frozen.name)
    own: dict[str, Any] = {name: whole[name] for name in ("input", "model", "method") if name in whole}
    own = with_own_view(own, parse(parser, argv, usual or own).model.backbone)
    settings = parse(parser, argv, usual or own)
    sections = plain_sections(parser, settings)
    about = {"method": Frozen.name, "dataset": dataset.name, "data": dataset.place, "fingerprint": dataset.fingerprint}
    about["changed"] = changed_settings(parser, sections, own, Frozen.in_title)
    chosen = parser.instantiate(settings)
    loop = Loop(**vars(chosen.loop), select=False)
    _take(
        Config(chosen.input, chosen.model, chosen.method, Optim(epochs=0), loop),
        dataset,
        asked,
        resumed,
        {"about": about, **sections},
        begun,
    )


def _take(
    config: Config, dataset: "Dataset", asked: Namespace, resumed: Path | None, saved: dict[str, Any], begun: list[Path]
) -> None:
    """Take the features, make the classifier of them, and leave a finished run folder."""
    from accelerate.utils import broadcast_object_list, set_seed

    from pipeline.augment import check_fixed
    from pipeline.resident_loader import let_go
    from train.engine.checkpoints import Counters
    from train.engine.evaluation import finish, test_split
    from train.engine.machine import make_accelerator
    from train.features.bank import feature_bank, keep_bank, rows_to_take
    from train.features.estimate import estimate_lines
    from train.features.means import mean_classifier
    from train.networks.model_files import save_model

    accelerator = make_accelerator(config.loop.precision, config.loop.device, config.loop.threads)
    check_seed(config.loop.seed)
    set_seed(config.loop.seed)
    method = Frozen(config, dataset.train_counts)
    test_split(dataset)  # tells early where there is none
    check_fixed(config.input.eval_augment)
    config.input.settle_loader(dataset, accelerator)
    network: Any = method.network.to(accelerator.device)
    if asked.dry_run:
        accelerator.print(f"{method.title} of {config.model.backbone} on {dataset.name}")
        nothing = Work(classifiers=0, epochs=0, batch_size=1)  # the class means cost nothing beside the features
        for line in estimate_lines(None, network, dataset, config.input, accelerator, nothing, views=0, weights="last"):
            accelerator.print(line)
        accelerator.print("nothing was written (--dry-run)")
        return
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        named = resumed or (Path(asked.run) if asked.run else None)
        folder = [runs.use_run(named, bool(resumed)) if named else runs.new_run(f"{dataset.name}-{method.name}")]
        assert folder[0] is not None
        runs.write_config(folder[0], saved)
        save_model(method.model, folder[0])  # the bank is that of these weights
        (folder[0] / "metrics.jsonl").touch()
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    begun.append(run_folder)
    accelerator.print(
        f"{method.title} of {config.model.backbone} on {dataset.name}: {len(dataset.splits['train']):,} images,"
        f" {len(dataset.classes):,} classes -> {run_folder}"
    )
    started = time.perf_counter()
    images = rows_to_take(run_folder, network, dataset, "train", config.input, accelerator)
    patience = config.loop.stall_minutes
    bank = feature_bank(run_folder, network, dataset, "train", config.input, accelerator, stall_minutes=patience)
    let_go(dataset.splits["train"], accelerator.device)  # only their features are looked at from now on
    network.classifier, scale = mean_classifier(*bank, len(dataset.classes), config.method.tau)
    accelerator.print(f"cosines times {scale:.1f}, under which the training images are likeliest")
    seconds = time.perf_counter() - started
    # Of images that were taken before the run was stopped nothing is known.
    counters = Counters(images=images, seconds=seconds, training_seconds=seconds if images else 0.0)
    finish(method, config, dataset, run_folder, accelerator, counters)
    if accelerator.is_main_process:
        keep_bank(run_folder, "train")


if __name__ == "__main__":
    run()
