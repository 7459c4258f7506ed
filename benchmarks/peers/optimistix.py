"""Optimistix 0.1 (Rader, Lyons and Kidger 2024), jitted, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optimistix

from benchmarks.peers.calling import allowed, allowed_of_equation
from benchmarks.peers.calling_jax import array, jitted, maps, precision
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem

# Bytes that a Jacobian of the whole batch may take.
_DENSE = 2**27


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A solver, by its class's name; the state is the whole batch.

    Tolerance: ``norm`` is the largest norm of a sample, over the residual that solves the sample; atol is ``tighten``,
    rtol 0. Root finders want a last step as small as the residual, too.
    """

    solver: str
    library: str = "optimistix"
    language: Literal["torch", "numpy", "jax"] = "jax"

    def refusal(self, problem: Problem) -> str | None:
        size = problem.z0.numel() ** 2 * problem.z0.element_size()
        if self.solver != "FixedPointIteration" and size > _DENSE:
            return f"it forms a dense Jacobian of {size / 2**20:.0f} MiB"
        return super().refusal(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        fixed = self.solver == "FixedPointIteration"
        with precision(problem):
            functions = maps(problem, counts)
            tolerance = array((allowed(problem) if fixed else allowed_of_equation(problem)).to(problem.z0.dtype))

            def norm(x: Any) -> Any:
                if x.ndim == 0:  # half the square of the norm of the whole batch, for Dogleg
                    return jnp.abs(x)
                return (jnp.linalg.norm(x.reshape(len(tolerance), -1), axis=1) / tolerance).max()

            solver = getattr(optimistix, self.solver)(rtol=0.0, atol=tighten, norm=norm, **self.settings)
            find: Any = optimistix.fixed_point if fixed else optimistix.root_find
            fn = functions.fn if fixed else functions.equation

        def run(z: Any, constants: Any) -> Any:
            solution = find(fn, solver, z, args=constants, max_steps=problem.max_calls, throw=False)
            return solution.value, solution.result == optimistix.RESULTS.successful

        return jitted(problem, functions, run)


CONTENDERS: tuple[Contender, ...] = (
    _Contender(
        key="optimistix.fixed_point_iteration.default", title="fixed-point iteration", solver="FixedPointIteration"
    ),
    _Contender(key="optimistix.newton", title="Newton", solver="Newton"),
    _Contender(key="optimistix.chord", title="Chord", solver="Chord"),
    _Contender(key="optimistix.dogleg", title="Dogleg", solver="Dogleg"),
)

GRIDS: Grids = {"optimistix.fixed_point_iteration": [{"damp": 0.0}, {"damp": 0.5}]}
