"""``fixed_point``: solve z = fn(z, *context) for every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from pydeq.arguments import keywords_for
from pydeq.cell.batched_context import check_compact
from pydeq.cell.prepared import PreparedCell
from pydeq.cell.scope import solve_scope
from pydeq.cell.torch_compile import Compiler, skipped
from pydeq.solution import ConvergenceError, Solution
from pydeq.solve.solve import solve
from pydeq.solvers import Solver

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KEYWORDS = (
    "solver", "rtol", "atol", "max_steps", "trace", "throw", "freeze", "stall", "compact", "batched_context",
    "process_group", "sharded",
    "states_at", "has_aux", "norm",
)  # fmt: skip


@skipped
def fixed_point(
    fn: Callable[..., Any],
    z0: Any,
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
    process_group: ProcessGroup | None = None,
    sharded: bool = False,
    states_at: Sequence[int] = (),
    has_aux: bool = False,
    norm: Literal["all", "parts"] = "all",
    **keywords: Any,
) -> Solution:
    """Find z with z = fn(z, *context, **keywords), each sample of the batch on its own; no gradient.

    A sample is CONVERGED once ||fn(z) - z|| <= atol + rtol * ||fn(z)|| and, after the first evaluation, the residual
    is also below 0.9 of the first one; see :class:`pydeq.Status` for the other ends. Not converging is a status, not
    an error.

    Samples are done one by one, and left alone from then on. Where fn makes them depend on each other, the last image
    shows which ones have been moved: then all iterate on until they meet the tolerance at one and the same evaluation,
    and a :class:`pydeq.CouplingWarning` says once that one coupled system is one sample, z[None]. A solve that has used
    up its evaluations, or is captured into a CUDA graph, ends such samples as MAX_STEPS.

    Args:
        fn: The map, fn(z, *context, **keywords) -> like z. The z it is given is valid during the call only, and is not
            to be modified; what it returns may be a view or a reused buffer.
        z0: Where to start: a tensor with the batch first, shape (batch, *state), or several such tensors, the parts of
            the state, in a tuple, list, dict, namedtuple or another type of torch's pytree, nested at will. fn gets,
            and the solution has, what z0 is. Parts are of one dtype; complex ones count as pairs of real numbers.
            (batch,) is a batch of scalars.
        context: Passed on to fn.
        keywords: Passed on to fn, where it takes arguments of these names. A name that this function itself takes is
            never passed on: give fn that argument by its place, or by ``functools.partial``.
        solver: :class:`pydeq.Anderson` by default.
        rtol: Relative tolerance; by default 1e-3, and 1e-2 for half states or under half autocast.
        atol: Absolute tolerance, in units of ||fn(z) - z||.
        max_steps: Evaluations of each sample at most, at least 1. With 1, ``image`` is fn(z0). On a GPU the solve runs
            ahead of the device while samples are far from their tolerance, and now and then calls fn once more than any
            sample needs, though never more often than this; while a CUDA graph is captured it calls fn exactly so
            often.
        trace: Keep the relative residuals of every evaluation.
        throw: Raise if a sample did not converge.
        freeze: Leave samples alone once they are done. False iterates on until all meet the tolerance at one and the
            same evaluation.
        stall: Stop samples that rounding keeps from the tolerance.
        compact: Call fn on the running samples alone once half of them have stopped. fn must treat samples alike and
            take what it needs per sample through ``context``: samples that depend on each other are not noticed. On a
            GPU this waits for the device in every step, as ``freeze=False`` does.
        batched_context: For each entry of ``context`` whether it carries the batch first; needed by ``compact``.
        process_group: The ranks that call fn equally often, so that an fn that communicates finds them all: a rank
            that is done calls it on its frozen states until all are. All must call with the same ``max_steps``; a
            batch may be empty. An exception on one rank ends the solve on all; where fn was in a collective of its
            own on others, they end with that one's timeout. ``throw`` looks at the samples of this rank alone.
        sharded: Each rank of ``process_group`` has its own entries of the same samples: norms and inner products are
            those of the whole states, and all ranks decide alike. The solvers' references in plain torch run.
        states_at: Numbers of evaluations, increasing. For each number n, ``states`` gets the image that a solve with
            ``max_steps=n`` returns; of :class:`pydeq.GMRES`, and where samples depend on each other, the best image
            so far.
        has_aux: fn returns a pair (state, aux), and ``solution.aux`` is the aux that came with ``solution.image``. The
            last evaluation of a solve has it where all samples converged; else fn is called once more, uncounted.
        norm: "all" measures residuals in the Euclidean norm of all entries. "parts" is for states of several parts: a
            sample is CONVERGED once each of them meets the tolerance in its own norm, which with "all" a part that is
            much smaller than another need not. Solvers then see each part divided by about its norm, and residuals in
            the solution are those of the part with the largest relative one. Costs two passes over the state per
            evaluation, and takes neither ``compact`` nor ``process_group``.

    Returns:
        The solution. Its tensors are new ones.

    Raises:
        TypeError: If an argument, or what fn returned, is of the wrong type, or a keyword is unknown.
        ValueError: If an argument is out of range, or fn changes the shape, dtype or device.
        RuntimeError: If the solve failed on another rank, or under a transform of ``torch.func``.
        ConvergenceError: If ``throw`` and a sample did not converge.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """
    with Compiler() as compiler:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        keywords = keywords_for("fixed_point", fn, keywords, _KEYWORDS)
        cell = PreparedCell(fn, z0, keywords, has_aux, compiler=compiler, scoped=False)
        adapter = cell.adapter
        if compact:
            batched_context = check_compact(fn, context, batched_context, adapter, freeze)
        context = adapter.context(context)
        with solve_scope():
            solution = solve(
                cell.call, cell.z0, context, solver=solver, rtol=rtol, atol=atol, max_steps=max_steps, trace=trace,
                freeze=freeze, stall=stall, compact=compact, batched_context=batched_context,
                process_group=process_group, sharded=sharded, states_at=states_at, norm=norm,
            )  # fmt: skip
            if has_aux:
                with torch.no_grad():
                    solution.aux = adapter.aux_at_image(cell.call, solution, context)
        solution = adapter.solution(solution)
        if throw and not bool(solution.converged.all()):
            raise ConvergenceError(solution)
        return solution
