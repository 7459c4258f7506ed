"""Shine: solve the adjoint system by the approximate inverse that Broyden's method has from the forward solve.

In forward, Broyden's method builds N ~ (I - J)^-1 (see :mod:`pydeq.ops.broyden_step`). The adjoint of a cotangent v is
(I - J)^-T v, so u = N^T v costs no product with J.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pydeq.adjoints.base import Adjoint, AdjointResult, Problem, refuse_vectorized
from pydeq.adjoints.graph_inputs import graph_inputs
from pydeq.adjoints.handover import hand_over, take_over
from pydeq.arguments import check_integer, check_tolerance, set_fields, suggests_keywords
from pydeq.cell.linearization import Linearization, linearize
from pydeq.cell.torch_compile import interpreted
from pydeq.ops.reduction import norm
from pydeq.ops.termination import default_rtol
from pydeq.solution import Solution
from pydeq.solve.solve import solve, solve_keeping_workspace
from pydeq.solvers import Broyden, Solver
from pydeq.solvers.broyden import BroydenWorkspace
from pydeq.solvers.inverse_jacobian import InverseJacobian
from pydeq.state import Layout, as_tuple


@suggests_keywords
@dataclass(frozen=True)
class Shine(Adjoint):
    """The gradient from the forward solve's own inverse Jacobian, u ~ N^T v; the solver must be :class:`pydeq.Broyden`.

    u = v + c (N^T v - v),   c = min(1, limit ||v|| / ||N^T v - v||) of each sample

    Cheap and biased: N is accurate in the directions of the solve's steps, so it improves with the evaluations of the
    solve. After one evaluation the gradient is the same as with :func:`pydeq.JacobianFree`. The steps of the solve are
    kept until backward has run, so the memory grows with the evaluations.

    Args:
        refine_steps: Maximum number of products with J of each sample that improve u, at least 0. They solve
            u = u + N^T (J^T u + v - u), the adjoint preconditioned by N, by Broyden's method.
        rtol: Relative tolerance of that solve; by default 1e-4, and 1e-3 for half states.
        limit: Bound of the correction's norm relative to v, at least 0. N can be far too large in directions without
            steps. After hard solves of trained cells, N^T v is sometimes a hundred times as long as v. Without a bound
            the gradient is then worse than with :func:`pydeq.JacobianFree`, which equals ``limit=0``. ``math.inf``
            takes N^T v unchanged. The source uses v instead of N^T v if ||N^T v|| > 1.3 ||v||.

    The solution's ``backward`` is the solution of the refinement; None without refinement. Second derivatives raise.

    Raises:
        TypeError: If an argument is of the wrong type, or the layer's solver is not Broyden.
        ValueError: If an argument is out of range.
        RuntimeError: In forward, if Broyden's memory was full, since a restart overwrites steps that N needs.

    Source: Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau, SHINE: SHaring the INverse Estimate from the forward pass for
    bi-level optimization and implicit models, ICLR 2022.

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> adjoint = pydeq.Shine(refine_steps=5)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, solver=pydeq.Broyden(), adjoint=adjoint, rtol=1e-5)
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([0.5975]),)
    """

    normed: ClassVar[bool] = False

    refine_steps: int = 0
    rtol: float | None = None
    limit: float = 1.0

    def __post_init__(self) -> None:
        steps = check_integer("refine_steps", self.refine_steps, 0)
        rtol = None if self.rtol is None else check_tolerance("rtol", self.rtol)
        set_fields(self, refine_steps=steps, rtol=rtol, limit=check_tolerance("limit", self.limit))

    def check(self, solver: Solver) -> None:
        if not isinstance(solver, Broyden):
            raise TypeError(f"Shine needs pydeq.Broyden as the solver, got {solver!r}")
        if solver.line_search:
            raise TypeError("Shine needs pydeq.Broyden without a line search, got line_search=True")

    def solve(self, problem: Problem) -> AdjointResult:
        self.check(problem.options["solver"])
        if problem.options.get("sharded"):
            raise ValueError("Shine does not take sharded states: use pydeq.Implicit")
        solution, workspace = solve_keeping_workspace(problem.cell.call, problem.z0, problem.context, **problem.options)
        assert isinstance(workspace, BroydenWorkspace)
        inverse = workspace.inverse_jacobian()
        del workspace  # before fn allocates
        explicit = problem.explicit()
        first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
        at = linearize(problem.cell.call, solution.image, problem.context)
        y = at.y
        if any(graph_inputs(at, explicit, first_node)):
            backward = _Backward(self, at.layout, solution, problem.shared)
            y = _Shine.apply(backward, inverse, hand_over(at), *at.z, *y)
        else:  # everything is frozen
            y = tuple(part.detach() for part in y)
        return AdjointResult(y if at.layout.is_tuple else y[0], solution, at)


@dataclass(frozen=True)
class _Backward:
    """The data that backward needs, in addition to tensors."""

    settings: Shine
    layout: Layout
    solution: Solution
    shared: dict[str, Any]

    def solve(self, at: Linearization, inverse: InverseJacobian, v: Tensor) -> Tensor:
        """u [B, D] for the cotangent v [B, D]."""
        settings = self.settings
        u = self._limited(v, inverse.transpose_product(v) - v)
        if not settings.refine_steps:
            return u

        def refined(u: Tensor) -> Tensor:
            return u + inverse.transpose_product(at.flat_vjp(u) + v - u)

        refinement = solve(
            refined,
            u,
            solver=Broyden(),
            rtol=0.1 * default_rtol(self.layout.dtype) if settings.rtol is None else settings.rtol,
            max_steps=settings.refine_steps,
            **self.shared,
        )
        self.solution.backward = refinement
        assert isinstance(refinement.image, Tensor)
        return refinement.image

    def _limited(self, v: Tensor, correction: Tensor) -> Tensor:
        """v plus a correction that is no longer than ``limit`` times v."""
        most = self.settings.limit * norm(v)
        length = norm(correction)
        # NaN and Inf stay unchanged.
        scale = torch.where(length > most, most / length, 1.0).to(v.dtype)
        return v + scale[:, None] * correction


class _Shine(torch.autograd.Function):
    """The identity of y whose backward replaces the cotangent v by u."""

    @staticmethod
    def forward(problem: _Backward, inverse: InverseJacobian, courier: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in tensors[len(tensors) // 2 :])  # no views: they may be modified

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.problem, inverse, *tensors = inputs
        # Save these tensors: then the memory of the solve is freed with the graph, not with the graph's last node.
        ctx.save_for_backward(*tensors, *inverse.tensors)

    @staticmethod
    @interpreted
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        problem, parts = ctx.problem, len(cotangents)
        courier, *tensors = ctx.saved_tensors
        refuse_vectorized(cotangents, problem.settings)
        layout = problem.layout
        at = take_over(courier) or Linearization(layout, tuple(tensors[:parts]), tuple(tensors[parts : 2 * parts]))
        v = layout.flatten(cotangents if layout.is_tuple else cotangents[0])
        u = layout.view(problem.solve(at, InverseJacobian.from_tensors(tensors[2 * parts :]), v))
        return (None,) * (3 + parts) + as_tuple(u)
