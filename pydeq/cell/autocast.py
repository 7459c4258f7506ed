"""The autocast state of a forward pass, restored when backward evaluates the cell again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_UNCHANGED = nullcontext()  # torch.autocast takes as long as an operation


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type.

    Args:
        device: Device type.
        dtype: The dtype that operations are cast to where autocast is enabled.
        enabled: Whether autocast is enabled.
        cached: Whether casts of parameters are kept.
    """

    device: str
    dtype: torch.dtype
    enabled: bool
    cached: bool

    @staticmethod
    def current(device: torch.device) -> Autocast:
        kind = device.type
        return Autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
        )

    def again(self) -> AbstractContextManager[Any]:
        """Context manager that restores the saved autocast state."""
        kind = self.device
        if (
            torch.is_autocast_enabled(kind) == self.enabled
            and torch.get_autocast_dtype(kind) == self.dtype
            and torch.is_autocast_cache_enabled() == self.cached
        ):
            return _UNCHANGED
        return torch.autocast(kind, self.dtype, self.enabled, self.cached)

    def off(self) -> AbstractContextManager[Any]:
        """Context manager that turns autocast off, for operations whose dtypes are settled."""
        if not torch.is_autocast_enabled(self.device):
            return _UNCHANGED
        return torch.autocast(self.device, self.dtype, enabled=False)

    def coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose rounding limits a solve of states of ``dtype``."""
        if self.enabled and torch.finfo(self.dtype).eps > torch.finfo(dtype).eps:
            return self.dtype
        return dtype
