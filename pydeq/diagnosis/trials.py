"""Try solvers on a batch: forward solves, backward solves, and whole layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeq.adjoints import Implicit
from pydeq.cell.linearization import Linearization
from pydeq.diagnosis.subject import Subject, exact_cotangent
from pydeq.ops.constants import Status
from pydeq.ops.termination import Rules
from pydeq.solution import Solution
from pydeq.solve.solve import solve
from pydeq.solvers import GMRES, Anderson, Broyden, NewtonKrylov, Picard, Solver, TrustRegion
from pydeq.solvers.base import Workspace
from pydeq.solvers.newton_krylov import NewtonKrylovWorkspace
from pydeq.solvers.trust_region import TrustRegionWorkspace
from pydeq.state import as_tuple

# Solvers that every diagnosis tries, forward.
USUAL: tuple[Solver, ...] = (
    Picard(),
    Picard(damping=0.5),
    Anderson(),
    Anderson(damping=0.5),
    Anderson(memory=20),
    Broyden(),
)
# Further ones, in this order, while none converges. NewtonKrylov costs the most, so it is the last one.
FURTHER: tuple[Solver, ...] = (
    GMRES(restart=50),
    Picard(damping=0.2),
    Anderson(memory=10, damping=0.2),
    Anderson(memory=40),
    Anderson(memory=20, damping=0.5, ridge=1e-4),
    Broyden(line_search=True),
    NewtonKrylov(),
)
# A residual within this factor of the tolerance may still reach it.
_NEAR = 10.0
BACKWARD: tuple[Solver, ...] = (Picard(), Anderson(), Broyden(), GMRES())


@dataclass(frozen=True)
class Trial:
    """One solver tried on the batch, forward or backward.

    Args:
        solver: The solver.
        max_steps: The number of evaluations, or of products with the Jacobian, that it was given.
        rtol: The relative tolerance.
        solution: What it found; ``solution.trace`` has all residuals.
        error: Backward: the relative distance to the exact solution, over the whole batch. NaN forward.
        max_products: The number of products with the Jacobian that a forward solver was given; None for no limit.
    """

    solver: Solver
    max_steps: int
    rtol: float
    solution: Solution
    error: float = float("nan")
    max_products: int | None = None

    @property
    def all_converged(self) -> bool:
        return bool(self.solution.converged.all())

    @property
    def share(self) -> str:
        """How many samples converged, as in "3 of 4"."""
        return f"{int(self.solution.converged.sum())} of {len(self.solution.converged)}"

    @property
    def residual(self) -> float:
        """The largest relative residual."""
        found = self.solution.relative_residual
        return float(found.max()) if len(found) else 0.0

    @property
    def cost(self) -> int:
        """Evaluations, and products of a forward solver with the Jacobian, which cost at least one evaluation each."""
        return self.solution.nfe + self.solution.products

    @property
    def rate(self) -> float:
        """By what factor an evaluation changes the residual of the slowest sample, on average; NaN if unknown."""
        trace = self.solution.trace
        if trace is None or len(trace) < 2 or not trace.shape[1]:
            return float("nan")
        slowest = int(self.solution.sample_nfe.argmax())
        column = trace[:, slowest].double()
        column = column[column.isfinite()]
        if len(column) < 2 or not float(column[0]) or not float(column[-1]):
            return float("nan")
        return float((column[-1] / column[0]) ** (1.0 / (len(column) - 1)))

    def hopeful(self, max_steps: int) -> bool:
        """Whether all samples may converge in ``max_steps`` evaluations: if a sample has converged in the last half of
        this trial, or if the residual of the slowest one falls so fast."""
        solution, trace = self.solution, self.solution.trace
        half = solution.nfe // 2
        if trace is None or not half or bool((solution.sample_nfe[solution.converged] > half).any()):
            return True
        running = trace[:, ~solution.converged].double().nan_to_num(torch.inf)
        before, after = running[:half].amin(0), running.amin(0)
        fall = (after / before) ** ((max_steps - solution.nfe) / (solution.nfe - half))
        return bool((after * fall <= _NEAR * self.rtol).all())

    @property
    def ends(self) -> str:
        """How the samples ended that did not converge, as in "2 MAX_STEPS"."""
        codes, counts = self.solution.status.unique(return_counts=True)
        pairs = zip(codes.tolist(), counts.tolist(), strict=True)
        return ", ".join(f"{count} {Status(code).name}" for code, count in pairs if code != Status.CONVERGED)


def try_forward(
    subject: Subject, solver: Solver, rtol: float, max_steps: int, max_products: int | None = None, **options: Any
) -> Trial:
    """Solve the fixed-point problem with one solver, which may take ``max_products`` products with the Jacobian."""
    limited = solver
    if isinstance(solver, NewtonKrylov) and max_products is not None:
        limited = _LimitedNewtonKrylov(solver.products, solver.mode, max_products)
    elif isinstance(solver, TrustRegion) and max_products is not None:
        limited = _LimitedTrustRegion(solver.mode, solver.vectorize, max_products)
    solution = solve(subject.fn, subject.z0, solver=limited, rtol=rtol, max_steps=max_steps, trace=True, **options)
    return Trial(solver, max_steps, rtol, solution, max_products=max_products if limited is not solver else None)


@dataclass(frozen=True)
class _LimitedNewtonKrylov(NewtonKrylov):
    """NewtonKrylov that ends when it has taken ``limit`` products in all."""

    limit: int = 1

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _LimitedNewtonKrylovWorkspace(flat, rules, max_steps, self)


class _LimitedNewtonKrylovWorkspace(NewtonKrylovWorkspace):
    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: _LimitedNewtonKrylov) -> None:
        super().__init__(flat, rules, max_steps, solver)
        self.left = solver.limit

    def search_from(self, rows: Tensor, fresh: Tensor) -> Tensor:
        product, self.products = self.product, max(1, min(self.products, self.left))

        def counted(v: Tensor) -> Tensor:
            self.left -= 1
            return product(v)

        self.product = counted
        try:
            return super().search_from(rows, fresh)
        finally:
            self.product = product

    def step(self, f: Tensor, k: int) -> None:
        if self.left <= 0:
            self.max_steps = k + 1  # samples that have not converged end as MAX_STEPS
        super().step(f, k)


@dataclass(frozen=True)
class _LimitedTrustRegion(TrustRegion):
    """TrustRegion that ends when fewer of ``limit`` products in all are left than a Jacobian takes."""

    limit: int = 1

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _LimitedTrustRegionWorkspace(flat, rules, max_steps, self)


class _LimitedTrustRegionWorkspace(TrustRegionWorkspace):
    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: _LimitedTrustRegion) -> None:
        super().__init__(flat, rules, max_steps, solver)
        self.each = flat.shape[1] + (solver.mode != "difference" or solver.vectorize)
        self.left = max(solver.limit, self.each)

    def _renew(self, z: Tensor, f: Tensor) -> None:
        self.left -= self.each
        super()._renew(z, f)

    def step(self, f: Tensor, k: int) -> None:
        if self.left < self.each:
            self.max_steps = k + 1
        super().step(f, k)


@dataclass(frozen=True)
class Backward:
    """The adjoint system u = J^T u + v at a fixed point, with a random v.

    Args:
        at: fn at the fixed point.
        v: The right-hand side, [B, D].
        exact: The solution u by GMRES, [B, D].
        left: The largest relative residual of ``exact``.
        together: Whether samples depend on each other.
    """

    at: Linearization
    v: Tensor
    exact: Tensor
    left: float
    together: bool

    @staticmethod
    def of(subject: Subject, z: Tensor, together: bool) -> Backward:
        at = subject.linearize(z)
        generator = torch.Generator(z.device).manual_seed(1)
        v = torch.randn(z.shape, generator=generator, device=z.device, dtype=torch.float64).to(z.dtype)
        return Backward(at, v, *exact_cotangent(at, v, together), together)

    def attempt(self, adjoint: Implicit) -> Trial:
        """Solve the system as this adjoint does."""
        options = adjoint.options(self.v.dtype)

        def fn(u: Tensor) -> Tensor:
            return self.v + self.at.flat_vjp(u)

        solution = solve(fn, self.v, solver=adjoint.solver, rtol=options["rtol"], max_steps=adjoint.max_steps)
        (found,) = as_tuple(solution.image)
        size = float(self.exact.double().norm()) or 1.0
        error = float((found.double() - self.exact.double()).norm()) / size
        return Trial(adjoint.solver, adjoint.max_steps, options["rtol"], solution, error)


def code_of(settings: Any) -> str:
    """A solver or an adjoint as code, with the fields that differ from their defaults."""
    if not dataclasses.is_dataclass(settings):
        return repr(settings)
    given = []
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        default = one.default
        if default is dataclasses.MISSING and one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if value != default:
            given.append(f"{one.name}={code_of(value) if dataclasses.is_dataclass(value) else repr(value)}")
    package = "pydeq." if type(settings).__module__.startswith("pydeq.") else ""
    return f"{package}{type(settings).__name__}({', '.join(given)})"


def name_of(settings: Any) -> str:
    """A solver for a line of a table."""
    return code_of(settings).removeprefix("pydeq.")
