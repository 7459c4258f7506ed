"""What the references in Python and the compiled kernels agree on.

The only place where these numbers stand: the build turns this file into ``pydeq_protocol.h``. It imports nothing
but the standard library, so that a build can read it without torch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 1
    """The residual met the tolerance."""
    MAX_STEPS = 2
    """The evaluations were used up before the tolerance was met."""
    STALLED = 3
    """No progress any more, at a residual that rounding explains."""
    DIVERGED = 4
    """The residual grew far beyond the first one."""
    NONFINITE = 5
    """``fn`` returned NaN or Inf, also after a plain step from the best iterate."""


RUNNING: Final = 0
"""In the status column while a sample is still iterated; users never see it."""


class Counter(IntEnum):
    """Columns of ``counters``, int32 [B, len(Counter)]."""

    STATUS = 0
    EVALUATIONS = 1
    SINCE_BEST = 2
    """Evaluations since the smallest residual was seen."""
    FRESH = 3
    """1 while the best iterate is the one evaluated last, which then is not yet copied to ``best``."""
    TRIED = 4
    """1 once a plain step from the best iterate was taken."""
    COUNT = 5
    """Columns (Anderson), steps (Broyden) or basis vectors (GMRES) in the sample's history."""
    HEAD = 6
    """Anderson: the ring slot written next."""
    RESTARTED = 7
    """Broyden: 1 when the sample's oldest factor is the explicit one of a restart."""


class Scalar(IntEnum):
    """Columns of ``scalars``, float64 [B, len(Scalar)]."""

    FIRST = 0
    """Residual norm at z0."""
    BEST = 1
    """Residual norm at the best iterate."""
    BEST_NORM = 2
    """||f(z)|| at the best iterate."""
    RESIDUAL = 3
    """Residual norm at the newest iterate."""
    NORM = 4
    """||f(z)|| at the newest iterate."""
    FIRST_NORM = 5
    """||f(z)|| at z0."""


class Coordinate(IntEnum):
    """Rows of ``coordinates``, float64 [B, len(Coordinate), K]: what GMRES knows by coordinates in its basis."""

    MINIMUM = 0
    """The point with the smallest residual, from the start of the cycle."""
    RESIDUAL = 1
    """Its residual."""
    POINT = 2
    """The point being evaluated, from the start of the cycle."""


class Progress(IntEnum):
    """Entries of ``progress``, int64 on the CPU, written at the end of a step."""

    STEP = 0
    """Steps done so far."""
    RUNNING = 1
    """Samples still running."""


CONTRACTION: Final = 0.9
"""After the first evaluation CONVERGED also needs a residual below this share of the first one."""
GROWTH: Final = 1.25
"""... where the iterate has grown by more than this, that drop must not be one that rounding explains."""
DIVERGENCE: Final = 1e6
"""A residual beyond this multiple of the first one is DIVERGED."""
STALL_WINDOW: Final = 10
"""Evaluations without a new best before a sample can be STALLED."""
STALL_EPSILONS: Final = 64
"""... which also needs a relative residual within this many machine epsilons."""
COEFFICIENT_LIMIT: Final = 1e4
"""Anderson drops its oldest column while the 1-norm of the mixing coefficients is beyond this."""
DENOMINATOR_LIMIT: Final = 0.1
"""Broyden's update is damped to keep its denominator at least this large (More and Trangenstein 1976)."""
MARGIN: Final = 0.9
"""GMRES evaluates its solution once the known residual is within this share of the tolerance."""
NEWEST_SHARE: Final = 0.1
"""A direction of GMRES has at least this share of the newest basis vector: along it alone the map is not yet known."""
BREAKDOWN_EPSILONS: Final = 16
"""What is smaller by this many machine epsilons than what it was subtracted from is rounding, no direction."""
