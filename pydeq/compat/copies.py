"""Find copies of the originals in a code base, and detect changes in them.

locuslab/deq is not a package. Its users copied ``lib/solvers.py`` into their own code, and many changed it. An import
of a changed solver must not be replaced silently.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydeq.compat import deq

LIBRARY = ("solvers", "jacobian")
"""The modules of locuslab/deq that :mod:`pydeq.compat.deq` replaces, in a folder ``lib``."""
PACKAGE = "torchdeq"


@dataclass(frozen=True)
class Changed:
    """A function that differs from the original.

    Args:
        path, line: Where it is.
        differences: Description of the differences.
    """

    path: Path
    line: int
    differences: str


Functions = dict[str, Changed | None]
"""The functions of a module that have the names of the original's functions; None if no difference was found."""


class Surroundings:
    """The files of the code base that contains the rewritten files.

    Args:
        files: The files that are looked at.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self.files = [path.resolve() for path in files]
        self.packages = [
            path.parent for path in self.files if path.name == "__init__.py" and path.parent.name == PACKAGE
        ]
        self._known: dict[Path, Functions] = {}

    def is_vendored(self, path: Path) -> bool:
        """Whether a file belongs to a copy of torchdeq."""
        return any(package in path.resolve().parents for package in self.packages)

    def library(self, importer: Path | None, module: str, level: int) -> Functions | None:
        """The original's functions that a module ``lib.solvers`` or ``lib.jacobian`` defines.

        Args:
            importer: The file that imports it.
            module: Its name in the import statement, without leading dots.
            level: The number of these dots.

        Returns:
            None if there is no such file: the module is then assumed to be the original.
        """
        tail = Path(*module.split(".")).with_suffix(".py")
        places: list[Path] = []
        if importer is not None:
            folders = list(_parents(importer.resolve()))
            places = [folder / tail for folder in (folders[level - 1 : level] if level else folders)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            found = next((path for path in self.files if path.parts[-len(tail.parts) :] == tail.parts), None)
        return None if found is None else self._functions(found)

    def _functions(self, path: Path) -> Functions:
        if path not in self._known:
            self._known[path] = functions_of(path)
        return self._known[path]

    def copies(self) -> Iterator[tuple[Path, int, str]]:
        """Yield (file, line, text) for copies of the originals' solvers that no import statement points to."""
        for package in self.packages:
            yield (
                package / "__init__.py",
                1,
                f"a copy of {PACKAGE}: imports of {PACKAGE} are left unchanged, since changes in the copy would be"
                " lost. If there are none, move the copy away and run this again",
            )
        for path in self.files:
            if path.suffix != ".py" or self.is_vendored(path):
                continue
            found = self._functions(path)
            if "broyden" not in found or "anderson" not in found:
                continue
            changed = [f"{name}: {change.differences}" for name, change in found.items() if change is not None]
            if not changed and path.stem in LIBRARY and path.parent.name == "lib":
                continue  # imports of it are rewritten
            state = "; ".join(changed) if changed else "with the original's parameters and keys"
            yield path, 1, f"defines broyden and anderson itself ({state})"


def functions_of(path: Path) -> Functions:
    """The functions of a file that have the names of functions in :mod:`pydeq.compat.deq`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    found: Functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in deq.__all__:
            differences = _differences(node, getattr(deq, node.name))
            found[node.name] = Changed(path, node.lineno, differences) if differences else None
    return found


def _parents(path: Path) -> Iterator[Path]:
    """The folders above a file, up to the root of its repository."""
    for folder in path.parents:
        yield folder
        if (folder / ".git").exists():
            return


def _differences(node: ast.FunctionDef, original: Callable[..., Any]) -> str:
    """Describe how a function differs from ``original``; "" if no difference is found."""
    differences = []
    parameters = inspect.signature(original).parameters.values()
    expected = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    actual = list(_parameters(node))
    if actual != expected:
        more = [p for p in actual if p not in expected]
        fewer = [p for p in expected if p not in actual]
        differences.append(f"parameters {_changes(_listed(more), _listed(fewer)) or 'in another order'}")
    if original in (deq.broyden, deq.anderson):
        names = {name for name, _ in expected} - {"f", "x0"}
        forced = dict.fromkeys(name for name in _assigned(node) if name in names)
        if forced:
            differences.append(f"it replaces the {', '.join(forced)} that it is given")
        keys = _keys(node)
        if keys is not None and keys != set(deq.KEYS):
            differences.append(f"keys {_changes(sorted(keys - set(deq.KEYS)), sorted(set(deq.KEYS) - keys))}")
    return ", ".join(differences)


def _changes(more: Sequence[str], fewer: Sequence[str]) -> str:
    found = (("with", more), ("without", fewer))
    return " and ".join(f"{sign} {', '.join(names)}" for sign, names in found if names)


def _parameters(node: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [inspect.Parameter.empty] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    for argument, default in zip(positional, defaults, strict=True):
        yield argument.arg, _value(default)
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        yield argument.arg, inspect.Parameter.empty if default is None else _value(default)


def _value(default: Any) -> Any:
    if not isinstance(default, ast.AST):
        return default
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)


def _listed(parameters: list[tuple[str, Any]]) -> list[str]:
    empty = inspect.Parameter.empty
    return [name if default is empty else f"{name}={default!r}" for name, default in parameters]


def _assigned(node: ast.FunctionDef) -> Iterator[str]:
    """Names that the function's own body assigns to, without functions inside it."""
    inner = [n for n in ast.walk(node) if n is not node and isinstance(n, ast.FunctionDef | ast.Lambda)]
    hidden = {id(n) for f in inner for n in ast.walk(f)}
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in hidden:
            yield n.id


def _keys(node: ast.FunctionDef) -> set[str] | None:
    """Keys of the dict that the function returns; None if no such dict is written out."""
    for n in ast.walk(node):
        if isinstance(n, ast.Dict):
            keys = {key.value for key in n.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            if "result" in keys:
                return keys
    return None
