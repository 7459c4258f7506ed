"""What contenders need to call a problem's map: counted calls, an equation for root finders, and tolerances."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydeq
from benchmarks.peers.contender import Claim, Counts
from benchmarks.problems.base import Problem
from benchmarks.timing import Map
from pydeq.cell.linearization import unwrapped

# Bytes that a solver may fill before its first step.
_HISTORY = 2**32


class ExhaustedError(Exception):
    """Raised instead of an evaluation beyond ``max_calls``."""


class Calls:
    """A map that counts its calls and refuses those beyond a limit. Each solve makes one.

    Args:
        fn: The map.
        limit: Calls that are allowed, for libraries that only limit iterations of several calls; None for no limit.
        counts: If given, each call adds to its evaluations.
    """

    def __init__(self, fn: Map, limit: int | None, counts: Counts | None) -> None:
        self.fn, self.limit, self.counts = fn, limit, counts
        self.calls, self.last = 0, torch.empty(0)

    def __call__(self, z: Tensor) -> Tensor:
        if self.limit is not None and self.calls >= self.limit:
            raise ExhaustedError
        self.last = z
        image = self.fn(z)
        # Under torch.vmap, a call evaluates several points. Counted afterwards: a call that vmap refuses is none.
        points = unwrapped(z).numel() // max(1, z.numel())
        self.calls += points
        if self.counts is not None:
            self.counts.evaluations += points
            self.counts.batched |= points > 1
        return image


class Compiler:
    """``torch.compile`` for one problem after the other.

    It compiles the same code only for a few problems, so a new problem resets it. It is not reset earlier: the compiled
    solvers of a problem are timed alternately.
    """

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._map: Map | None = None

    def compile(self, problem: Problem, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """Compile a function that calls the map of a problem, by a call with these arguments."""
        if problem is not self._problem:
            torch.compiler.reset()
            self._problem, self._map = problem, None
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            compiled = torch.compile(function)
            compiled(*arguments)
        return compiled

    def map(self, problem: Problem) -> Map:
        """Compile the map of a problem, once."""
        if problem is not self._problem or self._map is None:
            self._map = self.compile(problem, lambda z: problem.fn(z), problem.z0)
        return self._map


COMPILER = Compiler()


def map_of(problem: Problem, compiled: bool, counts: Counts | None) -> Map:
    """The map for a solver in torch: counted if ``counts`` are given, otherwise compiled if asked.

    A counted map is not compiled: its evaluations are the same up to rounding.
    """
    if counts is not None:
        return Calls(problem.fn, None, counts)
    return COMPILER.map(problem) if compiled else problem.fn


def change(problem: Problem) -> Map:
    """fn(z) - z for solvers of equations that start as if its Jacobian were minus the identity.

    Of z - B r(z) with a number B it is computed as -B r(z). So all solvers that depend on scale and sign are given the
    same.
    """
    root, fn, constants, step = problem.root, problem.fn, problem.constants, problem.step
    if root is None or step is None:
        return lambda z: fn(z) - z
    return lambda z: -step * root(torch, z, **constants)


def allowed(problem: Problem) -> Tensor:
    """The residual ||fn(z) - z|| that solves each sample, in float64 [B]: for libraries with absolute tolerances.

    The relative tolerance is multiplied by the norm of a solution, from a rough solve by pydeq's Broyden, or by its
    NewtonKrylov. Where both fail, it is multiplied by the norm of the first image.
    """
    norm = _norms(problem.fn(problem.z0))
    if problem.rtol > 0.0:
        found = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
        for solver in (pydeq.Broyden(), pydeq.NewtonKrylov()):
            solution = pydeq.fixed_point(problem.fn, problem.z0, solver=solver, rtol=1e-3, max_steps=problem.max_calls)
            assert isinstance(solution.image, Tensor)
            norm = torch.where(solution.converged & ~found, _norms(solution.image), norm)
            found |= solution.converged
            if found.all():
                break
    return (problem.rtol * norm).clamp(min=problem.atol)


def allowed_of_equation(problem: Problem) -> Tensor:
    """The norm of r(z) that solves each sample, or of z - fn(z) where the problem was not stated so; float64 [B].

    As fn(z) = z - B r(z), a residual of r is in other units. The ratio of both at z0 converts them; it is exact if B is
    a number.
    """
    tolerance = allowed(problem)
    if problem.root is not None:
        residual = _norms(problem.fn(problem.z0) - problem.z0)
        root = _norms(problem.root(torch, problem.z0, **problem.constants))
        ratio = root / residual
        tolerance = tolerance * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    return tolerance


def passes(residual: Tensor, image: Tensor, problem: Problem, tighten: float) -> Tensor:
    """Whether each sample meets the problem's own test, bool [B]."""
    norm, distance = image.flatten(1).norm(dim=1), residual.flatten(1).norm(dim=1)
    # Once both overflow, Inf is not more than Inf.
    return distance.isfinite() & (distance <= tighten * (problem.rtol * norm).clamp(min=problem.atol))


def uniform(value: Any, converged: Any, problem: Problem) -> Claim:
    """What a solver hands on that says the same of all samples.

    Args:
        value: A tensor or an array of the size of z0.
        converged: What it says: True or False, or an array or a tensor with one of them.
    """
    return Claim(
        lambda: torch.as_tensor(value, dtype=problem.z0.dtype).detach().reshape(problem.z0.shape),
        lambda: torch.full((len(problem.z0),), bool(converged)),
    )


def refusal_of_history(problem: Problem) -> str | None:
    """Why Broyden's method cannot fill two vectors for each evaluation before the first one; None if it can."""
    size = 2 * problem.max_calls * problem.z0.numel() * problem.z0.element_size()
    return f"it fills {size / 2**30:.1f} GiB before the first step" if size > _HISTORY else None


def _norms(state: Tensor) -> Tensor:
    return state.detach().flatten(1).double().norm(dim=1)
