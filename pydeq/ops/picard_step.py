"""One step of damped fixed-point iteration: z' = z + damping * (f(z) - z)."""

from __future__ import annotations

import torch

from pydeq.ops.constants import Counter
from pydeq.ops.step import Step, StepOperation, report, settle
from pydeq.ops.termination import judge


def picard_step_reference(step: Step, damping: float, look_back: int) -> None:
    """Take a step of damped fixed-point iteration.

    Args:
        damping: In (0, 1]; 1 is plain iteration.
        look_back: 0, or the number of evaluations so far. In the second case the step looks back: it checks only
            samples that were done before the last evaluation, of any solver. If a sample no longer meets the condition
            that it was done for, it depends on other samples. It then runs again, with a plain step from its value, or
            ends as MAX_STEPS if this evaluation is the last.
    """
    z, f, next, counters = step.z, step.f, step.next, step.counters
    verdict = judge(z, f, step.scalars, counters, step.rules, step.last, look_back)
    # Without damping z is the image of the previous iterate.
    settle(step, verdict, z if damping == 1.0 else None, damping)
    proceed = verdict.proceed[:, None]
    if damping == 1.0:
        next.copy_(torch.where(proceed, f, next))
    else:
        compute = torch.promote_types(z.dtype, torch.float32)
        wide = z.to(compute)
        next.copy_(torch.where(proceed, wide + damping * (f.to(compute) - wide), next))
    # Every step is a plain one. A retry would take the same step from a new best.
    plain = verdict.proceed & verdict.improved
    counters[:, Counter.TRIED] = torch.where(plain, 1, counters[:, Counter.TRIED])
    report(step.progress, step.counters, step.number)


picard_step = StepOperation("picard_step", "float damping, int look_back", picard_step_reference)
