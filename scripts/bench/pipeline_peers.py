"""What bench_pipeline.py compares with: other libraries, as their users have them, with ordinary Pillow.

    python scripts/bench/pipeline_peers.py NAME FOLDER photos|small DEVICE

FOLDER holds `source`, a folder of images per class, the largest class first; whatever format a library wants is made
from it before the clock runs. Each contestant delivers a uniform and a reversed batch per step (P(class j) ∝ 1/n_j),
with two workers in all. Orders are so long that the ends of epochs, where workers start again, do not count.
"""

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler

from bench.loader_process import Steps, serve

BATCH = {"photos": 64, "small": 128}  # images per stream and step
SIZE = {"photos": 224, "small": 32}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONG = 500_000  # images that are ordered at once


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Map-style: photographs are read from files, small pictures lie decoded in memory as in torchvision's CIFAR10.

    Attributes:
        labels: of each image; by them the counts n_j.
        weights: of each image, drawn by which the classes come by reversed probability: (1/n_j)/n_j.
    """

    def __init__(self, folder: Path, data: str) -> None:
        self.paths = sorted((folder / "source").glob("*/*.*"))
        classes = sorted({path.parent.name for path in self.paths})
        self.labels = [classes.index(path.parent.name) for path in self.paths]
        self.counts = np.bincount(self.labels)
        self.weights = (1 / self.counts**2)[self.labels]
        self.transform = transform(data)
        self.decoded = [] if data == "photos" else [np.asarray(Image.open(path)) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.decoded[i]) if self.decoded else Image.open(self.paths[i]).convert("RGB")
        return self.transform(image), self.labels[i]


class DualPictures(Pictures):
    """As BBN's code has it: with each image comes another, of a class drawn by reversed probability."""

    def __init__(self, folder: Path, data: str) -> None:
        super().__init__(folder, data)
        self.cumulative = np.cumsum(1 / self.counts).tolist()
        self.by_class = [np.flatnonzero(np.asarray(self.labels) == j).tolist() for j in range(len(self.counts))]

    def __getitem__(self, i: int) -> Any:
        (drawn,) = random.choices(range(len(self.counts)), cum_weights=self.cumulative)
        return super().__getitem__(i), super().__getitem__(random.choice(self.by_class[drawn]))


def transform(data: str) -> Callable[[Image.Image], torch.Tensor]:
    """The standard recipe: what the network gets is float32, normalised, channels first."""
    from torchvision import transforms

    if data == "photos":
        crop: Any = transforms.RandomResizedCrop(SIZE[data], antialias=True)
    else:
        crop = transforms.RandomCrop(SIZE[data], padding=4)
    normalise = transforms.Normalize(MEAN, STD)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


class Permutations(Sampler[int]):
    """One permutation after the other, without end."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.images).tolist()


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _endless_steps(loaders: list[Any]) -> Steps:
    for step in zip(*map(_endless, loaders), strict=True):
        yield [tuple(stream) for stream in step]


def papers(folder: Path, data: str) -> Steps:
    """The papers' way: one map-style dataset that returns two images, in a DataLoader."""
    dataset = DualPictures(folder, data)
    for step in DataLoader(dataset, BATCH[data], sampler=Permutations(len(dataset)), num_workers=2):
        yield [tuple(stream) for stream in step]


def two_samplers(folder: Path, data: str) -> Steps:
    """Two DataLoaders, the reversed one with a WeightedRandomSampler."""
    dataset = Pictures(folder, data)
    weighted = WeightedRandomSampler(dataset.weights.tolist(), LONG)
    samplers: list[Sampler[int]] = [Permutations(len(dataset)), weighted]
    loaders = [DataLoader(dataset, BATCH[data], sampler=sampler, num_workers=1) for sampler in samplers]
    return _endless_steps(loaders)


def webdataset(folder: Path, data: str) -> Steps:
    """Tars: one of all images, shuffled in a buffer, and one per class, mixed by reversed probability.

    A tar per class keeps as many files open as there are classes: the library draws by class in no other way.
    """
    import webdataset as wds

    pictures = Pictures(folder, data)
    tars = folder / "webdataset"
    if not tars.exists():
        tars.mkdir()
        sinks = {name: wds.TarWriter(str(tars / f"{name}.tar")) for name in ("all", *range(len(pictures.counts)))}
        order = np.random.default_rng(0).permutation(len(pictures))
        for i in order.tolist():
            path, label = pictures.paths[i], pictures.labels[i]
            sample = {"__key__": f"{i:09d}", path.suffix[1:]: path.read_bytes(), "cls": label}
            sinks["all"].write(sample)
            sinks[label].write(sample)
        for sink in sinks.values():
            sink.close()

    def read(name: Any, buffer: int) -> Any:
        return wds.WebDataset(str(tars / f"{name}.tar"), resampled=True, shardshuffle=False).shuffle(buffer)

    probabilities = (1 / pictures.counts) / (1 / pictures.counts).sum()
    streams = [
        read("all", 1000),
        wds.DataPipeline(wds.RandomMix([read(j, 100) for j in range(len(pictures.counts))], probabilities)),
    ]
    loaders = []
    for stream in streams:
        decoded = stream.compose(
            wds.decode("pilrgb"),
            wds.to_tuple("jpg;png", "cls"),
            wds.map_tuple(transform(data)),
            wds.batched(BATCH[data]),
        )
        loaders.append(wds.WebLoader(decoded, batch_size=None, num_workers=1))
    return _endless_steps(loaders)


