"""The systems of nonlinear equations of Moré, Garbow and Hillstrom.

All 14, with their standard starts and multiples of them. The equations are ordered as in MINPACK's tests: the order
matters to a fixed-point iteration. Wood's, Watson's and the variably dimensioned function are sums of squares; r is the
gradient, each entry up to a factor.

Source: Moré, Garbow and Hillstrom, Testing Unconstrained Optimization Software, ACM Transactions on Mathematical
Software 7(1), 1981. Sizes and multiples of the starts: the test data of MINPACK (Moré, Garbow and Hillstrom, User Guide
for MINPACK-1, Argonne ANL-80-74, 1980).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.problems.base import Problem
from benchmarks.problems.systems import System, counting, recast, vector

SOURCE = "Moré, Garbow and Hillstrom, ACM TOMS 7(1), 1981"

# The formulas take the array library xp, z of shape [B, n], and their constants; they return r(z), [B, n].


def _columns(z: Any) -> list[Any]:
    return [z[:, i] for i in range(z.shape[1])]


def _before(xp: Any, z: Any) -> Any:
    """z_{i-1}, and 0 before the first entry."""
    return xp.concatenate([xp.zeros_like(z[:, :1]), z[:, :-1]], axis=1)


def _after(xp: Any, z: Any) -> Any:
    """z_{i+1}, and 0 after the last entry."""
    return xp.concatenate([z[:, 1:], xp.zeros_like(z[:, :1])], axis=1)


def _rosenbrock(xp: Any, z: Any) -> Any:
    return xp.concatenate([1 - z[:, :1], 10 * (z[:, 1:] - z[:, :-1] ** 2)], axis=1)


def rosenbrock(n: int = 2) -> System:
    """r_1 = 1 - z_1, r_i = 10 (z_i - z_{i-1}^2). For n > 2, test_nonlin's generalization."""
    start = torch.ones(n, dtype=torch.float64)
    start[0] = -1.2
    return System(f"rosenbrock.n{n}", f"Rosenbrock, n {n}", _rosenbrock, start, [torch.ones_like(start)])


def _powell_singular(xp: Any, z: Any) -> Any:
    a, b, c, d = _columns(z)
    return xp.stack([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2], axis=1)


def powell_singular() -> System:
    """The Jacobian at the root has rank 2."""
    return System("powell_singular", "Powell singular", _powell_singular, vector(3, -1, 0, 1), [vector(0, 0, 0, 0)])


def _powell_badly_scaled(xp: Any, z: Any) -> Any:
    a, b = _columns(z)
    return xp.stack([1e4 * a * b - 1, xp.exp(-a) + xp.exp(-b) - 1.0001], axis=1)


def powell_badly_scaled() -> System:
    """Published root: (1.098e-5, 9.106). So is its mirror image."""
    root = vector(1.0981593296997149e-05, 9.106146739867318)
    return System(
        "powell_badly_scaled", "Powell badly scaled", _powell_badly_scaled, vector(0, 1), [root, root.flip(0)]
    )


def _wood(xp: Any, z: Any) -> Any:
    a, b, c, d = _columns(z)
    first, second = b - a**2, d - c**2
    return xp.stack(
        [
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        ],
        axis=1,
    )


def wood() -> System:
    return System("wood", "Wood", _wood, vector(-3, -1, -3, -1), [vector(1, 1, 1, 1)])


def _helical_valley(xp: Any, z: Any) -> Any:
    a, b, c = _columns(z)
    # The angle of (a, b) in turns, in (-1/4, 3/4].
    turns = xp.arctan2(-a, b) / (2 * math.pi) + 0.25
    return xp.stack([10 * (c - 10 * turns), 10 * (xp.sqrt(a**2 + b**2) - 1), c], axis=1)


def helical_valley() -> System:
    """r jumps where z_1 = 0 and z_2 < 0."""
    return System("helical_valley", "Helical valley", _helical_valley, vector(-1, 0, 0), [vector(1, 0, 0)])


