"""Anderson mixing by torchdeq's conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pydeq.compat.mode import is_legacy
from pydeq.compat.processes import Process, anderson_process
from pydeq.compat.torchdeq.solver.loop import Convention, Request, Result, solve

__all__ = ["anderson_solver"]


def anderson_solver(
    func: Callable[..., Any],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    m: int = 6,
    lam: float = 1e-4,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Solve x = func(x) by Anderson mixing; no gradient.

    Args:
        func: The map, on tensors like x0.
        x0: Where to start, (B, ...); every element of a 0-d or 1-d tensor is a sample.
        max_iter: Maximum number of calls of func.
        tol: Stop at a step in which every sample's residual is below ``tol``.
        stop_mode: "abs" for ||f(x) - x||, "rel" for that over ||f(x)||.
        indexing: Numbers of calls after which to return the best state so far.
        m: Columns mixed.
        lam: Ridge. Relative here: lam / 100 of the Gram matrix's diagonal; absolute in legacy mode.
        tau: Damping. Outside of (0, 1] the original's steps are taken.
        return_final: Run all steps and return the last state, not the best.
        kwargs: ``legacy=True`` reproduces torchdeq's iterates; the rest is ignored.

    Returns:
        The best f(x), like x0; the states asked for; a :class:`SolverStat`, its traces of max_iter - 1 columns.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> z, states, info = torchdeq.anderson_solver(torch.cos, torch.zeros(1, 1), tol=1e-5)
        >>> z
        tensor([[0.7391]])
    """
    legacy = is_legacy(kwargs.get("legacy"))
    max_iter = int(max_iter)

    def start() -> Process:
        return anderson_process(func, x0, m, lam, tau, max_iter, legacy)

    convention = Convention(max_iter, evaluations=max_iter, first=2, offset=1, state="f")
    return solve(start, convention, x0, Request(tol, stop_mode, indexing, return_final), legacy)
