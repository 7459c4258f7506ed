"""Evaluations, residual and wall-clock to a tolerance, on the same maps for every library; the maps count the calls."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.peers import Method, Peer
from benchmarks.peers.base import METHODS
from benchmarks.problems.base import Problem
from benchmarks.problems.convolution import convolutional
from benchmarks.problems.maps import symmetric_linear, tanh_map
from benchmarks.results import number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Counted, Recorded, Spread, alternate, ratios, relative_residual, spread, threads


@dataclass(frozen=True)
class Task:
    """Problems of one kind, and how far to solve them.

    Args:
        key: For names of figures, without the tolerance.
        make: Seed -> problem.
        rtols: Tolerances to solve to.
        max_calls: Calls after which a solve is given up.
        methods: The methods of every library.
    """

    key: str
    make: Callable[[int], Problem]
    rtols: tuple[float, ...]
    max_calls: int
    methods: tuple[Method, ...] = METHODS


@dataclass(frozen=True)
class Run:
    """One solve: calls of f, and how it ended."""

    calls: int
    converged: bool
    residual: float  # the largest relative one that the library reports
    output_residual: float  # that of the value it returns, evaluated afterwards

    @property
    def cost(self) -> float:
        """Calls; infinite if the tolerance was not met."""
        return self.calls if self.converged else math.inf


# (task, rtol, seed, solver, peer) -> run
Runs = dict[tuple[str, float, int, str, str], Run]

SYMMETRIC, UNSTABLE = "symmetric", "tanh.unstable"
# Expanding directions ask for more columns than contractions do: with 6, single samples of some maps never get there.
UNSTABLE_METHODS = (Method("picard"), Method("anderson", memory=10), Method("broyden"))


def _tasks(context: Context) -> Iterator[Task]:
    for dim, rho in itertools.product(context.profile.nfe_dims, context.profile.nfe_rhos):
        yield Task(f"tanh.d{dim}.rho{rho:g}", lambda seed, d=dim, r=rho: tanh_map(d, r, seed), (1e-3, 1e-5), 200)
    yield Task("conv", convolutional, (1e-3, 1e-5), 200)
    yield Task(SYMMETRIC, symmetric_linear, (1e-6,), 400)
    yield Task(UNSTABLE, lambda seed: tanh_map(128, 1.5, seed), (1e-6,), 400, UNSTABLE_METHODS)


def run(context: Context) -> None:
    tasks, seeds = list(_tasks(context)), range(context.profile.nfe_seeds)
    cases = [(task, rtol) for task in tasks for rtol in task.rtols]
    context.bar.start(len(cases) * (len(seeds) + 1) + 1)
    runs: Runs = {}
    rows: list[tuple[str, ...]] = []
    with threads(1):
        for task, rtol in cases:
            problems = [task.make(seed) for seed in seeds]
            for seed, problem in zip(seeds, problems, strict=True):
                context.bar.show(f"{task.key}, rtol {rtol:g}, map {seed + 1}")
                for method, (name, peer) in itertools.product(task.methods, context.peers.items()):
                    found = _solve(peer, problem, method, rtol, task.max_calls)
                    runs[task.key, rtol, seed, method.solver, name] = found
                context.bar.advance()
            rows += _time(context, task, rtol, problems[0], runs)
            context.bar.advance()
        _trace(context)
        context.bar.advance()
    peers = tuple(context.peers)
    columns = ("problem", "rtol", "solver")
    columns += tuple(f"{name} NFE" for name in peers) + tuple(f"{name} residual" for name in peers)
    columns += tuple(f"{name}, ms" for name in peers)
    columns += tuple(f"{name} / {BASELINE}" for name in context.others)
    context.results.table(
        "nfe",
        f"Evaluations to the tolerance, batch 32, {len(seeds)} maps of each kind",
        columns,
        rows,
        "NFE: calls of f until the slowest sample of the batch is done, mean over maps; > if a cap was reached."
        " Residual: the largest ||f(z) - z|| / ||f(z)|| that the library reports on any map. Times: medians of"
        f" alternating solves of the first map. {_norms(context)}",
    )
    _set_targets(context, tasks, runs)


def _solve(peer: Peer, problem: Problem, method: Method, rtol: float, max_calls: int) -> Run:
    fn = Counted(problem.fn)
    outcome = peer.solve(fn, problem.z0, method, rtol, max_calls)
    calls = fn.calls
    output = relative_residual(outcome.value, problem.fn(outcome.value)).max().item()
    return Run(calls, outcome.converged, outcome.residual.max().item(), output)


def _time(context: Context, task: Task, rtol: float, problem: Problem, runs: Runs) -> list[tuple[str, ...]]:
    """Wall-clock on one map, the figures of all maps, and the rows of the table."""

    def solve_time(peer: Peer, method: Method) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            peer.solve(problem.fn, problem.z0, method, rtol, task.max_calls)
            return time.perf_counter() - start

        return measure

    rows = []
    for method in task.methods:
        sides = {name: solve_time(peer, method) for name, peer in context.peers.items()}
        measured = alternate(sides, context.profile.nfe_repeats)
        mean, residual, clock = [], [], []
        for name in context.peers:
            case = f"{task.key}.rtol{rtol:g}.{method.solver}.{name}"
            found = [runs[task.key, rtol, seed, method.solver, name] for seed in range(context.profile.nfe_seeds)]
            # Who gives up early is not cheaper.
            calls = [run.calls if run.converged else max(run.calls, task.max_calls) for run in found]
            all_met = all(run.converged for run in found)
            average = statistics.fmean(calls)
            context.results.figure(f"nfe.{case}", Spread(average, min(calls), max(calls), len(calls)), "calls")
            share = statistics.fmean(run.converged for run in found)
            context.results.figure(f"converged.{case}", share, "1")
            worst = max(run.residual for run in found)
            context.results.figure(f"residual.{case}", worst, "1")
            context.results.figure(f"output_residual.{case}", max(run.output_residual for run in found), "1")
            context.results.figure(f"time.{case}", spread(measured[name]).scaled(1e3), "ms")
            mean.append(("" if all_met else "> ") + f"{average:.1f}".removesuffix(".0"))
            residual.append(f"{worst:.1e}")
            clock.append(number(spread(measured[name]).median * 1e3))
        compared = []
        for name in context.others:
            ratio = ratios(measured[name], measured[BASELINE])
            context.results.figure(f"time.{task.key}.rtol{rtol:g}.{method.solver}.{name}_over_{BASELINE}", ratio, "1")
            compared.append(times(ratio.median))
        rows.append((problem.title, f"{rtol:g}", method.title, *mean, *residual, *clock, *compared))
    return rows


def _trace(context: Context) -> None:
    """Residual against evaluations, for the plot. The map records them, so all libraries are measured alike."""
    dim = max(context.profile.nfe_dims)
    for problem in (tanh_map(dim, 0.95, 0), convolutional(0), symmetric_linear(0)):
        for method, (name, peer) in itertools.product(METHODS, context.peers.items()):
            fn = Recorded(problem.fn)
            peer.solve(fn, problem.z0, method, 1e-6, 60)
            worst = [residual.max().item() for residual in fn.residuals]
            calls = tuple(float(call) for call in range(1, len(worst) + 1))
            context.results.curve("residual", problem.title, name, method.title, calls, tuple(worst))


def _norms(context: Context) -> str:
    """A note about ||W||: a Gaussian W is far from normal, so its norm is larger than its spectral radius."""
    parts = []
    for dim in context.profile.nfe_dims:
        facts = tanh_map(dim, max(context.profile.nfe_rhos), 0).facts
        parts.append(f"||W|| {facts['spectral_norm']:.2f} at D {dim}, ρ {facts['spectral_radius']:g}")
    return f"W is Gaussian, scaled to its spectral radius ρ; its spectral norm is larger: {'; '.join(parts)}."


def _set_targets(context: Context, tasks: list[Task], runs: Runs) -> None:
    seeds = range(context.profile.nfe_seeds)
    cases = [(task.key, rtol) for task in tasks for rtol in task.rtols]
    solvers = [method.solver for method in METHODS]
    target = context.results.target
    compared = "torchdeq" in context.peers

    def cost(key: str, rtol: float, solver: str, name: str = BASELINE) -> list[float]:
        return [runs[key, rtol, seed, solver, name].cost for seed in seeds]

    anderson = [
        sum(cost(key, rtol, "anderson")) / sum(runs[key, rtol, seed, "anderson", "torchdeq"].calls for seed in seeds)
        for key, rtol in cases
        if compared and key.startswith("tanh") and rtol == 1e-5
    ]
    target(
        "nfe.anderson.tanh",
        "Anderson's NFE at rtol 1e-5 as a share of torchdeq's Anderson's, on the worst kind of tanh map",
        "<=",
        0.7,
        max(anderson, default=None),
        "x",
    )
    target(
        "nfe.anderson.symmetric",
        "Anderson's NFE as a share of Picard's: symmetric linear map, D 50, ρ 0.95, rtol 1e-6",
        "<=",
        0.4,
        sum(cost(SYMMETRIC, 1e-6, "anderson")) / sum(runs[SYMMETRIC, 1e-6, s, "picard", BASELINE].calls for s in seeds),
        "x",
    )
    for solver, title in (("anderson", "Anderson, memory 10"), ("broyden", "Broyden")):
        target(
            f"nfe.{solver}.unstable",
            f"{title}: NFE at ρ 1.5 (tanh, D 128, rtol 1e-6), slowest sample of 32 on the worst map",
            "<=",
            120,
            max(cost(UNSTABLE, 1e-6, solver)),
            "calls",
        )
    target(
        "nfe.picard.unstable",
        "Share of maps with ρ 1.5 (tanh, D 128, rtol 1e-6) that Picard solves in 400 calls",
        "<=",
        0,
        statistics.fmean(math.isfinite(value) for value in cost(UNSTABLE, 1e-6, "picard")),
        "1",
    )
    best = [
        _excess(
            min(runs[key, rtol, seed, solver, BASELINE].cost for solver in solvers),
            min(runs[key, rtol, seed, solver, "torchdeq"].cost for solver in solvers),
        )
        for (key, rtol), seed in itertools.product(cases, seeds)
        if compared
    ]
    target(
        "nfe.best",
        "Evaluations that pydeq's best solver needs beyond torchdeq's best, on the worst map",
        "<=",
        0,
        max(best, default=None),
        "calls",
    )
    beyond = [
        _excess(runs[key, rtol, seed, solver, BASELINE].cost, runs[key, rtol, seed, "picard", BASELINE].cost)
        for (key, rtol), seed, solver in itertools.product(cases, seeds, ("anderson", "broyden"))
    ]
    target(
        "nfe.beyond_plain",
        "Evaluations that Anderson and Broyden need beyond plain iteration, on the worst map",
        "<=",
        1,
        max(beyond),
        "calls",
    )


def _excess(cost: float, other: float) -> float:
    """cost - other; 0 if neither converged."""
    return 0.0 if cost == other else cost - other
