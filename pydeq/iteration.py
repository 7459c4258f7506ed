"""The one solver loop: call fn, take the solver's step, until no sample is running."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeq.distributed import ALONE, Agreement
from pydeq.evaluation import Evaluator
from pydeq.protocol import Counter, Progress, Scalar
from pydeq.solution import Solution, relative
from pydeq.solvers.base import Solver, Workspace
from pydeq.state import State
from pydeq.termination import Rules


def iterate(
    evaluator: Evaluator,
    flat: Tensor,
    solver: Solver,
    rules: Rules,
    max_steps: int,
    trace: bool,
    agreement: Agreement = ALONE,
    states_at: Sequence[int] = (),
) -> tuple[Solution, Workspace]:
    """Solve from the initial iterates ``flat`` [B, D].

    Args:
        agreement: With whom the end is agreed on.
        states_at: After how many evaluations the best image is kept.

    Returns:
        The solution, its value, image and states in the evaluator's layout; and the solver's workspace.
    """
    layout = evaluator.layout
    rows: list[Tensor] = []
    states: list[State] = []
    with agreement:
        workspace = solver.start(flat, rules, max_steps)
        progress = workspace.progress.numpy()
        running = agreement.running(layout.batch)
        for k in range(max_steps if running else 0):
            f = evaluator.evaluate(workspace, k)
            agreement.evaluated()
            workspace.step(f, k)
            if k + 1 in states_at:
                states.append(layout.view(_best_image(workspace, f)))
            del f  # before fn allocates the next one
            if trace:
                rows.append(_trace_row(workspace, k))
            if agreement.running(int(progress[Progress.RUNNING])) == 0:
                break
    traced = None
    if trace:
        traced = torch.stack(rows) if rows else workspace.scalars.new_empty(0, layout.batch)
        traced = traced.to(torch.promote_types(layout.dtype, torch.float32))
    value, image = layout.view(workspace.best[0]), layout.view(workspace.best[1])
    states += [image] * (len(states_at) - len(states))  # of a solve that was done before
    solution = Solution(value, image, evaluator.calls, workspace.scalars, workspace.counters, traced)
    solution.states = states
    return solution, workspace


def _best_image(workspace: Workspace, f: Tensor) -> Tensor:
    """The images of the best iterates after a step with the images ``f``, [B, D]; a copy."""
    newest = workspace.counters[:, Counter.FRESH] == 1  # not in ``best`` yet
    return torch.where(newest[:, None], f, workspace.best[1])


def _trace_row(workspace: Workspace, k: int) -> Tensor:
    """Relative residuals of evaluation ``k``, [B]; NaN for samples that had stopped before it."""
    evaluated = workspace.counters[:, Counter.EVALUATIONS] == k + 1
    newest = relative(workspace.scalars[:, Scalar.RESIDUAL], workspace.scalars[:, Scalar.NORM])
    return torch.where(evaluated, newest, torch.nan)
