"""The contest judges solvers by their values and counts, not by their words; solvers here are made up."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import standings
from benchmarks.contest.judge import TIGHTENINGS, Verdict, _apart, clock, judge
from benchmarks.peers.contender import Claim, Contender, Counts
from benchmarks.peers.pydeq import CONTENDERS as PYDEQ
from benchmarks.problems.base import Problem, from_formula
from benchmarks.results import IN_TIME, Entry, Results
from benchmarks.suites import contest
from benchmarks.timing import Recorded


def halving(**fields: object) -> Problem:
    """z = z / 2 + 1 from 0, with the solution 2, for three samples of two entries."""
    return from_formula(
        "halving", "z / 2 + 1", lambda xp, z: 0.5 * z + 1.0, torch.zeros(3, 2, dtype=torch.float64), rtol=1e-5, **fields
    )


@dataclass(frozen=True)
class MadeUp(Contender):
    """Returns what ``answer(problem, tighten)`` gives, after ``calls`` calls of the map."""

    answer: Callable[[Problem, float], Claim] = lambda problem, tighten: Claim(problem.z0, None)
    calls: int = 3

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        def solve() -> Claim:
            for _ in range(self.calls):
                problem.fn(problem.z0)
            if counts is not None:
                counts.evaluations += self.calls
            return self.answer(problem, tighten)

        return solve


def made_up(answer: Callable[[Problem, float], Claim], **fields: object) -> MadeUp:
    return MadeUp("made.up", "made", "Made up", answer=answer, **fields)  # type: ignore[arg-type]


def says(value: float, converged: bool | None) -> Callable[[Problem, float], Claim]:
    def answer(problem: Problem, tighten: float) -> Claim:
        claimed = None if converged is None else torch.full((len(problem.z0),), converged)
        return Claim(torch.full_like(problem.z0, value), claimed)

    return answer


@pytest.mark.parametrize(
    ("value", "converged", "status", "tries", "false_claim"),
    [
        (2.0, True, "solved", 1, False),
        (2.0, False, "solved", 1, False),  # too modest, but right
        (2.0, None, "solved", 1, False),
        (1.0, True, "lied", len(TIGHTENINGS), True),
        (1.0, False, "unsolved", 1, False),  # it says so itself: a smaller tolerance would not help
        (1.0, None, "unsolved", len(TIGHTENINGS), False),
        (2.0 - 8e-5, True, "unsolved", len(TIGHTENINGS), False),  # twice the tolerance: another norm explains it
        (math.nan, True, "lied", len(TIGHTENINGS), True),
    ],
)
def test_a_verdict_follows_from_the_value_and_the_claim(
    value: float, converged: bool | None, status: str, tries: int, false_claim: bool
) -> None:
    asked: list[float] = []

    def answer(problem: Problem, tighten: float) -> Claim:
        asked.append(tighten)
        return says(value, converged)(problem, tighten)

    verdict = judge(made_up(answer), halving())
    assert verdict.status == status
    assert asked == list(TIGHTENINGS[:tries])
    assert verdict.false_claim is false_claim
    assert verdict.counts.evaluations == 3  # of the last try alone


@pytest.mark.parametrize(("converged", "tries"), [(None, 1), (True, len(TIGHTENINGS))])
def test_who_used_all_calls_and_says_nothing_does_not_try_again(converged: bool | None, tries: int) -> None:
    asked: list[float] = []

    def answer(problem: Problem, tighten: float) -> Claim:
        asked.append(tighten)
        return says(1.0, converged)(problem, tighten)

    judge(made_up(answer, calls=10), halving(max_calls=10))
    assert len(asked) == tries


def test_the_excess_is_the_largest_of_the_samples() -> None:
    def answer(problem: Problem, tighten: float) -> Claim:
        value = torch.full_like(problem.z0, 2.0)
        value[1] = 4.0  # f(4) = 3: a residual of 1/3
        return Claim(value, torch.tensor([True, False, True]))

    verdict = judge(made_up(answer), halving())
    assert verdict.status == "unsolved"
    assert verdict.excess == pytest.approx(1 / 3 / 1e-5)


def test_one_sample_claimed_in_error_is_a_false_claim() -> None:
    def answer(problem: Problem, tighten: float) -> Claim:
        value = torch.full_like(problem.z0, 2.0)
        value[2] = 4.0
        return Claim(value, torch.tensor([False, False, True]))

    verdict = judge(made_up(answer), halving())
    assert (verdict.status, verdict.false_claim) == ("lied", True)


def test_a_smaller_tolerance_is_tried_until_the_value_is_right() -> None:
    def answer(problem: Problem, tighten: float) -> Claim:
        return says(2.0 - 2e-3 * tighten, True)(problem, tighten)  # residual 1e-3 * tighten over 2

    verdict = judge(made_up(answer), halving())
    assert (verdict.status, verdict.tighten, verdict.false_claim) == ("solved", 0.01, True)


def test_an_exception_is_a_crash_with_its_reason() -> None:
    def answer(problem: Problem, tighten: float) -> Claim:
        raise ZeroDivisionError("no pivot")

    verdict = judge(made_up(answer), halving())
    assert (verdict.status, verdict.reason) == ("crashed", "ZeroDivisionError: no pivot")


def test_a_value_of_another_shape_is_a_crash() -> None:
    verdict = judge(made_up(lambda problem, tighten: Claim(torch.zeros(3), None)), halving())
    assert verdict.status == "crashed"
    assert "shape (3,) for z0 of (3, 2)" in verdict.reason


def test_a_solver_that_never_stops_is_given_up() -> None:
    verdict = judge(made_up(says(2.0, True), calls=10**9), halving(max_calls=10))
    assert (verdict.status, verdict.reason) == ("unsolved", "more than 25 calls")
    slow = from_formula("slow", "slow", lambda xp, z: z + 0.0, torch.zeros(1, 1), max_calls=10**12)
    verdict = judge(made_up(says(2.0, True), calls=10**12), slow, seconds=0.05)
    assert (verdict.status, verdict.reason) == ("unsolved", "more than 0.05 s")


def test_calls_for_a_jacobian_have_a_limit_of_their_own() -> None:
    problem = halving(max_calls=10)
    solver = made_up(says(2.0, True), calls=160, differences=True)  # 1.5 times ten times as many, and ten
    assert judge(solver, problem).status == "solved"
    verdict = judge(replace(solver, calls=161), problem)
    assert (verdict.status, verdict.reason) == ("unsolved", "more than 160 calls")


def test_what_cannot_be_stopped_is_judged_by_its_counts() -> None:
    class Counted(MadeUp):
        def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
            def solve() -> Claim:
                assert counts is not None
                counts.evaluations, counts.products = self.settings["evaluations"], self.settings["products"]
                return self.answer(problem, tighten)

            return solve

    def verdict(evaluations: int, products: int) -> tuple[str, str]:
        settings = {"evaluations": evaluations, "products": products}
        made = Counted("made.up", "made", "Made up", "jax", settings, answer=says(2.0, True))
        found = judge(made, halving(max_calls=10))
        return found.status, found.reason

    assert verdict(25, 135) == ("solved", "")
    assert verdict(26, 0) == ("unsolved", "more than 25 evaluations")
    assert verdict(25, 136) == ("unsolved", "more than 160 evaluations and products")


def test_a_solver_on_a_compiled_map_has_the_verdict_of_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def counted(solver: Contender, *arguments: Any) -> Verdict:
        judged.append(solver.key)
        return judge(solver, *arguments)

    monkeypatch.setattr(contest, "judge", counted)
    one = made_up(says(2.0, True))
    solvers = [replace(one, key="compiled", compiled=True), one, replace(one, key="alone", compiled=True, calls=4)]
    verdicts = contest._verdicts(halving(), solvers, 1.0)
    assert judged == ["made.up", "alone"]
    assert verdicts["compiled"] is verdicts["made.up"]
    assert verdicts["alone"].counts.evaluations == 4


def test_a_compiled_solve_that_misses_the_tolerance_is_not_timed() -> None:
    right = replace(made_up(says(2.0, True)), key="right", compiled=True)
    wrong = replace(made_up(says(1.9, True)), key="wrong", compiled=True)
    found, missing = clock([(right, halving(), 1.0), (wrong, halving(), 1.0)], 3, 1.0)
    assert found is not None
    assert missing is None
    entry = contest._entry(wrong, halving(), judge(replace(right, compiled=False), halving()), missing, None)
    assert (entry.status, entry.seconds) == ("unsolved", None)
    assert "missed the tolerance" in entry.note


def test_a_map_that_cannot_be_compiled_leaves_no_solve_of_another_problem() -> None:
    whole = next(each for each in PYDEQ if each.key == "pydeq.picard.whole")
    claim = whole.prepare(halving())()
    assert claim.converged is not None
    assert claim.converged.all()
    refused = replace(halving(), fn=lambda z: torch.from_numpy(0.5 * z.numpy()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"torch.export cannot record fn|did not take the map"):
            whole.prepare(refused)()


def test_calls_of_the_equation_are_limited_too() -> None:
    problem = halving(max_calls=4, root=lambda xp, z: 0.5 * z - 1.0)

    def answer(problem: Problem, tighten: float) -> Claim:
        assert problem.root is not None
        for _ in range(100):
            value = problem.root(torch, problem.z0)
        return Claim(value, None)

    assert judge(made_up(answer, calls=0), problem).reason == "more than 16 calls"


def test_calls_to_prepare_a_solve_are_not_those_of_the_solve() -> None:
    class Prepared(MadeUp):
        def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
            for _ in range(10):
                problem.fn(problem.z0)
            return super().prepare(problem, tighten, counts)

    problem = halving(max_calls=10)  # 25 calls are allowed
    for calls, status in ((25, "solved"), (26, "unsolved")):
        made = Prepared("made.up", "made", "Made up", answer=says(2.0, True), calls=calls)
        assert judge(made, problem).status == status


def test_curves_of_residuals_leave_out_what_prepares_a_solve() -> None:
    class Prepared(MadeUp):
        def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
            problem.fn(torch.full_like(problem.z0, 2.0))  # the solution
            return super().prepare(problem, tighten, counts)

    made = Prepared("made.up", "made", "Made up", answer=says(2.0, True))
    context = SimpleNamespace(results=Results({}))
    contest._precision(context, [halving(family="cell")], [made])  # type: ignore[arg-type]
    work, clock = context.results.curves
    assert work.x == (1.0, 2.0, 3.0)
    assert work.y == clock.y == (1.0, 1.0, 1.0)  # ||1 - 0|| / ||1|| in each of its calls
    assert clock.panel == work.panel + IN_TIME
    assert 0 < clock.x[0] < clock.x[1] < clock.x[2]


def test_the_time_of_a_recorded_map_is_without_the_recording() -> None:
    wide = torch.zeros(1, 3_000_000)
    fn = Recorded(lambda z: z)  # the residual takes far longer than the map
    for _ in range(3):
        fn(wide)
    begin = time.perf_counter()
    fn(wide)
    recording = time.perf_counter() - begin
    assert fn.seconds[-1] < recording
    assert fn.seconds == sorted(fn.seconds)
    fn.start()
    assert fn.seconds == fn.residuals == []


@pytest.mark.parametrize(
    ("converged", "value", "status"),
    [(False, 5.0, "said so"), (None, 5.0, "silent"), (True, 5.0, "lied"), (True, 1e9, "fooled")],
)
def test_without_a_fixed_point_the_claim_is_judged(converged: bool | None, value: float, status: str) -> None:
    runaway = from_formula("runaway", "z + 1", lambda xp, z: z + 1.0, torch.zeros(2, 2), solvable=False)
    assert judge(made_up(says(value, converged)), runaway).status == status


def test_a_coupled_problem_is_one_sample() -> None:
    def answer(problem: Problem, tighten: float) -> Claim:
        value = torch.full_like(problem.z0, 2.0)
        value[1] = 4.0
        return Claim(value, torch.tensor([True, False, False]))

    assert judge(made_up(answer), halving()).false_claim is False
    assert judge(made_up(answer), halving(coupled=True)).false_claim is True


def test_a_jax_solver_is_refused_maps_of_torch() -> None:
    problem = Problem("torch", "torch", torch.tanh, torch.zeros(1, 1), exact=torch.tanh)
    verdict = judge(made_up(says(0.0, True), language="jax"), problem)
    assert (verdict.status, verdict.reason) == ("refused", "the map is a torch module")


def test_clock_times_every_side_and_leaves_out_what_raises() -> None:
    def fails(problem: Problem, tighten: float) -> Claim:
        raise RuntimeError("now it fails")

    problem, made = halving(), made_up(says(2.0, True))
    measured, failed, again = clock(
        [(made, problem, 1.0), (made_up(fails), problem, 1.0), (made, problem, 0.1)], 4, 9.0
    )
    assert failed is None
    for found in (measured, again):
        assert found is not None
        assert found.solve.samples == 4
        assert 0 < found.solve.low <= found.solve.median <= found.solve.high
        assert found.first is not None
        assert found.first > 0
        assert found.after_others > 0


def test_clock_takes_a_slow_solve_once_after_a_warm_up() -> None:
    solves = []

    def slow(problem: Problem, tighten: float) -> Claim:
        solves.append(tighten)
        return says(2.0, True)(problem, tighten)

    (measured,) = clock([(made_up(slow), halving(), 1.0)], 4, 1e-12)
    assert measured is not None
    assert measured.solve.samples == 1
    assert measured.solve.median == measured.after_others > 0
    assert len(solves) == 2


def test_clock_repeats_a_short_solve_within_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    solves = []

    def answer(problem: Problem, tighten: float) -> Claim:
        solves.append(tighten)
        return says(2.0, True)(problem, tighten)

    seconds = iter([9.0, 1e-3, *(1e-3, 4e-4, 5e-4, 1.2e-3) * 3])
    monkeypatch.setattr("benchmarks.contest.judge._seconds", lambda solve, problem: (solve(), next(seconds))[1])
    (found,) = clock([(made_up(answer), halving(), 1.0)], 3, 1.0)
    assert found is not None
    assert (found.solve.samples, found.solve.median) == (3, 5e-4)  # without the first of each turn
    assert (found.first, found.after_others) == (9.0, 1e-3)
    assert len(solves) == 2 + 3 * 4
    long = iter([9.0, *[2e-2] * 4])
    monkeypatch.setattr("benchmarks.contest.judge._seconds", lambda solve, problem: (solve(), next(long))[1])
    (found,) = clock([(made_up(says(2.0, True)), halving(), 1.0)], 3, 1.0)
    assert found is not None
    assert found.solve.median == found.after_others == 2e-2


def test_clock_times_in_the_session_of_the_library() -> None:
    inside = []

    class InSession(MadeUp):
        def session(self, problem: Problem) -> contextlib.AbstractContextManager[Any]:
            @contextlib.contextmanager
            def session() -> Any:
                inside.append(True)
                yield
                inside.pop()

            return session()

    def answer(problem: Problem, tighten: float) -> Claim:
        assert len(inside) == 1
        return says(2.0, True)(problem, tighten)

    (found,) = clock([(InSession("made.up", "made", "Made up", answer=answer), halving(), 1.0)], 3, 1.0)
    assert found is not None
    assert inside == []


def test_the_first_time_of_a_compiled_solver_has_the_compilation_of_its_map() -> None:
    class Compiling(MadeUp):
        def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
            time.sleep(0.05)
            return super().prepare(problem, tighten, counts)

    sides = [
        (Compiling("made.up", "made", "Made up", answer=says(2.0, True), compiled=compiled), halving(), 1.0)
        for compiled in (True, False)
    ]
    compiled, plain = clock(sides, 1, 1.0)
    assert compiled is not None
    assert plain is not None
    assert compiled.first is not None
    assert plain.first is not None
    assert compiled.first >= 0.05 > compiled.solve.median
    assert plain.first < compiled.first


def test_the_time_beside_the_map_is_that_of_solvers_that_call_it_one_by_one() -> None:
    @dataclass(frozen=True)
    class Batched(MadeUp):
        batched: bool = False

        def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
            if counts is not None:
                counts.batched = self.batched
            return super().prepare(problem, tighten, counts)

    def made(key: str, **fields: Any) -> Batched:
        return Batched(key, "made", "Made up", answer=says(2.0, True), **fields)

    context: Any = SimpleNamespace(profile=SimpleNamespace(contest_seconds=2.0, contest_repeats=3))
    solvers = [made("plain"), made("batched", batched=True), made("mapped.compiled", compiled=True)]
    entries = {entry.contender: entry for entry in contest.compete(context, halving(), solvers)}
    assert entries["plain"].overhead_seconds is not None
    assert entries["batched"].overhead_seconds is entries["mapped.compiled"].overhead_seconds is None
    assert all(entry.status == "solved" and entry.samples for entry in entries.values())


def test_solvers_of_one_library_do_not_follow_each_other() -> None:
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    order = _apart(range(9), groups)
    assert sorted(order) == list(range(9))
    assert all(groups[i] != groups[j] for i, j in itertools.pairwise(order))


def test_compiling_has_a_table_of_its_own() -> None:
    def first(problem: str, contender: str, seconds: float) -> Entry:
        return Entry(problem, "family", contender, contender.split(".")[0], "solved", first_seconds=seconds)

    context: Any = SimpleNamespace(results=Results({}))
    contest._compiling(
        context,
        [
            [
                first("a", "pydeq.picard.compiled", 8.0),  # compiles the map
                first("a", "loop.picard.compiled", 0.1),  # gets it
                first("a", "pydeq.broyden.whole", 12.0),
                first("a", "pydeq.broyden", 99.0),
            ],
            [first("b", "jaxopt.broyden.best", 3.0), first("b", "loop.picard.compiled", 6.0)],
        ],
    )
    (table,) = context.results.tables
    assert [row[:3] for row in table.rows] == [
        ("map, by torch.compile", "2", "7"),
        ("solve, by pydeq.CompiledSolve", "1", "12"),
        ("solve, by jaxopt", "1", "3"),
    ]


def test_a_solver_that_is_far_too_slow_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    solves = []

    def answer(problem: Problem, tighten: float) -> Claim:
        solves.append(tighten)
        return says(2.0, True)(problem, tighten)

    def compete(seconds: float) -> list[Entry]:
        def judged(solver: Contender, *arguments: Any) -> Verdict:
            return replace(judge(solver, *arguments), seconds=seconds if solver.key == "late" else 1.0)

        monkeypatch.setattr(contest, "judge", judged)
        solves.clear()
        context: Any = SimpleNamespace(profile=SimpleNamespace(contest_seconds=2.0, contest_repeats=3))
        return contest.compete(context, halving(), [made_up(says(2.0, True)), replace(made_up(answer), key="late")])

    fast, once = compete(11.0)  # beyond LATE, and beyond ten times the fastest
    assert solves == [1.0]
    assert once.seconds == once.seconds_low == once.seconds_high == 11.0
    assert once.first_seconds is None
    assert fast.seconds != 1.0  # it was timed
    compete(9.0)
    assert len(solves) > 1
    monkeypatch.setattr(contest, "LATE", 20.0)
    compete(11.0)
    assert len(solves) > 1


def run_contest(monkeypatch: pytest.MonkeyPatch, device: str, kept: Callable[..., Any]) -> list[torch.device]:
    """Run the contest on one problem with one solver; returns the devices of the problems that were solved."""
    devices = []

    def compete(context: Any, problem: Problem, solvers: Any) -> list[Entry]:
        devices.append(problem.z0.device)
        return [Entry(problem.key, "family", "made.up", "pydeq", "solved", 3, 0, 0.5)]

    monkeypatch.setattr(contest, "contenders", lambda names: ([made_up(says(2.0, True))], []))
    monkeypatch.setattr(contest, "problems", lambda names: [halving()])
    monkeypatch.setattr(contest, "compete", compete)
    bar = SimpleNamespace(start=lambda total: None, show=lambda text: None, advance=lambda: None)
    context = SimpleNamespace(
        device=device, asks_library=lambda name: True, results=Results({}), problems_asked=None, bar=bar, kept=kept,
        profile=SimpleNamespace(contest_problems=None),
    )  # fmt: skip
    contest.run(context)  # type: ignore[arg-type]
    assert [each.contender for each in context.results.entries] == ["made.up"]
    return devices


def test_the_contest_solves_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "meta"):
        assert run_contest(monkeypatch, device, lambda key, compute: compute()) == [torch.device(device)]


def test_results_of_other_solvers_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"problem": "halving", "family": "family", "contender": "made.up", "library": "pydeq", "status": "solved"}
    assert run_contest(monkeypatch, "cpu", lambda key, compute: [row]) == []
    for rows in ([row | {"contender": "made.before"}], [row, row | {"contender": "made.before"}], []):
        with pytest.raises(ValueError, match="halving was solved by other solvers"):
            run_contest(monkeypatch, "cpu", lambda key, compute, rows=rows: rows)


def entry(problem: str, library: str, seconds: float | None, evaluations: float = 10, status: str = "solved") -> Entry:
    return Entry(problem, "family", f"{library}.{seconds}", library, status, evaluations, 0, seconds)  # type: ignore[arg-type]


ENTRIES = [
    entry("a", "own", 1.0),
    entry("a", "own", 3.0, evaluations=4),
    entry("a", "other", 2.0),
    entry("b", "own", 2.08),
    entry("b", "other", 2.0),  # a tie
    entry("c", "own", 4.0),
    entry("c", "other", 2.0),
    entry("d", "own", None, status="unsolved"),
    entry("d", "other", 2.0),
    entry("e", "own", None, status="unsolved"),
    entry("e", "other", None, status="lied"),
    entry("f", "own", 2.0),
    entry("f", "other", None, status="crashed"),
]


def test_a_library_takes_part_with_its_best_solver() -> None:
    assert standings.first_or_tied(ENTRIES, "own", ("other",)) == (3, 5)
    assert standings.best(standings.by_problem(ENTRIES)["a"], ("own",), standings.work_of) == 4


def test_where_another_is_faster_is_listed_with_the_worst_first() -> None:
    found = [
        (rows[0].problem, winner.library, factor)
        for rows, winner, factor in standings.beaten(ENTRIES, "own", ("other",))
    ]
    assert found == [("d", "other", math.inf), ("c", "other", 2.0)]


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    context = SimpleNamespace(results=Results({}))
    seconds = {("one", "own"): 1.0, ("two", "own"): 3.0, ("one", "other"): 1.0, ("two", "other"): 1.0}
    entries = [replace(entry(*key, seconds=value), contender=key[1]) for key, value in seconds.items()]
    contest._robustness(context, entries)  # type: ignore[arg-type]
    (table,) = context.results.tables
    column = table.columns.index("time over the least")
    assert [row[column] for row in table.rows] == ["2x", "1x"]


def test_a_problem_without_a_fixed_point_stays_one_if_all_solvers_crash() -> None:
    rows = [entry("z + 1", "own", None, status="crashed"), entry("z + 1", "other", None, status="unsolved")]
    assert standings.solvable(rows)
    assert not standings.solvable([dataclasses.replace(row, solvable=False) for row in rows])


def test_failures_are_problems_that_only_another_solved() -> None:
    assert standings.failures(ENTRIES, "own") == ["d"]


def test_value_of_excess() -> None:
    problem = halving()
    value = torch.tensor([[2.0, 2.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, 1 / 3 / 1e-5, 1e5], dtype=torch.float64)
    torch.testing.assert_close(problem.excess(value), expected)
    loose = halving(atol=10.0)
    assert bool((loose.excess(value) <= 1).all())


def test_without_a_map_in_float64_the_excess_is_refused() -> None:
    problem = Problem("torch", "torch", torch.tanh, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="torch has no map in float64"):
        problem.excess(torch.zeros(1, 1))


def test_the_tensor_type_of_a_value_does_not_matter() -> None:
    value: Tensor = torch.full((3, 2), 2.0, dtype=torch.float32)
    assert judge(made_up(lambda problem, tighten: Claim(value, None)), halving()).status == "solved"
