"""One warning about backward solves that do not converge."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pydeq.protocol import Status
from pydeq.solution import ConvergenceWarning, Solution

_warned: set[Any] = set()
# On CUDA: (settings, advice, flag in pinned memory, when it is there). Looked at later, so that nothing waits.
_pending: list[tuple[Any, Tensor, torch.cuda.Event]] = []


def watch(settings: Any, solution: Solution) -> None:
    """Warn once for these settings of an adjoint if one of its solves left samples unconverged.

    Not about NONFINITE ones: their gradients are NaN, which a gradient scaler provokes and expects.
    """
    _look_at_pending()
    if settings in _warned or not len(solution.converged):
        return
    lost = ~(solution.converged | (solution.status == Status.NONFINITE)).all()
    if lost.device.type != "cuda":
        if lost:
            _warn(settings)
    elif not torch.cuda.is_current_stream_capturing() and not any(known == settings for known, *_ in _pending):
        flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(lost, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((settings, flag, event))


def _look_at_pending() -> None:
    for entry in list(_pending):
        settings, flag, event = entry
        if event.query():
            _pending.remove(entry)
            if flag and settings not in _warned:
                _warn(settings)


def _warn(settings: Any) -> None:
    _warned.add(settings)
    warnings.warn(
        f"the backward solve of {settings} left samples unconverged, so their gradients are inexact: increase its"
        " max_steps, loosen its rtol, choose another of its solvers, or make the cell more contractive"
        " (pydeq.jacobian_penalty). solution.backward has the details of each call; this is said once",
        ConvergenceWarning,
        stacklevel=2,
    )
