"""The type of a fixed-point problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.timing import Map

BATCH = 32


@dataclass(frozen=True)
class Problem:
    """Find z = fn(z) for a batch.

    Args:
        key: For names of figures.
        title: For readers.
        fn: The map.
        z0: Where to start, batch first.
        facts: Properties that explain the results, measured when the problem was made.
    """

    key: str
    title: str
    fn: Map
    z0: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)
