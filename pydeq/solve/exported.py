"""A solve as a program: a fixed number of evaluations, in plain operations that torch.export and ONNX can record.

No value decides which operation runs next: all samples take all steps. The best iterate of each sample is kept by
``torch.where`` until the sample is done, by the rules of :mod:`pydeq.ops.termination`. So its result is that of a solve
with the same ``max_steps``. Differences:

- A sample with NaN or Inf is done. There are no further attempts from other points.
- Samples that depend on each other are not looked at again after they are done.
- ``norm="parts"`` scales the parts once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pydeq.arguments import check_max_steps, check_states_at
from pydeq.ops.broyden_step import denominator_damping
from pydeq.ops.constants import (
    COEFFICIENT_LIMIT,
    CONTRACTION,
    DIVERGENCE,
    GROWTH,
    STALL_EPSILONS,
    STALL_WINDOW,
    Counter,
    Scalar,
    Status,
)
from pydeq.ops.reduction import inner, wide_dtype
from pydeq.ops.reduction import norm as row_norm
from pydeq.ops.termination import Rules
from pydeq.solution import Solution, relative
from pydeq.solve.compaction import Evaluator
from pydeq.solve.parts import iterate_by_parts
from pydeq.solve.solve import stopping_rules
from pydeq.solve.unrolling import AndersonHistory
from pydeq.solvers import Anderson, Broyden, Picard, Solver
from pydeq.solvers.broyden_search import BroydenSearchWorkspace
from pydeq.state import State, layout_of


def solve_exported(
    fn: Callable[..., Any],
    z0: State,
    context: Sequence[Any],
    *,
    solver: Solver,
    rtol: float | None,
    atol: float,
    max_steps: int,
    trace: bool = False,
    stall: bool = True,
    states_at: Sequence[int] = (),
    norm: Literal["all", "parts"] = "all",
    compact: bool = False,
    batched_context: Sequence[bool] | None = None,
) -> Solution:
    """Solve z = fn(z, *context) by ``max_steps`` evaluations; the keywords are :func:`pydeq.fixed_point`'s.

    ``compact`` and ``batched_context`` have no effect, since every evaluation is of the whole batch.

    Raises:
        TypeError: If the solver's steps cannot be recorded.
    """
    if type(solver) not in _STEPS:
        raise TypeError(
            f"{type(solver).__name__} cannot be exported, because values decide which operations it runs: set"
            " deq.solver = pydeq.Broyden(line_search=True), pydeq.Broyden() or pydeq.Anderson() before the export"
        )
    layout = layout_of(z0)
    rules = stopping_rules(layout, rtol, atol, stall=stall)
    evaluator = _Evaluator(fn, context, layout, torch.is_autocast_enabled(layout.device.type))
    iterate = partial(iterate_by_parts, record=_iterate) if norm == "parts" else _iterate
    with parametrize.cached():  # normalized weights are computed once
        return iterate(
            evaluator, layout.flatten(z0), solver, rules, check_max_steps("max_steps", max_steps), trace,
            states_at=check_states_at(states_at),
        )[0]  # fmt: skip


class _Evaluator(Evaluator):
    """Calls fn on iterates that are new tensors in every step."""

    detaches = False

    def evaluate(self, workspace: Any, k: int, running: int) -> Tensor:
        z = workspace.z[k % 2]
        image = workspace.best[1]
        version = image._version if self.watch else 0
        f = self.call(z, self.layout.view(z), self.layout, self.context)
        if self.watch and image._version != version:
            raise ValueError("fn must return a new tensor in every evaluation to be exported, not a reused buffer")
        return f


@dataclass
class _Workspace:
    """What is left of a solve's workspace: the iterates, [B, D], and the results, as in an ordinary one."""

    z: tuple[Tensor, Tensor]
    best: tuple[Tensor, Tensor]
    scalars: Tensor
    counters: Tensor


