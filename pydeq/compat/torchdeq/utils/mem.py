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

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> x = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(torchdeq.mem_gc(torch.exp, [x]), x)
        (tensor([2.7183]),)
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)
