"""Numbers that both originals stop by."""

from __future__ import annotations

from typing import Final

UNKNOWN: Final = 1e8
"""A residual before anything was measured."""
STALL_WINDOW: Final = 30
"""Broyden's method stops where within this number of steps ..."""
STALL_RATIO: Final = 1.3
"""... the largest residual is within this factor of the smallest ..."""
STALL_TOLERANCES: Final = 3
"""... and the newest one within this factor of the tolerance."""
