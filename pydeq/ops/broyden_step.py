"""One step of good Broyden with unit steps from H0 = -I, stored as steps only, on each sample.

With unit steps the inverse Jacobian's factors need only the steps s_j = z_{j+1} - z_j (Kelley 2003,
``brsola``):

    -H_k g = (I + w_{k-1} s_{k-1}^T) ... (I + w_0 s_0^T) g,    w_j = theta_j s_{j+1} / ||s_j||^2

so that for g = f(z) - z, t = S^T g and G = S^T S the next step s_{k+1} comes from

    c_j = theta_j (t_j + sum_{i<j} c_i G[j, i+1]) / G[j, j]                  j < k
    v   = g + sum_{j<k} c_j s_{j+1}
    a   = s_k^T v / ||s_k||^2,   s_{k+1} = v / (1 - theta_k a)

theta_k = 1 while |1 - a| >= 0.1. Otherwise theta_k keeps the update's denominator at 0.1 (More and Trangenstein 1976).

A full memory restarts from the newest pair (s, y), which keeps the secant condition: w_0 is then stored explicitly,

    w_0 = u_0 / ||s||^2,   u_0 = theta (s + y) / (1 - theta + theta gamma),   gamma = -s^T y / ||s||^2

as u_0, a vector like s, and s becomes s_0. From then on u_0 replaces theta_0 s_1. Row j of G keeps
<s_j, u_0> in column 0, which is free for j > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydeq.ops.constants import DENOMINATOR_LIMIT, Counter
from pydeq.ops.reduction import Reduction
from pydeq.ops.step import Step, StepOperation, report, settle
from pydeq.ops.termination import judge


def denominator_damping(d: Tensor) -> Tensor:
    """theta such that |1 - theta + theta d| >= 0.1; [B] -> [B]."""
    sign = torch.where(d < 0, -1.0, torch.ones_like(d))
    return torch.where(d.abs() >= DENOMINATOR_LIMIT, 1.0, (1.0 - DENOMINATOR_LIMIT * sign) / (1.0 - d))


@dataclass(frozen=True)
class _History:
    """The steps of samples that have the same number of steps; adds a new step."""

    rows: Tensor  # [R] the samples
    steps: Sequence[Tensor]  # each [B, D]
    restart: Tensor  # [B, D], or empty
    gram: Tensor  # [B, K, K]
    thetas: Tensor  # [B, K]
    counters: Tensor  # [B, len(Counter)]
    memory: int
    reduction: Reduction

    def products(self, a: Tensor, others: Sequence[Tensor]) -> Tensor:
        """<a, b> for each b of ``others``, all [R, D]: float64 [len(others), R], by one reduction."""
        wide = a.double()
        return self.reduction.sum(torch.stack([(wide * b.double()).sum(1) for b in others]))

    def append(self, slot: int, new: Tensor, g: Tensor, restarted: bool, u0: Tensor | None) -> None:
        """Store step ``new`` [R, D] in ``slot`` with its row of the Gram matrix."""
        rows = self.rows
        self.steps[slot][rows] = new
        first = 1 if slot else 0
        others = [self.steps[j][rows] for j in range(first, slot + 1)]
        if restarted and u0 is not None:
            first, others = 0, [u0, *others]
        for j, row in enumerate(self.products(new, others), first):
            self.gram[rows, slot, j] = row
        if self.restart.numel():
            if slot == self.memory:  # the next step restarts and needs this residual for y
                self.restart[rows] = g
            elif u0 is not None:
                self.restart[rows] = u0
        self.counters[rows, Counter.COUNT] = slot + 1
        self.counters[rows, Counter.RESTARTED] = int(restarted)


def _first_step(history: _History, g: Tensor) -> Tensor:
    history.append(0, g, g, False, None)
    return g


def _next_step(history: _History, g: Tensor, count: int, restarted: bool) -> tuple[Tensor, Tensor]:
    """Return the new step [R, D] from ``count`` old ones, and whether it is sound, [R]. Store it in both cases."""
    rows, k = history.rows, count - 1
    G, theta = history.gram[rows], history.thetas[rows]
    s = [history.steps[j][rows].double() for j in range(count)]
    u0 = history.restart[rows] if restarted else None
    t = history.products(g, s)
    v, c, total = g.double(), [], t[0]
    for j in range(count):
        total = t[j]
        for i in range(j):
            total = total + c[i] * G[:, j, 0 if restarted and i == 0 else i + 1]
        if j < k:
            c.append(theta[:, j] * total / G[:, j, j])
            v = v + c[j][:, None] * (u0.double() if u0 is not None and j == 0 else s[j + 1])
    a = total / G[:, k, k]
    theta_new = denominator_damping(1.0 - a)
    new = v / (1.0 - theta_new * a)[:, None]
    sound = (theta_new * a).isfinite()
    history.thetas[rows, k] = theta_new
    history.append(count, new.to(g.dtype), g, restarted, u0)
    return new.to(g.dtype), sound


def _restarted_step(history: _History, g: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as ``_next_step`` for a full memory: keep only the newest pair."""
    rows, newest = history.rows, history.memory
    s, squared = history.steps[newest][rows], history.gram[rows, newest, newest]
    y = g.double() - history.restart[rows].double()
    along_y, along_g = history.products(s, [y, g])
    gamma = -along_y / squared
    theta = denominator_damping(gamma)
    scale = theta / (1.0 - theta + theta * gamma)
    u0 = (scale[:, None] * (s.double() + y)).to(g.dtype)
    weight = along_g / squared
    new = (g.double() + weight[:, None] * u0.double()).to(g.dtype)
    history.steps[0][rows] = s
    history.gram[rows, 0, 0] = squared
    history.thetas[rows, 0] = 1.0
    history.append(1, new, g, True, u0)
    return new, scale.isfinite() & weight.isfinite()


