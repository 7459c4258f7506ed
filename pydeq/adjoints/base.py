"""The interface of adjoints, which compute a layer's output with its gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch._C import _functorch  # pyright: ignore

from pydeq.adjoints.explicit import Explicit
from pydeq.cell.linearization import Linearization
from pydeq.cell.prepared import PreparedCell
from pydeq.solution import Solution
from pydeq.solve.solve import solve
from pydeq.solvers import Solver
from pydeq.state import State


@dataclass(frozen=True)
class Problem:
    """One forward call of a layer.

    Args:
        cell: The cell, with its initial state.
        context: The cell's arguments after the state.
        options: Keywords of :func:`pydeq.fixed_point`.
        memory: State of the adjoint that the layer keeps between calls.
    """

    cell: PreparedCell
    context: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def z0(self) -> State:
        """The initial state."""
        return self.cell.z0

    def solve(self) -> Solution:
        """Solve without gradients."""
        return solve(self.cell.call, self.z0, self.context, **self.options)

    def explicit(self) -> Explicit:
        """Make the cell a function of all tensors that it is known to depend on."""
        return Explicit(self.cell.call, self.context, self.cell.modules)

    @property
    def shared(self) -> dict[str, Any]:
        """The options that also hold for solves of the adjoint system: the ranks that solve together, and the norm."""
        return {name: self.options[name] for name in ("process_group", "sharded", "norm") if name in self.options}


@dataclass(frozen=True)
class AdjointResult:
    """The result of an adjoint's forward pass.

    Args:
        output: The layer's output, with its graph.
        solution: The solution of the forward solve.
        linearization: The evaluation at the solution, if the adjoint made one. A penalty on the Jacobian uses it.
        states: The states asked for by ``states_at`` with their gradients, if the adjoint has these.
        evaluated: fn at the solution's image, if the adjoint evaluated it without a linearization.
    """

    output: State
    solution: Solution
    linearization: Linearization | None = None
    states: list[State] | None = None
    evaluated: State | None = None


def refuse_vectorized(cotangents: Sequence[Tensor], adjoint: Adjoint) -> None:
    """Raise if autograd vectorizes over several cotangents, which a solve cannot do.

    Raises:
        RuntimeError: Under ``is_grads_batched=True`` of ``torch.autograd.grad``, or a function that uses it.
    """
    if any(_functorch.is_legacy_batchedtensor(part) for part in cotangents):
        instead = "torch.func.jacrev" if adjoint.transforms else "torch.func.jacrev with pydeq.Implicit"
        raise RuntimeError(
            f"a DEQ with {type(adjoint).__name__} cannot be differentiated by is_grads_batched or vectorize=True: use"
            f" {instead}, or vectorize=False"
        )


class Adjoint(ABC):
    """A method to differentiate a fixed point; frozen, without state.

    Attributes:
        transforms: Whether it works under transforms of torch.func.
        distributes: Whether it works with a process_group.
        normed: Whether it works with ``norm="parts"``.
        exports: Whether evaluation is by the layer's solver, so that it can be exported.
        iterates: Whether it has its own iteration instead of the solver's. Such an iteration has no trace, freezes
            samples that are done, evaluates the whole batch, and computes a gradient for z0.

    Examples:
        >>> isinstance(pydeq.Implicit(), pydeq.adjoints.Adjoint)
        True
    """

    transforms: ClassVar[bool] = False
    distributes: ClassVar[bool] = True
    normed: ClassVar[bool] = True
    exports: ClassVar[bool] = True
    iterates: ClassVar[bool] = False

    @abstractmethod
    def solve(self, problem: Problem) -> AdjointResult:
        """Solve and return the solution with its graph. Gradients are on."""

    def evaluate(self, problem: Problem) -> Solution:
        """Solve without gradients, by the same iteration."""
        return problem.solve()

    def check(self, solver: Solver) -> None:  # noqa: B027  # most adjoints take any solver
        """Raise TypeError if this adjoint cannot differentiate the iteration of ``solver``."""
