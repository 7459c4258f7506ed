"""``fixed_point``: solve z = fn(z, *context) for every sample of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from pydeq.evaluation import CompactingEvaluator, Evaluator
from pydeq.iteration import iterate
from pydeq.keywords import unknown_keyword
from pydeq.solution import ConvergenceError, Solution
from pydeq.solvers import Anderson, Solver
from pydeq.state import Layout, State, layout_of
from pydeq.termination import Rules, default_rtol

_KEYWORDS = (
    "solver", "rtol", "atol", "max_steps", "trace", "throw", "freeze", "stall", "compact", "batched_context",
)  # fmt: skip


def fixed_point(
    fn: Callable[..., Any],
    z0: State,
    *context: Any,
    solver: Solver | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 50,
    trace: bool = False,
    throw: bool = False,
    freeze: bool = True,
    stall: bool = True,
    compact: bool = False,
    batched_context: Sequence[bool] | None = None,
    **unknown: NoReturn,
) -> Solution:
    """Find z with z = fn(z, *context), each sample of the batch on its own; no gradient.

    A sample is CONVERGED once ||fn(z) - z|| <= atol + rtol * ||fn(z)|| and, after the first evaluation, the residual
    is also below 0.9 of the first one; see :class:`pydeq.Status` for the other ends. Not converging is a status, not
    an error.

    Args:
        fn: The map, fn(z, *context) -> like z. The z it is given is valid during the call only, and is not to be
            modified; what it returns may be a view or a reused buffer.
        z0: Where to start: a tensor with the batch first, shape (batch, *state), or a tuple of such tensors of one
            dtype. (batch,) is a batch of scalars.
        context: Passed on to fn.
        solver: :class:`pydeq.Anderson` by default.
        rtol: Relative tolerance; by default 1e-3, and 1e-2 for half states or under half autocast.
        atol: Absolute tolerance, in units of ||fn(z) - z||.
        max_steps: Evaluations of each sample at most, at least 1. With 1, ``image`` is fn(z0). On a GPU the solve runs
            ahead of the device, and may call fn once more than any sample needs, though never more often than this;
            while a CUDA graph is captured it calls fn exactly so often.
        trace: Keep the relative residuals of every evaluation.
        throw: Raise if a sample did not converge.
        freeze: Leave samples alone once they are done. False iterates on until the worst one is.
        stall: Stop samples that rounding keeps from the tolerance.
        compact: Call fn on the running samples alone once half of them have stopped. fn must treat samples alike and
            take what it needs per sample through ``context``. On a GPU this waits for the device in every step, as
            ``freeze=False`` does.
        batched_context: For each entry of ``context`` whether it carries the batch first; needed by ``compact``.

    Returns:
        The solution. Its tensors are new ones.

    Raises:
        TypeError: If an argument, or what fn returned, is of the wrong type, or a keyword is unknown.
        ValueError: If an argument is out of range, or fn changes the shape, dtype or device.
        ConvergenceError: If ``throw`` and a sample did not converge.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """
    for name in unknown:
        raise unknown_keyword("fixed_point", name, _KEYWORDS)
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    if solver is None:
        solver = Anderson()
    elif not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver like pydeq.Anderson(), got {solver!r}")
    layout = layout_of(z0)
    max_steps = check_max_steps("max_steps", max_steps)
    cast = torch.is_autocast_enabled(layout.device.type)
    coarsest = layout.dtype
    if cast:
        autocast = torch.get_autocast_dtype(layout.device.type)
        if torch.finfo(autocast).eps > torch.finfo(coarsest).eps:
            coarsest = autocast
    rules = Rules(
        rtol=default_rtol(coarsest) if rtol is None else check_tolerance("rtol", rtol),
        atol=check_tolerance("atol", atol),
        eps=torch.finfo(coarsest).eps,
        freeze=freeze,
        stall=stall,
    )
    with torch.no_grad():
        if compact:
            batched = _check_compact(fn, context, batched_context, layout, freeze)
            evaluator = CompactingEvaluator(fn, context, layout, cast, batched)
        else:
            evaluator = Evaluator(fn, context, layout, cast)
        flat = layout.flatten(z0)
        solution = iterate(evaluator, flat, solver, rules, max_steps, trace)
    if throw and not bool(solution.converged.all()):
        raise ConvergenceError(solution)
    return solution


def check_tolerance(name: str, value: float) -> float:
    """A tolerance: a number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(value)


def check_max_steps(name: str, value: int) -> int:
    """A number of evaluations, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check_compact(
    fn: Callable[..., Any],
    context: Sequence[Any],
    batched_context: Sequence[bool] | None,
    layout: Layout,
    freeze: bool,
) -> Sequence[bool]:
    if not freeze:
        raise ValueError("compact=True leaves out samples that are done, but freeze=False iterates them on")
    if batched_context is None:
        if context:
            raise ValueError(
                f"batched_context must say for each of the {len(context)} context arguments whether it carries the"
                " batch, got None"
            )
        batched_context = ()
    if len(batched_context) != len(context):
        raise ValueError(
            f"batched_context must have one entry for each of the {len(context)} context arguments, got"
            f" {len(batched_context)}"
        )
    for i, (entry, batched) in enumerate(zip(context, batched_context, strict=True)):
        if not batched:
            continue
        for tensor in _tensors(entry, f"context[{i}]"):
            if tensor.dim() == 0 or tensor.shape[0] != layout.batch:
                raise ValueError(
                    f"context[{i}] must carry the batch of {layout.batch} first, got shape {tuple(tensor.shape)}"
                )
    cell = getattr(fn, "__self__", fn)  # also where fn is a module's bound method
    if isinstance(cell, torch.nn.Module):
        for name, module in cell.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"compact=True changes the batch that {name or 'fn'} ({type(module).__name__} in training mode)"
                    " computes its statistics from: use eval mode, another norm, or compact=False"
                )
    return batched_context


def _tensors(entry: Any, name: str) -> Iterator[torch.Tensor]:
    """The tensors of a batched context argument, a tensor or a (nested) tuple or list of them."""
    if isinstance(entry, torch.Tensor):
        yield entry
    elif isinstance(entry, tuple | list):
        for part in entry:
            yield from _tensors(part, name)
    else:
        raise TypeError(f"{name} is batched, so it must be a tensor or a tuple, got {type(entry).__name__}")
