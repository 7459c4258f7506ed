"""Sums over the entries of a state: inner products and norms, completed over processes if a state is sharded.

Apart from these sums, solvers work entry by entry. So a solver that uses a :class:`Reduction` for all its sums also
works for states that are sharded over processes: each process sums over its entries, and the reduction sums over
processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Reduction:
    """Complete the sums of a process over its entries of a state. In this base class the process has all entries."""

    def sum(self, partial: Tensor) -> Tensor:
        """Return the complete sums from the partial ones."""
        return partial

    def max(self, partial: Tensor) -> Tensor:
        """Return the complete maxima from the partial ones; NaN if one of them is NaN."""
        return partial


WHOLE = Reduction()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32. Under torch.export ``torch.promote_types`` would become an operation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inner(a: Tensor, b: Tensor, reduction: Reduction = WHOLE) -> Tensor:
    """<a, b> over the last dimension, in float64; earlier dimensions broadcast."""
    return reduction.sum((a.double() * b.double()).sum(-1))


def norms(vectors: Sequence[Tensor], reduction: Reduction = WHOLE) -> Tensor:
    """Norms of the rows of each [B, D], float64 [len(vectors), B].

    They overflow and underflow no earlier than the entries do.
    """
    if all(x.dtype != torch.float64 for x in vectors):  # the squares of every narrower type fit
        return reduction.sum(torch.stack([x.double().square().sum(1) for x in vectors])).sqrt()
    wide = [x.double() for x in vectors]
    largest = torch.stack([x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0]) for x in wide])
    largest = reduction.max(largest)
    scale = torch.where(largest > 0, largest, 1.0)
    # The reciprocal of a subnormal overflows, so divide.
    squares = torch.stack([(x / s[:, None]).square().sum(1) for x, s in zip(wide, scale, strict=True)])
    return scale * reduction.sum(squares).sqrt()


def norm(x: Tensor) -> Tensor:
    """Norms of the rows of [B, D], float64 [B]."""
    return norms([x])[0]


def host_norm(x: Any) -> Any:
    """Norms of the rows of an array [B, D] in float64, which overflow and underflow no earlier than the entries do."""
    scale = np.abs(x).max(axis=1, initial=0.0)
    scale[~(scale > 0)] = 1.0
    scaled = x / scale[:, None]
    return scale * np.sqrt((scaled * scaled).sum(axis=1))
