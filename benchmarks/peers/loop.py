"""Loops that a user writes in plain torch, without a library: what a solver has to be compared with first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.calling import COMPILER, Calls, passes
from benchmarks.peers.contender import Claim, Contender, Counts
from benchmarks.problems.base import Problem
from benchmarks.timing import Map


@dataclass(frozen=True, kw_only=True)
class _Picard(Contender):
    """z = fn(z) until all samples pass. Each iteration tests, and so waits for the result.

    Tolerance: the problem's own test, times ``tighten``.

    If it is compiled, a whole iteration is.
    """

    library: str = "loop"

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        def iteration(fn: Map, z: Tensor) -> tuple[Tensor, Tensor]:
            image = fn(z)
            return image, passes(image - z, image, problem, tighten)

        step = iteration
        if self.compiled and counts is None:
            step = COMPILER.compile(problem, iteration, problem.fn, problem.z0)

        @torch.no_grad()
        def solve() -> Claim:
            fn = problem.fn if counts is None else Calls(problem.fn, None, counts)
            z, image = problem.z0, problem.z0
            passed = torch.zeros(len(z), dtype=torch.bool)
            for _ in range(problem.max_calls):
                z = image
                image, passed = step(fn, z)
                if passed.all():
                    break
            return Claim(z, passed)

        return solve


@dataclass(frozen=True, kw_only=True)
class _Floor(Contender):
    """A given number of evaluations, one after the other, with no test."""

    calls: int
    library: str = "loop"

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        @torch.no_grad()
        def solve() -> Claim:
            fn, z = (problem.fn if counts is None else Calls(problem.fn, None, counts)), problem.z0
            for _ in range(self.calls):
                z = fn(z)
            return Claim(z, None)

        return solve


def floor(calls: int) -> Contender:
    """A loop of ``calls`` evaluations without a stopping rule: the time that no solver with as many can beat."""
    return _Floor(key="loop.floor", title=f"{calls} evaluations", calls=calls)


CONTENDERS: tuple[Contender, ...] = (
    _Picard(key="loop.picard", title="a loop with a test"),
    _Picard(key="loop.picard.compiled", title="a loop with a test, compiled", compiled=True),
)
