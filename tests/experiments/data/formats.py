"""Small files in the published formats."""

import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from experiments.data.catalogue import DATA_SETS


def idx(array):
    """An IDX file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_mnist(train=12, test=5, seed=0):
    """Images and labels by the names of their files, and what the files hold."""
    random = np.random.default_rng(seed)
    arrays = {}
    for stem, count in (("train", train), ("t10k", test)):
        arrays[f"{stem}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = random.integers(0, 10, count, np.uint8)
    return arrays, {name: idx(array) for name, array in arrays.items()}


def cifar10(per_batch=4, seed=0):
    """Pairs of images and labels by the names of their files, and what the files hold."""
    random = np.random.default_rng(seed)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    arrays = {
        name: (random.integers(0, 256, (per_batch, 3, 32, 32), np.uint8), random.integers(0, 10, per_batch, np.uint8))
        for name in names
    }
    contents = {
        name: b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))
        for name, (images, labels) in arrays.items()
    }
    return arrays, contents


def gzipped(content):
    return gzip.compress(content, mtime=0)


def tar_gz(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: protocol 2, bytes as text, names of modules as they were then."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content):
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(value)
    moved = {b"cscipy.sparse._csr\n": b"cscipy.sparse.csr\n", b"cnumpy._core.": b"cnumpy.core."}
    content = stream.getvalue()
    for now, then in moved.items():
        content = content.replace(now, then)
    return content


def pinned(name, content, **changes):
    """The package of a data set, with another content."""
    package = DATA_SETS[name].package
    return dataclasses.replace(package, size=len(content), sha256=hashlib.sha256(content).hexdigest(), **changes)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def cifar10_package(arrays):
    """CIFAR-10 as the package has it: an image a row, colors last, and the labels in two lists."""
    members = {
        f"package/{Path(name).stem}.png": png(images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3))
        for name, (images, _) in arrays.items()
    }
    train = [int(label) for i in range(1, 6) for label in arrays[f"data_batch_{i}.bin"][1]]
    members["package/train_lables.json"] = json.dumps(train).encode()
    members["package/test_lables.json"] = json.dumps(arrays["test_batch.bin"][1].tolist()).encode()
    return members
