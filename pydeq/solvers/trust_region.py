"""Newton's method in a trust region, with the whole Jacobian of each sample: for small systems.

The matrices are small, so the algebra is NumPy's, on the host: there an operation has the least overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pydeq.arguments import suggests_keywords
from pydeq.ops import picard_step
from pydeq.ops.capture import capturing
from pydeq.ops.constants import RUNNING, Counter, Progress, Scalar, Status
from pydeq.ops.termination import Rules
from pydeq.solvers.base import NewtonSolver, Workspace
from pydeq.solvers.line_search import end_search

MOST_ENTRIES = 1024
"""The most entries D of a sample: its matrices have D^2 entries, and a step takes O(D^3) operations."""
# The first radius, in multiples of ||z|| + ||g(z)||.
_FIRST = 100.0
# By the share of the promised reduction of ||g||^2 that a step reached: at least _GOOD, the radius grows to twice the
# step; below _POOR, it shrinks to a half of the step; below _BAD, to a quarter.
_GOOD, _POOR, _BAD = 0.75, 0.25, 0.1
# A step may be longer or shorter than the radius by this share.
_SLACK = 0.1
# Newton steps for the multiplier at most; two or three are usual.
_SECULAR_STEPS = 50
# Singular values below this share of the largest one are taken as 0.
_RANK = np.finfo(np.float64).eps
# After a step that leaves more than this share of ||g||, the next one gets a new Jacobian instead of an update.
_SLOW = 0.5
# Evaluations in which ||g|| must fall by half; if not, the sample starts again, with new Jacobians only.
_PATIENCE = 30
_ALPHA = 1e-4  # of the promised reduction, for a point to be accepted
_TRIALS = 40  # rejected points before a search gives up
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
    Jacobians cost, for the whole batch, apart from ``solution.nfe``: each one evaluation, and as many products as a
    sample has entries. The algebra runs on the host, also for states on a GPU.

    Samples must not depend on each other. Evaluations on all ranks of a process group, CUDA graphs, and adjoint
    systems, which are linear, are refused.

    Args:
        mode: "vjp": the rows of J are vector-Jacobian products, formed together where the operators of f can be
            vectorized. "difference": the columns of J are differences, and each costs one evaluation of f. Take it
            where the backward pass of f is not its derivative. "auto" takes products, and differences if f raises with
            gradients on, computes with gradients off, or has no derivatives.

    Raises:
        ValueError: If mode is none of these; in a solve, if a sample has more than 1024 entries, or if the result of f
            has no graph to z with mode "vjp".
        RuntimeError: In a solve with mode "vjp", if f has no derivatives; in a CUDA graph.

    Source: Moré, The Levenberg-Marquardt algorithm: implementation and theory, Numerical Analysis, Springer 1978; Conn,
    Gould and Toint, Trust-Region Methods, SIAM 2000, chapters 6 and 7; Powell, A hybrid method for nonlinear equations,
    Gordon and Breach 1970, for updates between Jacobians.

    Examples:
        >>> root = pydeq.fixed_point(lambda z: z + z**2 - 2, torch.ones(1), solver=pydeq.TrustRegion(), rtol=1e-6)
        >>> root.value
        tensor([1.4142])
    """

    mode: Literal["auto", "vjp", "difference"] = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "vjp", "difference"):
            raise ValueError(f"mode must be 'auto', 'vjp' or 'difference', got {self.mode!r}")

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return TrustRegionWorkspace(flat, rules, max_steps, self)


