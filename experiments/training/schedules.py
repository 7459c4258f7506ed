"""The learning rate as a function of only the step: checkpoints need not save it."""

from __future__ import annotations

import math

from experiments.training.configuration import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Compute the learning rate of update ``step``.

        warm-up:   peak (step + 1) / warmup                                  for step < warmup
        cosine:    floor + (peak - floor) (1 + cos(pi step / steps)) / 2     otherwise

    The cosine counts from the first step, not from the end of the warm-up, as the published recipes do.

    Args:
        schedule: Shape of the schedule.
        peak: The optimizer's learning rate.
        step: Number of the step, from 0.
        steps: Number of steps of the whole training.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return peak
    progress = min(1.0, step / max(1, steps))
    return schedule.floor + (peak - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
