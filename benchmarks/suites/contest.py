"""The contest: every solver of every library on every problem. Failures first, then evaluations and time.

A problem's row holds what each solver did: see benchmarks/contest/judge.py for how it is judged, and docs/benchmarks.md
for what makes the comparison fair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.allocations import peak_bytes
from benchmarks.contest import standings
from benchmarks.contest.judge import Clocked, Verdict, clock, judge
from benchmarks.peers import REQUIREMENTS, contenders, loop
from benchmarks.peers.contender import Contender
from benchmarks.problems.base import Problem
from benchmarks.problems.collection import problems
from benchmarks.results import IN_TIME, Entry, number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Recorded, collected, one_core, spread, threads
from pydeq.solvers import buffers

JAX = ("jaxopt", "optimistix")
SHOWN, SHOWN_CALLS = ("cell", "adjoint"), 60  # families with a plot of the residual, and calls in it
LARGE = 1000  # entries of a batch from which the memory of a solve is measured: below, it is mostly not that of states
PROFILED_CALLS = 200  # a profiler keeps every allocation of a solve
# Seconds of a counted solve, and its multiple of the fastest one, beyond which a solver is not timed again: its time is
# then that of the counted solve.
LATE, LATE_FACTOR = 5.0, 10.0
FLOOR_CALLS = 20  # of a loop without a solver, whose time per call is the floor
# What compiles -> the part of a contender's key, or its library, that says so.
COMPILED = {
    "map, by torch.compile": "compiled",
    "solve, by pydeq.CompiledSolve": "whole",
    "solve, by jaxopt": "jaxopt",
    "solve, by optimistix": "optimistix",
}


def run(context: Context) -> None:
    """Run the contest."""
    with one_core():  # before JAX starts its threads
        solvers, notices = contenders([name for name in REQUIREMENTS if context.asks_library(name)])
        context.results.notices.extend(notices)
        device = torch.device(context.device)
        chosen = [each.to(device) for each in problems(context.problems_asked or context.profile.contest_problems)]
        context.bar.start(len(chosen))
        for problem in chosen:
            context.bar.show(problem.key)
            rows = context.kept(f"contest.{problem.key}", lambda p=problem: _rows(context, p, solvers))
            if {row["contender"] for row in rows} != {solver.key for solver in solvers}:
                raise ValueError(f"{problem.key} was solved by other solvers in the run that it was taken from")
            context.results.entries.extend(Entry(**row) for row in rows)
            context.bar.advance()
        with collected():
            _precision(context, chosen, solvers)
    _tables(context)
    _targets(context)


def _rows(context: Context, problem: Problem, solvers: Sequence[Contender]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(entry) for entry in compete(context, problem, solvers)]


def compete(context: Context, problem: Problem, solvers: Sequence[Contender]) -> list[Entry]:
    """Judge every solver on a problem, then time those that solved it, and a loop without a solver, alternately."""
    profile = context.profile
    with threads(1):
        verdicts = _verdicts(problem, solvers, profile.contest_seconds)
        solved = [solver for solver in solvers if verdicts[solver.key].status == "solved"]
        least = min((verdicts[solver.key].seconds for solver in solved), default=0.0)
        # A counted solve does not take the compiled map.
        limit = max(LATE, LATE_FACTOR * least)
        late = {solver.key for solver in solved if not solver.compiled and verdicts[solver.key].seconds > limit}
        timed = [solver for solver in solved if solver.key not in late]
        sides = [(solver, problem, verdicts[solver.key].tighten) for solver in timed]
        if timed:
            sides.append((loop.floor(FLOOR_CALLS), problem, 1.0))
        clocked = clock(sides, profile.contest_repeats, profile.contest_seconds / 10)
        ran = [side[0] for side, found in zip(sides, clocked, strict=True) if found is not None]
        peaks = {solver.key: _peak(solver, problem, verdicts[solver.key]) for solver in timed if solver in ran}
    measured = {side[0].key: found for side, found in zip(sides, clocked, strict=True) if found is not None}
    for key in late:
        seconds = verdicts[key].seconds
        measured[key] = Clocked(spread([seconds]), None, seconds)
    floor = measured.get(sides[-1][0].key) if sides else None
    call = floor.solve.median / FLOOR_CALLS if floor else None
    entries = [_entry(solver, problem, verdicts[solver.key], measured.get(solver.key), call) for solver in solvers]
    return [dataclasses.replace(entry, peak_bytes=peaks.get(entry.contender)) for entry in entries]


def _verdicts(problem: Problem, solvers: Sequence[Contender], seconds: float) -> dict[str, Verdict]:
    """Each solver's verdict by its key. Counted maps are not compiled: on a compiled map, it is that of the twin."""
    verdicts: dict[str, Verdict] = {}
    for solver in sorted(solvers, key=lambda each: each.compiled):
        twin = next((each.key for each in solvers if solver.compiled and each.is_twin_of(solver)), None)
        verdicts[solver.key] = judge(solver, problem, seconds) if twin is None else verdicts[twin]
    return verdicts


