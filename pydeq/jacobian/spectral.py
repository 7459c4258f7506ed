"""Eigenvalues of the Jacobian: they tell whether a fixed-point iteration contracts, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pydeq.arguments import check_integer, check_tolerance, keywords_for
from pydeq.cell.adapter import Adapter
from pydeq.cell.linearization import Linearization, linearize
from pydeq.jacobian.arnoldi import arnoldi, ritz_values
from pydeq.jacobian.estimator import identity_probes
from pydeq.ops import random_probes
from pydeq.ops.constants import Distribution
from pydeq.ops.reduction import norm
from pydeq.state import State

# Products before the first estimate of the growth, and between two estimates.
_FIRST, _EVERY = 16, 8

_BOTH = ("return_error", "generator")  # keywords that both functions take


class SpectralRadius(NamedTuple):
    """Result of :func:`spectral_radius` with an error estimate; tensors of shape (batch,).

    Examples:
        >>> A = torch.tensor([[0.1, 0.5], [-0.5, 0.1]])
        >>> radius = pydeq.spectral_radius(lambda z: z @ A, torch.zeros(1, 2), method="arnoldi", return_error=True)
        >>> radius.value, radius.converged
        (tensor([0.5099]), tensor([True]))
    """

    value: Tensor
    """The estimate."""
    error: Tensor
    """Estimated absolute error of ``value``."""
    converged: Tensor
    """Whether ``error <= rtol * value``, bool."""


class Spectrum(NamedTuple):
    """Result of :func:`jacobian_spectrum` with error estimates; tensors of shape (batch, k).

    Examples:
        >>> A = torch.tensor([[0.1, 0.5], [0.3, 0.1]])
        >>> spectrum = pydeq.jacobian_spectrum(lambda z: z @ A, torch.zeros(1, 2), return_error=True)
        >>> spectrum.values.real, spectrum.error < 1e-5
        (tensor([[ 0.4873, -0.2873]]), tensor([[True, True]]))
    """

    values: Tensor
    """Eigenvalues, complex, by falling modulus."""
    error: Tensor
    """Estimated absolute errors of ``values``."""


@overload
def spectral_radius(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    steps: int = ...,
    method: Literal["growth", "arnoldi"] = ...,
    rtol: float = ...,
    return_error: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    **keywords: Any,
) -> Tensor: ...
@overload
def spectral_radius(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    steps: int = ...,
    method: Literal["growth", "arnoldi"] = ...,
    rtol: float = ...,
    return_error: Literal[True],
    generator: torch.Generator | None = ...,
    **keywords: Any,
) -> SpectralRadius: ...
def spectral_radius(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    steps: int = 100,
    method: Literal["growth", "arnoldi"] = "growth",
    rtol: float = 1e-3,
    return_error: bool = False,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor | SpectralRadius:
    """Estimate the largest |eigenvalue| of J = dfn/dz at ``z``, one value per sample; no gradient.

    rho(J) = lim ||v^T J^k||^(1/k) for almost every v. The usual power method, by Rayleigh quotients, gives 0 for a
    rotation. The growth rate is also correct for complex pairs, defective J and J = 0.

    Args:
        fn: fn(z, *context, **keywords) -> like z; treats samples independently.
        z: State, shape (batch, *state), or several such tensors, see :func:`pydeq.fixed_point`.
        context: Passed on to fn.
        keywords: Passed on to fn, as by :func:`pydeq.fixed_point`: ``attention_mask=mask``. A name that this function
            itself takes is never passed on.
        steps: Vector-Jacobian products at most, at least 2.
        method: "growth" averages the logarithm of the growth per product over a window. The weights fade towards its
            ends, which cancels oscillations (Das, Saiki, Sander and Yorke 2017). It stores one state. It needs many
            products if the largest eigenvalues are close in modulus. In that case "arnoldi" needs far fewer, 20 to 40,
            and stores all of them.
        rtol: "growth" ends once the estimated error of every sample is below ``rtol * value``; at least 0.
        return_error: Also return the estimated error, and whether it met rtol. For "growth" the error is twice the
            largest difference between windows; for "arnoldi" it is the residual times the condition number of the
            eigenvalue. Neither method detects an eigenvector that is almost absent from the random start.
        generator: Source of the seed of the random start; by default torch's own.

    Returns:
        Tensor of shape (batch,), float64 for float64 states, else float32; a :class:`SpectralRadius`
        with ``return_error``. NaN if J is not finite.

    Raises:
        TypeError, ValueError: If an option is out of range, a keyword is unknown, or fn changes the shape of z.

    Examples:
        >>> A = torch.tensor([[0.1, 0.5], [-0.5, 0.1]])
        >>> pydeq.spectral_radius(lambda z: z @ A, torch.zeros(1, 2), method="arnoldi")
        tensor([0.5099])
    """
    steps = check_integer("steps", steps, 2)
    if method not in ("growth", "arnoldi"):
        raise ValueError(f"method must be 'growth' or 'arnoldi', got {method!r}")
    rtol = check_tolerance("rtol", rtol)
    _refuse_transforms("spectral_radius")
    adapter = Adapter(z, keywords_for("spectral_radius", fn, keywords, ("steps", "method", "rtol", *_BOTH)))
    at = linearize(adapter.inside(fn), adapter.z0, adapter.context(context))
    with torch.inference_mode(False), torch.no_grad():
        if method == "growth":
            value, error = _growth(at, steps, rtol, generator)
        else:
            values, errors = _ritz(at, steps, generator)
            value, error = values[:, 0].abs(), errors[:, 0]
        wide = torch.promote_types(at.layout.dtype, torch.float32)
        result = SpectralRadius(value.to(wide), error.to(wide), error <= rtol * value)
    return result if return_error else result.value


@overload
def jacobian_spectrum(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    k: int | None = ...,
    steps: int | None = ...,
    return_error: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    **keywords: Any,
) -> Tensor: ...
@overload
def jacobian_spectrum(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    k: int | None = ...,
    steps: int | None = ...,
    return_error: Literal[True],
    generator: torch.Generator | None = ...,
    **keywords: Any,
) -> Spectrum: ...
def jacobian_spectrum(
    fn: Callable[..., Any],
    z: State,
    *context: Any,
    k: int | None = None,
    steps: int | None = None,
    return_error: bool = False,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor | Spectrum:
    """Compute the eigenvalues of J = dfn/dz at ``z``, all or the k largest in modulus; no gradient.

    Args:
        fn, z, context, keywords: As in :func:`spectral_radius`.
        k: Number of eigenvalues, at most D. None: all D, from a dense Jacobian, for states of at most 1024 entries per
            sample.
        steps: Vector-Jacobian products of Arnoldi's method for a given k, at least k; by default 2 k + 20. All of them
            are stored. Accurate eigenvalues beyond the first few need more.
        return_error: Also return the estimated errors: residuals times the condition numbers of the eigenvalues.
        generator: Source of the seed of the random start; by default torch's own.

    Returns:
        Complex tensor of shape (batch, k), complex128 for float64 states, else complex64, by falling modulus; a
        :class:`Spectrum` with ``return_error``. NaN for samples whose J is not finite.

    Raises:
        TypeError, ValueError: If an option is out of range, a keyword is unknown, fn changes the shape of z, or z is
            too large.

    Examples:
        >>> A = torch.tensor([[0.1, 0.5], [0.3, 0.1]])
        >>> pydeq.jacobian_spectrum(lambda z: z @ A, torch.zeros(1, 2)).real
        tensor([[ 0.4873, -0.2873]])
    """
    if k is not None:
        k = check_integer("k", k, 1)
    if steps is not None:
        if k is None:
            raise ValueError("steps needs k: without k, the Jacobian is dense")
        steps = check_integer("steps", steps, k)
    _refuse_transforms("jacobian_spectrum")
    adapter = Adapter(z, keywords_for("jacobian_spectrum", fn, keywords, ("k", "steps", *_BOTH)))
    at = linearize(adapter.inside(fn), adapter.z0, adapter.context(context))
    with torch.inference_mode(False), torch.no_grad():
        size = at.layout.size
        if k is None:
            # Row i of J is the vector-Jacobian product of unit vector i.
            rows = at.flat_vjps(identity_probes(at.layout)).permute(1, 0, 2).double()
            left = torch.zeros(at.layout.batch, dtype=torch.float64, device=at.layout.device)
            if size:
                values, error = ritz_values(rows, left, torch.finfo(at.layout.dtype).eps)
            else:
                values, error = rows[:, :, 0:0].sum(2) * 1j, rows[:, :, 0:0].sum(2)
        elif k > size:
            raise ValueError(f"k must be at most the {size} entries of a sample's state, got {k}")
        else:
            values, error = _ritz(at, 2 * k + 20 if steps is None else steps, generator)
            values, error = values[:, :k], error[:, :k]
        wide = torch.promote_types(at.layout.dtype, torch.float32)
        result = Spectrum(values.to(wide.to_complex()), error.to(wide))
    return result if return_error else result.values


def _refuse_transforms(name: str) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} has no gradient and its values decide when it ends, so it does not work under torch.func"
            " transforms: make the dimension that vmap maps over part of the batch"
        )


def _start(at: Linearization, generator: torch.Generator | None) -> Tensor:
    layout = at.layout
    wide = torch.promote_types(layout.dtype, torch.float32)
    like = torch.empty(layout.batch, layout.size, dtype=wide, device=layout.device)
    return random_probes(like, 1, Distribution.GAUSSIAN, generator)[0]


def _ritz(at: Linearization, steps: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    layout = at.layout
    if layout.size == 0:
        zero = torch.zeros(layout.batch, 1, dtype=torch.float64, device=layout.device)
        return zero.to(torch.complex128), zero
    start = _start(at, generator)
    H, left = arnoldi(lambda v: at.flat_vjp(v.to(layout.dtype)).to(start.dtype), start, min(steps, layout.size))
    return ritz_values(H, left, torch.finfo(layout.dtype).eps)


def _growth(at: Linearization, steps: int, rtol: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The estimate and its error, float64 [B] each."""
    dtype = at.layout.dtype
    v = _start(at, generator)
    lengths: list[Tensor] = []  # log of the growth of each product, [B]; -inf once v is 0
    value = error = norm(v)
    for step in range(1, steps + 1):
        length = norm(v)
        v = at.flat_vjp((v / torch.where(length > 0, length, 1.0)[:, None]).to(dtype)).to(v.dtype)
        grown = norm(v)
        lengths.append(torch.where(length == 0, 0.0, grown).log())  # -inf for 0 / 0, too; NaN stays
        if step == steps or (step >= _FIRST and step % _EVERY == 0):
            value, error = _judge(torch.stack(lengths), torch.finfo(dtype).eps)
            if not bool((error > rtol * value).any()):
                break
    return value, error


def _judge(lengths: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The mean growth in the last half of [N, B], and twice the largest difference of other windows from it.

    Earlier windows detect decay. Shorter windows detect oscillation; a shifted window may miss it, since the shift may
    be a whole period.
    """
    count = len(lengths)
    half = count - count // 2
    first = count - half
    value = _average(lengths[first:])
    error = 4.0 * eps * value
    for start, size in (
        (first // 2, half),
        (3 * first // 4, half),
        (first, half - half // 4),
        (first + half // 4, half - half // 4),
    ):
        error = torch.maximum(error, 2.0 * (value - _average(lengths[start : start + size])).abs())
    return value, torch.where(value == 0, 0.0, error)


def _average(lengths: Tensor) -> Tensor:
    """exp of the mean over the first dimension, with weights exp(-1 / (t (1 - t))) for t in (0, 1)."""
    t = (torch.arange(len(lengths), dtype=torch.float64, device=lengths.device) + 0.5) / len(lengths)
    weights = torch.exp(4.0 - 1.0 / (t * (1.0 - t)))
    terms = torch.where(weights[:, None] > 0, weights[:, None] * lengths, 0.0)  # 0 * -inf would be NaN
    return torch.exp(terms.sum(0) / weights.sum())
