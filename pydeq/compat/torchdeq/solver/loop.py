"""The loop of the solvers: decides when they stop, and which state and statistics they return.

There are two loops over the same processes. ``run`` keeps torchdeq's conventions, but not its faults: it checks every
evaluation, always returns the requested states, and keeps NaN in its sample. Like torchdeq it ends once all samples
meet the tolerance in one step, and then returns that step, since samples may depend on each other. ``run_legacy`` makes
every decision as torchdeq does. Neither is pydeq's own loop, which stops each sample separately, by other rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pydeq.compat.processes import Process, Stepped, column, flatten
from pydeq.compat.rules import STALL_RATIO, STALL_TOLERANCES, STALL_WINDOW, UNKNOWN
from pydeq.compat.torchdeq.solver.stat import SolverStat
from pydeq.compat.warning import warn_of_coupling
from pydeq.ops.capture import exporting
from pydeq.ops.constants import Scalar

Result = tuple[Tensor, list[Tensor], SolverStat]

# Columns of a process's measurements; BEST is the smallest residual in the stop mode.
RESIDUAL, NORM, BEST = int(Scalar.RESIDUAL), int(Scalar.NORM), int(Scalar.BEST)

# Independent samples that met the tolerance sometimes rise above it: 1 of 75,000 samples rose by 100 times on random
# maps that did not converge. In units of eps, a relative residual up to _ROUNDING may be rounding.
_LEFT, _ROUNDING = 100.0, 32.0


@dataclass
class Convention:
    """The counting conventions of a solver.

    Args:
        max_iter: The limit, in the caller's counting.
        evaluations: Maximum number of calls of f.
        first: Number of evaluations at the start that have no column in the traces.
        offset: The value of ``nstep`` for evaluation 0.
        state: The state that is returned for the best evaluation: the iterate, its image or their mixture.
        stalls: Whether the solver stops for lack of progress.
    """

    max_iter: int
    evaluations: int
    first: int
    offset: int
    state: Literal["z", "f", "damped"]
    stalls: bool = False

    @property
    def columns(self) -> int:
        """Columns of the traces, with the first one."""
        return 1 + max(0, self.evaluations - self.first)

    def of(self, process: Process) -> Tensor:
        """The state of the newest evaluation, [B, D]."""
        return getattr(process, self.state)


@dataclass
class Request:
    """The options of a call.

    Args:
        tol: Tolerance.
        stop_mode: Whether the tolerance is for the absolute ("abs") or relative ("rel") residual.
        indexing: Steps to return the states of.
        return_final: Run all steps, and return the last state instead of the best.
    """

    tol: float
    stop_mode: str
    indexing: Sequence[int] | None
    return_final: bool

    def __post_init__(self) -> None:
        if self.stop_mode not in ("abs", "rel"):
            raise ValueError(f"stop_mode must be 'abs' or 'rel', got {self.stop_mode!r}")


def solve(start: Callable[[], Process], convention: Convention, x0: Tensor, request: Request, legacy: bool) -> Result:
    """Run the process that ``start`` makes; no gradient."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("solvers of torchdeq do not work under torch.func transforms: use pydeq.DEQ")
    if exporting():
        raise RuntimeError("solvers of torchdeq cannot be exported: use pydeq.DEQ, see pydeq.export_mode")
    with torch.no_grad():
        if convention.evaluations < 1 or x0.numel() == 0:
            state = x0.detach().clone().view(_shape(x0))
            rows = len(flatten(x0))
            lowest = np.full((2, rows), UNKNOWN)
            stat = _stat(np.empty((2, rows, convention.columns)), 0, lowest, np.zeros(rows), x0)
            return state, [state] * bool(request.indexing), stat
        return (run_legacy if legacy else run)(start(), convention, x0, request)


