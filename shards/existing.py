"""What lies where a dataset is to be built: nothing, this very dataset, another one, or something that must stay.

Whether it is this very dataset: the options are equal; so are the names, labels and sizes of the source's images (the
fingerprint); and images whose files were touched since it was built still come to the bytes that are stored. So an
image that was replaced by one of the same size is found, and nothing is read where nothing was touched.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.assemble import ENCODER
from shards.encode import BadImageError, Encoded
from shards.errors import UserError
from shards.findings import LEFT_OUT
from shards.index import MANIFEST, STAGING, holds_images, open_dataset, parse_manifest, place_for
from shards.parallel import run_jobs
from shards.progress import Progress, say
from shards.remote import is_url
from shards.sources import Listing, Source
from shards.sources.files import printable
from shards.staging import REJECTED, file_names
from shards.store import Store
from shards.writer import read_image

IN_PLACE = ("cifar10", "cifar100", "fashion-mnist")  # a few files, that are found wherever else is there
AT_ONCE = 100  # images of a job


def check_apart(dataset: str, source: Path | None, out: Path | str) -> None:
    """Refuse to write a dataset among the images it is built from, or around them (UserError)."""
    if source is None or is_url(out):
        return
    images, place = Path(os.path.realpath(source)), Path(os.path.realpath(out))  # links may lead round in circles
    if place == images or place in images.parents:
        where = "is --source" if place == images else f"holds --source {source}"
        raise UserError(f"--out {out} {where}; give another --out, such as {place_for(images)}")
    if source.is_dir() and images in place.parents and dataset not in IN_PLACE:
        raise UserError(
            f"--out {out} lies inside --source {source}, among the images; give an --out outside, such as"
            f" {images.parent / f'{images.name}-shards'}"
        )


def already_built(
    out: Path | str,
    store: Store,
    options: dict[str, Any],
    images: Source,
    encode: Callable[..., Encoded],
    *,
    overwrite: bool,
    strict: bool,
    workers: int | None = None,
) -> bool:
    """Whether `out` holds this very dataset, and say so; UserError where something else is in the way.

    Args:
        out: where it is to be.
        store: the same place.
        options: what is wanted.
        images: the source.
        encode: takes an image's bytes and the keyword `grey_bits`.
        overwrite: another dataset may be replaced.
        strict: nothing may have been left out.
        workers: processes that compare images; if None, one per available core.
    """
    names = store.names()
    if names is not None and not names - {STAGING}:
        return False
    if names is None or MANIFEST not in names:
        if not is_url(out) and holds_images(Path(out)):
            raise UserError(
                f"{out} holds images and no dataset, and is left alone; to build from them:"
                f" tailstream build folder --source {shlex.quote(str(out))}"
                f" --out {shlex.quote(str(place_for(Path(out))))}"
            )
        raise UserError(f"{out} exists and is not a dataset; give another --out")
    try:
        manifest = parse_manifest(store.read(MANIFEST), f"{out}/{MANIFEST}")
    except UserError as error:  # nobody knows what belongs to it, so nothing is deleted here
        why = str(error).removesuffix("; build the dataset again")
        raise UserError(f"{why}; remove {out}, or give another --out") from None
    if overwrite:
        # NFS keeps files that are deleted while somebody reads them under such names.
        foreign = {name for name in names - {STAGING} - file_names(manifest) if not name.startswith(".nfs")}
        if foreign:
            raise UserError(f"{out} also holds {min(foreign)!r}, which no build put there; move it away")
        return False
    if lost := file_names(manifest) - names:
        raise UserError(
            f"{out} lacks {min(lost)!r} of its dataset; give --overwrite to build it again, or another --out"
        )
    if built_otherwise := difference(manifest["options"], options):
        raise UserError(f"{out} holds a dataset built {built_otherwise}; give --overwrite or another --out")
    if changed := _changed_image(out, store, manifest, images, encode, workers):
        raise UserError(
            f"{out} holds a dataset built from other images ({changed} has changed since); give --overwrite or"
            " another --out"
        )
    if strict and (rejected := manifest["rejected"]["total"]):
        raise UserError(
            f"{out} was built without images that {REJECTED} names ({rejected}); leave out --strict, or fix them"
        )
    say(f"already built: {out} (the same images and options; --overwrite builds it again)")
    return True


def difference(built: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say how what was built differs from what is wanted; "" if it does not."""
    for option, value in wanted.items():
        if built.get(option) != value:
            if option == "source":
                return "from other images"
            return f"with {option.replace('_', '-')} {built.get(option)!r}, not {value!r}"
    return ""


