"""The table of docs/cells.md from the list of cells and torch's limits: ``python tests/cells/table.py`` prints it."""

from __future__ import annotations

from cells import CELLS
from limits import LIMITS

COLUMNS = ("inference", "gradients", "second derivatives", "bf16 autocast", "torch.compile", "torch.func", "penalty")


def table() -> str:
    """Return the table: a row for each cell, a column for each use."""
    lines = ["| cell | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for case in CELLS:
        marks = []
        for column in COLUMNS:
            limit = LIMITS.get(column, {}).get(case.name)
            marks.append("yes" if limit is None else f"no: {limit.note}")
        lines.append(f"| {case.name.replace('|', chr(92) + '|')} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
