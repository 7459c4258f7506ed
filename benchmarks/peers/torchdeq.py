"""torchdeq 0.1 (Geng and Kolter 2023), through its public names and with its own defaults.

Its caps count differently: Anderson's counts calls, but it makes two calls before the first check; Broyden's counts
steps, one less than calls. Plain iteration counts calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdeq import get_deq
from torchdeq.loss import jac_reg
from torchdeq.solver import get_solver

from benchmarks.peers.base import Layer, LayerSettings, Method, Outcome, Peer
from benchmarks.peers.calling import allowed, map_of, refusal_of_history
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem
from benchmarks.timing import Map

NAMES = {"picard": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}


def _configure(method: Method, max_calls: int) -> tuple[str, int, dict[str, Any]]:
    """Its name of a solver, the cap that makes at most ``max_calls`` calls, and further options."""
    name, cap, options = NAMES[method.solver], max_calls, {}
    if method.solver == "anderson":
        if max_calls < 3:
            # Anderson's first two calls are plain iteration, but with so low a cap torchdeq returns z0 after them.
            return NAMES["picard"], max_calls, {}
        if method.memory is not None:
            options["m"] = method.memory
    elif method.solver == "broyden":
        cap = max_calls - 1
        if method.memory is not None:
            options["LBFGS_thres"] = method.memory
    return name, cap, options


class _Torchdeq(Peer):
    name = "torchdeq"

    def solve(self, fn: Map, z0: Tensor, method: Method, rtol: float, max_calls: int) -> Outcome:
        name, cap, options = _configure(method, max_calls)
        with torch.no_grad():
            value, _, info = get_solver(name)(fn, z0, max_iter=cap, tol=rtol, stop_mode="rel", **options)
        residual = info["rel_lowest"]
        return Outcome(value, residual, bool((residual < rtol).all()))

    def run(self, fn: Map, z0: Tensor, method: Method, calls: int) -> Any:
        name, cap, options = _configure(method, calls)
        with torch.no_grad():
            # It stops only below the tolerance, so with 0 it never stops.
            return get_solver(name)(fn, z0, max_iter=cap, tol=0.0, stop_mode="rel", **options)

    def layer(self, cell: Callable[[Tensor, Tensor], Tensor], settings: LayerSettings) -> Layer:
        return _Layer(cell, settings)


class _Layer:
    def __init__(self, cell: Callable[[Tensor, Tensor], Tensor], settings: LayerSettings) -> None:
        name, cap, options = _configure(settings.method, settings.max_calls)
        backward_name, backward_cap, _ = _configure(settings.method, settings.adjoint_max_calls)
        self.cell, self.settings, self.options = cell, settings, options
        self.deq = get_deq(
            core="indexing",
            ift=True,
            f_solver=name,
            f_max_iter=cap,
            f_tol=settings.rtol,
            f_stop_mode="rel",
            b_solver=backward_name,
            b_max_iter=backward_cap,
            b_tol=settings.adjoint_rtol,
            b_stop_mode="rel",
        )

    def solve(self, z0: Tensor, x: Tensor, max_calls: int | None = None) -> Tensor:
        def fn(z: Tensor) -> Tensor:
            return self.cell(z, x)

        settings = self.settings
        if torch.is_grad_enabled() and max_calls is None:
            states, _ = self.deq(fn, z0, solver_kwargs=self.options)
            return states[-1]
        # Without gradients its layer only does this; a low cap may need another solver, see _configure.
        return PEER.solve(fn, z0, settings.method, settings.rtol, max_calls or settings.max_calls).value

    def penalty(self, z: Tensor, x: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return jac_reg(self.cell(z, x), z)

    def solve_penalized(self, z0: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.solve(z0, x)
        return z, self.penalty(z, x)


PEER = _Torchdeq()


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A solver of torchdeq, by its own name.

    Tolerance: ``rel`` with rtol. If the problem has an absolute tolerance, ``abs`` with the smallest residual that
    solves a sample, since torchdeq has one tolerance for all samples.
    """

    solver: str
    library: str = "torchdeq"

    def refusal(self, problem: Problem) -> str | None:
        if self.solver == "broyden" and "LBFGS_thres" not in self.settings:
            return super().refusal(problem) or refusal_of_history(problem)
        return super().refusal(problem)

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        run = get_solver(self.solver)
        mode, tolerance = ("abs", allowed(problem).min().item()) if problem.atol > 0.0 else ("rel", problem.rtol)
        tolerance *= tighten
        # Broyden's cap counts steps, one less than calls.
        cap = problem.max_calls - 1 if self.solver == "broyden" else problem.max_calls
        fn = map_of(problem, self.compiled, counts)

        @torch.no_grad()
        def solve() -> Claim:
            value, _, info = run(fn, problem.z0, max_iter=cap, tol=tolerance, stop_mode=mode, **self.settings)
            return Claim(value, lambda: info[f"{mode}_lowest"] < tolerance)

        return solve


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="torchdeq.fixed_point_iter", title="fixed-point iteration", solver="fixed_point_iter"),
    _Contender(key="torchdeq.anderson.default", title="Anderson", solver="anderson"),
    _Contender(key="torchdeq.anderson.best", title="Anderson", solver="anderson", settings={"m": 10, "lam": 1e-8}),
    _Contender(
        key="torchdeq.anderson.compiled.best",
        title="Anderson, compiled map",
        solver="anderson",
        settings={"m": 10, "lam": 1e-8},
        compiled=True,
    ),
    _Contender(key="torchdeq.broyden.default", title="Broyden", solver="broyden"),
    _Contender(key="torchdeq.broyden.best", title="Broyden", solver="broyden", settings={"LBFGS_thres": 100}),
    _Contender(
        key="torchdeq.broyden.compiled.best",
        title="Broyden, compiled map",
        solver="broyden",
        settings={"LBFGS_thres": 100},
        compiled=True,
    ),
    _Contender(
        key="torchdeq.broyden.line_search",
        title="Broyden, line search",
        solver="broyden",
        settings={"LBFGS_thres": 100, "ls": True},
    ),
)

GRIDS: Grids = {
    "torchdeq.anderson": [
        {"m": m, "lam": lam, "tau": tau} for m in (6, 3, 10) for lam in (1e-4, 1e-8) for tau in (1.0, 0.5)
    ],
    "torchdeq.broyden": [{}, {"ls": True}, *({"LBFGS_thres": memory} for memory in (10, 30, 100))],
}
