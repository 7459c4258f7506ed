"""One step of Anderson mixing, type II (Anderson 1965; Walker and Ni 2011), on each sample.

With residuals g_j = f(z_j) - z_j of the last columns, the coefficients minimize ||sum_j a_j g_j|| for sum_j a_j = 1:

    (Gram + ridge * diag(Gram)) a = 1, normalized to sum a = 1;   Gram[i, j] = <g_i, g_j>
    z' = sum_j a_j (f(z_j) - (1 - damping) g_j)

The ridge is relative, so that scaling f only scales the iterates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.ops.constants import COEFFICIENT_LIMIT, Counter
from pydeq.ops.step import Step, StepOperation, report, settle
from pydeq.ops.termination import judge


def mixing_coefficients(gram: Tensor, count: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve the small system of each sample; leave out its oldest columns if they make it ill-conditioned.

    Args:
        gram: Gram matrices with the newest column first, float64 [B, M, M].
        count: Valid columns of each sample, int [B], at least 1.
        ridge: Relative to the diagonal.

    Returns:
        The coefficients [B, M], zero beyond the columns used, and the number used, [B].
    """
    batch, memory, _ = gram.shape
    age = torch.arange(memory, device=gram.device)
    length = gram.diagonal(dim1=1, dim2=2).sqrt()  # [B, M] ||g_j||
    chosen, used = torch.zeros_like(length), torch.zeros_like(count)
    for columns in range(memory, 0, -1):
        open_ = (used == 0) & (count >= columns)
        if not open_.any():
            continue
        # Work on the correlation matrix: its diagonal is 1 at any scale.
        inside = (age < columns).expand(batch, memory)
        safe = torch.where(inside & (length > 0), length, 1.0)
        system = gram / safe[:, :, None] / safe[:, None, :]
        system = torch.where(inside[:, :, None] & inside[:, None, :], system, 0.0)
        system.diagonal(dim1=1, dim2=2).copy_(1.0 + ridge * inside.double())
        factor, failed = torch.linalg.cholesky_ex(system.nan_to_num(0.0, 0.0, 0.0))
        right = torch.where(inside, length[:, :1] / safe, 0.0)
        solution = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0] * right
        total = solution.sum(1)
        a = solution / total[:, None]
        sound = system.isfinite().all(2).all(1) & (failed == 0) & (a.abs().sum(1) <= COEFFICIENT_LIMIT)
        sound &= (length > 0).logical_or(~inside).all(1)  # a residual of 0 makes the system singular
        if columns == 1:
            a, sound = inside.to(a.dtype), torch.ones_like(sound)
        accept = open_ & sound
        chosen = torch.where(accept[:, None], a, chosen)
        used = torch.where(accept, columns, used)
    return chosen, used


def anderson_step_reference(
    step: Step,
    residuals: Tensor,  # [B, S, D]
    values: Tensor,  # [B, S, D]
    gram: Tensor,  # [B, S, S]
    memory: int,
    damping: float,
    ridge: float,
) -> None:
    """Take a step of Anderson mixing.

    Args:
        residuals: Ring of g = f(z) - z, with S >= max(memory, 2) slots.
        values: Ring of f(z).
        gram: <g_i, g_j> by slot, float64.
        memory: Columns mixed, at least 1.
        damping: In (0, 1].
        ridge: Relative to the diagonal of the Gram matrix, at least 0.
    """
    z, f, next, counters, reduction = step.z, step.f, step.next, step.counters, step.rules.reduction
    slots = values.shape[1]
    sample = torch.arange(z.shape[0], device=z.device)
    verdict = judge(z, f, step.scalars, counters, step.rules, step.last)
    head, count = counters[:, Counter.HEAD].long(), counters[:, Counter.COUNT].long()
    before = z.clone()  # ``settle`` moves the iterates of stopped samples
    settle(step, verdict, values[sample, (head - 1) % slots], damping)
    count = torch.where(verdict.retry, 0, count)
    counters[:, Counter.COUNT] = count.int()

    compute = torch.promote_types(z.dtype, torch.float32)
    if not step.last:  # the slot is free: the head of a sample that does not proceed stays in place
        rows = verdict.active.nonzero()[:, 0]
        residuals[rows, head[rows]] = (f[rows].to(compute) - before[rows].to(compute)).to(z.dtype)
        values[rows, head[rows]] = f[rows]
    rows = verdict.proceed.nonzero()[:, 0]
    if len(rows):
        slot = head[rows]
        columns = torch.clamp(count[rows] + 1, max=memory)
        age = torch.arange(memory, device=z.device)
        by_age = (slot[:, None] - age) % slots  # [R, memory], newest first
        valid = age < columns[:, None]
        history = torch.where(valid[:, :, None], residuals[rows[:, None], by_age], 0).double()  # [R, memory, D]
        # Not a matrix product: its order of summation for a single sample depends on the threads.
        row = reduction.sum((history[:, :1] * history).sum(2))
        old = gram[rows, slot]
        new = old.scatter(1, by_age, torch.where(valid, row, old.gather(1, by_age)))
        gram[rows, slot] = new
        gram[rows, :, slot] = new
        ordered = gram[rows[:, None, None], by_age[:, :, None], by_age[:, None, :]]
        ordered = torch.where(valid[:, :, None] & valid[:, None, :], ordered, 0.0)
        a, used = mixing_coefficients(ordered, columns, ridge)
        mixed = torch.where(a[:, :, None] != 0, values[rows[:, None], by_age], 0).to(compute)
        if damping != 1.0:
            history = torch.where(a[:, :, None] != 0, residuals[rows[:, None], by_age], 0).to(compute)
            mixed = mixed - (1.0 - damping) * history
        next[rows] = torch.einsum("bm,bmd->bd", a.to(compute), mixed).to(z.dtype)
        counters[rows, Counter.COUNT] = used.int()
        counters[rows, Counter.HEAD] = ((slot + 1) % slots).int()
        # Mixing one column is a plain step. A retry would take the same step from a new best.
        plain = (used == 1) & verdict.improved[rows]
        counters[rows, Counter.TRIED] = torch.where(plain, 1, counters[rows, Counter.TRIED])
    report(step.progress, step.counters, step.number)


anderson_step = StepOperation(
    "anderson_step",
    "Tensor(g!) residuals, Tensor(h!) values, Tensor(i!) gram, int memory, float damping, float ridge",
    anderson_step_reference,
)
