"""Encoded images straight out of memory-mapped shards."""

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import UserError
from shards.index import Split


class ShardReader:
    """Reads the encoded bytes of samples by id, without a copy.

    Shards are mapped when they are first needed, and fetched then where the dataset is remote. A reader can be
    pickled; the copy maps them anew.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_split": self._split, "_maps": {}}

    def encoded(self, ids_B: Iterable[int] | NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return each sample's JPEG or PNG file as a uint8 array that lies in the mapping.

        Raises:
            UserError: a shard is missing or shorter than the index says.
        """
        rows = self._split.samples[np.asarray(ids_B, dtype=np.int64)]
        files = []
        for shard, offset, size in zip(
            rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist(), strict=True
        ):
            shard_map = self._maps.get(shard)
            if shard_map is None:
                shard_map = self._maps[shard] = self._map(shard)
            if offset + size > shard_map.size:
                path = self._split.shard_paths[shard]
                raise UserError(
                    f"{path} is {shard_map.size} bytes long but the index points to byte {offset + size};"
                    f" run: python -m shards verify {path.parent}"
                )
            files.append(shard_map[offset : offset + size])
        return files

    def _map(self, shard: int) -> NDArray[np.uint8]:
        path = self._split.local_shard(shard)
        try:
            # A plain ndarray view: slicing np.memmap itself costs several times as much.
            return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise UserError(
                f"shard {path} cannot be read ({error}); run: python -m shards verify {path.parent}"
            ) from None


def undecodable(split: Split, reader: ShardReader, ids_B: NDArray[np.int64]) -> Exception:
    """Explain why a batch did not decode: the error that names its first bad image.

    Returns:
        A UserError, or a RuntimeError where each image decodes when it is tried again by itself.
    """
    for sample in ids_B.tolist():
        try:
            with Image.open(io.BytesIO(reader.encoded([sample])[0].data)) as picture:
                picture.load()
        except (OSError, SyntaxError) as error:
            row = split.samples[sample]
            path = split.shard_paths[row["shard"]]
            return UserError(
                f"the image at byte {row['offset']} of {path} (sample {sample}) does not decode ({error});"
                f" run: python -m shards verify {path.parent}"
            )
    return RuntimeError(f"a batch of {split.name} did not decode, though each of its images does by itself")
