"""The law of the house: who may import whom in pydeq, and which names are public.

A room is a subpackage or a module at the top of the package. Imports count wherever they are: at the top of a module,
inside a function, under TYPE_CHECKING.

``python tests/test_house.py > tests/public_names.txt`` writes down the public names, where a change of them is meant.
"""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydeq

PACKAGE = Path(pydeq.__file__).parent
PUBLIC_NAMES = Path(__file__).with_name("public_names.txt")
PUBLIC = (
    "pydeq", "pydeq.adjoints", "pydeq.compat", "pydeq.compat.torchdeq", "pydeq.diagnosis", "pydeq.jacobian",
    "pydeq.models", "pydeq.nn", "pydeq.ops", "pydeq.solvers",
)  # fmt: skip

PROGRAMS = {"experiments", "benchmarks"}
LOWER = {"solvers", "ops", "cell", "solve"}
UPPER = {"layer", "fixed_point", "adjoints", "jacobian", "models", "compat", "nn", "diagnosis"}
# Imports inside of functions: from a module, of a module, and why they are not at the top.
INSIDE = {
    ("pydeq.compat.migrate", "pydeq.compat.rewriting"): "it needs libcst, which only one command has a use for",
}


@dataclass(frozen=True)
class Import:
    """One import: the module that it is in, the module that is imported, and whether it is inside of a function."""

    source: str
    target: str
    inside: bool
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return room(self.source), room(self.target)

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, imports {self.target}"


def room(module: str) -> str:
    """The room of a module: "ops" for pydeq.ops.kernels, "pydeq" for the package itself."""
    return ".".join(module.split(".")[1:2]) or module


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package, by name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> list[Import]:
    """All imports of a package's modules by each other, and of programs."""
    known = modules(package)
    return [
        Import(source, target, inside, line)
        for source, path in sorted(known.items())
        for target, inside, line in targets(ast.parse(path.read_text(encoding="utf-8")), known)
        if target.split(".")[0] in PROGRAMS | {package.name}
    ]


def targets(node: ast.AST, known: dict[str, Path], inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """What is imported below ``node``, whether inside of a function, and where."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, inside, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level and node.module, f"line {node.lineno} imports by a relative name: write it in full"  # noqa: PT018
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in known else node.module, inside, node.lineno
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
        names = (getattr(argument, "value", None) for argument in node.args)
        yield from ((name, False, node.lineno) for name in names if isinstance(name, str))
    within = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from targets(child, known, within)


def circles(found: list[Import]) -> list[set[str]]:
    """The rooms that import each other, by whatever ways."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for one in found:
        arrows[one.rooms[0]].add(one.rooms[1])

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reached(name) - {name} for name in list(arrows)}
    together = [{name} | {other for other in reach[name] if name in reach.get(other, ())} for name in sorted(reach)]
    return [names for i, names in enumerate(together) if len(names) > 1 and names not in together[:i]]


def public_names() -> list[str]:
    """All public names in full, sorted."""
    return sorted(f"{name}.{public}" for name in PUBLIC for public in importlib.import_module(name).__all__)


IMPORTS = imports(PACKAGE)


def listed(broken: list[Import]) -> str:
    return "\n".join(map(str, broken))


def test_the_library_imports_no_program():
    broken = [one for one in IMPORTS if one.target.split(".")[0] in PROGRAMS]
    assert not broken, listed(broken)


def test_lower_rooms_import_no_upper_ones():
    broken = [one for one in IMPORTS if one.rooms[0] in LOWER and one.rooms[1] in UPPER | {"pydeq"}]
    assert not broken, listed(broken)


def test_operations_need_nothing_but_operations():
    broken = [one for one in IMPORTS if one.rooms[0] == "ops" and one.target != "pydeq._C" and one.rooms[1] != "ops"]
    assert not broken, listed(broken)


def test_no_rooms_import_each_other():
    found = circles(IMPORTS)
    assert not found, "\n".join(
        f"{', '.join(sorted(names))}:\n" + listed([one for one in IMPORTS if set(one.rooms) <= names])
        for names in found
    )


def test_imports_inside_of_functions_have_a_reason():
    inside = {(one.source, one.target) for one in IMPORTS if one.inside}
    assert inside == set(INSIDE)


def test_the_law_notices_what_breaks_it(tmp_path):
    house = tmp_path / "pydeq"
    texts = {
        "__init__.py": "from pydeq.ops import step",
        "layer.py": "import importlib\nlazy = importlib.import_module('pydeq.ops.step')",
        "ops/__init__.py": "",
        "ops/step.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pydeq import layer\n",
        "solve/loop.py": "def run():\n    import experiments.training\n",
    }
    for name, text in texts.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = imports(house)
    assert {(one.source, one.target, one.inside) for one in found} == {
        ("pydeq", "pydeq.ops.step", False),
        ("pydeq.layer", "pydeq.ops.step", False),
        ("pydeq.ops.step", "pydeq.layer", False),
        ("pydeq.solve.loop", "experiments.training", True),
    }
    assert circles(found) == [{"layer", "ops"}]


def test_public_names_are_as_written_down():
    """A change of them is a change for users: CHANGELOG.md names it, and the command above writes it down."""
    assert public_names() == PUBLIC_NAMES.read_text(encoding="utf-8").split()


def test_public_names_are_there():
    for name in public_names():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


if __name__ == "__main__":
    print("\n".join(public_names()))
