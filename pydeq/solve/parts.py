"""Solve with ``norm="parts"``: parts may have very different scales, and each part meets the tolerance.

Suppose the entries of one part are a thousand times smaller than another part's. At rtol 1e-3 they do not count in the
norm of the whole state. Here each part of each sample is divided by about its own norm. The divisor is a power of two,
so that nothing is rounded. The solvers then see parts of similar size. A sample is CONVERGED once, at one evaluation,
for every part p

    ||f_p - z_p|| <= atol + rtol ||f_p||

The scale is that of the first image, f(z0), and at least atol / rtol. If the scaled state meets its tolerance but a
part does not, since parts have changed much, the solve continues from the image with new scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pydeq.ops.capture import capturing
from pydeq.ops.constants import CONTRACTION, RUNNING, Counter, Scalar, Status
from pydeq.ops.reduction import norms, wide_dtype
from pydeq.ops.termination import Rules
from pydeq.solution import Solution, relative
from pydeq.solve.compaction import Evaluator
from pydeq.solve.iteration import iterate
from pydeq.solvers.base import Solver, Workspace
from pydeq.state import Layout


@dataclass
class PartTolerances:
    """The tolerance of each part: rtol and atol of the solve."""

    layout: Layout
    rules: Rules

    def norms(self, flat: Tensor) -> Tensor:
        """The norm of each part, float64 [B, P]."""
        return torch.stack([norms([part])[0] for part in flat.split(self.layout.sizes, dim=1)], dim=1)

    def measure(self, value: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and norm of each part, float64 [B, P] each."""
        compute = wide_dtype(value.dtype)
        return self.norms(image.to(compute) - value.to(compute)), self.norms(image)

    def met(self, residual: Tensor, norm: Tensor) -> Tensor:
        """Whether each sample meets the tolerance in all of its parts, bool [B]."""
        return (residual <= self.rules.atol + self.rules.rtol * norm).all(1)

    def unknown(self, norm: Tensor) -> Tensor:
        """Whether a part of each sample is zero, which has no known scale yet; bool [B]."""
        used = torch.tensor([size > 0 for size in self.layout.sizes], device=norm.device)
        return ((norm == 0) & used).any(1)

    def down(self, flat: Tensor, scale: Tensor) -> Tensor:
        """Divide states [B, D] by the scale [B, P], in their dtype."""
        parts = flat.split(self.layout.sizes, dim=1)
        return torch.cat([part / scale[:, i, None] for i, part in enumerate(parts)], dim=1)

    def up(self, flat: Tensor, scale: Tensor) -> Tensor:
        """Multiply states [B, D] by the scale [B, P], in their dtype."""
        parts = flat.split(self.layout.sizes, dim=1)
        return torch.cat([part * scale[:, i, None] for i, part in enumerate(parts)], dim=1)

    def scale(self, norm: Tensor) -> Tensor:
        """Divisors of the parts, [B, P]: powers of two."""
        rules = self.rules
        if rules.rtol == 0.0 and rules.atol > 0.0:
            return torch.ones_like(norm)
        size = norm if rules.atol == 0.0 else norm + rules.atol / rules.rtol
        size = torch.where(size.isfinite(), size, 0.0)
        # A part that is zero has no known scale yet.
        size = torch.where(size > 0, size, size.amax(1, keepdim=True))
        size = torch.where(size > 0, size, 1.0)
        tiny = torch.finfo(self.layout.dtype).tiny
        limits = math.log2(tiny) / 2, -math.log2(tiny) / 2
        return torch.exp2(size.log2().round().clamp(*limits))

    def scaled_rules(self) -> Rules:
        """Rules for the scaled state under which every part meets its tolerance.

        Part p is within a factor sqrt(2) of its scale s_p. So sum_p (r_p / s_p)^2 <= c^2 sum_p (n_p / s_p)^2 for
        c = rtol / (2 sqrt(P)) gives r_p <= rtol n_p; with atol > 0 half of the bound is absolute.
        """
        rules, parts = self.rules, len(self.layout.shapes)
        if rules.rtol == 0.0:
            return rules
        rtol = rules.rtol / (2.0 * math.sqrt(parts))
        if rules.atol == 0.0:
            return replace(rules, rtol=rtol, atol=0.0)
        return replace(rules, rtol=rtol / 2.0, atol=rules.rtol / 4.0)


