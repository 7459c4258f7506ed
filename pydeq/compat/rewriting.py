# ruff: noqa: N802  # libcst finds visitors by the names of its nodes
"""Rewrite imports in one file, on its concrete syntax tree; nothing else changes. Needs libcst."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.helpers import get_full_name_for_node
from libcst.metadata import MetadataWrapper, PositionProvider

from pydeq.compat.copies import LIBRARY, PACKAGE, Functions, Surroundings
from pydeq.compat.deq import __all__ as LIBRARY_NAMES

REPLACEMENT = "pydeq.compat.torchdeq"
# Replacements of locuslab/deq's modules, for a folder ``lib`` at any place.
LIBRARY_REPLACEMENT = "pydeq.compat.deq"


class UnparsableError(ValueError):
    """Raised where a file cannot be parsed."""


@dataclass
class Rewritten:
    """A file's new source, and the findings.

    Args:
        source: The new source.
        changes: (line, import before, import after).
        doubts: (line, text that was not understood).
        left: (line, text that is left unchanged because the code base has changed the solver).
    """

    source: bytes = b""
    changes: list[tuple[int, str, str]] = field(default_factory=list)
    doubts: list[tuple[int, str]] = field(default_factory=list)
    left: list[tuple[int, str]] = field(default_factory=list)


def rewrite(source: bytes, path: Path | None = None, around: Surroundings | None = None) -> Rewritten:
    """Replace imports of torchdeq and of locuslab/deq's solvers by those of :mod:`pydeq.compat`.

    Args:
        source: Of a module.
        path: Its file.
        around: The code base that it belongs to.

    Raises:
        UnparsableError: If the source cannot be parsed.
    """
    try:
        wrapper = MetadataWrapper(cst.parse_module(source))
    except (cst.ParserSyntaxError, UnicodeDecodeError, LookupError) as error:
        raise UnparsableError(f"cannot be parsed: {error}") from error
    rewriter = _Rewriter(path, around or Surroundings())
    module = wrapper.visit(rewriter)
    rewriter.check_uses()
    found = rewriter.found
    found.source = module.bytes
    found.changes.sort()
    found.doubts = sorted(set(found.doubts))
    found.left = sorted(set(found.left))
    return found


def inspect_notebook(source: bytes, path: Path | None = None, around: Surroundings | None = None) -> Rewritten:
    """Report what :func:`rewrite` would do to the code cells of a notebook, as doubts. The notebook is not changed.

    A doubt's line is the number of its cell. A cell that names torchdeq and is not plain Python, apart from lines that
    begin with % or !, is a doubt.

    Raises:
        UnparsableError: If the source is not a notebook.
    """
    try:
        cells = json.loads(source)["cells"]
        texts = [
            text if isinstance(text, str) else "".join(text)
            for text in (cell["source"] if cell["cell_type"] == "code" else "" for cell in cells)
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise UnparsableError(f"is no notebook: {error!r}") from error
    found = Rewritten(source)
    for number, text in enumerate(texts, start=1):
        lines = ["pass" if line.startswith(("%", "!")) else line for line in text.splitlines()]
        try:
            cell = rewrite("\n".join(lines).encode(), path, around)
        except UnparsableError:
            if PACKAGE in text:
                found.doubts.append((number, f"a cell that cannot be parsed names {PACKAGE}"))
            continue
        found.doubts += [
            (number, f"{before}, in a notebook, which is not rewritten: write {after}")
            for _, before, after in cell.changes
        ]
        found.doubts += [(number, doubt) for _, doubt in cell.doubts]
        found.left += [(number, text) for _, text in cell.left]
    return found


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: Path | None, around: Surroundings) -> None:
        super().__init__()
        self.path, self.around = path, around
        self.in_library = path is not None and path.resolve().parent.name == "lib"
        self.found = Rewritten()
        self.bound: dict[str, str] = {}  # names that a rewritten import binds -> their module
        self.uses: list[tuple[int, str]] = []

    def line(self, node: cst.CSTNode) -> int:
        return self.get_metadata(PositionProvider, node).start.line  # pyright: ignore

    def doubt(self, node: cst.CSTNode, text: str) -> None:
        self.found.doubts.append((self.line(node), text))

    def changed(self, before: cst.CSTNode, after: Sequence[cst.CSTNode]) -> None:
        self.found.changes.append((self.line(before), _code(before), "; ".join(map(_code, after))))

    # import a, b as c

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        names, seen = [], set()
        for alias in updated_node.names:
            new = self._alias(original_node, alias)
            key = _code(new.with_changes(comma=cst.MaybeSentinel.DEFAULT))
            if new is alias or key not in seen:  # imports of two submodules of torchdeq become one import
                names.append(new)
            if new is not alias:
                seen.add(key)
        if all(a is b for a, b in zip(names, updated_node.names, strict=False)) and len(names) == len(
            updated_node.names
        ):
            return updated_node
        names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        new_node = updated_node.with_changes(names=names)
        self.changed(original_node, [new_node])
        return new_node

    def _alias(self, statement: cst.Import, alias: cst.ImportAlias) -> cst.ImportAlias:
        name = get_full_name_for_node(alias.name) or ""
        if _is_package(name):
            if self._leaves_package(statement):
                return alias
            target = REPLACEMENT + name[len(PACKAGE) :]
            if not _exists(target):
                self.doubt(statement, f"import {name}: {target} does not exist")
                return alias
            if alias.asname is None:  # binds torchdeq, for any submodule
                target = REPLACEMENT
                self.bound[PACKAGE] = REPLACEMENT
                return _renamed(alias, target, PACKAGE)
            self.bound[_code(alias.asname.name)] = target
            return _renamed(alias, target, None)
        if _is_library(name):
            functions = self.around.library(self.path, name, 0)
            if functions == {} or self._leaves(statement, functions, LIBRARY_NAMES):
                return alias
            if alias.asname is None:
                self.doubt(statement, f"import {name}: it binds {name.partition('.')[0]}; import the functions by name")
                return alias
            self.bound[_code(alias.asname.name)] = LIBRARY_REPLACEMENT
            return _renamed(alias, LIBRARY_REPLACEMENT, None)
        return alias

    # from a import b, c as d

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.FlattenSentinel[cst.ImportFrom]:
        name = get_full_name_for_node(updated_node.module) if updated_node.module else ""
        name = name or ""
        level = len(updated_node.relative)
        if not level and _is_package(name):
            if self._leaves_package(original_node):
                return updated_node
            return self._from(original_node, updated_node, REPLACEMENT + name[len(PACKAGE) :])
        inside = level == 1 and self.in_library
        if _is_library(name) or (inside and name in LIBRARY):
            return self._from_module(original_node, updated_node, self.around.library(self.path, name, level))
        if (name.rpartition(".")[2] == "lib" or (inside and not name)) and not isinstance(
            updated_node.names, cst.ImportStar
        ):
            return self._from_lib(original_node, updated_node, name, level)
        return updated_node

    def _from_module(
        self, original: cst.ImportFrom, node: cst.ImportFrom, functions: Functions | None
    ) -> cst.ImportFrom | cst.FlattenSentinel[cst.ImportFrom]:
        """Rewrite ``from lib.solvers import ...``, except functions that the code base has changed."""
        if functions == {}:  # the module has none of the original's functions
            return node
        if isinstance(node.names, cst.ImportStar):
            left = self._leaves(original, functions, LIBRARY_NAMES)
            return node if left else self._from(original, node, LIBRARY_REPLACEMENT)
        left = [alias for alias in node.names if self._leaves(original, functions, [_code(alias.name)])]
        return self._from(original, node, LIBRARY_REPLACEMENT, left)

    def _leaves(self, node: cst.CSTNode, functions: Functions | None, names: Sequence[str]) -> bool:
        """Report changed functions among these names; return whether there are any."""
        changed = {name: change for name in names if (change := (functions or {}).get(name)) is not None}
        for name, change in changed.items():
            text = f"{name} of {change.path}:{change.line} is not the original's: {change.differences}"
            self.found.left.append((self.line(node), text))
        return bool(changed)

    def _leaves_package(self, node: cst.CSTNode) -> bool:
        """Report a copy of torchdeq in this code base; return whether there is one."""
        if self.around.packages:
            text = f"{_code(node)}: {self.around.packages[0]} may be what it names"
            self.found.left.append((self.line(node), text))
        return bool(self.around.packages)

    def _from(
        self, original: cst.ImportFrom, node: cst.ImportFrom, target: str, left: Sequence[cst.ImportAlias] = ()
    ) -> cst.ImportFrom | cst.FlattenSentinel[cst.ImportFrom]:
        """Import from ``target`` the names that it has, except names in ``left``: their imports stay unchanged."""
        if not _exists(target):
            self.doubt(original, f"{_code(original)}: {target} does not exist")
            return node
        if isinstance(node.names, cst.ImportStar):
            self.doubt(
                original, f"{_code(original)}: rewritten, but only the names in __all__ of {target} come with it"
            )
            new = _from(node, target, None)
            self.changed(original, [new])
            return new
        known = [alias for alias in node.names if alias not in left and _exists(f"{target}.{_code(alias.name)}")]
        unknown = [alias for alias in node.names if alias not in known]
        for alias in unknown:
            if alias in left:
                continue
            self.doubt(original, f"{_code(alias.name)} of {_code(original)}: {target} has no such name")
        if not known:
            return node
        for alias in known:
            bound = _code(alias.asname.name) if alias.asname else _code(alias.name)
            if inspect.ismodule(_resolve(f"{target}.{_code(alias.name)}")):
                self.bound[bound] = f"{target}.{_code(alias.name)}"
        if not unknown:
            new = [_from(node, target, node.names)]
        else:
            new = [_from(node, target, _listed(known)), node.with_changes(names=_listed(unknown), lpar=None, rpar=None)]
        self.changed(original, new)
        return new[0] if len(new) == 1 else cst.FlattenSentinel(new)

    def _from_lib(
        self, original: cst.ImportFrom, node: cst.ImportFrom, name: str, level: int
    ) -> cst.ImportFrom | cst.FlattenSentinel[cst.ImportFrom]:
        """Rewrite ``from lib import solvers`` and, inside of lib, ``from . import solvers``."""
        assert not isinstance(node.names, cst.ImportStar)

        def is_ours(module: str) -> bool:
            if module not in LIBRARY:
                return False
            functions = self.around.library(self.path, f"{name}.{module}" if name else module, level)
            return functions != {} and not self._leaves(original, functions, LIBRARY_NAMES)

        ours = [alias for alias in node.names if is_ours(_code(alias.name))]
        if not ours:
            return node
        package, _, module = LIBRARY_REPLACEMENT.rpartition(".")
        aliases = []
        for alias in ours:
            bound = _code(alias.asname.name) if alias.asname else _code(alias.name)
            self.bound[bound] = LIBRARY_REPLACEMENT
            aliases.append(_renamed(cst.ImportAlias(cst.Name(module)), module, bound))
        new = [_from(node, package, aliases)]
        others = [alias for alias in node.names if alias not in ours]
        if others:
            new.append(node.with_changes(names=_listed(others), lpar=None, rpar=None))
        self.changed(original, new)
        return new[0] if len(new) == 1 else cst.FlattenSentinel(new)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        if len(original_node.body) > 1 or len(updated_node.body) == 1:
            return updated_node
        first, *rest = updated_node.body
        lines = [updated_node.with_changes(body=[first.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])]
        return cst.FlattenSentinel([*lines, *(cst.SimpleStatementLine([statement]) for statement in rest)])

    # Names that an import binds, and names in strings

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        name = get_full_name_for_node(node)
        if name is None:
            return True
        self.uses.append((self.line(node), name))
        return False

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if isinstance(value, str) and (_is_package(value) or _is_library(value)):
            self.doubt(node, f"the string {node.value}, which may name the module")

    def check_uses(self) -> None:
        """Check that rewritten modules have the attributes that are used."""
        for line, name in self.uses:
            head, _, rest = name.partition(".")
            thing: Any = _resolve(self.bound[head]) if head in self.bound else None
            for i, part in enumerate(rest.split(".")):
                if not inspect.ismodule(thing):
                    break
                if not _has(thing, part):
                    path = ".".join(name.split(".")[: i + 2])
                    self.found.doubts.append((line, f"{path}: {thing.__name__} has no {part}"))
                    break
                thing = _resolve(f"{thing.__name__}.{part}")


def _is_package(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def _is_library(name: str) -> bool:
    """Whether a module is one of locuslab/deq's: lib.solvers or lib.jacobian, in any folder."""
    *_, folder, module = ["", *name.split(".")]
    return folder == "lib" and module in LIBRARY


def _resolve(path: str) -> Any:
    """Import the object at a dotted path; None if it does not exist."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(_resolve(parent), name, None) if parent else None


def _exists(path: str) -> bool:
    return _resolve(path) is not None


def _has(module: Any, name: str) -> bool:
    return hasattr(module, name) or _exists(f"{module.__name__}.{name}")


def _dotted(path: str) -> Any:
    return cst.parse_expression(path)


def _renamed(alias: cst.ImportAlias, target: str, bound: str | None) -> cst.ImportAlias:
    if bound is None:
        return alias.with_changes(name=_dotted(target))
    return alias.with_changes(name=_dotted(target), asname=None if bound == target else cst.AsName(cst.Name(bound)))


def _from(node: cst.ImportFrom, target: str, names: Any) -> cst.ImportFrom:
    changes: dict[str, Any] = {"module": _dotted(target), "relative": []}
    if names is not None and names is not node.names:
        changes |= {"names": names, "lpar": None, "rpar": None}
    return node.with_changes(**changes)


def _listed(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Aliases on one line."""
    return [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in aliases]


def _code(node: cst.CSTNode) -> str:
    return " ".join(cst.Module([]).code_for_node(node).split())
