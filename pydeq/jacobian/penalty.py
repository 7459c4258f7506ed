"""``JacobianPenalty``: the strength, frequency and schedule of the penalty in training."""

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
    """The penalty strength * ||J||_F^2 / d, a mean over the batch, with a schedule; for a layer's ``penalty=``.

        penalty = pydeq.JacobianPenalty(0.4, frequency=0.02, stop=90 * steps_per_epoch)
        z, solution = deq(z0, x, return_solution=True, penalty=penalty.at(step))
        loss = task_loss(z) + solution.penalty

    The caller decides what a step is. The strength at a step is

        strength_m + increment * floor((step - m) / every)

    where m is the latest of ``milestones`` up to this step.

    Args:
        strength: The strength before the first milestone, gamma in the paper, at least 0.
        frequency: Probability in (0, 1] that a training call computes the penalty. Otherwise the penalty is 0.
        milestones: Pairs (step, strength), by rising step.
        increment: Added every ``every`` steps.
        every: At least 1; needed by ``increment``.
        stop: The first step without a penalty.
        probes, distribution, mode, method, order, step: As in :func:`pydeq.frobenius_norm_squared`. In a layer,
            "vjp" does not evaluate fn again. "jvp" does not either: it differentiates the vector-Jacobian product,
            unless fn has a norm for which this is wrong. "difference" evaluates fn once more per probe for order 1,
            twice for order 2.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021, section 4.

    Examples:
        >>> penalty = pydeq.JacobianPenalty(0.4, milestones=[(100, 1.0)], stop=200)
        >>> [penalty.strength_at(step) for step in (0, 100, 200)]
        [0.4, 1.0, 0.0]
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
        """The strength at ``step``; 0 from ``stop`` on, never negative."""
        step = check_integer("step", step, 0)
        if self.stop is not None and step >= self.stop:
            return 0.0
        since, strength = max(((m, s) for m, s in self.milestones if m <= step), default=(0, self.strength))
        if self.every is not None:
            strength += self.increment * ((step - since) // self.every)
        return max(0.0, strength)

    def active(self, step: int, generator: torch.Generator | None = None) -> bool:
        """Decide whether ``step`` is penalized: with probability ``frequency``, unless its strength is 0.

        Args:
            step: Counted by the caller.
            generator: A CPU generator; by default torch's own. Nothing is drawn if there is nothing to decide.
        """
        if self.strength_at(step) == 0.0:
            return False
        return self.frequency == 1.0 or bool(torch.rand((), generator=generator, device="cpu") < self.frequency)

    def at(self, step: int) -> JacobianPenalty:
        """The penalty at ``step``, with a constant strength and the same frequency."""
        return replace(self, strength=self.strength_at(step), milestones=(), increment=0.0, every=None, stop=None)

    def differentiates_twice(self) -> bool:
        """Whether the mode certainly needs second derivatives of fn or, with gradients off, exact products."""
        return self.mode in ("vjp", "jvp") or not torch.is_grad_enabled()

    def evaluate(
        self,
        fn: Callable[..., Any],
        z: State,
        context: Sequence[Any] = (),
        at: Linearization | None = None,
        reduction: Reduction = WHOLE,
    ) -> Tensor:
        """Compute strength * ||J||_F^2 / d at ``z``, averaged over the batch.

        With gradients on, it is computed with probability ``frequency``, drawn from torch's CPU generator, and is 0
        otherwise. With gradients off it is always computed, so that it can be monitored.

        Args:
            fn, z, context: As in :func:`pydeq.jacobian_penalty`.
            at: fn already linearized at z.
            reduction: Completes sums over the entries of a state.

        Returns:
            0-d tensor, float64 for float64 states, else float32.

        Raises:
            ValueError: If the strength depends on the step: use :meth:`at`.
        """
        if self.milestones or self.every is not None or self.stop is not None:
            raise ValueError("penalty must have a constant strength, got a schedule: pass penalty.at(step)")
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
