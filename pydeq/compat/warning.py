"""What the replacements say once: a function that modifies its argument, backward solves that do not converge."""

from __future__ import annotations

import functools
import warnings

from pydeq.solution import ConvergenceWarning


@functools.cache
def warn_of_modification() -> None:
    """Say that f modifies its argument."""
    warnings.warn(
        "func modifies its argument in place: from now on it is given a copy at each call, which costs time. To save"
        " it, use out-of-place operations in func, for example relu(z) instead of relu(z, inplace=True)",
        stacklevel=2,
    )


_warned: set[str] = set()


def warn_of_backward(solver: str, state: str, remedy: str) -> None:
    """Warn of a backward solve; once for each solver.

    Args:
        solver: Its name.
        state: How far it got.
        remedy: What to change of its options.
    """
    if solver in _warned:
        return
    _warned.add(solver)
    warnings.warn(
        f"the backward solve by {solver} left {state}, so their gradients are inexact: {remedy}, or make the function"
        " more contractive (a penalty on its Jacobian, a norm on its weights); this is said once",
        ConvergenceWarning,
        stacklevel=2,
    )
