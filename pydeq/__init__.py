"""pydeq: fast, trustworthy solvers for deep equilibrium models in PyTorch."""

import torch as _torch  # noqa: F401  # The compiled library needs torch's own to be loaded.

from pydeq import ops
from pydeq.adjoints import Implicit, JacobianFree, Phantom
from pydeq.compiled import kernels, package_version
from pydeq.fixed_point import fixed_point
from pydeq.jacobian import frobenius_norm_squared, jacobian_penalty, spectral_radius
from pydeq.layer import DEQ
from pydeq.protocol import Status
from pydeq.solution import ConvergenceError, Solution
from pydeq.solvers import Anderson, Broyden, Picard

__version__ = package_version()

__all__ = [
    "DEQ",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "Picard",
    "Solution",
    "Status",
    "fixed_point",
    "frobenius_norm_squared",
    "jacobian_penalty",
    "kernels",
    "ops",
    "spectral_radius",
]
