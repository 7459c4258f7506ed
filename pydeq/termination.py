"""When a sample is done: the reference of ``csrc/common/termination.h``.

One rule for every solver. A step measures the residual g = f(z) - z of each sample, ``judge`` turns it into a verdict,
and ``settle`` does what every solver does with one: it keeps the best iterate and places stopped samples.

Shapes: B samples, D entries of state. ``z``, ``f`` and ``next`` are [B, D], ``best`` is [2, B, D] (iterate, image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydeq.protocol import (
    CONTRACTION,
    DIVERGENCE,
    GROWTH,
    RUNNING,
    STALL_EPSILONS,
    STALL_WINDOW,
    Counter,
    Progress,
    Scalar,
    Status,
)
from pydeq.reduction import WHOLE, Reduction, norms


@dataclass(frozen=True)
class Rules:
    """The stopping rules of one solve.

    Args:
        rtol: CONVERGED when ||f(z) - z|| <= atol + rtol * ||f(z)||.
        atol: See ``rtol``; in units of the residual.
        eps: Machine epsilon of the coarsest dtype that fn computes in.
        freeze: Whether a sample that is done is left alone. False iterates it on until the worst one is done.
        stall: Whether a sample without progress, at a residual that rounding explains, is STALLED.
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
    """What a step does with each sample; all bool [B]."""

    active: Tensor  # evaluated for its own sake at this step
    improved: Tensor  # this iterate is the best so far
    displaced: Tensor  # not improved, and the best iterate is the previous one: save it now
    proceed: Tensor  # take the solver's step
    retry: Tensor  # forget the history, take a plain step from the best iterate
    stopped: Tensor  # done now; its rows hold its value from here on
    materialize: Tensor  # the best iterate is this one and must be saved now


def judge(
    z: Tensor,
    f: Tensor,
    scalars: Tensor,
    counters: Tensor,
    rtol: float,
    atol: float,
    eps: float,
    freeze: bool,
    stall: bool,
    last: bool,
    reduction: Reduction = WHOLE,
) -> Verdict:
    """Measure g = f - z, update ``scalars`` and ``counters`` in place, and decide.

    Args:
        z, f: Iterates and their images, [B, D].
        rtol, atol, eps, freeze, stall: See :class:`Rules`.
        last: Whether no evaluation follows.
        reduction: Completes the norms.
    """
    status, best = counters[:, Counter.STATUS], scalars[:, Scalar.BEST]
    active = status == RUNNING
    if not freeze:
        active = active | (status == Status.CONVERGED) | (status == Status.STALLED)
    running = status == RUNNING
    counters[:, Counter.EVALUATIONS] += active.int()
    begins = active & (counters[:, Counter.EVALUATIONS] == 1)

    compute = torch.promote_types(z.dtype, torch.float32)
    residual, image = norms([f.to(compute) - z.to(compute), f], reduction)
    finite = residual.isfinite() & image.isfinite()
    residual = torch.where(finite, residual, math.inf)
    for column, value in ((Scalar.RESIDUAL, residual), (Scalar.NORM, image)):
        scalars[:, column] = torch.where(active, value, scalars[:, column])
    scalars[:, Scalar.FIRST] = torch.where(begins, residual, scalars[:, Scalar.FIRST])
    scalars[:, Scalar.FIRST_NORM] = torch.where(begins, image, scalars[:, Scalar.FIRST_NORM])
    first, first_norm = scalars[:, Scalar.FIRST], scalars[:, Scalar.FIRST_NORM]

    # z + c has no fixed point, but far out z + c rounds to z: there a small residual says nothing.
    absorbed = (0.5 * eps * image > (1.0 - CONTRACTION) * first) & (image > GROWTH * first_norm)
    contracted = (residual < CONTRACTION * first) & ~absorbed
    meets = active & finite & (residual <= atol + rtol * image) & (begins | contracted)
    # A sample that has converged gives up its iterate only for one that also meets the tolerance.
    improved = begins | (active & finite & ((running & meets) | ((residual < best) & (running | meets))))
    fresh = counters[:, Counter.FRESH] == 1
    displaced = active & ~improved & fresh
    scalars[:, Scalar.BEST] = torch.where(improved, residual, best)
    scalars[:, Scalar.BEST_NORM] = torch.where(improved, image, scalars[:, Scalar.BEST_NORM])
    since = torch.where(improved, 0, counters[:, Counter.SINCE_BEST] + 1)
    counters[:, Counter.SINCE_BEST] = torch.where(active, since, counters[:, Counter.SINCE_BEST])
    tried = counters[:, Counter.TRIED] == 1

    explained = scalars[:, Scalar.BEST] <= STALL_EPSILONS * eps * scalars[:, Scalar.BEST_NORM]
    stalled = (counters[:, Counter.SINCE_BEST] >= STALL_WINDOW) & explained & stall
    lost = active & ~finite & (begins | tried)
    verdict = torch.where(lost, int(Status.NONFINITE), RUNNING)
    for rule, name in (
        (meets, Status.CONVERGED),
        (finite & (residual > DIVERGENCE * first), Status.DIVERGED),
        (finite & stalled, Status.STALLED),
        (torch.full_like(meets, last), Status.MAX_STEPS),
    ):
        verdict = torch.where((verdict == RUNNING) & rule, int(name), verdict)
    counters[:, Counter.STATUS] = torch.where(running, verdict, status).int()

    done = counters[:, Counter.STATUS] != RUNNING
    ended = done if freeze else (status >= Status.DIVERGED) | lost | (running & (verdict == Status.DIVERGED))
    stopped = active & (ended | last)
    retry = active & ~finite & ~stopped
    counters[:, Counter.TRIED] = torch.where(active, (retry | (tried & ~improved)).int(), counters[:, Counter.TRIED])
    materialize = improved & (done | last)
    counters[:, Counter.FRESH] = torch.where(active, (improved & ~materialize).int(), counters[:, Counter.FRESH])
    return Verdict(active, improved, displaced, active & ~retry & ~stopped, retry, stopped, materialize)


def settle(
    z: Tensor, f: Tensor, next: Tensor, best: Tensor, verdict: Verdict, previous_image: Tensor | None, damping: float
) -> None:
    """Save best iterates that would be lost, place stopped samples, and start retries.

    Args:
        next: On entry the previous iterates, on exit the next ones for stopped and retried samples.
        previous_image: f at the previous iterates, [B, D], read for displaced samples. None where the solver does not
            keep it: then every improvement saves its image at once.
    """
    value, image = best[0], best[1]
    save, keep = verdict.materialize[:, None], verdict.displaced[:, None]
    value.copy_(torch.where(save, z, torch.where(keep, next, value)))
    if previous_image is None:
        image.copy_(torch.where(verdict.improved[:, None], f, image))
    else:
        image.copy_(torch.where(save, f, torch.where(keep, previous_image, image)))
    compute = torch.promote_types(z.dtype, torch.float32)
    wide_value, wide_image = value.to(compute), image.to(compute)
    plain = image if damping == 1.0 else (wide_value + damping * (wide_image - wide_value)).to(z.dtype)
    stopped = verdict.stopped[:, None]
    z.copy_(torch.where(stopped, value, z))
    next.copy_(torch.where(stopped, value, torch.where(verdict.retry[:, None], plain, next)))


def report(progress: Tensor, counters: Tensor, step: int) -> None:
    """Write (steps done, samples running) to ``progress``."""
    progress[Progress.STEP] = step + 1
    progress[Progress.RUNNING] = (counters[:, Counter.STATUS] == RUNNING).sum().to(progress.device)
