"""Move running statistics once per layer call: every evaluation of the cell would move them, once more each time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def learned_statistics(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The buffers that norms in training mode update in each call."""
    return [
        buffer
        for module in modules
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
        for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
        if buffer is not None
    ]


def batch_norms(module: nn.Module | None) -> list[str]:
    """Names of the submodules that take their statistics from the batch, so that samples depend on each other."""
    return [
        name or type(part).__name__
        for name, part in (() if module is None else module.named_modules())
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
    ]


class MovedOnce:
    """A map whose running statistics are those of one evaluation, the newest one, however often it is called.

    Statistics in training mode do not affect results. After :meth:`settle`, evaluations leave them alone.

    Args:
        fn: A map.
        buffers: What it updates in each call.
    """

    def __init__(self, fn: Callable[..., Any], buffers: Sequence[Tensor]) -> None:
        self.fn, self.buffers = fn, buffers
        # Values before the first call, and whether there was one; shared with the results of ``of``.
        self._before = [buffer.detach().clone() for buffer in buffers]
        self._state = {"called": False, "settled": False}

    def of(self, fn: Callable[..., Any]) -> MovedOnce:
        """Make another map move the same statistics."""
        other = copy.copy(self)
        other.fn = fn
        return other

    def settle(self) -> None:
        """The layer's call is over. Later evaluations, in backward, move nothing."""
        self._state["settled"] = True
        self._before.clear()

    def __call__(self, *args: Any) -> Any:
        if self._state["settled"]:
            now = [buffer.detach().clone() for buffer in self.buffers]
            try:
                return self.fn(*args)
            finally:
                self._set(now)
        if self._state["called"]:
            self._set(self._before)
        self._state["called"] = True
        return self.fn(*args)

    def _set(self, values: Sequence[Tensor]) -> None:
        # Through ``data``: graphs of earlier evaluations have saved these buffers, but do not use their values.
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.data.copy_(value)