def _peak(solver: Contender, problem: Problem, verdict: Verdict) -> int | None:
    """The most bytes of the CPU that a solve holds at once; None if the state is small or elsewhere."""
    counts = verdict.counts
    calls = counts.evaluations + counts.products
    small = problem.z0.numel() < LARGE or problem.z0.device.type != "cpu"
    if solver.language != "torch" or small or calls > PROFILED_CALLS:
        return None
    solve = solver.prepare(problem, verdict.tighten)
    return peak_bytes(solve, getattr(solve, "forget", buffers.clear))


def _entry(
    solver: Contender,
    problem: Problem,
    verdict: Verdict,
    measured: Clocked | None,
    call: float | None,
) -> Entry:
    """What a solver did; ``call`` is the time of a call of the map in torch, in a loop without a solver."""
    counts = verdict.counts
    untimed = verdict.status == "solved" and measured is None
    counted = counts.evaluations + counts.products > 0
    seconds = measured and measured.solve
    overhead = None
    calls_the_map = solver.language != "jax" and not solver.compiled and not counts.products and not counts.batched
    if seconds is not None and call is not None and counts.evaluations and calls_the_map:
        overhead = seconds.median / counts.evaluations - call
    return Entry(
        problem=problem.key,
        family=problem.family,
        contender=solver.key,
        library=solver.library,
        status="unsolved" if untimed and solver.compiled else verdict.status,
        evaluations=counts.evaluations if counted else None,
        products=counts.products if counted else None,
        seconds=seconds and seconds.median,
        seconds_low=seconds and seconds.low,
        seconds_high=seconds and seconds.high,
        samples=seconds and seconds.samples,
        tighten=verdict.tighten,
        after_others_seconds=measured and measured.after_others,
        first_seconds=measured and measured.first,
        overhead_seconds=overhead,
        solvable=problem.solvable,
        false_claim=verdict.false_claim,
        title=_title(solver),
        problem_title=problem.title,
        note="it raised, or missed the tolerance, when it was timed" if untimed else verdict.reason,
    )


def _precision(context: Context, chosen: Sequence[Problem], solvers: Sequence[Contender]) -> None:
    """The smallest residual so far against calls of the map and against time, for the plot, on one problem of each
    family; recorded by the map, so for torch's maps."""
    first = {problem.family: problem for problem in reversed(chosen)}
    for problem in (first[family] for family in SHOWN if family in first):
        for solver in solvers:
            # A compiled map has the curve of the map itself.
            if solver.language == "jax" or solver.compiled or solver.refusal(problem) is not None:
                continue
            fn = Recorded(problem.fn)
            with threads(1):
                try:  # how a solve ends is in the tables
                    solve = solver.prepare(dataclasses.replace(problem, fn=fn, root=None, max_calls=SHOWN_CALLS))
                except Exception:
                    continue
                for _ in range(2):  # the first one is a warm-up
                    fn.start()
                    with contextlib.suppress(Exception):
                        solve()
            kept = [index for index, residual in enumerate(fn.residuals) if len(residual) == len(problem.z0)]
            best = tuple(itertools.accumulate((fn.residuals[index].max().item() for index in kept), min))
            series = solver.library, f"{solver.library} {_title(solver)}"
            calls = tuple(float(call) for call in range(1, len(kept) + 1))
            context.results.curve("precision", problem.title, *series, calls, best)
            seconds = tuple(fn.seconds[index] for index in kept)
            context.results.curve("precision", problem.title + IN_TIME, *series, seconds, best)