def _iterate(
    evaluator: Evaluator,
    flat: Tensor,
    solver: Solver,
    rules: Rules,
    max_steps: int,
    trace: bool,
    states_at: Sequence[int] = (),
) -> tuple[Solution, Any]:
    """Run :func:`pydeq.solve.iteration.iterate` without a look at the results."""
    layout = evaluator.layout
    steps, judge = _STEPS[type(solver)](flat, solver, max_steps), _Judge(rules)
    workspace: Any = _Workspace((flat, flat), (flat, flat), flat, flat)
    states: list[State] = []
    rows: list[Tensor] = []
    for k in range(max_steps):
        z = workspace.z[0]
        f = evaluator.evaluate(workspace, k, layout.batch)
        evaluated = judge.judge(z, f, steps.trials())
        workspace.best = judge.best
        if k + 1 in states_at:
            states.append(layout.view(judge.best[1]))
        if trace:
            rows.append(torch.where(evaluated, relative(judge.residual, judge.norm), torch.nan))
        if k + 1 < max_steps:
            z = steps.next(z, f, judge)
            workspace.z = z, z
    traced = torch.stack(rows).to(wide_dtype(layout.dtype)) if trace else None
    workspace.scalars, workspace.counters = judge.scalars(), judge.counters()
    value, image = (layout.view(x) for x in workspace.best)
    solution = Solution(value, image, evaluator.calls, workspace.scalars, workspace.counters, traced)
    solution.states = states + [image] * (len(states_at) - len(states))
    return solution, workspace


class _Judge:
    """The rules of :func:`pydeq.ops.termination.judge` for samples that freeze, in fewer operations.

    Attributes:
        best: The best iterates and their images, [B, D] each.
        residual, norm: ||f(z) - z|| and ||f(z)|| of the newest iterates, float64 [B].
        running: The samples that are not done, bool [B].
    """

    best: tuple[Tensor, Tensor]
    residual: Tensor
    norm: Tensor
    running: Tensor

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.evaluated = 0

    def judge(self, z: Tensor, f: Tensor, trials: Tensor | None) -> Tensor:
        """Judge the iterates z and their images f, [B, D]; return which samples still ran, bool [B].

        Args:
            trials: See :meth:`_Steps.trials`.
        """
        rules = self.rules
        residual, norm = row_norm(f.to(wide_dtype(z.dtype)) - z), row_norm(f)
        finite = (residual + norm).isfinite()
        self.residual, self.norm = residual, norm
        tolerance = rules.rtol * norm + rules.atol if rules.atol else rules.rtol * norm
        meets = finite & (residual <= tolerance)
        self.evaluated += 1
        if self.evaluated == 1:
            self.first, self.first_norm = residual, norm
            # z + c has no fixed point, but for a large z it rounds to z: a small residual means nothing there.
            self.absorbed = torch.maximum((1.0 - CONTRACTION) / (0.5 * rules.eps) * residual, GROWTH * norm)
            self.best, self.best_residual, self.best_norm = (z, f), residual, norm
            self.converged, self.lost, self.running = meets, ~finite, finite & ~meets
            self.diverged = self.stalled = torch.zeros_like(meets)
            self.since = torch.zeros_like(meets, dtype=torch.int32)
            self.evaluations = torch.ones_like(self.since)
            return torch.ones_like(meets)
        running = self.running
        self.evaluations = self.evaluations + running
        going = running & finite
        meets = meets & running & (residual < CONTRACTION * self.first) & (norm <= self.absorbed)
        improved = meets | (going & (residual < self.best_residual))
        self.best = torch.where(improved[:, None], z, self.best[0]), torch.where(improved[:, None], f, self.best[1])
        self.best_residual = torch.where(improved, residual, self.best_residual)
        self.best_norm = torch.where(improved, norm, self.best_norm)
        far = residual > DIVERGENCE * self.first
        if trials is not None:
            finite, far = finite | trials, far & ~trials
        lost, diverged = running & ~finite, going & far
        self.converged, self.lost, self.diverged = self.converged | meets, self.lost | lost, self.diverged | diverged
        self.running = running & ~(meets | lost | diverged)
        self.since = torch.where(improved, 0, self.since + running)
        if rules.stall and self.evaluated > STALL_WINDOW:
            explained = self.best_residual <= STALL_EPSILONS * rules.eps * self.best_norm
            stalled = self.running & (self.since >= STALL_WINDOW) & explained
            self.stalled, self.running = self.stalled | stalled, self.running & ~stalled
        return running

    def scalars(self) -> Tensor:
        """The results as a workspace has them, [B, len(Scalar)]."""
        residual = torch.where(self.lost & (self.evaluations == 1), math.inf, self.best_residual)
        columns = {
            Scalar.FIRST: self.first,
            Scalar.FIRST_NORM: self.first_norm,
            Scalar.BEST: residual,
            Scalar.BEST_NORM: self.best_norm,
            Scalar.RESIDUAL: self.residual,
            Scalar.NORM: self.norm,
        }
        return torch.stack([columns[name] for name in Scalar], dim=1)

    def counters(self) -> Tensor:
        """The results as a workspace has them, [B, len(Counter)]; all running samples end as MAX_STEPS."""
        status = torch.full_like(self.since, int(Status.MAX_STEPS))
        for rows, name in (
            (self.converged, Status.CONVERGED),
            (self.diverged, Status.DIVERGED),
            (self.stalled, Status.STALLED),
            (self.lost, Status.NONFINITE),
        ):
            status = torch.where(rows, int(name), status)
        columns = {Counter.STATUS: status, Counter.EVALUATIONS: self.evaluations, Counter.SINCE_BEST: self.since}
        zero = torch.zeros_like(self.since)
        return torch.stack([columns.get(name, zero) for name in Counter], dim=1)


