"""The numbers that the references in Python and the compiled kernels share.

They are written only here: the build turns this file into ``pydeq_constants.h``. It imports nothing
but the standard library, so that a build can read it without torch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Status(IntEnum):
    """How the solve of one sample ended.

    Examples:
        >>> solution = pydeq.fixed_point(lambda z: 2 * z + 1, torch.zeros(2), solver=pydeq.Picard())
        >>> [pydeq.Status(status).name for status in solution.status.tolist()]
        ['DIVERGED', 'DIVERGED']
    """

    CONVERGED = 1
    """The residual met the tolerance."""
    MAX_STEPS = 2
    """The sample used all its evaluations before it met the tolerance."""
    STALLED = 3
    """The residual no longer falls, and it is so small that rounding errors can explain it."""
    DIVERGED = 4
    """The residual grew far beyond the first one."""
    NONFINITE = 5
    """``fn`` returned NaN or Inf, also after plain and shorter steps from the newest finite iterates."""


RUNNING: Final = 0
"""The status of a sample that is still iterated; users never see it."""


class Counter(IntEnum):
    """Columns of ``counters``, int32 [B, len(Counter)]."""

    STATUS = 0
    EVALUATIONS = 1
    SINCE_BEST = 2
    """Evaluations since the smallest residual was seen."""
    FRESH = 3
    """1 while the best iterate is the one evaluated last and is not yet copied to ``best``."""
    TRIED = 4
    """Since the best iterate: 1 for a plain step from it, plus 1 for each attempt to recover from non-finite values."""
    COUNT = 5
    """Columns (Anderson), steps (Broyden) or basis vectors (GMRES) in the sample's history."""
    HEAD = 6
    """Anderson: the ring slot written next."""
    RESTARTED = 7
    """Broyden: 1 if the sample's oldest factor is the explicit factor of a restart."""
    TILES_DONE = 8
    """On a GPU, while a step runs: blocks that are done with their part of the sample; else 0."""
    SAMPLES_DONE = 9
    """On a GPU, while a step runs, in row 0: samples that are decided; else 0."""
    FAR = 10
    """1 while the sample runs and its next evaluation is not expected to be its last."""


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
    """Rows of ``coordinates``, float64 [B, len(Coordinate), K]: vectors of GMRES by their coordinates in its basis."""

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
    FAR = 2
    """Samples among them whose next evaluation is not expected to be their last."""


HOST_FUNCTIONS: Final = 1
"""The version of the C functions' arguments, see ``pydeq/ops/libraries.py``: raise it when they change."""


class Answer(IntEnum):
    """Answers to a wait for a step's report, other than a number of running samples."""

    PENDING = -1
    """Nothing has happened so far."""
    LOST = -2
    """The stream has done all its work, but the step has not reported."""
    FAILED = -3
    """This number and all smaller numbers: the stream has an error with the code ``FAILED - number``."""


CONTRACTION: Final = 0.9
"""After the first evaluation, CONVERGED also needs a residual below this fraction of the first one."""
GROWTH: Final = 1.25
"""If the iterate has grown by more than this, CONVERGED also needs a drop that rounding cannot explain."""
DIVERGENCE: Final = 1e6
"""A residual beyond this multiple of the first one is DIVERGED."""
SUM_ROUNDING: Final = 1e-6
"""The largest relative difference of two norms of one vector, if the terms are summed in different orders."""
RECOVERIES: Final = 4
"""After a plain step from the best iterate, a sample makes this many attempts to recover before it is NONFINITE."""
STALL_WINDOW: Final = 10
"""Evaluations without a new best before a sample can be STALLED."""
STALL_EPSILONS: Final = 64
"""STALLED also needs a relative residual of at most this many machine epsilons."""
FAR: Final = 10.0
"""Suppose the next step reduces the residual by the fourth power of the last reduction. If the residual would still be
above this multiple of the tolerance, it is far from the tolerance. Reductions grow from step to step, and faster for
states with fewer entries."""
COEFFICIENT_LIMIT: Final = 1e4
"""Anderson drops its oldest column while the 1-norm of the mixing coefficients is above this."""
DENOMINATOR_LIMIT: Final = 0.1
"""Broyden's update is damped to keep its denominator at least this large (More and Trangenstein 1976)."""

CUDA_VECTORS: Final = 512
"""The most vectors of a history that a CUDA kernel takes as pointers: Broyden's steps, GMRES's basis."""


class CudaPath(IntEnum):
    """How a CUDA kernel's blocks share a step; all give the same bits. See ``csrc/cuda/step_shape.h``."""

    AUTO = 0
    """Probably the fastest for this GPU, batch and state."""
    BLOCK = 1
    """One launch, a block for each sample."""
    CLUSTER = 2
    """One launch, a cluster of blocks for each sample; the same as BLOCK on a GPU without clusters."""
    SPLIT = 3
    """Two launches, a block for each tile of a sample."""


class Distribution(IntEnum):
    """Distributions of random probes. The number is the last word of a counter, so they share no random bits."""

    RADEMACHER = 0
    """+1 or -1, each with probability 1/2."""
    GAUSSIAN = 1
    """The standard normal distribution."""


