"""Unrolled differentiation: autograd through every iteration of the solve.

The derivative is exact for the computed result, converged or not, and to any order. Memory grows with the evaluations.
The steps in :mod:`pydeq.ops` work in place and have no derivatives, so the steps here are made of differentiable
operations. The loop and its stopping rules are the same as in every solve.
"""

from __future__ import annotations

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
from pydeq.ops.termination import Rules
from pydeq.solve.iteration import iterate
from pydeq.solve.solve import stopping_rules
from pydeq.solve.unrolling import AttachedEvaluator, Unroll, UnrollAnderson, UnrollPicard
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
        evaluator = AttachedEvaluator(fn, problem.context, layout, cast)
        flat = recordable(layout.flatten(problem.z0))
        solution, _ = iterate(evaluator, flat, _Unrolling(solver), rules, max_steps, False, states_at=states_at)
        if not layout.batch:  # gradients of nothing are zeros, which have to go somewhere
            solution.image = layout.check(fn(problem.z0, *problem.context), cast, detach=False)
        repeated.watched = read.with_tensors(())
        output, states = solution.image, solution.states
        solution.value, solution.image, solution.states = _detach(solution.value), _detach(output), []
        return AdjointResult(output, solution, states=states)


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


_WORKSPACES: dict[type[Solver], type[Unroll]] = {Picard: UnrollPicard, Anderson: UnrollAnderson}


def _detach(state: State) -> State:
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
