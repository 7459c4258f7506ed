"""Convert between a user's cell and the package: states of any type, keywords, and auxiliary results.

Inside the package, a map takes a state, which is a tensor or a tuple of tensors, and positional context, and returns a
state. Outside, it may also take and return states of other types, take keywords, and return a second result. Keywords
are passed on inside as a dict at the end of the context, so that their tensors get gradients like the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pydeq.cell.pytree import structure_of
from pydeq.solution import Solution
from pydeq.state import State, as_tuple


class Adapter:
    """The conversions of one problem.

    Args:
        z0: The initial state.
        keywords: The arguments that fn gets by name.
        has_aux: Whether fn returns a pair (state, aux).
    """

    def __init__(self, z0: Any, keywords: dict[str, Any] | None = None, has_aux: bool = False) -> None:
        self.structure = structure_of(z0)
        self.z0: State = z0 if self.structure is None else self.structure.parts(z0)
        self.keywords = keywords or {}
        self.has_aux = has_aux
        self.newest: tuple[State, Any] | None = None  # the result of the newest evaluation, with has_aux

    def inside(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Convert ``fn`` to a map of states that takes positional arguments."""
        return _Inside(fn, self) if self.structure or self.keywords or self.has_aux else fn

    def context(self, context: Sequence[Any]) -> tuple[Any, ...]:
        """The context for a map made by ``inside``, with the keywords at its end."""
        return (*context, self.keywords) if self.keywords else tuple(context)

    def outside(self, state: State) -> Any:
        """Convert a state to the user's type."""
        return state if self.structure is None else self.structure.restore(state)

    def solution(self, solution: Solution) -> Solution:
        """Convert the states of a solution to the user's type."""
        return solution if self.structure is None else solution.restored(self.structure.restore)

    def aux_at_image(self, fn: Callable[..., Any], solution: Solution, context: Sequence[Any]) -> Any:
        """The aux that ``fn``, a map made by ``inside``, returns with the solution's image.

        If all samples converged, the last evaluation of the solve returned the image, and its aux is taken. Otherwise
        ``fn`` is evaluated again.
        """
        if self.newest is None or not _equal(self.newest[0], solution.image):
            fn(solution.value, *context)
        return self.take_detached_aux()

    def take_detached_aux(self) -> Any:
        """The aux of the newest evaluation, which may have a graph, without it."""
        aux = self.take_aux()
        return tree_map_only(Tensor, Tensor.detach, aux) if any(map(_has_graph, tree_leaves(aux))) else aux

    def take_aux(self) -> Any:
        """The aux of the newest evaluation."""
        assert self.newest is not None
        aux, self.newest = self.newest[1], None
        return aux


class _Inside:
    """A user's map as a map of states."""

    def __init__(self, fn: Callable[..., Any], adapter: Adapter) -> None:
        self.fn, self.adapter = fn, adapter

    def __call__(self, z: State, *context: Any) -> State:
        adapter = self.adapter
        keywords: dict[str, Any] = {}
        if adapter.keywords:
            context, keywords = context[:-1], context[-1]
        result = self.fn(adapter.outside(z), *context, **keywords)
        aux = None
        if adapter.has_aux:
            if not isinstance(result, tuple | list) or len(result) != 2:
                raise TypeError(f"fn must return a pair (state, aux) with has_aux=True, got {_describe(result)}")
            result, aux = result
        if adapter.structure is not None:
            result = adapter.structure.of_result(result)
        if adapter.has_aux:
            adapter.newest = result, aux
        return result


def canonical(fn: Callable[..., Any], z: Any) -> tuple[Callable[..., Any], State]:
    """Convert a map and a state to the package's types."""
    adapter = Adapter(z)
    return adapter.inside(fn), adapter.z0


def _describe(result: Any) -> str:
    return f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__


def _has_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _equal(one: Any, other: State) -> bool:
    parts = one if isinstance(one, tuple | list) else (one,)
    pairs = list(zip(parts, as_tuple(other), strict=True))
    return all(isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a.to(b.dtype), b) for a, b in pairs)
