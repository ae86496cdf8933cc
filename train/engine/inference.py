"""A trained model in use: opened from its folder alone, and images from anywhere shown to it as in its evaluation.

  files, folders, tars ─ find_images ─> Item ─(threads: read, decode, crop, resize)─> pictures ─ Model ─> probabilities

An image goes the way that it would go through shards and an evaluation: `shards.encode` (upright, 8-bit, shrunk where
the dataset was), then PIL's crop and resize of the reference loader. Neither the dataset nor DALI is needed. The
network computes in float32: the figures of a run that was evaluated in bf16 or fp16 differ by that.
"""

import json
import os
import re
import stat
import tarfile
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import find_recipe
from pipeline.budget import keep_freed_memory
from pipeline.pictures import FILTER_NAMES, FILTERS
from shards.cores import cores
from shards.encode import EXTENSIONS, UNREAD_EXTENSIONS, BadImageError, decode, unread
from shards.errors import UserError
from shards.progress import say
from train.engine import runs
from train.engine.calibration import Calibration, probabilities, read_calibration
from train.networks.model_files import FILES, Description, choose_weights, load_model, read_description
from train.networks.networks import Network

Picture = NDArray[np.uint8]  # (S, S, 3), RGB


class View(NamedTuple):
    """What a model sees of an image: see the same names in `train.networks.model_files.Description`."""

    shorter_side: int | None
    quality: int
    grey_bits: int
    eval_augment: str
    image_size: int

    def picture(self, data: bytes) -> Picture:
        """Return what an evaluation shows of an image file, uint8, (S, S, 3).

        Raises:
            BadImageError: the bytes do not decode to an image.
        """
        image = decode(data, self.shorter_side, self.quality, self.grey_bits)
        sides = np.array([image.height]), np.array([image.width])
        recipe = find_recipe(self.eval_augment)
        windows_B4, _ = recipe.draw(np.random.default_rng(0), *sides, self.image_size)
        ((top, left, height, width),) = windows_B4.tolist()
        window = image.crop((left, top, left + width, top + height))
        return np.array(window.resize((self.image_size, self.image_size), FILTERS[recipe.interpolation]))


@dataclass(frozen=True)
class Model:
    """A trained model, ready for use.

    Attributes:
        run: its folder.
        weights: "last" or "selected".
        network: in evaluation mode.
        description: what model.json says of it.
        calibration: of these weights, or None where the run is not calibrated.
    """

    run: Path
    weights: str
    network: Network
    description: Description
    calibration: Calibration | None

    @property
    def view(self) -> View:
        """What it sees of an image."""
        of = self.description
        return View(of.shorter_side, of.quality, of.grey_bits, of.eval_augment, of.image_size)

    @property
    def calibrated(self) -> Calibration:
        """The calibration, or the one that changes nothing."""
        return self.calibration or Calibration.none(self.description.train_counts)

    @torch.inference_mode()
    def logits(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the network's own logits, shape (B, C).

        Raises:
            UserError: so many images at a time do not fit the memory.
        """
        device = self.network.classifier.weight.device
        try:
            return self.network.predict(torch.from_numpy(images_BHWC).to(device)).float().cpu().numpy()
        except (MemoryError, RuntimeError) as error:  # torch's of a GPU is of the latter
            said = " ".join(str(error).split())
            if isinstance(error, RuntimeError) and not re.search("out of memory|not enough memory|can't alloc", said):
                raise
            raise UserError(
                f"out of memory with {len(images_BHWC)} images ({said[:160]}); lower --batch-size"
            ) from error

    def probabilities(
        self, images_BHWC: NDArray[np.uint8], prior_C: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Return probabilities, shape (B, C), calibrated where the run is.

        Args:
            images_BHWC: as `View.picture` makes them.
            prior_C: the classes' shares where the model is used; None: as it was trained, or calibrated.

        Raises:
            UserError: a logit is not finite.
        """
        logits_BC = self.logits(images_BHWC)
        if not np.isfinite(logits_BC).all():
            raise UserError(f"the logits of {self.run} hold nan or inf: its training has diverged; use another run")
        return probabilities(logits_BC, self.calibrated, self.description.train_counts, prior_C)


def open_model(run: Path, weights: str | None = None, device: str | None = None) -> Model:
    """Open a run's model.

    Args:
        run: a run's folder; of a run that has a description in its model.json, the model files alone will do.
        weights: "last", "selected", or None: those that val chose, where it chose an epoch.
        device: where it computes; None: on a GPU that there is and that has room for it, else on the CPU.

    Raises:
        UserError: no model, a damaged one, one of a newer format, or one that evaluates on random windows or
            distorts them.
    """
    description = read_description(run) or _describe_older(run)
    if description.crop_share is None or find_recipe(description.eval_augment).distortions:
        raise UserError(
            f"{run} was evaluated with {description.eval_augment!r}, which does not show a fixed window as it is;"
            " train it again with --input.eval_augment none, or eval"
        )
    weights = choose_weights(run, weights)
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())  # in a container torch sees all of the machine's
    network = load_model(run, weights)
    try:
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # the latter where a process finds no room at all
        said, _, _ = str(error).partition("\n")
        say(f"note: the GPU cannot take the network ({said}); the CPU computes")
        network.to("cpu")
    if len(description.classes) != network.classifier.out_features:
        raise UserError(
            f"{run}/model.json names {len(description.classes)} classes, and its network has"
            f" {network.classifier.out_features}; train the run again"
        )
    return Model(run, weights, network, description, read_calibration(run, weights, len(description.classes)))


