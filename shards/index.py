"""A built dataset on disk, and how to open it.

    data/digits/
        dataset.json              the manifest; written last, so a folder without it is not a dataset
        train-000000.tar  .idx    plain WebDataset shards, with a wds2idx-compatible text index each
        train.samples.npy         one row per sample: where its image lies, its label and its size
        train.by_class.npy        the sample ids sorted by class
        train.names.txt           one line per sample: where it came from
        val-…  test-…             the held-out splits, laid out alike
        rejected.jsonl            one line per image that would not decode, with the reason

A sample's id is its row in `samples.npy`. Rows follow the shards in order, and the shards were shuffled when
they were built. The two arrays are memory-mapped: opening costs the same for a thousand samples as for ten
million, and no Python object exists per sample.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.remote import RemoteShards, cached_dataset, fetch_file, is_url, origin

FORMAT = "tailstream-shards/1"
MANIFEST = "dataset.json"
STAGING = ".build"  # inside a dataset's folder: a build that has not ended
SPLITS = ("train", "val", "test")
LOOKED_AT = 1000  # files, to say what a folder holds
ARRAYS = ("samples", "by_class")

# offset and size span the encoded image inside its shard file (the tar header is before the offset);
# height and width are those of the decoded image in pixels.
SAMPLE = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i4"),
        ("shard", "<i4"),
        ("label", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ]
)


@dataclass(frozen=True)
class Edition:
    """Which build of a dataset was opened: one with `--overwrite` may take its place at any moment.

    Such a build first moves the manifest away, then replaces the files, and puts its own manifest in place last. So
    whoever opens a file *and then* finds the manifest that it began with holds a file of the same build.
    """

    path: Path
    contents: str  # sha256
    place: tuple[int, int, int, int]  # as long as this stays, nobody need read it again

    @classmethod
    def read(cls, path: Path) -> tuple["Edition", bytes]:
        """Read a manifest: what identifies it, and its bytes. Raises OSError."""
        with path.open("rb") as file:
            data = file.read()
            place = _place(os.fstat(file.fileno()))
        return cls(path, hashlib.sha256(data).hexdigest(), place), data

    def check(self) -> None:
        """Raise a UserError if another build has taken, or is taking, the dataset's place; costs opening a file.

        A network file system may answer a stat for a minute from memory, and asks its server when a file is opened.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                place = _place(os.fstat(file.fileno()))
            if place == self.place or self.read(self.path)[0].contents == self.contents:
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        raise UserError(
            f"{self.path.parent} was built again or removed while it was being read; start again, to read what is"
            " there now"
        )


