"""pydeq, through its public names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pydeq
from benchmarks.peers.base import Layer, LayerSettings, Method, Outcome, Peer
from benchmarks.peers.calling import COMPILER, Calls
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem
from benchmarks.timing import Map
from pydeq.solvers import buffers
from pydeq.solvers.trust_region import MOST_ENTRIES

# Entries of a batch beyond which a compiled solve is no use: it saves what happens between evaluations.
MOST_COMPILED = 10_000


def _solver(method: Method, max_calls: int) -> Any:
    if method.solver == "picard":
        return pydeq.Picard()
    if method.solver == "anderson":
        return pydeq.Anderson(memory=method.memory or 5)
    return pydeq.Broyden(memory=method.memory or max(1, max_calls - 1))


class _Pydeq(Peer):
    name = "pydeq"

    def forget(self) -> None:
        buffers.clear()

    def solve(self, fn: Map, z0: Tensor, method: Method, rtol: float, max_calls: int) -> Outcome:
        solver = _solver(method, max_calls)
        solution = pydeq.fixed_point(fn, z0, solver=solver, rtol=rtol, max_steps=max_calls)
        assert isinstance(solution.image, Tensor)
        return Outcome(solution.image, solution.relative_residual, bool(solution.converged.all()))

    def run(self, fn: Map, z0: Tensor, method: Method, calls: int) -> pydeq.Solution:
        solver = _solver(method, calls)
        return pydeq.fixed_point(fn, z0, solver=solver, rtol=0.0, max_steps=calls, freeze=False, stall=False)

    def layer(self, cell: Callable[[Tensor, Tensor], Tensor], settings: LayerSettings) -> Layer:
        return _Layer(cell, settings)


class _Layer:
    def __init__(self, cell: Callable[[Tensor, Tensor], Tensor], settings: LayerSettings) -> None:
        adjoint = pydeq.Implicit(
            solver=_solver(settings.method, settings.adjoint_max_calls),
            rtol=settings.adjoint_rtol,
            max_steps=settings.adjoint_max_calls,
        )
        self.cell, self.settings = cell, settings
        self.deq = pydeq.DEQ(
            cell,
            solver=_solver(settings.method, settings.max_calls),
            adjoint=adjoint,
            rtol=settings.rtol,
            max_steps=settings.max_calls,
        )

    def solve(self, z0: Tensor, x: Tensor, max_calls: int | None = None) -> Tensor:
        return self.deq(z0, x, max_steps=max_calls)

    def penalty(self, z: Tensor, x: Tensor) -> Tensor:
        return pydeq.jacobian_penalty(self.cell, z.detach(), x, mode=self.settings.penalty)

    def solve_penalized(self, z0: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = pydeq.JacobianPenalty(1.0, mode=self.settings.penalty)
        z, solution = self.deq(z0, x, return_solution=True, penalty=penalty)
        return z, solution.penalty


PEER = _Pydeq()


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """A solver of pydeq, by its class's name. It hands on the iterate that it tested.

    Tolerance: pydeq allows rtol ||f(z)|| + atol where the problem allows the larger of the two, so where the problem
    has both, it is given half of each.

    Products are those that it reports, and for NewtonKrylov the one that starts the products at each point: it is
    counted when the gradient reaches z.

    Args:
        solver: The name of its class.
        whole: Compile not only the map but the whole solve, by pydeq.CompiledSolve.
    """

    solver: str
    whole: bool = False
    library: str = "pydeq"

    def is_twin_of(self, compiled: Contender) -> bool:
        plain = replace(compiled, whole=False) if isinstance(compiled, _Contender) else compiled
        return not self.whole and super().is_twin_of(plain)

    def refusal(self, problem: Problem) -> str | None:
        if found := super().refusal(problem):
            return found
        if self.solver == "TrustRegion" and problem.z0[0].numel() > MOST_ENTRIES:
            return "it forms a dense Jacobian of each sample"
        if self.whole and problem.z0.device.type != "cpu":
            return "it is for the CPU"
        if self.whole and problem.z0.numel() > MOST_COMPILED:
            return "an evaluation takes longer than the loop around it"
        if self.whole and problem.z0.dtype not in (torch.float64, torch.float32):
            return "it is for float64 and float32"
        return None

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        solver = getattr(pydeq, self.solver)(**self.settings)
        share = tighten * (0.5 if problem.rtol > 0 and problem.atol > 0 else 1.0)
        rtol, atol = share * problem.rtol, share * problem.atol
        if self.whole and counts is None:
            return _CompiledSolve(problem, solver=solver, rtol=rtol, atol=atol)
        fn = COMPILER.map(problem) if self.compiled and counts is None else problem.fn

        if counts is not None and self.solver == "NewtonKrylov":
            fn = _watched(fn, counts)

        def solve() -> Claim:
            calls = None if counts is None else Calls(fn, None, counts)
            solution = pydeq.fixed_point(
                calls or fn, problem.z0, solver=solver, rtol=rtol, atol=atol, max_steps=problem.max_calls
            )
            if calls is not None and counts is not None:
                # Products by differences are calls already, but no evaluations to pydeq.
                counts.products += solution.products - (calls.calls - solution.nfe)
            return _claim(solution)

        return solve


def _claim(solution: pydeq.Solution) -> Claim:
    return Claim(solution.value, lambda: solution.converged)


class _CompiledSolve:
    """A solve whose first call compiles; the map of a problem is compiled once for all solvers."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        self._problem, self._options = problem, options
        self._solve: pydeq.CompiledSolve | None = None

    def __call__(self) -> Claim:
        if self._solve is None:
            self._solve = _MAPS.of(self._problem).replace(**self._options)
        return _claim(self._solve(self._problem.z0))

    def forget(self) -> None:
        """Free the memory that it keeps from solve to solve."""
        self._solve = None


