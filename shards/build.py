"""Build a dataset: list a source, plan its splits, write the shards, index them, and publish it all at once.

A build can be interrupted at any moment, even by kill -9: the same command resumes it and keeps the shards that
are done. The same source and options give the same bytes in every file, whatever the number of workers and of
interruptions.
"""

import hashlib
import json
import math
import os
import shlex
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.assemble import ENCODER, assemble
from shards.copies import identical_images, pictures_in_two_splits
from shards.encode import Encoded, encode
from shards.errors import UserError
from shards.existing import already_built, check_apart, difference
from shards.findings import Findings, find_out
from shards.index import FORMAT, MANIFEST, SPLITS, STAGING, open_dataset
from shards.parallel import run_jobs
from shards.plan import Plan, plan_splits
from shards.profiles import PROFILES
from shards.progress import Progress, say
from shards.remote import RemoteStore, is_url
from shards.show import summary
from shards.source_copy import on_this_machine
from shards.sources import Source, check_dataset, open_source
from shards.sources.files import printable, some
from shards.staging import FINDINGS, PLAN, REJECTED, Staging, staged
from shards.store import LocalStore
from shards.writer import ShardJob, Written, read_written, write_shard

TEST_FRACTION = 0.25
QUALITY = 90
FILE_TIMES = 2_000_000_000  # nanoseconds: file systems round the times of files, some to two seconds
OWN_NAMES = ("folder", "csv")  # whoever builds such a dataset names it, by its folder


def build(
    dataset: str,
    *,
    source: str | Path | None = None,
    out: str | Path | None = None,
    profile: str | None = None,
    imbalance_factor: float | None = None,
    seed: int = 0,
    test_fraction: float | None = None,
    val_fraction: float | None = None,
    shorter_side: int | None = None,
    quality: int | None = None,
    keep_bytes: bool = False,
    shard_samples: int = 2000,
    workers: int | None = None,
    executor: Literal["processes", "dask"] = "processes",
    scheduler: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Path | str:
    """Build shards and a class index from images.

    A dataset that is already there, built from the same images with the same options, is left as it is. A build
    that was interrupted is resumed.

    Args:
        dataset: what to build: digits (comes with scikit-learn), fashion-mnist, cifar10, cifar100, inat2017,
            inat2018, inat2019, inat2021, imagenet-lt, places-lt, folder (a sub-folder of images per class) or csv
            (a file with the columns path, label and perhaps split).
        source: where the images are: the folder of the official files, as they are unpacked; for csv the file. A
            URL such as s3://bucket/folder is copied to this machine first (see shards/source_copy.py).
        out: the folder to make, or a URL such as s3://bucket/folder; data/DATASET if not given.
        profile: how training images are thinned: natural (not at all), exp, step or pareto; if not given,
            exp for digits, cifar10, cifar100 and fashion-mnist, else natural.
        imbalance_factor: largest over smallest class of the profile, at least 1; if not given, 20 for digits,
            else 100.
        seed: decides which images are held out and kept, and their order.
        test_fraction: share of each class held out for testing, in [0, 1), where the source has no test split
            of its own; 0.25 if not given.
        val_fraction: share of each class's remaining images held out for validation, likewise; if not
            given, 0.1 for digits, folder and csv, else 0, which makes no validation split.
        shorter_side: shrink larger images to this shorter side in pixels.
        quality: JPEG quality of shrunk images, 1 to 100; 90 if not given.
        keep_bytes: store every file as it is, and leave out those that a decoder could show otherwise (turned by
            EXIF, not 8-bit RGB or grey, neither JPEG nor PNG), which are written again without this.
        shard_samples: most images per shard file.
        workers: processes; if not given, one per available core, fewer where there are few images.
        executor: what does the work: processes on this machine, or the workers of a Dask cluster, which see the
            same folders and have tailstream installed.
        scheduler: the Dask scheduler's address, such as tcp://10.0.0.1:8786.
        strict: stop instead of leaving anything out: before any work where lists and files do not agree, else at
            the first image that cannot be stored.
        overwrite: replace a dataset that is already there, or an unfinished build of another; a dataset stays
            until the new one is complete.

    Returns:
        The dataset's folder.

    Raises:
        UserError: an option, a source or an output folder that will not do.
    """
    out = Path("data", dataset) if out is None else out if is_url(out) else Path(out)
    share = "a share of at least 0 and below 1"
    count = "a whole number of at least 1"
    for option, value, low, high, wanted in (
        ("--imbalance-factor", imbalance_factor, 1, sys.float_info.max, "a number of at least 1"),
        ("--seed", seed, 0, sys.maxsize, f"a whole number from 0 to {sys.maxsize}"),
        ("--test-fraction", test_fraction, 0, math.nextafter(1, 0), share),
        ("--val-fraction", val_fraction, 0, math.nextafter(1, 0), share),
        ("--shorter-side", shorter_side, 1, sys.maxsize, count),
        ("--quality", quality, 1, 100, "a JPEG quality from 1 to 100"),
        ("--shard-samples", shard_samples, 1, sys.maxsize, count),
        ("--workers", workers, 1, sys.maxsize, count),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{option} is {value if isinstance(value, int) else f'{value:g}'}; give {wanted}")
    if profile is not None and profile not in PROFILES:
        raise UserError(f"unknown --profile {profile!r}; choose one of: {', '.join(PROFILES)}")
    if keep_bytes and shorter_side is not None:
        raise UserError(f"--keep-bytes and --shorter-side {shorter_side} exclude each other; leave one of them out")
    if quality is not None and shorter_side is None:
        raise UserError(f"--quality {quality} has no effect without --shorter-side; leave it out or give both")
    if (executor == "dask") != (scheduler is not None):
        raise UserError("--executor dask and --scheduler ADDRESS need each other")
    if scheduler is not None and workers is not None:
        raise UserError(f"--workers {workers} has no effect with --executor dask; leave it out")
    if source is not None and is_url(source) and is_url(out) and f"{out}/".startswith(f"{str(source).rstrip('/')}/"):
        raise UserError(f"--out {out} lies inside --source {source}, among the images; give an --out outside")
    check_dataset(dataset)  # before anything is copied
    with on_this_machine(source) as place:
        if place is not None and scheduler is not None:
            place = place.absolute()  # the cluster's workers were started elsewhere
        check_apart(dataset, place, out)
        listed = time.time_ns() - FILE_TIMES
        images = open_source(dataset, place)
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
            "val_fraction": _fraction(images, "val", val_fraction, images.val_fraction),
            "shorter_side": shorter_side,
            "quality": QUALITY if quality is None else quality,
            "keep_bytes": keep_bytes,
            "shard_samples": shard_samples,
        }
        if strict and images.skipped:
            raise UserError(f"{images.skipped[0]}; fix that or leave out --strict")
        store = RemoteStore(str(out)) if is_url(out) else LocalStore(Path(os.path.realpath(out)))
        encoding = partial(encode, **{name: options[name] for name in ("shorter_side", "quality", "keep_bytes")})
        there = partial(already_built, out, store, options, images, encoding, strict=strict, workers=workers)
        try:
            # An equal dataset may lie where nobody may write.
            if STAGING not in (store.names() or ()) and there(overwrite=overwrite):
                return out
            with staged(store) as staging:
                recovered = staging.recover()
                just_built = recovered is not None and not difference(recovered["options"], options)
                if not there(overwrite=overwrite and not just_built):
                    _build(out, staging, images, listed, options, encoding, overwrite, strict, workers, scheduler)
                elif staging.read_json(PLAN) in (None, _plan_file(options)):
                    staging.clear()  # an --overwrite with the same options that was interrupted
        except (KeyboardInterrupt, SystemExit):
            names = store.names() or ()
            if STAGING in names or MANIFEST not in names:
                say(f"{out} is unfinished; the same command resumes it")
            raise
        except MemoryError:
            raise UserError(
                f"not enough memory to build {out}; resume with the same command and fewer --workers, or"
                " start over with --shorter-side and --overwrite"
            ) from None
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror or error}; fix that or give another --out"
                " (shards that are done are kept, and the same command resumes the build)"
            ) from None
        return out


