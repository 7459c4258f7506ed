"""The interface of a solver to the comparison of all libraries: one solver with its settings, of any library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.problems.base import Problem

# By the key of a contender without the name of its settings: the settings that a search tries, its defaults first.
Grids = Mapping[str, Sequence[Mapping[str, Any]]]

# The most evaluations and products of a solve, in multiples of the evaluations that the problem allows.
WITH_PRODUCTS = 10


@dataclass
class Counts:
    """Counts of one solve, on the side of the suite, over the whole batch at once.

    Args:
        evaluations: Calls of the map, or of r.
        products: Products of its Jacobian with a vector, from either side.
        batched: Whether a call evaluated several points at once.
    """

    evaluations: int = 0
    products: int = 0
    batched: bool = False


class Claim:
    """What a solver hands on.

    The time of a solve ends with what the library returns. What the suite makes of it is computed when it is read.

    Args:
        value: Its solution, of the shape of z0, or a function that returns it.
        converged: Whether it says that a sample converged, bool [B], or a function that returns it; None if it says
            nothing.
    """

    def __init__(self, value: Tensor | Callable[[], Tensor], converged: Tensor | Callable[[], Tensor] | None) -> None:
        self._value, self._converged = value, converged

    @property
    def value(self) -> Tensor:
        return self._value if isinstance(self._value, Tensor) else self._value()

    @property
    def converged(self) -> Tensor | None:
        said = self._converged
        return said if said is None or isinstance(said, Tensor) else said()


@dataclass(frozen=True)
class Contender(ABC):
    """A solver of a library, with its settings.

    A module of ``benchmarks.peers`` lists its contenders in ``CONTENDERS``, and in ``GRIDS`` the settings from which
    ``python -m benchmarks.peers.search`` chooses the best.

    Args:
        key: Unique and dotted: the library, its solver and, if there are several, the name of the settings. Settings
            that the library has itself are named ``default``, the best ones of a search ``best``.
        library: Its name.
        title: For readers.
        language: Of the maps that it can call.
        settings: Options other than the library's own defaults.
        compiled: Give it the map compiled by ``torch.compile``, when the solve is prepared, for solvers in torch.
        differences: Whether it calls the map for its Jacobians, too, as for differences.
    """

    key: str
    library: str
    title: str
    language: Literal["torch", "numpy", "jax"] = "torch"
    settings: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False
    differences: bool = False

    def refusal(self, problem: Problem) -> str | None:
        """Why it cannot be given this problem; None if it can."""
        if self.language != "torch" and problem.z0.device.type != "cpu":
            return "it is compared on the CPU only"
        if self.language == "jax" and problem.formula is None:
            return "the map is a torch module"
        if self.language == "numpy" and problem.z0.dtype == torch.bfloat16:
            return "NumPy has no bfloat16"
        return None

    def most_calls(self, problem: Problem) -> int:
        """The most calls of the map in a solve: more where those for a Jacobian cannot be told from evaluations."""
        return problem.max_calls * (WITH_PRODUCTS if self.differences else 1)

    def is_twin_of(self, compiled: Contender) -> bool:
        """Whether it is the same solver with the same settings, on the map that is not compiled."""
        return not self.compiled and replace(compiled, key=self.key, title=self.title, compiled=False) == self

    def session(self, problem: Problem) -> AbstractContextManager[Any]:
        """Context in which solves are timed: what a user of the library sets once, such as JAX's precision."""
        return nullcontext()

    @abstractmethod
    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        """Make a function that solves the problem once per call.

        All that is done once is done here: conversion of arrays, and what the library keeps between solves. The first
        call may compile.

        Args:
            tighten: At most 1. The library's own tolerance is the one that means the same as the problem's, times this.
                The suite tries 1, 0.1, 0.01 and so on, until what the solver hands on solves the problem.
            counts: If given, each solve adds to it. Without it, nothing is counted, for timings.
        """
