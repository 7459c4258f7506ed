"""Linear maps z = A z + x whose spectrum is prescribed.

A = Q T Q^T, where Q is random and orthogonal and T is (block) triangular with the prescribed eigenvalues on its
diagonal. So ``spectral_radius`` is known, and ``spectral_norm`` is measured. x is standard normal. The
matrices are the same for all samples, except in the batches of easy and hard samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.base import BATCH, Problem, from_formula

FAMILY = "spectra"
SOURCE = "pydeq's benchmarks"


def linear(xp: Any, z: Any, transposed: Any, x: Any) -> Any:
    """A z + x, for the transpose of A: [n, n], or [B, n, n] for a matrix per sample."""
    if len(transposed.shape) == 2:
        return xp.matmul(z, transposed) + x
    return xp.matmul(z[:, None, :], transposed)[:, 0, :] + x


def _orthogonal(n: int, seed: int) -> Tensor:
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def _rotated(core: Tensor, seed: int = 0) -> Tensor:
    basis = _orthogonal(core.shape[-1], seed)
    return basis @ core @ basis.T


def affine(
    name: str, title: str, matrix: Tensor, radius: float, dtype: torch.dtype = torch.float32, **fields: Any
) -> Problem:
    """z = A z + x from z = 0.

    Args:
        matrix: A in float64, [n, n] or [B, n, n].
        radius: The largest modulus of its eigenvalues.
        dtype: Of the problem.
        fields: Of Problem.
    """
    batch = BATCH if matrix.ndim == 2 else len(matrix)
    x = torch.randn(batch, matrix.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = fields.pop("x", x)
    matrix = matrix.to(dtype)
    norm = torch.linalg.matrix_norm(matrix.double(), 2).max().item()
    return from_formula(
        f"{FAMILY}.{name}",
        title,
        linear,
        torch.zeros(x.shape, dtype=dtype),
        facts={"spectral_radius": radius, "spectral_norm": norm},
        family=FAMILY,
        source=SOURCE,
        constants={"transposed": matrix.mT.contiguous(), "x": x.to(dtype)},
        sample_axes={"x": 0} | ({"transposed": 0} if matrix.ndim == 3 else {}),
        **fields,
    )


def symmetric(low: float, high: float, n: int = 64) -> Problem:
    """Eigenvalues evenly spaced from ``low`` to ``high``."""
    eigenvalues = torch.linspace(low, high, n, dtype=torch.float64)
    return affine(
        f"symmetric.{low:g}_{high:g}",
        f"symmetric, λ {low:g} to {high:g}",
        _rotated(torch.diag(eigenvalues)),
        max(abs(low), abs(high)),
    )


def clustered(n: int = 64, outliers: Sequence[float] = (0.99, -0.99, 0.95, -0.95)) -> Problem:
    """Eigenvalues within 0.1 of 0, except for a few."""
    eigenvalues = torch.linspace(-0.1, 0.1, n, dtype=torch.float64)
    eigenvalues[: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    matrix = _rotated(torch.diag(eigenvalues))
    return affine("clustered", f"symmetric, λ near 0 and {len(outliers)} of modulus .95, .99", matrix, 0.99)


def rotations(modulus: float, n: int = 64) -> Problem:
    """Complex pairs of one modulus, at angles evenly spaced in (0, pi)."""
    angles = torch.pi * torch.arange(1, n // 2 + 1, dtype=torch.float64) / (n // 2 + 1)
    cosine, sine = modulus * angles.cos(), modulus * angles.sin()
    blocks = [torch.tensor([[c, -s], [s, c]], dtype=torch.float64) for c, s in zip(cosine, sine, strict=True)]
    return affine(
        f"rotations.{modulus:g}", f"complex pairs, |λ| {modulus:g}", _rotated(torch.block_diag(*blocks)), modulus
    )


def jordan(eigenvalue: float, size: int, n: int = 64) -> Problem:
    """Jordan blocks: ||A^k|| grows like k^(size - 1) before it decays.

    In float64: rounding moves the eigenvalues by up to eps^(1/size).
    """
    block = eigenvalue * torch.eye(size, dtype=torch.float64) + torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    return affine(
        f"jordan.{eigenvalue:g}.size{size}",
        f"Jordan blocks of {size}, λ {eigenvalue:g}",
        _rotated(torch.block_diag(*[block] * (n // size))),
        eigenvalue,
        torch.float64,
    )


def nonnormal(radius: float = 0.9, norm: float = 10.0, n: int = 64) -> Problem:
    """Triangular with Gaussian entries above the diagonal, scaled so that ||A||_2 is ``norm``."""
    diagonal = torch.diag(torch.linspace(-radius, radius, n, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    above = torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1)
    low, high = 0.0, 2 * norm
    for _ in range(60):
        middle = (low + high) / 2
        if torch.linalg.matrix_norm(diagonal + middle * above, 2) < norm:
            low = middle
        else:
            high = middle
    matrix = _rotated(diagonal + low * above)
    # float64: the condition of the eigenvalues is beyond single precision.
    return affine(f"nonnormal.norm{norm:g}", f"non-normal, ρ {radius:g}, norm {norm:g}", matrix, radius, torch.float64)


def expanding(radius: float, n: int = 64) -> Problem:
    """Symmetric, eigenvalues evenly spaced from -radius to 0: plain iteration diverges from the fixed point."""
    eigenvalues = torch.linspace(-radius, 0, n, dtype=torch.float64)
    return affine(f"expanding.{radius:g}", f"symmetric, λ {-radius:g} to 0", _rotated(torch.diag(eigenvalues)), radius)


def expanding_both_ways(radius: float, n: int = 64) -> Problem:
    """Symmetric, half of the eigenvalues in [-radius, 0] and half in [1.1, radius]: I - A is indefinite."""
    half = n // 2
    eigenvalues = torch.cat([torch.linspace(-radius, 0, half), torch.linspace(1.1, radius, n - half)]).double()
    matrix = _rotated(torch.diag(eigenvalues))
    return affine(f"indefinite.{radius:g}", f"symmetric, λ {-radius:g} to 0 and 1.1 to {radius:g}", matrix, radius)


def stiff(n: int = 64) -> Problem:
    """1 - lambda spaced evenly in its logarithm from 1e-3 to 1e3: an explicit step of a stiff system."""
    rates = torch.logspace(-3, 3, n, dtype=torch.float64)
    return affine("stiff", "stiff, 1 - λ 1e-3 to 1e3", _rotated(torch.diag(1 - rates)), 999.0, torch.float64)


def badly_scaled(radius: float = 0.9, n: int = 64) -> Problem:
    """D A D^-1 z + D x, where A is symmetric and D spaces the entries of the state from 1e-6 to 1e6.

    The norm of the residual sees only the large entries.
    """
    scales = torch.logspace(-6, 6, n, dtype=torch.float64)
    matrix = _rotated(torch.diag(torch.linspace(-radius, radius, n, dtype=torch.float64)))
    x = torch.randn(BATCH, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return affine(
        "badly_scaled",
        f"entries of 1e-6 to 1e6, ρ {radius:g}",
        scales[:, None] * matrix / scales,
        radius,
        torch.float64,
        x=scales * x,
    )


def mixed(easy: int = 60, hard: int = 4, n: int = 32, hard_radius: float = 0.99) -> Problem:
    """A matrix per sample: complex and real eigenvalues within 0.5 of 0, and a few samples within ``hard_radius``.

    The hard samples are spread evenly over the batch.
    """
    batch = easy + hard
    generator = torch.Generator().manual_seed(3)
    radii = torch.full((batch,), 0.5, dtype=torch.float64)
    radii[batch // hard - 1 :: batch // hard] = hard_radius
    gaussian = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    units = gaussian / torch.linalg.eigvals(gaussian).abs().amax(dim=1)[:, None, None]
    return affine(
        f"mixed.{easy}_{hard}.{hard_radius:g}",
        f"{easy} samples of ρ .5, {hard} of ρ {hard_radius:g}",
        radii[:, None, None] * units,
        hard_radius,
    )


def family() -> Iterator[Problem]:
    for radius in (0.5, 0.9, 0.99):
        yield symmetric(0.0, radius)
        yield symmetric(-radius, radius)
    yield symmetric(-0.99, 0.0)
    yield clustered()
    for modulus in (0.9, 0.99):
        yield rotations(modulus)
    yield jordan(0.9, 2)
    yield jordan(0.5, 8)
    yield jordan(0.9, 4)
    yield nonnormal()
    for radius in (1.2, 5.0):
        yield expanding(radius)
        yield expanding_both_ways(radius)
        yield rotations(radius)
    yield stiff()
    yield badly_scaled()
    yield mixed()
    yield mixed(hard_radius=0.999)
