"""Broyden's good method (Broyden 1965), stored as steps only; the step is in :mod:`pydeq.ops.broyden_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pydeq.arguments import check_integer, set_fields, suggests_keywords
from pydeq.ops import broyden_step
from pydeq.ops.capture import capturing
from pydeq.ops.constants import Counter
from pydeq.ops.reduction import WHOLE
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace, check_vectors
from pydeq.solvers.broyden_search import BroydenSearchWorkspace
from pydeq.solvers.buffers import empty, zeros
from pydeq.solvers.inverse_jacobian import InverseJacobian

# Initial capacity for inner products of steps; it doubles.
_COLUMNS = 16


@suggests_keywords
@dataclass(frozen=True)
class Broyden(Solver):
    """Good Broyden with unit steps from H0 = -I: rank-one updates of an inverse Jacobian of g(z) = f(z) - z.

    Args:
        memory: Pairs (step, change of residual) kept, at least 1. A full memory restarts from the newest pair. Vectors
            are allocated as they are used: k steps take k of them. CUDA kernels keep at most 511 pairs.
        line_search: Shorten a step of a sample up to twice if its residual does not fall, see
            :mod:`pydeq.solvers.line_search`. For maps on which full steps diverge; a step may then take three
            evaluations. The method runs in plain torch, not in kernels, keeps two vectors for each step, and cannot be
            captured into a CUDA graph.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, section 4; More and Trangenstein, Math.
    Comp. 30 (1976), for vanishing denominators.

    Examples:
        >>> pydeq.fixed_point(lambda z: 3 * torch.cos(z), torch.ones(1), solver=pydeq.Broyden(), rtol=1e-5).value
        tensor([1.1701])
    """

    reduces: ClassVar[bool] = True

    memory: int = 100
    line_search: bool = False

    def __post_init__(self) -> None:
        set_fields(self, memory=check_integer("memory", self.memory, 1))
        if not isinstance(self.line_search, bool):
            raise TypeError(f"line_search must be a bool, got {type(self.line_search).__name__}")

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        if self.line_search:
            if rules.reduction is not WHOLE:
                raise ValueError("Broyden's line_search does not take sharded states: use Broyden()")
            return BroydenSearchWorkspace(flat, rules, max_steps, self.memory, repr(self))
        return BroydenWorkspace(flat, rules, max_steps, self)


class BroydenWorkspace(Workspace):
    """The workspace: after k steps at most k + 6 state vectors, without f; float32 steps for half states."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Broyden) -> None:
        # The last evaluation takes no step, so at most max_steps - 1 are ever stored.
        self.capacity = max(1, min(solver.memory + 1, max_steps - 1))
        check_vectors(flat.device, rules, self.capacity, max_steps, memory=solver.memory)
        batch, columns = flat.shape[0], min(_COLUMNS, self.capacity)
        super().__init__(flat, rules, max_steps, (batch, columns, columns), (batch, columns))
        self.gram, self.thetas = self.zeroed
        self.memory = solver.memory
        self.wide = torch.promote_types(flat.dtype, torch.float32)
        if self.wide != flat.dtype:
            self.iterate = flat.to(self.wide)
        self.restart = flat.new_empty(0, dtype=self.wide)
        self.steps: list[Tensor] = []
        self.evaluations = 0  # those with a step that was taken or, on a GPU, is queued

    def step(self, f: Tensor, k: int) -> None:
        last = k + 1 == self.max_steps
        self.evaluations = k + 1
        if not last and k <= self.memory:
            if k == len(self.steps):
                self.steps.extend(self.scratch.more_rows(k, self.capacity - k, self.wide))
                if len(self.steps) > self.thetas.shape[1]:
                    self._widen(2 * self.thetas.shape[1])
            if k == self.memory and k + 2 < self.max_steps:  # the next step restarts
                self.restart = empty(f, *f.shape, dtype=self.wide)
        own = self.iterate, self.steps[: k + 1], self.restart, self.gram, self.thetas, self.memory
        self.take(broyden_step, f, k, last, own)

    def inverse_jacobian(self) -> InverseJacobian:
        """Return the approximation of (I - J)^-1 after the solve; it takes over the workspace's steps.

        Raises:
            RuntimeError: If a sample's memory was full: a restart overwrites steps that the approximation needs.
        """
        counters = self.counters
        restarts = self.memory + 2 < self.max_steps
        if restarts and capturing(counters.device):
            raise RuntimeError(
                "while a CUDA graph is captured, Broyden's memory must be at least max_steps - 2, so that no sample"
                f" loses its inverse Jacobian: raise it from {self.memory} to {self.max_steps - 2}, or lower max_steps"
            )
        if restarts and bool(counters[:, Counter.RESTARTED].any()):
            restarted = int(counters[:, Counter.RESTARTED].sum())
            raise RuntimeError(
                f"the inverse Jacobian of {restarted} of {len(counters)} samples is lost: Broyden's memory of"
                f" {self.memory} was full and restarted; raise its memory to {self.max_steps - 2} or lower max_steps"
            )
        taken = max(0, min(len(self.steps), self.evaluations - 1))
        position = self.iterate if self.iterate.numel() else self.best[0]
        counts = counters[:, Counter.COUNT].long()
        # The last evaluation's iterate and image are kept only if it was the best one.
        complete = (counters[:, Counter.SINCE_BEST] == 0) & (counts > 0)
        residual = torch.where(complete[:, None], self.best[1].to(self.wide) - position, 0.0)
        return InverseJacobian(self.steps[:taken], self.gram, self.thetas, counts, residual, complete)

    def _widen(self, columns: int) -> None:
        """Make room for the inner products of ``columns`` steps, at most ``capacity``."""
        columns = min(columns, self.capacity)
        gram, thetas, batch, used = self.gram, self.thetas, len(self.thetas), self.thetas.shape[1]
        self.gram, self.thetas = zeros(
            thetas, (torch.float64, (batch, columns, columns)), (torch.float64, (batch, columns))
        )
        self.gram[:, :used, :used] = gram
        self.thetas[:, :used] = thetas
