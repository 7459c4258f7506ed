"""A line search for each sample: the workspace of solvers that only accept steps that reduce the residual.

The search goes along a direction d from an accepted point x with g(x) = f(x) - x, where the linear model promises
||g(x + d)|| <= eta ||g(x)||. It tries lambda = 1 first, and accepts the first lambda with

    ||g(x + lambda d)|| <= (1 - alpha lambda (1 - eta)) ||g(x)||,   alpha = 1e-4

After a rejection, t = lambda is replaced by the minimizer of the parabola that has the value and the slope of
||g(x + t d)||^2 at 0 and its value at lambda, but at least by 0.1 lambda and at most by 0.5 lambda. Values that are not
finite give 0.1 lambda. The slope is -2 (1 - eta^2) ||g(x)||^2, since the residual of GMRES is orthogonal to J d - d.

A lambda below 0.1 is a sign of a singular Jacobian, or of a local minimum of ||g|| nearby. After such a step the first
trial of the next search is accepted at any finite residual, as in the watchdog technique. Without this, most searches
on tanh(W z + x) with W of spectral radius 3 end at a local minimum, also with exact Newton steps. If that trial is not
finite and lambda ends below 0.1 again, or if all trials of a search fail, the sample takes a plain step, which is
accepted at any residual, too. A solver may accept the last trial instead. The best iterate is kept in all cases.

Each trial is one evaluation of fn, for all samples at once: one sample may be at its third trial while another one
takes its next step.

Source: Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996),
algorithm INB; Kelley, Solving Nonlinear Equations with Newton's Method, SIAM 2003, section 1.6; Chamberlain, Powell,
Lemarechal and Pedersen, The watchdog technique, Math. Prog. Study 16 (1982).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydeq.ops import picard_step
from pydeq.ops.capture import capturing
from pydeq.ops.constants import RUNNING, Counter, Progress, Scalar, Status
from pydeq.ops.reduction import wide_dtype
from pydeq.ops.termination import Rules
from pydeq.solvers.base import Workspace
from pydeq.solvers.buffers import empty

_ALPHA = 1e-4
_SHORTEST, _LONGEST = 0.1, 0.5
# After a step with a smaller lambda, the next first trial is accepted.
_SMALL = 0.1
# The damping of the plain step that checks samples: with a damping below 1, the image of every new best is saved at
# once.
_DAMPING = 0.5


def end_search(counters: Tensor, searching: Any) -> None:
    """Let samples that are DIVERGED by a last trial end as MAX_STEPS; ``searching`` says which had one, bool [B]."""
    status = counters[:, Counter.STATUS]
    trial = torch.as_tensor(searching, device=status.device)
    status.masked_fill_(trial & (status == Status.DIVERGED), int(Status.MAX_STEPS))


class SearchWorkspace(Workspace):
    """7 state vectors next to f: those of Picard iteration, and x, g(x) and d; float32 for half states.

    Args:
        name: The solver, for an error message.
    """

    reports_late: ClassVar[bool] = False
    trials: ClassVar[int] = 12
    """Rejected trials before the search gives up."""
    accepts_last: ClassVar[bool] = False
    """Whether one more trial is then accepted if it is finite, instead of a plain step."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, name: str) -> None:
        if capturing(flat.device):
            raise RuntimeError(
                f"{name} cannot be captured into a CUDA graph: its search waits for the device; solve outside of the"
                " graph, or use pydeq.Anderson or pydeq.Broyden without a line search"
            )
        super().__init__(flat, rules, max_steps)
        self.wide = wide_dtype(flat.dtype)
        self.base = empty(flat, *flat.shape, dtype=self.wide)
        self.residual = torch.zeros_like(self.base)
        self.direction = torch.zeros_like(self.base)
        batch = flat.shape[0]
        # Of the search of each sample: ||g(x)||, eta, lambda, and the number of rejected trials.
        self.size, self.eta, self.length = (flat.new_zeros(batch, dtype=torch.float64) for _ in range(3))
        self.rejected = flat.new_zeros(batch, dtype=torch.int32)
        self.searching = flat.new_zeros(batch, dtype=torch.bool)  # the point being evaluated is a trial
        self.leaping = flat.new_zeros(batch, dtype=torch.bool)  # it is accepted if it is finite
        self.leapt = flat.new_zeros(batch, dtype=torch.bool)  # the search began with such a trial, in vain

    @abstractmethod
    def search_from(self, rows: Tensor, fresh: Tensor) -> Tensor:
        """Set ``direction`` and ``eta`` for new searches from ``base``, where the residual is ``residual``.

        Args:
            rows: The samples that start a search, bool [B].
            fresh: Those among them whose point was not found by a search.

        Returns:
            The samples that have a direction, bool [B]. The others take a plain step.
        """

    def step(self, f: Tensor, k: int) -> None:
        z, next, counters, scalars = self.z[k % 2], self.z[1 - k % 2], self.counters, self.scalars
        # A plain step, which checks every sample.
        self.take(picard_step, f, k, k + 1 == self.max_steps, (_DAMPING, 0))
        if k + 1 == self.max_steps:
            end_search(self.counters, self.searching)
            return
        status, tried = counters[:, Counter.STATUS], counters[:, Counter.TRIED]
        # A trial may go far beyond the first residual: the search comes back from it.
        back = self.searching & (status == Status.DIVERGED)
        if self.some(back):
            status.masked_fill_(back, RUNNING)
            self.progress[Progress.RUNNING] += back.sum().cpu()
        running = status == RUNNING
        found = scalars[:, Scalar.RESIDUAL]
        bound = (1.0 - _ALPHA * self.length * (1.0 - self.eta)) * self.size
        finite = found.isfinite()
        anyhow = self.leaping
        if self.accepts_last:
            anyhow = anyhow | (self.rejected == self.trials)
        accepted = running & finite & (~self.searching | (found <= bound) | (anyhow & ~back))
        rejected = running & self.searching & ~accepted
        lost = running & ~accepted & ~rejected
        searching = rejected
        if self.some(lost):  # the first step of a retry is a plain one
            next.copy_(torch.where((lost & (tried == 1))[:, None], self.best[1], next))
        if self.some(rejected):
            self.rejected += rejected.int()
            self.leapt |= rejected & self.leaping
            self.leaping &= ~rejected
            self._shorten(rejected, found, finite)
            trial = self._trial()
            searching = rejected & (self.rejected <= self.trials) & (trial != self.base.to(z.dtype)).any(1)
            next.copy_(torch.where(searching[:, None], trial, next))
            failed = rejected & ~searching
            if self.some(failed):  # a plain step
                next.copy_(torch.where(failed[:, None], (self.base + self.residual).to(z.dtype), next))
            # A retry would take the same plain step.
            tried.copy_(torch.where(searching, 0, torch.where(failed, 1, tried)))
        if self.some(accepted):
            rows = accepted[:, None]
            at = z.to(self.wide)
            self.base = torch.where(rows, at, self.base)
            self.residual = torch.where(rows, f.to(self.wide) - at, self.residual)
            small = self.searching & (self.length < _SMALL)
            starts = accepted & ~(small & self.leapt)
            self.leaping = starts & small
            self.leapt &= ~accepted
            has_one = self.search_from(starts, starts & ~self.searching)
            self.size = torch.where(accepted, found, self.size)
            self.length.masked_fill_(accepted, 1.0)
            self.rejected.masked_fill_(accepted, 0)
            trial = self._trial()
            has_one &= trial.isfinite().all(1)
            next.copy_(torch.where(rows, torch.where(has_one[:, None], trial, f), next))
            plain = (accepted & ~has_one & (counters[:, Counter.SINCE_BEST] == 0)).int()
            tried.copy_(torch.where(accepted, plain, tried))
            searching = searching | has_one
        if not self.rules.freeze:  # a sample that is done waits at its value until others are, or have moved it
            next.copy_(torch.where(running[:, None], next, z))
        self.searching = searching

    def _shorten(self, rejected: Tensor, found: Tensor, finite: Tensor) -> None:
        """Make the steps of samples shorter, before their next trial.

        Args:
            rejected: These samples, bool [B].
            found: The residual norms at the rejected points, [B].
            finite: Whether these are finite, bool [B].
        """
        ratio = found / self.size
        promised = (1.0 - self.eta.square()) * self.length
        factor = promised / (ratio.square() - 1.0 + 2.0 * promised)
        factor = torch.where(finite & (factor > 0), factor, 0.0).clamp(_SHORTEST, _LONGEST)
        self.length = torch.where(rejected, factor * self.length, self.length)

    def some(self, rows: Tensor) -> bool:
        """Whether work for some samples, bool [B], is to be done: by default, whether there are any."""
        return bool(rows.any())

    def _trial(self) -> Tensor:
        """x + lambda d, rounded to the dtype of z, [B, D]."""
        return (self.base + self.length.to(self.wide)[:, None] * self.direction).to(self.z[0].dtype)
