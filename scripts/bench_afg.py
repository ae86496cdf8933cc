"""How fast tail features are generated, beside other samplers: CPU seconds of one thread, everything in one run.

    .venv/bin/python scripts/bench_afg.py --json FILE [--imagenet-lt COUNTS.json] [--inat2018 COUNTS.json]

Every sampler balances the same made features: n_max − n_c samples per class, each from its parent's calibrated Gaussian
(the two nearest larger classes, β = 0.4).

    ours               train.features.generation: no covariance
    cholesky           a covariance per parent, a batch of them factored at once
    multivariate       a MultivariateNormal per parent, one after the other
    tailcalib          the package of Vigneswaran et al. 2021, on PyTorch (fetched with uv; skipped where that fails)

The peers take hours at 1,000 classes, so they run on a share of the parents, chosen at random: the time of what they do
once (covariances, say) is counted whole, the rest is divided by the share. At iNaturalist's size ours runs alone, for
some chunks, beside a float32 matrix product and a step of the classifier.

The whole second stage, on 6,151 features in 102 classes: AFG's candidates trained together, and one after the other as
they were before (scripts/bench/second_stages.py). `--only second-stage` measures nothing else.
"""

import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import header, read_counts, reason, uv, write_results
from bench.measuring import watched_memory
from bench.second_stages import compare_trainings, take_some_steps
from shards.cli import run_commands
from shards.errors import UserError
from shards.groups import MANY_ABOVE
from shards.progress import say
from train.features.gaussians import ClassGaussians, Support, find_support, fit, head_classes
from train.features.generation import generate_chunks, noise_length
from train.features.mixing import Mixture

BETA, K = 0.4, 2
BATCH = 512  # of the classifier
CHUNK = 65536

# What must hold: a figure of `figures` and its bound.
BARS: list[dict[str, Any]] = [
    {"figure": "times_cholesky_at_512", "at_least": 10.0},
    {"figure": "times_tailcalib_at_512", "at_least": 150.0},
    {"figure": "share_of_matrix_product_rate", "at_least": 0.4},
    {"figure": "memory_above_bank_gb", "at_most": 5.0},
    {"figure": "generation_over_classifier_step", "at_most": 0.1},
    {"figure": "times_training_alone", "at_least": 2.5},
]
Part = Literal["samplers", "inat2018", "second-stage"]


@dataclass(frozen=True)
class Case:
    """Made features, half precision, sorted by class, in [0, ∞); and how many samples to generate per class."""

    name: str
    features_ND: Tensor
    labels_N: Tensor
    counts_C: Tensor
    targets_C: Tensor


