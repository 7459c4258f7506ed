"""pydeq: fast, trustworthy solvers for deep equilibrium models in PyTorch."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch as _torch  # noqa: F401  # The compiled library needs torch's libraries loaded first.

from pydeq import nn, ops
from pydeq.adjoints import Implicit, JacobianFree, Phantom, Reversible, Shine, Unrolled
from pydeq.arguments import did_you_mean as _did_you_mean
from pydeq.compiled_solve import CompiledSolve
from pydeq.diagnosis import audit, diagnose
from pydeq.export import export_mode
from pydeq.fixed_point import fixed_point
from pydeq.jacobian import (
    JacobianPenalty,
    frobenius_norm_squared,
    jacobian_penalty,
    jacobian_spectrum,
    spectral_radius,
)
from pydeq.layer import DEQ
from pydeq.ops.constants import Status
from pydeq.ops.kernels import kernels, package_version
from pydeq.solution import ConvergenceError, ConvergenceWarning, CouplingWarning, Solution
from pydeq.solvers import GMRES, Anderson, Broyden, CustomSolver, NewtonKrylov, Picard, TrustRegion
from pydeq.supervision import fixed_point_correction

__version__ = package_version()

__all__ = [
    "DEQ",
    "GMRES",
    "Anderson",
    "Broyden",
    "CompiledSolve",
    "ConvergenceError",
    "ConvergenceWarning",
    "CouplingWarning",
    "CustomSolver",
    "Implicit",
    "JacobianFree",
    "JacobianPenalty",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "Reversible",
    "Shine",
    "Solution",
    "Status",
    "TrustRegion",
    "Unrolled",
    "audit",
    "diagnose",
    "export_mode",
    "fixed_point",
    "fixed_point_correction",
    "frobenius_norm_squared",
    "jacobian_penalty",
    "jacobian_spectrum",
    "kernels",
    "nn",
    "ops",
    "spectral_radius",
]

if not _TYPE_CHECKING:  # else a type checker would take any attribute

    def __getattr__(name: str) -> object:
        """Import ``pydeq.models`` when it is used, and suggest the nearest of the names for any other."""
        if name == "models":
            return _importlib.import_module("pydeq.models")
        hint = "" if name.startswith("_") else _did_you_mean(name, [*__all__, "models"])
        raise AttributeError(f"module 'pydeq' has no attribute {name!r}{hint}")