class TrustRegionWorkspace(Workspace):
    """The workspace: 5 state vectors, on the host 5 in float64, and for each sample a square matrix.

    With A = I - J, scaled so that its largest entry is 1, and g scaled to length 1, d = u y, where y solves A y = g if
    that is not too long. Otherwise, with A = U diag(s) V^T and a = U^T g,

        y = V (s a / (s^2 + mu))

    for the mu > 0 that makes it as long as the radius. Nothing here overflows or vanishes before z does.

    Attributes:
        base, residual, size: The accepted point x, g(x) and ||g(x)||; [B, D], [B, D], [B].
        system: I - J or its updates, [B, D, D]; ``exact`` says whether it is that at x, bool [B].
        radius, reached, promised: r, ||d||, and the share of ||g(x)|| that d leaves by the model; [B].
        searching: Whether the point being evaluated is a trial, bool [B].
        rejected: Rejected points of the search, [B].
        mark, idle: A residual norm that is to be halved, and the evaluations since it was reached; [B].
        updated, careful: Whether the sample has used updates, and whether it uses no more of them; bool [B].
    """

    reports_late: ClassVar[bool] = False

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: TrustRegion) -> None:
        batch, entries = flat.shape
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
        self.base, self.residual = np.zeros((batch, entries)), np.zeros((batch, entries))
        self.system = np.zeros((batch, entries, entries))
        self.size, self.radius, self.reached, self.promised = (np.zeros(batch) for _ in range(4))
        self.exact, self.searching = np.zeros(batch, dtype=bool), np.zeros(batch, dtype=bool)
        self.rejected = np.zeros(batch, dtype=np.int64)
        self.largest = torch.finfo(flat.dtype).max / 4
        self.begin = _host(flat).copy()
        self.mark, self.idle = np.full(batch, np.inf), np.zeros(batch, dtype=np.int64)
        self.careful, self.updated = np.zeros(batch, dtype=bool), np.zeros(batch, dtype=bool)

    def step(self, f: Tensor, k: int) -> None:
        left = self.max_steps - 1 - k
        self.take(picard_step, f, k, left == 0, (_DAMPING, 0))  # a plain step, which checks every sample
        if left == 0:
            end_search(self.counters, self.searching)
            return
        with np.errstate(all="ignore"):
            self._search(f, self.z[k % 2], self.z[1 - k % 2], left)

    def _search(self, f: Tensor, z: Tensor, next: Tensor, left: int) -> None:
        """Accept or reject the points ``z`` [B, D] with images ``f``, and write the next ones to ``next``."""
        counters, point, goal = self.counters.cpu().numpy(), _host(z), _host(next)
        status, tried = counters[:, Counter.STATUS], counters[:, Counter.TRIED]
        found = self.scalars.cpu().numpy()[:, Scalar.RESIDUAL]
        # A trial may go far beyond the first residual: the search comes back from it.
        back = self.searching & (status == Status.DIVERGED)
        if back.any():
            status[back] = RUNNING
            self.progress[Progress.RUNNING] += int(back.sum())
        running = status == RUNNING
        enough = (1.0 - _ALPHA * (1.0 - self.promised)) * self.size
        accepted = running & np.isfinite(found) & (~self.searching | (found <= enough))
        rejected = running & self.searching & ~accepted
        lost = running & ~accepted & ~rejected & (tried == 1)
        if lost.any():  # the first step of a retry is a plain one
            goal[lost] = _host(self.best[1])[lost]
        self.rejected[rejected] += 1

        fresh = accepted & ~self.searching
        self._adapt(found, accepted & self.searching, rejected)
        slow = (found > _SLOW * self.size) | self.careful
        renewed = fresh | (accepted & slow) | (rejected & ~self.exact)
        if accepted.any():
            self._move(accepted, accepted & ~renewed, point, _host(f), found)
        if fresh.any():
            first = _FIRST * (_norm(self.base[fresh]) + found[fresh])
            self.radius[fresh] = np.minimum(first, self.largest)
        self.rejected[accepted] = 0
        if renewed.any():
            self._renew(renewed, z)
        wanted = accepted | (rejected & (self.rejected <= _TRIALS))
        searching = self._aim(wanted, goal, z.dtype)
        renewed = wanted & ~searching & ~self.exact  # an update may be the reason
        if renewed.any():
            self._renew(renewed, z)
            searching |= self._aim(renewed, goal, z.dtype)
        plain = (accepted | rejected) & ~searching
        if plain.any():
            goal[plain] = np.where(accepted[:, None], _host(f), self.base + self.residual)[plain]
        # A retry would take the same plain step.
        tried[accepted | rejected] = 0
        tried[plain & (rejected | (counters[:, Counter.SINCE_BEST] == 0))] = 1
        again = self._stuck(running, plain & rejected, accepted, found) & (left > _PATIENCE)
        if again.any():
            goal[again] = self.begin[again]
            searching[again] = False
            tried[again] = 0
            self.careful |= again
        if not self.rules.freeze:  # a sample that is done waits at its value until others are, or have moved it
            goal[~running] = point[~running]
        self.searching = searching
        next.copy_(torch.from_numpy(goal))
        if self.counters.device.type != "cpu":
            self.counters.copy_(torch.from_numpy(counters))

    def _stuck(self, running: Any, failed: Any, accepted: Any, found: Any) -> Any:
        """Samples that make no progress, and have used updates; bool [B].

        Args:
            failed: Those whose search has failed: they go on from a plain step, without updates.
        """
        better = accepted & (found < 0.5 * self.mark)
        self.mark = np.where(better, found, self.mark)
        self.idle = np.where(better, 0, self.idle + 1)
        stuck = running & self.updated & ~self.careful & (self.idle >= _PATIENCE)
        self.careful |= failed
        rest = ~running | failed | stuck  # a sample that waits may be moved later
        self.mark[rest], self.idle[rest] = np.inf, 0
        return stuck & ~failed

    def _adapt(self, found: Any, accepted: Any, rejected: Any) -> None:
        """Set the radius after trials with residual norms ``found``: those accepted and those rejected, bool [B]."""
        rows = accepted | (rejected & self.exact)
        share = (1.0 - (found / self.size) ** 2) / (1.0 - self.promised**2)
        share[~np.isfinite(share)] = -np.inf
        smaller = np.where(share < _BAD, 0.25, 0.5) * np.minimum(self.radius, self.reached)
        larger = np.minimum(np.maximum(self.radius, 2.0 * self.reached), self.largest)
        radius = np.where(share >= _GOOD, larger, np.where(share >= _POOR, self.radius, smaller))
        self.radius[rows] = radius[rows]

    def _move(self, rows: Any, updated: Any, point: Any, image: Any, found: Any) -> None:
        """Take points of some rows as the accepted ones; update the matrices of those ``updated``, bool [B] each."""
        residual = image - point
        if updated.any():
            step, fall = (point - self.base)[updated], (self.residual - residual)[updated]
            system, length = self.system[updated], _norm(step)[:, None]
            wrong = (fall - _times(system, step)) / length
            self.system[updated] = system + wrong[:, :, None] * (step / length)[:, None]
            self.updated |= updated
        self.base[rows], self.residual[rows], self.size[rows] = point[rows], residual[rows], found[rows]
        self.exact[rows] = False

    def _renew(self, rows: Any, z: Tensor) -> None:
        """Form the Jacobians of some rows, bool [B], at their accepted points."""
        points = torch.from_numpy(np.where(rows[:, None], self.base, _host(z))).to(z)
        jacobian = _host(self.jacobian(points))
        self.system[rows] = np.eye(jacobian.shape[1]) - jacobian[rows]
        self.exact[rows] = True

    def _aim(self, wanted: Any, goal: Any, dtype: torch.dtype) -> Any:
        """Write the trial points of the rows ``wanted``, bool [B], to ``goal`` [B, D]; returns which rows have one."""
        rows = wanted.nonzero()[0]
        if len(rows) == 0:
            return np.zeros_like(wanted)
        trial = self._trials(rows)
        if dtype != torch.float64:
            trial = _host(torch.from_numpy(trial).to(dtype))
        usable = np.isfinite(trial).all(1) & (trial != self.base[rows]).any(1) & (self.promised[rows] < 1.0)
        goal[rows[usable]] = trial[usable]
        found = np.zeros_like(wanted)
        found[rows[usable]] = True
        return found

    def _trials(self, rows: Any) -> Any:
        """The trial points of some rows, [n, D], NaN without one; sets ``reached`` and ``promised``."""
        system, residual, size = self.system[rows], self.residual[rows], self.size[rows]
        scale = np.abs(system).max(axis=(1, 2))
        unit = size / scale
        system, right = system / scale[:, None, None], residual / size[:, None]
        sound = np.isfinite(system).all(axis=(1, 2)) & np.isfinite(unit) & (unit > 0)
        system[~sound] = np.eye(system.shape[1])
        radius = self.radius[rows] / unit
        step = _solve(system, right)
        long = sound & ~(_norm(step) <= (1.0 + _SLACK) * radius)  # also where it is not finite
        if long.any():
            step[long] = restricted(system[long], right[long], radius[long])
        self.promised[rows] = _norm(right - _times(system, step))
        self.reached[rows] = _norm(step) * unit
        return np.where(sound[:, None], self.base[rows] + step * unit[:, None], np.nan)


