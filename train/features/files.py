"""Generated features as files for other programs, written chunk by chunk: never all in memory.

FILE.safetensors               tensors `features` (M, D) float16 and `labels` (M,) int64
FILE.npy, FILE.labels.npy      the same two as NumPy arrays
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError

MOST = torch.finfo(torch.half).max


def check_feature_file(path: Path) -> None:
    """Refuse a name that `write_features` could not write, before any work is done.

    Raises:
        UserError: neither .safetensors nor .npy, a file that exists, or no folder to write into.
    """
    if path.suffix not in (".safetensors", ".npy"):
        raise UserError(f"--export {path} must end in .safetensors or .npy")
    for file in [path, path.with_suffix(".labels.npy")] if path.suffix == ".npy" else [path]:
        if file.exists():
            raise UserError(f"--export: {file} already exists; name another file, or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--export {path}: {path.parent} is no folder that can be written to; make it")


def write_features(path: Path, chunks: Iterator[tuple[Tensor, Tensor]], rows: int, dimensions: int) -> None:
    """Write features and labels; the files appear whole or not at all.

    Args:
        path: FILE.safetensors or FILE.npy.
        chunks: features (M, D) and labels (M,) of any lengths that sum to `rows`.
        rows: how many features there are.
        dimensions: D.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    labels_path = path.with_suffix(".labels.npy")
    temporary, labels_temporary = (p.with_name(f".{p.name}.partial") for p in (path, labels_path))
    labels = np.empty(rows, np.int64)
    done = 0
    try:
        with temporary.open("wb") as file:
            (_safetensors_header if path.suffix == ".safetensors" else _npy_header)(file, rows, dimensions)
            for features_MD, labels_M in chunks:
                file.write(features_MD.clamp(max=MOST).half().cpu().numpy().data)
                labels[done : done + len(labels_M)] = labels_M.cpu().numpy()
                done += len(labels_M)
            assert done == rows, (done, rows)
            if path.suffix == ".safetensors":
                file.write(labels.data)
        if path.suffix == ".npy":
            with labels_temporary.open("wb") as file:
                np.save(file, labels)
            os.replace(labels_temporary, labels_path)
        os.replace(temporary, path)
    except OSError as error:
        size = rows * (2 * dimensions + 8) / 1e9
        raise UserError(f"{path} cannot be written ({error.strerror}); it takes {size:.2f} GB") from None
    finally:
        temporary.unlink(missing_ok=True)
        labels_temporary.unlink(missing_ok=True)


def _npy_header(file: BinaryIO, rows: int, dimensions: int) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dimensions)}
    np.lib.format.write_array_header_1_0(file, header)


def _safetensors_header(file: BinaryIO, rows: int, dimensions: int) -> None:
    """Write what comes before the numbers: the library's own writer wants all of them at once."""
    end = 2 * rows * dimensions
    described = {
        "features": {"dtype": "F16", "shape": [rows, dimensions], "data_offsets": [0, end]},
        "labels": {"dtype": "I64", "shape": [rows], "data_offsets": [end, end + 8 * rows]},
    }
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
