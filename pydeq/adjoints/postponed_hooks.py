"""Gradients of tensors without their hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def hooks_postponed(sources: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no hook of these tensors runs where their gradients are formed: it does where autograd is handed them."""
    postponed = [(hooks, list(hooks.items())) for x in sources if (hooks := x._backward_hooks)]
    for hooks, _ in postponed:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in postponed:
            hooks.update(items)
