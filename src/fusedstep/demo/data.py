"""Real data: the UCI handwritten digits, or IDX files of the MNIST family."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arguments import CommandError

Array = NDArray[Any]


class DataError(CommandError):
    """The data cannot be had; the message says why and what to do."""


class Dataset(NamedTuple):
    name: str
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array

    @property
    def n_classes(self) -> int:
        return int(max(self.train_y.max(), self.test_y.max())) + 1


def digits(dtype: Any) -> Dataset:
    """1,797 images of 8 x 8 pixels; every fifth example of a fixed shuffle is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'fusedstep[demo]', or give --data DIR") from error
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(dtype), y[order]
    test = np.arange(len(x)) % 5 == 0
    return Dataset("UCI handwritten digits", x[~test], y[~test], x[test], y[test])


def read_idx(path: Path) -> Array:
    """An array of unsigned bytes from an IDX file, gzipped or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: expected an IDX file of unsigned bytes, got something else")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != math.prod(shape):
        raise DataError(f"{path}: expected {math.prod(shape)} bytes for shape {shape}, got {values.size}")
    return values.reshape(shape)


def idx(folder: Path, dtype: Any) -> Dataset:
    """The four files of a data set like MNIST: ``train-images-idx3-ubyte[.gz]`` and so on."""

    def find(part: str, kind: str, n_dims: int) -> Array:
        names = [f"{part}-{kind}{dot}idx{n_dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DataError(f"{folder}: expected a file {' or '.join(names)}, got none")
        array = read_idx(path)
        if array.ndim != n_dims or array.size == 0:
            raise DataError(f"{path}: expected {n_dims} dimensions that are not empty, got shape {array.shape}")
        return array

    parts: list[Array] = []
    for part in ("train", "t10k"):
        images, labels = find(part, "images", 3), find(part, "labels", 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: expected as many {part} labels as images, got {len(labels)} and {len(images)}")
        parts += [(images.reshape(len(images), -1) / 255).astype(dtype), labels.astype(np.intp)]
    if parts[0].shape[1] != parts[2].shape[1]:
        raise DataError(f"{folder}: expected test images of the training images' size, got another")
    return Dataset(folder.name, *parts)


def load(folder: str | None, dtype: Any) -> Dataset:
    """The digits, or what is in a folder."""
    if folder is None:
        return digits(dtype)
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{folder}: expected a folder of IDX files, got none there")
    return idx(path, dtype)
