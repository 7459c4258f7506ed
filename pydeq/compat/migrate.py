"""``python -m pydeq migrate``: find, and rewrite, a code base's imports of torchdeq and of locuslab/deq's solvers."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydeq.compat.copies import Surroundings


def migrate(paths: Sequence[str], write: bool) -> int:
    """Report, and with ``write`` rewrite, the imports in some files and in the ``*.py`` and ``*.ipynb`` of folders.

    Solvers that a code base has changed in its copy are reported but not changed, see :mod:`pydeq.compat.copies`.

    Args:
        paths: Files and folders. Notebooks are reported, not rewritten.
        write: Whether to change them.

    Returns: The exit status: 0, or 1 if a file could not be read or parsed, or 2 without libcst.
    """
    try:
        from pydeq.compat.rewriting import UnparsableError, inspect_notebook, rewrite
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "libcst":
            raise
        print("pydeq migrate needs libcst: pip install libcst", file=sys.stderr)
        return 2

    status = files = changed = imports = doubts = left = 0
    all_files = list(dict.fromkeys(_files(paths)))
    around = Surroundings(all_files)
    for path, line, text in around.copies():
        left += 1
        print(f"{_shown(path, all_files)}:{line}: left alone: {text}")
    for path in all_files:
        files += 1
        if around.is_vendored(path):
            continue
        try:
            source = path.read_bytes()
            found = (inspect_notebook if path.suffix == ".ipynb" else rewrite)(source, path, around)
        except (OSError, UnparsableError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 1
            continue
        imports += len(found.changes)
        doubts += len(found.doubts)
        left += len(found.left)
        for line, before, after in found.changes:
            print(f"{path}:{line}: {before}  ->  {after}")
        for line, text in found.doubts:
            print(f"{path}:{line}: not understood: {text}")
        for line, text in found.left:
            print(f"{path}:{line}: left alone: {text}")
        if found.changes:
            changed += 1
            if write:
                _replace(path, found.source)
    verb = "rewritten" if write else "to rewrite"
    rest = f", {left} left alone" if left else ""
    print(f"{files} files: {imports} imports {verb} in {changed} of them, {doubts} places not understood{rest}")
    if imports and not write:
        print("--write rewrites them")
    return status


def _files(paths: Sequence[str]) -> Iterator[Path]:
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files = (found for pattern in ("*.py", "*.ipynb") for found in path.rglob(pattern))
            yield from sorted(found for found in files if found.is_file() and ".ipynb_checkpoints" not in found.parts)
        else:
            yield path


def _shown(path: Path, files: Sequence[Path]) -> Path:
    """The path as the user gave it, for a resolved path."""
    return next((file for file in files if file.resolve() == path), path)


def _replace(path: Path, source: bytes) -> None:
    """Write a file in one step, with the permissions that it has."""
    path = path.resolve()
    mode = path.stat().st_mode
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(source)
        os.chmod(scratch, mode)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
