"""Solvers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydeq.compat.torchdeq.solver.anderson import anderson_solver
from pydeq.compat.torchdeq.solver.broyden import broyden_solver
from pydeq.compat.torchdeq.solver.fp_iter import fixed_point_iter, simple_fixed_point_iter
from pydeq.compat.torchdeq.solver.stat import SolverStat
from pydeq.compat.torchdeq.solver.utils import solver_stat_from_final_step

__all__ = [
    "SolverStat",
    "anderson_solver",
    "broyden_solver",
    "fixed_point_iter",
    "get_solver",
    "register_solver",
    "simple_fixed_point_iter",
    "solver_stat_from_final_step",
]

_solvers: dict[str, Callable[..., Any]] = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}


def get_solver(key: str) -> Callable[..., Any]:
    """The solver registered as ``key``.

    Raises:
        AssertionError: If there is none.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> torchdeq.get_solver("anderson").__name__
        'anderson_solver'
    """
    if key not in _solvers:
        raise AssertionError(f"solver must be one of {', '.join(_solvers)}, got {key!r}")
    return _solvers[key]


def register_solver(solver_type: str, solver: Callable[..., Any]) -> None:
    """Make ``solver`` available as ``solver_type``, for f_solver and b_solver too.

    It is called as solver(func, x0, max_iter=..., tol=..., stop_mode=..., indexing=...) and returns
    (z, list of states, SolverStat).
    """
    _solvers[solver_type] = solver
