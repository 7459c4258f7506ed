"""pydeq's solvers in an installed torchdeq."""

from __future__ import annotations

import importlib

from pydeq.compat.torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter, simple_fixed_point_iter

SOLVERS = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}


def register(replace: bool = True) -> None:
    """Register pydeq's solvers with the torchdeq that is installed.

    They are called ``pydeq_anderson`` and so on. A layer looks its solvers up when it is made.

    Args:
        replace: Also replace torchdeq's own solvers: ``anderson``, ``broyden``, ``fixed_point_iter`` and
            ``simple_fixed_point_iter``.

    Raises:
        ModuleNotFoundError: If torchdeq is not installed.
    """
    try:
        theirs = importlib.import_module("torchdeq.solver")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "register() needs torchdeq: pip install torchdeq==0.1.0. Or import pydeq.compat.torchdeq as torchdeq",
            name=error.name,
        ) from error
    for name, solver in SOLVERS.items():
        theirs.register_solver(f"pydeq_{name}", solver)
        if replace:
            theirs.register_solver(name, solver)