def _tables(context: Context) -> None:
    entries = context.results.entries
    grouped = standings.by_problem(entries)
    with_solution = [rows for rows in grouped.values() if standings.solvable(rows)]
    _robustness(context, [entry for rows in with_solution for entry in rows])
    _compiling(context, with_solution)
    _without_solution(context, [entry for rows in grouped.values() if not standings.solvable(rows) for entry in rows])
    flat = [entry for rows in with_solution for entry in rows]
    for libraries, name in ((_torch_and_scipy(entries), "a PyTorch or SciPy peer"), (JAX, "a JAX peer, jitted,")):
        _beaten(context, flat, libraries, name)


def _robustness(context: Context, entries: Sequence[Entry]) -> None:
    """A row for each solver: what became of its solves, and its evaluations and time on what it solved."""
    grouped = standings.by_problem(entries)
    rows = []
    for key in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == key]
        count = Counter(entry.status for entry in own)
        tried = len(own) - count["refused"]
        work, clocks, overheads = [], [], []
        for entry in own:
            if entry.status == "solved":
                rivals = grouped[entry.problem]
                work.append(standings.work_of(entry) / min(map(standings.work_of, rivals)))
                if entry.seconds is not None:
                    clocks.append(entry.seconds / min(map(standings.time_of, rivals)))
                if entry.overhead_seconds is not None:
                    overheads.append(1e6 * entry.overhead_seconds)
        rows.append(
            (
                own[0].library,
                own[0].title,
                f"{count['solved']} of {tried}",
                str(count["unsolved"]),
                str(sum(entry.false_claim for entry in own)),
                str(count["crashed"]),
                str(count["refused"]),
                times(_middle(work)),
                times(_middle(clocks)),
                number(_middle(overheads)),
            )
        )
    context.results.table(
        "contest",
        f"Every solver on {len(grouped)} problems with a solution",
        (
            "library",
            "solver",
            "solved",
            "not solved",
            "claimed in error",
            "crashed",
            "not given",
            "work over the least",
            "time over the least",
            "overhead per call, µs",
        ),
        rows,
        "Solved: the value that the solver hands on meets the problem's tolerance in float64. Claimed in error: with"
        " its own tolerance, it says that a sample converged that is more than ten times the tolerance away. Work:"
        " evaluations and products with the Jacobian, time: of a solve without compilation; medians over the problems"
        " that it solved, in multiples of the best solver's there. Overhead: the time of a solve per call of the map,"
        " minus that of a call in a loop without a solver; for solvers that use no products, on maps in torch that are"
        " not compiled.",
    )


def _compiling(context: Context, problems: Sequence[Sequence[Entry]]) -> None:
    """A row for each way to compile: the time of a problem's first call, which compiles."""
    rows = []
    for what, part in COMPILED.items():
        firsts = [
            max(found)
            for entries in problems
            if (found := [e.first_seconds for e in entries if part in e.contender.split(".") and e.first_seconds])
        ]
        if firsts:
            found = spread(firsts)
            rows.append((what, str(len(firsts)), number(found.median), f"{number(found.low)} to {number(found.high)}"))
    if rows:
        context.results.table(
            "contest",
            "Compiling, which is not in the times of solves",
            ("what compiles", "problems", "first call, s", "quartiles"),
            rows,
            "The slowest first call of each problem; medians over the problems. The solvers of a problem share one"
            " compiled map, or one pydeq.CompiledSolve. JAX compiles each solver on its own.",
        )


