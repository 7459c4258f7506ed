"""Choose products with the Jacobian for a mode that are correct for fn, or raise an error that says what to use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functions  # pyright: ignore

from pydeq.cell.linearization import Linearization, linearize
from pydeq.jacobian.difference import Difference
from pydeq.jacobian.estimator import Estimator
from pydeq.jacobian.functional import FunctionalLinearization
from pydeq.jacobian.graphs import (
    advice,
    is_compiled_graph,
    no_second_derivative,
    nodes_of,
    nodes_to,
    wrong_third_derivative,
)
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.state import State

# Parts of torch's error messages for functions that torch.func cannot transform, and the cause of each.
_UNFIT = {
    "mutate a captured Tensor": "changes buffers, like batch norm in training mode",
    "not differentiable with respect to": "changes buffers, like batch norm in training mode",
    "Tensor.requires_grad_()": "calls torch.autograd.grad or Tensor.requires_grad_ itself",
    "setup_context": "has an autograd.Function without setup_context",
    "saved tensor hooks": "uses torch.utils.checkpoint, or other hooks on saved tensors",
    "NotImplemented": "has an operator whose forward-mode derivative cannot be differentiated",
    "forward AD": "has an operator without a forward-mode derivative",
    "forward mode AD": "has an operator without a forward-mode derivative",
}


def estimate(
    estimator: Estimator,
    fn: Callable[..., Any],
    z: State,
    context: Sequence[Any],
    at: Linearization | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = WHOLE,
) -> Tensor:
    """||J||_F^2 of each sample, [B], in the estimator's mode.

    Args:
        at: fn already linearized at z. fn is evaluated at z again only if no other mode than forward mode is correct.
        reduction: Completes sums over the entries of a state.
    """
    mode, exact = estimator.mode, estimator.method == "exact"
    transformed = torch._C._are_functorch_transforms_active()
    if mode == "difference":
        compiled = at is not None and is_compiled_graph(nodes_of(at.y, at.first_node))
        return _differences(estimator, fn, z, context, at, compiled, generator, reduction)
    if transformed or (mode == "jvp" and estimator.method == "hutchinson" and at is None):
        return _functional(estimator, fn, z, context, generator)
    at = linearize(fn, z, context) if at is None else at
    from_right = mode == "jvp" and not exact
    if not torch.is_grad_enabled():
        return estimator.norm_squared(at, from_right, generator)
    nodes = nodes_of(at.y, at.first_node)
    reason, norm = no_second_derivative(at, nodes), wrong_third_derivative(nodes_to(at.z, nodes))
    if reason is not None and mode == "auto":
        _warn_once(reason)
        return _differences(estimator, fn, z, context, at, is_compiled_graph(nodes), generator, reduction)
    if reason is not None and from_right:
        return _functional(estimator, fn, z, context, generator)
    if reason is not None:
        message = (
            f"mode={mode!r} needs second derivatives of fn, which has none ({reason}): use mode='difference', which"
            f" needs only first derivatives; or, {advice(reason)}"
        )
        norms = estimator.norm_squared(at, from_right, generator)
        return _Refused.apply(message, norms, *at.y)  # pyright: ignore[reportReturnType]
    if norm is None:
        return estimator.norm_squared(at, from_right, generator)
    if from_right:
        return _functional(estimator, fn, z, context, generator)
    return estimator.norm_squared(_DifferentiableOnce(at, norm), from_right, generator)


def _functional(
    estimator: Estimator,
    fn: Callable[..., Any],
    z: State,
    context: Sequence[Any],
    generator: torch.Generator | None,
) -> Tensor:
    """Estimate by torch.func.

    Raises:
        RuntimeError: If torch.func cannot evaluate fn, or fn has a norm with wrong derivatives in torch.
    """
    from_right = estimator.mode == "jvp" and estimator.method != "exact"
    first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
    try:
        norms = estimator.norm_squared(FunctionalLinearization(fn, z, context), from_right, generator)
        if any(node.name() == "torch::autograd::NotImplemented" for node in nodes_of([norms], first_node)):
            raise RuntimeError("a node of the graph is NotImplemented")
        return norms
    except RuntimeError as error:
        reason = next((said for part, said in _UNFIT.items() if part in str(error)), None)
        if reason is None:
            raise
        raise RuntimeError(
            f"mode='jvp', and any mode under torch.func, cannot evaluate an fn that {reason}: use mode='vjp' or"
            f" 'difference' outside of torch.func ({error})"
        ) from error


def _differences(
    estimator: Estimator,
    fn: Callable[..., Any],
    z: State,
    context: Sequence[Any],
    at: Linearization | None,
    compiled: bool,
    generator: torch.Generator | None,
    reduction: Reduction,
) -> Tensor:
    products = Difference(fn, z, context, estimator.order or 1, estimator.step, at, compiled, reduction)
    return estimator.norm_squared(products, True, generator)


class _DifferentiableOnce:
    """The products of a linearization; differentiating their gradients raises an error.

    Args:
        at: The linearization.
        norm: The operator whose third derivative is wrong.
    """

    def __init__(self, at: Linearization, norm: str) -> None:
        self.layout, self._at, self._norm = at.layout, at, norm

    def flat_vjps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        rows = self._at.flat_vjps(v, create_graph)
        return _Once.apply(self._norm, rows) if rows.requires_grad else rows  # pyright: ignore[reportReturnType]

    def flat_jvps(self, v: Tensor, create_graph: bool = False) -> Tensor:
        return self._at.flat_jvps(v, create_graph)


class _Refused(torch.autograd.Function):
    """The identity of the norms; its gradient raises an error.

    The images are inputs, too. If the products left no graph, ``torch.autograd.grad`` would otherwise find no path from
    the penalty to a parameter, and would silently leave the penalty out of the gradient.
    """

    @staticmethod
    def forward(message: str, norms: Tensor, *images: Tensor) -> Tensor:
        return norms.view_as(norms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(ctx.message)


class _Once(torch.autograd.Function):
    """The identity; a second derivative raises an error."""

    @staticmethod
    def forward(norm: str, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.norm = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        if not gradient.requires_grad:
            return None, gradient
        return None, _functions.DelayedError(
            f"a second derivative of this penalty needs a third derivative of {ctx.norm}, which is wrong in torch"
            " (pytorch#175754, #196699, #196700): use mode='difference', or pydeq.jacobian_penalty with mode='jvp'",
            1,
        )(gradient)


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"the Jacobian penalty is made of differences of fn, since fn cannot be differentiated twice: {reason}."
            f" mode='difference' does that without this warning; {advice(reason)}",
            RuntimeWarning,
            stacklevel=2,
        )
