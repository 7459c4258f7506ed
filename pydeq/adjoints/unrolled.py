"""Unrolled differentiation: autograd through every iteration of the solve.

The derivative is exact for the computed result, converged or not, and to any order. Memory grows with the evaluations.
The steps in :mod:`pydeq.ops` work in place and have no derivatives, so the steps here are made of differentiable
operations. The loop and its stopping rules are the same as in every solve.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pydeq.adjoints.base import Adjoint, AdjointResult, Problem
from pydeq.adjoints.change_check import ChangeCheck
from pydeq.arguments import check_max_steps, check_states_at, suggests_keywords
from pydeq.cell.linearization import recordable
from pydeq.cell.parameters import Stateless
from pydeq.cell.torch_compile import interpreted
from pydeq.ops.anderson_step import mixing_coefficients
from pydeq.ops.capture import capturing
from pydeq.ops.constants import Counter
from pydeq.ops.step import report
from pydeq.ops.termination import Rules, Verdict, judge
from pydeq.solve.compaction import Evaluator
from pydeq.solve.iteration import iterate
from pydeq.solve.solve import stopping_rules
from pydeq.solve.step_reports import any_running
from pydeq.solvers import Anderson, Picard, Solver
from pydeq.solvers.base import Workspace
from pydeq.state import State, layout_of


@suggests_keywords
@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The gradient of the iteration itself, for :class:`pydeq.Picard` or :class:`pydeq.Anderson`; also for z0.

    Args:
        checkpoint: Keep only the iterates and evaluate f again in backward, in forward's autocast and random state,
            instead of keeping the graphs of all evaluations.

    The output is the image of the best iterate, with no evaluation beyond those of the solve. ``states_at`` gives
    states with the gradients of the iterations that led to them. Samples that are done no longer iterate, and their
    gradient does not depend on the other samples. But if a cell returns NaN or Inf, the gradients of parameters may be
    NaN. Anderson's system is nearly singular near the solution, so second derivatives lose digits; with Picard they do
    not.

    Raises:
        TypeError: If the layer's solver is another one.

    Examples:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> deq = pydeq.DEQ(lambda z, x: torch.cos(z) + x, solver=pydeq.Picard(), adjoint=pydeq.Unrolled(), rtol=1e-5)
        >>> torch.autograd.grad(deq(torch.zeros(1), x), x)
        (tensor([0.5975]),)
    """

    distributes: ClassVar[bool] = False
    normed: ClassVar[bool] = False
    iterates: ClassVar[bool] = True

    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"checkpoint must be a bool, got {type(self.checkpoint).__name__}")

    def check(self, solver: Solver) -> None:
        if type(solver) not in _WORKSPACES:
            names = " or ".join(f"pydeq.{kind.__name__}" for kind in _WORKSPACES)
            raise TypeError(f"Unrolled differentiates the iterations of {names}, got {solver!r}")

    def solve(self, problem: Problem) -> AdjointResult:
        options = problem.options
        solver: Solver = options["solver"]
        self.check(solver)
        layout = layout_of(problem.z0)
        rules = stopping_rules(layout, options.get("rtol"), options.get("atol", 0.0))
        max_steps = check_max_steps("max_steps", options.get("max_steps", 50))
        states_at = check_states_at(options.get("states_at", ()))
        cast = torch.is_autocast_enabled(layout.device.type)

        read = ChangeCheck(problem.explicit().lasting, problem.cell.modules)
        repeated = _Repeated(problem.cell.call, problem.cell.modules)
        fn = problem.cell.sharing_weights()
        if self.checkpoint:  # an early stop raises an exception, and TorchScript in a cell would change it
            fn = partial(checkpoint, repeated, use_reentrant=False, early_stop=False)
        evaluator = _AttachedEvaluator(fn, problem.context, layout, cast)
        flat = recordable(layout.flatten(problem.z0))
        solution, _ = iterate(evaluator, flat, _Unrolling(solver), rules, max_steps, False, states_at=states_at)
        if not layout.batch:  # gradients of nothing are zeros, which have to go somewhere
            solution.image = layout.check(fn(problem.z0, *problem.context), cast, detach=False)
        repeated.watched = read.with_tensors(())
        output, states = solution.image, solution.states
        solution.value, solution.image, solution.states = _detach(solution.value), _detach(output), []
        return AdjointResult(output, solution, states=states)


