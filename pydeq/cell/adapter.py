"""Where a user's cell meets the package: states of any type, keywords, and results that are not state.

Inside, a map takes a state, a tensor or a tuple of tensors, and positional context, and returns a state. Outside it may
take and return a state of any type, take keywords, and return something else with it. Keywords travel inside as a dict
at the end of the context, where whoever follows the context for gradients finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydeq.cell.pytree import structure_of
from pydeq.solution import Solution
from pydeq.state import State, as_tuple


class Adapter:
    """How one problem looks from outside.

    Args:
        z0: The initial state.
        keywords: What fn is given by name.
        has_aux: Whether fn returns a pair of the state and something else.
    """

    def __init__(self, z0: Any, keywords: dict[str, Any] | None = None, has_aux: bool = False) -> None:
        self.structure = structure_of(z0)
        self.z0: State = z0 if self.structure is None else self.structure.parts(z0)
        self.keywords = keywords or {}
        self.has_aux = has_aux
        self.newest: tuple[State, Any] | None = None  # what the newest evaluation returned, where it has aux

    def inside(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as it is called inside."""
        return _Inside(fn, self) if self.structure or self.keywords or self.has_aux else fn

    def context(self, context: Sequence[Any]) -> tuple[Any, ...]:
        """The context as it is passed on inside."""
        return (*context, self.keywords) if self.keywords else tuple(context)

    def outside(self, state: State) -> Any:
        """A state as the user has it."""
        return state if self.structure is None else self.structure.restore(state)

    def solution(self, solution: Solution) -> Solution:
        """A solution with states as the user has them."""
        return solution if self.structure is None else solution.restored(self.structure.restore)

    def aux_at_image(self, fn: Callable[..., Any], solution: Solution, context: Sequence[Any]) -> Any:
        """What ``fn``, a map inside, returned with the solution's image; evaluates it again if that was not its last.

        The last evaluation of a solve is that of the image in every sample that converged.
        """
        if self.newest is None or not _equal(self.newest[0], solution.image):
            fn(solution.value, *context)
        return self.take_aux()

    def take_aux(self) -> Any:
        """What the newest evaluation returned with its state."""
        assert self.newest is not None
        aux, self.newest = self.newest[1], None
        return aux


class _Inside:
    """A map as it is called inside the package."""

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
    """A map and a state as they are inside the package."""
    adapter = Adapter(z)
    return adapter.inside(fn), adapter.z0


def _describe(result: Any) -> str:
    return f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__


def _equal(one: Any, other: State) -> bool:
    parts = one if isinstance(one, tuple | list) else (one,)
    pairs = list(zip(parts, as_tuple(other), strict=True))
    return all(isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a.to(b.dtype), b) for a, b in pairs)