def bench(
    json: Path = Path("bench_afg.json"),
    imagenet_lt: Path | None = None,
    inat2018: Path | None = None,
    peers: float = 0.004,
    chunks: int = 3,
    size: float = 1.0,
    epochs: int = 8,
    rounds: int = 3,
    only: Part | None = None,
) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        imagenet_lt: a JSON list of ImageNet-LT's images per class; without it, 1,000 made counts.
        inat2018: the same of iNaturalist 2018; without it, 8,142 made counts.
        peers: the share of the parents on which the slow samplers are measured at 1,000 classes.
        chunks: chunks of 65,536 features that are generated at iNaturalist's size.
        size: a factor below 1 shrinks classes and dimensions, to try the script out.
        epochs: of a second stage; its default settings have 40, and the time of either way is proportional to them.
        rounds: how often second stages are trained, both ways by turns.
        only: the one part to measure; the bars of the others count as not measured.
    """
    if not 0 < peers <= 1 or not 0 < size <= 1:
        raise UserError(f"peers and size must lie in (0, 1], got {peers} and {size}")
    if min(chunks, epochs, rounds) < 1:
        raise UserError(f"chunks, epochs and rounds must be at least 1, got {chunks}, {epochs} and {rounds}")
    torch.set_num_threads(1)
    cifar_C = [int(500 * 0.01 ** (j / 99)) for j in range(100)]
    imagenet_C = read_counts(imagenet_lt) if imagenet_lt else made_counts(1000, 1280, 5, 115_846)
    inat_C = read_counts(inat2018) if inat2018 else made_counts(8142, 1000, 2, 437_513)
    flowers_C = made_counts(102, 540, 21, 6151)
    results: dict[str, Any] = {}
    figures: dict[str, Any] = dict.fromkeys(bar["figure"] for bar in BARS)
    with tempfile.TemporaryDirectory() as folder:
        if only in (None, "second-stage"):
            results["second-stage"] = whole_stage(Path(folder), shrunk(flowers_C, size), size, epochs, rounds)
            figures |= {key: results["second-stage"][key] for key in figures.keys() & results["second-stage"].keys()}
        if only in (None, "samplers"):
            tailcalib = fetch_tailcalib(Path(folder))
            cases = (("cifar100-lt", cifar_C, 64, 1.0), ("imagenet-lt", imagenet_C, 512, peers))
            for name, counts, dim, share in cases:
                case = make_case(Path(folder), name, shrunk(counts, size), max(4, int(dim * size)))
                results[name] = compare(case, tailcalib, share)
            for peer in ("cholesky", "tailcalib"):
                figures[f"times_{peer}_at_512"] = results["imagenet-lt"]["times_slower"].get(peer)
        if only in (None, "inat2018"):
            case = make_case(Path(folder), "inat2018", shrunk(inat_C, size), max(4, int(2048 * size)))
            results["inat2018"] = at_scale(case, chunks)
            figures |= {key: results["inat2018"][key] for key in figures.keys() & results["inat2018"].keys()}
    content = header(threads=1, torch=torch.__version__) | {
        "size": size,
        "results": results,
        "figures": figures,
        "bars": [bar | {"measured": figures[bar["figure"]], "reached": reached(bar, figures)} for bar in BARS],
    }
    write_results(json, content)
    for bar in content["bars"]:
        say(f"{ {True: 'reached', False: 'NOT REACHED', None: 'not measured'}[bar['reached']] }: {bar}")


def reached(bar: dict[str, Any], figures: dict[str, Any]) -> bool | None:
    """Whether a bar is reached; None where its figure was not measured."""
    figure = figures[bar["figure"]]
    if figure is None:
        return None
    return bool(bar.get("at_least", -math.inf) <= figure <= bar.get("at_most", math.inf))


def made_counts(classes: int, largest: int, smallest: int, total: int) -> list[int]:
    """Return counts that fall from `largest` to `smallest`, first fast and then slowly, and have about this total."""

    def counts(power: float) -> list[int]:
        places = (np.arange(classes) / (classes - 1)) ** power
        return np.round(largest * (smallest / largest) ** places).astype(int).tolist()

    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(counts(middle)) > total else (middle, high)
    return counts(low)


def shrunk(counts: list[int], size: float) -> list[int]:
    """Take an even selection of the classes."""
    return counts[:: max(1, round(1 / size))]


def make_case(folder: Path, name: str, counts: list[int], dim: int) -> Case:
    """Make skewed features around a centre per class, in a memory-mapped file as a bank is.

    As many classes of the same size have the same centres, whatever the counts.
    """
    counts_C = torch.tensor(counts)
    labels_N = torch.repeat_interleave(counts_C)
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.rand(len(counts), dim, generator=generator)
    generator.manual_seed(len(labels_N))
    features = open_memmap(folder / f"{name}.npy", "w+", np.float16, (len(labels_N), dim))
    for start in range(0, len(labels_N), 16384):
        labels_B = labels_N[start : start + 16384]
        noise_BD = torch.randn(len(labels_B), dim, generator=generator)
        features[start : start + 16384] = (centres_CD[labels_B] + 0.5 * noise_BD).square().numpy()
    features.flush()
    say(f"{name}: {len(labels_N):,} features of {dim} dimensions in {len(counts):,} classes")
    features_ND = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
    return Case(name, features_ND, labels_N, counts_C, counts_C.max() - counts_C)


def whole_stage(folder: Path, counts: list[int], size: float, epochs: int, rounds: int) -> dict[str, Any]:
    """Measure the training of a second stage's classifiers, together and one by one."""
    dim = max(4, int(1024 * size))
    case = make_case(folder, "flowers", counts, dim)
    held_out = make_case(folder, "flowers, held out", [20] * len(counts), dim)
    gaussians = fit(case.features_ND, case.labels_N, len(counts))
    support = find_support(gaussians, K, head_classes(gaussians.counts_C, MANY_ABOVE))
    mixture = Mixture(case.features_ND, case.labels_N, gaussians, support, case.targets_C, chunk=CHUNK)
    return compare_trainings(mixture, (held_out.features_ND, held_out.labels_N), epochs, rounds)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of this process that a piece of work takes, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def compare(case: Case, tailcalib: Any, share: float) -> dict[str, Any]:
    """Measure all samplers on one case."""
    generator = torch.Generator().manual_seed(1)
    prepare, gaussians = cpu_seconds(lambda: fit(case.features_ND, case.labels_N, len(case.counts_C)))
    nearest, support = cpu_seconds(lambda: find_support(gaussians, K))

    def ours() -> int:
        chunks = generate_chunks(gaussians, support, case.targets_C, BETA, generator)
        return sum(len(labels) for _, labels in chunks)

    cpu_seconds(ours)  # the first one warms caches
    seconds, samples = cpu_seconds(ours)
    rows: dict[str, Any] = {
        "ours": {"seconds": seconds, "share": 1.0, "prepare_seconds": prepare + nearest},
    }
    # All of them draw for the same parents, from the same means, neighbours and weights.
    targets_N = (case.targets_C / case.counts_C)[case.labels_N]
    parents = (targets_N > 0).nonzero().flatten()
    number = max(1, round(share * len(parents)))
    chosen = parents[torch.randperm(len(parents), generator=generator)[:number]]
    share = number / len(parents)
    once, covariances_CDD = cpu_seconds(lambda: covariances(gaussians))
    given = (gaussians, support, covariances_CDD, chosen, targets_N[chosen])
    for name, sampler in (("cholesky", cholesky), ("multivariate", multivariate)):
        loop, _ = cpu_seconds(partial(sampler, *given))
        rows[name] = {"seconds": once + loop / share, "once_seconds": once, "loop_seconds": loop, "share": share}
        say(f"{case.name}: {name} {rows[name]['seconds']:.1f} s (share {share:.4f}), ours {seconds:.2f} s")
    del covariances_CDD, given
    skipped = {}
    if isinstance(tailcalib, str):
        skipped["tailcalib"] = tailcalib
    else:
        once, _ = cpu_seconds(lambda: run_tailcalib(tailcalib, case, 0.0))
        whole, _ = cpu_seconds(lambda: run_tailcalib(tailcalib, case, share))
        loop = whole - once
        row = {"seconds": once + loop / share, "once_seconds": once, "loop_seconds": loop, "share": share}
        rows["tailcalib"] = row
        say(f"{case.name}: tailcalib {row['seconds']:.1f} s (share {share:.4f})")
    return {
        "classes": len(case.counts_C),
        "features": len(case.labels_N),
        "dimensions": case.features_ND.shape[1],
        "samples": samples,
        "samplers": {name: row | {"samples_per_second": samples / row["seconds"]} for name, row in rows.items()},
        "times_slower": {name: row["seconds"] / seconds for name, row in rows.items() if name != "ours"},
        "skipped": skipped,
    }


