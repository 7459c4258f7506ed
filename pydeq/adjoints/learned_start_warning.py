"""Warn once if an initial state is a parameter that gets no gradient."""

from __future__ import annotations

from torch import Tensor, nn

from pydeq.adjoints.base import Adjoint
from pydeq.arguments import warn_user
from pydeq.state import State, as_tuple

_warned: set[type[Adjoint]] = set()


def warn_about_learned_start(z0: State, adjoint: Adjoint) -> None:
    """Warn once if z0 is a parameter, or a view of one, and ``adjoint`` gives z0 no gradient."""
    if adjoint.iterates or type(adjoint) in _warned:
        return
    if any(part.requires_grad and _is_learned(part) for part in as_tuple(z0)):
        _warned.add(type(adjoint))
        warn_user(
            f"z0 is a parameter, but a fixed point does not depend on where its solve starts: {type(adjoint).__name__}"
            " gives z0 no gradient, and DistributedDataParallel waits for one. Make z0 a buffer, use pydeq.Unrolled()"
            " or pydeq.Reversible(), or set find_unused_parameters=True; this is said once"
        )


def _is_learned(x: Tensor) -> bool:
    if x.is_leaf:
        return isinstance(x, nn.Parameter)
    node = x.grad_fn
    while node is not None and len(node.next_functions) == 1:  # an expand, a view, a repeat
        node = node.next_functions[0][0]
        if hasattr(node, "variable"):
            return isinstance(node.variable, nn.Parameter)  # pyright: ignore
    return False
