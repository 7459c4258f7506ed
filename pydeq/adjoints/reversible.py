"""Reversible deep equilibria: an iteration that can be run backwards, and so differentiated in constant memory.

Two states alternate,

    y <- (1 - b) y + b f(z),    z <- (1 - b) z + b f(y),    y = z = z0 at first

and one evaluation undoes each half: z = (z' - b f(y')) / (1 - b), then y = (y' - b f(z)) / (1 - b). Backward evaluates
f with gradients on at the points of the iteration, and computes the exact derivative by the chain rule.

The loop differs from the loop of other solves: it looks back after each iteration, and it records the iterations that
each sample took part in, so that they can be undone.

Undoing amplifies rounding errors. If f contracts, an iteration has two eigenvalues for each eigenvalue of J. Their
product is (1 - b)^2, and neither is above 1 in modulus. So undoing n iterations amplifies errors by up to (1 - b)^-2n.
For this reason the two states are kept in float64 for every dtype of f. Backward starts again from a fixed number of
kept states along the way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pydeq.adjoints.base import Adjoint, AdjointResult, Problem, refuse_vectorized
from pydeq.adjoints.change_check import ChangeCheck
from pydeq.adjoints.explicit import Explicit
from pydeq.adjoints.graph_inputs import graph_inputs
from pydeq.adjoints.postponed_hooks import hooks_postponed
from pydeq.arguments import (
    check_integer,
    check_max_steps,
    check_number,
    check_states_at,
    set_fields,
    suggests_keywords,
)
from pydeq.cell.linearization import linearize, recordable
from pydeq.cell.torch_compile import interpreted
from pydeq.ops.capture import capturing
from pydeq.ops.constants import RUNNING, STALL_EPSILONS, Counter, Scalar, Status
from pydeq.ops.reduction import norms
from pydeq.ops.termination import Rules, judge
from pydeq.solution import Solution
from pydeq.solve.iteration import warn_of_coupling
from pydeq.solve.solve import stopping_rules
from pydeq.solve.step_reports import any_running
from pydeq.state import Layout, State, as_tuple, layout_of

# Above this relative error of undone states, gradients are taken at the wrong points: backward warns.
_LOST = 1e-2


@suggests_keywords
@dataclass(frozen=True)
class Reversible(Adjoint):
    """The exact gradient of a reversible iteration, in memory that does not grow with it.

    y <- (1 - b) y + b f(z),    z <- (1 - b) z + b f(y)

    It replaces the layer's solver, also in evaluation. An iteration evaluates f twice, so an odd ``max_steps`` is
    rounded down. The residual is ||f(y) - y||, and the output is f(y) at the best y. Backward evaluates f twice per
    iteration with gradients. z0 also gets its gradient.

    Args:
        damping: b in (0, 1). A smaller b is slower. A larger b is harder to undo: each undone iteration amplifies
            rounding errors by up to (1 - b)^-2, which is 4 for .5 and 100 for .9. The two states are kept in float64
            for every dtype of z0. In the worst case all its digits are lost after 26 iterations at .5, and after 8 at
            .9.
        checkpoints: Number of iterations with kept states, at least 0. Each costs two float64 vectors per sample. At
            most max_steps / (2 checkpoints + 2) iterations are undone in a row. Backward warns if it arrives at a
            checkpoint with a relative error above 1e-2.

    The cell must give the same values when called again (no fresh dropout masks). Second derivatives raise.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range, or ``max_steps`` of a call below 2.
        RuntimeError: In forward, if the cell captures a tensor that was computed from tensors that require grad: pass
            it as context.

    Source: McCallum, Arora and Foster, Reversible Deep Equilibrium Models, 2025.

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, adjoint=pydeq.Reversible(damping=0.5), rtol=1e-5)
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([0.59...]),)
    """

    distributes: ClassVar[bool] = False
    normed: ClassVar[bool] = False
    exports: ClassVar[bool] = False
    iterates: ClassVar[bool] = True

    damping: float = 0.5
    checkpoints: int = 4

    def __post_init__(self) -> None:
        damping = check_number("damping", self.damping)
        if not 0.0 < damping < 1.0:
            raise ValueError(f"damping must be in (0, 1), got {damping}")
        set_fields(self, damping=damping, checkpoints=check_integer("checkpoints", self.checkpoints, 0))

    def solve(self, problem: Problem) -> AdjointResult:
        explicit = problem.explicit()
        read = ChangeCheck(explicit.lasting, problem.cell.modules)
        ends, sources = self._iterate(problem, explicit)
        z0 = as_tuple(problem.z0)
        if not sources and not any(part.requires_grad for part in z0):
            return AdjointResult(ends.solution.image, ends.solution)
        device = ends.layout.device.type
        autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
            torch.is_autocast_cache_enabled(),
        )
        run = _Run(self, ends.layout, explicit, sources, autocast, read.with_tensors(()))
        output = _Reverse.apply(run, ends, *z0, *sources)
        return AdjointResult(output if ends.layout.is_tuple else output[0], ends.solution)

    def evaluate(self, problem: Problem) -> Solution:
        return self._iterate(problem)[0].solution

    def _iterate(self, problem: Problem, explicit: Explicit | None = None) -> tuple[_Ends, tuple[Tensor, ...]]:
        """Run the iteration. With ``explicit``, also return the tensors with gradients that fn depends on."""
        options, b = problem.options, self.damping
        layout = layout_of(problem.z0)
        rules = stopping_rules(layout, options.get("rtol"), options.get("atol", 0.0))
        unfrozen = replace(rules, freeze=False)
        max_steps = check_max_steps("max_steps", options.get("max_steps", 50))
        if max_steps < 2:
            raise ValueError(f"max_steps must be at least 2 for Reversible, which evaluates in pairs, got {max_steps}")
        states_at = check_states_at(options.get("states_at", ()))
        cast = torch.is_autocast_enabled(layout.device.type)
        sources: tuple[Tensor, ...] = ()
        states: list[State] = []

        def evaluate(wide: Tensor) -> Tensor:
            z = layout.view(wide.to(layout.dtype))
            return layout.flatten(layout.check(problem.cell.call(z, *problem.context), cast))

        with torch.no_grad():
            start = recordable(layout.flatten(problem.z0))
            y = z = start.double()
            rounded = f = start
            scalars = z.new_zeros(layout.batch, len(Scalar))
            counters = z.new_zeros(layout.batch, len(Counter), dtype=torch.int32)
            value, image = start, start  # the best y and f(y)
            best_y, best_z = y, z  # there, after the whole iteration
            best_n = counters.new_zeros(layout.batch)  # the number of the best iteration, from 1
            stopped_n = best_n  # the last iteration of each sample before ``awake``
            n, last, awake = 0, max_steps // 2, None
            stride = -(-last // (self.checkpoints + 1))
            kept: dict[int, tuple[Tensor, Tensor]] = {}
            if explicit is not None and not layout.batch:  # the zero gradients need a graph
                sources = _first_evaluation(explicit, start, layout)[1]
            while layout.batch and n < last:
                if n == 0 and explicit is not None:  # this graph has the tensors that fn depends on
                    f, sources = _first_evaluation(explicit, start, layout)
                else:
                    f = evaluate(z)
                n += 1
                status = counters[:, Counter.STATUS]
                goes = status == RUNNING
                if awake is None:
                    stopped_n = torch.where(goes, n, stopped_n)
                else:
                    goes = _kept(status)
                active = goes[:, None]
                y = torch.where(active, (1.0 - b) * y + b * f, y)
                rounded = y.to(layout.dtype)
                f = evaluate(y)
                z = torch.where(active, (1.0 - b) * z + b * f, z)
                verdict = judge(rounded, f, scalars, counters, rules if awake is None else unfrozen, n == last)
                counters[:, Counter.EVALUATIONS] += verdict.active.int()  # judge counts one of the two
                # A plain step from the best iterate could not be undone.
                counters[verdict.retry, Counter.STATUS] = int(Status.NONFINITE)
                improved = verdict.improved[:, None]
                value, image = torch.where(improved, rounded, value), torch.where(improved, f, image)
                best_y, best_z = torch.where(improved, y, best_y), torch.where(improved, z, best_z)
                best_n = torch.where(verdict.improved, n, best_n)
                states += [layout.view(image)] * sum(count in states_at for count in (2 * n, 2 * n + 1))
                if n == 1 and 1 in states_at:  # there is no output before the first pair of evaluations
                    states.append(layout.view(image))
                # The y and z of a frozen sample differ: samples that depend on it would alternate between two states.
                if awake is None and layout.batch > 1 and (n == last or not capturing(layout.device)):
                    moved, woken = _look_back(rounded, f, scalars, counters, rules, 2 * n, n == last)
                    if not capturing(layout.device) and bool(moved.any()):
                        awake = n
                        if bool(woken.any()):
                            warn_of_coupling(int(woken.sum()), layout.batch)
                if not any_running(counters):
                    break
                if awake == n:
                    counters[_kept(counters[:, Counter.STATUS]), Counter.EVALUATIONS] = 2 * n
                if explicit is not None and n % stride == 0 and n < last:
                    kept[n] = y, z
            again = torch.zeros_like(best_n, dtype=torch.bool)
            if awake is None:
                awake, stopped_n = n, best_n
                coupled = False
            else:  # samples that moved others cannot be left out: all end with the last iteration
                coupled, again = True, _kept(counters[:, Counter.STATUS])
                value, image = torch.where(again[:, None], rounded, value), torch.where(again[:, None], f, image)
                best_y, best_z = torch.where(again[:, None], y, best_y), torch.where(again[:, None], z, best_z)
                stopped_n, best_n = torch.where(again, stopped_n, best_n), torch.where(again, n, best_n)
                residual, norm = norms([f.double() - rounded.double(), f])
                for column, of in ((Scalar.BEST, residual), (Scalar.BEST_NORM, norm)):
                    scalars[:, column] = torch.where(again, of, scalars[:, column])
            if n:  # samples that were never finite stay at z0, as in other solves
                value = torch.where(scalars[:, Scalar.BEST, None].isfinite(), value, start)
            states += [layout.view(image)] * (len(states_at) - len(states))
            solution = Solution(layout.view(value), layout.view(image), 2 * n, scalars, counters, None)
            solution.states = states
        taken = _Taken(best_n, stopped_n, again, awake, coupled)
        return _Ends(layout, solution, start, best_y, best_z, taken, n, kept), sources


def _kept(status: Tensor) -> Tensor:
    """Whether each sample is not lost: it is running, or could run again."""
    return status <= Status.STALLED


def _look_back(
    y: Tensor, f: Tensor, scalars: Tensor, counters: Tensor, rules: Rules, evaluations: int, last: bool
) -> tuple[Tensor, Tensor]:
    """Check the samples that had converged before the last evaluation again; only these are still at their best y.

    Returns:
        Which of these samples have a different image now, and which of those miss the tolerance; bool [B] each.
    """
    others = (counters[:, Counter.STATUS] != Status.CONVERGED)[:, None]
    before = scalars.clone(), counters.clone()
    verdict = judge(y, f, scalars, counters, rules, last, look_back=evaluations)
    for now, then in zip((scalars, counters), before, strict=True):
        now.copy_(torch.where(others, then, now))
    moved = verdict.improved & ~others[:, 0]
    woken = moved & (counters[:, Counter.STATUS] != Status.CONVERGED)
    change = (scalars[:, Scalar.BEST] - before[0][:, Scalar.BEST]).abs()
    return woken | (moved & (change > STALL_EPSILONS * rules.eps * scalars[:, Scalar.BEST_NORM])), woken


@dataclass(frozen=True)
class _Taken:
    """The iterations that led to the outputs.

    Args:
        best: The number of the iteration whose f(y) is a sample's output, from 1; int32 [B].
        stopped: The number of the last iteration that a sample took part in before ``awake``, int32 [B].
        again: Whether a sample also took part in the iterations after ``awake``, bool [B].
        awake: The number of the iteration after which some samples ran again.
        coupled: Whether samples are known to depend on each other.
    """

    best: Tensor
    stopped: Tensor
    again: Tensor
    awake: int
    coupled: bool

    def on(self, n: int) -> Tensor:
        """Which samples took part in iteration ``n``, [B, 1]."""
        on = self.stopped >= n
        return (on | self.again if n > self.awake else on)[:, None]


@dataclass(frozen=True)
class _Ends:
    """The start of the iteration, and its states at the best iterate.

    Args:
        start: z0, [B, D].
        y, z: After the best iteration, float64 [B, D].
        taken: The iterations that led to the outputs.
        iterations: The largest number of iterations of a sample.
        kept: The two states after some iterations.
    """

    layout: Layout
    solution: Solution
    start: Tensor
    y: Tensor
    z: Tensor
    taken: _Taken
    iterations: int
    kept: dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Run:
    """The data that backward needs in addition to tensors.

    Args:
        explicit: fn as a function of the tensors that it is known to depend on.
        sources: The tensors that fn depends on and that require grad: tensors that ``explicit`` knows, and captured
            leaves.
        autocast: The autocast state of forward: device, dtype, whether it is on, whether casts are cached.
        watched: Raises if tensors or modules have changed when fn is evaluated again.
    """

    settings: Reversible
    layout: Layout
    explicit: Explicit
    sources: tuple[Tensor, ...]
    autocast: tuple[str, torch.dtype, bool, bool]
    watched: ChangeCheck

    def pull(self, wide: Tensor, seed: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return f at ``wide`` [B, D] and pull the cotangent ``seed`` of f back to ``wide``, adding to ``sums``."""
        layout = self.layout
        device, dtype, enabled, cached = self.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled, cached):
            tensors, cut = _cut(self.explicit.tensors)
            at = linearize(lambda z: self.explicit(z, tensors), layout.view(wide.to(layout.dtype)), ())
        f = torch.cat([part.detach().reshape(layout.batch, -1) for part in at.y], 1).double()
        pairs = [
            (part, v)
            for part, v in zip(at.y, as_tuple(layout.view(seed.to(layout.dtype))), strict=True)
            if part.requires_grad
        ]
        pulled = torch.zeros_like(f)
        if pairs:
            outputs, seeds = zip(*pairs, strict=True)
            inputs = tuple(cut.get(id(source), source) for source in self.sources)
            with hooks_postponed(inputs):
                grads = torch.autograd.grad(outputs, (*at.z, *inputs), seeds, allow_unused=True)
            parts = len(at.z)
            z = tuple(torch.zeros_like(of) if g is None else g for g, of in zip(grads[:parts], at.z, strict=True))
            pulled = layout.flatten(z if layout.is_tuple else z[0]).double()
            for total, gradient in zip(sums, grads[parts:], strict=True):
                if gradient is not None:
                    total += gradient
        return f, pulled