def broyden_step_reference(
    step: Step,
    iterate: Tensor,  # [B, D], or empty
    steps: Sequence[Tensor],  # each [B, D]
    restart: Tensor,  # [B, D], or empty
    gram: Tensor,  # [B, K, K]
    thetas: Tensor,  # [B, K]
    memory: int,
) -> None:
    """Take a step of Broyden's method.

    Args:
        iterate: The iterates in float32 if z has a half type; otherwise empty.
        steps: s_0, s_1, ..., float32 for half states; at least min(step.number, memory) + 1 of them unless this
            evaluation is the last.
        restart: u_0 and, before a restart, the previous residual, of the dtype of the steps. Empty if the solve ends
            before a restart is possible.
        gram: S^T S, lower triangle, float64, with K the largest number of steps.
        thetas: Damping of each update, float64.
        memory: Pairs kept, at least 1.
    """
    z, f, next, counters = step.z, step.f, step.next, step.counters
    verdict = judge(z, f, step.scalars, counters, step.rules, step.last)
    settle(step, verdict)
    exact = iterate.numel() > 0  # z is ``iterate`` after rounding
    counters[verdict.retry, Counter.COUNT] = 0
    if exact:
        iterate.copy_(torch.where(verdict.retry[:, None], next.to(iterate.dtype), iterate))

    compute = torch.promote_types(z.dtype, torch.float32)
    position = iterate if exact else z
    samples = verdict.proceed.nonzero()[:, 0]
    kinds = counters[samples][:, [Counter.COUNT, Counter.RESTARTED]]
    for count, restarted in kinds.unique(dim=0).tolist():
        rows = samples[((kinds[:, 0] == count) & (kinds[:, 1] == restarted))]
        history = _History(rows, steps, restart, gram, thetas, counters, memory, step.rules.reduction)
        g = f[rows].to(compute) - position[rows]
        if count == 0:
            new, sound = g, torch.zeros(len(rows), dtype=torch.bool, device=z.device)
        elif count == memory + 1:
            new, sound = _restarted_step(history, g)
        else:
            new, sound = _next_step(history, g, count, bool(restarted))
        plain = ~sound
        if plain.any():
            history = _History(rows[plain], steps, restart, gram, thetas, counters, memory, step.rules.reduction)
            new[plain] = _first_step(history, g[plain])
        moved = position[rows] + new
        if exact:
            iterate[rows] = moved
        next[rows] = moved.to(z.dtype)
        # A retry would take the same plain step from a new best.
        counters[rows[plain & verdict.improved[rows]], Counter.TRIED] = 1
    report(step.progress, step.counters, step.number)


broyden_step = StepOperation(
    "broyden_step",
    "Tensor(g!) iterate, Tensor(h!)[] steps, Tensor(i!) restart, Tensor(j!) gram, Tensor(k!) thetas, int memory",
    broyden_step_reference,
)
