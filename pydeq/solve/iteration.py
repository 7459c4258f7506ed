"""The one solver loop: call fn, take the solver's step, until no sample is running."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeq.arguments import warn_user
from pydeq.ops.constants import Counter, Scalar, Status
from pydeq.ops.termination import Rules
from pydeq.solution import CouplingWarning, Solution, relative
from pydeq.solve.compaction import Evaluator
from pydeq.solve.ranks import ALONE, Agreement
from pydeq.solve.step_reports import Reports, open_reports
from pydeq.solvers.base import NewtonSolver, Solver, Workspace
from pydeq.state import State


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
        agreement: With the other ranks, on when to stop.
        states_at: Numbers of evaluations after which the best image is kept.

    Returns:
        The solution, its value, image and states in the evaluator's layout; and the solver's workspace.
    """
    layout = evaluator.layout
    rows: list[Tensor] = []
    states: list[State] = []
    evaluations = 0
    with agreement:
        workspace = solver.start(flat, rules, max_steps)
        if isinstance(solver, NewtonSolver):
            workspace.product, workspace.jacobian = evaluator.product, evaluator.jacobian
        # With freeze=False an extra step changes the result, so the loop does not run ahead of the device. Compaction
        # has no images of finished samples to look back at.
        frozen = rules.freeze and not evaluator.counts_running
        looked = agreement is ALONE and not frozen  # all ranks look back together, or none
        lag = int(frozen and workspace.reports_late)
        with open_reports(layout.device, layout.batch, workspace.progress, lag) as reports:
            f: Tensor | None = None
            for k in range(max_steps):
                running = reports.running(k)
                if agreement.running(running) == 0:
                    if f is None or looked:
                        break
                    running, looked = _look_back(workspace, reports, agreement, f, k, frozen), True
                    if running == 0:
                        break
                    frozen = False
                f = None  # before fn allocates the next one
                f = evaluator.evaluate(workspace, k, running)
                agreement.evaluated()
                evaluations = k + 1
                workspace.progress = reports.place(k)
                workspace.step(f, k)
                if k + 1 in states_at:
                    states.append(layout.view(best_image(workspace, f)))
                if trace:
                    rows.append(trace_row(workspace, k))
            else:
                if frozen and f is not None:
                    _look_back_at_the_end(workspace, reports, agreement, f, max_steps)
                agreement.running(0)  # raises if another rank's last evaluation failed
    traced = None
    if trace:
        traced = torch.stack(rows) if rows else workspace.scalars.new_empty(0, layout.batch)
        traced = traced.to(torch.promote_types(layout.dtype, torch.float32))
    value, image = workspace.best[0], workspace.best[1]
    if not layout.is_flat:
        value, image = layout.view(value), layout.view(image)
    if states_at:
        # The solve may have ended already: its last evaluation may show that an image has moved.
        states[sum(count < evaluations for count in states_at) :] = []
        states += [image] * (len(states_at) - len(states))
    solution = Solution(value, image, evaluator.calls, workspace.scalars, workspace.counters, traced)
    solution.states = states
    return solution, workspace


def _look_back(workspace: Workspace, reports: Reports, agreement: Agreement, f: Tensor, k: int, frozen: bool) -> int:
    """Check the samples that were done before evaluation ``k`` again, by their images in evaluation ``k``.

    CONVERGED must hold for all samples at one and the same evaluation. A frozen sample's image changes only if it
    depends on other samples that have moved since. If a sample is no longer done, all ``frozen`` samples continue,
    without freezing.

    Returns:
        The number of samples that run again, here or on another rank.
    """
    here = frozen and len(f) > 0 and (agreement is not ALONE or reports.staggered())
    woken = 0
    if here:
        workspace.progress = reports.place(k)
        workspace.look_back(f, k, last=False)
        woken = reports.woken(k)
    running = agreement.running(woken)
    if running and frozen:
        workspace.unfreeze(k)
        reports.resume(k)
        warn_of_coupling(woken, len(f))
    return running


def _look_back_at_the_end(
    workspace: Workspace, reports: Reports, agreement: Agreement, f: Tensor, max_steps: int
) -> None:
    """Look back after the last evaluation: samples that are no longer done end as MAX_STEPS. Does not synchronize."""
    if not len(f) or not (agreement is not ALONE or reports.staggered(exhausted=True)):
        return
    workspace.progress = reports.place(max_steps)
    workspace.look_back(f, max_steps, last=True)
    if f.device.type == "cpu":
        status, evaluations = workspace.counters.numpy()[:, [Counter.STATUS, Counter.EVALUATIONS]].T
        woken = (status == Status.MAX_STEPS) & (evaluations < max_steps)
        if woken.any():
            warn_of_coupling(int(woken.sum()), len(f))


_warned_of_coupling = False


def warn_of_coupling(woken: int, batch: int) -> None:
    """Warn once that samples depend on each other."""
    global _warned_of_coupling
    if _warned_of_coupling:
        return
    _warned_of_coupling = True
    warn_user(
        f"the samples of a batch depend on each other: {woken} of {batch} had met the tolerance and were moved away"
        " from it by others, so that all of them iterate until they meet it at one and the same evaluation. One coupled"
        " system, like the nodes of a graph or the entries of a vector, is one sample: solve for z[None], with"
        " fn(z[0])[None]. This is said once",
        CouplingWarning,
    )


def best_image(workspace: Workspace, f: Tensor) -> Tensor:
    """Copy the images of the best iterates after a step with the images ``f``; [B, D]."""
    newest = workspace.counters[:, Counter.FRESH] == 1  # these images are not in ``best`` yet
    return torch.where(newest[:, None], f, workspace.best[1])


def trace_row(workspace: Workspace, k: int) -> Tensor:
    """Relative residuals of evaluation ``k``, [B]; NaN for samples that had stopped before it."""
    evaluated = workspace.counters[:, Counter.EVALUATIONS] == k + 1
    newest = relative(workspace.scalars[:, Scalar.RESIDUAL], workspace.scalars[:, Scalar.NORM])
    return torch.where(evaluated, newest, torch.nan)