class _Scaled(Evaluator):
    """Evaluates fn at scaled states.

    Args:
        inner: Evaluates fn itself.
        tolerances: Measures the parts.
        scale: Divisor of each part, [B, P].
        given_up: Samples that no longer iterate, bool [B]; their image is set to their iterate.
        first: The image of the first iterates, where it is known.
        trace: Whether to measure every evaluation.
    """

    def __init__(
        self,
        inner: Evaluator,
        tolerances: PartTolerances,
        scale: Tensor,
        given_up: Tensor,
        first: Tensor | None,
        trace: bool,
    ) -> None:
        super().__init__(inner.fn, inner.context, inner.layout, inner.cast)
        self.inner, self.tolerances, self.first, self.trace = inner, tolerances, first, trace
        self.scale, self.given_up = scale.to(inner.layout.dtype), given_up[:, None]
        self.worst: list[Tensor] = []  # for each evaluation the largest relative residual of a part, [B]

    def evaluate(self, workspace: Workspace, k: int, running: int) -> Tensor:
        z = self.up(workspace.z[k % 2])
        if self.first is None:
            f = self.inner.call(z, self.layout.view(z), self.layout, self.context)
        else:
            f, self.first = self.first, None
        self.calls = self.inner.calls
        f = torch.where(self.given_up, z, f)
        if self.trace:
            self.worst.append(relative(*self.tolerances.measure(z, f)).amax(1))
        return self.down(f)

    def product(self, v: Tensor) -> Tensor:
        return self.down(self.inner.product(self.up(v)))

    def jacobian(self, z: Tensor, f: Tensor) -> Tensor:
        matrix = self.inner.jacobian(self.up(z), self.up(f)).double()
        scale = self.up(torch.ones_like(z)).to(matrix)
        return matrix * scale[:, None] / scale[:, :, None]

    def down(self, flat: Tensor) -> Tensor:
        """Divide states by the scale, [B, D]."""
        return self.tolerances.down(flat, self.scale)

    def up(self, flat: Tensor) -> Tensor:
        """Multiply states by the scale, [B, D]."""
        return self.tolerances.up(flat, self.scale)


@dataclass
class _Course:
    """The state of the solve over all rounds.

    Args:
        value, image: [B, D].
        scalars, counters: As in a workspace.
        trace: Rows of relative residuals, [B] each.
        states: The states for the entries of ``states_at`` that are already reached, [B, D].
    """

    value: Tensor
    image: Tensor
    scalars: Tensor
    counters: Tensor
    trace: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def iterate_by_parts(
    evaluator: Evaluator,
    flat: Tensor,
    solver: Solver,
    rules: Rules,
    max_steps: int,
    trace: bool,
    states_at: Sequence[int] = (),
) -> tuple[Solution, Workspace]:
    """Run :func:`pydeq.solve.iteration.iterate` until each part of a state meets the tolerance.

    Returns:
        The solution, whose residuals are those of the part with the largest relative one; and the workspace of the
        last round, whose states are scaled.
    """
    layout = evaluator.layout
    if len(layout.shapes) == 1 or layout.batch == 0:
        return iterate(evaluator, flat, solver, rules, max_steps, trace, states_at=states_at)
    tolerances = PartTolerances(layout, rules)
    captured = capturing(flat.device)
    begin = _begin(evaluator, flat, tolerances, 1 if captured else min(max_steps, len(layout.shapes)), states_at)
    start, first, scale = begin.start, begin.image, tolerances.scale(tolerances.norms(begin.image))
    none = torch.zeros(layout.batch, dtype=torch.bool, device=flat.device)
    again, given_up, course = ~none, none, None  # again: the samples of this round
    before = evaluator.calls - 1  # evaluations of earlier rounds
    while True:
        scaled = _Scaled(evaluator, tolerances, scale, given_up, first, trace)
        later = [count - before for count in states_at if count > before]
        round, workspace = iterate(
            scaled, scaled.down(start), solver, tolerances.scaled_rules(), max_steps - before, trace, states_at=later
        )
        first = None
        course = _merge(course, scaled, round, workspace, again)
        if begin is not None:
            course.trace[:0], course.states[:0] = begin.trace if trace else [], begin.states
            course.counters[:, Counter.EVALUATIONS] += begin.evaluations
            begin = None
        for count, state in zip(later, round.states, strict=True):
            if before + count <= evaluator.calls:
                course.states.append(torch.where(again[:, None], scaled.up(layout.flatten(state)), course.image))
        before = evaluator.calls

        residual, norm = tolerances.measure(course.value, course.image)
        met, status = tolerances.met(residual, norm), course.counters[:, Counter.STATUS]
        again = (status == Status.CONVERGED) & ~met
        if captured or before >= max_steps or not bool(again.any()):
            break
        given_up = (status != RUNNING) & (status != Status.CONVERGED)
        start = torch.where(again[:, None], course.image, course.value)
        scale = torch.where(again[:, None], tolerances.scale(norm), scale)

    _judge(course, met, again)
    residual = torch.where(residual.isfinite() & norm.isfinite(), residual, math.inf)
    worst = relative(residual, norm).argmax(1, keepdim=True)
    course.scalars[:, Scalar.BEST] = residual.gather(1, worst)[:, 0]
    course.scalars[:, Scalar.BEST_NORM] = norm.gather(1, worst)[:, 0]
    traced = torch.stack(course.trace).to(wide_dtype(layout.dtype)) if trace else None
    value, image = layout.view(course.value), layout.view(course.image)
    solution = Solution(value, image, evaluator.calls, course.scalars, course.counters, traced)
    states = course.states + [course.image] * (len(states_at) - len(course.states))
    solution.states = [layout.view(state) for state in states]
    return solution, workspace


