"""Data sets as small as a test likes, in their published formats, pinned in the catalogue in place of the real ones."""

import dataclasses
import hashlib

import pytest

from experiments.data.catalogue import DATA_SETS, Archive, File


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The default cache, empty, in the test's own folder; nothing that is on this machine or the web is found."""
    monkeypatch.delenv("PYDEQ_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, data in DATA_SETS.items():
        monkeypatch.setitem(DATA_SETS, name, dataclasses.replace(data, installed=(), address=""))
    return tmp_path / "cache" / "pydeq"


@pytest.fixture
def publish(monkeypatch):
    """publish(name, contents, packed={}, archives={}, **changes): have a data set consist of these files."""

    def pin(name, content, kind=File, **extra):
        return kind(name, len(content), hashlib.sha256(content).hexdigest(), **extra)

    def publish(name, contents, packed=None, archives=None, **changes):
        data = dataclasses.replace(
            DATA_SETS[name],
            files=tuple(pin(file, content) for file, content in contents.items()),
            packed=tuple((file, pin(f"{file}.gz", content)) for file, content in (packed or {}).items()),
            archives=tuple(
                pin(archive.name, archives[archive.name], Archive, folder=archive.folder)
                if archives and archive.name in archives
                else archive
                for archive in DATA_SETS[name].archives
            ),
            **changes,
        )
        monkeypatch.setitem(DATA_SETS, name, data)
        return data

    return publish


@pytest.fixture
def write():
    """write(folder, contents): make the folder, and files in it."""

    def write(folder, contents):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return write
