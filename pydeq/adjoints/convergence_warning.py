"""Warn once about forward and backward solves that do not converge."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pydeq.arguments import callable_name, warn_user
from pydeq.ops.capture import capturing
from pydeq.ops.constants import Status
from pydeq.solution import ConvergenceWarning, Solution

_warned: set[Any] = set()
# Pairs of an adjoint's settings and the name of a cell, or weak references to layers.
# On CUDA: (such a key, flag in pinned memory). The device writes the flag over _UNWRITTEN some time later, and the next
# backward reads it. So nothing waits. CUDA is not queried either: a query would break a graph capture in any thread.
_pending: list[tuple[Any, Tensor]] = []
_UNWRITTEN = -1


def warn_if_unconverged(settings: Any, cell: Callable[..., Any], solution: Solution) -> None:
    """Warn if a backward solve left samples unconverged, once for each adjoint with a cell of this name.

    NONFINITE samples give no warning: their gradients are NaN, which a gradient scaler expects.

    Args:
        settings: The adjoint.
        cell: The layer's cell.
    """
    _look_at_pending()
    if solution.all_known_to_converge:
        return
    key = settings, callable_name(cell)
    if _may_warn(key, solution):
        _judge(key, ~(solution.converged | (solution.status == Status.NONFINITE)).all())


def warn_if_layer_unconverged(layer: nn.Module, solution: Solution) -> None:
    """Warn if the forward solve of a layer left samples unconverged, once for each layer."""
    _look_at_pending()
    if solution.all_known_to_converge:
        return
    key = weakref.ref(layer)
    if _may_warn(key, solution):
        _judge(key, ~solution.converged.all())


def _may_warn(key: Any, solution: Solution) -> bool:
    if key in _warned or not len(solution.converged):
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
        key, flag = entry
        if int(flag) != _UNWRITTEN:
            _pending.remove(entry)
            if flag and key not in _warned:
                _warn(key)


def _warn(key: Any) -> None:
    _warned.add(key)
    if isinstance(key, weakref.ref):
        layer = key()
        if layer is None:  # a device has reported it too late
            return
        text = (
            f"the forward solve of a pydeq.DEQ({callable_name(layer.cell)}, solver={layer.solver},"
            f" max_steps={layer.max_steps}) left samples unconverged: pydeq.diagnose(deq, z0, *context) finds out why"
            " and what to change, and the solution of a call (return_solution=True) has its details. If the cap is set"
            " on purpose, pass max_steps to the call, or eval_max_steps to the layer; this is said once for each layer"
        )
    else:
        settings, cell = key
        text = (
            f"the backward solve of a pydeq.DEQ({cell}, adjoint={settings}) left samples unconverged, so their"
            " gradients are inexact: raise the adjoint's max_steps, loosen its rtol, give it another solver, or make"
            " the cell more contractive (pydeq.nn.spectral_norm, pydeq.JacobianPenalty). solution.backward has the"
            " details of each call, and pydeq.diagnose tries what helps; this is said once"
        )
    warn_user(text, ConvergenceWarning)
