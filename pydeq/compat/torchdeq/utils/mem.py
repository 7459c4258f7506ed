"""Gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.checkpoint import checkpoint

__all__ = ["mem_gc"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """Compute ``func(*in_args)``; compute it again in the backward pass instead of keeping its activations.

    Gradients reach the arguments and all tensors that ``func`` uses. The second evaluation has the same autocast state
    and random numbers as the first.
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)