def run(process: Process, convention: Convention, x0: Tensor, request: Request) -> Result:
    """Solve by torchdeq's conventions."""
    tol, relative, final = request.tol, request.stop_mode == "rel", request.return_final
    offset, of, shape, evaluations = convention.offset, convention.of, _shape(x0), convention.evaluations
    # pydeq's steps already keep the iterate with the smallest absolute residual.
    keeper = None if isinstance(process, Stepped) and not relative else _Keeper(convention, process, relative)
    wanted = sorted({int(i) for i in request.indexing or () if 1 <= i <= convention.max_iter})
    states: list[Tensor] = []
    rows: list[np.ndarray] = []
    advance = process.advance

    def current() -> Tensor:
        if final or met:
            return of(process).clone().view(shape)
        if keeper is not None:
            return keeper.state.clone().view(shape)
        assert isinstance(process, Stepped)
        return process.best(convention.state).view(shape)

    def value(row: np.ndarray) -> np.ndarray:
        """The residuals that the tolerance is for, [B]."""
        return _relative(row[:, RESIDUAL], row[:, NORM]) if relative else row[:, RESIDUAL]

    # Only one sample's residual is compared with the tolerance: the sample that was the worst in the last check of all
    # samples. While it does not meet the tolerance, the other samples need no check.
    worst, met = slice(0, 1), False
    for k in range(evaluations):
        row = advance()
        rows.append(row)
        if keeper is not None:
            keeper.keep(row)
        if wanted and k + 1 == wanted[0] < convention.max_iter:
            states.append(current())
            wanted.pop(0)
        if final:
            continue
        if value(row[worst]).item() < tol:
            newest = value(row)
            at = int(newest.argmax())
            worst, met = slice(at, at + 1), bool(newest[at] < tol)
            if met:
                break
        if k + 1 == evaluations:
            break
        hopeless = process.hopeless
        if hopeless is not None and bool(((value(row) < tol) | hopeless).all()):
            break
        if convention.stalls and k > STALL_WINDOW and _stalled(rows[-STALL_WINDOW:], relative, tol):
            break
    state = current()
    if request.indexing:  # steps that were not reached get the result
        # Copies: func may modify its argument, and the argument may be one of these states.
        states += [state.clone() for _ in range(len(wanted) if wanted or states else 1)]

    traces = np.empty((2, len(process.flat), convention.first + convention.columns))
    seen = _traces(rows, traces[:, :, 1 : 1 + len(rows)])
    if final or met:
        lowest, step = seen[:, :, -1].copy(), np.full(len(process.flat), len(rows) - 1)
        given_up = process.hopeless
        if given_up is not None:  # for these samples the last state is the best one
            lowest = np.where(given_up, seen.min(axis=2), lowest)
            step = np.where(given_up, seen[0].argmin(axis=1), step)
    else:
        lowest, step = seen.min(axis=2), seen[int(relative)].argmin(axis=1)
        _watch_coupling(lowest[int(relative)], value(rows[-1]), seen[1, :, -1], tol, process.dtype)
    traces = traces[:, :, convention.first :]
    return state, states, _stat(traces, max(0, len(rows) - convention.first), lowest, step + offset, x0)


def run_legacy(process: Process, convention: Convention, x0: Tensor, request: Request) -> Result:
    """Solve as torchdeq does."""
    tol, mode, final = request.tol, int(request.stop_mode == "rel"), request.return_final
    batch, shape = len(process.flat), _shape(x0)
    state = process.flat.clone()
    lowest, steps = np.full((2, batch), UNKNOWN), np.zeros((2, batch))
    states: list[Tensor] = []
    rows: list[np.ndarray] = []
    for k in range(convention.evaluations):
        row = _traces([process.advance()])[:, :, 0]
        if k < convention.first:
            continue
        rows.append(row)
        better = (row < lowest) | final
        state = torch.where(column(better[mode], state), convention.of(process), state)
        lowest, steps = np.where(better, row, lowest), np.where(better, k + convention.offset, steps)
        if request.indexing and k + 1 in request.indexing:
            states.append(state.view(shape))
        if not final and row[mode].max() < tol:
            break
        if convention.stalls and k > STALL_WINDOW and row[mode].max() < STALL_TOLERANCES * tol:
            last = np.stack(rows[-STALL_WINDOW:])[:, mode]
            if (last.max(axis=1) < STALL_RATIO * last.min(axis=1)).all():  # over the batch, not over time
                break
    result = state.clone().view(shape)
    if request.indexing and not states:
        states.append(result)
    traces = np.empty((2, batch, convention.columns))
    if rows:
        traces[:, :, 1 : 1 + len(rows)] = np.stack(rows, axis=2)
    return result, states, _stat(traces, len(rows), lowest, steps[mode], x0)


