"""The interface of a library to the suites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, Protocol

from torch import Tensor

from benchmarks.timing import Map

Solver = Literal["picard", "anderson", "broyden"]


@dataclass(frozen=True)
class Method:
    """A solver that every library has.

    Args:
        solver: Its name.
        memory: Anderson: columns mixed. None means enough for every step for Broyden, and nothing for Picard.
    """

    solver: Solver
    memory: int | None = None

    @property
    def title(self) -> str:
        return self.solver.capitalize()


METHODS = (Method("picard"), Method("anderson", memory=6), Method("broyden"))


@dataclass(frozen=True)
class Outcome:
    """The result of a solve.

    Args:
        value: The value that the library passes on to the next layer.
        residual: Relative residuals that the library reports and stops by, [B].
        converged: Whether all samples met the tolerance.
    """

    value: Tensor
    residual: Tensor
    converged: bool


@dataclass(frozen=True)
class LayerSettings:
    """An implicit layer: Anderson forward and backward, exact implicit gradients.

    Args:
        penalty: pydeq's mode of the Jacobian penalty; other libraries have only one.
    """

    method: Method
    rtol: float
    max_calls: int
    adjoint_rtol: float
    adjoint_max_calls: int
    penalty: Literal["vjp", "difference"] = "vjp"


class Layer(Protocol):
    """An implicit layer around a cell."""

    def solve(self, z0: Tensor, x: Tensor, max_calls: int | None = None) -> Tensor:
        """The fixed point, attached to the graph if gradients are on; ``max_calls`` overrides the layer's."""
        ...

    def penalty(self, z: Tensor, x: Tensor) -> Tensor:
        """The Hutchinson estimate of ||J||_F^2 over the entries of z, one Gaussian probe; with a graph."""
        ...

    def solve_penalized(self, z0: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The fixed point and the penalty at it, in the cheapest way that the library offers."""
        ...


class Peer(ABC):
    """One library.

    ``calls`` and ``max_calls`` count evaluations of the map, even if the library's own cap counts something else.
    """

    name: str

    @property
    def version(self) -> str:
        return version(self.name)

    def forget(self) -> None:  # noqa: B027  # most keep nothing
        """Free memory that is kept from one solve for the next."""

    @abstractmethod
    def solve(self, fn: Map, z0: Tensor, method: Method, rtol: float, max_calls: int) -> Outcome:
        """Solve z = fn(z) until ||fn(z) - z|| <= rtol ||fn(z)|| for every sample."""

    @abstractmethod
    def run(self, fn: Map, z0: Tensor, method: Method, calls: int) -> Any:
        """Iterate ``calls`` times on every sample, without stopping. Returns the library's own result."""

    @abstractmethod
    def layer(self, cell: Callable[[Tensor, Tensor], Tensor], settings: LayerSettings) -> Layer:
        """An implicit layer around cell(z, x)."""
