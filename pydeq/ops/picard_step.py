"""One step of damped fixed-point iteration: z' = z + damping * (f(z) - z)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.ops.constants import Counter
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.ops.registry import define, reducing, refuse_gradients, returns_nothing
from pydeq.ops.termination import judge, report, settle


def picard_step_reference(
    z: Tensor,  # [B, D]
    f: Tensor,  # [B, D]
    next: Tensor,  # [B, D]
    best: Tensor,  # [2, B, D]
    scalars: Tensor,  # [B, len(Scalar)]
    counters: Tensor,  # [B, len(Counter)]
    progress: Tensor,  # [len(Progress)]
    step: int,
    rtol: float,
    atol: float,
    eps: float,
    freeze: bool,
    stall: bool,
    last: bool,
    damping: float,
    look_back: int,
    reduction: Reduction = WHOLE,
) -> None:
    verdict = judge(z, f, scalars, counters, rtol, atol, eps, freeze, stall, last, reduction, look_back)
    # Without damping z is the image of the previous iterate.
    settle(z, f, next, best, verdict, z if damping == 1.0 else None, damping)
    proceed = verdict.proceed[:, None]
    if damping == 1.0:
        next.copy_(torch.where(proceed, f, next))
    else:
        compute = torch.promote_types(z.dtype, torch.float32)
        wide = z.to(compute)
        next.copy_(torch.where(proceed, wide + damping * (f.to(compute) - wide), next))
    # Every step is a plain one: from a new best it is the one a retry would take.
    plain = verdict.proceed & verdict.improved
    counters[:, Counter.TRIED] = torch.where(plain, 1, counters[:, Counter.TRIED])
    report(progress, counters, step)


_picard_step = define(
    "picard_step(Tensor(a!) z, Tensor f, Tensor(b!) next, Tensor(c!) best, Tensor(d!) scalars, Tensor(e!) counters,"
    " Tensor(f!) progress, int step, float rtol, float atol, float eps, bool freeze, bool stall, bool last,"
    " float damping, int look_back) -> ()",
    picard_step_reference,
    returns_nothing,
)


def picard_step(
    z: Tensor,
    f: Tensor,
    next: Tensor,
    best: Tensor,
    scalars: Tensor,
    counters: Tensor,
    progress: Tensor,
    step: int,
    rtol: float,
    atol: float,
    eps: float,
    freeze: bool,
    stall: bool,
    last: bool,
    damping: float,
    look_back: int = 0,
    reduction: Reduction = WHOLE,
) -> None:
    """Measure f(z), decide for each sample whether it is done, and write the next iterates.

    Args:
        z: Iterates, [B, D], contiguous like every tensor here. Rows of samples that stop become their best iterate.
        f: Their images, [B, D].
        next: [B, D]. On entry the previous iterates, on exit the next ones.
        best: The best iterates and their images, [2, B, D]; complete for samples that are done.
        scalars: float64 [B, len(Scalar)].
        counters: int32 [B, len(Counter)].
        progress: int64 [len(Progress)] on the CPU.
        step: Steps done before this one.
        rtol, atol, eps, freeze, stall: See :class:`pydeq.ops.termination.Rules`.
        last: Whether this evaluation is the last; running samples end as MAX_STEPS.
        damping: In (0, 1]; 1 is plain iteration.
        look_back: Evaluations so far, where this is to look only at samples that were done before the last of them, of
            any solver. One whose image at its value no longer meets what it was done for depends on other samples: it
            runs again, by a plain step from its value, or ends as MAX_STEPS where ``last``. Else 0.
        reduction: Completes sums over the entries of a state; where some are elsewhere, the reference runs.

    Raises:
        RuntimeError: If gradients are on and an input requires grad, or a tensor's shape, dtype or layout is off.
    """
    refuse_gradients("picard_step", z, f)
    op = _picard_step if reduction is WHOLE else reducing(picard_step_reference, reduction)
    op(z, f, next, best, scalars, counters, progress, step, rtol, atol, eps, freeze, stall, last, damping, look_back)