PHILOX_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)
"""Philox 4x32 (Salmon, Moraes, Dror and Shaw, SC 2011, section 3.3): multipliers, increments of the key."""
PHILOX_ROUNDS: Final = 10

# Minimax polynomials of the normal transform, each number a float32. Largest relative errors before rounding: 3e-8,
# 4e-9, 4e-11.
LOG_TERMS: Final = (
    -0.49999991059303284,
    0.33333951234817505,
    -0.25001755356788635,
    0.19962070882320404,
    -0.165705144405365,
    0.14917989075183868,
    -0.14307482540607452,
    0.08734750747680664,
)
"""log(1 + f) = f + f^2 sum_i a_i f^i for 1 + f in [sqrt(1/2), sqrt(2)]."""
SINE_TERMS: Final = (1.5707963705062866, -0.6459634900093079, 0.07968004047870636, -0.004601669032126665)
"""sin(pi t / 2) = t sum_i a_i t^(2 i) for |t| <= 1/2."""
COSINE_TERMS: Final = (-1.2337005138397217, 0.25366923213005066, -0.02086028829216957, 0.0009040217264555395)
"""cos(pi t / 2) = 1 + t^2 sum_i a_i t^(2 i) for |t| <= 1/2."""
LOG_2: Final = 0.6931471824645996
MARGIN: Final = 0.9
"""GMRES evaluates its solution once the known residual is below this fraction of the tolerance."""
NEWEST_SHARE: Final = 0.1
"""A direction of GMRES has at least this fraction of the newest basis vector; along it the map is not known yet."""
BREAKDOWN_EPSILONS: Final = 16
"""A difference of at most this many machine epsilons, relative to the minuend, is a rounding error, not a direction."""


class TrustStage(IntEnum):
    """Stages of a step of a trust-region search."""

    FIRST = 0
    """A step begins."""
    AGAIN = 1
    """The samples flagged ``TrustFlag.RENEWED`` have their Jacobians."""
    AFTER_UPDATES = 2
    """They have them in the place of updates, from which no trial point came."""
    DONE = 3
    """The next points are written."""


class TrustNumber(IntEnum):
    """Rows of the numbers of a trust-region search, float64 [len(TrustNumber), B]."""

    RESIDUAL = 0
    """||g(x)|| at the accepted point x."""
    RADIUS = 1
    """The radius r of the trust region."""
    REACHED = 2
    """The length ||d|| of the step to the trial point."""
    PROMISED = 3
    """The share of ||g(x)|| that d leaves by the linear model."""
    MARK = 4
    """A residual norm that is to be halved."""


class TrustCount(IntEnum):
    """Rows of the counts of a trust-region search, int64 [len(TrustCount), B]."""

    REJECTED = 0
    """Points that the search from x has rejected."""
    IDLE = 1
    """Evaluations since ``TrustNumber.MARK`` was reached."""


class TrustFlag(IntEnum):
    """Rows of the flags of a trust-region search, bool [len(TrustFlag), B]. The last five are of one step only."""

    EXACT = 0
    """The matrix of the sample is I - J at x, and not an update of another one."""
    SEARCHING = 1
    """The point being evaluated is a trial, and not a plain step."""
    UPDATED = 2
    """The sample has used updates."""
    CAREFUL = 3
    """The sample uses no more updates."""
    RUNNING = 4
    """The sample runs."""
    ACCEPTED = 5
    """The point that was evaluated is the new x."""
    REFUSED = 6
    """The point that was evaluated is a trial that is not accepted."""
    WANTED = 7
    """The sample needs a trial point."""
    RENEWED = 8
    """The sample needs the Jacobian at x before the search goes on."""


TRUST_ENTRIES: Final = 32
"""The most entries of a sample that the kernel takes. For larger samples there is LAPACK, which is faster."""
TRUST_FIRST: Final = 100.0
"""The first radius, in multiples of ||z|| + ||g(z)||."""
TRUST_GOOD: Final = 0.75
TRUST_POOR: Final = 0.25
TRUST_BAD: Final = 0.1
"""By the share of the promised reduction of ||g||^2 that a step reached: at least GOOD, the radius grows to twice the
step; below POOR, it shrinks to a half of the step; below BAD, to a quarter."""
TRUST_SLACK: Final = 0.1
"""A step may be longer or shorter than the radius by this share."""
TRUST_SECULAR_STEPS: Final = 50
"""Newton steps for the multiplier at most; two or three are usual."""
TRUST_RANK: Final = 2.220446049250313e-16
"""Singular values below this share of the largest one are taken as 0."""
TRUST_SLOW: Final = 0.5
"""After a step that leaves more than this share of ||g||, the next one gets a new Jacobian instead of an update."""
TRUST_PATIENCE: Final = 30
"""Evaluations in which ||g|| must fall by half; if not, the sample starts again, with new Jacobians only."""
TRUST_ARMIJO: Final = 1e-4
"""The share of the promised reduction for which a point is accepted."""
TRUST_TRIALS: Final = 40
"""Rejected points before a search gives up."""
