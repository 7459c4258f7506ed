import dataclasses
import sys

import numpy as np
import pytest
import torch
from formats import cifar10, fashion_mnist, gzipped, idx, tar_gz

from experiments.data import AlteredDataError, Images, MissingDataError, images, load_images
from experiments.data.images import parse_cifar10, parse_idx


def test_digits_are_whole_and_scaled_exactly():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    together = torch.cat([train.images, test.images])
    assert together.dtype == torch.uint8
    assert together.shape == (1797, 1, 8, 8)
    # 15 * value: proportional to the last bit.
    assert torch.equal(together.flatten(1).double(), 15 * torch.from_numpy(values))
    assert torch.equal(torch.cat([train.labels, test.labels]), torch.from_numpy(labels))
    assert train.labels.dtype == torch.int64
    assert train.classes == tuple("0123456789")
    assert torch.bincount(test.labels, minlength=10).min() >= 33


def test_digits_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(images, "_DIGITS_SHA256", "0" * 64)
    with pytest.raises(AlteredDataError, match=r"scikit-learn's digits .* expected 0000"):
        load_images("digits", "train")


def test_digits_without_scikit_learn(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"the digits needs scikit-learn.*pip install scikit-learn"):
        load_images("digits", "train")


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist(publish, write, cache, compressed):
    arrays, contents = fashion_mnist()
    packed = {name: gzipped(content) for name, content in contents.items()}
    publish("fashion_mnist", contents, packed)
    write(cache / "fashion_mnist", {f"{name}.gz": packed[name] for name in packed} if compressed else contents)
    for split, stem, count in (("train", "train", 12), ("test", "t10k", 5)):
        found = load_images("fashion_mnist", split)
        assert found.images.shape == (count, 1, 28, 28)
        assert np.array_equal(found.images[:, 0].numpy(), arrays[f"{stem}-images-idx3-ubyte"])
        assert np.array_equal(found.labels.numpy(), arrays[f"{stem}-labels-idx1-ubyte"])
        assert len(found.classes) == 10


@pytest.mark.parametrize("place", ["files", "unpacked", "archive"])
def test_cifar10(publish, write, tmp_path, place):
    arrays, contents = cifar10()
    archive = tar_gz({f"cifar-10-batches-bin/{name}": content for name, content in reversed(contents.items())})
    publish("cifar10", contents, archives={"cifar-10-binary.tar.gz": archive})
    if place == "archive":
        write(tmp_path, {"cifar-10-binary.tar.gz": archive})
    else:
        write(tmp_path / "cifar-10-batches-bin" if place == "unpacked" else tmp_path, contents)
    train, test = (load_images("cifar10", split, root=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (20, 3, 32, 32)
    expected = [arrays[f"data_batch_{i}.bin"] for i in range(1, 6)]
    assert np.array_equal(train.images.numpy(), np.concatenate([pixels for pixels, _ in expected]))
    assert np.array_equal(train.labels.numpy(), np.concatenate([labels for _, labels in expected]))
    assert np.array_equal(test.images.numpy(), arrays["test_batch.bin"][0])
    assert test.classes[0] == "airplane"
    # They belong only to the caller, who may write to them.
    test.images.zero_()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin like an IDX file"),
        (b"\0\0\x0d\1\0\0\0\0", "must begin like an IDX file of bytes, 00 00 08 n, got 00 00 0d 01"),
        (b"\0\0\x08\0", "must begin like an IDX file"),
        (b"\0\0\x08\2\0\0", "must have"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"must have 18 bytes for shape \(2, 3\), got 17"),
        (idx(np.zeros((2, 3), np.uint8)) + b"\0", r"must have 18 bytes for shape \(2, 3\), got 19"),
        (b"\0\0\x08\3" + b"\xff" * 12, "must have"),
    ],
)
def test_idx_files_of_other_kinds_or_sizes_are_refused(content, message):
    with pytest.raises(ValueError, match=f"labels {message}"):
        parse_idx(content, "labels")


def test_cifar10_batches_of_other_sizes_or_labels_are_refused():
    record = bytes(3073)
    with pytest.raises(ValueError, match=r"b\.bin must be records of 3073 bytes, got 3072"):
        parse_cifar10(record[:-1], "b.bin")
    with pytest.raises(ValueError, match=r"b\.bin must have labels below 10, got 10"):
        parse_cifar10(record + b"\x0a" + record[1:], "b.bin")


def test_labels_that_do_not_fit_the_images_are_refused(publish, write, cache):
    arrays, contents = fashion_mnist()
    contents["train-labels-idx1-ubyte"] = idx(arrays["train-labels-idx1-ubyte"][:-1])
    contents["t10k-labels-idx1-ubyte"] = idx(arrays["t10k-labels-idx1-ubyte"] + np.uint8(10))
    publish("fashion_mnist", contents)
    write(cache / "fashion_mnist", contents)
    with pytest.raises(ValueError, match=r"shapes \(N, H, W\) and \(N,\), got \(12, 28, 28\) and \(11,\)"):
        load_images("fashion_mnist", "train")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte must have labels below 10"):
        load_images("fashion_mnist", "test")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="name must be one of digits, fashion_mnist, cifar10, got 'mnist'"):
        load_images("mnist", "train")
    with pytest.raises(ValueError, match="split must be train or test, got 'valid'"):
        load_images("digits", "valid")
    with pytest.raises(MissingDataError):
        load_images("cifar10", "train")


def test_images_cannot_be_changed():
    found = Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.labels = found.labels  # pyright: ignore[reportAttributeAccessIssue]
