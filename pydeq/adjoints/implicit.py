"""Implicit differentiation: the gradient of a fixed point from the fixed point alone.

At z* = f(z*), a cotangent v of z* gives the cotangent u of f's value that solves u = J^T u + v, J = df/dz at z* (the
implicit function theorem). f is evaluated once at the solution with gradients on, and u replaces v on its way into
that graph: so parameters, context and whatever f closes over all get their gradients, and the memory does not grow with
the solve.

That graph is built at a detached z*, so it cannot carry the terms of a second derivative that come from z* moving with
the parameters. Where a backward pass is itself to be differentiated (create_graph), f is rebuilt at the attached
output, u becomes the fixed point of its own linear equation, differentiated in the same way, and the gradients of what
f was made from are formed on the rebuilt graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pydeq.adjoints.base import Adjoint, Attached, Problem
from pydeq.fixed_point import check_max_steps, check_tolerance, fixed_point
from pydeq.keywords import suggests_keywords
from pydeq.linearization import Linearization, linearize
from pydeq.protocol import Status
from pydeq.solution import Solution
from pydeq.solvers import Anderson, Solver
from pydeq.state import Layout, State, as_tuple
from pydeq.termination import default_rtol


@suggests_keywords
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact implicit differentiation, by solving u = J^T u + v.

    Args:
        solver: Solves the adjoint system; any of the fixed-point solvers.
        rtol: Relative tolerance of the adjoint; by default 1e-4, and 1e-3 for half states.
        max_steps: Vector-Jacobian products of each sample at most, at least 1.

    Samples whose adjoint is NONFINITE get NaN gradients, so that a gradient scaler sees the overflow. Second
    derivatives are exact, too; third ones raise.

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

    def solve(self, problem: Problem) -> Attached:
        solution = fixed_point(problem.fn, problem.z0, *problem.context, **problem.options)
        output, at = attach(self, problem.fn, solution.image, problem.context, solution)
        return Attached(output, solution, at)

    def solve_adjoint(self, fn: Callable[..., Any], v: State, context: Sequence[Tensor]) -> Solution:
        """Solve u = fn(u, *context), the adjoint system of the cotangent ``v``; no gradient."""
        dtype = as_tuple(v)[0].dtype
        return fixed_point(
            fn,
            v,  # the first evaluation of u = 0 would be v itself
            *context,
            solver=self.solver,
            rtol=0.1 * default_rtol(dtype) if self.rtol is None else self.rtol,
            max_steps=self.max_steps,
        )


def attach(
    settings: Implicit, fn: Callable[..., Any], image: State, context: Sequence[Any], solution: Solution | None = None
) -> tuple[State, Linearization]:
    """Evaluate ``fn`` at ``image``, its fixed point, with the gradients of the fixed point.

    Args:
        solution: Gets the adjoint's solution as its ``backward``.
    """
    first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
    at = linearize(fn, image, context)
    layout, y = at.layout, at.y
    sources, hidden = _sources(at, context, first_node)
    if sources or hidden:
        device = layout.device.type
        autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
            torch.is_autocast_cache_enabled(),
        )
        problem = _Problem(settings, layout, fn, tuple(context), sources, hidden, autocast, solution)
        y = _Attach.apply(problem, *y, *at.z, *sources)
    else:  # everything is frozen: no adjoint to solve
        y = tuple(part.detach() for part in y)
    return y if layout.is_tuple else y[0], at


@dataclass(frozen=True)
class _Problem:
    """What backward needs beside the graph.

    Args:
        sources: What fn was made from: tensors of the context and leaves that require grad.
        hidden: Whether fn captures tensors that are neither: results of other computations.
        autocast: Device, dtype, whether on, whether cached.
    """

    settings: Implicit
    layout: Layout
    fn: Callable[..., Any]
    context: tuple[Any, ...]
    sources: tuple[Tensor, ...]
    hidden: bool
    autocast: tuple[str, torch.dtype, bool, bool]
    solution: Solution | None

    def solve(self, at: Linearization, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The solution u of u = J^T u + v; without a graph."""
        solution = self.settings.solve_adjoint(lambda u, *v: _adjoint(at, u, v), v if self.layout.is_tuple else v[0], v)
        if self.solution is not None:
            self.solution.backward = solution
        lost = solution.status == Status.NONFINITE
        return tuple(
            part.masked_fill(lost.view(-1, *[1] * (part.dim() - 1)), torch.nan) for part in as_tuple(solution.image)
        )

    def differentiate(self, out: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
        """The gradients of ``sources`` for the cotangent v of ``out``, with a graph."""
        if self.hidden:
            raise RuntimeError(
                "this gradient cannot be differentiated: the cell captures a tensor that is computed from others, which"
                " puts part of its graph out of reach; pass that tensor to the layer as context (third derivatives are"
                " out of reach in any case)"
            )
        gate = _Gate()
        z = tuple(_Substitute.apply(gate, part) for part in out)
        with self._autocast():
            y = self.fn(z if self.layout.is_tuple else z[0], *self.context)
            y = as_tuple(self.layout.check(y, self.autocast[2], detach=False))
        at = Linearization(self.layout, z, y)
        u = self.solve(at, v)
        start = u if self.layout.is_tuple else u[0]
        u, _ = attach(self.settings, lambda u, *v: _adjoint(at, u, v), start, v)
        outputs = [part for part in y if part.requires_grad]
        seeds = [part for part, of in zip(as_tuple(u), y, strict=True) if of.requires_grad]
        with gate:  # partial derivatives: z stays where it is
            return torch.autograd.grad(outputs, self.sources, seeds, create_graph=True, allow_unused=True)

    def _autocast(self) -> torch.autocast:
        device, dtype, enabled, cached = self.autocast
        return torch.autocast(device, dtype, enabled, cached)


def _adjoint(at: Linearization, u: State, v: Sequence[Tensor]) -> State:
    """J^T u + v."""
    products = at.vjp(u, create_graph=torch.is_grad_enabled())
    sums = tuple(b if a is None else a + b for a, b in zip(products, v, strict=True))
    return sums if at.layout.is_tuple else sums[0]


class _Attach(torch.autograd.Function):
    """Hands y through; on the way back replaces its cotangent v by the adjoint's solution u."""

    @staticmethod
    def forward(problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in tensors[: len(problem.layout.shapes)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        parts = len(inputs[0].layout.shapes)
        ctx.problem = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1 : 1 + 2 * parts], *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        parts, sources = len(cotangents), len(problem.sources)
        if all(v is None for v in cotangents):
            return (None,) * (1 + 2 * parts + sources)
        y, z, out = (ctx.saved_tensors[i * parts : (i + 1) * parts] for i in range(3))
        v = tuple(torch.zeros_like(of) if v is None else v for v, of in zip(cotangents, y, strict=True))
        if torch.is_grad_enabled():
            return (None,) * (1 + 2 * parts) + tuple(problem.differentiate(out, v))
        return (None, *problem.solve(Linearization(problem.layout, z, y), v)) + (None,) * (parts + sources)


class _Gate:
    """Closed inside a with statement: what :class:`_Substitute` hands back then ends there."""

    def __init__(self) -> None:
        self.closed = False

    def __enter__(self) -> None:
        self.closed = True

    def __exit__(self, *exception: object) -> None:
        self.closed = False


class _Substitute(torch.autograd.Function):
    """The identity, with no gradient while its gate is closed."""

    @staticmethod
    def forward(gate: _Gate, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.gate = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.closed else gradients[0]


def _sources(at: Linearization, context: Sequence[Any], first_node: int) -> tuple[tuple[Tensor, ...], bool]:
    """What the graph of y was made from, beside z, and whether it also reaches results of other computations.

    Args:
        first_node: The number of the first node that belongs to the evaluation of y.
    """
    found = {id(x): x for x in tree_leaves(list(context)) if isinstance(x, Tensor) and x.requires_grad}
    known = {x.grad_fn for x in found.values()}
    state = {id(part) for part in at.z}
    found.update({id(x): x for x in at.y if x.requires_grad and x.is_leaf and id(x) not in state})
    hidden = False
    nodes = [part.grad_fn for part in at.y if part.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in state:
                found[id(leaf)] = leaf
        elif node._sequence_nr() >= first_node:  # pyright: ignore
            new = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(new)
            nodes.extend(new)
        elif node not in known:
            hidden = True
    return tuple(found.values()), hidden
