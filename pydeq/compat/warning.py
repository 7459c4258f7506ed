"""Warnings that are given once: modified arguments, samples that depend on each other, inexact backward solves."""

from __future__ import annotations

import warnings

from pydeq.solution import ConvergenceWarning, CouplingWarning

_said: set[str] = set()


def warn_of_modification() -> None:
    """Warn that f modifies its argument."""
    _say_once(
        "modification",
        "func modifies its argument in place: from now on it gets a copy at each call, which costs time. To save"
        " it, use out-of-place operations in func, for example relu(z) instead of relu(z, inplace=True)",
        UserWarning,
    )


def warn_of_coupling(left: int, batch: int) -> None:
    """Warn that samples moved away from a solution that they had found.

    Args:
        left: Number of these samples.
        batch: Number of all samples.
    """
    _say_once(
        "coupling",
        f"{left} of {batch} samples met the tolerance and then moved far away from it. Samples do this if they depend"
        " on each other. The solve did not converge, and it returns the best state of each sample: for such samples"
        " its residual is larger than reported. Make one coupled system, such as the nodes of a graph, one"
        " sample: solve for z[None], deq(lambda z: f(z[0])[None], z0[None]), and take [0] of the result. This is said"
        " once",
        CouplingWarning,
    )


def warn_of_backward(solver: str, state: str, remedy: str) -> None:
    """Warn once for each solver that a backward solve is inexact.

    Args:
        solver: Its name.
        state: The result of the solve, for the message.
        remedy: The options to change, for the message.
    """
    _say_once(
        f"backward by {solver}",
        f"the backward solve by {solver} left {state}, so their gradients are inexact: {remedy}, or make the function"
        " more contractive (a penalty on its Jacobian, a norm on its weights); this is said once",
        ConvergenceWarning,
    )


def _say_once(key: str, text: str, category: type[Warning]) -> None:
    if key in _said:
        return
    _said.add(key)
    warnings.warn(text, category, stacklevel=3)
