"""The interface between the package and its compiled libraries, as digests of operations' schemas and of constants.

A library holds the digests from its build. This module imports only the standard library, so that a build can read it
without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import IntEnum

STEP = (
    "Tensor(a!) z, Tensor f, Tensor(b!) next, Tensor(c!) best, Tensor(d!) scalars, Tensor(e!) counters,"
    " Tensor(f!) progress, int step, float rtol, float atol, float eps, bool freeze, bool stall, bool last"
)
"""The arguments that the steps of all solvers share; see :class:`pydeq.ops.step.Step`."""


def step_schema(name: str, own: str) -> str:
    """The schema of a solver's step.

    Args:
        own: The arguments that only this solver has.
    """
    return f"{name}({STEP}, {own}) -> ()"


def interface(schemas: Iterable[str], constants: Mapping[str, object]) -> str:
    """Return digests of everything that must agree between package and library, "name=digest" separated by spaces.

    Args:
        schemas: Of the operations, ``name(args) -> returns``.
        constants: The names of ``pydeq/ops/constants.py``.
    """
    numbers = []
    for name, value in constants.items():
        if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum:
            numbers.append((name, [(member.name, int(member)) for member in value]))
        elif name.isupper():
            numbers.append((name, value))
    parts = {"constants": repr(sorted(numbers)), **{schema.split("(", 1)[0]: schema for schema in schemas}}
    return " ".join(f"{name}={hashlib.sha256(text.encode()).hexdigest()[:16]}" for name, text in sorted(parts.items()))


def differences(ours: str, theirs: str) -> list[str]:
    """Return the names whose digests differ, or that only one side has."""
    both = set(ours.split()) ^ set(theirs.split())
    return sorted({part.split("=")[0] for part in both})
