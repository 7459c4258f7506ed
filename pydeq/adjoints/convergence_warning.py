"""Warn once about backward solves that do not converge."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pydeq.ops.capture import capturing
from pydeq.ops.constants import Status
from pydeq.solution import ConvergenceWarning, Solution

_warned: set[Any] = set()
# On CUDA: (settings, flag in pinned memory). The device writes the flag over _UNWRITTEN some time later, and the next
# backward reads it. So nothing waits. CUDA is not queried either: a query would break a graph capture in any thread.
_pending: list[tuple[Any, Tensor]] = []
_UNWRITTEN = -1


def warn_if_unconverged(settings: Any, solution: Solution) -> None:
    """Warn if a backward solve left samples unconverged, once for each ``settings`` of an adjoint.

    NONFINITE samples give no warning: their gradients are NaN, which a gradient scaler expects.
    """
    _look_at_pending()
    if solution.all_known_to_converge or settings in _warned or not len(solution.converged):
        return
    device = solution.converged.device
    if capturing(device) or any(known == settings for known, _ in _pending):
        return
    lost = ~(solution.converged | (solution.status == Status.NONFINITE)).all()
    if device.type == "cuda":
        flag = torch.full((), _UNWRITTEN, dtype=torch.int8, device="cpu", pin_memory=True)
        flag.copy_(lost.to(torch.int8), non_blocking=True)
        _pending.append((settings, flag))
    elif lost:
        _warn(settings)


def _look_at_pending() -> None:
    for entry in list(_pending):
        settings, flag = entry
        if int(flag) != _UNWRITTEN:
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