def _first_evaluation(explicit: Explicit, start: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return f at ``start`` [B, D], and the tensors with gradients that fn depends on."""
    first_node = torch.autograd._get_sequence_nr()  # pyright: ignore
    tensors, cut = _cut(explicit.tensors)
    at = linearize(lambda z: explicit(z, tensors), layout.view(start), ())
    sources, hidden = graph_inputs(at, explicit, first_node, tensors)
    whole = {id(cut[id(x)]): x for x in explicit.tensors if id(x) in cut}
    sources = tuple(whole.get(id(source), source) for source in sources)
    if hidden:
        raise RuntimeError(
            "Reversible cannot reach the gradients of a tensor that the cell captures and that is computed from"
            " others: pass that tensor to the layer as context"
        )
    y = tuple(part.detach() for part in at.y)
    return layout.flatten(y if layout.is_tuple else y[0]), sources


def _cut(tensors: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Replace computed tensors by leaves; also return the leaves by the ids of the tensors that they replace.

    A tensor and the tensors that it was computed from may both be sources. The graph outside adds the gradient that
    passes from one to the other.
    """
    cut = {id(x): x.detach().requires_grad_() for x in tensors if x.requires_grad and not x.is_leaf}
    return [cut.get(id(x), x) for x in tensors], cut


class _Reverse(torch.autograd.Function):
    """The output of the iteration; backward undoes the iteration."""

    @staticmethod
    def forward(run: _Run, ends: _Ends, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in as_tuple(ends.solution.image))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, ends, *tensors = inputs
        ctx.iterations, ctx.kept, ctx.taken = ends.iterations, list(ends.kept), ends.taken
        # The sources are saved so that autograd checks that they have not changed.
        kept = [state for pair in ends.kept.values() for state in pair]
        ctx.save_for_backward(ends.start, ends.y, ends.z, *kept, *tensors[len(ends.layout.shapes) :])

    @staticmethod
    @interpreted
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        taken: _Taken = ctx.taken
        refuse_vectorized(cotangents, run.settings)
        layout, b = run.layout, run.settings.damping
        start, y, z, *saved = ctx.saved_tensors
        run.watched.check("Reversible evaluates f again")
        kept = {n: (saved[2 * i], saved[2 * i + 1]) for i, n in enumerate(ctx.kept)}
        kept[0] = start.double(), start.double()
        v = layout.flatten(cotangents if layout.is_tuple else cotangents[0]).double()
        sums = [torch.zeros_like(of, dtype=torch.promote_types(of.dtype, torch.float32)) for of in run.sources]
        lost = v.new_zeros(())
        of_y, of_z = torch.zeros_like(v), torch.zeros_like(v)  # the cotangents of the two states
        for n in range(ctx.iterations, 0, -1):
            on, ends = taken.on(n), (taken.best == n)[:, None]
            reached = on | taken.coupled  # samples that stay in place still move samples that depend on them

            # z = (1 - b) z_before + b f(y), and the output is f(y) of the last iteration
            seed = torch.where(on, b * of_z, 0.0) + torch.where(ends, v, 0.0)
            f, pulled = run.pull(y, seed, sums)
            of_y = torch.where(reached, of_y + pulled, of_y)
            of_z = torch.where(on, (1.0 - b) * of_z, of_z)
            z = torch.where(on, (z - b * f) / (1.0 - b), z)

            # y = (1 - b) y_before + b f(z_before)
            seed = torch.where(on, b * of_y, 0.0)
            f, pulled = run.pull(z, seed, sums)
            of_z = torch.where(reached, of_z + pulled, of_z)
            of_y = torch.where(on, (1.0 - b) * of_y, of_y)
            y = torch.where(on, (y - b * f) / (1.0 - b), y)

            if n - 1 in kept:
                lost = torch.maximum(lost, _relative_error(y, kept[n - 1][0], on))
                y, z = (torch.where(on, there, here) for there, here in zip(kept[n - 1], (y, z), strict=True))

        if not capturing(lost.device) and float(lost) > _LOST:
            warnings.warn(
                f"the reversible iteration was undone to states that are off by {float(lost):.1g}, which gradients of"
                " early iterations suffer from: raise checkpoints, lower the damping or max_steps, or loosen rtol",
                RuntimeWarning,
                stacklevel=2,
            )
        of_start = (of_y + of_z).to(layout.dtype)
        of_z0 = as_tuple(layout.view(of_start))
        return (None, None, *of_z0, *(total.to(of.dtype) for total, of in zip(sums, run.sources, strict=True)))


def _relative_error(found: Tensor, expected: Tensor, rows: Tensor) -> Tensor:
    """The largest relative error of a finite sample, 0-d; for small states, the absolute error per entry."""
    error = (found - expected).norm(dim=1)
    scale = expected.norm(dim=1).clamp_min(math.sqrt(expected.shape[1]))
    return torch.where(rows[:, 0] & error.isfinite(), error / scale, 0.0).amax()
