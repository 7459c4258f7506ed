"""Overhead per iteration: the time of a solver between two calls of f.

    overhead = (time of the solve - time spent inside f) / calls of f

Every sample runs every iteration: no tolerance, no freezing, no stall. A solve's allocations count. A small layer next
to a loop written by hand shows what a solve and a training step cost as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from benchmarks.peers import Method, Peer
from benchmarks.peers.base import METHODS
from benchmarks.problems.base import Problem
from benchmarks.problems.maps import elementwise
from benchmarks.results import number, times
from benchmarks.suites import small_layers
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Timed, alternate, ratios, spread, threads

STEPS = 30
CALLS = STEPS + 1  # the last call measures the residual of the last step

# solver -> (at least at each shape, at least in the geometric mean over shapes)
TARGETS = {"anderson": (6.0, 12.0), "broyden": (8.0, 20.0), "picard": (2.0, None)}


def run(context: Context) -> None:
    profile, results, bar = context.profile, context.results, context.bar
    bar.start(len(context.threads) * len(profile.overhead_shapes) * len(METHODS))
    rows: list[tuple[str, ...]] = []
    found: dict[tuple[str, str, int], list[float]] = {}
    for method in METHODS:
        for count in context.threads:
            for batch, dim in profile.overhead_shapes:
                problem = elementwise(batch, dim)
                case = f"{method.solver}.{problem.key}.t{count}"
                bar.show(case)
                sides = {name: _overhead_of(peer, problem, method) for name, peer in context.peers.items()}
                with threads(count):
                    measured = alternate(sides, profile.overhead_repeats, seconds=profile.overhead_seconds)
                bar.advance()
                for name, values in measured.items():
                    results.figure(f"overhead.{case}.{name}", spread(values).scaled(1e3), "ms/iteration")
                row = [method.title, problem.title, str(count)]
                row += [number(spread(values).median * 1e3) for values in measured.values()]
                for name in context.others:
                    ratio = ratios(measured[name], measured[BASELINE])
                    results.figure(f"overhead.{case}.{name}_over_{BASELINE}", ratio, "1")
                    found.setdefault((name, method.solver, count), []).append(ratio.median)
                    row += [times(ratio.median), f"{number(ratio.low)} to {number(ratio.high)}"]
                rows.append(tuple(row))
    columns = ("solver", "(B, D)", "threads", *(f"{name}, ms" for name in context.peers))
    for name in context.others:
        columns += (f"{name} / {BASELINE}", "quartiles")
    results.table(
        "overhead",
        f"Overhead per iteration, float32, {STEPS} steps, Anderson of memory 6, Broyden of full memory",
        columns,
        rows,
        "(time of the solve - time inside f) / calls of f; no early stop on either side. Medians of alternating"
        " solves; the quartiles are those of the ratios of neighbouring solves.",
    )
    for (name, solver, count), values in found.items():
        mean = math.prod(values) ** (1 / len(values))
        results.figure(f"overhead.{solver}.mean.t{count}.{name}_over_{BASELINE}", mean, "1")
    _set_targets(context, found)
    small_layers.measure(context)


def _overhead_of(peer: Peer, problem: Problem, method: Method) -> Callable[[], float]:
    def measure() -> float:
        fn = Timed(problem.fn)
        start = time.perf_counter()
        peer.run(fn, problem.z0, method, CALLS)
        total = time.perf_counter() - start
        if fn.calls != CALLS:
            raise RuntimeError(f"{peer.name}'s {method.solver} must call f {CALLS} times, got {fn.calls}")
        return (total - fn.seconds) / fn.calls

    return measure


def _set_targets(context: Context, found: dict[tuple[str, str, int], list[float]]) -> None:
    for solver, (each, mean) in TARGETS.items():
        for count in context.threads:
            values = found.get(("torchdeq", solver, count))
            where = f"{solver.capitalize()}, {count} thread{'s' if count > 1 else ''}"
            context.results.target(
                f"overhead.{solver}.each.t{count}",
                f"{where}: overhead per iteration below torchdeq's, at each shape",
                ">=",
                each,
                min(values) if values else None,
                "x",
            )
            if mean is not None:
                context.results.target(
                    f"overhead.{solver}.mean.t{count}",
                    f"{where}: overhead per iteration below torchdeq's, geometric mean",
                    ">=",
                    mean,
                    math.prod(values) ** (1 / len(values)) if values else None,
                    "x",
                )
