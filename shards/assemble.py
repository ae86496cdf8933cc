"""From shards that are done to a dataset: the arrays, the names, what was rejected, and the manifest."""

import json
from collections import Counter
from io import BytesIO
from typing import Any, TextIO

import numpy as np
import PIL
from numpy.typing import NDArray

from shards.errors import UserError
from shards.findings import Findings
from shards.groups import imbalance_factor
from shards.index import FORMAT, MANIFEST, SAMPLE, image_sizes
from shards.sources import Source
from shards.staging import PLAN, REJECTED, Staging
from shards.writer import is_of, sha256

ENCODER = f"Pillow {PIL.__version__}"
SMALL_PIXELS = 64


def assemble(
    staging: Staging,
    name: str,
    source: Source,
    options: dict[str, Any],
    shards: dict[str, list[str]],
    findings: Findings,
    build: str = "",
) -> dict[str, Any]:
    """Write what a dataset has besides its shards, the manifest last; return the manifest.

    Args:
        staging: where the shards and their records are.
        name: the dataset's name.
        source: where its images came from, with the classes that are left.
        options: what it was built with.
        shards: for each split, the names of its shards without their ends, in order.
        findings: what was found out about the images before.
        build: what identifies the build, in the records of its shards.

    Raises:
        UserError: a split or a class of the training split has no image left, though it had one before; or shards have
            gone again.
    """
    splits = {}
    sizes = []
    lying = staging.sizes()
    reasons: Counter[str] = Counter()
    with staging.writing(REJECTED) as (rejected_path,), rejected_path.open("w", encoding="utf-8") as rejected_file:
        _write_lines(rejected_file, findings.rejected)
        reasons.update(image["reason"] for image in findings.rejected)
        for split, split_shards in shards.items():
            records = [staging.read_json(f"{shard}.json") for shard in split_shards]
            # Behind a URL there are no locks, and a cluster's workers may end a shard when their builder is gone.
            if not all(is_of(record, build, lying) for record in records):
                raise UserError("another build was at work in the same place; give the same command again")
            rejected = [image for record in records for image in record["rejected"]]
            _write_lines(rejected_file, [{"split": split, "class": source.classes[i["label"]], **i} for i in rejected])
            reasons.update(image["reason"] for image in rejected)
            # A shard whose images were all rejected is left out.
            entries = {
                shard: record["entry"]
                for shard, record in zip(split_shards, records, strict=True)
                if record["entry"]["samples"]
            }
            splits[split], samples = _write_split(staging, split, entries, len(source.classes))
            try:
                _check_something_left(
                    split, splits[split]["class_counts"], source, Counter(i["label"] for i in rejected)
                )
            except UserError:
                staging.clear()  # these images would fail again
                raise
            sizes.append(samples[["height", "width"]])

    image = image_sizes(sizes)
    small = max(image["max_height"], image["max_width"]) <= SMALL_PIXELS
    manifest = {
        "format": FORMAT,
        "name": name,
        "preset": source.preset or ("small" if small else "photos"),
        "options": options,
        "classes": source.classes,
        "imbalance_factor": imbalance_factor(splits["train"]["class_counts"]),
        "grey_bits": findings.grey_bits,
        "image": image,
        "splits": splits,
        "rejected": {"total": reasons.total(), "reasons": dict(reasons)},
        "encoder": ENCODER,
    }
    staging.write_json(MANIFEST, manifest, as_of=staging.as_of(PLAN))
    return manifest


def _write_lines(file: TextIO, images: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(image, ensure_ascii=False, sort_keys=True) + "\n" for image in images)


def _write_split(
    staging: Staging, split: str, entries: dict[str, dict[str, Any]], n_classes: int
) -> tuple[dict[str, Any], NDArray[np.void]]:
    """Write a split's arrays and names, shard by shard; return its entry in the manifest and its samples array."""
    names = [f"{split}.{kind}" for kind in ("samples.npy", "by_class.npy", "names.txt")]
    n_samples = sum(entry["samples"] for entry in entries.values())
    with staging.writing(*names) as paths:
        samples_path, by_class_path, names_path = paths
        with samples_path.open("wb") as samples_file, names_path.open("wb") as names_file:
            header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (n_samples,)}
            np.lib.format.write_array_header_1_0(samples_file, header)
            for i, shard in enumerate(entries):
                rows = np.load(BytesIO(staging.read(f"{shard}.npy")))
                rows["shard"] = i
                samples_file.write(rows.tobytes())
                names_file.write(staging.read(f"{shard}.names.txt"))
        samples = np.load(samples_path, mmap_mode="r" if n_samples else None)
        with by_class_path.open("wb") as by_class_file:
            np.save(by_class_file, np.argsort(samples["label"], kind="stable").astype("<i8"))
        entry = {
            "samples": n_samples,
            "class_counts": np.bincount(samples["label"], minlength=n_classes).tolist(),
            "shards": list(entries.values()),
            "files": {name: sha256(path) for name, path in zip(names, paths, strict=True)},
        }
    return entry, samples


def _check_something_left(split: str, counts: list[int], source: Source, rejected: Counter[int]) -> None:
    if not any(counts):
        raise UserError(
            f"no image of the {split} split can be read any more; the source changed while it was built; give the"
            " same command again"
        )
    if split == "train" and 0 in counts:
        j = counts.index(0)
        raise UserError(
            f"no training image of class {source.classes[j]!r} can be read any more ({rejected[j]} tried); the source"
            " changed while it was built; give the same command again"
        )
