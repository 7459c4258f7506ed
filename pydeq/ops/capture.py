"""Checks for recorded calls: a CUDA graph, whose capture must not wait for the device, and an exported program."""

from __future__ import annotations

import threading

import torch


def capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Export(threading.local):
    """The export mode of this thread."""

    active: bool = False
    steps: int | None = None


export_state = _Export()


def exporting() -> bool:
    """Whether calls are recorded as a program, by torch.export or in the export mode: no value decides what runs."""
    return export_state.active or torch.compiler.is_exporting()
