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
    """Columns (Anderson) or steps (Broyden) in the sample's history."""
    HEAD = 6
    """Anderson: the ring slot written next."""
    RESTARTED = 7
    """Broyden: 1 when the sample's oldest factor is the explicit one of a restart."""
    TILES_DONE = 8
    """On a GPU, while a step runs: blocks that are done with their part of the sample; else 0."""
    SAMPLES_DONE = 9
    """On a GPU, while a step runs, in row 0: samples that are decided; else 0."""


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