def _describe_older(run: Path) -> Description:
    """Put together what a run of before model.json described models left in other files."""
    saved, summary = runs.read_config(run), runs.read_summary(run)
    try:
        source = saved if "augment" in saved["input"] else runs.read_config(Path(saved["about"]["from"]))
        per_class = json.loads((run / "per_class.json").read_text(encoding="utf-8"))
        network, recipe = load_model(run), find_recipe(source["input"]["eval_augment"])
        return Description(
            classes=[str(name) for name in per_class["classes"]],
            train_counts=[int(count) for count in per_class["train_counts"]],
            image_size=int(source["input"]["image_size"]),
            eval_augment=recipe.name,
            crop_share=recipe.centre_share,
            interpolation=FILTER_NAMES[recipe.interpolation],
            mean=network.normalize.mean.flatten().tolist(),
            std=network.normalize.std.flatten().tolist(),
            shorter_side=None,  # unknown; images were shrunk to it for speed
            quality=90,
            dataset={"name": summary["dataset"], "fingerprint": None},
            method=summary["title"],
            commit=summary["environment"].get("commit"),
            evaluated_on=summary["evaluated_on"],
            weights={"last": {"file": FILES["last"], "epoch": summary["epochs"], "figures": summary["last"]}},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run} does not say what its model sees ({type(error).__name__}: {error}); train the run again"
        ) from None


@dataclass(frozen=True)
class Item:
    """One image to look at: a file, or a member of a tar.

    Attributes:
        name: what it is called in results.
        path: the file.
        offset, size: where it lies in the file; None: the whole file.
        reason: why it cannot be read, where that is known.
    """

    name: str
    path: str
    offset: int = 0
    size: int | None = None
    reason: str | None = None

    def read(self) -> bytes:
        """Return its bytes; a pipe or a device, on which one could wait for ever, has none."""
        if self.reason:
            raise BadImageError(self.reason)
        with open(self.path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError("not a regular file")
            if self.size is None:
                return file.read()
            data = os.pread(file.fileno(), self.size, self.offset)
            if len(data) < self.size:
                raise BadImageError("the tar ends inside it")
            return data


def find_images(paths: Sequence[str], listed: Sequence[str] = ()) -> list[Item]:
    """Return all images in files, folders and tars, in the order given, folders sorted by name.

    Folders are searched to any depth for files that end like an image or in .tar, without hidden ones; links are
    followed, and a folder that several lead to is searched once. A file that is named is taken whatever its name. Of a
    tar, the members that end like an image.

    Args:
        paths: what somebody names; it must be there.
        listed: what a list names: what is missing is found out when it is read.

    Raises:
        UserError: a path that does not exist, a folder or tar without images, or nothing at all.
    """
    items: list[Item] = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path!r} does not exist; give images, folders or .tar shards")
        found = list(_images_at(path))
        if not found:
            why = f" ({unread(others)})" if (others := left_out(path)) else ""
            raise UserError(f"{path!r} holds no images{why}; give images, folders or .tar shards")
        items += found
    for path in listed:
        items += _images_at(path)
    if not items:
        raise UserError("there are no images to look at; give images, folders, .tar shards, or - and a list of them")
    return items


def left_out(folder: str) -> Counter[str]:
    """Return how many pictures lie in or below a folder that this PIL does not read, by their extension."""
    names = (name for _, files in _folders(folder) for name in files)
    ends = (Path(name).suffix.lower() for name in names if not name.startswith("."))
    return Counter(end for end in ends if end in UNREAD_EXTENSIONS)


def _folders(path: str, refused: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it that are not hidden, each once, with the names of its files, sorted.

    Those that cannot be listed are left out; `refused` is called with each error.
    """
    entered: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(path, followlinks=True, onerror=refused):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:  # by a link, such as one to a folder above
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, sorted(files)


def _say_skipped(error: OSError) -> None:
    say(f"skipped {error.filename!r}: {error.strerror}")


def _images_at(path: str) -> Iterator[Item]:
    if os.path.isdir(path):
        for parent, files in _folders(path, _say_skipped):
            for name in files:
                if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS | {".tar"}:
                    yield from _images_at(os.path.join(parent, name))
    elif path.lower().endswith(".tar") and os.path.isfile(path):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isreg() and PurePosixPath(member.name).suffix.lower() in EXTENSIONS:
                        yield Item(f"{path}/{member.name}", path, member.offset_data, member.size)
        except tarfile.TarError:
            yield Item(path, path, reason="a damaged tar")
        except OSError as error:
            yield Item(path, path, reason=error.strerror or "a damaged tar")
    else:
        yield Item(path, path)


def show_images(
    items: Sequence[Item], views: Sequence[View], threads: int, ahead: int
) -> Iterator[tuple[Item, list[Picture] | str]]:
    """Read and decode images in threads, so many ahead of what is asked for.

    Args:
        items: what to look at.
        views: V different ways to look at it.
        threads: how many.
        ahead: images that may lie here ready.

    Returns:
        Each item in its order, with V pictures, or with the reason why it has none.
    """
    stopped = threading.Event()

    def look(item: Item) -> list[Picture] | str:
        if stopped.is_set():
            return "stopped"
        try:
            data = item.read()
            return [view.picture(data) for view in views]
        except BadImageError as error:
            return str(error)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            return getattr(error, "strerror", None) or str(error)

    waiting: deque[tuple[Item, Future[Any]]] = deque()
    # Filters of warnings belong to the whole process, so they are set here and not in the threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for item in items:
                waiting.append((item, pool.submit(partial(look, item))))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            stopped.set()
