"""Time and memory against size, from hand-made entries and from a solve whose memory is known."""

import pytest
import torch

from benchmarks.contest.judge import judge
from benchmarks.peers.pydeq import CONTENDERS
from benchmarks.problems.sizes import tanh_diagonal
from benchmarks.report import growth, plots
from benchmarks.results import Entry
from benchmarks.suites.contest import _peak


def entry(batch, dim, library, seconds, contender="a", peak=None, status="solved", dtype="float32"):
    key = f"sizes.tanh.{batch}x{dim}.{dtype}"
    return Entry(key, "sizes", contender, library, status, seconds=seconds, peak_bytes=peak)


ENTRIES = [
    entry(32, 100, "x", 0.003),
    entry(32, 10, "x", 0.002),
    entry(32, 10, "x", 0.001, "b"),
    entry(32, 1000, "x", 0.004, peak=5 * 4 * 32 * 1000),
    entry(32, 1000, "x", 0.0001, "b", status="unsolved"),
    entry(32, 1000, "x", 0.0001, "b", dtype="float64"),
    entry(1, 10, "x", 0.001),
]


def test_a_line_takes_the_fastest_solver_that_solves_at_each_size():
    assert growth.time_lines(ENTRIES) == {(32, "x"): [(10, 1.0), (100, 3.0), (1000, 4.0)]}


def test_memory_is_in_state_vectors_and_a_line_has_three_points():
    more = [entry(32, dim, "x", 1.0, peak=7 * 4 * 32 * dim) for dim in (10_000, 100_000)]
    assert growth.memory_lines(ENTRIES) == {}
    assert growth.memory_lines(ENTRIES + more) == {(32, "x"): [(1000, 5.0), (10_000, 7.0), (100_000, 7.0)]}


def test_the_plot_has_a_panel_for_each_batch_and_kind():
    figure = growth.draw(ENTRIES + [entry(1, dim, "y", 1.0, peak=dim) for dim in (10, 100, 1000)], plots._looks)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["batch 1", "batch 32"] * 2
    assert growth.draw(ENTRIES[:2], plots._looks) is None


def test_the_memory_of_a_solve_is_that_of_its_design():
    problem = tanh_diagonal(2, 100_000)
    solver = next(each for each in CONTENDERS if each.key == "pydeq.anderson.default")
    peak = _peak(solver, problem, judge(solver, problem))
    assert peak is not None
    # 2 memory + 5 state vectors, and f's own temporaries.
    assert peak / (4 * problem.z0.numel()) == pytest.approx(16, abs=1.2)
    small = tanh_diagonal(2, 10, torch.float32)
    assert _peak(solver, small, judge(solver, small)) is None