def _place(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Split:
    """One split of a dataset: memory-mapped arrays over its samples.

    Attributes:
        name: "train", "val" or "test".
        samples: shape (N,), dtype `SAMPLE`; row i describes the sample with id i.
        by_class: shape (N,), int64: the ids of class 0, then those of class 1, and so on.
        class_counts: shape (C,), int64: samples per class; 0 for a class that this split lacks.
        shard_paths: the shard files; `samples["shard"]` counts into this tuple.
        remote: where the shards are fetched from; None where they lie at their paths.
        edition: which build of the dataset the arrays are of; None where the arrays were made in memory.
    """

    name: str
    samples: NDArray[np.void]
    by_class: NDArray[np.int64]
    class_counts: NDArray[np.int64]
    shard_paths: tuple[Path, ...]
    remote: RemoteShards | None = None
    edition: Edition | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        """Return files in place of arrays that are mapped from them: worker processes share these and get no copies."""
        return {name: _mapped_file(value) or value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: np.load(state[name], mmap_mode="r") for name in ARRAYS if isinstance(state[name], Path)}
        vars(self).update(state | arrays)

    @cached_property
    def class_starts(self) -> NDArray[np.int64]:
        """Shape (C + 1,): `by_class[class_starts[j]:class_starts[j + 1]]` are the ids of class j."""
        return np.concatenate([[0], np.cumsum(self.class_counts)])

    def local_shard(self, shard: int) -> Path:
        """Return a shard's file on this machine, fetched and checked first where the dataset is remote."""
        path = self.shard_paths[shard]
        if self.remote is not None:
            self.remote.fetch(shard, path)
        return path

    def check_edition(self) -> None:
        """Raise a UserError where a file that was opened before this call may be another build's than the arrays."""
        if self.edition is not None:
            self.edition.check()

    def sample_names(self) -> list[str]:
        """Return where each sample came from, by id (reads the whole names file)."""
        path = self.shard_paths[0].parent / f"{self.name}.names.txt"
        try:
            return path.read_text(encoding="utf-8").splitlines()
        finally:
            self.check_edition()


def _mapped_file(value: Any) -> Path | None:
    """Return the file whose whole array this is; None for anything else."""
    if not isinstance(value, np.memmap) or value.filename is None:
        return None
    path = Path(value.filename)
    try:
        whole = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # another build is taking its place
        return None
    same = (whole.shape, whole.dtype, whole.strides) == (value.shape, value.dtype, value.strides)
    return path if same else None


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: `root` folder (of a remote one: in the cache), parsed `manifest`, and splits by name."""

    root: Path
    manifest: dict[str, Any]
    splits: dict[str, Split]

    @property
    def place(self) -> str:
        """Where it lies: its folder, or its URL."""
        return origin(self.root) or str(self.root)

    @property
    def name(self) -> str:
        """The dataset's name, such as "digits" (the folder name says nothing)."""
        return str(self.manifest["name"])

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return list(self.manifest["classes"])

    @property
    def fingerprint(self) -> str:
        """What the training images, their labels and their order come down to: 16 hex digits."""
        train = json.dumps(self.manifest["splits"]["train"], sort_keys=True)
        return hashlib.sha256(train.encode()).hexdigest()[:16]

    @property
    def train_counts(self) -> NDArray[np.int64]:
        """n_j, training images of class j, shape (C,), int64."""
        return self.splits["train"].class_counts


def open_dataset(root: Path | str) -> Dataset:
    """Open a folder that `python -m shards build` made, or a URL of one (see `shards.remote`).

    Only the manifest is read; arrays are memory-mapped. Of a remote dataset all but the shards is fetched.

    Raises:
        UserError: no such folder, not a dataset, another format version, or an array that does not fit
            the manifest.
    """
    root = cached_dataset(str(root), MANIFEST) if is_url(root) else Path(root)
    manifest, edition = read_edition(root)
    try:
        entries = manifest["splits"]
        splits = {name: open_split(root, name, entries[name], edition) for name in SPLITS if name in entries}
    except KeyError as error:
        raise UserError(f"{root / MANIFEST} lacks the key {error}; build the dataset again") from None
    finally:
        edition.check()  # the better message, where another build's arrays were met
    return Dataset(root, manifest, splits)


def image_sizes(sizes: Sequence[NDArray[np.void]]) -> dict[str, int]:
    """Return the smallest and largest "height" and "width" in arrays with these fields, N >= 1 each."""
    return {
        f"{name}_{axis}": int(bound([bound(size[axis]) for size in sizes]))
        for name, bound in (("min", np.min), ("max", np.max))
        for axis in ("height", "width")
    }


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a dataset's dataset.json, without looking at the other files.

    Raises:
        UserError: no such folder, not a dataset, or another format version.
    """
    return read_edition(root)[0]


def read_edition(root: Path) -> tuple[dict[str, Any], Edition]:
    """Read a dataset.json as `read_manifest` does, and what tells it from a later one."""
    path = root / MANIFEST
    try:
        edition, data = Edition.read(path)
        return parse_manifest(data, path), edition
    except (FileNotFoundError, NotADirectoryError):
        if (root / STAGING).is_dir():
            raise UserError(f"{root} holds an unfinished build; give the command that began it again") from None
        raise UserError(f"{root} {_why_no_dataset(root)}") from None


def _why_no_dataset(root: Path) -> str:
    """What there is instead, and what to do: nothing that could cost anybody's files."""
    build_it = f"tailstream build digits --out {shlex.quote(str(root))}"
    if not root.is_dir():
        if root.exists():
            beside = f", such as {root.parent}" if (root.parent / MANIFEST).is_file() else ""
            return f"is a file; give the folder of a dataset{beside}"
        return f"does not exist, so it is not a dataset; build one with: {build_it}"
    if below := sorted(path.parent for path in root.glob(f"*/{MANIFEST}")):
        return f"has no {MANIFEST}, but {below[0]} has; give that"
    if holds_images(root):
        return (
            f"has no {MANIFEST}, but images; build a dataset from them with:"
            f" tailstream build folder --source {shlex.quote(str(root))} --out {shlex.quote(str(place_for(root)))}"
        )
    if any(root.iterdir()):
        return f"has no {MANIFEST}, so it is not a dataset; give a folder that `tailstream build` made"
    return f"has no {MANIFEST}, so it is not a dataset; build one with: {build_it}"


def place_for(images: Path) -> Path:
    """Return where a dataset of these images may be built: data/NAME, or beside them where they lie there."""
    images = images.resolve()
    place = Path("data", images.name or "images")
    return place if place.resolve() != images else place.with_name(f"{place.name}-shards")


def holds_images(folder: Path) -> bool:
    """Whether images lie in or below a folder; looks at its first thousand files only."""
    from shards.encode import EXTENSIONS, UNREAD_EXTENSIONS  # PIL takes a while to load

    files = (name for _, _, names in os.walk(folder) for name in names)
    ends = (os.path.splitext(name)[1].lower() for name in islice(files, LOOKED_AT))
    return any(end in EXTENSIONS | UNREAD_EXTENSIONS for end in ends)


def parse_manifest(data: bytes, path: Path | str) -> dict[str, Any]:
    """Read the contents of a dataset.json; raises as `read_manifest` does, naming `path`."""
    try:
        manifest = json.loads(data.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); build the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} says format {found!r}, this version reads {FORMAT!r}; build the dataset again")
    for key in ("name", "preset", "options", "classes", "imbalance_factor", "image", "splits", "rejected"):
        if key not in manifest:
            raise UserError(f"{path} lacks the key {key!r}; build the dataset again")
    try:
        for entry in manifest["splits"].values():
            for name in (*entry["files"], *(shard["file"] for shard in entry["shards"])):
                if name in ("", ".", "..") or "/" in name:  # files are fetched, and deleted, by these names
                    raise UserError(f"{path} names {name!r}, which is no file of its folder; build the dataset again")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); build the dataset again") from None
    return manifest


