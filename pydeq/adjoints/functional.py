"""Implicit differentiation under ``torch.func`` and forward-mode AD.

There the cell must not capture tensors: state, parameters, buffers and context are explicit inputs. One
``autograd.Function`` is enough, since the derivatives of a fixed point z = f(z, t) are fixed points themselves:

    backward   u = J^T u + v,    then t's cotangent is (df/dt)^T u
    forward    w = J w + (df/dt) dt

The maps of these equations are made from f by ``torch.func.vjp`` and ``jvp``. They are differentiated in the same way,
so derivatives of any order and in any mix of modes work. ``vmap`` folds the mapped dimension into the batch, so that
each mapped sample stops separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore  # recognizes transformed tensors
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pydeq.adjoints.base import Problem
from pydeq.adjoints.convergence_warning import warn_if_unconverged
from pydeq.cell.autocast import Autocast
from pydeq.cell.plain_operations import any_order
from pydeq.cell.torch_compile import interpreted
from pydeq.jacobian.functional import RefuseOnce
from pydeq.ops.constants import Status
from pydeq.solution import Solution
from pydeq.solve.solve import solve
from pydeq.state import State, as_tuple, layout_of

Parts = tuple[Tensor, ...]
# f(parts of z, *inputs) -> parts of f's value
Map = Callable[..., Parts]


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@dataclass(frozen=True, eq=False)
class Equation:
    """The fixed-point problem z = map(z, *inputs).

    Args:
        map: A function that depends only on its arguments.
        parts: Number of tensors in the state.
        options: Keywords of :func:`pydeq.fixed_point`.
        adjoint: Keywords of :func:`pydeq.fixed_point` for the linear equations of the derivatives.
        autocast: The autocast state of forward, for every solve; ``map`` restores it around the evaluation of f.
        probe: Evaluates ``map`` and raises if it captures a differentiated tensor; None for maps of derivatives.
        live: The map for the solve itself, if it writes to buffers, like running statistics, which ``map`` does not
            change. None if both are the same.
        written: Indices of these buffers among the inputs.
        record: Called with the solution.
        record_adjoint: Called with the solution of the backward equation.
    """

    map: Map
    parts: int
    options: dict[str, Any]
    adjoint: dict[str, Any]
    autocast: Autocast
    probe: Callable[..., None] | None = None
    live: Map | None = None
    written: frozenset[int] = frozenset()
    record: Callable[[Solution], None] = field(default=lambda solution: None)
    record_adjoint: Callable[[Solution], None] = field(default=lambda solution: None)

    def solve(self, z0: Parts, inputs: Sequence[Tensor]) -> Parts:
        return FixedPoint.apply(self, *z0, *inputs)  # pyright: ignore[reportReturnType]

    def linear(self, map: Map, record: Callable[[Solution], None]) -> Equation:
        """Make the linear equation of a derivative from its map."""
        return replace(self, map=map, options=self.adjoint, probe=None, live=None, written=frozenset(), record=record)


class FixedPoint(torch.autograd.Function):
    """apply(equation, *z0, *inputs) -> the parts of the fixed point; z0 gets no gradient."""

    @staticmethod
    def forward(equation: Equation, *tensors: Tensor) -> Parts:
        z0, inputs = tensors[: equation.parts], tensors[equation.parts :]
        if equation.probe is not None:
            equation.probe(tuple(part.detach() for part in z0), *(x.detach() for x in inputs))

        map = equation.live or equation.map

        def fn(z: State, *inputs: Tensor) -> Parts:
            # The maps of derivatives differentiate f; torch's LSTM needs gradients on for that.
            with equation.autocast.off(), torch.set_grad_enabled(equation.probe is None):
                return map(as_tuple(z), *inputs)

        with equation.autocast.again():  # autocast limits the precision of the map
            solution = solve(fn, z0, tuple(x.detach() for x in inputs), **equation.options)
        equation.record(solution)
        image = as_tuple(solution.image)
        if equation.probe is not None:
            return tuple(part.clone() for part in image)  # forward mode takes no views
        # This is the solve of a derivative: a gradient scaler must see the overflow.
        lost = solution.status == Status.NONFINITE
        return tuple(part.masked_fill(lost.view(-1, *[1] * (part.dim() - 1)), torch.nan) for part in image)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
        equation, *tensors = inputs
        ctx.equation = equation
        ctx.set_materialize_grads(False)  # a tangent of zeros would mean that a buffer is differentiated
        inputs = tuple(x.clone() if i in equation.written else x for i, x in enumerate(tensors[equation.parts :]))
        ctx.save_for_backward(*output, *inputs)
        ctx.save_for_forward(*output, *inputs)

    @staticmethod
    @interpreted
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        equation: Equation = ctx.equation
        saved = ctx.saved_tensors  # read once: checkpoints allow only one read
        parts = equation.parts
        z, inputs = saved[:parts], saved[parts:]
        if all(part is None for part in cotangents):
            return (None,) * (1 + parts + len(inputs))
        v = tuple(torch.zeros_like(of) if part is None else part for part, of in zip(cotangents, z, strict=True))
        # Leave out buffers that need no gradient, since some operators have no derivative for them.
        smooth = [i for i, x in enumerate(inputs) if x.is_floating_point() and ctx.needs_input_grad[1 + parts + i]]

        if torch.is_grad_enabled():
            gradients = FixedPoint._pull(equation, z, inputs, v, smooth)
        else:  # as in forward
            z, inputs, v = (tuple(x.detach() for x in tensors) for tensors in (z, inputs, v))
            with torch.enable_grad():
                gradients = FixedPoint._pull(equation, z, inputs, v, smooth)
        found = dict(zip(smooth, gradients, strict=True))
        return (None,) * (1 + parts) + tuple(found.get(i) for i in range(len(inputs)))

    @staticmethod
    def _pull(equation: Equation, z: Parts, inputs: Parts, v: Parts, smooth: Sequence[int]) -> Parts:
        """The cotangents of the inputs at ``smooth``."""
        parts = equation.parts

        def adjoint(u: Parts, *given: Tensor) -> Parts:  # given: z, v, inputs
            z, v, inputs = given[:parts], given[parts : 2 * parts], given[2 * parts :]
            (products,) = torch.func.vjp(lambda z: equation.map(z, *inputs), z)[1](u)
            return tuple(a + b for a, b in zip(products, v, strict=True))

        u = equation.linear(adjoint, equation.record_adjoint).solve(v, (*z, *v, *inputs))
        if not smooth:
            return ()

        def of(z: Parts, *moving: Tensor) -> Parts:
            return _at(equation.map, z, inputs, smooth)(*moving)

        # Include z: the cell may differentiate with respect to it, so autograd.grad must find it in the graph. A copy,
        # since z may belong to a transform that has ended, such as a vjp whose product is formed now.
        alive = tuple(part.clone() for part in z)
        return torch.func.vjp(of, alive, *(inputs[i] for i in smooth))[1](u)[1:]

    @staticmethod
    @interpreted
    def jvp(ctx: Any, *tangents: Tensor | None) -> Parts:
        # Torch turns off forward mode in this function, and with it the outer levels of nested forward mode.
        with forward_ad._set_fwd_grad_enabled(transforms_active()):
            return FixedPoint._tangent(ctx, *tangents)

    @staticmethod
    def _tangent(ctx: Any, *tangents: Tensor | None) -> Parts:
        equation: Equation = ctx.equation
        if any(tangent is not None and _functorch.is_legacy_batchedtensor(tangent) for tangent in tangents):
            raise RuntimeError(
                "a DEQ cannot be differentiated by torch.autograd.functional with vectorize=True in forward mode: use"
                " torch.func.jacfwd"
            )
        saved = tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
        z, inputs = saved[: equation.parts], saved[equation.parts :]
        parts = equation.parts
        if transforms_active():
            # The saved output lacks the tangents of outer levels of forward mode: solve again, from the solution.
            z = replace(equation, live=None, record=lambda solution: None).solve(z, inputs)
        given = dict(enumerate(tangents[1 + parts :]))
        smooth = [i for i, tangent in given.items() if tangent is not None]
        along = tuple(tangent for tangent in given.values() if tangent is not None)
        right = tuple(torch.zeros_like(part) for part in z)
        if smooth:
            right = _jvp(_at(equation.map, z, inputs, smooth), tuple(inputs[i] for i in smooth), along)

        def tangent(w: Parts, *given: Tensor) -> Parts:  # given: z, right, inputs
            z, right, inputs = given[:parts], given[parts : 2 * parts], given[2 * parts :]
            products = _jvp(lambda *z: equation.map(z, *inputs), z, w)
            return tuple(a + b for a, b in zip(products, right, strict=True))

        return equation.linear(tangent, lambda solution: None).solve(right, (*z, *right, *inputs))

    @staticmethod
    @interpreted
    def vmap(info: Any, in_dims: tuple[Any, ...], equation: Equation, *tensors: Tensor) -> tuple[Parts, Any]:
        size, parts = info.batch_size, equation.parts
        z0 = tuple(
            part.expand(size, *part.shape) if dim is None else part.movedim(dim, 0)
            for part, dim in zip(tensors[:parts], in_dims[1:], strict=False)
        )
        dims, batch = in_dims[1 + parts :], z0[0].shape[1]

        def folding(map: Map) -> Map:
            mapped = torch.func.vmap(map, in_dims=(0, *dims), randomness=info.randomness)

            def folded(z: Parts, *inputs: Tensor) -> Parts:
                images = mapped(tuple(part.unflatten(0, (size, batch)) for part in z), *inputs)
                return tuple(part.flatten(0, 1) for part in images)

            return folded

        def probe(z: Parts, *inputs: Tensor) -> None:
            assert equation.probe is not None
            if size == 0:  # there is no sample to evaluate
                return
            slices = (x if dim is None else x.select(dim, 0) for x, dim in zip(inputs, dims, strict=True))
            equation.probe(tuple(part[:batch] for part in z), *slices)

        fold = replace(
            equation,
            map=folding(equation.map),
            live=folding(equation.live) if equation.live else None,
            probe=probe if equation.probe else None,
        )
        images = fold.solve(tuple(part.flatten(0, 1) for part in z0), tensors[parts:])
        return tuple(part.unflatten(0, (size, batch)) for part in images), (0,) * parts


def _jvp(of: Callable[..., Parts], x: Parts, along: Parts) -> Parts:
    """The derivative of ``of`` at x along a direction."""
    x, along = (tuple(part.contiguous() for part in parts) for parts in (x, along))  # dual numbers cannot be expanded
    if forward_ad._current_level < 0 or torch._C._are_functorch_transforms_active():
        return torch.func.jvp(of, x, along)[1]
    # Dual numbers do not nest outside of torch.func. (v -> J^T v) is linear: its transpose is J.
    with RefuseOnce("forward mode by dual numbers", "give it a jvp, and use torch.func.jvp"):
        zero = tuple(torch.zeros_like(part) for part in of(*x))
        return torch.func.vjp(lambda v: torch.func.vjp(of, *x)[1](v), zero)[1](along)[0]


def _at(map: Map, z: Parts, inputs: Sequence[Tensor], indices: Sequence[int]) -> Callable[..., Parts]:
    """``map`` as a function of only the inputs at ``indices``."""

    def of(*moving: Tensor) -> Parts:
        every = list(inputs)
        for i, x in zip(indices, moving, strict=True):
            every[i] = x
        return map(z, *every)

    return of


def _asking_no_mode(function: Any) -> Any:
    """Copy one of torch's functions that hand a call over to the mode that is on: the copy can be called inside it."""
    scope = function.__globals__ | dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda x: False)
    return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)