def _fraction(images: Source, split: str, fraction: float | None, default: float) -> float | None:
    """The share to hold out for a split, None where the source has its own."""
    if split not in images.splits:
        return default if fraction is None else float(fraction)
    if fraction is not None:
        raise UserError(f"the source has its own {split} split; leave out --{split}-fraction {fraction:g}")
    return None


def _plan_file(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "format": FORMAT, "encoder": ENCODER}


def _build(
    out: Path | str,
    staging: Staging,
    images: Source,
    listed: int,
    options: dict[str, Any],
    encoding: Callable[..., Encoded],
    overwrite: bool,
    strict: bool,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Go on with an unfinished build of the same, or begin one; publish it."""
    begun, wanted = staging.read_json(PLAN), _plan_file(options)
    if begun is not None and begun != wanted and not overwrite:
        raise UserError(
            f"{out} holds an unfinished build {difference(begun, wanted)};"
            " give --overwrite to start over, or another --out"
        )
    remembered = staging.read_json(FINDINGS) if begun == wanted else None
    if strict and remembered is not None and remembered["rejected"]:
        remembered = None  # they may have been fixed since
    if remembered is not None:
        findings = Findings(**remembered)
    else:
        copies = identical_images(images) if options["test_fraction"] or options["val_fraction"] else []
        first = _plan(images, options, copies)
        keep_bytes = options["keep_bytes"]
        findings = find_out(images, first, copies, encoding, keep_bytes, workers=workers, scheduler=scheduler)
    plan = _plan(images, options, findings.copies, findings.unreadable)
    if strict and findings.rejected:
        raise UserError(_not_strict("{source}: {reason}".format(**findings.rejected[0])))
    for note in (*images.notes, *_alike_names(images.classes), *images.skipped, *plan.notes, *findings.notes(images)):
        say(f"note: {note}")
    if remembered is None:
        staging.clear()
        staging.write_json(FINDINGS, asdict(findings))
        staging.write_json(PLAN, wanted, as_of=listed)
    images, plan = findings.applied(images, plan)
    encoding = partial(encoding, grey_bits=findings.grey_bits)
    build_id = hashlib.sha256(json.dumps([wanted, asdict(findings)], sort_keys=True).encode()).hexdigest()
    jobs = {
        split: _shard_jobs(staging, split, images, plan, encoding, options["shard_samples"], build_id)
        for split in SPLITS
        if split in plan.splits
    }
    _write_shards(staging, [job for split_jobs in jobs.values() for job in split_jobs], strict, workers, scheduler)
    name = printable(Path(out).resolve().name) if options["dataset"] in OWN_NAMES else options["dataset"]
    shards = {split: [job.name for job in split_jobs] for split, split_jobs in jobs.items()}
    manifest = assemble(staging, name, images, options, shards, findings, build_id)
    shared = list(pictures_in_two_splits(staging, shards))
    staging.publish()
    for line in shared:
        say(f"note: {line}; python -m shards inspect {shlex.quote(str(out))} --duplicates lists them")
    if rejected := manifest["rejected"]["total"]:
        total = sum(len(listing) for listing in plan.splits.values()) + len(findings.rejected)
        kinds = ", ".join(f"{n} {reason}" for reason, n in Counter(manifest["rejected"]["reasons"]).most_common())
        say(f"note: images left out: {rejected} of {total} ({kinds}); {REJECTED} names them")
    asked, reached = options["imbalance_factor"], manifest["imbalance_factor"]
    if asked is not None and f"{asked:.4g}" != f"{reached:.4g}":
        say(f"note: the imbalance factor is {reached:.4g}, not the {asked:.4g} that was asked for")
    print(summary(open_dataset(out)))


def _plan(images: Source, options: dict[str, Any], copies: list[list[int]], unreadable: Sequence[int] = ()) -> Plan:
    return plan_splits(
        images,
        profile=options["profile"],
        imbalance_factor=options["imbalance_factor"] or 1.0,
        test_fraction=options["test_fraction"] or 0.0,
        val_fraction=options["val_fraction"] or 0.0,
        seed=options["seed"],
        copies=copies,
        unreadable=unreadable,
    )


def _alike_names(classes: list[str]) -> Iterator[str]:
    """A line about classes that a reader would take for the same."""
    by_look: dict[str, list[str]] = {}
    for name in classes:
        by_look.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(repr(name))
    if alike := [" and ".join(names) for names in by_look.values() if len(names) > 1]:
        yield f"classes whose names differ only in case, spaces or how accents are written: {some(alike)}"


def _not_strict(example: str) -> str:
    return f"{example}; fix or remove it, or leave out --strict to build without it"


def _write_shards(
    staging: Staging, jobs: list[ShardJob], strict: bool, workers: int | None, scheduler: str | None
) -> None:
    """Write the shards that are not there yet."""
    rejected = 0

    def count(shard: Written) -> int:
        nonlocal rejected
        rejected += shard.rejected
        if strict and shard.rejected:
            raise UserError(_not_strict(shard.example))
        return shard.samples + shard.rejected

    def tell(shard: Written) -> None:
        images = count(shard)
        progress.add(images, f"{rejected} rejected" if rejected else "")

    sizes = staging.sizes()
    waiting = []
    done = 0
    for job in jobs:
        written = read_written(staging, job.name, sizes, job.build)
        if written is None or (strict and written.rejected):  # which may have been fixed since
            waiting.append(job)
        else:
            done += count(written)
    if done:
        say(f"continuing: {len(jobs) - len(waiting)} of {len(jobs)} shards done")
    total = sum(len(job.images) for job in jobs)
    with Progress("build", total, done) as progress:
        run_jobs(write_shard, waiting, n_images=total - done, workers=workers, scheduler=scheduler, done=tell)


def _shard_jobs(
    staging: Staging,
    split: str,
    images: Source,
    plan: Plan,
    encoding: Callable[[bytes], Encoded],
    most_samples: int,
    build_id: str,
) -> list[ShardJob]:
    """Cut a split into shards of nearly equal length."""
    listing = plan.splits[split]
    n_shards = -(-len(listing) // most_samples)
    return [
        ShardJob(
            staging=staging,
            name=f"{split}-{i:06d}",
            first=int(ids[0]),
            images=listing[ids],
            read=images.read,
            encode=encoding,
            build=build_id,
        )
        for i, ids in enumerate(np.array_split(np.arange(len(listing)), n_shards))
    ]