def _watson(xp: Any, z: Any, powers: Any, slopes: Any) -> Any:
    value = xp.matmul(z, powers)  # [B, 29]
    misfit = xp.matmul(z, slopes) - value**2 - 1
    last = z[:, 1] - z[:, 0] ** 2 - 1
    tail = xp.stack([z[:, 0] * (1 - 2 * last), last] + [xp.zeros_like(last)] * (z.shape[1] - 2), axis=1)
    return xp.matmul(misfit, slopes.T) - 2 * xp.matmul(misfit * value, powers.T) + tail


def watson(n: int) -> System:
    """Coefficients of a polynomial p with p' - p^2 = 1 and p(0) = 0, in the sense of least squares.

    r is half the gradient of the sum of squares of p'(t) - p(t)^2 - 1 at t = i / 29, of z_1 and of z_2 - z_1^2 - 1.
    """
    t = counting(29) / 29
    exponents = counting(n)[:, None] - 1
    powers = t**exponents  # [n, 29]
    slopes = exponents * t ** (exponents - 1)
    start = torch.zeros(n, dtype=torch.float64)
    return System(f"watson.n{n}", f"Watson, n {n}", _watson, start, constants={"powers": powers, "slopes": slopes})


def _chebyquad(xp: Any, z: Any, integrals: Any) -> Any:
    x = 2 * z - 1
    before, now = xp.ones_like(x), x
    means = []
    for _ in range(z.shape[1]):
        means.append(now.mean(axis=1))
        before, now = now, 2 * x * now - before
    return xp.stack(means, axis=1) - integrals


# The abscissas up to the middle; the others are their mirror images in [0, 1].
CHEBYQUAD_ROOTS = {
    1: (0.5,),
    2: (0.2113248654051871,),
    3: (0.1464466094067262, 0.5),
    5: (0.0837512564995091, 0.31272929522320947, 0.5),
    6: (0.06687659094608978, 0.2887406731194442, 0.36668229924164764),
    7: (0.058069149620975535, 0.23517161235742162, 0.3380440947400462, 0.5),
    9: (0.04420534613578275, 0.199490672309881, 0.23561910847106, 0.4160469078925981, 0.5),
}