def restricted(system: Any, right: Any, radius: Any) -> Any:
    """y = argmin ||g - A y|| over ||y|| <= r up to a tenth of r, for A [n, D, D], g [n, D] and r [n]."""
    left, values, rows = _decompose(system)
    largest = values[:, :1]
    values, along = values / largest, _times(left.transpose(0, 2, 1), right)
    step = filtered(values, along, multiplier(values, along, radius * largest[:, 0]))
    return _times(rows.transpose(0, 2, 1), step) / largest


def filtered(values: Any, along: Any, mu: Any) -> Any:
    """s a / (s^2 + mu) for s and a [n, D] and mu [n]; 0 where s is 0 up to rounding."""
    kept = values > _RANK
    divisor = np.where(kept, values, 1.0)
    return np.where(kept, along / (divisor + mu[:, None] / divisor), 0.0)


def multiplier(values: Any, along: Any, radius: Any) -> Any:
    """The mu >= 0 for which ||s a / (s^2 + mu)|| is r up to a tenth, or 0 if that of mu = 0 is below 1.1 r; [n].

    Newton's method on 1 / ||y|| = 1 / r. The left side is concave in mu, and so the iterates rise to the solution
    (Conn, Gould and Toint, section 7.3) from a bound below it: no entry of y is longer than r.
    """
    mu = np.zeros_like(radius)
    for k in range(_SECULAR_STEPS):
        step = filtered(values, along, mu)
        length = _norm(step)
        long = length > (1.0 + _SLACK) * radius
        if not long.any():
            break
        if k == 0:
            bound = (values * (np.abs(along) / radius[:, None] - values)).max(axis=1)
            mu = np.where(long, np.maximum(bound, 0.0), mu)
        else:
            weight = np.where(step != 0, values**2 + mu[:, None], 1.0)
            share = ((step / np.where(long, length, 1.0)[:, None]) ** 2 / weight).sum(axis=1)
            mu = np.where(long, mu + (length - radius) / (radius * np.where(long, share, 1.0)), mu)
    return mu


