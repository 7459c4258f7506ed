"""A globalized inexact Newton method, whose linear systems are solved by GMRES on products with the Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pydeq.arguments import check_integer, set_fields, suggests_keywords
from pydeq.ops.constants import RUNNING, Counter, Progress, Scalar, Status
from pydeq.ops.termination import Rules
from pydeq.solvers.base import NewtonSolver, Workspace, check_vectors
from pydeq.solvers.gmres import GMRES
from pydeq.solvers.line_search import SearchWorkspace

# The forcing terms: the largest one, which is also the first, gamma, and the square of the last one from which it
# counts. Eisenstat and Walker's largest one is 0.9. With it, more searches on hard systems end far from a solution.
_LARGEST, _GAMMA, _COUNTS_FROM = 0.1, 0.9, 0.1
# The default of ``products``: the entries of a sample, but at least and at most so many.
_PRODUCTS, _MOST_PRODUCTS = 40, 128


@suggests_keywords
@dataclass(frozen=True)
class NewtonKrylov(NewtonSolver):
    """Newton's method on g(z) = f(z) - z = 0 with a line search: for maps that expand, and for root finding.

    ||g(z) + (J - I) d|| <= eta ||g(z)||,   z' = z + lambda d

    d comes from GMRES, which needs only products J v with the Jacobian J of f. eta follows Eisenstat and Walker
    (choice 2, with their safeguards): a rough d while the residual falls slowly, then close to quadratic convergence.
    Each sample has its own eta, d and lambda. A line search reduces lambda until ||g|| falls, see
    :mod:`pydeq.solvers.line_search`. A trial point with NaN or Inf, or with a residual far beyond the first one, only
    leads to a shorter step. If there is no descent, as at a singular Jacobian, the sample takes a plain step.

    To find a root of F, solve for a fixed point of z + F(z).

    ``max_steps`` limits the evaluations of f: one per trial point, and the first. A step takes at most ``products``
    products, so a solve takes at most ``products * (max_steps - 1)``. ``solution.products`` counts them for the whole
    batch, apart from ``solution.nfe``.

    Samples must not depend on each other. Evaluations on all ranks of a process group, CUDA graphs, and adjoint
    systems, which are linear, are refused.

    Args:
        products: The most products of a step, at least 1; by default as many as a sample has entries, but at least 40
            and at most 128. GMRES does not restart: it keeps as many vectors. CUDA kernels keep at most 512.
        mode: "jvp": exact products, from two derivatives of f. Every evaluation keeps its graph, and a product costs
            about one to a few evaluations. "difference": J v = (f(z + s v) - f(z)) / s, with s relative to the norm
            of z. Every product costs one evaluation of f, and no graph is kept. "auto" takes exact products, and
            differences if f has no second derivatives, contains an ``autograd.Function``, is compiled, or computes with
            gradients off.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Source: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, chapters 6 and 8; Eisenstat and
    Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996); Knoll and Keyes,
    Jacobian-free Newton-Krylov methods, J. Comput. Phys. 193 (2004), for differences.

    Examples:
        >>> root = pydeq.fixed_point(lambda z: z + z**2 - 2, torch.ones(1), solver=pydeq.NewtonKrylov(), rtol=1e-6)
        >>> root.value
        tensor([1.4142])
    """

    products: int | None = None
    mode: Literal["auto", "jvp", "difference"] = "auto"

    def __post_init__(self) -> None:
        if self.products is not None:
            set_fields(self, products=check_integer("products", self.products, 1))
        if self.mode not in ("auto", "jvp", "difference"):
            raise ValueError(f"mode must be 'auto', 'jvp' or 'difference', got {self.mode!r}")

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return NewtonKrylovWorkspace(flat, rules, max_steps, self)


class NewtonKrylovWorkspace(SearchWorkspace):
    """The workspace: 7 state vectors, and during a step those of GMRES; float32 for half states."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: NewtonKrylov) -> None:
        super().__init__(flat, rules, max_steps, type(solver).__name__)
        self.products = solver.products or max(_PRODUCTS, min(flat.shape[1], _MOST_PRODUCTS))
        check_vectors(flat.device, rules, self.products, self.products + 2, products=self.products)
        self.report = torch.empty(len(Progress), dtype=torch.int64, device="cpu", pin_memory=flat.device.type == "cuda")

    def search_from(self, rows: Tensor, fresh: Tensor) -> Tensor:
        scalars = self.scalars
        found = scalars[:, Scalar.RESIDUAL]
        self.eta = torch.where(rows, self._forcing_term(found, fresh), self.eta)
        target = torch.where(rows, self.eta * found, 1.0)
        right = (self.residual / target.to(self.wide)[:, None]).masked_fill(~rows[:, None], 0.0)
        found, sound = self._solve(right)
        direction = found * target.to(self.wide)[:, None]
        self.direction = torch.where(rows[:, None], direction, self.direction)
        return rows & sound

    def _forcing_term(self, found: Tensor, fresh: Tensor) -> Tensor:
        """eta for the residual norms ``found``, of Eisenstat and Walker's choice 2; [B]."""
        reached = 1.0 - self.length * (1.0 - self.eta)  # the last eta, for a shortened step
        eta = _GAMMA * (found / self.size).square()
        last = _GAMMA * reached.square()
        eta = torch.where(last > _COUNTS_FROM, torch.maximum(eta, last), eta)
        eta = torch.where(fresh, _LARGEST, eta)
        # Do not solve far beyond the tolerance, nor beyond the precision of products.
        rules = self.rules
        enough = 0.5 * (rules.atol + rules.rtol * self.scalars[:, Scalar.NORM]) / found
        return torch.maximum(eta, enough).clamp(min=4.0 * rules.eps**0.5, max=_LARGEST)

    def _solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Solve d = J d + r for each sample to a residual of 1, by one cycle of GMRES from 0.

        The step of GMRES knows the residual of its solution from the products so far. It then asks for the product
        with the solution, to measure it; this is left out.

        Args:
            right: r, [B, D]; 0 for samples that need no solution.

        Returns:
            d, [B, D], and whether a solution was found, [B].
        """
        rules = Rules(0.0, 1.0, self.rules.eps, freeze=True, stall=True)
        inner = GMRES(self.products).start(torch.zeros_like(right), rules, self.products + 2)
        inner.progress = self.report
        counters, scalars = inner.counters, inner.scalars
        status = counters[:, Counter.STATUS]
        solution, known = torch.zeros_like(right), torch.zeros(len(right), dtype=torch.bool, device=right.device)
        first = torch.zeros_like(self.size)
        for j in range(self.products + 1):
            v, next = inner.z[j % 2], inner.z[1 - j % 2]
            inner.step(self.product(v) + right if j else right.clone(), j)
            if j == 0:
                # The points v are unit vectors, not iterates: a large J v is no divergence.
                first = scalars[:, Scalar.FIRST].clone()
                scalars[:, Scalar.FIRST] = torch.inf
            else:
                ends = (status == RUNNING) & (counters[:, Counter.COUNT] == 0) & scalars[:, Scalar.RESIDUAL].isfinite()
                solution = torch.where(ends[:, None], next, solution)
                known |= ends
                status.masked_fill_(ends, int(Status.CONVERGED))
                for buffer in inner.z:
                    buffer.masked_fill_(ends[:, None], 0.0)
            if not bool((status == RUNNING).any()):
                break
        # Points that met the tolerance when they were measured, and the best points where rounding was the limit.
        measured = ~known & (status != RUNNING) & (scalars[:, Scalar.BEST] < first)
        solution = torch.where(measured[:, None], inner.best[0], solution)
        inner.scratch.release()
        return solution, (known | measured) & solution.isfinite().all(1)