class _Maps:
    """The compiled map of the newest problem."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._solve: pydeq.CompiledSolve | None = None

    def of(self, problem: Problem) -> pydeq.CompiledSolve:
        if problem is not self._problem:
            self._problem, self._solve = problem, None  # None stays if it cannot be compiled
            self._solve = pydeq.CompiledSolve(problem.fn, problem.z0, max_steps=problem.max_calls)
        if self._solve is None:
            raise RuntimeError("pydeq.CompiledSolve did not take the map")
        return self._solve


_MAPS = _Maps()


def _watched(fn: Map, counts: Counts) -> Map:
    """A map that counts a product whenever a gradient reaches its argument."""

    def add(_: Tensor) -> None:
        counts.products += 1

    def watched(z: Tensor) -> Tensor:
        if z.requires_grad:
            z = z.view_as(z)
            z.register_hook(add)
        return fn(z)

    return watched


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="pydeq.picard", title="Picard", solver="Picard"),
    _Contender(key="pydeq.picard.compiled", title="Picard, compiled map", solver="Picard", compiled=True),
    _Contender(key="pydeq.picard.whole", title="Picard, compiled solve", solver="Picard", compiled=True, whole=True),
    _Contender(key="pydeq.anderson.default", title="Anderson", solver="Anderson"),
    _Contender(key="pydeq.anderson.best", title="Anderson", solver="Anderson", settings={"memory": 10}),
    _Contender(key="pydeq.anderson.compiled.default", title="Anderson, compiled map", solver="Anderson", compiled=True),
    _Contender(
        key="pydeq.anderson.compiled.best",
        title="Anderson, compiled map",
        solver="Anderson",
        settings={"memory": 10},
        compiled=True,
    ),
    _Contender(
        key="pydeq.anderson.whole.default",
        title="Anderson, compiled solve",
        solver="Anderson",
        compiled=True,
        whole=True,
    ),
    _Contender(
        key="pydeq.anderson.whole.best",
        title="Anderson, compiled solve",
        solver="Anderson",
        settings={"memory": 10},
        compiled=True,
        whole=True,
    ),
    _Contender(key="pydeq.broyden", title="Broyden", solver="Broyden"),
    _Contender(key="pydeq.broyden.compiled", title="Broyden, compiled map", solver="Broyden", compiled=True),
    _Contender(key="pydeq.broyden.whole", title="Broyden, compiled solve", solver="Broyden", compiled=True, whole=True),
    _Contender(
        key="pydeq.broyden.line_search",
        title="Broyden, line search",
        solver="Broyden",
        settings={"line_search": True},
    ),
    _Contender(key="pydeq.newton_krylov.default", title="Newton-Krylov", solver="NewtonKrylov", differences=True),
    _Contender(
        key="pydeq.newton_krylov.best",
        title="Newton-Krylov",
        solver="NewtonKrylov",
        settings={"mode": "difference"},
        differences=True,
    ),
    _Contender(key="pydeq.trust_region.default", title="trust region", solver="TrustRegion", differences=True),
    _Contender(
        key="pydeq.trust_region.best",
        title="trust region",
        solver="TrustRegion",
        settings={"mode": "difference", "vectorize": True},
        differences=True,
    ),
)

GRIDS: Grids = {
    "pydeq.anderson": [{"memory": memory, "damping": damping} for memory in (5, 3, 10) for damping in (1.0, 0.5)],
    "pydeq.newton_krylov": [{"mode": "difference"}],
    "pydeq.trust_region": [{"mode": "difference", "vectorize": vectorize} for vectorize in (False, True)],
}
