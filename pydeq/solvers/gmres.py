"""Restarted GMRES (Saad and Schultz 1986) for affine maps; the step is in :mod:`pydeq.ops.gmres_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pydeq.arguments import check_integer, set_fields, suggests_keywords
from pydeq.ops import gmres_step
from pydeq.ops.constants import Coordinate
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace, check_vectors
from pydeq.solvers.buffers import empty


@suggests_keywords
@dataclass(frozen=True)
class GMRES(Solver):
    """The generalized minimal residual method, for affine maps f(z) = A z + v, for example adjoint systems.

    x_k = argmin ||f(x) - x||  over  x in z0 + span(r, M r, ..., M^{k-1} r),   M = I - A,  r = f(z0) - z0

    Statuses depend only on residuals that are measured at the point that is returned. If dense GMRES needs k products,
    this solver makes at most k + 2 evaluations, the first at z0 and the last at the solution. A map that is not affine
    is treated as affine in each cycle. This may not converge; statuses and residuals are still true.

    Args:
        restart: Products per cycle, at least 1; the next cycle starts from the point with the smallest residual.
            Vectors are allocated as they are used: k steps take k of them, and at most ``restart``. CUDA kernels keep
            at most 512.

    Raises:
        TypeError, ValueError: If restart is not an int or below 1.

    Source: Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986); Jiranek, Rozloznik and Gutknecht, How to make
    simpler GMRES and GCR more stable, SIAM J. Matrix Anal. Appl. 30 (2008), for directions along the residual.

    Examples:
        >>> A = torch.tensor([[0.0, 2.0], [-3.0, 0.0]])
        >>> pydeq.fixed_point(lambda z: z @ A + 1, torch.zeros(1, 2), solver=pydeq.GMRES(), rtol=1e-5).value
        tensor([[-0.2857,  0.4286]])
    """

    reduces: ClassVar[bool] = True

    restart: int = 20

    def __post_init__(self) -> None:
        set_fields(self, restart=check_integer("restart", self.restart, 1))

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _GMRESWorkspace(flat, rules, max_steps, self)


class _GMRESWorkspace(Workspace):
    """The workspace: after k steps min(k, restart) + 6 state vectors at most, without f; float32 for half states."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: GMRES) -> None:
        super().__init__(flat, rules, max_steps)
        self.restart = solver.restart
        self.wide = torch.promote_types(flat.dtype, torch.float32)
        if self.wide != flat.dtype:
            self.iterate = flat.to(self.wide)
        self.begin = empty(flat, *flat.shape, dtype=self.wide)
        self.basis: list[Tensor] = []
        # The last evaluation takes no step. The evaluation before it adds no vector that is used.
        columns = self.capacity = max(1, min(solver.restart, max_steps - 1))
        check_vectors(flat.device, rules, columns, max_steps, restart=solver.restart)
        batch = flat.shape[0]
        self.gram, self.images, self.directions = (
            empty(flat, batch, columns, columns, dtype=torch.float64) for _ in range(3)
        )
        self.coordinates = empty(flat, batch, len(Coordinate), columns, dtype=torch.float64)
        self.lengths = flat.new_empty(batch, dtype=torch.float64)

    def step(self, f: Tensor, k: int) -> None:
        left = self.max_steps - 1 - k
        if left and k < self.restart and k == len(self.basis):
            self.basis.extend(self.scratch.more_rows(k, self.capacity - k, self.wide))
        own = (
            self.iterate, self.begin, self.basis[: k + 1], self.gram, self.images, self.directions, self.coordinates,
            self.lengths, left == 1, self.restart,
        )  # fmt: skip
        self.take(gmres_step, f, k, left == 0, own)