def _without_solution(context: Context, entries: Sequence[Entry]) -> None:
    """A row for each solver on the maps without a fixed point."""
    if not entries:
        return
    rows = []
    for key in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == key and entry.status != "refused"]
        if own:
            count = Counter(entry.status for entry in own)
            states = ("said so", "silent", "fooled", "lied", "crashed", "unsolved")
            rows.append((own[0].library, own[0].title, *(str(count[state]) for state in states)))
    context.results.table(
        "contest",
        f"{len(standings.by_problem(entries))} maps without a fixed point: who says so",
        ("library", "solver", "says so", "says nothing", "test met anyway", "claims one", "crashed", "given up"),
        rows,
        "Test met anyway: the relative residual meets the tolerance far out, where no fixed point is. Given up: it"
        " called the map far more often than allowed.",
    )


def _beaten(context: Context, entries: Sequence[Entry], libraries: Sequence[str], name: str) -> None:
    """A row for each problem where one of these libraries is faster."""
    rows = []
    for problem, winner, factor in standings.beaten(entries, BASELINE, libraries):
        mine = min((row for row in problem if row.library == BASELINE), key=standings.time_of)
        solved = not math.isinf(standings.time_of(mine))
        rows.append(
            (
                problem[0].family,
                problem[0].problem_title or problem[0].problem,
                mine.title if solved else "-",
                number(mine.seconds * 1e3) if solved and mine.seconds else "-",
                number(mine.evaluations) if solved else "-",
                winner.title,
                number((winner.seconds or math.nan) * 1e3),
                number(winner.evaluations),
                times(factor) if solved else "not solved",
            )
        )
    if rows:
        context.results.table(
            "contest",
            f"Where {name} is faster than {BASELINE}",
            ("family", "problem", BASELINE, "ms", "calls", "fastest", "ms", "calls", "factor"),
            rows,
            f"Each library with the fastest of its solvers on the problem; closer than {standings.TIE} is a tie.",
        )


def _targets(context: Context) -> None:
    entries = [
        entry
        for rows in standings.by_problem(context.results.entries).values()
        if standings.solvable(rows)
        for entry in rows
    ]
    others = _others(entries)
    jax = tuple(name for name in others if name in JAX)
    for name, side, libraries, share in (
        ("contest.first.torch", "every PyTorch and SciPy peer", _torch_and_scipy(entries), 0.9),
        ("contest.first.jax", "every JAX peer, jitted", jax, 0.7),
    ):
        comparable = _comparable(entries, libraries)
        first, total = standings.first_or_tied(comparable, BASELINE, libraries)
        context.results.target(
            name,
            f"Share of the problems on which {BASELINE} is first or tied in time against {side}",
            ">=",
            share,
            first / total if total and libraries else None,
            "1",
        )
        after, total = standings.first_or_tied(comparable, BASELINE, libraries, standings.time_after_others_of)
        context.results.figure(f"{name}.after_others", after / total if total and libraries else None, "1")
    context.results.target(
        "contest.failures",
        f"Problems that another library solves and {BASELINE} does not",
        "<=",
        0,
        len(standings.failures(entries, BASELINE)) if others else None,
        "problems",
    )


def _comparable(entries: Sequence[Entry], libraries: Sequence[str]) -> list[Entry]:
    """The entries of problems that at least one of the libraries can be given."""
    return [
        entry
        for rows in standings.by_problem(entries).values()
        if any(row.library in libraries and row.status != "refused" for row in rows)
        for entry in rows
    ]


def _others(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.library for entry in entries if entry.library != BASELINE))


def _torch_and_scipy(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(name for name in _others(entries) if name not in JAX)


def _title(solver: Contender) -> str:
    return solver.title + (", best settings" if solver.key.endswith(".best") else "")


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
