"""Write ``pydeq_constants.h`` from ``pydeq/ops/constants.py``, so that no number is written in both languages.

``class CounterColumn(IntEnum)`` with a member ``STATUS = 0`` becomes ``COUNTER_COLUMN_STATUS``, and
``COUNTER_COLUMN_SIZE`` is the number of members. A number in capitals keeps its name, as an int64_t or a double. A
tuple of numbers becomes ``NAME_0``, ``NAME_1``, ...: device code can read constants, but no array of them.
"""

import re
import runpy
import sys
from enum import IntEnum
from pathlib import Path


def declarations(module: dict[str, object]) -> dict[str, tuple[str, str]]:
    """The constants by name, each with its C++ type and value."""
    constants: dict[str, tuple[str, str]] = {}

    def declare(name: str, kind: str, value: str) -> None:
        if name in constants:
            raise SystemExit(
                f"{name} would be declared twice in pydeq_constants.h: rename one in pydeq/ops/constants.py"
            )
        constants[name] = (kind, value)

    for name, value in module.items():
        if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum:
            prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()
            for member in value:
                declare(f"{prefix}_{member.name}", "int", str(int(member)))
            declare(f"{prefix}_SIZE", "int", str(len(value)))
        elif name.isupper() and isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            named = {f"{name}_{i}": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
            for each, number in named.items():
                # repr of a float is the shortest text that reads back as the same double, in C++ too.
                declare(each, "double" if isinstance(number, float) else "int64_t", repr(number))
    return constants


def header(constants: dict[str, tuple[str, str]]) -> str:
    lines = [f"constexpr {kind} {name} = {value};" for name, (kind, value) in constants.items()]
    return "\n".join(
        [
            "// Generated from pydeq/ops/constants.py, which explains them.",
            "#pragma once",
            "",
            "#include <cstdint>",
            "",
            "namespace pydeq {",
            "namespace constants {",
            *lines,
            "}  // namespace constants",
            "}  // namespace pydeq",
            "",
        ]
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    text = header(declarations(runpy.run_path(str(source))))
    # An unchanged file causes no compilation.
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