class _AttachedEvaluator(Evaluator):
    """Calls fn on iterates that are new tensors in every step, and keeps the graph of what it returns."""

    detaches = False

    def evaluate(self, workspace: Workspace, k: int, running: int) -> Tensor:
        z = workspace.z[k % 2]
        return self.call(z, self.layout.view(z), self.layout, self.context)


class _Repeated:
    """A map for a checkpoint, which calls it again in backward, when ``watched`` is set.

    ``torch.func.functional_call`` replaces a module's tensors only for one call. So the second call gets the tensors of
    the first one.
    """

    def __init__(self, fn: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        self.fn = fn
        self.stateless = Stateless(modules, fn)
        self.watched: ChangeCheck | None = None

    @interpreted
    def __call__(self, *arguments: Any) -> Any:
        if self.watched is None:
            return self.fn(*arguments)
        self.watched.check("a checkpoint evaluates f again")
        return self.stateless.call(self.stateless.tensors, arguments)


@dataclass(frozen=True)
class _Unrolling(Solver):
    """A solver whose steps are made of differentiable operations."""

    solver: Solver

    def start(self, flat: Tensor, rules: Rules, max_steps: int) -> Workspace:
        return _WORKSPACES[type(self.solver)](flat, rules, max_steps, self.solver)


class _Unroll(Workspace):
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


class _UnrollPicard(_Unroll):
    def propose(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        self.counters[:, Counter.TRIED] |= (verdict.proceed & verdict.improved).int()
        if self.damping == 1.0:
            return f
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return (wide + self.damping * (f - wide)).to(z.dtype)


class _UnrollAnderson(_Unroll):
    """Anderson mixing with lists, newest entry first: the rings of :mod:`pydeq.ops.anderson_step` have no gradient."""

    def __init__(self, flat: Tensor, rules: Rules, max_steps: int, solver: Anderson) -> None:
        super().__init__(flat, rules, max_steps, solver)
        self.memory = min(solver.memory, max_steps)
        self.residuals: list[Tensor] = []  # g_j, float64 [B, D]
        self.values: list[Tensor] = []  # f(z_j) - (1 - damping) g_j
        self.gram: list[list[Tensor]] = []  # <g_i, g_j> for i <= j, [B]

    def propose(self, z: Tensor, f: Tensor, verdict: Verdict) -> Tensor:
        counters = self.counters
        compute = torch.promote_types(z.dtype, torch.float32)
        go = verdict.proceed[:, None]
        # Rows of samples that do not proceed are never read again. They must not put NaN into sums.
        f = torch.where(go, f, 0.0).to(compute)
        g = f - torch.where(go, z, 0.0).to(compute)
        self.residuals = [g.double(), *self.residuals][: self.memory]
        self.values = [f - (1.0 - self.damping) * g, *self.values][: self.memory]
        row = [(self.residuals[0] * other).sum(1) for other in self.residuals]
        self.gram = [row, *(old[: self.memory - 1 - j] for j, old in enumerate(self.gram))][: self.memory]

        counters[verdict.retry, Counter.COUNT] = 0
        gram = self._matrix()
        # A sample that has just begun or was retried has fewer columns than the lists.
        columns = torch.clamp(counters[:, Counter.COUNT].long() + 1, max=len(self.values))
        with torch.no_grad():
            index = torch.arange(len(self.values), device=z.device)
            valid = index < columns[:, None]
            seen = torch.where(valid[:, :, None] & valid[:, None, :], gram.detach(), 0.0)
            used = mixing_coefficients(seen, columns, self.solver.ridge)[1]
            inside = (index < used[:, None]) & go
        a = self._coefficients(gram, inside).to(compute)
        mixed = torch.zeros_like(f)
        for j, value in enumerate(self.values):
            mixed = mixed + a[:, j, None] * value
        proceed = verdict.proceed
        counters[:, Counter.COUNT] = torch.where(proceed, used.int(), counters[:, Counter.COUNT])
        counters[:, Counter.TRIED] |= (proceed & (used == 1) & verdict.improved).int()
        return mixed.to(z.dtype)

    def _matrix(self) -> Tensor:
        """The Gram matrix, float64 [B, m, m]."""
        m = len(self.gram)
        return torch.stack(
            [torch.stack([self.gram[min(i, j)][abs(i - j)] for j in range(m)], dim=1) for i in range(m)], dim=1
        )

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


_WORKSPACES: dict[type[Solver], type[_Unroll]] = {Picard: _UnrollPicard, Anderson: _UnrollAnderson}


def _detach(state: State) -> State:
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