class _Steps(ABC):
    """The steps of one solver.

    Args:
        flat: Initial iterates, [B, D].
        solver: Its hyperparameters.
        max_steps: The number of evaluations.
    """

    def __init__(self, flat: Tensor, solver: Any, max_steps: int) -> None:
        self.solver = solver

    def trials(self) -> Tensor | None:
        """Samples whose iterate is only a trial, [B]: they are not done if it has NaN or Inf, or a large residual."""
        return None

    @abstractmethod
    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        """The iterates after z, by its images f and what was found out about them, [B, D]."""


class _Picard(_Steps):
    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        if self.solver.damping == 1.0:
            return f
        wide = z.to(wide_dtype(z.dtype))
        return (wide + self.solver.damping * (f - wide)).to(z.dtype)


class _Anderson(_Steps):
    """Anderson mixing, as in :mod:`pydeq.ops.anderson_step`."""

    def __init__(self, flat: Tensor, solver: Anderson, max_steps: int) -> None:
        super().__init__(flat, solver, max_steps)
        self.history = AndersonHistory(solver.memory, solver.damping)
        self.used: Tensor | None = None  # columns mixed in the last step, [B]

    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        history = self.history
        history.add(z, f)
        used = torch.zeros_like(judge.since) if self.used is None else self.used
        count = torch.clamp(used + 1, max=len(history.values))
        a, self.used = mixing_coefficients(history.matrix(), count, self.solver.ridge)
        return history.combine(a).to(z.dtype)


