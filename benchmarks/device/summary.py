"""A short summary of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def line(row: Row) -> str:
    """Format one row; of the environment's row only the device."""
    if "kernels" in row and "device" in row:
        row = {name: row[name] for name in ("case", "device", "multiprocessors", "torch", "python", "peers")}
    cells = (_cell(name, value) for name, value in row.items() if name not in ("case", "at"))
    return f"  {row.get('case') or '-'}: {', '.join(cells)}"


def _cell(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def show(out: Path) -> int:
    """Print the cases that failed or did not run, over all stages in ``out``; return 0."""
    for path in sorted(out.glob("*.jsonl")):
        rows = list(_rows(path))
        print(f"{path.stem}: {len(rows)} rows")
        for row in rows:
            if "failed" in row or "not run" in row:
                print(line(row))
    return 0


def _rows(path: Path) -> Iterator[Row]:
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:  # the line during which the process was killed
            yield {"failed": f"not a row: {text[:80]}"}