def _host(x: Tensor) -> Any:
    """An array in float64, which shares the memory of a float64 tensor on a CPU."""
    return x.detach().cpu().double().numpy()


def _times(matrices: Any, vectors: Any) -> Any:
    """A x for A [n, D, D] and x [n, D]."""
    return np.matmul(matrices, vectors[:, :, None])[:, :, 0]


def _norm(x: Any) -> Any:
    """The norms of rows [n, D], which overflow and vanish no earlier than the entries."""
    largest = np.abs(x).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest, 1.0)
    return scale * np.sqrt(((x / scale[:, None]) ** 2).sum(axis=1))


def _solve(matrices: Any, right: Any) -> Any:
    """A^-1 x for A [n, D, D] and x [n, D]; NaN where A is singular."""
    try:
        return np.linalg.solve(matrices, right[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        if len(matrices) == 1:
            return np.full_like(right, np.nan)
        return np.concatenate([_solve(a[None], x[None]) for a, x in zip(matrices, right, strict=True)])


def _decompose(matrices: Any) -> Any:
    """The singular value decompositions of [n, D, D]; NaN where one does not converge."""
    try:
        return np.linalg.svd(matrices)
    except np.linalg.LinAlgError:
        if len(matrices) == 1:
            nothing = np.full_like(matrices, np.nan)
            return nothing, nothing[:, 0], nothing
        return tuple(map(np.concatenate, zip(*(_decompose(one[None]) for one in matrices), strict=True)))
