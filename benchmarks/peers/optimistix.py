"""Optimistix 0.1 (Rader, Lyons and Kidger 2024), jitted, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optimistix

from benchmarks.peers.calling import allowed, allowed_of_equation
from benchmarks.peers.calling_jax import Maps, jitted, precision, refusal_to_map
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem

# Bytes that a Jacobian of the whole batch may take.
_DENSE = 2**27


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A solver, by its class's name; the state is the whole batch, or one sample.

    Tolerance: ``norm`` is the largest norm of a sample, over the residual that solves the sample; atol is 1, rtol 0.
    Mapped over samples, norm is the norm of a sample, and atol the residual that solves it.
    Root finders want a last step as small as the residual, too. They do not depend on the scale of r(z), which they are
    given where the problem was stated so: a small B would only ask for a smaller step.

    Args:
        mapped: Map it over the samples by ``jax.vmap``.
    """

    solver: str
    mapped: bool = False
    library: str = "optimistix"
    language: Literal["torch", "numpy", "jax"] = "jax"

    def refusal(self, problem: Problem) -> str | None:
        refusal = super().refusal(problem) or (refusal_to_map(problem) if self.mapped else None)
        blocks = len(problem.z0) if self.mapped else 1
        size = problem.z0.numel() ** 2 * problem.z0.element_size() // blocks
        if refusal is None and self.solver != "FixedPointIteration" and size > _DENSE:
            return f"it forms a dense Jacobian of {size / 2**20:.0f} MiB"
        return refusal

    def session(self, problem: Problem) -> AbstractContextManager[Any]:
        return precision(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        fixed = self.solver == "FixedPointIteration"
        make = getattr(optimistix, self.solver)
        find: Any = optimistix.fixed_point if fixed else optimistix.root_find

        def wide(x: Any) -> Any:
            return x.astype(jnp.result_type(float))  # which it keeps errors in, whatever the dtype of the state

        def run(functions: Maps, z0: Any, constants: Any, tolerance: Any) -> Any:
            def norm(x: Any) -> Any:
                if self.mapped:
                    return wide(optimistix.two_norm(x))
                return wide(jnp.linalg.norm(x.reshape(len(tolerance), -1), axis=1) / tolerance).max()

            solver = make(rtol=0.0, atol=tolerance if self.mapped else 1.0, norm=norm, **self.settings)
            fn = functions.fn if fixed else functions.equation
            solution = find(fn, solver, z0, args=constants, max_steps=problem.max_calls, throw=False)
            return solution.value, solution.result == optimistix.RESULTS.successful

        tolerance = allowed(problem) if fixed else allowed_of_equation(problem)
        return jitted(self, problem, run, tighten * tolerance, counts, self.mapped)


_SOLVERS = (
    ("fixed_point_iteration", ".default", "fixed-point iteration", "FixedPointIteration"),
    ("newton", "", "Newton", "Newton"),
    ("chord", "", "Chord", "Chord"),
    ("dogleg", "", "Dogleg", "Dogleg"),
    ("levenberg_marquardt", "", "Levenberg-Marquardt", "LevenbergMarquardt"),
)
CONTENDERS: tuple[Contender, ...] = tuple(
    _Contender(
        key=f"optimistix.{name}{'.vmap' * mapped}{settings}",
        title=f"{title}{', vmap' * mapped}",
        solver=solver,
        mapped=mapped,
    )
    for mapped in (False, True)
    for name, settings, title, solver in _SOLVERS
)

GRIDS: Grids = {"optimistix.fixed_point_iteration": [{"damp": 0.0}, {"damp": 0.5}]}
