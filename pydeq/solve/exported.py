"""A solve as a program: a fixed number of evaluations, in plain operations that torch.export and ONNX can record.

No value decides which operation runs next: all samples take all steps. The best iterate of each sample is kept by
``torch.where`` until the sample is done, by the rules of :mod:`pydeq.ops.termination`. So its result is that of a solve
with the same ``max_steps``. Differences:

- A sample with NaN or Inf is done. There are no further attempts from other points.
- Samples that depend on each other are not looked at again after they are done.
- With ``norm="parts"``, a sample that needs new scales gets them at once. A solve waits for the other samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from pydeq.solve.parts import PartTolerances
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

    The results are detached. ``torch.no_grad`` would become a part of the program, so each image is detached instead.
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
    max_steps, states_at = check_max_steps("max_steps", max_steps), check_states_at(states_at)
    flat = layout.flatten(z0).detach()
    judge, steps = _Judge(rules), _STEPS[type(solver)](flat, solver, max_steps)
    if norm == "parts" and len(layout.shapes) > 1:
        tolerances = PartTolerances(layout, rules)
        judge, steps = _PartsJudge(tolerances, max_steps), _ScaledSteps(steps, tolerances)
    with parametrize.cached():  # normalized weights are computed once
        return _iterate(evaluator, flat, judge, steps, max_steps, trace, states_at)


class _Evaluator(Evaluator):
    """Calls fn on iterates that are new tensors in every step."""

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
    """What is left of a solve's workspace: the iterates, [B, D]."""

    z: tuple[Tensor, Tensor]
    best: tuple[Tensor, Tensor]


