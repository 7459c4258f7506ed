"""What an adjoint is: how a layer's output is computed so that gradients flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pydeq.linearization import Linearization
from pydeq.solution import Solution
from pydeq.state import State


@dataclass(frozen=True)
class Problem:
    """One forward call of a layer.

    Args:
        fn: fn(z, *context) -> like z, differentiable.
        z0: Initial state.
        context: What fn is given after z.
        options: Keywords of :func:`pydeq.fixed_point`.
        module: What holds the parameters that fn uses; None where fn is no module.
        memory: Where an adjoint may keep something from call to call; the layer's.
    """

    fn: Callable[..., Any]
    z0: State
    context: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, Any]:
        """The options that a solve of the adjoint system has in common with this one: who solves it together."""
        return {name: self.options[name] for name in ("process_group", "sharded") if name in self.options}


@dataclass(frozen=True)
class Attached:
    """What a layer's call gives.

    Args:
        output: The layer's output, attached to the graph.
        solution: How the solve went.
        linearization: The evaluation at the solution, where the adjoint made one: a penalty on its Jacobian then needs
            no other.
    """

    output: State
    solution: Solution
    linearization: Linearization | None = None


class Adjoint(ABC):
    """How to differentiate a fixed point; frozen, without state."""

    @abstractmethod
    def solve(self, problem: Problem) -> Attached:
        """Solve, and attach the solution to the graph. Gradients are on."""
