"""The switch for the originals' own iterates instead of pydeq's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_active: ContextVar[bool] = ContextVar("pydeq.compat.legacy", default=False)


@contextmanager
def legacy(enabled: bool = True) -> Iterator[None]:
    """Reproduce the originals' iterates to rounding inside a ``with`` statement.

    The solvers of :mod:`pydeq.compat` then take the originals' steps, stop at the same step and return the same result,
    without their crashes. The power methods use the originals' Rayleigh quotient. A layer's backward pass follows the
    mode of its forward pass. ``legacy=True`` does the same for one call.

    Args:
        enabled: False asks for pydeq's numerics inside of a legacy block.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> with pydeq.compat.legacy():
        ...     z, _, info = torchdeq.anderson_solver(torch.cos, torch.zeros(1, 1), max_iter=30)
        >>> z
        tensor([[0.7388]])
    """
    token = _active.set(enabled)
    try:
        yield
    finally:
        _active.reset(token)


def is_legacy(asked: bool | None = None) -> bool:
    """Whether to reproduce the original: ``asked`` if given, else the mode of the enclosing block."""
    return _active.get() if asked is None else bool(asked)