def mosaicml(folder: Path, data: str) -> Steps:
    """Two StreamingDatasets; the reversed one of a stream per class, with proportions."""
    from streaming import MDSWriter, Stream, StreamingDataset

    class Transformed(StreamingDataset):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(i)
            return change(sample["image"].convert("RGB")), sample["label"]

    pictures, change = Pictures(folder, data), transform(data)
    classes = [folder / "mosaicml" / f"{j:03d}" for j in range(len(pictures.counts))]
    for j, target in enumerate(classes):
        if not target.exists():
            encoding = "jpeg" if data == "photos" else "png"
            with MDSWriter(out=str(target), columns={"image": encoding, "label": "int"}) as writer:
                for path, label in zip(pictures.paths, pictures.labels, strict=True):
                    if label == j:
                        writer.write({"image": Image.open(path), "label": label})
    loaders: list[Any] = []
    for q in (1, -1):
        weights = pictures.counts.astype(float) ** q
        streams = [
            Stream(local=str(target), proportion=float(weight / weights.sum()))
            for target, weight in zip(classes, weights, strict=True)
        ]
        dataset = Transformed(streams=streams, shuffle=True, batch_size=BATCH[data], epoch_size=LONG)
        loaders.append(DataLoader(dataset, BATCH[data], num_workers=1))
    return _endless_steps(loaders)


def ffcv(folder: Path, data: str, normalised: bool = False) -> Steps:
    """Its own file, with JPEGs that it encoded itself (photographs) or raw pixels, and orders that are given to it.

    Its windows are resized by OpenCV's area mode. Its examples normalise on the GPU, so what it delivers is uint8 like
    ours; `normalised` does that here too.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    pictures = Pictures(folder, data)

    class Raw(Dataset[tuple[Image.Image, int]]):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.open(pictures.paths[i]).convert("RGB"), pictures.labels[i]

    file = folder / "ffcv.beton"
    if not file.exists():
        image = RGBImageField("jpg" if data == "photos" else "raw", jpeg_quality=87)
        DatasetWriter(str(file), {"image": image, "label": IntField()}, num_workers=1).from_indexed_dataset(Raw())
    generator = np.random.default_rng(0)
    orders = [
        np.concatenate([generator.permutation(len(pictures)) for _ in range(LONG // len(pictures))]),
        generator.choice(len(pictures), LONG, p=pictures.weights / pictures.weights.sum()),
    ]
    normalise = [NormalizeImage(255 * np.asarray(MEAN), 255 * np.asarray(STD), np.float32)] if normalised else []
    loaders = []
    for order in orders:
        if data == "photos":
            crop = [RandomResizedCropRGBImageDecoder((SIZE[data], SIZE[data])), RandomHorizontalFlip()]
        else:
            crop = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4)]
        loaders.append(
            Loader(
                str(file),
                BATCH[data],
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                indices=order,
                drop_last=True,
                pipelines={
                    "image": [*crop, *normalise, ToTensor(), ToTorchImage()],
                    "label": [IntDecoder(), ToTensor(), Squeeze()],
                },
            )
        )
    return _endless_steps(loaders)


def simplejpeg(folder: Path, data: str) -> Steps:
    """Decodes whole pictures by libjpeg-turbo in two threads, and does nothing else: no binding decodes windows."""
    from concurrent.futures import ThreadPoolExecutor

    from simplejpeg import decode_jpeg

    if data != "photos":
        raise ValueError("only photographs: the others are no JPEGs")
    pictures = Pictures(folder, data)
    files = [path.read_bytes() for path in pictures.paths]
    orders = iter(Permutations(len(files)))
    with ThreadPoolExecutor(2) as threads:
        while True:
            chosen = [[files[next(orders)] for _ in range(BATCH[data])] for _ in range(2)]
            futures = [threads.submit(lambda batch: [decode_jpeg(file) for file in batch], batch) for batch in chosen]
            yield [(future.result(), None) for future in futures]


# Each with the packages that its environment has besides torch and torchvision.
PEERS: dict[str, tuple[Callable[[Path, str], Steps], list[str]]] = {
    "papers": (papers, ["pillow"]),
    "two-samplers": (two_samplers, ["pillow"]),
    "webdataset": (webdataset, ["pillow", "webdataset"]),
    "mosaicml": (mosaicml, ["pillow", "mosaicml-streaming"]),
    "ffcv": (ffcv, ["pillow", "ffcv"]),
    "ffcv-normalised": (partial(ffcv, normalised=True), ["pillow", "ffcv"]),
    "decode-only-simplejpeg": (simplejpeg, ["pillow", "simplejpeg"]),
}


def versions(name: str) -> dict[str, str]:
    """Of the peer's packages, and of torch."""
    found: dict[str, str] = {"torch": torch.__version__}
    for package in PEERS[name][1]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


if __name__ == "__main__":
    name, folder, data, device = sys.argv[1:5]
    serve(partial(PEERS[name][0], Path(folder), data), device, partial(versions, name))
