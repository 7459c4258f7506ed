"""Warn once about forward and backward solves that do not converge."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pydeq.ops.capture import capturing
from pydeq.ops.constants import Status
from pydeq.solution import ConvergenceWarning, Solution

_warned: set[Any] = set()
# Settings of an adjoint, or weak references to layers.
# On CUDA: (settings, flag in pinned memory). The device writes the flag over _UNWRITTEN some time later, and the next
# backward reads it. So nothing waits. CUDA is not queried either: a query would break a graph capture in any thread.
_pending: list[tuple[Any, Tensor]] = []
_UNWRITTEN = -1


def warn_if_unconverged(settings: Any, solution: Solution) -> None:
    """Warn if a backward solve left samples unconverged, once for each ``settings`` of an adjoint.

    NONFINITE samples give no warning: their gradients are NaN, which a gradient scaler expects.
    """
    _look_at_pending()
    if _may_warn(settings, solution):
        _judge(settings, ~(solution.converged | (solution.status == Status.NONFINITE)).all())


def warn_if_layer_unconverged(layer: nn.Module, solution: Solution) -> None:
    """Warn if the forward solve of a layer left samples unconverged, once for each layer."""
    _look_at_pending()
    if solution.all_known_to_converge:
        return
    key = weakref.ref(layer)
    if _may_warn(key, solution):
        _judge(key, ~solution.converged.all())


def _may_warn(key: Any, solution: Solution) -> bool:
    if solution.all_known_to_converge or key in _warned or not len(solution.converged):
        return False
    return not capturing(solution.converged.device) and all(known != key for known, _ in _pending)


def _judge(key: Any, lost: Tensor) -> None:
    """Warn if ``lost``, now or, on a GPU, when the device has reported it."""
    if lost.device.type == "cuda":
        flag = torch.full((), _UNWRITTEN, dtype=torch.int8, device="cpu", pin_memory=True)
        flag.copy_(lost.to(torch.int8), non_blocking=True)
        _pending.append((key, flag))
    elif lost:
        _warn(key)


def _look_at_pending() -> None:
    for entry in list(_pending):
        settings, flag = entry
        if int(flag) != _UNWRITTEN:
            _pending.remove(entry)
            if flag and settings not in _warned:
                _warn(settings)


def _warn(key: Any) -> None:
    _warned.add(key)
    if isinstance(key, weakref.ref):
        text = (
            "the forward solve of a pydeq.DEQ left samples unconverged: pydeq.diagnose(deq, z0, *context) finds out why"
            " and what to change, and the solution of a call (return_solution=True) has its details. If the cap is set"
            " on purpose, pass max_steps to the call, or eval_max_steps to the layer; this is said once for each layer"
        )
    else:
        text = (
            f"the backward solve of {key} left samples unconverged, so their gradients are inexact: increase its"
            " max_steps, loosen its rtol, choose another of its solvers, or make the cell more contractive"
            " (pydeq.nn.spectral_norm, pydeq.jacobian_penalty). solution.backward has the details of each call, and"
            " pydeq.diagnose tries what helps; this is said once"
        )
    warnings.warn(text, ConvergenceWarning, stacklevel=3)
