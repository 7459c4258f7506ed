"""Maps whose spectrum is set by construction.

Their ``fn`` is fused: it equals the formula up to rounding, and is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.base import BATCH, Problem

FAMILY = "radius"
RADII = (0.5, 0.8, 0.95, 1.5)  # of the weights; tanh flattens them


def _affine(xp: Any, z: Any, weight: Any, x: Any) -> Any:
    return z @ weight + x


def _tanh_of_affine(xp: Any, z: Any, weight: Any, x: Any) -> Any:
    return xp.tanh(z @ weight + x)


def _scaled(xp: Any, z: Any, slopes: Any, x: Any) -> Any:
    return slopes * z + x


def _tanh_of_scaled(xp: Any, z: Any, slopes: Any, x: Any) -> Any:
    return xp.tanh(slopes * z + x)


@cache
def _gaussian(dim: int, seed: int) -> tuple[Tensor, float]:
    """A Gaussian matrix of spectral radius 1, and its spectral norm: about 2, since it is far from normal."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator)
    matrix = matrix / torch.linalg.eigvals(matrix).abs().max()
    return matrix, torch.linalg.matrix_norm(matrix, 2).item()


def tanh_map(dim: int, rho: float, seed: int, batch: int = BATCH) -> Problem:
    """z = tanh(W z + x) from z = 0, where W is Gaussian with spectral radius ``rho`` and x standard normal."""
    unit, norm = _gaussian(dim, seed)
    weight = rho * unit.T.contiguous()
    x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(1_000 + seed))

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(x, z, weight))

    return Problem(
        f"tanh.d{dim}.rho{rho:g}",
        f"tanh(Wz + x), D {dim}, ρ {rho:g}",
        fn,
        torch.zeros(batch, dim),
        {"spectral_radius": rho, "spectral_norm": rho * norm},
        formula=_tanh_of_affine,
        constants={"weight": weight, "x": x},
        sample_axes={"x": 0},
    )


def symmetric_linear(seed: int, dim: int = 50, rho: float = 0.95, batch: int = BATCH) -> Problem:
    """z = A z + x from z = 0, where A is Gaussian, symmetric, of spectral radius ``rho``."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator)
    matrix = matrix + matrix.T
    matrix = rho * matrix / torch.linalg.eigvalsh(matrix).abs().max()
    x = torch.randn(batch, dim, generator=generator)

    def fn(z: Tensor) -> Tensor:
        return torch.addmm(x, z, matrix)

    return Problem(
        f"symmetric.d{dim}.rho{rho:g}",
        f"symmetric linear, D {dim}, ρ {rho:g}",
        fn,
        torch.zeros(batch, dim),
        {"spectral_radius": rho, "spectral_norm": rho},
        formula=_affine,
        constants={"weight": matrix, "x": x},
        sample_axes={"x": 0},
    )


def family() -> Iterator[Problem]:
    """The maps of the suite ``nfe``, for all solvers: tanh(W z + x) of several spectral radii, and a symmetric map."""
    for problem in (*(tanh_map(128, rho, seed=0) for rho in RADII), symmetric_linear(seed=0)):
        yield replace(problem, key=f"{FAMILY}.{problem.key}", family=FAMILY, source="pydeq's benchmarks")


def elementwise(batch: int, dim: int) -> Problem:
    """z = tanh(a z + x) entry by entry: the cheapest map, and slow to solve.

    The slopes a fill [-0.999, 0.999], and x is small, so that tanh hardly flattens them: no solver comes near rounding
    in 30 evaluations.
    """
    generator = torch.Generator().manual_seed(0)
    slopes = torch.empty(dim).uniform_(-0.999, 0.999, generator=generator)
    x = 0.01 * torch.randn(batch, dim, generator=generator)

    def fn(z: Tensor) -> Tensor:
        return torch.addcmul(x, slopes, z).tanh_()

    return Problem(
        f"{batch}x{dim}",
        f"({batch}, {dim})",
        fn,
        torch.zeros(batch, dim),
        formula=_tanh_of_scaled,
        constants={"slopes": slopes, "x": x},
        sample_axes={"x": 0},
    )


def diagonal(batch: int, dim: int) -> Problem:
    """z = a z + x entry by entry, with slopes a that fill [-0.9, 0.9]: one pass over the state."""
    slopes = torch.linspace(-0.9, 0.9, dim)
    x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))

    def fn(z: Tensor) -> Tensor:
        return torch.addcmul(x, slopes, z)

    return Problem(
        f"diagonal.{batch}x{dim}",
        f"a z + x, ({batch}, {dim})",
        fn,
        torch.zeros(batch, dim),
        formula=_scaled,
        constants={"slopes": slopes, "x": x},
        sample_axes={"x": 0},
    )