def _iterate(
    evaluator: Evaluator,
    flat: Tensor,
    judge: _Judge,
    steps: _Steps,
    max_steps: int,
    trace: bool,
    states_at: Sequence[int],
) -> Solution:
    """Run :func:`pydeq.solve.iteration.iterate` without a look at the results."""
    layout = evaluator.layout
    workspace: Any = _Workspace((flat, flat), (flat, flat))
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
            rows.append(torch.where(evaluated, judge.relative(), torch.nan))
        if k + 1 < max_steps:
            z = steps.next(z, f, judge)
            workspace.z = z, z
    traced = torch.stack(rows).to(wide_dtype(layout.dtype)) if trace else None
    value, image = (layout.view(x) for x in judge.best)
    solution = Solution(value, image, evaluator.calls, judge.scalars(), judge.counters(), traced)
    solution.states = states + [image] * (len(states_at) - len(states))
    return solution


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
        residual, norm = self.residual, self.norm = self._measure(z, f)
        finite = (residual + norm).isfinite()
        tolerance = rules.rtol * norm + rules.atol if rules.atol else rules.rtol * norm
        meets = finite & (residual <= tolerance)
        self.evaluated += 1
        if self.evaluated == 1:
            self.best = z, f
            self._begin(finite, meets)
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

    def _measure(self, z: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and norm."""
        return row_norm(f.to(wide_dtype(z.dtype)) - z), row_norm(f)

    def _begin(self, finite: Tensor, meets: Tensor) -> None:
        """Take the newest iterates as the first ones.

        Args:
            finite: Whether residual and norm are finite, bool [B].
            meets: Whether they meet the tolerance, bool [B].
        """
        residual, norm = self.residual, self.norm
        self.first, self.first_norm = residual, norm
        # z + c has no fixed point, but for a large z it rounds to z: a small residual means nothing there.
        self.absorbed = torch.maximum((1.0 - CONTRACTION) / (0.5 * self.rules.eps) * residual, GROWTH * norm)
        self.best_residual, self.best_norm = residual, norm
        self.converged, self.lost, self.running = meets, ~finite, finite & ~meets
        self.diverged = self.stalled = torch.zeros_like(meets)
        self.since = torch.zeros_like(meets, dtype=torch.int32)

    def relative(self) -> Tensor:
        """The newest relative residuals, [B]."""
        return relative(self.residual, self.norm)

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


class _PartsJudge(_Judge):
    """The rules of :func:`pydeq.solve.parts.iterate_by_parts`: each part of a state meets the tolerance.

    The norms are those of the scaled state, and ``best`` is not scaled. Every sample has its own rounds.

    Attributes:
        scale: Divisors of the parts, [B, P].
        begins: Samples that begin a new round, with a new scale, at their newest image, bool [B].
    """

    scale: Tensor
    begins: Tensor

    def __init__(self, tolerances: PartTolerances, max_steps: int) -> None:
        super().__init__(tolerances.scaled_rules())
        self.tolerances = tolerances
        self.plain = min(max_steps, len(tolerances.layout.shapes)) - 1  # the most plain steps before the first round

    def judge(self, z: Tensor, f: Tensor, trials: Tensor | None) -> Tensor:
        tolerances = self.tolerances
        evaluated = super().judge(z, f, trials)
        finite = (self.residual + self.norm).isfinite()
        if self.evaluated > 1:
            rows = self.begins & finite
            kept = {name: getattr(self, name) for name in _ROUND}
            self._begin(finite, self.residual <= self.rules.rtol * self.norm + self.rules.atol)
            for name, old in kept.items():
                setattr(self, name, torch.where(rows, getattr(self, name), old))
            value, image = self.best
            self.best = torch.where(rows[:, None], z, value), torch.where(rows[:, None], f, image)
        residual, size = self.parts
        self.met = tolerances.met(residual, size)
        begins = evaluated & self.converged & ~self.met
        if self.evaluated <= self.plain:
            unknown = finite & tolerances.unknown(size)
            self.unknown = unknown if self.evaluated == 1 else unknown & self.unknown
            begins = begins | self.unknown
        self.begins, self.converged, self.running = begins, self.converged & ~begins, self.running | begins
        self.scale = torch.where(begins[:, None], tolerances.scale(size), self.scale)
        return evaluated

    def _measure(self, z: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        residual, size = self.parts = self.tolerances.measure(z, f)  # [B, P] each
        if self.evaluated == 0:
            self.scale = self.tolerances.scale(size)
        elif self.evaluated <= self.plain:
            self.scale = torch.where(self.unknown[:, None], self.tolerances.scale(size), self.scale)
        return row_norm(residual / self.scale), row_norm(size / self.scale)

    def relative(self) -> Tensor:
        return relative(*self.parts).amax(1)

    def scalars(self) -> Tensor:
        residual, size = self.tolerances.measure(*self.best)
        residual = torch.where(residual.isfinite() & size.isfinite(), residual, math.inf)
        worst = relative(residual, size).argmax(1, keepdim=True)
        scalars = super().scalars()
        columns = dict(zip(Scalar, scalars.unbind(1), strict=True))
        columns[Scalar.BEST] = residual.gather(1, worst)[:, 0]
        columns[Scalar.BEST_NORM] = size.gather(1, worst)[:, 0]
        return torch.stack([columns[name] for name in Scalar], dim=1)

    def counters(self) -> Tensor:
        # The tolerance of the scaled state is a little stricter than that of the parts.
        newest = self.running & (self.since == 0) & self.met
        contracted = self.best_residual < CONTRACTION * self.first
        self.converged = self.converged | (newest & (contracted | (self.evaluations == 1)))
        return super().counters()


_ROUND = (
    "first", "first_norm", "absorbed", "best_residual", "best_norm", "converged", "lost", "running", "diverged",
    "stalled", "since",
)  # fmt: skip
"""What a judge finds out in one round."""


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

    def restart(self, rows: Tensor) -> None:  # noqa: B027  # by default there is none
        """Forget the history of some samples, bool [B]; the next iterates are new initial ones."""


class _ScaledSteps(_Steps):
    """The steps of a solver that sees scaled states. Samples that begin a round take a plain step first."""

    def __init__(self, steps: _Steps, tolerances: PartTolerances) -> None:
        self.steps, self.tolerances = steps, tolerances

    def trials(self) -> Tensor | None:
        return self.steps.trials()

    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        assert isinstance(judge, _PartsJudge)
        down, up, scale = self.tolerances.down, self.tolerances.up, judge.scale.to(z.dtype)
        next = up(self.steps.next(down(z, scale), down(f, scale), judge), scale)
        self.steps.restart(judge.begins)
        return torch.where(judge.begins[:, None], f, next)


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

    def restart(self, rows: Tensor) -> None:
        assert self.used is not None
        self.used = torch.where(rows, 0, self.used)


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
        self.restarted: Tensor | None = None  # samples whose last step has no factor, [B]

    def next(self, z: Tensor, f: Tensor, judge: _Judge) -> Tensor:
        if self.restarted is not None:
            self.iterate = torch.where(self.restarted[:, None], z.to(self.iterate.dtype), self.iterate)
        g = f.to(self.iterate.dtype) - self.iterate
        step = g if self.last is None else self._step(g, *self.last, judge)
        self.last = step, g
        self.iterate = self.iterate + step
        return self.iterate.to(z.dtype)

    def restart(self, rows: Tensor) -> None:
        self.restarted = rows

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
        if self.restarted is not None:
            sound = sound & ~self.restarted
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

    def restart(self, rows: Tensor) -> None:
        self.search.searching = self.search.searching & ~rows


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
