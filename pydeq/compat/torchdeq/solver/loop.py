"""The loop of the solvers: when they stop, which state they return, what they report.

Two loops over the same processes. ``run`` keeps torchdeq's conventions and none of its faults: it looks at every
evaluation, a sample that met the tolerance stays done, states asked for are always returned, and NaN stays in its
sample. ``run_legacy`` decides in everything as torchdeq does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydeq.compat.processes import Process, Stepped, flatten
from pydeq.compat.rules import STALL_RATIO, STALL_TOLERANCES, STALL_WINDOW, UNKNOWN
from pydeq.compat.torchdeq.solver.stat import SolverStat
from pydeq.protocol import Scalar

Result = tuple[Tensor, list[Tensor], SolverStat]

RESIDUAL, NORM = int(Scalar.RESIDUAL), int(Scalar.NORM)


@dataclass(frozen=True)
class Convention:
    """How a solver counts.

    Args:
        max_iter: As its caller counts.
        evaluations: Calls of f at most.
        first: Evaluations that leave no column in the traces.
        offset: ``nstep`` of evaluation 0.
        state: What is returned of the best evaluation: the iterate, its image or their mixture.
        stalls: Whether it stops for lack of progress.
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


@dataclass(frozen=True)
class Request:
    """What a caller asks of a solve.

    Args:
        tol: Tolerance.
        stop_mode: Which residual it is for, "abs" or "rel".
        indexing: Steps whose states are wanted.
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
    with torch.no_grad():
        if convention.evaluations < 1 or x0.numel() == 0:
            state = x0.detach().clone().view(_shape(x0))
            rows = len(flatten(x0))
            lowest = np.full((2, rows), UNKNOWN)
            stat = _stat(np.empty((2, 0, rows)), lowest, np.zeros(rows), convention, x0)
            return state, [state] * bool(request.indexing), stat
        return (run_legacy if legacy else run)(start(), convention, x0, request)


def run(process: Process, convention: Convention, x0: Tensor, request: Request) -> Result:
    """Solve by torchdeq's conventions."""
    tol, relative, final = request.tol, request.stop_mode == "rel", request.return_final
    offset, of, shape = convention.offset, convention.of, _shape(x0)
    # pydeq's steps keep the iterate of smallest absolute residual by themselves.
    keeper = _Keeper(convention, process) if relative or not isinstance(process, Stepped) else None
    wanted = sorted({int(i) for i in request.indexing or () if 1 <= i <= convention.max_iter})
    states: list[Tensor] = []
    rows: list[np.ndarray] = []
    best = np.full(len(process.flat), np.inf)
    largest = np.maximum.reduce

    def current() -> Tensor:
        if final:
            return of(process).clone().view(shape)
        if keeper is not None:
            return keeper.state.clone().view(shape)
        assert isinstance(process, Stepped)
        found = process.best(convention.state)
        lost = np.isinf(best)
        if lost.any():  # f never was finite
            found = torch.where(_rows(lost, found), process.flat, found)
        return found.view(shape)

    for k in range(convention.evaluations):
        row = process.advance()
        rows.append(row)
        value = _relative(row[:, RESIDUAL], row[:, NORM]) if relative else row[:, RESIDUAL]
        if keeper is not None:
            keeper.keep(value < best)
        np.minimum(best, value, out=best)
        if wanted and k + 1 == wanted[0] < convention.max_iter:
            states.append(current())
            wanted.pop(0)
        if final:
            continue
        if largest(best) < tol:
            break
        if k + 1 == convention.evaluations:
            break
        hopeless = process.hopeless
        if hopeless is not None and bool(((best < tol) | hopeless).all()):
            break
        if convention.stalls and k > STALL_WINDOW and _stalled(rows[-STALL_WINDOW:], value, relative, tol):
            break
    state = current()
    if request.indexing:  # what was not reached is what was found
        states += [state] * (len(wanted) if wanted or states else 1)

    traces = _traces(rows)
    absolute = traces[0]
    if final:
        lowest, step = traces[:, -1], np.full(len(best), len(absolute) - 1)
    else:
        lowest, step = traces.min(axis=1), traces[int(relative)].argmin(axis=0)
    return state, states, _stat(traces[:, convention.first :], lowest, step + offset, convention, x0)


