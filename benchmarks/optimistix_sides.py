"""Solves by optimistix, for comparison in ``benchmarks/device/overhead.py``.

JAX compiles a solve together with its map, so a map in torch cannot be used. The same maps are therefore defined here
again. For fixed points optimistix has plain iteration, ``FixedPointIteration``. Times do not include compilation, and
end when the result is on the device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# By default JAX takes three quarters of a GPU's memory when it starts, but torch already uses memory there.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import optimistix  # pyright: ignore[reportMissingImports]

# As in torch: no rounding of float32 products to fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")

Work = Callable[[], Any]


def versions() -> dict[str, str]:
    return {"jax": jax.__version__, "optimistix": optimistix.__version__, "jax device": str(jax.devices()[0])}


def timed(work: Work) -> Callable[[], float]:
    """Seconds until the device is done with ``work``; compiles it first."""
    jax.block_until_ready(work())

    def measure() -> float:
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    return measure


def elementwise(slopes: Any, x: Any, calls: int) -> tuple[Work, Work]:
    """``calls`` plain iterations of z -> tanh(slopes z + x) from 0, and as many calls of the map without a solver.

    The solve never stops before: its tolerance is the smallest float32, and the map's steepest entries are far from
    that.
    """
    a, x = jnp.asarray(slopes), jnp.asarray(x)

    def fn(z: Any, args: Any) -> Any:
        return jnp.tanh(args[0] * z + args[1])

    solver = optimistix.FixedPointIteration(rtol=0.0, atol=float(np.finfo(np.float32).tiny))

    @jax.jit
    def solve(z0: Any, args: Any) -> Any:
        solution = optimistix.fixed_point(fn, solver, z0, args, max_steps=calls, throw=False)
        return solution.value, solution.stats["num_steps"]

    @jax.jit
    def alone(z0: Any, args: Any) -> Any:
        return jax.lax.fori_loop(0, calls, lambda _, z: fn(z, args), z0)

    z0 = jnp.zeros_like(x)
    return (lambda: solve(z0, (a, x))), (lambda: alone(z0, (a, x)))


def dense(weight: Any, x: Any, rtol: float, scale: float, max_steps: int) -> Work:
    """Solve z = tanh(z weight + x) from 0; returns the value, [B, D].

    Args:
        weight: [D, D].
        x: [B, D].
        rtol: Stops when the root mean square of f(z) - z is rtol times ``scale``, over the whole batch.
        scale: Root mean square of the solution: optimistix weighs each entry separately, and ``scale`` makes its test
            equal to the other libraries' test.
        max_steps: Maximum number of evaluations.
    """
    weight, x = jnp.asarray(weight), jnp.asarray(x)
    solver = optimistix.FixedPointIteration(rtol=0.0, atol=rtol * scale, norm=optimistix.rms_norm)

    def fn(z: Any, args: Any) -> Any:
        return jnp.tanh(z @ args[0] + args[1])

    @jax.jit
    def solve(z0: Any, args: Any) -> Any:
        return optimistix.fixed_point(fn, solver, z0, args, max_steps=max_steps, throw=False).value

    z0 = jnp.zeros_like(x)
    return lambda: solve(z0, (weight, x))
