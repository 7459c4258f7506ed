"""The contest of all libraries for readers: performance profiles, which solver solves what, and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contest.standings import TIE, beaten, by_problem, failures, first_or_tied, solvable, time_of, work_of
from benchmarks.results import Entry, Results, number

OWN = "pydeq"


@dataclass(frozen=True)
class Mark:
    """How a status is shown.

    Args:
        sign: One character.
        kind: "good", "bad", "false" or "none", for its color.
        words: For readers.
    """

    sign: str
    kind: str
    words: str


MARKS = {
    "solved": Mark("✓", "good", "solved"),
    "unsolved": Mark("·", "bad", "not solved"),
    "lied": Mark("✗", "false", "not solved, although the library says so"),
    "crashed": Mark("!", "bad", "raised an exception"),
    "refused": Mark("–", "none", "cannot be given this problem"),
    "said so": Mark("✓", "good", "no fixed point, and the library says that it did not converge"),
    "silent": Mark("·", "bad", "no fixed point, and the library says nothing"),
    "fooled": Mark("✗", "false", "no fixed point, but a value that meets the tolerance"),
}


@dataclass(frozen=True)
class Step:
    """A step function: ``share[i]`` from ``ratio[i]`` on."""

    ratio: tuple[float, ...]
    share: tuple[float, ...]


def profile_curves(costs: Mapping[str, Sequence[float]]) -> dict[str, Step]:
    """Performance profiles (Dolan and Moré 2002).

    The curve of a solver at r is the share of problems that it solves at no more than r times the cost of the best
    solver of each problem. At 1 it is the share of problems on which the solver is the best, ties included. Its end is
    the share of problems that the solver solves at all.

    Args:
        costs: By solver, its cost on each problem; infinite if it failed.

    Returns:
        By solver its curve, from ratio 1 on.

    Raises:
        ValueError: If solvers have costs on different numbers of problems, or a cost is negative or NaN.
    """
    counts = {len(each) for each in costs.values()}
    if len(counts) > 1:
        raise ValueError(f"costs must be of the same problems, got {sorted(counts)} problems")
    if any(math.isnan(cost) or cost < 0 for each in costs.values() for cost in each):
        raise ValueError("costs must be at least 0")
    best = [min(column) for column in zip(*costs.values(), strict=True)]
    curves = {}
    for solver, each in costs.items():
        ratios = sorted(_ratio(cost, least) for cost, least in zip(each, best, strict=True) if math.isfinite(cost))
        points = {1.0: 0.0} | {ratio: (i + 1) / len(each) for i, ratio in enumerate(ratios)}
        curves[solver] = Step(tuple(points), tuple(points.values()))
    return curves


def _ratio(cost: float, least: float) -> float:
    if cost == least:
        return 1.0
    return cost / least if least else math.inf


def common_problems(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of each problem that has a fixed point and that every library can be given.

    Libraries that can be given none of them, such as SciPy on a GPU, are left out.
    """
    problems = [rows for rows in by_problem(entries).values() if solvable(rows)]
    libraries = {row.library for rows in problems for row in rows if row.status != "refused"}
    return [rows for rows in problems if {row.library for row in rows if row.status != "refused"} == libraries]


