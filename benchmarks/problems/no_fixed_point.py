"""Maps without a fixed point, maps that only seem to have one, and fixed points amid cycles.

A continuous map of a ball into itself has a fixed point (Brouwer). So the maps without one are unbounded, or jump.

In the family ``runaway``, ||f(z) - z|| has a lower bound above 0, which its docstrings prove. The tolerance is an
absolute one below that bound: a solver that reports convergence is wrong.

In the family ``false_friends``, there is no fixed point either, but ||f(z) - z|| / ||f(z)|| comes below the usual
relative tolerance, at values that a solver may reach. By that tolerance, ``excess`` is at most 1 there, and a report of
convergence is right by its letter. ``solvable`` is False nevertheless: a solver that reports failure is right, too.

In the family ``cycles``, there is a fixed point, but plain iteration ends in a cycle around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.base import BATCH, Formula, Problem, from_formula
from benchmarks.problems.systems import from_root

SOURCE = "pydeq's benchmarks"


def _starts(dim: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(BATCH, dim, dtype=torch.float64).uniform_(low, high, generator=generator)


def _unsolvable(
    family: str, name: str, title: str, root: Formula, z0: Tensor, gap: float, rtol: float = 0.0
) -> Problem:
    """A problem from r(z) = z - f(z), whose norm is at least ``gap``."""
    return from_root(
        f"{family}.{name}",
        title,
        root,
        z0,
        1.0,
        facts={"gap": gap},
        family=family,
        source=SOURCE,
        rtol=rtol,
        atol=1e-6 if gap else 0.0,
        solvable=False,
    )


# r(z) = z - f(z), for z of shape [B, n].


def shift_root(xp: Any, z: Any) -> Any:
    """f(z) = z + 1."""
    return -xp.ones_like(z)


def exponential_root(xp: Any, z: Any) -> Any:
    """f(z) = exp(z) >= 1 + z, so every entry of f(z) - z is at least 1."""
    return z - xp.exp(z)


def waves_root(xp: Any, z: Any) -> Any:
    """f(z) = z + 2 + sin(z): every entry of f(z) - z is in [1, 3]. ||f(z) - z|| has infinitely many local minima."""
    return -(2 + xp.sin(z))


def near_miss_root(xp: Any, z: Any) -> Any:
    """f(z) = z + z^2 + 0.01: every entry of f(z) - z is at least 0.01. Plain iteration lingers near 0."""
    return -(z**2 + 0.01)


def flip_root(xp: Any, z: Any) -> Any:
    """f(z) = (-z_1, z_2 + 1): the first entry is in a 2-cycle, the second moves by 1."""
    return xp.stack([2 * z[:, 0], -xp.ones_like(z[:, 1])], axis=1)


def screw_root(xp: Any, z: Any) -> Any:
    """A rotation of (z_1, z_2) by 1 radian and a shift of z_3 by 1."""
    a, b = z[:, 0], z[:, 1]
    c, s = math.cos(1), math.sin(1)
    return xp.stack([a - c * a + s * b, b - s * a - c * b, -xp.ones_like(a)], axis=1)


def jump_root(xp: Any, z: Any) -> Any:
    """f(z) = -1 for z > 0, else 1: a 2-cycle. f(z) - z is below -1 for z > 0, and at least 1 otherwise."""
    return z - xp.where(z > 0, -1.0, 1.0) * xp.ones_like(z)


def slowing_root(xp: Any, z: Any) -> Any:
    """f(z) = z + 1 / (1 + z^2): f(z) - z is positive and falls as z^-2, relative to z as z^-3."""
    return -1 / (1 + z**2)


def hyperbola_root(xp: Any, z: Any) -> Any:
    """f(z) = sqrt(z^2 + 1) > z. |f'| < 1 everywhere, but not uniformly; f(z) - z falls as 1 / (2 z)."""
    return -1 / (xp.sqrt(z**2 + 1) + z)


def softplus_root(xp: Any, z: Any) -> Any:
    """f(z) = log(1 + exp(z)) > z; f(z) - z = log(1 + exp(-z)) falls as exp(-z)."""
    return -(xp.log1p(xp.exp(-xp.abs(z))) + xp.where(z < 0, -z, xp.zeros_like(z)))


