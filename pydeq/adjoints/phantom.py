"""Phantom gradients: a few steps of the adjoint instead of its solution.

Cheap and biased. With damping tau and k steps, the cotangent v of the fixed point becomes

    u = tau sum_{i<k} (tau J^T + (1 - tau) I)^i v

which for tau = 1 are the first k terms of the Neumann series of (I - J^T)^-1 v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pydeq.adjoints.base import Adjoint, Problem
from pydeq.fixed_point import check_max_steps, fixed_point
from pydeq.keywords import suggests_keywords
from pydeq.solution import Solution
from pydeq.solvers.base import check_damping
from pydeq.state import Layout, State, as_tuple, layout_of


@suggests_keywords
@dataclass(frozen=True)
class Phantom(Adjoint):
    """The gradient of a few damped steps from the solution.

    Args:
        steps: Steps k, at least 1.
        damping: tau in (0, 1].
        form: "unroll" differentiates z <- (1 - tau) z + tau f(z), k times from the solution, with k evaluations.
            "neumann" evaluates f once and forms the same sum at the solution by k - 1 vector-Jacobian products.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Geng, Zhang, Bai, Wang and Lin, On Training Implicit Models, NeurIPS 2021.
    """

    steps: int = 1
    damping: float = 1.0
    form: Literal["unroll", "neumann"] = "unroll"

    def __post_init__(self) -> None:
        check_max_steps("steps", self.steps)
        check_damping(self.damping)
        if self.form not in ("unroll", "neumann"):
            raise ValueError(f"form must be 'unroll' or 'neumann', got {self.form!r}")

    def solve(self, problem: Problem) -> tuple[State, Solution]:
        solution = fixed_point(problem.fn, problem.z0, *problem.context, **problem.options)
        layout = layout_of(solution.image)
        if self.form == "neumann":
            return self._neumann(problem, solution, layout), solution
        z = solution.image
        for _ in range(self.steps):
            y = layout.check(
                problem.fn(z, *problem.context), torch.is_autocast_enabled(layout.device.type), detach=False
            )
            z = y if self.damping == 1.0 else self._blend(z, y, layout)
        return z, solution

    def _blend(self, z: State, y: State, layout: Layout) -> State:
        parts = tuple(a + self.damping * (b - a) for a, b in zip(as_tuple(z), as_tuple(y), strict=True))
        return parts if layout.is_tuple else parts[0]

    def _neumann(self, problem: Problem, solution: Solution, layout: Layout) -> State:
        z = tuple(part.detach().requires_grad_() for part in as_tuple(solution.image))
        y = problem.fn(z if layout.is_tuple else z[0], *problem.context)
        y = as_tuple(layout.check(y, torch.is_autocast_enabled(layout.device.type), detach=False))
        if any(part.requires_grad for part in y):
            y = _Neumann.apply(self, *y, *z)
        return y if layout.is_tuple else y[0]


def JacobianFree() -> Phantom:  # noqa: N802  # reads like the other adjoints
    """The gradient of one evaluation at the solution, as if J were 0: ``Phantom(steps=1)``.

    Source: Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.
    """
    return Phantom(steps=1, damping=1.0)


class _Neumann(torch.autograd.Function):
    """Hands y through; on the way back replaces its cotangent v by the truncated series u."""

    @staticmethod
    def forward(settings: Phantom, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in tensors[: len(tensors) // 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors, tau = ctx.saved_tensors, ctx.settings.damping
        y, z = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        u = term = tuple(tau * v for v in cotangents)
        for _ in range(ctx.settings.steps - 1):
            outputs = [part for part in y if part.requires_grad]
            seeds = [part for part, of in zip(term, y, strict=True) if of.requires_grad]
            products = torch.autograd.grad(
                outputs, z, seeds, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            term = tuple(tau * a + (1.0 - tau) * b for a, b in zip(products, term, strict=True))
            u = tuple(a + b for a, b in zip(u, term, strict=True))
        return None, *u, *[None] * len(z)