def run_legacy(process: Process, convention: Convention, x0: Tensor, request: Request) -> Result:
    """Solve as torchdeq does."""
    tol, mode, final = request.tol, int(request.stop_mode == "rel"), request.return_final
    batch, shape = len(process.flat), _shape(x0)
    state = process.flat.clone()
    lowest, steps = np.full((2, batch), UNKNOWN), np.zeros((2, batch))
    states: list[Tensor] = []
    rows: list[np.ndarray] = []
    for k in range(convention.evaluations):
        row = _traces([process.advance()])[:, 0]
        if k < convention.first:
            continue
        rows.append(row)
        better = (row < lowest) | final
        state = torch.where(_rows(better[mode], state), convention.of(process), state)
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
    traces = np.stack(rows, axis=1) if rows else np.empty((2, 0, batch))
    return result, states, _stat(traces, lowest, steps[mode], convention, x0)


def _shape(x0: Tensor) -> torch.Size:
    """The shape of states: a scalar comes back as a batch of one."""
    return x0.shape or torch.Size([1])


class _Keeper:
    """Keeps the best state of each sample.

    Args:
        convention: Which state.
        process: Where it comes from; samples that never improve keep its x0.
    """

    def __init__(self, convention: Convention, process: Process) -> None:
        self.convention, self.process = convention, process
        self.state = process.flat.clone()

    def keep(self, better: np.ndarray) -> None:
        """Keep the newest state of some samples."""
        if better.all():
            self.state.copy_(self.convention.of(self.process))
        elif better.any():
            newest = self.convention.of(self.process)
            torch.where(_rows(better, newest), newest, self.state, out=self.state)


def _rows(mask: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(mask).to(like.device)[:, None]


def _traces(rows: list[np.ndarray]) -> np.ndarray:
    """Absolute and relative residuals of the evaluations, [2, K, B]."""
    measured = np.stack(rows)
    residual = measured[:, :, RESIDUAL]
    return np.stack([residual, _relative(residual, measured[:, :, NORM])])


def _relative(residual: np.ndarray, norm: np.ndarray) -> np.ndarray:
    return residual / (np.fmin(norm, 1e300) + 1e-9)  # norms that are not finite come with infinite residuals


def _stalled(rows: list[np.ndarray], newest: np.ndarray, relative: bool, tol: float) -> bool:
    """Whether every sample is near the tolerance, and none got anywhere in the last steps."""
    if newest.max() >= STALL_TOLERANCES * tol:
        return False
    last = _traces(rows)[int(relative)]
    return bool((last.max(axis=0) < STALL_RATIO * last.min(axis=0)).all())


def _stat(traces: np.ndarray, lowest: np.ndarray, nstep: np.ndarray, convention: Convention, x0: Tensor) -> SolverStat:
    """Statistics from traces [2, columns - 1 or fewer, B], padded with what was lowest."""
    batch, seen = lowest.shape[1], traces.shape[1]
    full = np.empty((2, batch, convention.columns))
    full[:, :, 0] = UNKNOWN
    full[:, :, 1 : seen + 1] = traces.transpose(0, 2, 1)
    full[:, :, seen + 1 :] = lowest[:, :, None]
    # What was never measured has the dtype of 1e8.
    dtype = torch.promote_types(x0.dtype, torch.float32) if (lowest != UNKNOWN).any() else torch.float32

    def tensor(values: Any, of: torch.dtype = dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=x0.device, dtype=of)

    return SolverStat(
        abs_lowest=tensor(lowest[0]),
        rel_lowest=tensor(lowest[1]),
        abs_trace=tensor(full[0]),
        rel_trace=tensor(full[1]),
        nstep=tensor(nstep, torch.float32),
    )
