"""Gradients of states: implicit, or by phantom steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pydeq.adjoints import Implicit
from pydeq.adjoints.implicit import evaluate_at_fixed_point
from pydeq.arguments import callable_name
from pydeq.compat.mode import is_legacy, legacy
from pydeq.compat.processes import flatten
from pydeq.compat.torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter
from pydeq.compat.warning import warn_of_backward
from pydeq.ops.constants import Counter, Scalar, Status
from pydeq.solution import Solution
from pydeq.state import State

__all__ = ["backward_factory"]

T = TypeVar("T")

# Backward solves end well below this fraction of the gradient, unless their tolerance does not suit the gradient's
# size.
_COARSE = 0.1
_OWN = (anderson_solver, broyden_solver, fixed_point_iter)


def make_pair(target: Sequence[Any], source: Sequence[T]) -> Sequence[T]:
    """Give ``source`` an entry for each entry of ``target``; a single entry is repeated.

    Raises:
        ValueError: If the lengths do not allow it.
    """
    if len(target) == len(source):
        return source
    if len(source) == 1:
        return [source[0]] * len(target)
    raise ValueError(f"grad must have one entry, or one for each of {len(target)} states, got {len(source)}")


@dataclass(frozen=True, eq=False)  # its options have no hash
class SolverImplicit(Implicit):
    """Implicit differentiation that solves the adjoint system by a solver with torchdeq's signature.

    Args:
        b_solver: Called as b_solver(func, x0, **b_solver_kwargs).
        b_solver_kwargs: Its options.
        writer: Called with the statistics of each solve.
        reproduce: Whether to reproduce the original's iterates.
    """

    b_solver: Callable[..., Any] = fixed_point_iter
    b_solver_kwargs: Mapping[str, Any] = field(default_factory=dict)
    writer: Callable[[Any], Any] | None = None
    reproduce: bool = False

    def solve_adjoint(
        self, fn: Callable[..., Any], start: State, v: Sequence[Tensor], options: dict[str, Any]
    ) -> Solution:
        """Solve u = fn(u, *v) by ``b_solver``, with its own options instead of pydeq's."""
        assert isinstance(start, Tensor)
        calls = 0

        def func(u: Tensor, tau: float = 1.0) -> Tensor:
            nonlocal calls
            calls += 1
            image = fn(u, *v)
            return image if tau == 1.0 else tau * image + (1 - tau) * u

        if self.b_solver not in _OWN or self.reproduce:  # other solvers may rely on starting from 0
            start = torch.zeros_like(start)
        with legacy(self.reproduce):  # backward may run in a thread of its own
            u, _, info = self.b_solver(func, start, **self.b_solver_kwargs)
        if self.writer:
            self.writer(info)
        u = u.detach()
        lowest, relative = _lowest(info, "abs_lowest", u), _lowest(info, "rel_lowest", u)
        finite = flatten(u).isfinite().all(1) & lowest.isfinite()
        self._watch(u, lowest, relative, finite)
        scalars = lowest.new_zeros(len(u), len(Scalar))
        scalars[:, Scalar.BEST], scalars[:, Scalar.BEST_NORM] = lowest, flatten(u).double().norm(dim=1)
        counters = torch.zeros(len(u), len(Counter), dtype=torch.int32, device=u.device)
        counters[:, Counter.STATUS] = torch.where(finite, int(Status.CONVERGED), int(Status.NONFINITE)).int()
        return Solution(u, u, calls, scalars, counters, None)

    def _watch(self, u: Tensor, lowest: Tensor, relative: Tensor, finite: Tensor) -> None:
        """Warn once about samples that met neither the tolerance of ``b_solver`` nor the tolerance of
        :class:`Implicit`.

        The tolerance of :class:`Implicit` is relative. If rounding errors keep a solve from a small absolute tolerance,
        gradients are still as exact as possible. There is also a warning about an absolute tolerance that is large
        compared with the gradients: if the loss is a mean over many terms, it is met at once. Samples that are not
        finite get NaN gradients and no warning.
        """
        tol = self.b_solver_kwargs.get("tol", 0.0)
        missed = (relative if self.b_solver_kwargs.get("stop_mode") == "rel" else lowest) >= tol
        lost = missed & (relative > self.options(u.dtype)["rtol"]) & finite
        name = callable_name(self.b_solver)
        if bool(lost.any()):
            warn_of_backward(
                name,
                f"{int(lost.sum())} of {len(u)} samples unconverged, relative residual up to"
                f" {relative[lost].max().item():.2g}",
                "increase b_max_iter or b_tol, choose another b_solver",
            )
            return
        share = (lowest[finite].norm() / flatten(u)[finite].double().norm()).item()
        if share > _COARSE:
            warn_of_backward(
                name,
                f"a residual of {share:.2g} times the gradient at the tolerance b_tol={tol:g}",
                "lower b_tol, or set b_stop_mode='rel'",
            )