def covariances(gaussians: ClassGaussians) -> Tensor:
    """Form every class's covariance, shape (C, D, D)."""
    dim = gaussians.features_ND.shape[1]
    by_class = gaussians.features_ND.split(gaussians.counts_C.tolist())
    return torch.stack([X_nD.T.cov() if len(X_nD) > 1 else torch.zeros(dim, dim) for X_nD in by_class])


def calibrated(
    gaussians: ClassGaussians, support: Support, covariances_CDD: Tensor, parents_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the calibrated means (B, D) and covariances (B, D, D) of some parents."""
    weights_BK, classes_BK = support.weights_NK[parents_B], support.classes_NK[parents_B]
    beta_B1 = torch.where(weights_BK.any(1), BETA, 0.0)[:, None]
    means_BD = (1 - beta_B1) * gaussians.features_ND[parents_B]
    means_BD += beta_B1 * (weights_BK[:, :, None] * gaussians.means_CD[classes_BK]).sum(1)
    spread_BDD = covariances_CDD[gaussians.labels_N[parents_B]] * (1 - beta_B1[:, :, None]) ** 2
    for weights_B, classes_B in zip(weights_BK.unbind(1), classes_BK.unbind(1), strict=True):
        spread_BDD += (beta_B1[:, 0] ** 2 * weights_B)[:, None, None] * covariances_CDD[classes_B]
    # Fewer samples than dimensions make it singular.
    spread_BDD.diagonal(dim1=1, dim2=2).add_(1e-4)
    return means_BD, spread_BDD


def numbers(targets_B: Tensor) -> list[int]:
    """Return whole numbers of samples that keep the running sum."""
    return np.diff(np.round(np.cumsum(targets_B.double().numpy())), prepend=0).astype(int).tolist()


def cholesky(
    gaussians: ClassGaussians, support: Support, covariances_CDD: Tensor, parents_P: Tensor, targets_P: Tensor
) -> None:
    """Sample with a batch of Cholesky factors at a time."""
    for parents_B, targets_B in zip(parents_P.split(32), targets_P.split(32), strict=True):
        means_BD, spread_BDD = calibrated(gaussians, support, covariances_CDD, parents_B)
        factors_BDD = torch.linalg.cholesky(spread_BDD)
        for mean_D, factor_DD, number in zip(means_BD, factors_BDD, numbers(targets_B), strict=True):
            (mean_D + torch.randn(number, len(mean_D)) @ factor_DD.T).clamp_(min=0).square_()


def multivariate(
    gaussians: ClassGaussians, support: Support, covariances_CDD: Tensor, parents_P: Tensor, targets_P: Tensor
) -> None:
    """Sample from a MultivariateNormal per parent."""
    for parent_1, number in zip(parents_P.split(1), numbers(targets_P), strict=True):
        means_1D, spread_1DD = calibrated(gaussians, support, covariances_CDD, parent_1)
        normal = torch.distributions.MultivariateNormal(means_1D[0], spread_1DD[0])
        normal.sample((number,)).clamp_(min=0).square_()


def fetch_tailcalib(folder: Path) -> Any:
    """Return the package's class, or why there is none."""
    target = folder / "tailcalib"
    try:
        uv("pip", "install", "--no-deps", "--python", sys.executable, "--target", target, "tailcalib")
        sys.path.append(str(target))
        package: Any = import_module("tailcalib")
    except subprocess.CalledProcessError as error:
        return f"not installed: {reason(error.stderr)}"
    except (OSError, ImportError) as error:
        return f"not installed: {error}"
    package.torch = torch  # its last step forgets to import it
    return package.tailcalib


def run_tailcalib(tailcalib: Any, case: Case, share: float) -> None:
    """Run the package's PyTorch engine; parents left out by chance give no samples."""
    generator = np.random.default_rng(2)

    class OnAShare(tailcalib):
        def get_sample_count(self, *arguments: Any) -> dict[int, list[float]]:
            counts = super().get_sample_count(*arguments)
            return {c: [n * (generator.random() < share) for n in of_class] for c, of_class in counts.items()}

    features_ND = case.features_ND.float()
    # It prints and draws a bar.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        OnAShare("pytorch").generate(features_ND, case.labels_N, tukey_value=0.5, topk=K, extra_points=0)


def at_scale(case: Case, chunks: int) -> dict[str, Any]:
    """Measure ours alone: fit, neighbours, some chunks, and a step of the classifier."""
    dim, classes = case.features_ND.shape[1], len(case.counts_C)
    left, right = torch.randn(4096, 2048), torch.randn(2048, 2048)
    torch.mm(left, right)
    seconds, _ = cpu_seconds(lambda: [torch.mm(left, right) for _ in range(5)])
    machine = 5 * 2 * 4096 * 2048 * 2048 / seconds
    with watched_memory(os.getpid(), every=0.02) as memory:
        fit_seconds, gaussians = cpu_seconds(lambda: fit(case.features_ND, case.labels_N, classes))
        head_C = head_classes(gaussians.counts_C, MANY_ABOVE)
        nearest_seconds, support = cpu_seconds(lambda: find_support(gaussians, K, head_C))
        say(f"{case.name}: fitted in {fit_seconds:.1f} s, neighbours found in {nearest_seconds:.1f} s")
        generator = torch.Generator().manual_seed(1)
        chunk = min(CHUNK, int(case.targets_C.sum()) // (chunks + 1))
        stream: Any = generate_chunks(gaussians, support, case.targets_C, BETA, generator, chunk=chunk)
        next(stream)  # the first one warms caches, and draws the epoch's parents

        def generated() -> int:
            return sum(len(labels) for _, labels in itertools.islice(stream, chunks))

        seconds, samples = cpu_seconds(generated)
        stream.close()  # its chunk is gone
        take_some_steps(
            Mixture(case.features_ND, case.labels_N, gaussians, support, case.targets_C, chunk=chunk), chunks=2
        )
    own_mb = [mb for _, mb in memory]
    # What the matrix products of a sample take: 2·D operations per number of noise, of its own class and its support.
    lengths_C = torch.tensor([noise_length(gaussians, c) for c in range(classes)]).double()
    borrowed_N = ((support.weights_NK > 0) * lengths_C[support.classes_NK]).sum(1)
    parents_C = torch.zeros(classes).double().index_add_(0, gaussians.labels_N, borrowed_N) / gaussians.counts_C
    noise = float(((lengths_C + parents_C) * case.targets_C).sum() / case.targets_C.sum())
    rate = samples / seconds

    classifier = nn.Linear(dim, classes)
    features_BD, labels_B = torch.rand(BATCH, dim), torch.randint(classes, (BATCH,))
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, 0.9)

    def steps() -> None:
        for _ in range(4):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(classifier(features_BD), labels_B).backward()
            optimizer.step()

    steps()
    step_seconds, _ = cpu_seconds(steps)
    return {
        "classes": classes,
        "features": len(case.labels_N),
        "dimensions": dim,
        "samples_per_epoch": int(case.targets_C.sum()),
        "measured_samples": samples,
        "seconds": seconds,
        "samples_per_second": rate,
        "epoch_seconds": float(case.targets_C.sum()) / rate,
        "fit_seconds": fit_seconds,
        "nearest_larger_classes_seconds": nearest_seconds,
        "machine_gflops": machine / 1e9,
        "generation_gflops": rate * noise * 2 * dim / 1e9,
        "share_of_matrix_product_rate": rate * noise * 2 * dim / machine,
        "memory_above_bank_gb": (max(own_mb) - own_mb[0]) * 2**20 / 1e9,
        "classifier_step_seconds": step_seconds / 4,
        "generation_over_classifier_step": BATCH / rate / (step_seconds / 4),
    }


if __name__ == "__main__":
    run_commands("scripts/bench_afg.py", bench)
