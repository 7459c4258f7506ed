"""The learning rate of each step: a function of the step alone, so that nothing of it need be saved."""

from __future__ import annotations

import math

from experiments.training.configuration import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The learning rate of update ``step``.

        warm-up:   peak (step + 1) / warmup                                  for step < warmup
        cosine:    floor + (peak - floor) (1 + cos(pi step / steps)) / 2     else

    The cosine counts from the first step, not from the end of the warm-up, as the published recipes do.

    Args:
        schedule: Its shape.
        peak: The optimizer's learning rate.
        step: From 0.
        steps: Of the whole training.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return peak
    progress = min(1.0, step / max(1, steps))
    return schedule.floor + (peak - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
