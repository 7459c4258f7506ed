"""The search of a trust-region method with dense matrices, on the host; :mod:`pydeq.solvers.trust_region` explains it.

A search runs in stages, since only the caller can form a Jacobian: it stops where it needs one, and goes on with it.
For small samples there is a kernel, which the loop calls by ctypes; this is the reference, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydeq.ops import kernels
from pydeq.ops.constants import (
    RUNNING,
    TRUST_ARMIJO,
    TRUST_BAD,
    TRUST_ENTRIES,
    TRUST_FIRST,
    TRUST_GOOD,
    TRUST_PATIENCE,
    TRUST_POOR,
    TRUST_RANK,
    TRUST_SECULAR_STEPS,
    TRUST_SLACK,
    TRUST_SLOW,
    TRUST_TRIALS,
    Counter,
    Progress,
    Scalar,
    Status,
    TrustCount,
    TrustFlag,
    TrustNumber,
    TrustStage,
)
from pydeq.ops.reduction import host_norm


@dataclass(slots=True)
class Evaluated:
    """What a step starts from, and where it writes the next points. All is on the host.

    Args:
        z, f: The points and their images, float64 [B, D].
        image: Images of the best iterates, float64 [B, D].
        next: On entry the plain steps of samples that need one, on exit the next points; float64 [B, D].
        scalars, counters, progress: As in :class:`pydeq.ops.step.Step`, after samples were judged.
        left: Evaluations that follow.
        freeze: Whether samples that are done stay where they are; if not, they wait at their point.
    """

    z: Tensor
    f: Tensor
    image: Tensor
    next: Tensor
    scalars: Tensor
    counters: Tensor
    progress: Tensor
    left: int
    freeze: bool


class TrustRegionSearch:
    """The state of the searches of B samples with D entries, and their steps.

    With A = I - J, scaled so that its largest entry is 1, and g scaled to length 1, d = u y, where y solves A y = g if
    that is not too long. Otherwise, with A = U diag(s) V^T and a = U^T g,

        y = V (s a / (s^2 + mu))

    for the mu > 0 that makes it as long as the radius. Nothing here overflows or vanishes before z does.

    Args:
        begin: The first points, float64 [B, D].
        dtype: That of the states: trial points are rounded to it.

    Attributes:
        begin, base, image, residual: The first point, the accepted one x, f(x) and g(x); [B, D].
        system: I - J or its updates, [B, D, D].
        numbers, counts, flags: By rows, see :class:`pydeq.ops.constants.TrustNumber`, ``TrustCount`` and ``TrustFlag``.
    """

    def __init__(self, begin: Tensor, dtype: torch.dtype) -> None:
        batch, entries = begin.shape
        self.dtype, self.largest = dtype, torch.finfo(dtype).max / 4
        self.vectors = np.zeros((4, batch, entries))
        self.begin, self.base, self.image, self.residual = self.vectors
        self.begin[:] = begin.numpy()
        self.system = np.zeros((batch, entries, entries))
        self.numbers = np.zeros((len(TrustNumber), batch))
        self.size, self.radius, self.reached, self.promised, self.mark = self.numbers
        self.counts = np.zeros((len(TrustCount), batch), dtype=np.int64)
        self.rejected, self.idle = self.counts
        self.flags = np.zeros((len(TrustFlag), batch), dtype=bool)
        self.mark[:] = np.inf
        small = 0 < entries <= TRUST_ENTRIES and dtype in (torch.float64, torch.float32)
        self._kernel = kernels.trust_region_search() if small else None
        if self._kernel is not None:
            arrays = (self.vectors, self.system, self.numbers, self.counts, self.flags)
            self._state = (*(array.ctypes.data for array in arrays), batch, entries)

    def advance(self, at: Evaluated, stage: int = TrustStage.FIRST) -> int:
        """Accept or reject the points that were evaluated, and find the next ones, from ``stage`` on.

        Returns:
            ``TrustStage.DONE``; or the stage to go on with, once the samples flagged RENEWED have their Jacobians, by
            ``renew``.
        """
        if self._kernel is None:
            with np.errstate(all="ignore"):
                return self.advance_reference(at, stage)
        return self._kernel(
            stage, at.z.data_ptr(), at.f.data_ptr(), at.image.data_ptr(), at.next.data_ptr(), at.scalars.data_ptr(),
            at.counters.data_ptr(), at.progress.data_ptr(), *self._state, at.left, self.largest, at.freeze,
            self.dtype is torch.float32,
        )  # fmt: skip

    def renew(self, jacobian: Tensor) -> None:
        """Take the Jacobians [B, D, D] of the samples that are flagged RENEWED."""
        rows = self.flags[TrustFlag.RENEWED]
        self.system[rows] = np.eye(jacobian.shape[1]) - jacobian.numpy()[rows]
        self.flags[TrustFlag.EXACT] |= rows

    # --- The reference -----------------------------------------------------------------------------------------------

    def advance_reference(self, at: Evaluated, stage: int) -> int:
        """``advance`` without the kernel."""
        if stage == TrustStage.FIRST and self._judge(at):
            return TrustStage.AGAIN
        if stage <= TrustStage.AGAIN and self._aim_all(at):
            return TrustStage.AFTER_UPDATES
        if stage == TrustStage.AFTER_UPDATES:
            self._aim(self.flags[TrustFlag.RENEWED], at)
        self._finish(at)
        return TrustStage.DONE

    def _judge(self, at: Evaluated) -> bool:
        """Accept and reject points. Return whether a sample needs its Jacobian."""
        flags, counters, found = self.flags, at.counters.numpy(), at.scalars.numpy()[:, Scalar.RESIDUAL]
        status, searching, exact = counters[:, Counter.STATUS], flags[TrustFlag.SEARCHING], flags[TrustFlag.EXACT]
        # A trial may go far beyond the first residual: the search comes back from it.
        back = searching & (status == Status.DIVERGED)
        if back.any():
            status[back] = RUNNING
            at.progress[Progress.RUNNING] += int(back.sum())
        running = status == RUNNING
        enough = (1.0 - TRUST_ARMIJO * (1.0 - self.promised)) * self.size
        accepted = running & np.isfinite(found) & (~searching | (found <= enough))
        refused = running & searching & ~accepted
        lost = running & ~accepted & ~refused & (counters[:, Counter.TRIED] == 1)
        if lost.any():  # the first step of a retry is a plain one
            at.next.numpy()[lost] = at.image.numpy()[lost]
        self.rejected[refused] += 1

        fresh = accepted & ~searching
        self._adapt(found, accepted & searching, refused)
        slow = (found > TRUST_SLOW * self.size) | flags[TrustFlag.CAREFUL]
        renewed = fresh | (accepted & slow) | (refused & ~exact)
        if accepted.any():
            self._move(accepted, accepted & ~renewed, at.z.numpy(), at.f.numpy(), found)
        if fresh.any():
            first = TRUST_FIRST * (host_norm(self.base[fresh]) + found[fresh])
            self.radius[fresh] = np.minimum(first, self.largest)
        self.rejected[accepted] = 0
        flags[TrustFlag.RUNNING], flags[TrustFlag.ACCEPTED], flags[TrustFlag.REFUSED] = running, accepted, refused
        flags[TrustFlag.WANTED] = accepted | (refused & (self.rejected <= TRUST_TRIALS))
        flags[TrustFlag.RENEWED] = renewed
        flags[TrustFlag.SEARCHING] = False
        return bool(renewed.any())

    def _aim_all(self, at: Evaluated) -> bool:
        """Write the trial points of all samples that need one. Return whether a sample needs its Jacobian for one.

        It does if its matrix is an update and no trial point comes from it. It is then flagged RENEWED.
        """
        flags = self.flags
        self._aim(flags[TrustFlag.WANTED], at)
        renewed = flags[TrustFlag.WANTED] & ~flags[TrustFlag.SEARCHING] & ~flags[TrustFlag.EXACT]
        flags[TrustFlag.RENEWED] = renewed
        return bool(renewed.any())

    def _finish(self, at: Evaluated) -> None:
        """Write the next points of samples without a trial point."""
        flags, counters, found = self.flags, at.counters.numpy(), at.scalars.numpy()[:, Scalar.RESIDUAL]
        goal, tried = at.next.numpy(), counters[:, Counter.TRIED]
        running, accepted, refused = flags[TrustFlag.RUNNING], flags[TrustFlag.ACCEPTED], flags[TrustFlag.REFUSED]
        plain = (accepted | refused) & ~flags[TrustFlag.SEARCHING]
        if plain.any():
            goal[plain] = self.image[plain]
        # A retry would take the same plain step.
        tried[accepted | refused] = 0
        tried[plain & (refused | (counters[:, Counter.SINCE_BEST] == 0))] = 1
        again = self.stuck(running, plain & refused, accepted, found) & (at.left > TRUST_PATIENCE)
        if again.any():
            goal[again] = self.begin[again]
            flags[TrustFlag.SEARCHING] &= ~again
            tried[again] = 0
            flags[TrustFlag.CAREFUL] |= again
        if not at.freeze:  # a sample that is done waits at its value until others are, or have moved it
            goal[~running] = at.z.numpy()[~running]

    def stuck(self, running: Any, failed: Any, accepted: Any, found: Any) -> Any:
        """Samples that make no progress, and have used updates; bool [B].

        Args:
            failed: Those whose search has failed: they go on from a plain step, without updates.
        """
        better = accepted & (found < 0.5 * self.mark)
        self.mark[better] = found[better]
        self.idle[:] = np.where(better, 0, self.idle + 1)
        careful = self.flags[TrustFlag.CAREFUL]
        stuck = running & self.flags[TrustFlag.UPDATED] & ~careful & (self.idle >= TRUST_PATIENCE)
        careful |= failed
        rest = ~running | failed | stuck  # a sample that waits may be moved later
        self.mark[rest], self.idle[rest] = np.inf, 0
        return stuck & ~failed

    def _adapt(self, found: Any, accepted: Any, refused: Any) -> None:
        """Set the radius after trials with residual norms ``found``: those accepted and those refused, bool [B]."""
        rows = accepted | (refused & self.flags[TrustFlag.EXACT])
        share = (1.0 - (found / self.size) ** 2) / (1.0 - self.promised**2)
        share[~np.isfinite(share)] = -np.inf
        smaller = np.where(share < TRUST_BAD, 0.25, 0.5) * np.minimum(self.radius, self.reached)
        larger = np.minimum(np.maximum(self.radius, 2.0 * self.reached), self.largest)
        radius = np.where(share >= TRUST_GOOD, larger, np.where(share >= TRUST_POOR, self.radius, smaller))
        self.radius[rows] = radius[rows]

    def _move(self, rows: Any, updated: Any, point: Any, image: Any, found: Any) -> None:
        """Take points of some rows as the accepted ones; update the matrices of those ``updated``, bool [B] each."""
        residual = image - point
        if updated.any():
            step, fall = (point - self.base)[updated], (self.residual - residual)[updated]
            system, length = self.system[updated], host_norm(step)[:, None]
            wrong = (fall - _times(system, step)) / length
            self.system[updated] = system + wrong[:, :, None] * (step / length)[:, None]
            self.flags[TrustFlag.UPDATED] |= updated
        self.base[rows], self.image[rows] = point[rows], image[rows]
        self.residual[rows], self.size[rows] = residual[rows], found[rows]
        self.flags[TrustFlag.EXACT] &= ~rows

    def _aim(self, wanted: Any, at: Evaluated) -> None:
        """Write the trial points of the rows ``wanted``, bool [B], and flag those that have one as SEARCHING."""
        rows = wanted.nonzero()[0]
        if len(rows) == 0:
            return
        trial = self._trials(rows)
        if self.dtype != torch.float64:
            trial = torch.from_numpy(trial).to(self.dtype).double().numpy()
        usable = np.isfinite(trial).all(1) & (trial != self.base[rows]).any(1) & (self.promised[rows] < 1.0)
        at.next.numpy()[rows[usable]] = trial[usable]
        self.flags[TrustFlag.SEARCHING, rows[usable]] = True

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
        long = sound & ~(host_norm(step) <= (1.0 + TRUST_SLACK) * radius)  # also where it is not finite
        if long.any():
            step[long] = restricted(system[long], right[long], radius[long])
        self.promised[rows[sound]] = host_norm(right - _times(system, step))[sound]
        self.reached[rows[sound]] = (host_norm(step) * unit)[sound]
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
    kept = values > TRUST_RANK
    divisor = np.where(kept, values, 1.0)
    return np.where(kept, along / (divisor + mu[:, None] / divisor), 0.0)


def multiplier(values: Any, along: Any, radius: Any) -> Any:
    """The mu >= 0 for which ||s a / (s^2 + mu)|| is r up to a tenth, or 0 if that of mu = 0 is below 1.1 r; [n].

    Newton's method on 1 / ||y|| = 1 / r. The left side is concave in mu, and so the iterates rise to the solution
    (Conn, Gould and Toint, section 7.3) from a bound below it: no entry of y is longer than r.
    """
    mu = np.zeros_like(radius)
    for k in range(TRUST_SECULAR_STEPS):
        step = filtered(values, along, mu)
        length = host_norm(step)
        long = length > (1.0 + TRUST_SLACK) * radius
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


def _times(matrices: Any, vectors: Any) -> Any:
    """A x for A [n, D, D] and x [n, D]."""
    return np.matmul(matrices, vectors[:, :, None])[:, :, 0]


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
