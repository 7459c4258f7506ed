"""A check for CUDA graph capture, during which nothing may wait for the device."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