@dataclass(frozen=True)
class _Job:
    images: Listing
    stored: list[str]  # sha256 of what is stored of each; "" for a rejected image
    same_encoder: bool
    read: Callable[[str], bytes]
    encode: Callable[[bytes], Encoded]


class _Compared(NamedTuple):
    images: int
    changed: str  # the first that would be stored differently now; "" if there is none


def _changed_image(
    out: Path | str,
    store: Store,
    manifest: dict[str, Any],
    images: Source,
    encode: Callable[..., Encoded],
    workers: int | None,
) -> str:
    """Name an image that was touched since and would be stored differently now; "" if there is none."""
    since = store.as_of(MANIFEST)
    touched = {
        split: np.flatnonzero(listing.changed >= since)
        for split, listing in images.splits.items()
        if listing.changed is not None
    }
    names = {printable(images.splits[split].names[i]) for split, ids in touched.items() for i in ids}
    if not names:
        return ""
    stored = _stored(out, store, names)
    encode = partial(encode, grey_bits=manifest.get("grey_bits", 16))
    jobs = []
    for split, ids in touched.items():
        listing = images.splits[split]
        kept = [i for i in ids.tolist() if printable(listing.names[i]) in stored]  # not thinned away by the profile
        for part in np.split(np.array(kept, np.int64), np.arange(AT_ONCE, len(kept), AT_ONCE)):
            digests = [stored[printable(listing.names[i])] for i in part.tolist()]
            jobs.append(_Job(listing[part], digests, manifest["encoder"] == ENCODER, images.read, encode))
    total = sum(len(job.images) for job in jobs)
    with Progress("compare touched files", total) as progress:
        found = run_jobs(
            _first_changed, jobs, n_images=total, workers=workers, done=lambda compared: progress.add(compared.images)
        )
    return next((compared.changed for compared in found if compared.changed), "")


def _stored(out: Path | str, store: Store, names: set[str]) -> dict[str, str]:
    """The sha256 of what a dataset stores of these images; "" for rejected ones."""
    rejected = [json.loads(line) for line in store.read(REJECTED).splitlines()]
    stored = {line["source"]: "" for line in rejected if line["source"] in names and line["reason"] != LEFT_OUT}
    for split in open_dataset(out).splits.values():
        found = [(i, name) for i, name in enumerate(split.sample_names()) if name in names]
        shards = split.samples["shard"]
        for shard, images in groupby(found, key=lambda image: int(shards[image[0]])):  # ids follow the shards
            with split.local_shard(shard).open("rb") as file:
                for i, name in images:
                    row = split.samples[i]
                    file.seek(row["offset"])
                    stored[name] = hashlib.sha256(file.read(row["size"])).hexdigest()
    return stored


def _first_changed(job: _Job) -> _Compared:
    for i, digest in enumerate(job.stored):
        found = ""
        try:
            data = read_image(job.images, i, job.read)
            encoded = job.encode(data)
            # Another encoder may write the same image in other bytes.
            comparable = job.same_encoder or encoded.data is data
            found = hashlib.sha256(encoded.data).hexdigest() if comparable or not digest else digest
        except BadImageError:
            pass
        if found != digest:
            return _Compared(len(job.stored), printable(job.images.names[i]))
    return _Compared(len(job.stored), "")
