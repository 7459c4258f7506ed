"""pydeq: fast, trustworthy solvers for deep equilibrium models in PyTorch."""

import torch as _torch  # noqa: F401  # The compiled library needs torch's libraries loaded first.

from pydeq import nn, ops
from pydeq.adjoints import Implicit, JacobianFree, Phantom, Reversible, Shine, Unrolled
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
from pydeq.solvers import GMRES, Anderson, Broyden, CustomSolver, NewtonKrylov, Picard
from pydeq.supervision import fixed_point_correction

__version__ = package_version()

__all__ = [
    "DEQ",
    "GMRES",
    "Anderson",
    "Broyden",
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
