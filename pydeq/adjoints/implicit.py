"""Implicit differentiation: the gradient of a fixed point from only the fixed point, without the iterations.

Let z* = f(z*), and J = df/dz at z*. By the implicit function theorem, a cotangent v of z* becomes the cotangent u of
f's value that solves u = J^T u + v. f is evaluated once at the solution with gradients on, and in backward u replaces v
at the output of that graph. So parameters, context and captured tensors get their gradients, and the memory does not
grow with the solve.

The graph is built at a detached z*, so it lacks the terms of a second derivative that come from z* moving with the
parameters. If a backward pass is differentiated itself (create_graph), f is evaluated again at the attached output. u
is then the fixed point of its own linear equation, which is differentiated in the same way, to any order. The gradients
of the inputs of f are formed on the new graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pydeq.adjoints.base import Adjoint, AdjointResult, Problem, refuse_vectorized
from pydeq.adjoints.change_check import ChangeCheck
from pydeq.adjoints.convergence_warning import warn_if_unconverged
from pydeq.adjoints.explicit import Explicit
from pydeq.adjoints.functional import solve_functional, transforms_active
from pydeq.adjoints.graph_inputs import edge_of, graph_ends, graph_inputs
from pydeq.adjoints.handover import hand_over, take_over
from pydeq.adjoints.postponed_hooks import hooks_postponed
from pydeq.arguments import check_max_steps, check_tolerance, set_fields, shown, suggests_keywords
from pydeq.cell.autocast import Autocast
from pydeq.cell.linearization import Linearization, linearize
from pydeq.cell.plain_operations import composed_norms
from pydeq.cell.torch_compile import interpreted
from pydeq.jacobian.graphs import nodes_of, wrong_third_derivative
from pydeq.ops.constants import Status
from pydeq.ops.termination import default_rtol
from pydeq.solution import Solution
from pydeq.solve.solve import solve
from pydeq.solvers import Anderson, Solver
from pydeq.solvers.base import NewtonSolver
from pydeq.state import Layout, State, as_tuple, layout_of


@suggests_keywords
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact implicit differentiation, by solving u = J^T u + v.

    Args:
        solver: Solves the adjoint system; any of the fixed-point solvers.
        rtol: Relative tolerance of the adjoint solve; by default 1e-4, and 5e-3 for half states or under half autocast,
            which reach about 2e-3.
        max_steps: Maximum number of vector-Jacobian products of each sample, at least 1.
        warm_start: Start each adjoint solve from the previous adjoint's solution if shapes agree. This helps if a layer
            gets the same samples again in the same order; otherwise it costs one more product.

    A backward solve that leaves samples unconverged warns once. Samples whose adjoint is NONFINITE get NaN gradients,
    so that a gradient scaler sees the overflow. Derivatives of any order are exact, under torch.func in any mode. Norms
    with wrong third derivatives in torch are replaced by plain operations (docs/penalty.md).

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019, theorem 1.

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, adjoint=pydeq.Implicit(rtol=1e-5), rtol=1e-5)
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([0.5975]),)
    """

    transforms: ClassVar[bool] = True

    solver: Solver = field(default_factory=Anderson)
    rtol: float | None = None
    max_steps: int = 50
    warm_start: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(self.solver)}")
        if isinstance(self.solver, NewtonSolver):
            name = type(self.solver).__name__
            raise TypeError(f"solver must not be {name}, since the adjoint system is linear: use pydeq.GMRES()")
        rtol = None if self.rtol is None else check_tolerance("rtol", self.rtol)
        set_fields(self, rtol=rtol, max_steps=check_max_steps("max_steps", self.max_steps))

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Make the keywords of :func:`pydeq.fixed_point` for an adjoint that is computed in this dtype."""
        finer = 0.5 if torch.finfo(dtype).bits < 32 else 0.1
        rtol = finer * default_rtol(dtype) if self.rtol is None else self.rtol
        return {"solver": self.solver, "rtol": rtol, "max_steps": self.max_steps}

    def solve(self, problem: Problem) -> AdjointResult:
        if transforms_active():
            layout = layout_of(problem.z0)
            dtype = Autocast.current(layout.device).coarsest(layout.dtype)
            return AdjointResult(*solve_functional(problem, self.options(dtype) | problem.shared, self))
        solution = problem.solve()
        cell = problem.cell
        output, at = evaluate_at_fixed_point(
            self,
            cell.call,
            solution.image,
            problem.context,
            cell.modules,
            solution,
            problem.memory,
            problem.shared,
            cell.cell,
        )
        return AdjointResult(output, solution, at)

    def solve_adjoint(
        self, fn: Callable[..., Any], start: State, v: Sequence[Tensor], options: dict[str, Any]
    ) -> Solution:
        """Solve the adjoint system u = fn(u, *v) from ``start``; no gradient."""
        return solve(fn, start, v, **options)


def evaluate_at_fixed_point(
    settings: Implicit,
    fn: Callable[..., Any],
    image: State,
    context: Sequence[Any],
    modules: Sequence[nn.Module] = (),
    solution: Solution | None = None,
    memory: dict[str, Any] | None = None,
    shared: dict[str, Any] | None = None,
    cell: Callable[..., Any] | None = None,
) -> tuple[State, Linearization]:
    """Evaluate ``fn`` at ``image``, its fixed point, with the gradients of the fixed point.

    Args:
        modules: The modules whose tensors fn uses.
        solution: Gets the adjoint's solution as its ``backward``.
        memory: Keeps the last cotangent for a warm start.
        shared: Further keywords of :func:`pydeq.fixed_point` for adjoint solves.
        cell: The user's function in fn, named in a warning; fn itself by default.
    """
    explicit = Explicit(fn, context, modules)
    before = ChangeCheck(explicit.lasting, modules)
    first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
    at = linearize(fn, image, context)
    layout, y = at.layout, at.y
    sources, hidden = graph_inputs(at, explicit, first_node)
    if sources or hidden:
        # A second derivative needs the tensors that fn reads, except tensors that fn itself modifies.
        unchanged, autocast = before.with_tensors(sources), Autocast.current(layout.device)
        y = _with_adjoint_solve(
            _AdjointSystem(
                settings,
                layout,
                explicit,
                sources,
                hidden,
                autocast,
                shared or {},
                unchanged,
                fn if cell is None else cell,
                solution,
                memory,
            ),
            at,
        )
    else:  # nothing requires grad: there is no adjoint to solve
        y = tuple(part.detach() for part in y)
    return y if layout.is_tuple else y[0], at


def _with_adjoint_solve(problem: _AdjointSystem, at: Linearization) -> tuple[Tensor, ...]:
    """The parts of ``at.y``, the image of a fixed point, with the gradients of the fixed point."""
    y = _AdjointSolve.apply(problem, hand_over(at), *at.y, *at.z, *problem.sources)
    return tuple(part.clone() for part in y)  # users may modify these in place


@dataclass(frozen=True)
class _AdjointSystem:
    """The data that backward needs, in addition to the graph, to solve u = J^T u + v.

    Args:
        explicit: f as a function of all tensors that it is known to depend on.
        sources: The inputs of the graph that require grad: tensors that ``explicit`` knows, and captured leaves.
        hidden: Whether f captures results of other computations.
        autocast: The autocast state of forward.
        shared: Further keywords of :func:`pydeq.fixed_point` for adjoint solves.
        unchanged: Raises if tensors or modules have changed when f is evaluated again.
        cell: The user's f, named in a warning.
        solution: Gets the adjoint's solution as its ``backward``.
        memory: Keeps the last cotangent for a warm start.
        norm: The name of a norm in f that has a wrong third derivative in torch; set in systems of a second derivative.
    """

    settings: Implicit
    layout: Layout
    explicit: Explicit
    sources: tuple[Tensor, ...]
    hidden: bool
    autocast: Autocast
    shared: dict[str, Any]
    unchanged: ChangeCheck
    cell: Callable[..., Any]
    solution: Solution | None = None
    memory: dict[str, Any] | None = None
    norm: str | None = None

    def solve(self, at: Linearization, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The solution u of u = J^T u + v; without a graph."""
        settings = self.settings
        refuse_vectorized(v, settings)
        start = self._start(v)
        with self.autocast.again():  # autocast limits the precision of J
            options = settings.options(self.autocast.coarsest(self.layout.dtype)) | self.shared
            solution = settings.solve_adjoint(
                self._adjoint(at), start if self.layout.is_tuple else start[0], v, options
            )
        if self.solution is not None:
            self.solution.backward = solution
        warn_if_unconverged(settings, self.cell, solution)
        if settings.warm_start and self.memory is not None:
            self.memory["cotangent"] = as_tuple(solution.image)
        if solution.all_known_to_converge:
            return as_tuple(solution.image)
        lost = solution.status == Status.NONFINITE
        return tuple(
            part.masked_fill(lost.view(-1, *[1] * (part.dim() - 1)), torch.nan) for part in as_tuple(solution.image)
        )

    def _start(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The initial cotangent of the adjoint solve."""
        last = (self.memory or {}).get("cotangent", ())
        if self.settings.warm_start and [_kind(part) for part in last] == [_kind(part) for part in v]:
            # Samples that were lost start from v.
            return tuple(torch.where(part.isfinite(), part, of) for part, of in zip(last, v, strict=True))
        return v  # the first evaluation, at u = 0, would give this

    def differentiate(self, out: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
        """The gradients of ``sources`` for the cotangent v of ``out``, with a graph."""
        if self.hidden:
            raise RuntimeError(
                "this gradient cannot be differentiated (create_graph): the cell captures a tensor that is computed"
                " from others, which puts part of its graph out of reach; pass that tensor to the layer as context, or"
                " differentiate by torch.func (grad, hessian, jvp), with all that requires grad as context or parameter"
            )
        if self.norm is not None:
            raise RuntimeError(
                f"a third derivative of {self.norm} is needed, which torch has wrong (pytorch#175754, #196699,"
                " #196700), and the cell calls it where pydeq cannot put plain operations in its place, like"
                " TorchScript: call it outside of TorchScript, or write it in plain operations"
            )
        self.unchanged.check("f is to be evaluated again for a second derivative")
        gate, tensors = _Gate(), self.explicit.tensors
        z = tuple(_Substitute.apply(gate, part) for part in out)
        # Partial derivatives: gradients stop at the substitutes. They do not reach z or the graphs of the tensors.
        substitutes = {id(x): _Substitute.apply(gate, x) for x in tensors if x.requires_grad}
        inputs = [substitutes.get(id(x), x) for x in tensors]
        first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
        at = Linearization(self.layout, z, self._evaluate(z, inputs))
        leaves, edges_out = graph_ends(at, first_node)
        if edges_out & {edge_of(x) for x in tensors if x.grad_fn is not None}:
            raise RuntimeError(
                "this gradient cannot be differentiated (create_graph): the cell captures a computed tensor that it is"
                " also given as context: let it use the one that it is given"
            )
        norm = wrong_third_derivative(nodes_of(at.y, first_node))
        u = self._differentiable_adjoint(at, self.solve(at, v), v, inputs, norm)
        outputs = [part for part in at.y if part.requires_grad]
        seeds = [part for part, of in zip(u, at.y, strict=True) if of.requires_grad]
        captured = {id(x) for x in leaves}  # some may also be known: parameters that fn has in a list, too
        targets = [substitutes.get(id(x), x) for x in self.sources]
        also = [x for x in self.sources if id(x) in substitutes and id(x) in captured]
        with gate, hooks_postponed([*targets, *also]):
            found = torch.autograd.grad(outputs, [*targets, *also], seeds, create_graph=True, allow_unused=True)
        gradients = dict(zip(map(id, self.sources), found, strict=False))
        for x, more in zip(also, found[len(targets) :], strict=True):
            first = gradients[id(x)]
            gradients[id(x)] = more if first is None else first if more is None else first + more
        return [gradients[id(x)] for x in self.sources]

    def _evaluate(self, z: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate f as in forward, but norms in plain operations, which have correct higher derivatives."""
        with self.autocast.again(), composed_norms():
            y = self.explicit(z if self.layout.is_tuple else z[0], tensors)
            return as_tuple(self.layout.check(y, self.autocast.enabled, detach=False))

    def _differentiable_adjoint(
        self,
        at: Linearization,
        u: tuple[Tensor, ...],
        v: tuple[Tensor, ...],
        inputs: Sequence[Tensor],
        norm: str | None,
    ) -> tuple[Tensor, ...]:
        """The adjoint's solution u, with the gradients of a fixed point u of the map u, v, z, inputs -> J^T u + v.

        Its first derivative uses the graph of ``at``; further derivatives evaluate f again.
        """
        parts = len(v)

        def again(u: State, *given: Any) -> State:
            v, z, inputs = given[:parts], given[parts : 2 * parts], given[2 * parts :]
            with torch.enable_grad():
                return self._adjoint(Linearization(self.layout, z, self._evaluate(z, inputs)))(u, *v)

        explicit = Explicit(again, (*v, *at.z, *inputs))
        followed = {id(x): x for x in explicit.tensors if x.requires_grad}
        known = {id(x) for x in self.explicit.tensors}
        followed.update({id(x): x for x in self.sources if id(x) not in known})
        problem = replace(
            self,
            explicit=explicit,
            sources=tuple(followed.values()),
            hidden=False,
            solution=None,
            memory=None,
            norm=norm,
        )
        with self.autocast.again():
            return _with_adjoint_solve(problem, linearize(self._adjoint(at), u if self.layout.is_tuple else u[0], v))

    def _adjoint(self, at: Linearization) -> Callable[..., State]:
        """The map u, v -> J^T u + v."""

        def adjoint(u: State, *v: Tensor) -> State:
            with self.autocast.off():
                products = at.vjp(u, create_graph=torch.is_grad_enabled())
                if at.layout.is_tuple:
                    return tuple(b if a is None else a + b for a, b in zip(products, v, strict=True))
                return v[0] if products[0] is None else products[0] + v[0]

        return adjoint


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


class _AdjointSolve(torch.autograd.Function):
    """The identity of y whose backward replaces the cotangent v by the adjoint's solution u."""

    @staticmethod
    def forward(ctx: Any, problem: _AdjointSystem, courier: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # It has no setup_context, which costs as much as a small evaluation: it is never called under torch.func.
        parts = len(problem.layout.shapes)
        output = tuple(y.view_as(y) for y in tensors[:parts])
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(courier, *tensors[: 2 * parts], *output)
        return output

    @staticmethod
    @interpreted
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: _AdjointSystem = ctx.problem
        parts, sources = len(cotangents), len(problem.sources)
        if all(v is None for v in cotangents):
            return (None,) * (2 + 2 * parts + sources)
        courier, *saved = ctx.saved_tensors  # once: checkpoints allow no more
        y, z, out = (tuple(saved[i * parts : (i + 1) * parts]) for i in range(3))
        v = tuple(torch.zeros_like(of) if v is None else v for v, of in zip(cotangents, y, strict=True))
        if torch.is_grad_enabled():
            return (None,) * (2 + 2 * parts) + tuple(problem.differentiate(out, v))
        at = take_over(courier) or Linearization(problem.layout, z, y)
        return (None, None, *problem.solve(at, v)) + (None,) * (parts + sources)


class _Gate:
    """A context manager in which the gradients of a :class:`_Substitute` end there."""

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
        ctx.set_materialize_grads(False)  # a closed gate gives no gradient instead of zeros

    @staticmethod
    @interpreted
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.closed else gradients[0]
