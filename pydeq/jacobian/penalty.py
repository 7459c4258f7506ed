"""``JacobianPenalty``: how strongly, how often and how long the Jacobian is penalized in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pydeq.arguments import check_integer, check_number, set_fields, suggests_keywords
from pydeq.cell.adapter import canonical
from pydeq.cell.linearization import Linearization
from pydeq.jacobian.estimator import Estimator, Mode
from pydeq.jacobian.modes import estimate
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.state import State, layout_of


@suggests_keywords
@dataclass(frozen=True)
class JacobianPenalty:
    """strength * ||J||_F^2 / d, the mean over the batch, with a schedule; for ``penalty=`` of a layer's call.

        penalty = pydeq.JacobianPenalty(0.4, frequency=0.02, stop=90 * steps_per_epoch)
        z, solution = deq(z0, x, return_solution=True, penalty=penalty.at(step))
        loss = task_loss(z) + solution.penalty

    A step is whatever the caller counts. From step m on, the latest of ``milestones`` that is due, the strength is

        strength_m + increment * floor((step - m) / every)

    Args:
        strength: gamma before the first milestone, at least 0.
        frequency: Probability p in (0, 1] that a training call computes the penalty; it is 0 otherwise.
        milestones: Pairs (step, strength), by rising step.
        increment: Added every ``every`` steps.
        every: At least 1; needed by ``increment``.
        stop: The first step without a penalty.
        probes, distribution, mode, method, order, step: As in :func:`pydeq.frobenius_norm_squared`. In a layer "vjp"
            does not evaluate fn again; nor does "jvp", which differentiates the vector-Jacobian product, but where fn
            has a norm with which that is wrong. "difference" of order 1 evaluates fn once more per probe, of order 2
            twice.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021, section 4.
    """

    strength: float
    frequency: float = 1.0
    milestones: Sequence[tuple[int, float]] = ()
    increment: float = 0.0
    every: int | None = None
    stop: int | None = None
    probes: int = 1
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    mode: Mode = "auto"
    method: Literal["hutchinson", "hutch++", "exact"] = "hutchinson"
    order: Literal[1, 2] | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        frequency = check_number("frequency", self.frequency)
        if not 0.0 < frequency <= 1.0:
            raise ValueError(f"frequency must be in (0, 1], got {frequency}")
        milestones: list[tuple[int, float]] = []
        for i, pair in enumerate(self.milestones):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"milestones[{i}] must be a pair (step, strength), got {pair!r}")
            least = milestones[-1][0] + 1 if milestones else 0
            step = check_integer(f"the step of milestones[{i}]", pair[0], least)
            milestones.append((step, _check_strength(f"the strength of milestones[{i}]", pair[1])))
        increment = check_number("increment", self.increment)
        if not math.isfinite(increment):
            raise ValueError(f"increment must be finite, got {increment}")
        if (self.every is None) != (increment == 0.0):
            raise ValueError(f"increment and every belong together, got {increment} and {self.every}")
        set_fields(
            self,
            strength=_check_strength("strength", self.strength),
            frequency=frequency,
            milestones=tuple(milestones),
            increment=increment,
            every=None if self.every is None else check_integer("every", self.every, 1),
            stop=None if self.stop is None else check_integer("stop", self.stop, 0),
        )
        checked = self._estimator
        set_fields(self, probes=checked.probes, order=checked.order, step=checked.step)

    @property
    def _estimator(self) -> Estimator:
        return Estimator(self.probes, self.distribution, self.mode, self.method, self.order, self.step)

    def strength_at(self, step: int) -> float:
        """gamma at ``step``; 0 from ``stop`` on, never below 0."""
        step = check_integer("step", step, 0)
        if self.stop is not None and step >= self.stop:
            return 0.0
        since, strength = max(((m, s) for m, s in self.milestones if m <= step), default=(0, self.strength))
        if self.every is not None:
            strength += self.increment * ((step - since) // self.every)
        return max(0.0, strength)

    def active(self, step: int, generator: torch.Generator | None = None) -> bool:
        """Whether ``step`` is penalized: its strength is not 0, and a draw of probability ``frequency`` says so.

        Args:
            step: As the caller counts.
            generator: Of the CPU; by default torch's own. Nothing is drawn where there is nothing to decide.
        """
        if self.strength_at(step) == 0.0:
            return False
        return self.frequency == 1.0 or bool(torch.rand((), generator=generator, device="cpu") < self.frequency)

    def at(self, step: int) -> JacobianPenalty:
        """The penalty of ``step``: of constant strength, and as frequent."""
        return replace(self, strength=self.strength_at(step), milestones=(), increment=0.0, every=None, stop=None)

    def differentiates_twice(self) -> bool:
        """Whether it is sure to need second derivatives of fn, or exact products for watching."""
        return self.mode in ("vjp", "jvp") or not torch.is_grad_enabled()

    def evaluate(
        self,
        fn: Callable[..., Any],
        z: State,
        context: Sequence[Any] = (),
        at: Linearization | None = None,
        reduction: Reduction = WHOLE,
    ) -> Tensor:
        """strength * ||J||_F^2 / d at ``z``, the mean over the batch.

        With gradients on, it is 0 without a computation in all but a share ``frequency`` of the calls, drawn from
        torch's generator of the CPU. With gradients off it is always computed, for watching.

        Args:
            fn, z, context: As in :func:`pydeq.jacobian_penalty`.
            at: fn already linearized at z.
            reduction: Completes sums over the entries of a state.

        Returns:
            0-d tensor, float64 for float64 states, else float32.

        Raises:
            ValueError: If the strength depends on the step: :meth:`at` says which step it is.
        """
        if self.milestones or self.every is not None or self.stop is not None:
            raise ValueError("penalty must be of constant strength, got a schedule: pass penalty.at(step)")
        fn, z = canonical(fn, z)
        layout = layout_of(z)
        training = torch.is_grad_enabled()
        if self.strength == 0.0 or (training and not self.active(0)):
            dtype = torch.promote_types(layout.dtype, torch.float32)
            return torch.zeros((), dtype=dtype, device=layout.device)
        norms = estimate(self._estimator, fn, z, context, at, reduction=reduction)
        return (self.strength / max(1, layout.batch * layout.size)) * norms.sum()


def _check_strength(name: str, strength: Any) -> float:
    strength = check_number(name, strength)
    if not (math.isfinite(strength) and strength >= 0.0):
        raise ValueError(f"{name} must be finite and not negative, got {strength}")
    return strength
