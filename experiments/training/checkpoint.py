"""Checkpoints: a folder with tensors and a JSON file, made visible by one rename.

    checkpoints/00000120/tensors.safetensors
    checkpoints/00000120/state.json             {"checksum": ..., "tensors": {"bytes", "sha256"}, "state": ...}

Nothing is unpickled. A process may be killed and a disk may fill up at any moment: a checkpoint that is visible is
complete. Checksums detect later damage; then the previous checkpoint is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pooch import file_hash
from torch import Tensor

from experiments.training.atomic_files import flush_file, flush_folder

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint, or another file of a training, could not be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint has changed since it was written."""


@dataclass
class Checkpoint:
    """A saved checkpoint.

    Args:
        path: Its folder.
        tensors: Tensors by name.
        state: Values that JSON can hold.
    """

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: The folder; it is made with the first checkpoint.
        keep: How many of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if path.name.isdecimal()), key=_step_of, reverse=True)

    def last(self) -> str:
        """Name the last good checkpoint, for error messages."""
        kept = self.paths()
        return f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"

    def write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Save a checkpoint, and remove the oldest ones.

        Args:
            step: Its number.
            tensors: Contiguous tensors on the CPU that share no memory.
            state: Values that JSON can hold; numbers may also be infinite or NaN.

        Raises:
            CheckpointError: If it cannot be written; the message names the last good one.
        """
        errors = (OSError, _library_error())
        final, partial = self.folder / f"{step:08d}", self.folder / f".writing-{step:08d}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                flush_folder(self.folder.parent)
            self._sweep()
            partial.mkdir()
            _save(tensors, partial / TENSORS)
            flush_file(partial / TENSORS)
            facts = {"bytes": (partial / TENSORS).stat().st_size, "sha256": file_hash(str(partial / TENSORS))}
            content = {"format": FORMAT, "tensors": facts, "state": _finite(state)}
            with (partial / STATE).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"checksum": _checksum(content)} | content, allow_nan=False))
                file.flush()
                os.fsync(file.fileno())
            flush_folder(partial)
            if final.exists():  # a damaged checkpoint, or one from a longer training that was shortened
                os.replace(final, self.folder / f".removing-{step:08d}")
            os.replace(partial, final)
            flush_folder(self.folder)
        except errors as error:
            with contextlib.suppress(OSError):
                self._sweep()
            raise CheckpointError(f"the checkpoint {final} could not be written: {error}; {self.last()}") from error
        for path in self.paths()[self.keep :]:
            # Rename before removing: half a checkpoint must not look like one.
            with contextlib.suppress(OSError):
                os.replace(path, self.folder / f".removing-{path.name}")
        with contextlib.suppress(OSError):
            self._sweep()
        return final

    def newest(self, notice: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest complete checkpoint; None if there is no checkpoint.

        Args:
            notice: Called with a text about each damaged checkpoint, which is renamed.

        Raises:
            CheckpointError: If all checkpoints are damaged, or one may not be read or has another format. A checkpoint
                that may not be read or has another format stays in place.
        """
        paths, reasons = self.paths(), []
        for path in paths:
            try:
                found = read(path)
            except DamagedError as error:
                reasons.append(str(error))
                notice(f"{error}; using the previous checkpoint")
                aside = path.with_name(f"damaged-{path.name}")
                with contextlib.suppress(OSError):
                    if aside.exists():
                        shutil.rmtree(aside)
                    os.replace(path, aside)
            else:
                return found
        if reasons:
            raise CheckpointError("no checkpoint is complete: " + "; ".join(reasons))
        return None

    def _sweep(self) -> None:
        """Remove the half-written and half-removed checkpoints of killed processes."""
        for pattern in (".writing-*", ".removing-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager around writes to a file in a training's folder.

    Raises:
        CheckpointError: If the file cannot be written; the message names it and the last good checkpoint.
    """
    try:
        yield
    except OSError as error:
        last = Checkpoints(path.parent / "checkpoints").last()
        raise CheckpointError(f"{path} could not be written: {error}; {last}") from error


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedError: If it is damaged; the message says how.
        CheckpointError: If it may not be read, or has another format.
    """
    errors = (OSError, ValueError, KeyError, TypeError, AttributeError, _library_error())
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise ValueError(f"{STATE} does not have its checksum")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint {path} is of another version: its format is {content['format']}, and this one reads"
                f" {FORMAT}"
            )
        facts, size = content["tensors"], (path / TENSORS).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{TENSORS} has {size} bytes of {facts['bytes']}")
        if file_hash(str(path / TENSORS)) != facts["sha256"]:
            raise ValueError(f"{TENSORS} does not have its checksum")
        return Checkpoint(path, _library().load_file(path / TENSORS), _number(content["state"]))
    except PermissionError as error:
        raise CheckpointError(f"the checkpoint {path} may not be read: {error}") from error
    except errors as error:
        raise DamagedError(f"the checkpoint {path} is damaged: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write one file of tensors; at any moment it is the old file or the new one.

    Args:
        path: The file.
        tensors: Contiguous tensors on the CPU that share no memory.
        about: Facts about them, to be kept in the file.

    Raises:
        CheckpointError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.writing")
    try:
        _save(tensors, partial, about)
        flush_file(partial)
        os.replace(partial, path)
        flush_folder(path.parent)
    except (OSError, _library_error()) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        last = Checkpoints(path.parent / "checkpoints").last()
        raise CheckpointError(f"{path} could not be written: {error}; {last}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_tensors` wrote: the tensors, and the facts about them.

    Raises:
        CheckpointError: If the file is damaged or may not be read.
    """
    errors = (OSError, ValueError, _library_error())
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except errors as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error


def _save(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write tensors into a new file with the umask's permissions; the library would let only the owner read it."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    _library().save_file(tensors, path, about)
    path.chmod(mode)


def _library() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install safetensors", name=error.name) from error
    return safetensors.torch


def _library_error() -> type[Exception]:
    _library()
    from safetensors import SafetensorError

    return SafetensorError


def _step_of(path: Path) -> int:
    return int(path.name)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    """Replace infinite and NaN numbers, which JSON cannot hold, by mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _number(value: Any) -> Any:
    """The inverse of :func:`_finite`."""
    if isinstance(value, dict):
        return float(value["float"]) if value.keys() == {"float"} else {key: _number(v) for key, v in value.items()}
    return [_number(each) for each in value] if isinstance(value, list) else value
