"""The 23 systems of NonlinearSolve.jl's study of robustness.

They are those of Burkardt's test_nonlin, of which the first 14 are Moré, Garbow and Hillstrom's. Sizes and starts are
those of the study. In four places, its library (NonlinearProblemLibrary.jl) differs from its sources, which are
followed here:

- 6, Watson: the sums over polynomial coefficients are shifted by one index, and z_2 - z_2^2 - 1 (test_nonlin has that,
  too, but not its Jacobian) is in the place of z_2 - z_1^2 - 1.
- 7, Chebyquad: the start (2 i - n) / (n + 1) is in the place of (2 i - 1 - n) / (n + 1), evenly spaced in (-1, 1).
- 10, the integral equation: the term j = k is summed twice.
- 23, Chandrasekhar: the nodes i / n are in the place of (i - 1/2) / n, those of the midpoint rule.

Sources: Pal et al., NonlinearSolve.jl, arXiv 2403.16341, section 4.1; Burkardt, test_nonlin,
https://people.sc.fsu.edu/~jburkardt/f_src/test_nonlin/test_nonlin.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.problems import more
from benchmarks.problems.base import Problem
from benchmarks.problems.systems import System, counting, recast_all, vector

SOURCE = "Burkardt, test_nonlin; Pal et al., NonlinearSolve.jl, arXiv 2403.16341"


def _symmetric_chebyquad() -> System:
    """Chebyquad on [-1, 1] in place of [0, 1]: z = 2 x - 1."""
    original = more.chebyquad(2)

    def root(xp: Any, z: Any, **constants: Any) -> Any:
        return original.root(xp, (z + 1) / 2, **constants)

    solutions = [2 * solution - 1 for solution in original.solutions]
    return replace(original, root=root, start=2 * original.start - 1, solutions=solutions)


def _matrix_square_root(xp: Any, z: Any, square: Any) -> Any:
    n = square.shape[0]
    matrix = z.reshape(z.shape[0], n, n)
    return (xp.matmul(matrix, matrix) - square).reshape(z.shape[0], n * n)


def matrix_square_root(n: int) -> System:
    """Z^2 = A from Z = I, where A has a Jordan block [[1e-4, 1], [0, 1e-4]] and 1e-4 on the rest of the diagonal."""
    square, root = 1e-4 * torch.eye(n, dtype=torch.float64), 1e-2 * torch.eye(n, dtype=torch.float64)
    square[0, 1], root[0, 1] = 1, 50
    return System(
        f"matrix_square_root.n{n}",
        f"Hammarling {n} by {n} matrix square root",
        _matrix_square_root,
        torch.eye(n, dtype=torch.float64).flatten(),
        [root.flatten()],
        {"square": square},
    )


def _dennis_schnabel(xp: Any, z: Any) -> Any:
    a, b = z[:, 0], z[:, 1]
    return xp.stack([a + b - 3, a**2 + b**2 - 9], axis=1)


def _sample_18(xp: Any, z: Any) -> Any:
    a, b = z[:, 0], z[:, 1]

    def quotient(x: Any) -> Any:
        """(1 - exp(-x^2)) / x, and x at 0: the same value and derivative."""
        return xp.where(x == 0, x, -xp.expm1(-(x**2)) / xp.where(x == 0, 1.0, x))

    return xp.stack([b**2 * quotient(a), a * quotient(b)], axis=1)


def _sample_19(xp: Any, z: Any) -> Any:
    return z * xp.sum(z**2, axis=1, keepdims=True)


def _scalar(xp: Any, z: Any) -> Any:
    return z * (z - 5) ** 2


def _freudenstein_roth(xp: Any, z: Any) -> Any:
    a, b = z[:, 0], z[:, 1]
    return xp.stack([a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29], axis=1)


def _boggs(xp: Any, z: Any) -> Any:
    a, b = z[:, 0], z[:, 1]
    return xp.stack([a**2 - b + 1, a - xp.cos(math.pi / 2 * b)], axis=1)


def _chandrasekhar(xp: Any, z: Any, kernel: Any) -> Any:
    return z - 1 / (1 - xp.matmul(z, kernel))


def chandrasekhar(n: int = 10, c: float = 0.9) -> System:
    """The H-equation of radiative transfer by the midpoint rule: 1 / H(x) = 1 - c/2 integral_0^1 x H(y) / (x + y) dy.

    r = 0 is z = F(z) for F(z) = 1 / (1 - K z), so z - r(z) is the usual iteration.

    Source: Kelley, Solution of the Chandrasekhar H-equation by Newton's method, Journal of Mathematical Physics 21,
    1980.
    """
    nodes = (counting(n) - 0.5) / n
    kernel = c / (2 * n) * nodes / (nodes + nodes[:, None])
    return System(
        f"chandrasekhar.n{n}",
        f"Chandrasekhar, n {n}, c {c:g}",
        _chandrasekhar,
        torch.ones(n, dtype=torch.float64),
        constants={"kernel": kernel},
    )


def systems() -> Iterator[System]:
    yield more.rosenbrock(10)
    yield more.powell_singular()
    yield more.powell_badly_scaled()
    yield more.wood()
    yield more.helical_valley()
    yield more.watson(2)
    yield _symmetric_chebyquad()
    yield more.brown(10)
    yield more.boundary_value()
    yield more.integral_equation()
    yield more.trigonometric()
    yield more.variably_dimensioned()
    yield more.broyden_tridiagonal()
    yield more.broyden_banded()
    yield matrix_square_root(2)
    yield matrix_square_root(3)
    yield System(
        "dennis_schnabel", "Dennis and Schnabel 2 by 2", _dennis_schnabel, vector(1, 5), [vector(0, 3), vector(3, 0)]
    )
    # 18 and 19: singular Jacobians at the roots; those of 18 fill both axes.
    yield System("sample_18", "Sample problem 18", _sample_18, vector(2, 2), [vector(0, 0)])
    yield System("sample_19", "Sample problem 19", _sample_19, vector(3, 3), [vector(0, 0)])
    yield System("scalar", "z (z - 5)^2", _scalar, vector(1), [vector(5), vector(0)])
    yield System("freudenstein_roth", "Freudenstein-Roth", _freudenstein_roth, vector(0.5, -2), [vector(5, 4)])
    half = math.sqrt(0.5)
    yield System("boggs", "Boggs", _boggs, vector(1, 0), [vector(0, 1), vector(-1, 2), vector(-half, 1.5)])
    yield chandrasekhar()


def family(given: bool = False) -> Iterator[Problem]:
    """All 23 from their standard starts; ``given``: z = z - r(z)."""
    return recast_all(systems(), "burkardt.given" if given else "burkardt", SOURCE, given)
