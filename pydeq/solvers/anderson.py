"""Anderson mixing (Anderson 1965), type II; the step is in :mod:`pydeq.ops.anderson_step`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pydeq.arguments import check_integer, check_number, set_fields, suggests_keywords
from pydeq.ops import anderson_step
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace, check_damping


@suggests_keywords
@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson mixing: the next iterate combines the last ones so that their residuals cancel best.

    (Gram + ridge * diag(Gram)) a = 1, sum a = 1;   z' = sum_j a_j (f(z_j) - (1 - damping) g_j),   g_j = f(z_j) - z_j

    Args:
        memory: Columns mixed, at least 1; with 1 this is Picard iteration.
        damping: In (0, 1].
        ridge: Relative to the diagonal of the Gram matrix, at least 0.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011).

    Examples:
        >>> solver = pydeq.Anderson(memory=3)
        >>> pydeq.fixed_point(torch.cos, torch.zeros(1), solver=solver, rtol=1e-5).value
        tensor([0.7391])
    """

    reduces: ClassVar[bool] = True

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        memory, damping = check_integer("memory", self.memory, 1), check_damping(self.damping)
        ridge = check_number("ridge", self.ridge)
        if not (ridge >= 0.0 and math.isfinite(ridge)):
            raise ValueError(f"ridge must be at least 0, got {ridge}")
        set_fields(self, memory=memory, damping=damping, ridge=ridge)

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _AndersonWorkspace(flat, rules, max_steps, self)


class _AndersonWorkspace(Workspace):
    """The workspace: 2 * memory + 4 state vectors, without f: two rings, two iterates, the best and its image."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Anderson) -> None:
        batch, size = flat.shape
        memory = min(solver.memory, max_steps)
        slots = max(memory, 2)  # the image of the previous iterate must outlive the next evaluation
        super().__init__(flat, rules, max_steps, (batch, slots, slots))
        self.memory, self.damping, self.ridge = memory, solver.damping, solver.ridge
        (self.gram,) = self.zeroed
        self.residuals = self.scratch.empty(batch, slots, size)
        self.values = self.scratch.empty(batch, slots, size)

    def step(self, f: Tensor, k: int) -> None:
        own = self.residuals, self.values, self.gram, self.memory, self.damping, self.ridge
        self.take(anderson_step, f, k, k + 1 == self.max_steps, own)