# Backward passes run code of users, hooks and backward functions, in which tensors may be captured, too.
_INSIDE = {
    function: _asking_no_mode(function) for function in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
}


def _is_pass(func: Any) -> bool:
    return any(func is function for function in _INSIDE)


class CellTransforms(Exception):  # noqa: N818  # not an error
    """The cell begins a transform of torch.func."""


class RefuseCaptured(TorchFunctionMode):
    """Raise if the cell uses a tensor from outside that a transform or autograd tracks.

    The cell is evaluated at plain tensors. A cell that computes gradients itself makes tracked tensors. They
    are not captured: leaves that it made, tensors that it computed from these, and tensors of transforms that it began.

    Args:
        levels: Number of torch.func transforms that are active outside of the cell.
        apart: Whether to give the cell's transforms other numbers than the outer ones. torch.func evaluates the cell
            here without the outer transforms, so the cell's own transforms would get the same numbers. Empty ``vmap``
            levels then occupy the outer numbers. Some cells do not work under ``vmap``.

    Raises:
        CellTransforms: If the cell begins a transform and ``apart`` is False.
    """

    def __init__(self, levels: int, apart: bool) -> None:
        super().__init__()
        self._levels, self._apart = levels, apart
        self._leaves: dict[int, Tensor] = {}  # leaves made inside, by id
        self._nodes: set[Any] = set()  # nodes of graphs that end only in these leaves

    def __enter__(self) -> RefuseCaptured:
        self._allowed = _functorch.get_inplace_requires_grad_allowed()
        if self._apart:
            for _ in range(self._levels):
                _functorch._vmap_increment_nesting(1, "same")
            _functorch.set_inplace_requires_grad_allowed(True)  # as without the empty levels
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._apart:
            _functorch.set_inplace_requires_grad_allowed(self._allowed)
            for _ in range(self._levels):
                _functorch._vmap_decrement_nesting()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._levels and not self._apart and torch._C._are_functorch_transforms_active():
            raise CellTransforms
        kwargs = kwargs or {}
        if any(isinstance(x, Tensor) and self._is_captured(x) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(
                "under torch.func or forward-mode AD, the cell captures a tensor that is being differentiated or"
                " mapped, which would get no gradient: pass it to the layer as context, or make the cell a module that"
                " has it as a parameter or buffer (torch.func.functional_call)"
            )
        result = self._inside(_INSIDE[func], args, kwargs) if _is_pass(func) else func(*args, **kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor) and x.requires_grad and x.grad_fn is None:
                self._leaves[id(x)] = x
        return result

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call ``func`` with this mode on, which torch turns off here."""
        super().__enter__()
        try:
            return func(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _is_captured(self, x: Tensor) -> bool:
        while _functorch.is_functorch_wrapped_tensor(x):
            # Wrappers of transforms that have ended do not count; the product of a torch.func.vjp in the cell has them.
            if not _functorch.is_dead_tensor_wrapper(x) and _functorch.maybe_get_level(x) <= self._levels:
                return True
            x = _functorch.get_unwrapped(x)
        if x.requires_grad and not self._made_inside(x):
            return True
        if forward_ad._current_level < 0:
            return False
        with forward_ad._set_fwd_grad_enabled(True):  # tangents are hidden inside a Function
            return forward_ad.unpack_dual(x).tangent is not None

    def _made_inside(self, x: Tensor) -> bool:
        """Whether the graph of x ends in leaves that were made inside."""
        if x.grad_fn is None:
            return id(x) in self._leaves
        nodes = {x.grad_fn} - self._nodes
        seen = set(nodes)
        while nodes:
            node: Any = nodes.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in self._leaves:
                return False
            new = {n for n, _ in node.next_functions if n is not None} - seen - self._nodes
            seen |= new
            nodes |= new
        self._nodes |= seen
        return True


def equation_of(
    problem: Problem, adjoint: dict[str, Any], record: Callable[[Solution], None], settings: Any
) -> tuple[Equation, Parts]:
    """Convert the problem to an equation with explicit inputs; return the equation and the inputs.

    Args:
        adjoint: Keywords of :func:`pydeq.fixed_point` for the equations of the derivatives.
        record: Called with the solution. The adjoint's solution becomes its ``backward``.
        settings: The adjoint, named in a warning.
    """
    layout = layout_of(problem.z0)
    explicit = problem.explicit()
    autocast = Autocast.current(layout.device)

    def live(z: Parts, *inputs: Tensor) -> Parts:
        # Norms and attention have correct derivatives of any order only in plain operations.
        plain = any_order() if torch._C._are_functorch_transforms_active() else nullcontext()
        with autocast.again(), plain:
            y = explicit(z if layout.is_tuple else z[0], inputs)
        return as_tuple(layout.check(y, autocast.enabled, detach=False))

    def evaluate(z: Parts, *inputs: Tensor) -> Parts:
        return live(z, *(x.clone() if i in explicit.learning else x for i, x in enumerate(inputs)))

    levels = _functorch.get_dynamic_layer_stack_depth()

    def probe(z: Parts, *inputs: Tensor) -> None:
        try:
            with RefuseCaptured(levels, apart=False):
                evaluate(z, *inputs)
        except CellTransforms:
            with RefuseCaptured(levels, apart=True):
                evaluate(z, *inputs)

    solutions: list[Solution] = []

    def record_first(solution: Solution) -> None:
        solutions.append(solution)
        record(solution)

    def record_adjoint(solution: Solution) -> None:
        if solutions:
            solutions[0].backward = solution
        warn_if_unconverged(settings, problem.cell.cell, solution)

    options = dict(problem.options)
    equation = Equation(
        evaluate,
        len(layout.shapes),
        options,
        adjoint,
        autocast,
        probe,
        live if explicit.learning else None,
        frozenset(explicit.learning),
        record_first,
        record_adjoint,
    )
    return equation, tuple(explicit.tensors)


def solve_functional(problem: Problem, adjoint: dict[str, Any], settings: Any) -> tuple[State, Solution]:
    """Solve under transforms: the fixed point, with derivatives of any order and mode, and the solution.

    Under vmap the solution is for the folded batch.
    """
    solutions: list[Solution] = []
    equation, inputs = equation_of(problem, adjoint, solutions.append, settings)
    z = equation.solve(as_tuple(problem.z0), inputs)
    return z if isinstance(problem.z0, tuple) else z[0], solutions[0]
