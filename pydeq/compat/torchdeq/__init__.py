"""A replacement for torchdeq 0.1: ``import pydeq.compat.torchdeq as torchdeq``.

It has the same names, arguments, conventions and submodules, with pydeq's numerics. Or keep an installed torchdeq, and
put pydeq's solvers into it by :func:`register`.
"""

from __future__ import annotations

from pydeq.compat.torchdeq import core, dropout, grad, loss, norm, solver, utils
from pydeq.compat.torchdeq.core import DEQBase, DEQIndexing, DEQSliced, get_deq, register_deq, reset_deq
from pydeq.compat.torchdeq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from pydeq.compat.torchdeq.loss import fp_correction, jac_reg, power_method, register_weight_func
from pydeq.compat.torchdeq.norm import apply_norm, register_norm, register_norm_module, remove_norm, reset_norm
from pydeq.compat.torchdeq.registration import register
from pydeq.compat.torchdeq.solver import (
    SolverStat,
    anderson_solver,
    broyden_solver,
    fixed_point_iter,
    get_solver,
    register_solver,
    simple_fixed_point_iter,
    solver_stat_from_final_step,
)
from pydeq.compat.torchdeq.utils import DEQConfig, add_deq_args, mem_gc, mixed_init

__all__ = [
    "DEQBase",
    "DEQConfig",
    "DEQIndexing",
    "DEQSliced",
    "SolverStat",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "anderson_solver",
    "apply_norm",
    "broyden_solver",
    "core",
    "dropout",
    "fixed_point_iter",
    "fp_correction",
    "get_deq",
    "get_solver",
    "grad",
    "jac_reg",
    "loss",
    "mem_gc",
    "mixed_init",
    "norm",
    "power_method",
    "register",
    "register_deq",
    "register_norm",
    "register_norm_module",
    "register_solver",
    "register_weight_func",
    "remove_norm",
    "reset_deq",
    "reset_dropout",
    "reset_norm",
    "simple_fixed_point_iter",
    "solver",
    "solver_stat_from_final_step",
    "utils",
]
