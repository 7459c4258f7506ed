"""The rules that decide when a sample is done; the reference of ``csrc/shared/termination.h``.

One rule for every solver. A step measures the residual g = f(z) - z of each sample, and ``judge`` turns it into a
verdict. :mod:`pydeq.ops.step` has what every solver does with a verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydeq.ops.constants import (
    CONTRACTION,
    DIVERGENCE,
    FAR,
    GROWTH,
    RECOVERIES,
    RUNNING,
    STALL_EPSILONS,
    STALL_WINDOW,
    SUM_ROUNDING,
    Counter,
    Scalar,
    Status,
)
from pydeq.ops.reduction import WHOLE, Reduction, norms


@dataclass(frozen=True)
class Rules:
    """The stopping rules of one solve.

    Args:
        rtol: CONVERGED when ||f(z) - z|| <= atol + rtol * ||f(z)||.
        atol: See ``rtol``; in units of the residual.
        eps: Machine epsilon of the coarsest dtype that fn computes in.
        freeze: Whether a sample that is done keeps its result. With False, all samples continue until the worst one is
            done.
        stall: Whether a sample without progress ends as STALLED if rounding errors explain its residual.
        reduction: Completes sums over the entries of a state.
    """

    rtol: float
    atol: float
    eps: float
    freeze: bool
    stall: bool
    reduction: Reduction = field(default=WHOLE, repr=False)


def default_rtol(dtype: torch.dtype) -> float:
    """1e-3, and 1e-2 for the half types, whose residuals end near 2e-3."""
    return 1e-2 if torch.finfo(dtype).bits < 32 else 1e-3


@dataclass(frozen=True)
class Verdict:
    """Decisions of a step about each sample; all bool [B]."""

    active: Tensor  # judged at this step
    improved: Tensor  # this iterate is the best so far
    displaced: Tensor  # not improved, but the previous iterate was the best one: save it now
    proceed: Tensor  # take the solver's step
    retry: Tensor  # forget the history, and try another iterate: by default the previous one again
    from_best: Tensor  # retry: a plain step from the best iterate
    halfway: Tensor  # retry: half the step from the previous iterate to this one
    stopped: Tensor  # done now; from now on its rows hold its value
    materialize: Tensor  # the best iterate is this one and must be saved now


def judge(
    z: Tensor,
    f: Tensor,
    scalars: Tensor,
    counters: Tensor,
    rules: Rules,
    last: bool,
    look_back: int = 0,
) -> Verdict:
    """Measure g = f - z, update ``scalars`` and ``counters`` in place, and decide.

    Args:
        z, f: Iterates and their images, [B, D].
        scalars: float64 [B, len(Scalar)].
        counters: int32 [B, len(Counter)].
        rules: When a sample is done.
        last: Whether no evaluation follows.
        look_back: 0, or the number of evaluations so far where a step looks back: it judges only samples that were done
            before the last evaluation.
    """
    compute = torch.promote_types(z.dtype, torch.float32)
    residual, image = norms([f.to(compute) - z.to(compute), f], rules.reduction)
    if look_back:
        return _judge_again(residual, image, scalars, counters, rules, last, look_back)
    status, best = counters[:, Counter.STATUS], scalars[:, Scalar.BEST]
    active = running = status == RUNNING
    had_converged, had_stalled = status == Status.CONVERGED, status == Status.STALLED
    if not rules.freeze:
        active = running | had_converged | had_stalled
    counters[:, Counter.EVALUATIONS] += active.int()
    begins = active & (counters[:, Counter.EVALUATIONS] == 1)

    finite = residual.isfinite() & image.isfinite()
    residual = torch.where(finite, residual, math.inf)
    previous = scalars[:, Scalar.RESIDUAL].clone()
    for column, value in ((Scalar.RESIDUAL, residual), (Scalar.NORM, image)):
        scalars[:, column] = torch.where(active, value, scalars[:, column])
    scalars[:, Scalar.FIRST] = torch.where(begins, residual, scalars[:, Scalar.FIRST])
    scalars[:, Scalar.FIRST_NORM] = torch.where(begins, image, scalars[:, Scalar.FIRST_NORM])
    first, first_norm = scalars[:, Scalar.FIRST], scalars[:, Scalar.FIRST_NORM]

    # z + c has no fixed point, but for a large z it rounds to z: a small residual means nothing there.
    absorbed = (0.5 * rules.eps * image > (1.0 - CONTRACTION) * first) & (image > GROWTH * first_norm)
    contracted = (residual < CONTRACTION * first) & ~absorbed
    tolerance = rules.atol + rules.rtol * image
    meets = active & finite & (residual <= tolerance) & (begins | contracted | had_converged)
    # Without freezing, a sample counts as converged only while it meets the tolerance: other samples may move it.
    reopened = active & had_converged & ~meets
    first = scalars[:, Scalar.FIRST] = torch.where(reopened & finite & (residual > first), residual, first)

    improved = begins | (active & finite & (meets | reopened | (running & (residual < best))))
    fresh = counters[:, Counter.FRESH] == 1
    displaced = active & ~improved & fresh
    scalars[:, Scalar.BEST] = torch.where(improved, residual, best)
    scalars[:, Scalar.BEST_NORM] = torch.where(improved, image, scalars[:, Scalar.BEST_NORM])
    since = torch.where(improved, 0, counters[:, Counter.SINCE_BEST] + 1)
    counters[:, Counter.SINCE_BEST] = torch.where(active, since, counters[:, Counter.SINCE_BEST])
    tried = counters[:, Counter.TRIED].clone()

    explained = scalars[:, Scalar.BEST] <= STALL_EPSILONS * rules.eps * scalars[:, Scalar.BEST_NORM]
    stalled = (counters[:, Counter.SINCE_BEST] >= STALL_WINDOW) & explained & rules.stall
    lost = active & ~finite & (begins | (tried > RECOVERIES))
    verdict = torch.where(lost, int(Status.NONFINITE), RUNNING)
    for rule, name in (
        (meets, Status.CONVERGED),
        (finite & (residual > DIVERGENCE * first), Status.DIVERGED),
        (finite & stalled, Status.STALLED),
        (torch.full_like(meets, last), Status.MAX_STEPS),
    ):
        verdict = torch.where((verdict == RUNNING) & rule, int(name), verdict)
    judged = active & (~had_stalled | meets)
    status = counters[:, Counter.STATUS] = torch.where(judged, verdict, status).int()

    done = status != RUNNING
    ended = done if rules.freeze else (status >= Status.DIVERGED) | lost
    stopped = active & (ended | last)
    retry = active & ~finite & ~stopped
    # A step from a history of one evaluation was a plain step.
    from_best, halfway = retry & (tried == 0), retry & (tried > 0) & (counters[:, Counter.COUNT] <= 1)
    counters[:, Counter.TRIED] = torch.where(retry, tried + 1, torch.where(improved, 0, tried))
    materialize = improved & (done | last)
    counters[:, Counter.FRESH] = torch.where(active, (improved & ~materialize).int(), counters[:, Counter.FRESH])
    # A sample that is about to stall is not far from its end either.
    stalls = (counters[:, Counter.SINCE_BEST] + 1 >= STALL_WINDOW) & explained & rules.stall
    squared = torch.where(residual < previous, residual / previous, 1.0).square()
    far = (residual * (squared * squared) > FAR * tolerance) & ~done & ~begins & finite & ~stalls
    counters[:, Counter.FAR] = torch.where(active, far.int(), counters[:, Counter.FAR])
    proceed = active & ~retry & ~stopped
    return Verdict(active, improved, displaced, proceed, retry, from_best, halfway, stopped, materialize)


def _judge_again(
    residual: Tensor,
    image: Tensor,
    scalars: Tensor,
    counters: Tensor,
    rules: Rules,
    last: bool,
    look_back: int,
) -> Verdict:
    """Check samples that were done before this evaluation of their values.

    ``residual`` and ``image`` are the norms of g and f. They equal the recorded ones unless a sample's image depends on
    other samples.
    """
    status = counters[:, Counter.STATUS].clone()
    active = (status == Status.CONVERGED) | (status == Status.STALLED)
    if not last:  # a sample that seemed to diverge while other samples moved gets another chance
        active = active | (status == Status.DIVERGED)
    active &= counters[:, Counter.EVALUATIONS] < look_back
    change, noise = (residual - scalars[:, Scalar.BEST]).abs(), STALL_EPSILONS * rules.eps * image
    same = change <= SUM_ROUNDING * residual
    same &= (image - scalars[:, Scalar.BEST_NORM]).abs() <= SUM_ROUNDING * image
    changed = active & ~same
    finite = residual.isfinite() & image.isfinite()
    moved = changed & finite & ~((status == Status.DIVERGED) & (change <= noise))
    for column, value in (
        (Scalar.RESIDUAL, residual),
        (Scalar.BEST, residual),
        (Scalar.NORM, image),
        (Scalar.BEST_NORM, image),
    ):
        scalars[:, column] = torch.where(moved, value, scalars[:, column])
    meets = moved & (residual <= rules.atol + rules.rtol * image)
    woken = moved & ~meets & ~((status == Status.STALLED) & (residual <= noise))
    for rule, name in (
        (changed & ~finite, Status.NONFINITE),
        (meets, Status.CONVERGED),
        (woken, Status.MAX_STEPS if last else RUNNING),
    ):
        status = torch.where(rule, int(name), status)
    counters[:, Counter.STATUS] = status
    retry = woken & (not last)
    counters[:, Counter.TRIED] = torch.where(woken, retry.int(), counters[:, Counter.TRIED])
    for column in (Counter.SINCE_BEST, Counter.COUNT, Counter.RESTARTED):
        counters[:, column] = torch.where(woken, 0, counters[:, column])
    first = scalars[:, Scalar.FIRST]
    scalars[:, Scalar.FIRST] = torch.where(woken & (residual > first), residual, first)
    never = torch.zeros_like(active)
    return Verdict(active, moved, never, never, retry, retry, never, never, moved)
