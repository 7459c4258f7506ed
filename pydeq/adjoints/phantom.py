"""Phantom gradients: a few steps of the adjoint iteration instead of its solution.

Cheap and biased. With damping tau and k steps, the cotangent v of the fixed point becomes

    u = tau sum_{i<k} (tau J^T + (1 - tau) I)^i v

For tau = 1 these are the first k terms of the Neumann series of (I - J^T)^-1 v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pydeq.adjoints.base import Adjoint, AdjointResult, Problem
from pydeq.adjoints.functional import solve_functional, transforms_active
from pydeq.adjoints.graph_inputs import graph_inputs
from pydeq.adjoints.handover import hand_over, take_over
from pydeq.arguments import check_max_steps, set_fields, suggests_keywords
from pydeq.cell.linearization import Linearization, linearize
from pydeq.cell.torch_compile import interpreted
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

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, adjoint=pydeq.Phantom(steps=3), rtol=1e-5)
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([0.7801]),)
    """

    transforms: ClassVar[bool] = True

    steps: int = 1
    damping: float = 1.0
    form: Literal["unroll", "neumann"] = "unroll"

    def __post_init__(self) -> None:
        set_fields(self, steps=check_max_steps("steps", self.steps), damping=check_damping(self.damping))
        if self.form not in ("unroll", "neumann"):
            raise ValueError(f"form must be 'unroll' or 'neumann', got {self.form!r}")

    def solve(self, problem: Problem) -> AdjointResult:
        if transforms_active():
            if self.form == "neumann":
                raise RuntimeError('Phantom(form="neumann") does not work under torch.func: use form="unroll"')
            z, solution = self._solve_transformed(problem)
        else:
            solution = problem.solve()
            if self.form == "neumann":
                return self._neumann(problem, solution)
            z = solution.image
        layout, fn = layout_of(problem.z0), problem.cell.sharing_weights()
        first = None
        for _ in range(self.steps):
            y = layout.check(fn(z, *problem.context), torch.is_autocast_enabled(layout.device.type), detach=False)
            first = y if first is None else first
            z = y if self.damping == 1.0 else self._blend(z, y, layout)
        return AdjointResult(z, solution, evaluated=first)

    def _solve_transformed(self, problem: Problem) -> tuple[State, Solution]:
        if not torch._C._are_functorch_transforms_active():
            # Forward-mode AD: the steps after the solve have the tangents, also of captured tensors.
            with forward_ad._set_fwd_grad_enabled(False):
                solution = problem.solve()
            return solution.image, solution
        z, solution = solve_functional(problem, problem.options, self)
        return tuple(part.detach() for part in z) if isinstance(z, tuple) else z.detach(), solution

    def _blend(self, z: State, y: State, layout: Layout) -> State:
        parts = tuple(a + self.damping * (b - a) for a, b in zip(as_tuple(z), as_tuple(y), strict=True))
        return parts if layout.is_tuple else parts[0]

    def _neumann(self, problem: Problem, solution: Solution) -> AdjointResult:
        explicit = problem.explicit()
        first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
        at = linearize(problem.cell.call, solution.image, problem.context)
        y = at.y
        if any(graph_inputs(at, explicit, first_node)):
            y = _Neumann.apply(self, at.layout, hand_over(at), *at.z, *y)
        else:  # nothing requires grad
            y = tuple(part.detach() for part in y)
        return AdjointResult(y if at.layout.is_tuple else y[0], solution, at)


def JacobianFree() -> Phantom:  # noqa: N802  # reads like the other adjoints
    """The gradient of one evaluation at the solution, as if J were 0: ``Phantom(steps=1)``.

    Source: Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, adjoint=pydeq.JacobianFree())
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([1.]),)
    """
    return Phantom(steps=1, damping=1.0)


class _Neumann(torch.autograd.Function):
    """The identity of y whose backward replaces the cotangent v by the truncated series u."""

    @staticmethod
    def forward(settings: Phantom, layout: Layout, courier: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in tensors[len(tensors) // 2 :])  # copies: users may modify them

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings, ctx.layout, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @interpreted
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tau, parts = ctx.settings.damping, len(cotangents)
        courier, *tensors = ctx.saved_tensors
        at = take_over(courier) or Linearization(ctx.layout, tuple(tensors[:parts]), tuple(tensors[parts:]))
        u = term = tuple(tau * v for v in cotangents)
        for _ in range(ctx.settings.steps - 1):
            term = tuple(
                (1.0 - tau) * b if a is None else tau * a + (1.0 - tau) * b
                for a, b in zip(at.vjp(term), term, strict=True)
            )
            u = tuple(a + b for a, b in zip(u, term, strict=True))
        return (None,) * (3 + parts) + u
