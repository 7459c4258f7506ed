"""What is measured, one file each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.suites import compat, digits, importing, kernels, memory, nfe, overhead
from benchmarks.suites.base import Context

SUITES: dict[str, Callable[[Context], None]] = {
    "overhead": overhead.run,
    "kernels": kernels.run,
    "nfe": nfe.run,
    "memory": memory.run,
    "import": importing.run,
    "digits": digits.run,
    "compat": compat.run,
}

__all__ = ["SUITES", "Context"]
