"""Fixed-point iteration by torchdeq's conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pydeq.compat.mode import is_legacy
from pydeq.compat.processes import Damped, Process, Stepped
from pydeq.compat.torchdeq.solver.loop import Convention, Request, Result, solve
from pydeq.compat.torchdeq.solver.stat import SolverStat
from pydeq.solvers import Picard

__all__ = ["fixed_point_iter", "simple_fixed_point_iter"]


def fixed_point_iter(
    func: Callable[..., Any],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Solve x = func(x) by x' = tau func(x) + (1 - tau) x; no gradient.

    Args:
        func: The map, on tensors like x0.
        x0: Where to start, (B, ...); every element of a 0-d or 1-d tensor is a sample.
        max_iter: Calls of func at most.
        tol: Stop at a step in which every sample's residual is below ``tol``.
        stop_mode: "abs" for ||f(x) - x||, "rel" for that over ||f(x)||. In legacy mode these are residuals of the
            damped step.
        indexing: Numbers of calls after which to return the best state so far.
        tau: Damping.
        return_final: Run all steps and return the last state, not the best.
        kwargs: ``legacy=True`` reproduces torchdeq's iterates; the rest is ignored.

    Returns:
        The best x', like x0; the states asked for; a :class:`SolverStat`, its traces of max_iter + 1 columns.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z, states, info = torchdeq.fixed_point_iter(torch.cos, torch.zeros(1, 1), tol=1e-5)
        >>> z
        tensor([[0.7391]])
    """
    legacy = is_legacy(kwargs.get("legacy"))
    max_iter = int(max_iter)

    def start() -> Process:
        if legacy or not 0.0 < tau <= 1.0:
            return Damped(func, x0, tau, scaled=legacy)
        return Stepped(func, x0, Picard(damping=tau), max_iter, tau)

    convention = Convention(max_iter, evaluations=max_iter, first=0, offset=1, state="damped")
    return solve(start, convention, x0, Request(tol, stop_mode, indexing, return_final), legacy)


def simple_fixed_point_iter(
    func: Callable[..., Any],
    x0: Any,
    max_iter: int = 50,
    tau: float = 1.0,
    indexing: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Any, list[Any], SolverStat]:
    """Iterate x' = func(x, tau=tau), where func damps itself. Residuals are measured only at the end; gradients flow.

    Args:
        func: The map; it is called with the keyword ``tau``.
        x0: Where to start, a tensor or a sequence of tensors.
        max_iter: Calls of func.
        tau: Passed on to func.
        indexing: Numbers of calls after which to return the state.
        kwargs: Ignored.

    Returns:
        The last state; the states asked for; the :class:`SolverStat` of the last step.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> damped = lambda z, tau: tau * torch.cos(z) + (1 - tau) * z
        >>> z, states, info = torchdeq.simple_fixed_point_iter(damped, torch.zeros(1, 1), tau=0.5)
        >>> z
        tensor([[0.7391]])
    """
    states = []
    x = fx = x0
    for k in range(int(max_iter)):
        x = fx
        fx = func(x, tau=tau)
        if indexing and k + 1 in indexing:
            states.append(fx)
    return fx, states, SolverStat.from_final_step(x, fx, max_iter)
