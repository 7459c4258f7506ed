"""Judge one solver on one problem: by its value, evaluated in float64, and by calls that the suite counts."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contender import WITH_PRODUCTS, Claim, Contender, Counts
from benchmarks.problems.base import Problem
from benchmarks.results import Status
from benchmarks.timing import Spread, collected, spread

# Factors on a solver's own tolerance. Libraries use other norms and other denominators than the problem, or hand on
# another iterate than they tested, so each may try again with a smaller tolerance.
TIGHTENINGS = (1.0, 0.1, 0.01, 1e-3)
# A claim is false if the value misses the tolerance by more than a factor that other norms can explain.
FALSE_CLAIM = 10.0
# A library whose cap counts something else than calls may make more of them than the problem allows.
EXTRA_CALLS = 1.5
# A solve that takes less time than SHORT is repeated within its turn until LASTS has passed; seconds. For a longer one,
# it hardly matters what is in the caches.
SHORT, LASTS = 10e-3, 2e-3


class GivenUpError(Exception):
    """The map was called too often, or for too long."""


@dataclass(frozen=True)
class Verdict:
    """How a solver did on a problem.

    Args:
        status: See :class:`benchmarks.results.Entry`.
        tighten: The factor on its own tolerance that was needed.
        counts: Of the solve with this factor.
        excess: Its largest residual over the allowed one, measured in float64.
        seconds: Of the counted solve: not a measurement, but a hint how long a measurement takes.
        reason: Why it crashed or refused, in a line.
        false_claim: Whether at its own tolerance, tighten 1, it says that a sample converged that is far from it.
    """

    status: Status
    tighten: float = 1.0
    counts: Counts = dataclasses.field(default_factory=Counts)
    excess: float = math.inf
    seconds: float = 0.0
    reason: str = ""
    false_claim: bool = False


def judge(contender: Contender, problem: Problem, seconds: float = 20.0) -> Verdict:
    """Let a solver try a problem. If its value misses the tolerance, it tries smaller ones.

    It does not if it says that it has not converged, or says nothing and has used all its calls.

    Args:
        seconds: Wall-clock after which a try is given up; only maps in torch can be stopped.
    """
    refusal = contender.refusal(problem)
    if refusal is not None:
        return Verdict("refused", reason=refusal)
    false_claim = False
    verdict = Verdict("unsolved")
    for tighten in TIGHTENINGS:
        counts, begin = Counts(), time.perf_counter()
        guard = _Guard(problem, contender.most_calls(problem), seconds)
        guarded = problem if contender.language == "jax" else guard.problem  # JAX traces maps, and does not call them
        try:
            # A solve gets all its calls and its time, whatever was evaluated to prepare it, such as its tolerance.
            solve = contender.prepare(guarded, tighten, counts)
            guard.reset()
            begin = time.perf_counter()
            claim = solve()
            took = time.perf_counter() - begin
            guard.judge(counts)
            excess, claimed, wrong = _compare(problem, claim)
        except GivenUpError as error:
            return Verdict("unsolved", tighten, counts, math.inf, time.perf_counter() - begin, str(error), false_claim)
        except Exception as error:  # whatever a library raises is its result
            reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            return Verdict("crashed", tighten, counts, math.inf, time.perf_counter() - begin, reason, false_claim)
        if tighten == 1.0:
            false_claim = wrong
        status: Status
        if not problem.solvable:
            status = "lied" if wrong else "silent" if claimed is None else "fooled" if claimed else "said so"
            return Verdict(status, tighten, counts, excess, took, "", false_claim)
        status = "solved" if excess <= 1.0 else "lied" if wrong else "unsolved"
        verdict = Verdict(status, tighten, counts, excess, took, "", false_claim)
        exhausted = claimed is None and counts.evaluations >= problem.max_calls
        if status == "solved" or claimed is False or exhausted:
            break
    return verdict


@dataclass(frozen=True)
class Clocked:
    """The times of a solver, in seconds.

    Args:
        solve: Of a solve. A short one is repeated within a turn, after a first one; their median counts once.
        first: Of the first call, which may compile, with the compilation of its map if that is done before; None if
            there was none.
        after_others: Of the first solve in a turn: a median. The caches are full of the work of other libraries.
    """

    solve: Spread
    first: float | None
    after_others: float


def clock(sides: Sequence[tuple[Contender, Problem, float]], repeats: int, seconds: float) -> list[Clocked | None]:
    """Time solves in turns, on one problem or several. Solvers of one library do not follow each other, if possible.

    Args:
        sides: Solver, problem and the factor on its tolerance.
        repeats: Measurements of each side ...
        seconds: ... or as many as it can do in this time. A solve that takes longer is measured once, after a warm-up.

    Returns:
        The times of each side; None if a solve raised, or if it is compiled and its value misses the tolerance: it was
        judged without the compiler.
    """
    turns: list[tuple[int, Callable[[], Claim], int, bool]] = []
    first: dict[int, float] = {}
    measured: dict[int, list[tuple[float, float]]] = {}
    with collected():
        for index, (contender, problem, tighten) in enumerate(sides):
            try:
                with contender.session(problem):
                    begin = time.perf_counter()
                    solve = contender.prepare(problem, tighten)
                    prepared = time.perf_counter() - begin
                    first[index] = _seconds(solve, problem) + (prepared if contender.compiled else 0.0)
                    again = _seconds(solve, problem)
                if contender.compiled and problem.solvable and _compare(problem, solve())[0] > 1.0:
                    continue
            except Exception:  # it did not raise when it was judged
                continue
            measured[index] = [(again, again)] if again > seconds else []
            turns.append((index, solve, min(repeats, int(seconds / max(again, 1e-9))), again < SHORT))
        turns = _apart(turns, [sides[index][0].library for index, *_ in turns])
        for turn in range(repeats):
            for index, solve, count, short in turns if turn % 2 == 0 else reversed(turns):
                if turn < count:
                    contender, problem, _ = sides[index]
                    with contender.session(problem):
                        measured[index].append(_turn(solve, problem, short))
    clocked: list[Clocked | None] = [None] * len(sides)
    for index, times in measured.items():
        if times:
            solves, firsts = zip(*times, strict=True)
            clocked[index] = Clocked(spread(solves), first[index], statistics.median(firsts))
    return clocked


def _apart(items: Sequence[Any], groups: Sequence[str]) -> list[Any]:
    """The items in an order in which those of each group are spread evenly."""
    count, place = Counter(groups), Counter[str]()
    spots = []
    for item, group in zip(items, groups, strict=True):
        place[group] += 1
        spots.append(((place[group] - 0.5) / count[group], item))
    return [item for _, item in sorted(spots, key=lambda spot: spot[0])]


def _turn(solve: Callable[[], Claim], problem: Problem, short: bool) -> tuple[float, float]:
    """Seconds of a solve, and of the first one in this turn."""
    first = _seconds(solve, problem)
    if not short:
        return first, first
    again: list[float] = []
    while sum(again) < LASTS:
        again.append(_seconds(solve, problem))
    return statistics.median(again), first


def _seconds(solve: Callable[[], Claim], problem: Problem) -> float:
    start = time.perf_counter()
    solve()
    if problem.z0.is_cuda:
        torch.cuda.synchronize(problem.z0.device)
    return time.perf_counter() - start


def _compare(problem: Problem, claim: Claim) -> tuple[float, bool | None, bool]:
    """The largest excess; whether all samples are said to have converged; whether one of these claims is false."""
    if claim.value.shape != problem.z0.shape:
        raise ValueError(f"a value of shape {tuple(claim.value.shape)} for z0 of {tuple(problem.z0.shape)}")
    with torch.no_grad():
        excess = problem.excess(claim.value).nan_to_num(math.inf, math.inf)
    if problem.coupled:
        excess = excess.max().expand_as(excess)
    worst = excess.max().item() if excess.numel() else 0.0
    if claim.converged is None:
        return worst, None, False
    converged = claim.converged.cpu().reshape(-1).expand(len(excess))
    return worst, bool(converged.all()), bool((converged & (excess > FALSE_CLAIM)).any())


class _Guard:
    """Stops the maps of a problem after too many calls, or too long a time.

    Args:
        calls: The most calls of the map.

    Attributes:
        problem: The problem with maps that raise then.
    """

    def __init__(self, problem: Problem, calls: int, seconds: float) -> None:
        self.seconds = seconds
        self.allowed = EXTRA_CALLS * calls + 10
        self.with_products = EXTRA_CALLS * WITH_PRODUCTS * problem.max_calls + 10
        self.reset()

        def fn(z: Tensor) -> Tensor:
            self._check()
            return problem.fn(z)

        def root(xp: Any, z: Any, **constants: Any) -> Any:
            self._check()
            assert problem.root is not None
            return problem.root(xp, z, **constants)

        self.problem = dataclasses.replace(problem, fn=fn, root=root if problem.root is not None else None)

    def reset(self) -> None:
        """Start to count calls and time."""
        self.calls, self.deadline = 0, time.perf_counter() + self.seconds

    def judge(self, counts: Counts) -> None:
        """Raise if a solve made too many evaluations or products: JAX's maps cannot be stopped, nor can products."""
        if counts.evaluations > self.allowed:
            raise GivenUpError(f"more than {self.allowed:.0f} evaluations")
        if counts.evaluations + counts.products > self.with_products:
            raise GivenUpError(f"more than {self.with_products:.0f} evaluations and products")

    def _check(self) -> None:
        self.calls += 1
        if self.calls > self.allowed:
            raise GivenUpError(f"more than {self.allowed:.0f} calls")
        if time.perf_counter() > self.deadline:
            raise GivenUpError(f"more than {self.seconds:g} s")
