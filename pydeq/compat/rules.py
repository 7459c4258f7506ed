"""Constants of the stopping rules in both originals."""

from __future__ import annotations

from typing import Final

UNKNOWN: Final = 1e8
"""The residual before the first measurement."""
STALL_WINDOW: Final = 30
"""Broyden's method stops for lack of progress if, within this number of steps, ..."""
STALL_RATIO: Final = 1.3
"""... the largest residual is less than this factor times the smallest, ..."""
STALL_TOLERANCES: Final = 3
"""... and the newest residual is less than this factor times the tolerance."""
