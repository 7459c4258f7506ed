"""The type of a fixed-point problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Map

BATCH = 32

# formula(xp, z, **constants): an equation for any array library xp with numpy's names, such as torch or jax.numpy.
Formula = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """Find z = fn(z) for a batch.

    A sample is solved if ||fn(z) - z|| <= max(rtol ||fn(z)||, atol), measured in float64.

    Args:
        key: For names of figures.
        title: For readers.
        fn: The map.
        z0: Where to start, batch first.
        facts: Properties that explain the results, measured when the problem was made.
        family: The set of problems that it belongs to.
        source: Who stated it: a citation.
        rtol, atol: When a sample is solved.
        max_calls: Evaluations after which a solve is given up.
        formula: The same map for any array library: ``formula(torch, z, **constants)`` equals ``fn(z)`` up to rounding.
            Libraries that cannot call torch need it.
        root: The equation r(z) = 0, if the problem was stated so: ``root(xp, z, **constants)``. Then
            fn(z) = z - B r(z), and ``title`` or ``facts`` state B. Root finders are given r itself.
        step: B = step I, if B is of this form. Then the excess is taken from r(z): far from the origin, the difference
            fn(z) - z is lost to rounding.
        constants: Arrays of the formulas, by name.
        sample_axes: The axis of the samples in each constant that has one, for solvers that map over samples.
        exact: The map in float64, on the CPU. By default it is made from ``formula``.
        on_device: ``fn`` on another device. By default it is made from ``formula``.
        solvable: Whether there is a fixed point.
        coupled: Whether the samples depend on each other.
    """

    key: str
    title: str
    fn: Map
    z0: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)
    family: str = ""
    source: str = ""
    rtol: float = 1e-5
    atol: float = 0.0
    max_calls: int = 1000
    formula: Formula | None = None
    root: Formula | None = None
    step: float | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    sample_axes: Mapping[str, int] = field(default_factory=dict)
    exact: Map | None = None
    on_device: Callable[[torch.device], Map] | None = None
    solvable: bool = True
    coupled: bool = False

    def excess(self, value: Tensor) -> Tensor:
        """||fn(z) - z|| / max(rtol ||fn(z)||, atol) at ``value``, [B] in float64. At most 1 where a sample is solved.

        Raises:
            ValueError: If the problem has neither ``exact`` nor ``formula``.
        """
        z = value.detach().cpu().double().reshape(self.z0.shape)
        if self.exact is not None:
            image = self.exact(z)
        elif self.formula is not None:
            image = self.formula(torch, z, **self._double())
        else:
            raise ValueError(f"{self.key} has no map in float64")
        difference = image.detach() - z
        if self.root is not None and self.step is not None:
            difference = self.step * self.root(torch, z, **self._double()).detach()
        allowed = (self.rtol * image.detach().flatten(1).norm(dim=1)).clamp(min=self.atol)
        distance = difference.flatten(1).norm(dim=1)
        return torch.where(distance == 0, 0.0, distance / allowed)

    def _double(self) -> dict[str, Tensor]:
        return {name: array.cpu().double() for name, array in self.constants.items()}

    def to(self, device: torch.device) -> Problem:
        """Return the same problem on a device; :meth:`excess` stays on the CPU.

        Raises:
            ValueError: If the problem has neither ``on_device`` nor ``formula``.
        """
        if device == self.z0.device:
            return self
        constants = {name: array.to(device) for name, array in self.constants.items()}
        formula = self.formula
        if self.on_device is not None:
            fn = self.on_device(device)
        elif formula is not None:
            fn = lambda z: formula(torch, z, **constants)  # noqa: E731
        else:
            raise ValueError(f"{self.key} has no map for another device")
        return replace(self, fn=fn, z0=self.z0.to(device), constants=constants)


def from_formula(key: str, title: str, formula: Formula, z0: Tensor, **fields: Any) -> Problem:
    """A problem whose map is ``formula(xp, z, **constants)``; ``fields`` are the other fields of Problem."""
    constants = fields.get("constants", {})

    def fn(z: Tensor) -> Tensor:
        return formula(torch, z, **constants)

    return Problem(key, title, fn, z0, formula=formula, **fields)