def runaway() -> Iterator[Problem]:
    root_dim = math.sqrt(8)
    starts = _starts(8)
    name = "runaway"
    yield _unsolvable(name, "shift", "z + 1", shift_root, starts, root_dim)
    yield _unsolvable(name, "exponential", "exp(z)", exponential_root, starts, root_dim)
    yield _unsolvable(name, "waves", "z + 2 + sin(z)", waves_root, starts, root_dim)
    yield _unsolvable(name, "near_miss", "z + z² + 0.01", near_miss_root, _starts(8, -0.9, -0.1), 0.01 * root_dim)
    yield _unsolvable(name, "flip", "(-a, b + 1)", flip_root, _starts(2), 1.0)
    yield _unsolvable(name, "screw", "rotation and shift", screw_root, _starts(3), 1.0)
    yield _unsolvable(name, "jump", "-1 for z > 0, else 1", jump_root, starts, root_dim)


def false_friends(rtol: float = 1e-5) -> Iterator[Problem]:
    name = "false_friends"
    yield _unsolvable(name, "shift", "z + 1 from 0", shift_root, _starts(8), 0.0, rtol)
    yield _unsolvable(name, "shift_far", "z + 1 from 1e7", shift_root, 1e7 + _starts(8), 0.0, rtol)
    yield _unsolvable(name, "slowing", "z + 1 / (1 + z²)", slowing_root, _starts(8, 0, 1), 0.0, rtol)
    yield _unsolvable(name, "hyperbola", "√(z² + 1)", hyperbola_root, _starts(8, 0, 1), 0.0, rtol)
    yield _unsolvable(name, "softplus", "log(1 + exp(z))", softplus_root, _starts(8, 0, 1), 0.0, rtol)


# f(z), for z of shape [B, n].


def negation(xp: Any, z: Any, x: Any) -> Any:
    """x - z: the fixed point is x / 2, and every other point is in a 2-cycle."""
    return x - z


def quarter_turns(xp: Any, z: Any, x: Any) -> Any:
    """x + R z, where R turns pairs of entries by a right angle: every other point is in a 4-cycle."""
    half = z.shape[1] // 2
    return x + xp.concatenate([-z[:, half:], z[:, :half]], axis=1)


def negated_ring(xp: Any, z: Any, x: Any) -> Any:
    """x - S z, where S moves n entries around a ring: cycles of length 2 n for odd n."""
    return x - xp.concatenate([z[:, -1:], z[:, :-1]], axis=1)


def logistic(xp: Any, z: Any, rate: Any) -> Any:
    """rate z (1 - z), by sample. The fixed point 1 - 1 / rate has slope 2 - rate; 0 is another, of slope rate.

    A 2-cycle attracts for rate 3.2, a 4-cycle for 3.5; 3.9 is chaotic (May, Nature 261, 1976).
    """
    return rate * z * (1 - z)


def cosine(xp: Any, z: Any) -> Any:
    """2.5 cos(z): the only fixed point, near 1.1105, has slope -2.24."""
    return 2.5 * xp.cos(z)


def steep(xp: Any, z: Any) -> Any:
    """tanh(-3 z): the fixed point 0 has slope -3; a 2-cycle near +-0.995 attracts all else."""
    return xp.tanh(-3 * z)


def cycles() -> Iterator[Problem]:
    def problem(name: str, title: str, formula: Formula, z0: Tensor, radius: float, **constants: Tensor) -> Problem:
        return from_formula(
            f"cycles.{name}",
            title,
            formula,
            z0,
            facts={"spectral_radius": radius},
            family="cycles",
            source=SOURCE,
            rtol=1e-8,
            atol=1e-8,
            constants=constants,
            sample_axes=dict.fromkeys(constants, 0),
        )

    x = _starts(8) + 1
    yield problem("negation", "x - z", negation, torch.zeros_like(x), 1.0, x=x)
    yield problem("quarter_turns", "x + R z", quarter_turns, torch.zeros_like(x), 1.0, x=x)
    ring = _starts(7) + 1
    yield problem("negated_ring", "x - S z", negated_ring, torch.zeros_like(ring), 1.0, x=ring)
    rates = torch.tensor([[3.2], [3.5], [3.9]], dtype=torch.float64)
    yield problem("logistic", "logistic, 3.2 to 3.9", logistic, torch.full((3, 8), 0.3).double(), 1.9, rate=rates)
    yield problem("cosine", "2.5 cos(z)", cosine, _starts(8, 0.5, 1.5), 2.24)
    yield problem("steep", "tanh(-3 z)", steep, _starts(8, 0.1, 1.0), 3.0)
