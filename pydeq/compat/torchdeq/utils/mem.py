"""Gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.checkpoint import checkpoint

__all__ = ["mem_gc"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """Compute ``func(*in_args)``, and again in the backward pass instead of keeping its activations.

    Gradients reach the arguments and whatever ``func`` is made of. The second evaluation sees the autocast state and
    the random numbers of the first one.
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)