def all_problems(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of each problem that has a fixed point, of the libraries that can be given all of these problems."""
    problems = [rows for rows in by_problem(entries).values() if solvable(rows)]
    given = [{row.library for row in rows if row.status != "refused"} for rows in problems]
    able = set.intersection(*given) if given else set()
    return [[row for row in rows if row.library in able] for rows in problems]


def costs(
    problems: Sequence[Sequence[Entry]], key: Callable[[Entry], str], cost: Callable[[Entry], float]
) -> dict[str, list[float]]:
    """For each solver or library, its smallest cost on each problem, for :func:`profile_curves`.

    Args:
        problems: The entries of each problem.
        key: Solver or library of an entry.
        cost: Infinite if the problem was not solved.
    """
    names = dict.fromkeys(key(row) for rows in problems for row in rows)
    return {
        name: [min((cost(row) for row in rows if key(row) == name), default=math.inf) for rows in problems]
        for name in names
    }


@dataclass(frozen=True)
class Standing:
    """A solver over all problems."""

    contender: str
    library: str
    title: str
    solved: int
    unsolved: int
    lied: int
    crashed: int
    refused: int
    fastest: int
    fewest: int

    @property
    def tried(self) -> int:
        return self.solved + self.unsolved + self.lied + self.crashed


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """Each solver: what became of the problems that have a fixed point, and on how many it is the best or tied.

    The solver that solves most comes first.
    """
    problems = [rows for rows in by_problem(entries).values() if solvable(rows)]
    found: dict[str, dict[str, int]] = {}
    names: dict[str, Entry] = {}
    for rows in problems:
        fastest, fewest = min(map(time_of, rows)), min(map(work_of, rows))
        for row in rows:
            names.setdefault(row.contender, row)
            counts = found.setdefault(row.contender, {})
            counts[row.status] = counts.get(row.status, 0) + 1
            if row.status == "solved":
                counts["fastest"] = counts.get("fastest", 0) + (time_of(row) <= TIE * fastest < math.inf)
                counts["fewest"] = counts.get("fewest", 0) + (work_of(row) == fewest < math.inf)
    kinds = ("solved", "unsolved", "lied", "crashed", "refused", "fastest", "fewest")
    return [
        Standing(name, row.library, row.title or name, *(found[name].get(kind, 0) for kind in kinds))
        for name, row in sorted(names.items(), key=lambda item: -found[item[0]].get("solved", 0))
    ]


def beaten_by(entries: Sequence[Entry]) -> list[tuple[list[Entry], Entry, float, Entry]]:
    """Where another library is faster: the problem's entries, the fastest one, its lead, and pydeq's fastest entry."""
    others = {entry.library for entry in entries} - {OWN}
    return [
        (rows, winner, factor, min(own, key=time_of))
        for rows, winner, factor in beaten(entries, OWN, others)
        if (own := [row for row in rows if row.library == OWN])
    ]


def by_family(entries: Sequence[Entry]) -> dict[str, dict[str, tuple[int, int]]]:
    """For each contender and family: problems solved and problems tried."""
    solved: dict[str, dict[str, tuple[int, int]]] = {}
    for entry in entries:
        families = solved.setdefault(entry.contender, {})
        done, tried = families.get(entry.family, (0, 0))
        if entry.status != "refused":
            families[entry.family] = (done + (MARKS[entry.status].kind == "good"), tried + 1)
    return solved


def sentence(results: Results) -> str:
    """The run in a sentence or two, composed of its figures; empty if it has neither a contest nor overheads."""
    libraries = {entry.library for entry in results.entries}
    if OWN in libraries and len(libraries) > 1:
        return _contest_sentence(results.entries, libraries - {OWN})
    return _overhead_sentence(results)


def _contest_sentence(entries: Sequence[Entry], others: Collection[str]) -> str:
    parts = []
    for what, cost in (("in time", time_of), ("in evaluations and products", work_of)):
        first, total = first_or_tied(entries, OWN, others, cost)
        if total:
            parts.append(f"{what} on {first} of {total} problems")
    text = f"{OWN} is first or tied {' and '.join(parts)}." if parts else f"{OWN} solved none of the problems."
    failed = failures(entries, OWN)
    if failed:
        problems = by_problem(entries)
        named = [
            f"{_title(rows[0])} ({', '.join(sorted({row.library for row in rows if row.status == 'solved'}))})"
            for rows in (problems[name] for name in failed[:3])
        ]
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        count = f"{len(failed)} problem{'s' if len(failed) > 1 else ''}"
        text += f" It fails on {count} that another library solves: {'; '.join(named)}{more}."
    elif parts:
        text += " It solves every problem that another library solves."
    slower = [(rows, winner, factor) for rows, winner, factor in beaten(entries, OWN, others) if math.isfinite(factor)]
    if slower:
        rows, winner, factor = slower[0]
        text += (
            f" The largest lead of another library is {winner.library}'s: {number(factor, 2)}x on {_title(rows[0])}."
        )
    return text


def _title(entry: Entry) -> str:
    return entry.problem_title or entry.problem


def _overhead_sentence(results: Results) -> str:
    ratios = [
        (figure.value, figure.name)
        for figure in results.figures
        if figure.value is not None and figure.name.startswith("overhead.") and figure.name.endswith(f"_over_{OWN}")
        if ".mean." not in figure.name and ".small." not in figure.name
    ]
    if not ratios:
        return ""
    (least, name), (most, _) = min(ratios), max(ratios)
    other = name.split(".")[-1].removesuffix(f"_over_{OWN}")
    return (
        f"Between two evaluations, {other} takes {number(least, 2)} to {number(most, 2)} times as long as {OWN},"
        f" over {len(ratios)} cases."
    )
