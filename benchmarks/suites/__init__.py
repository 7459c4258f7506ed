"""The suites, one file each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.suites import (
    adjoints,
    compat,
    contest,
    differences,
    digits,
    importing,
    jacobian,
    kernels,
    memory,
    models,
    nfe,
    overhead,
    training,
)
from benchmarks.suites.base import Context

SUITES: dict[str, Callable[[Context], None]] = {
    "overhead": overhead.run,
    "kernels": kernels.run,
    "nfe": nfe.run,
    "contest": contest.run,
    "memory": memory.run,
    "import": importing.run,
    "digits": digits.run,
    "compat": compat.run,
    "training": training.run,
    "jacobian": jacobian.run,
    "differences": differences.run,
    "adjoints": adjoints.run,
    "models": models.run,
}

# The suites that follow Context.device. The other suites run on the CPU.
ON_DEVICE = frozenset({"contest"})

__all__ = ["ON_DEVICE", "SUITES", "Context"]
