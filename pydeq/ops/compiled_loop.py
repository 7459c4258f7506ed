"""The C interface of ``csrc/cpu/compiled_solve.cpp``: whole solves of a map that was compiled ahead of time."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p


class Input(ctypes.Structure):
    """A tensor that the map takes."""

    _fields_ = (("dims", c_int64), ("sizes", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("dtype", c_int64))


class Loop(ctypes.Structure):
    """A solve, whatever the solver."""

    _fields_ = (
        ("bytes", c_int64),
        ("run", c_void_p),
        ("model", c_void_p),
        ("inputs", POINTER(Input)),
        ("data", POINTER(c_void_p)),
        ("count", c_int64),
        ("views", c_void_p),
        ("batch", c_int64),
        ("state", c_int64),
        ("single", c_int64),
        ("z", c_void_p),
        ("other", c_void_p),
        ("best", c_void_p),
        ("value", c_void_p),
        ("image", c_void_p),
        ("scalars", c_void_p),
        ("counters", c_void_p),
        ("rtol", c_double),
        ("atol", c_double),
        ("eps", c_double),
        ("stall", c_int64),
        ("max_steps", c_int64),
        ("damping", c_double),
        ("woken", c_int64),
    )


# The arguments after the solve, by the name of the function.
SOLVERS = {
    "pydeq_solve_picard": (),
    "pydeq_solve_anderson": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_double),
    "pydeq_solve_broyden": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
}
MAP_FAILED = -1
"""The result instead of the number of evaluations, if the map failed."""