def _lowest(info: Any, name: str, u: Tensor) -> Tensor:
    """The smallest residual of each sample, (B,); 0 if the solver reports -1 or nothing."""
    found = info.get(name) if isinstance(info, Mapping) else None
    if not isinstance(found, Tensor):
        return torch.zeros(len(u), dtype=torch.float64, device=u.device)
    return found.detach().to(u.device, torch.float64).reshape(-1).expand(len(u)).clamp(min=0)


@dataclass(frozen=True)
class ImplicitGradient:
    """One evaluation at the state, with the gradients of the fixed point."""

    b_solver: Callable[..., Any]
    b_solver_kwargs: Mapping[str, Any]

    def __call__(self, trainer: Any, func: Callable[..., Any], z_pred: Any, writer: Any = None, **kwargs: Any) -> list:
        if not torch.is_grad_enabled():
            return [func(z_pred)]
        settings = SolverImplicit(
            b_solver=self.b_solver, b_solver_kwargs=self.b_solver_kwargs, writer=writer, reproduce=is_legacy()
        )
        z = z_pred.detach()
        if z.dim():  # a copy, since func may modify its argument
            return [evaluate_at_fixed_point(settings, lambda z: func(z.clone()), z, ())[0]]
        y, _ = evaluate_at_fixed_point(settings, lambda z: func(z[0].clone())[None], z[None], ())
        assert isinstance(y, Tensor)
        return [y[0]]


@dataclass(frozen=True)
class PhantomGradient:
    """A few damped evaluations from the state, with their graph.

    Args:
        steps: Number of evaluations.
        tau: Damping.
        sup_gap: If above 0, a state is returned after each multiple of it.
        sup_loc: Otherwise, the states after these steps are returned, and the last one.
    """

    steps: int
    tau: float
    sup_gap: int
    sup_loc: tuple[int, ...]

    def __call__(self, trainer: Any, func: Callable[..., Any], z_pred: Any, **kwargs: Any) -> list:
        states = []
        for k in range(1, self.steps + 1):
            z_pred = func(z_pred, tau=self.tau)
            if k % self.sup_gap == 0 if self.sup_gap > 0 else k in self.sup_loc:
                states.append(z_pred)
        if self.sup_gap <= 0 or not states:
            states.append(z_pred)
        return states


def backward_factory(
    grad_type: str | int = "ift",
    hook_ift: bool = False,
    b_solver: Callable[..., Any] | None = None,
    b_solver_kwargs: Mapping[str, Any] | None = None,
    sup_gap: int = -1,
    sup_loc: Sequence[int] | None = None,
    tau: float = 1.0,
    **grad_factory_kwargs: Any,
) -> Callable[..., list]:
    """Make a function (trainer, func, z, writer=None) -> list of states with gradients.

    Args:
        grad_type: "ift" for implicit differentiation, or the steps of a phantom gradient.
        hook_ift: Has no effect: implicit differentiation needs no hook here.
        b_solver: Solver of the adjoint; fixed-point iteration by default.
        b_solver_kwargs: Its options.
        sup_gap, sup_loc: Which states of the phantom steps to return.
        tau: Damping of the phantom steps.
        grad_factory_kwargs: Ignored.

    Raises:
        AssertionError: If grad_type is neither.
    """
    if grad_type == "ift":
        return ImplicitGradient(b_solver or fixed_point_iter, dict(b_solver_kwargs or {}))
    if not isinstance(grad_type, int) or grad_type < 1:
        raise AssertionError(f"grad must be at least 1, got {grad_type!r}")
    return PhantomGradient(grad_type, tau, sup_gap, tuple(sup_loc or ()))
