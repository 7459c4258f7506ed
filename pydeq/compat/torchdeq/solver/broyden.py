"""Broyden's method by torchdeq's conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pydeq.compat.mode import is_legacy
from pydeq.compat.processes import Process, broyden_process
from pydeq.compat.torchdeq.solver.loop import Convention, Request, Result, solve

__all__ = ["broyden_solver"]


def broyden_solver(
    func: Callable[..., Any],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    LBFGS_thres: int | None = None,
    ls: bool = False,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Solve x = func(x) by Broyden's good method; no gradient.

    Args:
        func: The map, on tensors like x0.
        x0: Where to start, (B, ...); every element of a 0-d or 1-d tensor is a sample.
        max_iter: Maximum number of steps. Each calls func once, and there is one call before; with a line search there
            are more.
        tol: Stop at a step in which every sample's residual is below ``tol``.
        stop_mode: "abs" for ||f(x) - x||, "rel" for that over ||f(x)||.
        indexing: Numbers of calls after which to return the best state so far; max_iter means the end.
        LBFGS_thres: Pairs kept; None: all. A full memory restarts from the newest pair; in legacy mode, and with a
            line search, it overwrites the oldest one.
        ls: Line search by Armijo's rule, of each sample; in legacy mode of the whole batch.
        return_final: Run all steps and return the last state, not the best.
        kwargs: ``legacy=True`` reproduces torchdeq's iterates; the rest is ignored.

    Returns:
        The best x, like x0; the states asked for; a :class:`SolverStat`, its traces of max_iter + 1 columns.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z, states, info = torchdeq.broyden_solver(torch.cos, torch.zeros(1, 1), tol=1e-5)
        >>> z
        tensor([[0.7391]])
    """
    legacy = is_legacy(kwargs.get("legacy"))
    max_iter = int(max_iter)
    memory = max(1, max_iter) if LBFGS_thres is None else LBFGS_thres

    def start() -> Process:
        return broyden_process(func, x0, memory, ls, max_iter + 1, legacy)

    convention = Convention(max_iter, evaluations=max_iter + 1, first=1, offset=0, state="z", stalls=True)
    return solve(start, convention, x0, Request(tol, stop_mode, indexing, return_final), legacy)
