"""jaxopt 0.8 (Blondel et al. 2022), jitted, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jaxopt

from benchmarks.peers.calling import allowed, refusal_of_history
from benchmarks.peers.calling_jax import Maps, jitted, precision, refusal_to_map
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A solver, by its class's name; the state is the whole batch, or one sample. Broyden starts along -F = f(z) - z.

    Tolerance: its solvers test the norm of the residual. Of the whole batch it is to be below the smallest residual
    that solves a sample; mapped over samples, below that of each. The cap limits iterations; those of Broyden with a
    line search call the map several times.

    Args:
        mapped: Map it over the samples by ``jax.vmap``.
    """

    solver: str
    mapped: bool = False
    library: str = "jaxopt"
    language: Literal["torch", "numpy", "jax"] = "jax"

    def refusal(self, problem: Problem) -> str | None:
        refusal = super().refusal(problem) or (refusal_to_map(problem) if self.mapped else None)
        if refusal is None and self.solver == "Broyden" and "history_size" not in self.settings:
            return refusal_of_history(problem)
        return refusal

    def session(self, problem: Problem) -> AbstractContextManager[Any]:
        return precision(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        fixed = self.solver != "Broyden"

        def run(functions: Maps, z0: Any, constants: Any, tolerance: Any) -> Any:
            tolerance = tolerance.min()
            solver = getattr(jaxopt, self.solver)(
                functions.fn if fixed else functions.difference,
                tol=tolerance,
                maxiter=problem.max_calls,
                **self.settings,
            )
            value, state = solver.run(z0, constants)
            return value, state.error <= tolerance

        return jitted(self, problem, run, tighten * allowed(problem), counts, self.mapped)


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
_BEST = {
    "anderson": {"history_size": 10, "ridge": 1e-8},
    "broyden": {"stepsize": 1.0, "history_size": 100},
}
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="jaxopt.fixed_point_iteration", title="fixed-point iteration", solver="FixedPointIteration"),
    _Contender(key="jaxopt.anderson.default", title="Anderson", solver="AndersonAcceleration"),
    _Contender(key="jaxopt.anderson.best", title="Anderson", solver="AndersonAcceleration", settings=_BEST["anderson"]),
    _Contender(
        key="jaxopt.anderson.vmap.best",
        title="Anderson, vmap",
        solver="AndersonAcceleration",
        settings=_BEST["anderson"],
        mapped=True,
    ),
    _Contender(key="jaxopt.broyden.default", title="Broyden", solver="Broyden"),
    _Contender(key="jaxopt.broyden.best", title="Broyden", solver="Broyden", settings=_BEST["broyden"]),
    _Contender(
        key="jaxopt.broyden.vmap.best", title="Broyden, vmap", solver="Broyden", settings=_BEST["broyden"], mapped=True
    ),
)

GRIDS: Grids = {
    "jaxopt.anderson": [
        {"history_size": memory, "ridge": ridge, "beta": beta}
        for memory in (5, 3, 10)
        for ridge in (1e-5, 1e-8)
        for beta in (1.0, 0.5)
    ],
    "jaxopt.broyden": [
        {"stepsize": stepsize, "history_size": memory} for stepsize in (0.0, 1.0) for memory in (100, 10, 30)
    ],
}
