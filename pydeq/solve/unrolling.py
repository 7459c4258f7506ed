"""The steps of Picard and Anderson in operations that have derivatives.

The steps in :mod:`pydeq.ops` work in place. Here iterates and the best ones are new tensors in every step.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydeq.ops.anderson_step import mixing_coefficients
from pydeq.ops.capture import capturing
from pydeq.ops.constants import Counter
from pydeq.ops.reduction import wide_dtype
from pydeq.ops.step import report
from pydeq.ops.termination import Rules, Verdict, judge
from pydeq.solve.compaction import Evaluator
from pydeq.solve.step_reports import any_running
from pydeq.solvers import Anderson
from pydeq.solvers.base import Workspace


class AttachedEvaluator(Evaluator):
    """Calls fn on iterates that are new tensors in every step, and keeps the graph of what it returns."""

    detaches = False

    def evaluate(self, workspace: Workspace, k: int, running: int) -> Tensor:
        z = workspace.z[k % 2]
        return self.call(z, self.layout.view(z), self.layout, self.context)


class Unroll(Workspace):
    """One solver's iteration in differentiable operations; iterates and the best ones are new tensors in every step."""

    reports_late: ClassVar[bool] = False

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Any) -> None:
        super().__init__(flat.detach()[:, :0], rules, max_steps)  # no memory for iterates
        self.solver, self.damping = solver, solver.damping
        self.z: Any = [flat, flat]
        self.best: Any = [flat, flat]
        self.anchor = flat  # the iterates that the last step started from

    @abstractmethod
    def propose(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        """The next iterates [B, D] of samples that proceed; anything finite for other samples."""

    def step(self, f: Tensor, k: int) -> None:
        z, last = self.z[k % 2], k + 1 == self.max_steps
        verdict = self._judge(z, f, k, last)
        improved = verdict.improved[:, None]
        self.best = [torch.where(improved, z, self.best[0]), torch.where(improved, f, self.best[1])]
        if not last and any_running(self.counters):
            self.z[(k + 1) % 2] = self._next(z, f, verdict)

    def look_back(self, f: Tensor, k: int, last: bool) -> None:
        z = self.z[(k - 1) % 2]
        verdict = self._judge(z, f, k, last, look_back=k)
        self.best[1] = torch.where(verdict.improved[:, None], f, self.best[1])
        if not last and any_running(self.counters):
            self.z[k % 2] = self._next(z, f, verdict)

    def unfreeze(self, k: int) -> None:
        super().unfreeze(k)
        self.counters[:, Counter.COUNT] = 0

    def _judge(self, z: Tensor, f: Tensor, k: int, last: bool, look_back: int = 0) -> Verdict:
        with torch.no_grad():
            verdict = judge(z.detach(), f.detach(), self.scalars, self.counters, self.rules, last, look_back=look_back)
        if not capturing(f.device):  # nothing reads the report then
            report(self.progress, self.counters, k)
        return verdict

    def _next(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        """The next iterates, as :func:`pydeq.ops.termination.settle` writes them in place."""
        value, image = self.best
        from_best, halfway, proceed = (rows[:, None] for rows in (verdict.from_best, verdict.halfway, verdict.proceed))
        next = torch.where(verdict.retry[:, None], self.anchor, value)
        next = torch.where(from_best, value + self.damping * (image - value), next)
        next = torch.where(halfway, self.anchor + 0.5 * (z - self.anchor), next)
        next = torch.where(proceed, self.propose(z, f, verdict), next)
        self.anchor = torch.where(proceed, z, torch.where(from_best, value, self.anchor))
        return next


class UnrollPicard(Unroll):
    def propose(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        self.counters[:, Counter.TRIED] |= (verdict.proceed & verdict.improved).int()
        if self.damping == 1.0:
            return f
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return (wide + self.damping * (f - wide)).to(z.dtype)


class AndersonHistory:
    """The columns of Anderson mixing in lists, newest first: the rings of :mod:`pydeq.ops.anderson_step` are buffers.

    Args:
        memory: Columns kept.
        damping: See :class:`pydeq.Anderson`.
    """

    def __init__(self, memory: int, damping: float) -> None:
        self.memory, self.damping = memory, damping
        self.residuals: list[Tensor] = []  # g_j, float64 [B, D]
        self.values: list[Tensor] = []  # f(z_j) - (1 - damping) g_j
        self.gram: list[list[Tensor]] = []  # <g_i, g_j> for i <= j, [B]

    def add(self, z: Tensor, f: Tensor) -> None:
        """Add a column."""
        compute = wide_dtype(z.dtype)
        f = f.to(compute)
        g = f - z.to(compute)
        self.residuals = [g.double(), *self.residuals][: self.memory]
        self.values = [f if self.damping == 1.0 else f - (1.0 - self.damping) * g, *self.values][: self.memory]
        row = [(self.residuals[0] * other).sum(1) for other in self.residuals]
        self.gram = [row, *(old[: self.memory - 1 - j] for j, old in enumerate(self.gram))][: self.memory]

    def matrix(self) -> Tensor:
        """The Gram matrix, float64 [B, m, m]."""
        m = len(self.gram)
        return torch.stack(
            [torch.stack([self.gram[min(i, j)][abs(i - j)] for j in range(m)], dim=1) for i in range(m)], dim=1
        )

    def combine(self, a: Tensor) -> Tensor:
        """The next iterate sum_j a_j (f(z_j) - (1 - damping) g_j) for coefficients [B, m]; float64 or float32."""
        a = a.to(self.values[0].dtype)
        mixed = a[:, :1] * self.values[0]
        for j, value in enumerate(self.values[1:], 1):
            mixed = mixed + a[:, j, None] * value
        return mixed


class UnrollAnderson(Unroll):
    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Anderson) -> None:
        super().__init__(flat, rules, max_steps, solver)
        self.history = AndersonHistory(min(solver.memory, max_steps), solver.damping)

    def propose(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        counters, history = self.counters, self.history
        go = verdict.proceed[:, None]
        # Rows of samples that do not proceed are never read again. They must not put NaN into gradients.
        history.add(torch.where(go, z, 0.0), torch.where(go, f, 0.0))
        counters[verdict.retry, Counter.COUNT] = 0
        gram = history.matrix()
        # A sample that has just begun or was retried has fewer columns than the lists.
        columns = torch.clamp(counters[:, Counter.COUNT].long() + 1, max=len(history.values))
        with torch.no_grad():
            index = torch.arange(len(history.values), device=z.device)
            valid = index < columns[:, None]
            seen = torch.where(valid[:, :, None] & valid[:, None, :], gram.detach(), 0.0)
            used = mixing_coefficients(seen, columns, self.solver.ridge)[1]
            inside = (index < used[:, None]) & go
        mixed = history.combine(self._coefficients(gram, inside))
        proceed = verdict.proceed
        counters[:, Counter.COUNT] = torch.where(proceed, used.int(), counters[:, Counter.COUNT])
        counters[:, Counter.TRIED] |= (proceed & (used == 1) & verdict.improved).int()
        return mixed.to(z.dtype)

    def _coefficients(self, gram: Tensor, inside: Tensor) -> Tensor:
        """(Gram + ridge diag(Gram)) a = 1, normalized, on the columns ``inside``; 0 outside. [B, m]"""
        # Scaling rows and columns by constants does not change a or its derivative.
        squared = gram.detach().diagonal(dim1=1, dim2=2)
        scale = torch.where(inside & (squared > 0), squared, 1.0).rsqrt()
        pairs = inside[:, :, None] & inside[:, None, :]
        system = torch.where(pairs, gram * scale[:, :, None] * scale[:, None, :], 0.0)
        outside = 1.0 - (inside & (squared > 0)).to(system.dtype)
        system = system + torch.diag_embed(self.solver.ridge * system.diagonal(dim1=1, dim2=2) + outside)
        # One factor for the whole right side does not either; here it is the newest residual's norm.
        right = torch.where(inside, scale / scale[:, :1], 0.0)
        x = torch.linalg.solve(system, right) * right
        total = x.sum(1, keepdim=True)
        return x / torch.where(total == 0, 1.0, total)
