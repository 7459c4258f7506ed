"""Estimates of the Jacobian's norm and largest eigenvalue from f0 = f(z0) and z0, the arguments of the originals."""

from __future__ import annotations

import torch
from torch import Tensor

from pydeq.ops.reduction import norm

# The power iteration has found one real eigenvalue when its vector moves by less than this, relatively ...
_SETTLED = 1e-4
# ... and two eigenvalues when they explain the last step up to this.
_EXPLAINED = 0.05


def hutchinson(f0: Tensor, z0: Tensor, vecs: int, create_graph: bool, legacy: bool) -> Tensor:
    """sum ||v^T J||^2 / vecs / numel(z0) over ``vecs`` Gaussian v; 0-d.

    Args:
        f0, z0: f(z0) and z0, with the graph between them.
        vecs: Probes, at least 1.
        create_graph: Whether the estimate is to be differentiated.
        legacy: Draw the probes on the CPU in float32, as the originals do.
    """
    if vecs < 1:
        raise ValueError(f"vecs must be at least 1, got {vecs}")
    total = torch.zeros((), device=z0.device)
    for _ in range(vecs):
        v = torch.randn(*z0.shape).to(z0) if legacy else torch.randn_like(z0)
        product = torch.autograd.grad(
            f0, z0, v, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )[0]
        total = total + product.norm() ** 2
    return total / vecs / z0.numel()


def dominant_eigenvalue(f0: Tensor, z0: Tensor, n_iters: int, legacy: bool) -> tuple[Tensor, Tensor]:
    """The direction and the largest |eigenvalue| that ``n_iters`` power iterations find, for each sample.

    v' = J^T v / ||J^T v||. If v converges, its Rayleigh quotient is the eigenvalue. If v keeps turning, the last three
    vectors satisfy w'' = a w' + b w. The roots of r^2 = a r + b are the two dominant eigenvalues: a complex pair, or a
    pair of opposite or close real ones. If that does not hold yet either, the result is the growth of ||v|| in the
    second half.

    Args:
        f0, z0: f(z0) and z0, with the graph between them; samples are independent.
        n_iters: Vector-Jacobian products, at least 1.
        legacy: Always use the Rayleigh quotient.

    Returns:
        Unit vectors like z0, and moduli, (B,). For J = 0 the modulus is 0.
    """
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    batch, dtype = z0.shape[0], z0.dtype
    v = torch.randn_like(z0).detach().reshape(batch, -1)
    vectors, lengths, growth = [_unit(v)], [], v.new_zeros(batch, dtype=torch.float64)
    for k in range(n_iters):
        product = torch.autograd.grad(
            f0, z0, vectors[-1].view_as(z0), retain_graph=True, allow_unused=True, materialize_grads=True
        )[0].reshape(batch, -1)
        lengths = [*lengths[-1:], norm(product)]
        zero = lengths[-1] == 0
        vectors = [*vectors[-2:], torch.where(zero[:, None], vectors[-1], _unit(product))]
        if k >= n_iters // 2:
            growth += lengths[-1].log()  # -inf once v is 0, and from then on
    last = lengths[-1]
    w, product = vectors[-2].double(), vectors[-1].double() * last[:, None]
    rayleigh = (w * product).sum(1)
    evector = vectors[-1].view_as(z0)
    if legacy:
        return evector, rayleigh.abs().to(dtype)
    settled = norm(product - rayleigh[:, None] * w) <= _SETTLED * last
    modulus = torch.where(settled, rayleigh.abs(), (growth / (n_iters - n_iters // 2)).exp())
    if n_iters > 2:
        roots, explained = _two_eigenvalues(vectors, lengths)
        modulus = torch.where(~settled & explained, roots, modulus)
    return evector, torch.where(last == 0, 0.0, modulus).to(dtype)


def _two_eigenvalues(vectors: list[Tensor], lengths: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The larger modulus of two eigenvalues that explain the last two products, and whether they do; [B] each."""
    w0, w1, w2 = (vector.double() for vector in vectors[-3:])
    w1, w2 = w1 * lengths[0][:, None], w2 * (lengths[0] * lengths[1])[:, None]
    # Least squares for w2 = a w1 + b w0, with w0 a unit vector.
    c01, c02 = (w0 * w1).sum(1), (w0 * w2).sum(1)
    across = w1 - c01[:, None] * w0
    a = (across * w2).sum(1) / across.square().sum(1)
    b = c02 - a * c01
    rest = norm(w2 - a[:, None] * w1 - b[:, None] * w0)
    discriminant = a.square() + 4 * b
    real = (a.abs() + discriminant.clamp(min=0).sqrt()) / 2
    modulus = torch.where(discriminant >= 0, real, (-b).clamp(min=0).sqrt())
    return modulus, modulus.isfinite() & (rest <= _EXPLAINED * norm(w2))


def _unit(v: Tensor) -> Tensor:
    length = norm(v)
    return (v / torch.where(length > 0, length, 1.0)[:, None]).to(v.dtype)
