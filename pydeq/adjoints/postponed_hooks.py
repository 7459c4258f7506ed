"""Compute gradients of tensors without running their hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def hooks_postponed(sources: Sequence[Tensor]) -> Iterator[None]:
    """Context manager in which the hooks of these tensors do not run.

    Autograd runs them later, when backward returns the gradients that were computed here.
    """
    postponed = [(hooks, list(hooks.items())) for x in sources if (hooks := x._backward_hooks)]
    for hooks, _ in postponed:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in postponed:
            hooks.update(items)
