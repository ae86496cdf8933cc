"""Build a dataset: list a source, plan its splits, write the shards, index them, and put it all in place.

Everything is written to a hidden folder beside the dataset's place and renamed at the end, so a dataset is
there whole or not at all. The same source and options give the same bytes in every file, whatever the number
of workers.
"""

import json
import math
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from shards.errors import UserError
from shards.groups import imbalance_factor as measured_imbalance_factor
from shards.index import FORMAT, MANIFEST, SAMPLE, SPLITS, image_sizes, open_dataset, read_manifest
from shards.parallel import run_jobs
from shards.plan import Plan, plan_splits
from shards.profiles import PROFILES
from shards.progress import Progress, say
from shards.show import summary
from shards.sources import Source, open_source
from shards.writer import REJECTED, ShardJob, WrittenShard, sha256, write_shard

TEST_FRACTION = 0.25
VAL_FRACTION = 0.1
SMALL_PIXELS = 64


def build(
    dataset: str,
    *,
    source: Path | None = None,
    out: Path | None = None,
    profile: str | None = None,
    imbalance_factor: float | None = None,
    seed: int = 0,
    test_fraction: float | None = None,
    val_fraction: float | None = None,
    shorter_side: int | None = None,
    quality: int = 90,
    shard_samples: int = 2000,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Build shards and a class index from images.

    A dataset that is already there, built from the same images with the same options, is left as it is.

    Args:
        dataset: what to build: digits (comes with scikit-learn) or folder (a sub-folder of images per class).
        source: where the images are (folder).
        out: the folder to make; data/DATASET if not given.
        profile: how training images are thinned: natural (not at all), exp, step or pareto; if not given,
            exp for digits, else natural.
        imbalance_factor: largest over smallest class of the profile, at least 1; if not given, 20 for digits,
            else 100.
        seed: decides which images are held out and kept, and their order.
        test_fraction: share of each class held out for testing, in [0, 1), where the source has no test split
            of its own; 0.25 if not given.
        val_fraction: share of each class's remaining images held out for validation, likewise; 0.1 if not
            given, and 0 makes no validation split.
        shorter_side: shrink larger images to this shorter side in pixels.
        quality: JPEG quality of shrunk images, 1 to 100.
        shard_samples: most images per shard file.
        workers: processes; if not given, one per available core, fewer where there are few images.
        overwrite: replace a dataset that is already there.

    Returns:
        The dataset's folder.

    Raises:
        UserError: an option, a source or an output folder that will not do; nothing is left behind.
    """
    out = Path("data", dataset) if out is None else out
    share = "a share of at least 0 and below 1"
    count = "a whole number of at least 1"
    for option, value, low, high, wanted in (
        ("--imbalance-factor", imbalance_factor, 1, sys.float_info.max, "a number of at least 1"),
        ("--seed", seed, 0, sys.maxsize, "a whole number of at least 0"),
        ("--test-fraction", test_fraction, 0, math.nextafter(1, 0), share),
        ("--val-fraction", val_fraction, 0, math.nextafter(1, 0), share),
        ("--shorter-side", shorter_side, 1, sys.maxsize, count),
        ("--quality", quality, 1, 100, "a JPEG quality from 1 to 100"),
        ("--shard-samples", shard_samples, 1, sys.maxsize, count),
        ("--workers", workers, 1, sys.maxsize, count),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{option} is {value:g}; give {wanted}")
    if profile is not None and profile not in PROFILES:
        raise UserError(f"unknown --profile {profile!r}; choose one of: {', '.join(PROFILES)}")
    images = open_source(dataset, source)
    profile = profile or images.profile
    if profile == "natural" and imbalance_factor is not None:
        raise UserError(
            f"--imbalance-factor {imbalance_factor:g} has no effect with the natural profile;"
            " leave it out or choose --profile exp, step or pareto"
        )
    options: dict[str, Any] = {
        "dataset": dataset,
        "source": images.fingerprint,
        "profile": profile,
        "imbalance_factor": None if profile == "natural" else float(imbalance_factor or images.imbalance_factor),
        "seed": seed,
        "test_fraction": _fraction(images, "test", test_fraction, TEST_FRACTION),
        "val_fraction": _fraction(images, "val", val_fraction, VAL_FRACTION),
        "shorter_side": shorter_side,
        "quality": quality,
        "shard_samples": shard_samples,
    }
    try:
        already_built = _already_built(out, options, overwrite)
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}; give another --out") from None
    if already_built:
        say(f"already built: {out} (the same images and options; --overwrite builds it again)")
        return out

    for note in images.notes:
        say(f"note: {note}")
    plan = plan_splits(
        images,
        profile=profile,
        imbalance_factor=options["imbalance_factor"] or 1.0,
        test_fraction=options["test_fraction"] or 0.0,
        val_fraction=options["val_fraction"] or 0.0,
        seed=seed,
    )
    for note in plan.notes:
        say(f"note: {note}")
    name = dataset if dataset != "folder" else out.resolve().name
    with _new_folder(out) as folder:
        _build_in(folder, name, images, plan, options, workers)
    print(summary(open_dataset(out)))
    return out


def _fraction(images: Source, split: str, fraction: float | None, default: float) -> float | None:
    """The share to hold out for a split, None where the source has its own."""
    if split not in images.splits:
        return default if fraction is None else float(fraction)
    if fraction is not None:
        raise UserError(f"the source has its own {split} split; leave out --{split}-fraction {fraction:g}")
    return None


def _already_built(out: Path, options: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds this very dataset; UserError where something else is in the way."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} is there and is no dataset; remove it or give another --out")
    manifest = read_manifest(out)
    if overwrite:
        foreign = {path.name for path in out.iterdir()} - _file_names(manifest)
        if foreign:
            raise UserError(f"{out} also holds {min(foreign)!r}, which --overwrite would delete; move it away")
        return False
    for option, value in options.items():
        built = manifest["options"].get(option)
        if built != value:
            name = option.replace("_", "-")
            what = "from other images" if option == "source" else f"with {name} {built!r}, not {value!r}"
            raise UserError(f"{out} holds a dataset built {what}; give --overwrite or another --out")
    return True


def _file_names(manifest: dict[str, Any]) -> set[str]:
    names = {MANIFEST, REJECTED}
    for split in manifest["splits"].values():
        names |= set(split["files"])
        for shard in split["shards"]:
            names |= {shard["file"], Path(shard["file"]).with_suffix(".idx").name}
    return names


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `out` when the block ends well, and is removed otherwise."""
    place = out.resolve()
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    old = place.with_name(f"{partial.name}.old")
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if place.exists():
            place.rename(old)
        partial.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not place.exists():
            old.rename(place)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{out} cannot be written: {error.strerror or error}; nothing was left behind") from None
        raise


def _build_in(
    folder: Path, name: str, images: Source, plan: Plan, options: dict[str, Any], workers: int | None
) -> None:
    """Write every file of the dataset into `folder`, the manifest last."""
    jobs = {split: _shard_jobs(folder, split, images, plan, options) for split in SPLITS if split in plan.splits}
    total = sum(len(listing) for listing in plan.splits.values())
    written = iter(_write_shards([job for group in jobs.values() for job in group], workers, total))

    splits = {}
    rejected = []
    sizes = []
    for split, split_jobs in jobs.items():
        shards = [next(written) for _ in split_jobs]
        for shard in shards:
            rejected += [{"split": split, "class": images.classes[image["label"]], **image} for image in shard.rejected]
        filled = _keep_filled(folder, shards)
        samples = np.concatenate([np.empty(0, SAMPLE), *(shard.samples for shard in filled)])
        samples["shard"] = np.repeat(np.arange(len(filled)), [len(shard.samples) for shard in filled])
        splits[split] = _write_split(folder, split, samples, filled, len(images.classes))
        _check_something_left(split, splits[split]["class_counts"], images, plan)
        sizes.append(samples[["height", "width"]])
    with (folder / REJECTED).open("w", encoding="utf-8") as file:
        for image in rejected:
            file.write(json.dumps(image, ensure_ascii=False, sort_keys=True) + "\n")
    reasons = Counter(image["reason"] for image in rejected)
    if rejected:
        kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        say(f"note: {len(rejected)} of {total} images are left out ({kinds}); {REJECTED} names them")

    image = image_sizes(sizes)
    small = max(image["max_height"], image["max_width"]) <= SMALL_PIXELS
    manifest = {
        "format": FORMAT,
        "name": name,
        "preset": images.preset or ("small" if small else "photos"),
        "options": options,
        "classes": images.classes,
        "imbalance_factor": measured_imbalance_factor(splits["train"]["class_counts"]),
        "image": image,
        "splits": splits,
        "rejected": {"total": len(rejected), "reasons": dict(reasons)},
        "encoder": f"Pillow {PIL.__version__}",
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _shard_jobs(folder: Path, split: str, images: Source, plan: Plan, options: dict[str, Any]) -> list[ShardJob]:
    """Cut a split into shards of nearly equal length."""
    listing = plan.splits[split]
    n_shards = -(-len(listing) // options["shard_samples"])
    return [
        ShardJob(
            path=folder / f"{split}-{i:06d}.tar",
            first=int(ids[0]),
            images=listing[ids],
            read=images.read,
            shorter_side=options["shorter_side"],
            quality=options["quality"],
        )
        for i, ids in enumerate(np.array_split(np.arange(len(listing)), n_shards))
    ]


def _write_shards(jobs: list[ShardJob], workers: int | None, total: int) -> list[WrittenShard]:
    rejected = 0

    def count(shard: WrittenShard) -> None:
        nonlocal rejected
        rejected += len(shard.rejected)
        progress.add(len(shard.samples) + len(shard.rejected), f"{rejected} rejected" if rejected else "")

    with Progress("build", total) as progress:
        return run_jobs(write_shard, jobs, n_images=total, workers=workers, done=count)


def _keep_filled(folder: Path, shards: list[WrittenShard]) -> list[WrittenShard]:
    """Remove the shards whose images were all rejected."""
    for shard in shards:
        if not len(shard.samples):
            path = folder / shard.entry["file"]
            path.unlink()
            path.with_suffix(".idx").unlink()
    return [shard for shard in shards if len(shard.samples)]


def _write_split(
    folder: Path, split: str, samples: NDArray[np.void], shards: list[WrittenShard], n_classes: int
) -> dict[str, Any]:
    """Write a split's arrays and names; return its entry in the manifest."""
    paths = [folder / f"{split}.{kind}" for kind in ("samples.npy", "by_class.npy", "names.txt")]
    np.save(paths[0], samples)
    np.save(paths[1], np.argsort(samples["label"], kind="stable").astype("<i8"))
    with paths[2].open("w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for shard in shards for name in shard.names)
    return {
        "samples": len(samples),
        "class_counts": np.bincount(samples["label"], minlength=n_classes).tolist(),
        "shards": [shard.entry for shard in shards],
        "files": {path.name: sha256(path) for path in paths},
    }


def _check_something_left(split: str, counts: list[int], images: Source, plan: Plan) -> None:
    if not any(counts):
        raise UserError(f"no image of the {split} split can be read; nothing was built")
    planned = plan.splits[split].class_counts(len(images.classes))
    for j, count in enumerate(counts):
        if split == "train" and not count:
            raise UserError(
                f"no training image of class {images.classes[j]!r} can be read ({planned[j]} tried);"
                " mend or remove the class; nothing was built"
            )
