"""Who is first on how many problems, and who fails where another succeeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

from benchmarks.results import Entry

# Costs that differ by no more than this factor are a tie: medians on a shared machine are not more exact.
TIE = 1.05


def by_problem(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each problem, in order."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.problem, []).append(entry)
    return grouped


def solvable(entries: Sequence[Entry]) -> bool:
    """Whether the problem of these entries has a fixed point."""
    return all(entry.solvable for entry in entries)


def time_of(entry: Entry) -> float:
    """Seconds of a solve; infinite if the problem was not solved, or not timed."""
    return entry.seconds if entry.status == "solved" and entry.seconds is not None else math.inf


def time_after_others_of(entry: Entry) -> float:
    """The same for the first solve after those of other solvers."""
    seconds = entry.after_others_seconds
    return seconds if entry.status == "solved" and seconds is not None else math.inf


def work_of(entry: Entry) -> float:
    """Evaluations and products of a solve; infinite if the problem was not solved, or not counted."""
    if entry.status != "solved" or entry.evaluations is None:
        return math.inf
    return entry.evaluations + (entry.products or 0)


def best(entries: Sequence[Entry], libraries: Collection[str], cost: Callable[[Entry], float] = time_of) -> float:
    """The smallest cost of any entry of these libraries; infinite if none solved the problem."""
    return min((cost(entry) for entry in entries if entry.library in libraries), default=math.inf)


def first_or_tied(
    entries: Iterable[Entry], own: str, others: Collection[str], cost: Callable[[Entry], float] = time_of
) -> tuple[int, int]:
    """Problems where the library ``own`` is first or tied, and problems that it or one of ``others`` solved.

    Each library takes part with the best of its solvers on each problem.
    """
    first = total = 0
    for rows in by_problem(entries).values():
        mine, theirs = best(rows, (own,), cost), best(rows, others, cost)
        if math.isinf(mine) and math.isinf(theirs):
            continue
        total += 1
        first += mine <= TIE * theirs
    return first, total


def beaten(entries: Iterable[Entry], own: str, others: Collection[str]) -> list[tuple[list[Entry], Entry, float]]:
    """Where another library is faster: the problem's entries, the fastest entry, and how many times faster it is.

    The largest factors come first; infinite where ``own`` does not solve the problem.
    """
    found = []
    for rows in by_problem(entries).values():
        mine, theirs = best(rows, (own,)), best(rows, others)
        if not math.isinf(theirs) and mine > TIE * theirs:
            winner = min((row for row in rows if row.library in others), key=time_of)
            found.append((rows, winner, mine / theirs))
    return sorted(found, key=lambda item: -item[2])


def failures(entries: Iterable[Entry], own: str) -> list[str]:
    """Problems that another library solved, and no solver of ``own``; by key."""
    failed = []
    for problem, rows in by_problem(entries).items():
        solvers = {row.library for row in rows if row.status == "solved"}
        if solvers and own not in solvers:
            failed.append(problem)
    return failed
