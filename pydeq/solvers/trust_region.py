"""Newton's method in a trust region, with the whole Jacobian of each sample: for small systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pydeq.arguments import suggests_keywords
from pydeq.ops.constants import Scalar
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Solver, Workspace
from pydeq.solvers.line_search import SearchWorkspace

MOST_ENTRIES = 1024
"""The most entries of a sample: its matrices have the square of it, and a step takes the cube."""
# The first radius, in multiples of ||z|| + ||g(z)||, as MINPACK's factor.
_FIRST = 100.0
# Of the reduction of ||g||^2 that the linear model promises: below the first share the region shrinks, and further
# below the second one; above the third one it grows.
_POOR, _BAD, _GOOD = 0.25, 0.1, 0.75
# The length of a step may miss the radius by this share.
_SLACK = 0.1
_SECULAR_STEPS = 50


@suggests_keywords
@dataclass(frozen=True)
class TrustRegion(Solver):
    """Newton's method on g(z) = f(z) - z = 0 in a trust region: the most robust solver, for small states.

    d = argmin ||g(z) + (J - I) d||  over  ||d|| <= r,   z' = z + d

    The Jacobian J of f is formed in every step, and d comes from a singular value decomposition of J - I. Each sample
    has its own radius r: it grows where the linear model is good, and shrinks where ||g|| does not fall as promised.
    Where the model is good enough for full steps, they are Newton steps, and convergence is quadratic. If no radius
    gives a descent, as at a local minimum of ||g||, the sample takes a plain step.

    For systems of a few to some hundred unknowns, far from a solution or with a singular Jacobian at the solution. For
    larger states there is :class:`pydeq.NewtonKrylov`. To find a root of F, solve for a fixed point of z + F(z).

    ``max_steps`` limits the evaluations of f: one per trial point, and the first. ``solution.products`` counts products
    with the Jacobian for the whole batch, apart from ``solution.nfe``: as many as a sample has entries for each J.

    Samples must not depend on each other. Evaluations on all ranks of a process group, CUDA graphs, and adjoint
    systems, which are linear, are refused.

    Args:
        mode: "vjp": the rows of J are vector-Jacobian products, formed at once where the operators of f can be
            vectorized. Every evaluation keeps its graph. "difference": the columns of J are differences; each costs one
            evaluation of f, and no graph is kept. "auto" takes products, and differences if f has no derivatives.

    Raises:
        ValueError: If mode is none of these; in a solve, if a sample has more than 1024 entries.

    Source: Moré, The Levenberg-Marquardt algorithm: implementation and theory, Numerical Analysis, Springer 1978, with
    MINPACK's constants, but without its scaling of the unknowns; Conn, Gould and Toint, Trust-Region Methods, SIAM
    2000, chapters 6 and 7.

    Examples:
        >>> root = pydeq.fixed_point(lambda z: z + z**2 - 2, torch.ones(1), solver=pydeq.TrustRegion(), rtol=1e-6)
        >>> root.value
        tensor([1.4142])
    """

    takes: ClassVar[Literal["images", "products", "jacobian"]] = "jacobian"

    mode: Literal["auto", "vjp", "difference"] = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "vjp", "difference"):
            raise ValueError(f"mode must be 'auto', 'vjp' or 'difference', got {self.mode!r}")

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        entries = flat.shape[1]
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"TrustRegion forms the Jacobian of each sample, which has {entries} entries here, and at most"
                f" {MOST_ENTRIES} are allowed: use pydeq.NewtonKrylov()"
            )
        return _TrustRegionWorkspace(flat, rules, max_steps, type(self).__name__)


class _TrustRegionWorkspace(SearchWorkspace):
    """The workspace: 7 state vectors, and for each sample a square matrix in float64.

    With I - J = U diag(s) V^T at the accepted point, the step for a multiplier mu >= 0 is V (s a / (s^2 + mu)), where
    a = U^T g. Its length falls as mu grows.
    """

    trials: ClassVar[int] = 20

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, name: str) -> None:
        super().__init__(flat, rules, max_steps, name)
        batch, entries = flat.shape
        self.radius = flat.new_zeros(batch, dtype=torch.float64)
        self.values, self.along = (flat.new_zeros(batch, entries, dtype=torch.float64) for _ in range(2))  # s, a
        self.right = flat.new_zeros(batch, entries, entries, dtype=torch.float64)  # V^T

    def search_from(self, rows: Tensor, fresh: Tensor) -> Tensor:
        found = self.scalars[:, Scalar.RESIDUAL]
        # A full step in the direction of g must fit.
        first = _FIRST * (self.base.double().norm(dim=1) + found)
        self.radius = torch.where(fresh, first, torch.where(rows, self._adapted(found), self.radius))
        system = torch.eye(self.base.shape[1], dtype=torch.float64, device=found.device) - self.jacobian().double()
        sound = rows & system.isfinite().flatten(1).all(1)
        chosen = sound.nonzero()[:, 0]
        if len(chosen):
            left, values, right = torch.linalg.svd(system[chosen])
            along = (left.mT @ self.residual[chosen].double().unsqueeze(2)).squeeze(2)
            for kept, new in ((self.values, values), (self.along, along), (self.right, right)):
                kept.index_copy_(0, chosen, new)
            self._aim(sound, found)
        return sound & (self.eta < 1.0)

    def shorten(self, rejected: Tensor, found: Tensor, finite: Tensor) -> None:
        self.radius = torch.where(rejected, self._adapted(torch.where(finite, found, torch.inf)), self.radius)
        if self.some(rejected):
            self._aim(rejected, self.size)

    def _adapted(self, found: Tensor) -> Tensor:
        """The radius after a step to a point where the residual norm is ``found``, [B]."""
        share = (1.0 - (found / self.size).square()) / (1.0 - self.eta.square())
        reached = self.direction.double().norm(dim=1)
        smaller = torch.where(share < _BAD, 0.25, 0.5) * torch.minimum(self.radius, reached)
        larger = torch.maximum(self.radius, 2.0 * reached)
        return torch.where(share >= _GOOD, larger, torch.where(share >= _POOR, self.radius, smaller))

    def _aim(self, rows: Tensor, size: Tensor) -> None:
        """Set the steps of some samples, whose residual norm is ``size``, and the residuals that they promise."""
        mu = _multiplier(self.values, self.along, self.radius)[:, None]
        step = _filtered(self.values, self.along, mu)
        direction = (self.right.mT @ step.unsqueeze(2)).squeeze(2)
        self.direction = torch.where(rows[:, None], direction.to(self.wide), self.direction)
        promised = (self.along - self.values * step).norm(dim=1) / size
        self.eta = torch.where(rows, promised.clamp(max=1.0), self.eta)


def _filtered(values: Tensor, along: Tensor, mu: Tensor) -> Tensor:
    """s a / (s^2 + mu) for each entry; 0 where s is 0."""
    return torch.where(values > 0, values * along / (values.square() + mu), 0.0)


def _multiplier(values: Tensor, along: Tensor, radius: Tensor) -> Tensor:
    """The mu >= 0 with ||s a / (s^2 + mu)|| = r, up to a tenth, or 0 if that of mu = 0 is shorter; [B].

    Newton's method on 1 / ||s a / (s^2 + mu)|| = 1 / r. The left side is concave in mu, and so the iterates rise to the
    solution (Conn, Gould and Toint, section 7.3) from a bound below it: no entry of the step is longer than r.
    """
    mu = ((values * along).abs() / radius[:, None] - values.square()).amax(1).clamp(min=0.0)
    for _ in range(_SECULAR_STEPS):
        step = _filtered(values, along, mu[:, None])
        length = step.norm(dim=1)
        long = length > (1.0 + _SLACK) * radius
        if not bool(long.any()):
            break
        slope = torch.where(step != 0, step.square() / (values.square() + mu[:, None]), 0.0).sum(1) / length
        mu = torch.where(long, mu + (length - radius) / radius * length / slope, mu)
    return mu
