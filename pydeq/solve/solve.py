"""Start one solve: check its options, build its stopping rules and its evaluator, and run the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from pydeq.arguments import check_max_steps, check_norm, check_states_at, check_tolerance, shown
from pydeq.cell.autocast import Autocast
from pydeq.cell.scope import solve_scope
from pydeq.ops.capture import exporting
from pydeq.ops.reduction import WHOLE, Reduction
from pydeq.ops.termination import Rules, default_rtol
from pydeq.solution import Solution
from pydeq.solve.compaction import CompactingEvaluator, Evaluator
from pydeq.solve.dense_jacobian import DenseJacobian
from pydeq.solve.iteration import iterate
from pydeq.solve.parts import iterate_by_parts
from pydeq.solve.products import Products
from pydeq.solve.ranks import ALONE, RankAgreement, check_ranks
from pydeq.solvers import Anderson, NewtonKrylov, Solver, TrustRegion
from pydeq.solvers.base import NewtonSolver, Workspace
from pydeq.state import Layout, State, layout_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_DEFAULT_SOLVER = Anderson()


def solve(fn: Callable[..., Any], z0: State, context: Sequence[Any] = (), **options: Any) -> Solution:
    """Solve z = fn(z, *context) for a tensor or a tuple of tensors; the keywords are :func:`pydeq.fixed_point`'s."""
    solution, workspace = solve_keeping_workspace(fn, z0, context, **options)
    workspace.scratch.release()
    return solution


def solve_keeping_workspace(
    fn: Callable[..., Any],
    z0: State,
    context: Sequence[Any],
    *,
    solver: Solver | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 50,
    trace: bool = False,
    freeze: bool = True,
    stall: bool = True,
    compact: bool = False,
    batched_context: Sequence[bool] | None = None,
    process_group: ProcessGroup | None = None,
    sharded: bool = False,
    states_at: Sequence[int] = (),
    norm: Literal["all", "parts"] = "all",
) -> tuple[Solution, Workspace]:
    """Solve z = fn(z, *context) and return the solver's workspace, too; the keywords are :func:`pydeq.fixed_point`'s.

    Args:
        fn: A map of states, which are tensors or tuples of tensors.
        z0: The initial state, a tensor or a tuple of tensors.
        context: Passed on to ``fn``.
        batched_context: Must be checked already if ``compact`` is set.
    """
    if solver is None:
        solver = _DEFAULT_SOLVER
    elif not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {shown(solver)}")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fixed_point does not work under torch.func transforms (it has no gradient, and stops samples by their"
            " values): use pydeq.DEQ, which does"
        )
    if exporting():
        raise RuntimeError(
            "a solve whose number of evaluations depends on values cannot be exported: use pydeq.DEQ, which can, see"
            " pydeq.export_mode"
        )
    layout = layout_of(z0)
    max_steps = check_max_steps("max_steps", max_steps)
    ranks = check_ranks(process_group, sharded)
    if check_norm(norm) == "parts" and (compact or ranks is not None):
        raise ValueError(f"norm='parts' does not work with {'compact=True' if compact else 'process_group'}")
    if ranks is not None and isinstance(solver, NewtonSolver):
        raise ValueError(
            f"{type(solver).__name__} does not work with process_group: each rank takes its own number of products,"
            " which may call fn, so the ranks would call fn unequally often; use pydeq.Broyden or pydeq.Anderson"
        )
    if sharded and not solver.reduces:
        raise ValueError(f"solver must be one that takes sharded states, got {solver!r}")
    rules = stopping_rules(layout, rtol, atol, freeze, stall, WHOLE if ranks is None else ranks.reduction())
    agreement = ALONE
    if ranks is not None:
        agreement = RankAgreement(ranks, layout.device, max_steps, (layout.batch, layout.dtype, solver, rules))
    states_at = check_states_at(states_at)
    cast = torch.is_autocast_enabled(layout.device.type)
    with torch.no_grad(), solve_scope():
        if compact:
            assert batched_context is not None
            evaluator = CompactingEvaluator(fn, context, layout, cast, batched_context)
        else:
            evaluator = Evaluator(fn, context, layout, cast)
        counted = None
        if isinstance(solver, NewtonKrylov):
            counted = evaluator.products = Products(solver.mode, rules.eps)
        elif isinstance(solver, TrustRegion):
            counted = evaluator.dense = DenseJacobian(solver.mode, rules.eps, solver.vectorize)
        flat = layout.flatten(z0)
        if norm == "parts":
            solution, workspace = iterate_by_parts(evaluator, flat, solver, rules, max_steps, trace, states_at)
        else:
            solution, workspace = iterate(evaluator, flat, solver, rules, max_steps, trace, agreement, states_at)
        if counted is not None:
            solution.products = counted.count
        return solution, workspace


def stopping_rules(
    layout: Layout,
    rtol: float | None,
    atol: float = 0.0,
    freeze: bool = True,
    stall: bool = True,
    reduction: Reduction = WHOLE,
) -> Rules:
    """The stopping rules of a solve under the current autocast state; see :func:`fixed_point`."""
    coarsest = layout.dtype
    if torch.is_autocast_enabled(layout.device.type):
        coarsest = Autocast.current(layout.device).coarsest(coarsest)
    rtol = None if rtol is None else check_tolerance("rtol", rtol)
    rules = _rules(coarsest, rtol, check_tolerance("atol", atol), freeze, stall)
    return rules if reduction is WHOLE else replace(rules, reduction=reduction)


@lru_cache(maxsize=64)
def _rules(dtype: torch.dtype, rtol: float | None, atol: float, freeze: bool, stall: bool) -> Rules:
    """The stopping rules of solves that compute in this dtype; kept, as many solves have the same."""
    return Rules(
        rtol=default_rtol(dtype) if rtol is None else rtol,
        atol=atol,
        eps=torch.finfo(dtype).eps,
        freeze=freeze,
        stall=stall,
    )
