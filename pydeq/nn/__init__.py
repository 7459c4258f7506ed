"""Modules for cells: they draw masks and compute normalized weights once per solve, not once per evaluation."""

from pydeq.cell.scope import solve_scope
from pydeq.nn.dropout import (
    SequenceDropout,
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
)
from pydeq.nn.normalization import apply_norm, remove_norm, spectral_norm, weight_norm

__all__ = [
    "SequenceDropout",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "apply_norm",
    "remove_norm",
    "solve_scope",
    "spectral_norm",
    "weight_norm",
]
