"""Whether work goes into a CUDA graph: nothing may be asked of the device then."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
