"""The parts of a step that all solvers share: arguments, registration, and the actions on a verdict.

The shared arguments are :class:`Step` and, as a schema, ``STEP`` in :mod:`pydeq.ops.interface`. The kernels
have them in ``csrc/shared/step_args.h`` and ``csrc/shared/bind_step.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeq.ops.constants import RUNNING, Counter, Progress
from pydeq.ops.interface import step_schema
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.ops.registry import define, reducing, refuse_gradients, returns_nothing
from pydeq.ops.termination import Rules, Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """The arguments that the steps of all solvers share, for B samples of D entries. Every tensor is contiguous.

    Args:
        z: Iterates, [B, D]. Rows of samples that stop become their best iterate.
        f: Their images, [B, D].
        next: [B, D]. On entry the previous iterates, on exit the next ones.
        best: The best iterates and their images, [2, B, D]; complete for samples that are done.
        scalars: float64 [B, len(Scalar)].
        counters: int32 [B, len(Counter)].
        progress: int64 [len(Progress)] on the CPU.
        number: Steps done before this one.
        rules: When a sample is done.
        last: Whether this evaluation is the last; running samples end as MAX_STEPS.
    """

    z: Tensor
    f: Tensor
    next: Tensor
    best: Tensor
    scalars: Tensor
    counters: Tensor
    progress: Tensor
    number: int
    rules: Rules
    last: bool


class StepOperation:
    """A solver's step: measure f(z), decide for each sample whether it is done, and write the next iterates.

    Args:
        name: The name of the operation.
        own: Schema of the arguments that only this solver has. They follow the shared ones.
        reference: Defines the operation; a function of a :class:`Step` and the solver's own arguments.
    """

    def __init__(self, name: str, own: str, reference: Callable[..., None]) -> None:
        def from_flat(
            z: Tensor, f: Tensor, next: Tensor, best: Tensor, scalars: Tensor, counters: Tensor, progress: Tensor,
            step: int, rtol: float, atol: float, eps: float, freeze: bool, stall: bool, last: bool, *others: Any,
            reduction: Reduction = WHOLE,
        ) -> None:  # fmt: skip
            rules = Rules(rtol, atol, eps, freeze, stall, reduction)
            reference(Step(z, f, next, best, scalars, counters, progress, step, rules, last), *others)

        self.name = name
        self.reference = from_flat
        """The reference, with the arguments of the schema."""
        self.run = define(step_schema(name, own), from_flat, returns_nothing)._op  # without a call in Python

    def __call__(self, z: Tensor, f: Tensor, *others: Any) -> None:
        """Take the step, with the arguments of the schema.

        Raises:
            RuntimeError: If gradients are on and an input requires grad, or a tensor has the wrong shape, dtype or
                layout.
        """
        refuse_gradients(self.name, z, f)
        self.run(z, f, *others)

    def completed_by(self, reduction: Reduction) -> Callable[..., None]:
        """The step for sharded states: the reference, with its sums completed by ``reduction``."""
        return reducing(self.reference, reduction)


def settle(step: Step, verdict: Verdict, previous_image: Tensor | None = None, damping: float = 1.0) -> None:
    """Save best iterates that would be lost, place stopped samples, and start retries.

    After a retry ``z`` holds the finite iterate that it starts from, as after any other step.

    Args:
        step: ``next`` holds the previous iterates, and gets the next ones of stopped and retried samples.
        previous_image: f at the previous iterates, [B, D], read for displaced samples. None if the solver does not keep
            it: then every improvement saves its image at once.
        damping: The damping of a plain step from the best iterate.
    """
    z, f, next, value, image = step.z, step.f, step.next, step.best[0], step.best[1]
    save, keep = verdict.materialize[:, None], verdict.displaced[:, None]
    value.copy_(torch.where(save, z, torch.where(keep, next, value)))
    if previous_image is None:
        image.copy_(torch.where(verdict.improved[:, None], f, image))
    else:
        image.copy_(torch.where(save, f, torch.where(keep, previous_image, image)))
    compute = torch.promote_types(z.dtype, torch.float32)
    wide_value, wide_image = value.to(compute), image.to(compute)
    plain = image if damping == 1.0 else (wide_value + damping * (wide_image - wide_value)).to(z.dtype)
    wide_previous = next.to(compute)
    half = (wide_previous + 0.5 * (z.to(compute) - wide_previous)).to(z.dtype)
    stopped, from_best, halfway = (rows[:, None] for rows in (verdict.stopped, verdict.from_best, verdict.halfway))
    previous = next.clone()
    next.copy_(torch.where(stopped, value, torch.where(from_best, plain, torch.where(halfway, half, next))))
    z.copy_(torch.where(stopped | from_best, value, torch.where(halfway, previous, z)))


def report(progress: Tensor, counters: Tensor, number: int) -> None:
    """Write to ``progress`` how many steps are done, and how many samples run and are far from their tolerance."""
    progress[Progress.STEP] = number + 1
    progress[Progress.RUNNING] = (counters[:, Counter.STATUS] == RUNNING).sum().to(progress.device)
    progress[Progress.FAR] = counters[:, Counter.FAR].sum().to(progress.device)
