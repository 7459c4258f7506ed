"""Picard iteration: z' = z + damping * (f(z) - z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pydeq.arguments import set_fields, suggests_keywords
from pydeq.ops import picard_step
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace, check_damping


@suggests_keywords
@dataclass(frozen=True)
class Picard(Solver):
    """Plain fixed-point iteration; converges if ``fn`` is a contraction.

    z' = z + damping * (f(z) - z)

    Args:
        damping: In (0, 1]; below 1 it also converges for some maps that overshoot.

    Raises:
        ValueError: If damping is outside (0, 1].

    Examples:
        >>> solver = pydeq.Picard(damping=0.5)
        >>> pydeq.fixed_point(lambda z: 1 - 1.5 * z, torch.zeros(1), solver=solver, rtol=1e-6).value
        tensor([0.4000])
    """

    reduces: ClassVar[bool] = True

    damping: float = 1.0

    def __post_init__(self) -> None:
        set_fields(self, damping=check_damping(self.damping))

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _PicardWorkspace(flat, rules, max_steps, self)


class _PicardWorkspace(Workspace):
    """The workspace: 4 state vectors, without f: two iterates, the best and its image."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Picard) -> None:
        super().__init__(flat, rules, max_steps)
        self.damping = solver.damping

    def step(self, f: Tensor, k: int) -> None:
        self.take(picard_step, f, k, k + 1 == self.max_steps, (self.damping, 0))
