"""Functions that make statistics."""

from __future__ import annotations

from typing import Any

from pydeq.compat.torchdeq.solver.stat import SolverStat


def solver_stat_from_info(stop_mode: str, lowest_dict: Any, trace_dict: Any, lowest_step_dict: Any) -> SolverStat:
    """:meth:`SolverStat.from_solver_info`."""
    return SolverStat.from_solver_info(stop_mode, lowest_dict, trace_dict, lowest_step_dict)


def solver_stat_from_final_step(z: Any, fz: Any, nstep: int = 0) -> SolverStat:
    """:meth:`SolverStat.from_final_step`."""
    return SolverStat.from_final_step(z, fz, nstep=nstep)


def dummy_solver_stat() -> SolverStat:
    """Statistics that are all -1."""
    return SolverStat()