def _shape(x0: Tensor) -> torch.Size:
    """The shape of states: a scalar comes back as a batch of one."""
    return x0.shape or torch.Size([1])


class _Keeper:
    """Record of the best state of each sample.

    Args:
        convention: Selects the state.
        process: The source of states; samples that never improve keep its x0.
        relative: Whether the best state is the one with the smallest relative residual.
    """

    def __init__(self, convention: Convention, process: Process, relative: bool) -> None:
        self.convention, self.process, self.relative = convention, process, relative
        self.state = process.flat.clone()
        self.best = np.full(len(process.flat), np.inf)

    def keep(self, row: np.ndarray) -> None:
        """Keep the newest state of the samples that improved; the column BEST becomes their smallest residual."""
        value = row[:, RESIDUAL]
        if self.relative:
            value = _relative(value, row[:, NORM])
        better = value < self.best
        improved = np.count_nonzero(better)
        if improved == len(better):
            self.state.copy_(self.convention.of(self.process))
            self.best = value
        elif improved:
            newest = self.convention.of(self.process)
            torch.where(column(better, newest), newest, self.state, out=self.state)
            self.best = np.where(better, value, self.best)
        row[:, BEST] = self.best


def _traces(rows: list[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """Absolute and relative residuals of the evaluations, [2, B, K]."""
    batch, columns = rows[0].shape
    measured = np.concatenate(rows).reshape(len(rows), batch, columns).T
    traces = np.empty((2, batch, len(rows))) if out is None else out
    traces[0] = measured[RESIDUAL]
    traces[1] = _relative(traces[0], measured[NORM])
    return traces


def _relative(residual: np.ndarray, norm: np.ndarray) -> np.ndarray:
    return residual / (np.fmin(norm, 1e300) + 1e-9)  # norms that are not finite come with infinite residuals


def _watch_coupling(
    lowest: np.ndarray, newest: np.ndarray, relative: np.ndarray, tol: float, dtype: torch.dtype
) -> None:
    """Warn about samples that met the tolerance and then moved far away from it.

    Args:
        lowest, newest: The lowest and the newest residual in the stop mode, [B].
        relative: The newest relative residuals, [B].
        tol: Tolerance.
        dtype: Of the states.
    """
    left = (lowest < tol) & (newest > _LEFT * tol) & np.isfinite(newest)
    if left.any():
        left &= relative > _ROUNDING * torch.finfo(dtype).eps
    if left.any():
        warn_of_coupling(int(left.sum()), len(left))


def _stalled(rows: list[np.ndarray], relative: bool, tol: float) -> bool:
    """Whether every sample is near the tolerance, and none made progress in the last steps."""
    newest = _traces(rows[-1:])[int(relative)]
    if newest.max() >= STALL_TOLERANCES * tol:
        return False
    last = _traces(rows)[int(relative)]
    return bool((last.max(axis=1) < STALL_RATIO * last.min(axis=1)).all())


def _stat(traces: np.ndarray, seen: int, lowest: np.ndarray, nstep: np.ndarray, x0: Tensor) -> SolverStat:
    """Statistics from traces [2, B, columns] with the columns 1 to ``seen`` filled."""
    traces[:, :, 0] = UNKNOWN
    traces[:, :, seen + 1 :] = lowest[:, :, None]
    # Values that were never measured have the dtype of 1e8.
    measured = seen > 0 or bool((lowest != UNKNOWN).any())
    dtype = torch.promote_types(x0.dtype, torch.float32) if measured else torch.float32

    def tensor(values: np.ndarray, of: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(device=x0.device, dtype=of)

    absolute, relative = tensor(traces, dtype).contiguous()
    lowest_absolute, lowest_relative = tensor(lowest, dtype)
    return SolverStat(
        abs_lowest=lowest_absolute,
        rel_lowest=lowest_relative,
        abs_trace=absolute,
        rel_trace=relative,
        nstep=tensor(nstep, torch.float32),
    )