def open_split(root: Path, name: str, entry: dict[str, Any], edition: Edition | None = None) -> Split:
    """Open one split by its name and its entry in the manifest; raises as `open_dataset` does."""
    url = origin(root)
    if url is not None:
        for file, digest in entry["files"].items():
            fetch_file(url, root / file, digest)
    arrays = {}
    for kind, dtype in (("samples", SAMPLE), ("by_class", np.dtype("<i8"))):
        path = root / f"{name}.{kind}.npy"
        try:
            # An empty file cannot be mapped, and an empty split has nothing to map.
            array = np.load(path, mmap_mode="r" if entry["samples"] else None)
        except PermissionError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}); build the dataset again") from None
        if array.dtype != dtype or array.shape != (entry["samples"],):
            raise UserError(
                f"{path} holds {array.shape[0] if array.ndim else 0} entries of the manifest's {entry['samples']};"
                f" run: tailstream verify {shlex.quote(str(root))}, then build the dataset again"
            )
        arrays[kind] = array
    return Split(
        name=name,
        samples=arrays["samples"],
        by_class=arrays["by_class"],
        class_counts=np.asarray(entry["class_counts"], dtype=np.int64),
        shard_paths=tuple(root / shard["file"] for shard in entry["shards"]),
        remote=None if url is None else RemoteShards(url, tuple(shard["sha256"] for shard in entry["shards"])),
        edition=edition,
    )
