"""The base class of all models: it solves and differentiates their fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pydeq.adjoints import Implicit, Unrolled
from pydeq.arguments import suggests_keywords
from pydeq.jacobian import JacobianPenalty
from pydeq.jacobian.estimator import Mode
from pydeq.layer import DEQ
from pydeq.models.configuration import Config, check_at_least
from pydeq.solution import Solution
from pydeq.solvers import GMRES, Anderson, Broyden, Picard, Solver
from pydeq.state import State


@suggests_keywords
@dataclass(frozen=True)
class SolverConfig(Config):
    """Solvers and tolerances of a model's fixed point and its adjoint.

    Args:
        forward: Solver of the fixed point.
        backward: Solver of the adjoint system.
        memory: Memory of the forward Anderson or Broyden (in pairs); None for the solver's default.
        backward_memory: The same for the backward solver; for GMRES its restart.
        rtol: Relative tolerance of the fixed point; None for the default of :class:`pydeq.DEQ`.
        atol: Absolute tolerance of the fixed point.
        max_steps: Cap on the evaluations of the fixed point.
        eval_max_steps: The cap in evaluation mode; None for ``max_steps``.
        backward_rtol: Relative tolerance of the adjoint system; None for the default of :class:`pydeq.Implicit`.
        backward_max_steps: Cap on the products of the adjoint system.

    Examples:
        >>> from pydeq import models
        >>> models.SolverConfig(forward="broyden", max_steps=18).max_steps
        18
    """

    forward: Literal["anderson", "broyden", "picard"] = "anderson"
    backward: Literal["anderson", "broyden", "picard", "gmres"] = "anderson"
    memory: int | None = None
    backward_memory: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 50
    eval_max_steps: int | None = None
    backward_rtol: float | None = None
    backward_max_steps: int = 50

    def check(self) -> None:
        # The adjoint has other names for these settings.
        check_at_least(self, 1, "memory", "backward_memory", "backward_max_steps")
        check_at_least(self, 0, "backward_rtol")
        for solver, name in ((self.forward, "memory"), (self.backward, "backward_memory")):
            if solver == "picard" and getattr(self, name) is not None:
                raise ValueError(f"{name} must be left out for picard, got {getattr(self, name)}")
        self.build(nn.Identity())

    @staticmethod
    def build_solver(name: str, memory: int | None) -> Solver:
        if name == "picard":
            return Picard()
        if name == "gmres":
            return GMRES() if memory is None else GMRES(restart=memory)
        kind = Anderson if name == "anderson" else Broyden
        return kind() if memory is None else kind(memory=memory)

    def build_adjoint(self) -> Implicit:
        solver = self.build_solver(self.backward, self.backward_memory)
        return Implicit(solver=solver, rtol=self.backward_rtol, max_steps=self.backward_max_steps)

    def build(self, cell: nn.Module) -> DEQ:
        """Make the layer that solves ``cell`` with these settings."""
        return DEQ(
            cell,
            solver=self.build_solver(self.forward, self.memory),
            adjoint=self.build_adjoint(),
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            eval_max_steps=self.eval_max_steps,
        )


@suggests_keywords
@dataclass(frozen=True)
class PenaltyConfig(Config):
    """The Jacobian penalty of a training; see :class:`pydeq.JacobianPenalty`.

    Args:
        strength: The factor gamma of the penalty in the loss.
        frequency: Probability that a step has the penalty.
        increment: Added to the strength after each ``every`` training steps.
        every: Training steps between two increments; None for no increments.
        probes: Random vectors of a sample.
        mode: vjp, jvp, difference or auto.
        stop_epoch: The first epoch without a penalty.
        pretraining_strength: The strength during shallow pre-training.

    Examples:
        >>> from pydeq import models
        >>> models.PenaltyConfig(strength=0.4, stop_epoch=90).build(steps_per_epoch=500).stop
        45000
    """

    strength: float
    frequency: float = 1.0
    increment: float = 0.0
    every: int | None = None
    probes: int = 1
    mode: Mode = "vjp"
    stop_epoch: int | None = None
    pretraining_strength: float = 0.0

    def check(self) -> None:
        self.build(steps_per_epoch=1)

    def build(self, steps_per_epoch: int | None = None) -> JacobianPenalty:
        """Make the penalty with its schedule.

        Args:
            steps_per_epoch: Needed if the penalty ends with an epoch.
        """
        stop = None
        if self.stop_epoch is not None:
            if steps_per_epoch is None:
                raise ValueError(f"steps_per_epoch is needed: the penalty stops at epoch {self.stop_epoch}")
            stop = self.stop_epoch * steps_per_epoch
        return JacobianPenalty(
            self.strength,
            frequency=self.frequency,
            increment=self.increment,
            every=self.every,
            stop=stop,
            probes=self.probes,
            mode=self.mode,
        )


class EquilibriumModel(nn.Module):
    """A model around one :class:`pydeq.DEQ`, its attribute ``deq``.

    Args:
        cell: cell(z, *context) -> like z.
        solver: How to solve it.

    Examples:
        >>> from pydeq import models
        >>> model = models.EquilibriumModel(torch.nn.Linear(4, 4), models.SolverConfig())
        >>> model.parameter_count()
        20
    """

    def __init__(self, cell: nn.Module, solver: SolverConfig) -> None:
        super().__init__()
        self.deq = solver.build(cell)

    def parameter_count(self) -> int:
        """Number of trainable entries; shared parameters count once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def solve(
        self,
        z0: State,
        *context: Any,
        return_solution: bool = True,
        layers: int | None = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        penalty: JacobianPenalty | None = None,
    ) -> tuple[Any, Solution]:
        """Solve for the equilibrium from ``z0``, or apply the cell ``layers`` times.

        Call it inside a :func:`pydeq.nn.solve_scope`: all evaluations of the call then share their dropout masks.

        Args:
            return_solution: Whether the caller returns the solution; a penalty needs that.
            layers: For shallow pre-training: apply the cell this many times and differentiate through all of them. The
                solution then describes the last application.
            rtol: Relative tolerance of the solve; by default the configuration's.
            max_steps: Cap on the evaluations of the solve; by default the configuration's.
            penalty: A penalty to compute; the solution returns it.
        """
        if penalty is not None and not return_solution:
            raise ValueError("penalty is returned in the solution: it needs return_solution=True")
        if layers is None:
            return self.deq(z0, *context, return_solution=True, rtol=rtol, max_steps=max_steps, penalty=penalty)
        if isinstance(layers, bool) or not isinstance(layers, int):
            raise TypeError(f"layers must be an int, got {type(layers).__name__}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if rtol is not None or max_steps is not None:
            raise ValueError("rtol and max_steps must be left out with layers, which applies the cell without a solve")
        z = z0
        for _ in range(layers - 1):
            z = self.deq.cell(z, *context)
        last = DEQ(self.deq.cell, solver=Picard(), adjoint=Unrolled(), rtol=0.0, max_steps=1)
        return last(z, *context, return_solution=True, penalty=penalty)