def mixing_coefficients(gram: Tensor, count: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Compute the same as :func:`pydeq.ops.anderson_step.mixing_coefficients` without a factorization from LAPACK.

    ONNX has none. The newest column comes first, so the systems without the oldest columns are the leading blocks.
    After k pivots of Gauss-Jordan elimination, the right side holds the solution of the leading block of size k.
    """
    memory = gram.shape[1]
    age = torch.arange(memory, device=gram.device)
    diagonal, lower = age.unsqueeze(1) == age, age.unsqueeze(1) >= age  # [M, M]
    length = gram.diagonal(dim1=1, dim2=2).sqrt()  # [B, M]
    safe = torch.where(length > 0, length, 1.0)
    system = torch.where(diagonal, 1.0 + ridge, gram / (safe.unsqueeze(2) * safe.unsqueeze(1)))
    right = length.narrow(1, 0, 1) / safe
    rows = torch.cat([system, right.unsqueeze(2)], dim=2)  # [B, M, M + 1]
    pivots, solutions = [], []
    for k in range(memory):
        row = rows.select(1, k)
        pivots.append(row.select(1, k))
        row = (row / row.narrow(1, k, 1)).unsqueeze(1)
        rows = torch.where(diagonal.narrow(1, k, 1), row, rows - rows.narrow(2, k, 1) * row)
        solutions.append(rows.select(2, memory))
    # [B, M, M]: row k has the coefficients of k + 1 columns. Those of one column are a plain step.
    x = torch.where(lower, torch.stack(solutions, dim=1) * right.unsqueeze(1), 0.0)
    a = torch.where(diagonal.narrow(1, 0, 1), diagonal.double(), x / x.sum(2, keepdim=True))
    definite = (torch.stack(pivots, dim=1) > 0) & (length > 0)
    sound = (definite.unsqueeze(1) | ~lower).all(2) & (a.abs().sum(2) <= COEFFICIENT_LIMIT)
    most = torch.where(sound & (age < count.unsqueeze(1)), age, 0).amax(1)
    return torch.where((age == most.unsqueeze(1)).unsqueeze(2), a, 0.0).sum(1), most + 1


class _Broyden(_Steps):
    """Broyden's good method, as in :mod:`pydeq.ops.broyden_step`, with each factor (s_j, w_j) stored.

    N = (I + w_{n-1} s_{n-1}^T) ... (I + w_0 s_0^T) ~ (I - J)^-1. The next factor comes from v = N g at the new point
    and the step s that led there, as in :mod:`pydeq.solvers.broyden_search` with steps of full length:

        N y = v - s,   delta = -s^T N y / ||s||^2,   w = theta (s + N y) / ((1 - theta + theta delta) ||s||^2)

    All samples share the list of factors. A sample that forgets its history uses only those from ``begin`` on.
    """

    def __init__(self, flat: Tensor, solver: Broyden, max_steps: int) -> None:
        super().__init__(flat, solver, max_steps)
        self.iterate = flat.to(wide_dtype(flat.dtype))  # before it was rounded
        self.steps: list[Tensor] = []  # s_j, float64
        self.factors: list[Tensor] = []  # w_j
        self.last: tuple[Tensor, Tensor] | None = None  # the last step, and g where it began

    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        g = f.to(self.iterate.dtype) - self.iterate
        step = g if self.last is None else self._step(g, *self.last, judge)
        self.last = step, g
        self.iterate = self.iterate + step
        return self.iterate.to(z.dtype)

    def _step(self, g: Tensor, s: Tensor, before: Tensor, judge: _Judge) -> Tensor:
        """The step after s, for the residuals g now and ``before`` it; stores the factor of s."""
        count, memory = len(self.steps), self.solver.memory
        begin = self.begin if count else torch.zeros_like(judge.since)
        v = g
        for j, (old, w) in enumerate(zip(self.steps, self.factors, strict=True)):
            v = v + torch.where(begin <= j, inner(old, v), 0.0).to(v.dtype)[:, None] * w
        change = v - s  # N y
        if count >= memory:
            full = count - begin >= memory  # keep only the newest pair: N = I
            change = torch.where(full[:, None], g - before, change)
            v = torch.where(full[:, None], g, v)
            begin = torch.where(full, count, begin)
        squared, along = inner(s, s), inner(s, v)
        delta = -inner(s, change) / squared
        theta = denominator_damping(delta)
        scale = theta / ((1.0 - theta + theta * delta) * squared)
        w = scale.to(v.dtype)[:, None] * (s + change)
        sound = (along / squared).isfinite() & inner(w, w).isfinite()
        w = torch.where(sound[:, None], w, 0.0)
        self.begin = torch.where(sound, begin, count + 1)
        self.steps.append(s.double())
        self.factors.append(w)
        return torch.where(sound[:, None], v + along.to(v.dtype)[:, None] * w, g)  # or a plain step


class _BroydenSearch(_Steps):
    """Broyden's method with a line search, whose trials are computed for all samples in every step."""

    def __init__(self, flat: Tensor, solver: Broyden, max_steps: int) -> None:
        super().__init__(flat, solver, max_steps)
        self.search = _Search(flat, Rules(0.0, 0.0, 0.0, freeze=True, stall=True), max_steps, solver)

    def trials(self) -> Tensor:
        return self.search.searching

    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        self.search.judge, self.search.z = judge, (z, torch.empty_like(z))
        self.search.step(f, 0)
        return self.search.z[1]


class _Search(BroydenSearchWorkspace):
    """The workspace of a search without buffers: ``scalars`` and ``counters`` are read from a judge."""

    judge: _Judge

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Broyden) -> None:
        super().__init__(flat, rules, max_steps + 1, solver.memory, repr(solver))
        self.scalars: Any = _Columns()
        self.counters: Any = _Columns()

    def take(self, *arguments: Any) -> None:
        judge = self.judge
        zero = torch.zeros_like(judge.since)
        self.scalars.columns[Scalar.RESIDUAL] = judge.residual
        far = self.searching & (judge.residual > DIVERGENCE * judge.first)
        status = torch.where(judge.running, torch.where(far, int(Status.DIVERGED), zero), int(Status.CONVERGED))
        self.counters.columns |= {Counter.STATUS: status, Counter.TRIED: zero, Counter.SINCE_BEST: judge.since}

    def some(self, rows: Tensor) -> bool:
        return True

    def places(self, places: Tensor, rows: Tensor) -> list[int]:
        return list(range(min(len(self.steps) + 1, self.memory)))


class _Columns:
    """Columns of ``scalars`` or ``counters``."""

    def __init__(self) -> None:
        self.columns: dict[int, Tensor] = {}

    def __getitem__(self, index: tuple[slice, int]) -> Tensor:
        return self.columns[index[1]]


def _broyden(flat: Tensor, solver: Broyden, max_steps: int) -> _Steps:
    return (_BroydenSearch if solver.line_search else _Broyden)(flat, solver, max_steps)


_STEPS: dict[type[Solver], Callable[..., _Steps]] = {Picard: _Picard, Anderson: _Anderson, Broyden: _broyden}
