"""The one solver loop: call fn, take the solver's step, until no sample is running."""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.evaluation import Evaluator
from pydeq.progress import open_reports
from pydeq.protocol import Counter, Scalar
from pydeq.solution import Solution, relative
from pydeq.solvers.base import Solver, Workspace
from pydeq.termination import Rules


def iterate(evaluator: Evaluator, flat: Tensor, solver: Solver, rules: Rules, max_steps: int, trace: bool) -> Solution:
    """Solve from the initial iterates ``flat`` [B, D].

    Returns:
        The solution, its value and image in the evaluator's layout.
    """
    layout = evaluator.layout
    rows: list[Tensor] = []
    workspace = solver.start(flat, rules, max_steps)
    if layout.batch:
        # Samples that are done are iterated on without freezing: then a step too many would show.
        lag = 1 if rules.freeze and not evaluator.counts_running else 0
        with open_reports(layout.device, layout.batch, workspace.progress, lag) as reports:
            for k in range(max_steps):
                running = reports.running(k)
                if running == 0:
                    break
                f = evaluator.evaluate(workspace, k, running)
                workspace.progress = reports.place(k)
                workspace.step(f, k)
                del f  # before fn allocates the next one
                if trace:
                    rows.append(_trace_row(workspace, k))
    traced = None
    if trace:
        traced = torch.stack(rows) if rows else workspace.scalars.new_empty(0, layout.batch)
        traced = traced.to(torch.promote_types(layout.dtype, torch.float32))
    value, image = layout.view(workspace.best[0]), layout.view(workspace.best[1])
    return Solution(value, image, evaluator.calls, workspace.scalars, workspace.counters, traced)


def _trace_row(workspace: Workspace, k: int) -> Tensor:
    """Relative residuals of evaluation ``k``, [B]; NaN for samples that had stopped before it."""
    evaluated = workspace.counters[:, Counter.EVALUATIONS] == k + 1
    newest = relative(workspace.scalars[:, Scalar.RESIDUAL], workspace.scalars[:, Scalar.NORM])
    return torch.where(evaluated, newest, torch.nan)
