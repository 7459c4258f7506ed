"""The equations on which SciPy tests its own solvers.

Three sets: those of the quasi-Newton and Krylov methods (``test_nonlin.py``), those of DF-SANE (``test__spectral.py``),
taken from La Cruz, Martínez and Raydan, and the fixed-point problems of ``fixed_point`` (``test_minpack.py``). SciPy's
tests ask for less: max |r| < 1e-2 in the first set, ||r|| <= 1e-5 sqrt(n) + 1e-4 ||r(z0)|| in the second.

Sources: SciPy 1.17, scipy/optimize/tests; La Cruz and Raydan, Optimization Methods and Software 18, 2003; La Cruz,
Martínez and Raydan, Spectral residual method without gradient information, Mathematics of Computation 75, 2006.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.base import Formula, Problem, from_formula
from benchmarks.problems.burkardt import chandrasekhar
from benchmarks.problems.more import powell_badly_scaled
from benchmarks.problems.systems import System, counting, recast_all, vector

SOURCE = "SciPy 1.17, scipy/optimize/tests"

# test_nonlin.py


def _cubic(xp: Any, z: Any, slopes: Any) -> Any:
    return -slopes * z - 0.01 * xp.sum(z**2, axis=1, keepdims=True) * z


def _identity(xp: Any, z: Any) -> Any:
    return z


def _linear(xp: Any, z: Any, matrix: Any, x: Any) -> Any:
    return xp.matmul(z, matrix.T) - x


def _pressure_network(xp: Any, z: Any) -> Any:
    pressure = 0.5 * z**2
    return xp.concatenate([pressure[:, 1:] - pressure[:, :1], xp.sum(z, axis=1, keepdims=True) - 4], axis=1)


def _preconditioned(xp: Any, z: Any, inverse: Any) -> Any:
    a, b = z[:, 0], z[:, 1]
    value = xp.stack([(a + 3) * (b**5 - 7) + 18, xp.sin(b * xp.exp(a) - 1)], axis=1)
    return -xp.matmul(value, inverse.T)


def nonlin_systems() -> Iterator[System]:
    """F, F2, F3, F4_powell, F5 and F6. F2_lucky, which is F2 started at its root, is left out."""
    ones = torch.ones(5, dtype=torch.float64)
    slopes = vector(3, 2, 1.5, 1, 0.5)
    yield System("nonlin.cubic", "SciPy F", _cubic, ones, [0 * ones], {"slopes": slopes})
    yield System("nonlin.identity", "SciPy F2", _identity, counting(6), [torch.zeros(6, dtype=torch.float64)])
    matrix = torch.tensor([[-2, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=torch.float64)
    x = counting(3)
    yield System("nonlin.linear", "SciPy F3", _linear, x, [vector(-2.5, -4, -3.5)], {"matrix": matrix, "x": x})
    powell = powell_badly_scaled()
    yield replace(powell, name="nonlin.powell", title="SciPy F4, Powell badly scaled", start=vector(-1, -2))
    # Four parallel pipes.
    yield System(
        "nonlin.pressure_network",
        "SciPy F5, pressure network",
        _pressure_network,
        vector(2, 0, 2, 0),
        [torch.ones(4, dtype=torch.float64)],
    )
    jacobian = torch.tensor([[-4.256, 14.7], [0.8394989, 0.59964207]], dtype=torch.float64)
    # Multiplied by the inverse of a matrix near the Jacobian at the root.
    yield System(
        "nonlin.preconditioned",
        "SciPy F6",
        _preconditioned,
        vector(-0.5, 1.4),
        [vector(0, 1)],
        constants={"inverse": torch.linalg.inv(jacobian)},
    )


# test__spectral.py and its sources. i is 1, ..., n.


def _exponential_1(xp: Any, z: Any, i: Any) -> Any:
    growth = xp.exp(z - 1)
    return xp.concatenate([growth[:, :1] - 1, i[1:] * (growth[:, 1:] - z[:, 1:])], axis=1)


def _exponential_2(xp: Any, z: Any, i: Any) -> Any:
    growth = xp.exp(z) - 1
    return xp.concatenate([growth[:, :1], 0.1 * i[1:] * (growth[:, 1:] + z[:, :-1])], axis=1)


def _triples(z: Any) -> Any:
    """Entries 1, 4, 7, ...; 2, 5, 8, ...; 3, 6, 9, ..."""
    blocks = z.reshape(z.shape[0], -1, 3)
    return blocks[:, :, 0], blocks[:, :, 1], blocks[:, :, 2]


def _interleaved(xp: Any, *parts: Any) -> Any:
    stacked = xp.stack(parts, axis=2)
    return stacked.reshape(stacked.shape[0], -1)


def _gasparo(xp: Any, z: Any) -> Any:
    a, b, c = _triples(z)
    first = 0.6 * a + 1.6 * b**3 - 7.2 * b**2 + 9.6 * b - 4.8
    second = 0.48 * a - 0.72 * b**3 + 3.24 * b**2 - 4.32 * b - c + 0.2 * c**3 + 2.16
    return _interleaved(xp, first, second, 1.25 * c - 0.25 * c**3)


def _augmented_powell(xp: Any, z: Any) -> Any:
    a, b, c = _triples(z)
    return _interleaved(xp, 1e4 * a * b - 1, xp.exp(-a) + xp.exp(-b) - 1.0001, _augmentation(xp, c))


def _scipy_augmented_powell(xp: Any, z: Any) -> Any:
    a, b, c = _triples(z)
    return _interleaved(xp, 1e4 * b**2 - 1, xp.exp(-a) + xp.exp(-b) - 1.0001, _augmentation(xp, c))


def _augmentation(xp: Any, c: Any) -> Any:
    middle = (-592 * c**3 + 888 * c**2 + 4551 * c - 1924) / 1998
    return xp.where(c <= -1, 0.5 * c - 2, xp.where(c < 2, middle, 0.5 * c + 2))


def _singular(xp: Any, z: Any, i: Any) -> Any:
    """z_{i+1}^2 / 2 - z_i^2 / 2 + i z_i^3 / 3, without the second term for i = 1 and without the first for i = n."""
    square = z**2 / 2
    none = xp.zeros_like(z[:, :1])
    after = xp.concatenate([square[:, 1:], none], axis=1)
    own = xp.concatenate([none, square[:, 1:]], axis=1)
    return after - own + i * z**3 / 3


def _logarithmic(xp: Any, z: Any) -> Any:
    return xp.log(1 + z) - z / z.shape[1]


def _extended_rosenbrock(xp: Any, z: Any) -> Any:
    blocks = z.reshape(z.shape[0], -1, 2)
    a, b = blocks[:, :, 0], blocks[:, :, 1]
    return _interleaved(xp, 10 * (b - a**2), 1 - a)


def _trigexp(xp: Any, z: Any) -> Any:
    left, right = z[:, :-1], z[:, 1:]
    wave = xp.sin(left - right) * xp.sin(left + right)
    decay = -left * xp.exp(left - right)
    first = 3 * z[:, :1] ** 3 + 2 * z[:, 1:2] - 5 + wave[:, :1]
    inner = z[:, 1:-1]
    middle = decay[:, :-1] + inner * (4 + 3 * inner**2) + 2 * z[:, 2:] + wave[:, 1:] - 8
    return xp.concatenate([first, middle, decay[:, -1:] + 4 * z[:, -1:] - 3], axis=1)


def _strictly_convex(xp: Any, z: Any, slopes: Any) -> Any:
    return slopes * (xp.exp(z) - 1)


def spectral_systems() -> Iterator[System]:
    """SciPy's F_1, F_2, F_4, F_6, F_7, F_9 and F_10, then more of the papers'.

    F_7 squares the second entry of each triple in place of multiplying the first two, as Powell's function does; it is
    given as SciPy and as the paper have it.
    """

    def full(n: int, value: float) -> Tensor:
        return torch.full((n,), value, dtype=torch.float64)

    yield System(
        "spectral.exponential_1.n100",
        "Exponential 1, n 100",
        _exponential_1,
        full(100, 100 / 99),
        [full(100, 1)],
        {"i": counting(100)},
    )
    yield System(
        "spectral.exponential_2.n100",
        "Exponential 2, n 100",
        _exponential_2,
        full(100, 1 / 100**2),
        [full(100, 0)],
        {"i": counting(100)},
    )
    # c = 0 leaves 2 b^3 - 9 b^2 + 12 b - 6 = 0.
    gasparo = vector(-5.921189464667502e-15, 2.6776506988040603, 0)
    yield System(
        "spectral.gasparo.n99", "Gasparo, n 99", _gasparo, vector(-1, 0.5, -1).repeat(33), [gasparo.repeat(33)]
    )
    chandra = chandrasekhar(100)
    yield replace(chandra, name="spectral.chandrasekhar.n100")
    powell_start = vector(1e-3, 18, 1).repeat(33)
    third = 0.3998810580736441
    powell_root = torch.cat([powell_badly_scaled().solutions[0], vector(third)])
    yield System(
        "spectral.augmented_powell.n99",
        "Augmented Powell, n 99",
        _augmented_powell,
        powell_start,
        [powell_root.repeat(33)],
    )
    yield System(
        "spectral.augmented_powell_scipy.n99",
        "Augmented Powell, SciPy's, n 99",
        _scipy_augmented_powell,
        powell_start,
        [vector(-math.log(1.0001 - math.exp(-0.01)), 0.01, third).repeat(33)],
    )
    yield System(
        "spectral.singular.n100", "Singular, n 100", _singular, full(100, 1), [full(100, 0)], {"i": counting(100)}
    )
    yield System("spectral.logarithmic.n100", "Logarithmic, n 100", _logarithmic, full(100, 1), [full(100, 0)])
    yield System(
        "spectral.extended_rosenbrock.n100",
        "Extended Rosenbrock, n 100",
        _extended_rosenbrock,
        vector(5, 1).repeat(50),
        [full(100, 1)],
    )
    yield System("spectral.trigexp.n100", "Trigexp, n 100", _trigexp, full(100, 0), [full(100, 1)])
    yield System(
        "spectral.strictly_convex_1.n100",
        "Strictly convex 1, n 100",
        _strictly_convex,
        counting(100) / 100,
        [full(100, 0)],
        {"slopes": full(100, 1)},
    )
    yield System(
        "spectral.strictly_convex_2.n100",
        "Strictly convex 2, n 100",
        _strictly_convex,
        full(100, 1),
        [full(100, 0)],
        {"slopes": counting(100) / 10},
    )


def family(given: bool = False) -> Iterator[Problem]:
    """All systems; ``given``: z = z - r(z)."""
    name = "scipy.given" if given else "scipy"
    yield from recast_all(nonlin_systems(), name, SOURCE, given)
    source = "SciPy 1.17, test__spectral.py; La Cruz, Martínez and Raydan, Mathematics of Computation 75, 2006"
    yield from recast_all(spectral_systems(), name, source, given)
    if not given:
        yield from fixed_points()


# test_minpack.py: problems stated as fixed points, elementwise.


def fixed_points() -> Iterator[Problem]:
    """SciPy's tests of ``fixed_point``; each entry is a sample.

    At the fixed points of 2 z and at 1 / c of c z^2, the slope is 2.
    """

    def double(xp: Any, z: Any) -> Any:
        return 2 * z

    def square(xp: Any, z: Any, c: Any) -> Any:
        return c * z**2

    def square_root(xp: Any, z: Any, c: Any) -> Any:
        return c * xp.sqrt(z)

    def lambert(xp: Any, z: Any) -> Any:
        """The fixed point is W(1) / 2."""
        return xp.exp(-2 * z) / 2

    def kinetics(xp: Any, z: Any) -> Any:
        """The fixed point is m."""
        ks, kl, m = 2, 6, 1.3
        i0 = ((m - 1) / m) * (kl / ks / m) ** (1 / (m - 1))
        return xp.log(kl / ks / z) / xp.log(i0 * z / (z - 1)) + 1

    def problem(name: str, title: str, formula: Formula, *starts: float, c: Tensor | None = None) -> Problem:
        return from_formula(
            f"scipy.fixed_point.{name}",
            f"SciPy, {title}",
            formula,
            vector(*starts)[:, None],
            family="scipy",
            source=SOURCE,
            rtol=1e-8,
            atol=1e-8,
            constants={} if c is None else {"c": c[:, None]},
            sample_axes={} if c is None else {"c": 0},
        )

    yield problem("double", "2 z", double, 1, 0.3, 0.15)
    yield problem("square", "c z²", square, 1.05, 1.1, 1.15, 0.9, c=vector(1, 0.75, 1, 1.25))
    yield problem("square_root", "c √z", square_root, 1.05, 0.8, 1.1, 1.1, c=vector(1, 0.75, 1, 1.25))
    yield problem("lambert", "exp(-2 z) / 2", lambert, 1)
    yield problem("kinetics", "chemical kinetics", kinetics, 1.001)
