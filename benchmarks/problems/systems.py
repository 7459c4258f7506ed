"""Systems of equations r(z) = 0, recast as fixed-point problems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems.base import Formula, Problem, from_formula

# A root is found if ||r(z)||_2 <= RESIDUAL. The study of 23 problems (arXiv 2403.16341) asks solvers for 1e-8 in the
# maximum norm and accepts 1e-6; the Euclidean norm is the stricter one.
RESIDUAL = 1e-6


@dataclass(frozen=True)
class System:
    """Find r(z) = 0, for one sample.

    Args:
        name: For keys.
        title: For readers.
        root: r, as in ``Problem``.
        start: The standard start, [n] in float64.
        solutions: Known roots, each [n] in float64.
        constants: Arrays of r, by name.
        solvable: Whether there is a root.
    """

    name: str
    title: str
    root: Formula
    start: Tensor
    solutions: Sequence[Tensor] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    solvable: bool = True

    def residual(self, z: Tensor) -> Tensor:
        """r(z), for z of shape [B, n]."""
        return self.root(torch, z, **self.constants)

    def jacobian(self, z: Tensor) -> Tensor:
        """The Jacobian of r at z, [n, n] for z of shape [n]."""
        jacobian = torch.func.jacrev(lambda point: self.residual(point[None])[0])(z)
        assert isinstance(jacobian, Tensor)
        return jacobian


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counting(n: int) -> Tensor:
    """1, ..., n in float64."""
    return torch.arange(1, n + 1, dtype=torch.float64)


def scale_step(system: System) -> float:
    """The step of all recast systems: s / ||J(z0)||_2, where s is the sign of J's trace, and +1 for 0.

    It takes the units of r away, and no more: the Jacobian of z - step r(z) is the identity minus a matrix of norm 1.
    The sign makes plain iteration possible where the real parts of J's eigenvalues are all negative. z0 is the standard
    start, also for starts that are multiples of it.
    """
    jacobian = system.jacobian(system.start)
    sign = -1.0 if jacobian.trace() < 0 else 1.0
    return sign / torch.linalg.matrix_norm(jacobian, 2).item()


def from_root(key: str, title: str, root: Formula, z0: Tensor, step: float, **fields: Any) -> Problem:
    """The problem z = z - step r(z); ``fields`` are the other fields of Problem."""

    def formula(xp: Any, z: Any, **constants: Any) -> Any:
        return z - step * root(xp, z, **constants)

    return from_formula(key, title, formula, z0, root=root, step=step, **fields)


def recast(system: System, family: str, source: str, given: bool = False, start: float = 1.0) -> Problem:
    """A system as a problem in float64, of one sample.

    Args:
        family: The problem's family. The key starts with it.
        source: As in ``Problem``.
        given: Take step 1 instead of ``scale_step``.
        start: The factor of the standard start. Where that is 0, all entries are the factor, as in MINPACK's tests.
    """
    step = 1.0 if given else scale_step(system)
    z0 = start * system.start[None]
    if start != 1 and not system.start.any():
        z0 = torch.full_like(z0, start)
    facts = {"step": step, "start_residual": system.residual(z0).norm().item()}
    if system.solutions and system.start.numel() <= 100:
        identity = torch.eye(system.start.numel(), dtype=torch.float64)
        slopes = identity - step * system.jacobian(system.solutions[0])
        # NumPy's: torch's fails for Brown's function, whose eigenvalues are equal but two.
        facts["spectral_radius"] = float(abs(np.linalg.eigvals(slopes.numpy())).max())
    name = system.name if start == 1 else f"{system.name}.start{start:g}"
    title = system.title if start == 1 else f"{system.title}, {start:g} z0"
    return from_root(
        f"{family}.{name}",
        f"{title}: z - r(z)" if given else f"{title}: z - b r(z), b {step:.3g}",
        system.root,
        z0,
        step,
        facts=facts,
        family=family,
        source=source,
        rtol=0.0,
        atol=abs(step) * RESIDUAL,
        constants=system.constants,
        solvable=system.solvable,
    )


def recast_all(systems: Iterable[System], family: str, source: str, given: bool = False) -> Iterator[Problem]:
    """Each system as a problem, from its standard start."""
    for system in systems:
        yield recast(system, family, source, given)
