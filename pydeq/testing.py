"""Helpers for tests of solvers, adjoints and models: problems, a call counter, derived tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeq.fixed_point import fixed_point
from pydeq.solution import Solution


@dataclass(frozen=True)
class Problem:
    """A batch of fixed-point problems z = fn(z, *context).

    Args:
        fn: The map; fn(z, *context) -> like z.
        z0: Where to start, [B, D].
        context: Tensors passed on to fn, each with the batch first.
        solution: The fixed points, [B, D], where they are known.
    """

    fn: Callable[..., Any]
    z0: Tensor
    context: tuple[Tensor, ...] = ()
    solution: Tensor | None = None

    def solve(self, **options: Any) -> Solution:
        """:func:`pydeq.fixed_point` on this problem."""
        return fixed_point(self.fn, self.z0, *self.context, **options)

    def rows(self, index: Any) -> Problem:
        """The problems of some samples only, or in another order; ``index`` indexes the first dimension of a tensor."""
        return replace(
            self,
            z0=self.z0[index],
            context=tuple(entry[index] for entry in self.context),
            solution=None if self.solution is None else self.solution[index],
        )


def linear_map(rho: float, dim: int, *, batch: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """f(z, x) = A z + x with A symmetric, its eigenvalues spread evenly over [-rho, rho].

    Args:
        rho: Spectral radius of A; not 1.
        dim: D.
        batch: B.
        dtype: Of states; the solution is computed in float64.
        seed: Of A and x.

    Returns:
        A problem that starts from zero and knows its solution.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu"))[0]
    exact = (basis * torch.linspace(rho, -rho, dim, dtype=torch.float64, device="cpu")) @ basis.T
    A = exact.to(dtype)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    solution = torch.linalg.solve(torch.eye(dim, dtype=torch.float64, device="cpu") - A.double(), x.double().T).T
    return Problem(lambda z, x: z @ A.T + x, torch.zeros_like(x), (x,), solution.to(dtype))


def tanh_map(rho: float, dim: int, *, batch: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """f(z, x) = tanh(W z + x), the smallest deep equilibrium model, with Gaussian W and x.

    Args:
        rho: Spectral radius of W as D grows: its entries have the standard deviation rho / sqrt(D).
        dim: D.
        batch: B.
        dtype: Of states.
        seed: Of W and x.

    Returns:
        A problem that starts from zero.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    W = (rho / dim**0.5 * torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")).to(dtype)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    return Problem(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,))


def softsign_map(
    rho: float | Sequence[float],
    dim: int,
    *,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """f(z, x, r) = y / (1 + |y|), y_i = r (3 z_{i-1} - z_{i+1}) / 4 + x_i with indices modulo D: not symmetric.

    It is made of additions, multiplications and divisions of single entries, which are rounded the same at every place
    in memory. So the image of a sample depends only on the sample, to the last bit.

    Args:
        rho: Bounds the norm of the Jacobian: below 1, f is a contraction. A sequence gives each sample its own.
        dim: D.
        batch: B, where rho is a number.
        dtype: Of states.
        seed: Of x.

    Returns:
        A problem that starts from zero.
    """
    rates = [rho] * batch if isinstance(rho, int | float) else list(rho)
    generator = torch.Generator("cpu").manual_seed(seed)
    x = (0.5 * torch.randn(len(rates), dim, generator=generator, dtype=torch.float64, device="cpu")).to(dtype)
    quarter = (torch.tensor(rates, dtype=torch.float64, device="cpu") / 4.0).to(dtype)[:, None]

    def softsign(z: Tensor, x: Tensor, quarter: Tensor) -> Tensor:
        y = quarter * (3.0 * z.roll(1, 1) - z.roll(-1, 1)) + x
        return y / (1.0 + y.abs())

    return Problem(softsign, torch.zeros_like(x), (x, quarter))


class CallCounter:
    """Wrap a map, and record the batch size of every call.

    Args:
        fn: fn(z, *context) -> like z.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.batches: list[int] = []

    @property
    def calls(self) -> int:
        """The number of calls of fn."""
        return len(self.batches)

    def __call__(self, z: Any, *context: Any) -> Any:
        self.batches.append(len(z if isinstance(z, Tensor) else z[0]))
        return self.fn(z, *context)


def tolerance(dtype: torch.dtype, size: int = 1) -> float:
    """The relative error to allow for a sum of ``size`` terms of ``dtype``, eps * (4 + sqrt(size)).

    Rounding errors of a sum add up like a random walk (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    """
    return torch.finfo(dtype).eps * (4.0 + size**0.5)


def assert_close(
    actual: Tensor, expected: Tensor, *, size: int = 1, condition: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Fail unless |actual - expected| <= condition * tolerance(dtype, size) * max |expected| in every entry.

    Args:
        actual, expected: Of one shape. NaN and Inf must be in the same places.
        size: Terms summed for one entry.
        condition: How much the problem amplifies rounding errors.
        dtype: The dtype of the computation; by default the coarser dtype of the two.

    Raises:
        AssertionError: Naming the worst entry.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if dtype is None:
        dtype = max(actual.dtype, expected.dtype, key=lambda candidate: torch.finfo(candidate).eps)
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    magnitude = float(expected[finite].abs().max()) if finite.any() else 0.0
    allowed = condition * tolerance(dtype, size) * magnitude
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(finite | same, error, torch.inf).nan_to_num(torch.inf, torch.inf)
    if error.numel() and float(error.max()) > allowed:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"entry {where} is {float(actual[where])!r}, expected {float(expected[where])!r}: off by"
            f" {float(error.max()):.3g}, allowed {allowed:.3g}"
            f" ({int((error > allowed).sum())} of {error.numel()} are off)"
        )


def assert_identical(actual: Solution, expected: Solution, rows: Any = slice(None)) -> None:
    """Fail unless the solutions are the same to the last bit, NaNs included.

    Args:
        actual: A solution of some of the samples of ``expected``, in any order.
        expected: A solution.
        rows: The samples of ``expected`` that ``actual`` has; an index of the first dimension of a tensor.

    Raises:
        AssertionError: Naming what differs, and for which samples.
    """
    for name in ("status", "sample_nfe", "residual", "relative_residual", "value", "image"):
        one, other = getattr(actual, name), getattr(expected, name)
        parts = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for here, there in parts:
            there = there[rows]
            differs = (here != there) & ~((here != here) & (there != there))
            if differs.any():
                samples = differs.flatten(1).any(1) if differs.dim() > 1 else differs
                raise AssertionError(
                    f"{name} differs in samples {samples.nonzero()[:, 0].tolist()}:"
                    f" {here[samples]}, expected {there[samples]}"
                )
