"""Newton's method in a trust region, with the whole Jacobian of each sample: for small systems.

The matrices are small, so the algebra runs on the host: :mod:`pydeq.ops.trust_region_search`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pydeq.arguments import suggests_keywords
from pydeq.ops import picard_step
from pydeq.ops.capture import capturing
from pydeq.ops.constants import TrustFlag, TrustStage
from pydeq.ops.termination import Rules
from pydeq.ops.trust_region_search import Evaluated, TrustRegionSearch
from pydeq.solvers.base import NewtonSolver, Workspace
from pydeq.solvers.line_search import end_search

MOST_ENTRIES = 1024
"""The most entries D of a sample: its matrices have D^2 entries, and a step takes O(D^3) operations."""
_DAMPING = 0.5  # of the plain step that checks samples: below 1, the image of every new best is saved at once


@suggests_keywords
@dataclass(frozen=True)
class TrustRegion(NewtonSolver):
    """Newton's method on g(z) = f(z) - z = 0 in a trust region: for small systems that are hard to solve.

    d = argmin ||g(z) + (J - I) d||  over  ||d|| <= r,   z' = z + d

    The Jacobian J of f is formed at the start. After a step that halves ||g||, Broyden's update takes the place of
    a new one. Each sample has its own radius r: it grows where the linear model is good. Where ||g|| does not fall
    as promised, the point is rejected, and J is formed again, or r shrinks. A Newton step that is not longer than r
    is taken whole. So near a solution with a nonsingular I - J, convergence is superlinear. A sample whose residual
    has not fallen by half in 30 evaluations starts again, once, without updates, if it used any. At a local minimum
    of ||g||, where no step reduces it, the sample takes a plain step.

    For up to a few hundred unknowns, far from a solution, or where I - J is singular or badly scaled there. For larger
    states, and where ||g|| has local minima, there is :class:`pydeq.NewtonKrylov`. To find a root of F, solve for a
    fixed point of z + F(z).

    ``max_steps`` limits the evaluations of f at iterates and trial points. ``solution.products`` counts what the
    Jacobians cost, for the whole batch, apart from ``solution.nfe``: D differences for each, D + 1 evaluations with
    ``vectorize``, or D products and one evaluation, where a sample has D entries. The algebra runs on the host, also
    for states on a GPU.

    Samples must not depend on each other. Evaluations on all ranks of a process group, CUDA graphs, and adjoint
    systems, which are linear, are refused.

    Args:
        mode: "vjp": the rows of J are vector-Jacobian products, formed together where the operators of f can be
            vectorized. "difference": the columns of J are differences, and each costs one evaluation of f. Take it
            where the backward pass of f is not its derivative, or where an evaluation is cheaper than a product.
            "auto" takes products, and differences if f raises with gradients on, computes with gradients off, or has no
            derivatives.
        vectorize: With mode "difference", call f once for all differences, under ``torch.vmap``. That takes the memory
            of D + 1 evaluations, and f must be one that ``torch.vmap`` can map: without random numbers, values that
            decide what is computed, or results kept for later. States of up to 3 entries on a CPU are not mapped, which
            is faster.

    Raises:
        TypeError: If ``vectorize`` is not a bool.
        ValueError: If mode is none of these, or ``vectorize`` is set with another mode than "difference"; in a solve,
            if a sample has more than 1024 entries, or if the result of f has no graph to z with mode "vjp".
        RuntimeError: In a solve with mode "vjp", if f has no derivatives; with ``vectorize``, if f cannot be mapped; in
            a CUDA graph.

    Source: Moré, The Levenberg-Marquardt algorithm: implementation and theory, Numerical Analysis, Springer 1978; Conn,
    Gould and Toint, Trust-Region Methods, SIAM 2000, chapters 6 and 7; Powell, A hybrid method for nonlinear equations,
    Gordon and Breach 1970, for updates between Jacobians.

    Examples:
        >>> root = pydeq.fixed_point(lambda z: z + z**2 - 2, torch.ones(1), solver=pydeq.TrustRegion(), rtol=1e-6)
        >>> root.value
        tensor([1.4142])
    """

    mode: Literal["auto", "vjp", "difference"] = "auto"
    vectorize: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "vjp", "difference"):
            raise ValueError(f"mode must be 'auto', 'vjp' or 'difference', got {self.mode!r}")
        if not isinstance(self.vectorize, bool):
            raise TypeError(f"vectorize must be a bool, got {type(self.vectorize).__name__}")
        if self.vectorize and self.mode != "difference":
            raise ValueError(f"vectorize is for mode='difference', got mode={self.mode!r}")

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return TrustRegionWorkspace(flat, rules, max_steps, self)


class TrustRegionWorkspace(Workspace):
    """The workspace: 5 state vectors, on the host 4 in float64, and for each sample a square matrix.

    Attributes:
        search: The state of the search, on the host.
    """

    reports_late: ClassVar[bool] = False

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: TrustRegion) -> None:
        entries = flat.shape[1]
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"TrustRegion forms the Jacobian of each sample, which has {entries} entries here, and at most"
                f" {MOST_ENTRIES} are allowed: use pydeq.NewtonKrylov()"
            )
        if capturing(flat.device):
            raise RuntimeError(
                "TrustRegion cannot be captured into a CUDA graph, since it waits for the device: solve outside of the"
                " graph, or use pydeq.Anderson or pydeq.Broyden without a line search"
            )
        super().__init__(flat, rules, max_steps)
        self.search = TrustRegionSearch(_host(flat), flat.dtype)

    def step(self, f: Tensor, k: int) -> None:
        left = self.max_steps - 1 - k
        self.take(picard_step, f, k, left == 0, (_DAMPING, 0))  # a plain step, which checks every sample
        if left == 0:
            end_search(self.counters, self.search.flags[TrustFlag.SEARCHING])
            return
        z, next = self.z[k % 2], self.z[1 - k % 2]
        counters, goal = self.counters.cpu(), _host(next)
        at = Evaluated(
            z=_host(z),
            f=_host(f),
            image=_host(self.best[1]),
            next=goal,
            scalars=self.scalars.cpu(),
            counters=counters,
            progress=self.progress,
            left=left,
            freeze=self.rules.freeze,
        )
        stage = self.search.advance(at)
        while stage != TrustStage.DONE:
            self._renew(z, f)
            stage = self.search.advance(at, stage)
        if goal is not next:
            next.copy_(goal)
        if counters is not self.counters:
            self.counters.copy_(counters)

    def _renew(self, z: Tensor, f: Tensor) -> None:
        """Form the Jacobians of the samples that need one, at their accepted points."""
        search = self.search
        points, images = torch.from_numpy(search.base).to(z), torch.from_numpy(search.image).to(z)
        if len(z) > 1:
            renewed = torch.from_numpy(search.flags[TrustFlag.RENEWED]).to(z.device)[:, None]
            points, images = torch.where(renewed, points, z), torch.where(renewed, images, f)
        search.renew(_host(self.jacobian(points, images)))


def _host(x: Tensor) -> Tensor:
    """``x`` in float64 on the CPU, without torch's lazy negation; ``x`` itself if it is so already."""
    return x.to("cpu", torch.float64).resolve_neg()