@dataclass
class _Begin:
    """The start of the first round.

    Args:
        start, image: Iterates and their images, [B, D].
        evaluations: Earlier evaluations of each sample, int32 [B].
        trace, states: From the earlier evaluations, as in :class:`_Course`.
    """

    start: Tensor
    image: Tensor
    evaluations: Tensor
    trace: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def _begin(
    evaluator: Evaluator, flat: Tensor, tolerances: PartTolerances, most: int, states_at: Sequence[int]
) -> _Begin:
    """Evaluate fn. Samples with a part at zero, which has no known scale yet, take plain steps first."""
    layout = evaluator.layout

    def call(start: Tensor) -> Tensor:
        return evaluator.call(start, layout.view(start), layout, evaluator.context)

    at = _Begin(flat, call(flat), torch.zeros(layout.batch, dtype=torch.int32, device=flat.device))
    for count in range(1, most):
        unknown = tolerances.unknown(tolerances.norms(at.image))
        if not bool(unknown.any()):
            break
        residual, norm = tolerances.measure(at.start, at.image)
        at.trace.append(torch.where(unknown, relative(residual, norm).amax(1), torch.nan))
        image = at.image.clone()  # fn may reuse its buffer
        if count in states_at:
            at.states.append(image)
        at.evaluations += unknown.int()
        at.start = torch.where(unknown[:, None], image, at.start)
        at.image = call(at.start)
    return at


def _merge(course: _Course | None, scaled: _Scaled, round: Solution, workspace: Workspace, again: Tensor) -> _Course:
    """Merge a round into the course. Samples that are not in ``again`` and were not moved keep their results."""
    value, image = scaled.up(workspace.best[0]), scaled.up(workspace.best[1])
    scalars, counters = workspace.scalars, workspace.counters
    rows: list[Tensor] = []
    if round.trace is not None:
        rows = [
            torch.where(row.isnan(), torch.nan, worst) for row, worst in zip(round.trace, scaled.worst, strict=True)
        ]
    if course is None:
        return _Course(value, image, scalars, counters, rows)
    # A sample that is done is evaluated once, at its value. If other samples have moved it, it continues.
    moved = ~scaled.given_up[:, 0] & (counters[:, Counter.EVALUATIONS] > 1)
    new = again | moved
    counters[:, Counter.EVALUATIONS] += course.counters[:, Counter.EVALUATIONS]
    wide = new[:, None]
    return _Course(
        torch.where(wide, value, course.value),
        torch.where(wide, image, course.image),
        torch.where(wide, scalars, course.scalars),
        torch.where(wide, counters, course.counters),
        course.trace + [torch.where(new, row, torch.nan) for row in rows],
        course.states,
    )


def _judge(course: _Course, met: Tensor, unmet: Tensor) -> None:
    """Set statuses by the tolerance of the parts; the tolerance of the scaled state is a little stricter.

    Use it only for values of the last evaluation: if samples depend on each other, earlier values are out of date.
    """
    status = course.counters[:, Counter.STATUS]
    ended = (status == Status.MAX_STEPS) & (course.counters[:, Counter.SINCE_BEST] == 0)
    scalars = course.scalars
    contracted = scalars[:, Scalar.BEST] < CONTRACTION * scalars[:, Scalar.FIRST]
    begins = course.counters[:, Counter.EVALUATIONS] == 1
    status = torch.where(ended & met & (contracted | begins), int(Status.CONVERGED), status)
    course.counters[:, Counter.STATUS] = torch.where(unmet, int(Status.MAX_STEPS), status).to(torch.int32)
