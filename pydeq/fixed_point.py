"""``fixed_point``: solve z = fn(z, *context) for every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from pydeq.arguments import check_context, keywords_for
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
    """Find z with z = fn(z, *context, **keywords) for each sample of the batch separately; no gradient.

    A sample is CONVERGED once ||fn(z) - z|| <= atol + rtol * ||fn(z)||. After the first evaluation, its residual must
    also be below 0.9 of the first one. :class:`pydeq.Status` lists the other ways to end. A sample that does not
    converge has a status; it is not an error.

    A sample that is done keeps its result. If fn makes samples depend on each other, later evaluations can move it, and
    the last image shows this. All samples then continue until they meet the tolerance at the same evaluation, and a
    :class:`pydeq.CouplingWarning` says once that a coupled system is one sample, z[None]. If no evaluations are left,
    or the solve is captured into a CUDA graph, such samples end as MAX_STEPS.

    Args:
        fn: The map, fn(z, *context, **keywords) -> like z. It must not modify z, which is valid only during the call.
            It may return a view or a reused buffer.
        z0: The initial state: a tensor with the batch first, shape (batch, *state), or several such tensors, the parts
            of the state, in a tuple, list, dict, namedtuple or another type of torch's pytree, nested in any way. The
            states that fn gets, and those of the solution, have the type of z0. All parts have one dtype; complex
            entries count as pairs of real numbers. (batch,) is a batch of scalars.
        context: Passed on to fn.
        keywords: Passed on to fn, which must take arguments of these names. A name that this function itself takes is
            never passed on: give fn that argument by position, or by ``functools.partial``.
        solver: :class:`pydeq.Anderson` by default.
        rtol: Relative tolerance; by default 1e-3, and 1e-2 for half states or under half autocast.
        atol: Absolute tolerance, in units of ||fn(z) - z||.
        max_steps: Maximum number of evaluations of each sample, at least 1. With 1, ``image`` is fn(z0). On a GPU the
            solve runs ahead of the device while samples are far from their tolerance, and sometimes calls fn once more
            than any sample needs, but never more than ``max_steps`` times. While a CUDA graph is captured it calls fn
            exactly ``max_steps`` times.
        trace: Keep the relative residuals of every evaluation.
        throw: Raise if a sample did not converge.
        freeze: Keep the result of a sample once it is done. With False, all samples continue until all meet the
            tolerance at the same evaluation.
        stall: Stop samples that cannot reach the tolerance because of rounding errors.
        compact: Call fn only on the running samples once half of them have stopped. fn must treat all samples alike and
            take its data per sample through ``context``. The solve does not detect samples that depend on each other.
            On a GPU this waits for the device in every step, as ``freeze=False`` does.
        batched_context: For each entry of ``context`` whether it carries the batch first; needed by ``compact``.
        process_group: The ranks that solve together. All of them call fn equally often, so fn may communicate between
            them. A rank that is done calls fn on its frozen states until all ranks are done. All ranks must give the
            same ``max_steps``; a batch may be empty. An exception on one rank ends the solve on all ranks. A rank that
            waits in a collective of fn at that time ends with the timeout of that collective. ``throw`` looks only at
            the samples of this rank.
        sharded: Each rank of ``process_group`` has its own entries of the same samples. Norms and inner products are
            taken over the whole states, so all ranks make the same decisions. The solve uses the solvers' reference
            code in plain torch, not the kernels.
        states_at: Numbers of evaluations, increasing. For each number n, ``states`` gets the image that a solve with
            ``max_steps=n`` returns. With :class:`pydeq.GMRES`, and if samples depend on each other, it is the best
            image so far.
        has_aux: fn returns a pair (state, aux), and ``solution.aux`` is the aux that came with ``solution.image``. If
            all samples converged, it is from the last evaluation; otherwise fn is called once more, uncounted.
        norm: "all" measures residuals in the Euclidean norm of all entries. "parts" is for states whose parts have
            different scales: a sample is CONVERGED once each part meets the tolerance in its own norm. Solvers then see
            each part divided by about its norm. A residual in the solution is the residual of the part with the largest
            relative residual. This costs two passes over the state per evaluation, and does not work with ``compact``
            or ``process_group``.

    Returns:
        The solution. It shares no memory with ``z0``.

    Raises:
        TypeError: If an argument or the result of fn is of the wrong type, or a keyword is unknown.
        ValueError: If an argument is out of range, or fn changes the shape, dtype or device.
        RuntimeError: If the solve failed on another rank, or under a transform of ``torch.func``.
        ConvergenceError: If ``throw`` and a sample did not converge.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.

    Examples:
        >>> x = torch.tensor([0.0, 0.5])
        >>> solution = pydeq.fixed_point(lambda z, x: torch.cos(z) + x, torch.zeros(2), x, rtol=1e-5)
        >>> solution.value, solution.converged
        (tensor([0.7391, 1.0218]), tensor([True, True]))
    """
    with Compiler() as compiler:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        keywords = keywords_for("fixed_point", fn, keywords, _KEYWORDS)
        cell = PreparedCell(fn, z0, keywords, has_aux, compiler=compiler, scoped=False)
        adapter = cell.adapter
        if compact:
            batched_context = check_compact(fn, context, batched_context, adapter, freeze)
        given, context = context, adapter.context(context)
        with solve_scope():
            try:
                solution = solve(
                    cell.call, cell.z0, context, solver=solver, rtol=rtol, atol=atol, max_steps=max_steps, trace=trace,
                    freeze=freeze, stall=stall, compact=compact, batched_context=batched_context,
                    process_group=process_group, sharded=sharded, states_at=states_at, norm=norm,
                )  # fmt: skip
            except TypeError:
                check_context(fn, given, keywords)
                raise
            if has_aux:
                with torch.no_grad():
                    solution.aux = adapter.aux_at_image(cell.call, solution, context)
        solution = adapter.solution(solution)
        if throw and not bool(solution.converged.all()):
            raise ConvergenceError(solution)
        return solution
