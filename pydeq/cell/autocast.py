"""The autocast state of a forward pass, to be there again when something of it is evaluated later."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """Autocast of one device type.

    Args:
        device: Device type.
        dtype: What operations are cast to where it is enabled.
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

    def again(self) -> torch.autocast:
        """As it was."""
        return torch.autocast(self.device, self.dtype, self.enabled, self.cached)

    def off(self) -> torch.autocast:
        """For operations whose dtypes are settled, like products with a derivative."""
        return torch.autocast(self.device, self.dtype, enabled=False)

    def coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that limits what a solve of states of ``dtype`` can reach."""
        if self.enabled and torch.finfo(self.dtype).eps > torch.finfo(dtype).eps:
            return self.dtype
        return dtype
