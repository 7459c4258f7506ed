"""Labelled images in memory, read from the published files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.data.cache import AlteredDataError, read_files
from experiments.data.catalogue import data_set
from experiments.data.optional import needs

NAMES = ("digits", "fashion_mnist", "cifar10")

_CLASSES = {
    "digits": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip

DIGITS_TRAIN = 1437
"""Size of the training split of digits, the first samples; the last 360 are for the test."""

_DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@dataclass(frozen=True, repr=False)
class Images:
    """Labelled images.

    Args:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), in [0, number of classes).
        classes: Names of the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"Images({len(self)} of {shape}, {len(self.classes)} classes)"


def load_images(name: str, split: str, root: str | os.PathLike[str] | None = None) -> Images:
    """Read labelled images.

    digits: scikit-learn's 1797 digits, 8x8, the first 1437 for training, the last 360 for the test. Their values, 0
    to 16, are multiplied by 15, so that the largest is 240.

    fashion_mnist: IDX files, as published or uncompressed; 60000 and 10000 of 28x28.

    cifar10: the binary version's batches, or its archive as published; 50000 and 10000 of 3x32x32.

    Args:
        name: "digits", "fashion_mnist" or "cifar10".
        split: "train" or "test".
        root: Folder of the files, or of the data sets' folders; see :func:`experiments.data.data_root`.

    Raises:
        ValueError: If name or split is unknown, or a file is not the published one (AlteredDataError).
        MissingDataError: If a file is missing (a FileNotFoundError).
        ModuleNotFoundError: For digits without scikit-learn.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    if name == "digits":
        pixels, labels = _digits(split)
    elif name == "fashion_mnist":
        pixels, labels = _fashion_mnist(split, root)
    else:
        pixels, labels = _cifar10(split, root)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), _CLASSES[name])


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    with needs("scikit-learn", "the digits"):
        from sklearn.datasets import load_digits
    values, labels = load_digits(return_X_y=True)
    values, labels = np.asarray(values, dtype=np.uint8), np.asarray(labels, dtype=np.uint8)
    sha256 = hashlib.sha256(values.tobytes() + labels.tobytes()).hexdigest()
    if sha256 != _DIGITS_SHA256:
        raise AlteredDataError(
            f"scikit-learn's digits are not the known ones: their sha256 is {sha256}, expected {_DIGITS_SHA256}"
        )
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return values[part].reshape(-1, 1, 8, 8) * np.uint8(15), labels[part]


def _fashion_mnist(split: str, root: str | os.PathLike[str] | None) -> tuple[np.ndarray, np.ndarray]:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    contents = read_files(data_set("fashion_mnist"), names, root)
    pixels, labels = (parse_idx(contents[name], name) for name in names)
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have shapes (N, H, W) and (N,), got {pixels.shape} and {labels.shape}"
        )
    _check_labels(labels, len(_CLASSES["fashion_mnist"]), names[1])
    return pixels[:, None], labels


def _cifar10(split: str, root: str | os.PathLike[str] | None) -> tuple[np.ndarray, np.ndarray]:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    contents = read_files(data_set("cifar10"), names, root)
    batches = [parse_cifar10(contents.pop(name), name) for name in names]
    return np.concatenate([pixels for pixels, _ in batches]), np.concatenate([labels for _, labels in batches])


def parse_idx(content: bytes, name: str) -> np.ndarray:
    """Read the array of bytes in an IDX file.

    The format: two zeros, the type (8: unsigned bytes), the number of dimensions; each dimension, 4 bytes, big-endian;
    the entries.

    Args:
        content: Content of the file.
        name: Name of the file, for errors.

    Raises:
        ValueError: If it is not an IDX file of bytes, or has another size than its shape needs.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise ValueError(f"{name} must begin like an IDX file of bytes, 00 00 08 n, got {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    size = start + int(np.prod(shape, dtype=object))
    if len(content) != size:
        raise ValueError(f"{name} must have {size} bytes for shape {tuple(shape)}, got {len(content)}")
    # A copy, because torch needs arrays that can be written to.
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def parse_cifar10(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images, (N, 3, 32, 32), and labels, (N,), in a batch of CIFAR-10's binary version.

    A record is a label and 3072 values: red, green and blue, each row by row.

    Args:
        content: Content of the file.
        name: Name of the file, for errors.

    Raises:
        ValueError: If it is not a whole number of records, or a label is not in [0, 10).
    """
    if len(content) % 3073:
        raise ValueError(f"{name} must be records of 3073 bytes, got {len(content)}, {len(content) % 3073} too many")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    labels = records[:, 0].copy()
    _check_labels(labels, 10, name)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), labels


def _check_labels(labels: np.ndarray, classes: int, name: str) -> None:
    if labels.size and labels.max() >= classes:
        raise ValueError(f"{name} must have labels below {classes}, got {labels.max()}")
