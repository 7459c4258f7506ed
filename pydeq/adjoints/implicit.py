"""Implicit differentiation: the gradient of a fixed point from the fixed point alone.

At z* = f(z*), a cotangent v of z* gives the cotangent u of f's value that solves u = J^T u + v, J = df/dz at z* (the
implicit function theorem). f is evaluated once at the solution with gradients on, and u replaces v on its way into
that graph: so parameters, context and whatever f closes over all get their gradients, and the memory does not grow with
the solve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pydeq.adjoints.base import Adjoint, Problem
from pydeq.fixed_point import check_max_steps, check_tolerance, fixed_point
from pydeq.keywords import suggests_keywords
from pydeq.protocol import Status
from pydeq.solution import Solution
from pydeq.solvers import Anderson, Solver
from pydeq.state import Layout, State, layout_of
from pydeq.termination import default_rtol


@suggests_keywords
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact implicit differentiation, by solving u = J^T u + v.

    Args:
        solver: Solves the adjoint system; any of the fixed-point solvers.
        rtol: Relative tolerance of the adjoint; by default 1e-4, and 1e-3 for half states.
        max_steps: Vector-Jacobian products of each sample at most, at least 1.

    Samples whose adjoint is NONFINITE get NaN gradients, so that a gradient scaler sees the overflow.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019, theorem 1.
    """

    solver: Solver = field(default_factory=Anderson)
    rtol: float | None = None
    max_steps: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {self.solver!r}")
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        check_max_steps("max_steps", self.max_steps)

    def solve(self, problem: Problem) -> tuple[State, Solution]:
        solution = fixed_point(problem.fn, problem.z0, *problem.context, **problem.options)
        layout = layout_of(solution.image)
        # The graph of one evaluation, with the state as a leaf of its own.
        z = tuple(part.detach().requires_grad_() for part in as_tuple(solution.image))
        y = problem.fn(z if layout.is_tuple else z[0], *problem.context)
        cast = torch.is_autocast_enabled(layout.device.type)
        y = as_tuple(layout.check(y, cast, detach=False))
        if _reaches_beyond(y, z):
            y = _Attach.apply(_Adjoint(self, layout, solution), *y, *z)
        else:  # everything is frozen: no adjoint to solve
            y = tuple(part.detach() for part in y)
        return (y if layout.is_tuple else y[0]), solution


@dataclass(frozen=True)
class _Adjoint:
    """What backward needs beside the graph."""

    settings: Implicit
    layout: Layout
    solution: Solution

    def solve(self, y: tuple[Tensor, ...], z: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The solution u of u = J^T u + v."""
        attached = [part for part in y if part.requires_grad]

        def adjoint(u: State) -> State:
            seeds = [part for part, of in zip(as_tuple(u), y, strict=True) if of.requires_grad]
            products = torch.autograd.grad(attached, z, seeds, retain_graph=True, allow_unused=True)
            sums = tuple(b if a is None else a + b for a, b in zip(products, v, strict=True))
            return sums if self.layout.is_tuple else sums[0]

        settings = self.settings
        # The first evaluation of u = 0 would be v itself.
        solution = fixed_point(
            adjoint,
            v if self.layout.is_tuple else v[0],
            solver=settings.solver,
            rtol=0.1 * default_rtol(self.layout.dtype) if settings.rtol is None else settings.rtol,
            max_steps=settings.max_steps,
        )
        self.solution.backward = solution
        lost = solution.status == Status.NONFINITE
        return tuple(
            part.masked_fill(lost.view(-1, *[1] * (part.dim() - 1)), torch.nan) for part in as_tuple(solution.image)
        )


class _Attach(torch.autograd.Function):
    """Hands y through; on the way back replaces its cotangent v by the adjoint's solution u."""

    @staticmethod
    def forward(adjoint: _Adjoint, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in tensors[: len(tensors) // 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.adjoint = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        y, z = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        u = ctx.adjoint.solve(y, z, cotangents)
        return None, *u, *[None] * len(z)


def _reaches_beyond(y: tuple[Tensor, ...], z: tuple[Tensor, ...]) -> bool:
    """Whether the graph of ``y`` ends in a leaf that is not one of ``z``."""
    nodes = [part.grad_fn for part in y if part.grad_fn is not None]
    if any(part.requires_grad and part.is_leaf and all(part is not leaf for leaf in z) for part in y):
        return True
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not part for part in z):
            return True
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        nodes.extend(new)
    return False


def as_tuple(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)