def chebyquad(n: int) -> System:
    """Abscissas of Chebyshev's quadrature: r_i is the mean of T_i at them minus the integral of T_i over [0, 1].

    There is a root for n <= 7 and n = 9 only.
    """
    i = counting(n)
    even = i % 2 == 0
    integrals = torch.where(even, -1 / torch.where(even, i**2 - 1, 1), 0)
    roots = []
    if n in CHEBYQUAD_ROOTS:
        half = CHEBYQUAD_ROOTS[n]
        roots = [vector(*half, *(1 - x for x in half[: n // 2][::-1]))]
    return System(
        f"chebyquad.n{n}",
        f"Chebyquad, n {n}",
        _chebyquad,
        i / (n + 1),
        roots,
        {"integrals": integrals},
        solvable=n <= 7 or n == 9,
    )


def _brown(xp: Any, z: Any) -> Any:
    total = xp.sum(z, axis=1, keepdims=True)
    product = xp.prod(z, axis=1)[:, None]
    return xp.concatenate([z[:, :-1] + total - (z.shape[1] + 1), product - 1], axis=1)


def brown(n: int) -> System:
    start = torch.full((n,), 0.5, dtype=torch.float64)
    return System(f"brown.n{n}", f"Brown almost-linear, n {n}", _brown, start, [torch.ones_like(start)])


def _grid_start(n: int) -> torch.Tensor:
    """t (t - 1) at t = i / (n + 1)."""
    t = counting(n) / (n + 1)
    return t * (t - 1)


def _boundary_value(xp: Any, z: Any, t: Any) -> Any:
    h = t[0]
    return 2 * z - _before(xp, z) - _after(xp, z) + h**2 / 2 * (z + t + 1) ** 3


def boundary_value(n: int = 10) -> System:
    """u'' = (u + t + 1)^3 / 2, u(0) = u(1) = 0, by central differences."""
    return System(
        f"boundary_value.n{n}",
        f"Discrete boundary value, n {n}",
        _boundary_value,
        _grid_start(n),
        constants={"t": counting(n) / (n + 1)},
    )


def _integral_equation(xp: Any, z: Any, t: Any, kernel: Any) -> Any:
    return z + xp.matmul((z + t + 1) ** 3, kernel)


def integral_equation(n: int = 10) -> System:
    """The boundary value problem as an integral equation, by the trapezoidal rule."""
    t = counting(n) / (n + 1)
    kernel = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t)) / (2 * (n + 1))
    return System(
        f"integral_equation.n{n}",
        f"Discrete integral equation, n {n}",
        _integral_equation,
        _grid_start(n),
        constants={"t": t, "kernel": kernel},
    )


def _trigonometric(xp: Any, z: Any, i: Any) -> Any:
    cosine = xp.cos(z)
    return z.shape[1] - xp.sum(cosine, axis=1, keepdims=True) + i * (1 - cosine) - xp.sin(z)


def trigonometric(n: int = 10) -> System:
    """z = 0 is a root. From the standard start, methods that decrease ||r|| end at a minimum with ||r|| > 0."""
    start = torch.full((n,), 1 / n, dtype=torch.float64)
    return System(
        f"trigonometric.n{n}",
        f"Trigonometric, n {n}",
        _trigonometric,
        start,
        [torch.zeros_like(start)],
        {"i": counting(n)},
    )


def _variably_dimensioned(xp: Any, z: Any, i: Any) -> Any:
    total = xp.sum(i * (z - 1), axis=1, keepdims=True)
    return z - 1 + i * total * (1 + 2 * total**2)


def variably_dimensioned(n: int = 10) -> System:
    start = 1 - counting(n) / n
    return System(
        f"variably_dimensioned.n{n}",
        f"Variably dimensioned, n {n}",
        _variably_dimensioned,
        start,
        [torch.ones_like(start)],
        {"i": counting(n)},
    )


def _broyden_tridiagonal(xp: Any, z: Any) -> Any:
    return (3 - 2 * z) * z - _before(xp, z) - 2 * _after(xp, z) + 1


def broyden_tridiagonal(n: int = 10) -> System:
    start = -torch.ones(n, dtype=torch.float64)
    return System(f"broyden_tridiagonal.n{n}", f"Broyden tridiagonal, n {n}", _broyden_tridiagonal, start)


def _broyden_banded(xp: Any, z: Any, band: Any) -> Any:
    return z * (2 + 5 * z**2) + 1 - xp.matmul(z * (1 + z), band)


def broyden_banded(n: int = 10) -> System:
    """Five neighbours before each entry and one after it."""
    i = counting(n)
    offset = i[:, None] - i  # of the neighbour (row) from the equation (column)
    band = ((offset >= -5) & (offset <= 1) & (offset != 0)).double()
    start = -torch.ones(n, dtype=torch.float64)
    return System(f"broyden_banded.n{n}", f"Broyden banded, n {n}", _broyden_banded, start, constants={"band": band})


def systems() -> Iterator[tuple[System, tuple[float, ...]]]:
    """The systems of MINPACK's tests, each with the factors of its starts."""
    three = (1.0, 10.0, 100.0)
    yield rosenbrock(), three
    yield powell_singular(), three
    yield powell_badly_scaled(), (1.0, 10.0)
    yield wood(), three
    yield helical_valley(), three
    for n in (6, 9):
        yield watson(n), (1.0, 10.0)
    for n in (5, 6, 7):
        yield chebyquad(n), three
    for n in (8, 9):
        yield chebyquad(n), (1.0,)
    yield brown(10), three
    for n in (30, 40):
        yield brown(n), (1.0,)
    yield boundary_value(), three
    for n in (1, 10):
        yield integral_equation(n), three
    yield trigonometric(), three
    yield variably_dimensioned(), three
    yield broyden_tridiagonal(), three
    yield broyden_banded(), three


def family(given: bool = False) -> Iterator[Problem]:
    """All problems; ``given``: z = z - r(z), from the standard starts only."""
    for system, starts in systems():
        for start in starts[:1] if given else starts:
            yield recast(system, "more.given" if given else "more", SOURCE, given, start)
