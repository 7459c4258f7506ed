"""The first minute: check results, and time the smallest operations.

<solver> <path>   a solve on the GPU against one on the CPU: five steps in float64, and to its end in float32
half <path>       the same in bfloat16, to its end
captured <solver> a solve in a CUDA graph, replayed on other inputs, against solves of these
launch            an empty kernel: launched, waited for, and as a node of a graph
report            from the launch of a step until the host has its report
host              what the host does per iteration of a solve whose device work is less
step <solver>     a single step at the suite's shapes, replayed from a graph, compared with a copy of as many bytes
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import pydeq
from benchmarks.device import maps
from benchmarks.device.clock import DEVICE, capture, finished, median, replay_seconds, returned
from benchmarks.device.worker import Case, Row
from benchmarks.timing import Map
from pydeq.ops import kernels
from pydeq.ops.constants import Progress, Scalar
from pydeq.ops.termination import Rules, default_rtol
from pydeq.solve.step_reports import Pool
from pydeq.solvers import Solver
from pydeq.solvers.base import Workspace
from pydeq.testing import Problem, softsign_map

SOLVERS: dict[str, Solver] = {
    "picard": pydeq.Picard(),
    "anderson": pydeq.Anderson(),
    "broyden": pydeq.Broyden(),
    "gmres": pydeq.GMRES(),
}
# Entries of a sample that one block takes, a cluster, and only two launches.
PATHS = {"block": 700, "cluster": 20000, "split": 70001}
RATES = (0.0, 0.3, 0.6, 0.9)  # bounds of the samples' Jacobians

# Sums in another order, of the kernels and the references on a CPU, move these steps by 1e-16, an end by rtol / 100,
# and no count of calls. The map gives the same bits everywhere.
AFTER_5_STEPS = 1e-12

LAUNCHES = 1000
# (batch, entries) of a state whose steps take less of the device than of the host.
SMALL = (4, 512)
MEMORY = 6
STORED = 15  # steps in Broyden's history, the mean over a solve of 30
# solver -> the solver, steps before the one that is timed, vectors of D read and written per sample in one launch and
# in two: what the step must move there where every residual is the smallest so far.
STEPS_TIMED: dict[str, tuple[Solver, int, tuple[int, int]]] = {
    "anderson": (pydeq.Anderson(memory=MEMORY), MEMORY + 1, (2 * MEMORY + 3, 2 * MEMORY + 1 + 3)),
    "broyden": (pydeq.Broyden(memory=2 * STORED), STORED, (STORED + 2 + 3, 2 * STORED + 3 + 3)),
    "picard": (pydeq.Picard(), 2, (2 + 1, 3 + 1)),
}
STEPS_IN_A_GRAPH = 20


def cases() -> list[Case]:
    return [
        maps.environment(),
        Case("launch", launch, 15.0),
        *(Case(f"{name} {path}", lambda n=name, p=path: agreement(n, p)) for path in PATHS for name in SOLVERS),
        *(Case(f"half {path}", lambda p=path: half(p)) for path in PATHS),
        *(Case(f"captured {name}", lambda n=name: captured(n), 15.0) for name in ("anderson", "broyden")),
        Case("report", report, 15.0),
        Case("host", host, 15.0),
        *(Case(f"step {name}", lambda n=name: steps(n)) for name in STEPS_TIMED),
    ]


# Right


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Steps take this path: "block", "cluster" or "split"."""
    kernels.select_cuda_path(path)
    try:
        yield
    finally:
        kernels.select_cuda_path("auto")


def to_device(problem: Problem) -> Problem:
    """The problem with its tensors on the GPU; its map takes everything through context."""
    return Problem(problem.fn, problem.z0.to(DEVICE), tuple(entry.to(DEVICE) for entry in problem.context))


def agreement(name: str, path: str) -> Iterator[Row]:
    """Compare solves on a path with those on the CPU.

    Raises:
        ArithmeticError: If they differ by more than rounding errors, after the row with the difference.
    """
    solver, dim = SOLVERS[name], PATHS[path]
    with forced(path):
        problem = softsign_map(RATES, dim, dtype=torch.float64)
        ran = {"solver": solver, "rtol": 0.0, "max_steps": 5, "stall": False}
        steps = distance(to_device(problem).solve(**ran).image, problem.solve(**ran).image)
        end, row = to_the_end(solver, dim, torch.float32)
    yield {"error after 5 steps": steps, **row}
    if not (steps <= AFTER_5_STEPS and end):
        raise ArithmeticError(f"{name} on the path {path} differs from the CPU's: {row}, after 5 steps {steps:.3g}")


def half(path: str) -> Iterator[Row]:
    """Anderson's method in bfloat16.

    Raises:
        ArithmeticError: If the end differs from the CPU's, after the row with the difference.
    """
    with forced(path):
        end, row = to_the_end(SOLVERS["anderson"], PATHS[path], torch.bfloat16)
    yield row
    if not end:
        raise ArithmeticError(f"bfloat16 on the path {path} differs from the CPU's: {row}")


def to_the_end(solver: Solver, dim: int, dtype: torch.dtype) -> tuple[bool, Row]:
    """Solve on the GPU and on the CPU; return whether the results agree, and a row about them."""
    problem = softsign_map(RATES, dim, dtype=dtype)
    rtol = min(64 * torch.finfo(dtype).eps, default_rtol(dtype))
    ran = {"solver": solver, "rtol": rtol, "max_steps": 200}
    here, there = to_device(problem).solve(**ran), problem.solve(**ran)
    error = distance(here.image, there.image)
    calls = [int(solution.sample_nfe.max()) for solution in (here, there)]
    right = bool(here.converged.all()) and error <= rtol and abs(calls[0] - calls[1]) <= 2
    return right, {"error at the end": error, "calls here, on the CPU": calls}


def distance(actual: object, expected: object) -> float:
    """||actual - expected|| / ||expected||, in float64 on the CPU."""
    assert isinstance(actual, Tensor)
    assert isinstance(expected, Tensor)
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def captured(name: str) -> Iterator[Row]:
    """A solve of eight steps in a graph.

    Raises:
        ArithmeticError: If a replay gives other bits than a solve of the same input.
    """
    problem = to_device(softsign_map(RATES, PATHS["block"]))
    x, rates = problem.context
    static = x.clone()

    def solve(x: Tensor) -> Tensor:
        ran = {"solver": SOLVERS[name], "rtol": 0.0, "max_steps": 8, "stall": False}
        image = pydeq.fixed_point(problem.fn, problem.z0, x, rates, **ran).image
        assert isinstance(image, Tensor)
        return image

    replayed = capture(lambda: solve(static))
    for factor in (0.5, 2.0):
        static.copy_(factor * x)
        replayed.graph.replay()
        if not torch.equal(replayed.result, solve(factor * x)):
            raise ArithmeticError(f"a replay of {name} gives other bits than a solve")
    yield {"nodes": replayed.nodes, "us": replayed.seconds() * 1e6}


# Small


def empty() -> None:
    """Launch a kernel that does nothing."""
    torch.cuda._sleep(0)


def launch() -> Iterator[Row]:
    one = torch.zeros(1, device=DEVICE)

    def burst() -> None:
        for _ in range(LAUNCHES):
            empty()

    def operations() -> None:
        for _ in range(LAUNCHES):
            one.add_(1.0)

    yield {
        "launch us": median(finished(burst), 5) / LAUNCHES * 1e6,
        "launch and wait us": median(finished(empty), 200) * 1e6,
        "small operation us": median(finished(operations), 5) / LAUNCHES * 1e6,
        "graph node us": replay_seconds(empty, LAUNCHES) * 1e6,
        "graph of one and wait us": median(finished(capture(empty).graph.replay), 200) * 1e6,
    }


@functools.cache
def reports() -> Pool:
    """Memory for reports, as that of the package's own solves."""
    return Pool(kernels.allocate_pinned, kernels.has_reported)


def workspace_of(solver: Solver, z0: Tensor, steps: int) -> Workspace:
    """Make a solve's workspace: its steps report as in a solve, and its samples never stop."""
    rules = Rules(rtol=0.0, atol=0.0, eps=torch.finfo(z0.dtype).eps, freeze=False, stall=False)
    workspace = solver.start(z0, rules, steps)
    workspace.progress = reports().take().places[0]  # never given back
    return workspace


def report() -> Iterator[Row]:
    """Steps on an idle device: the time that a solve waits if nothing else is queued behind a step."""
    steps, fn, z0 = 300, *maps.on_device(*SMALL)
    workspace = workspace_of(pydeq.Picard(), z0, steps)
    reported = workspace.progress.numpy()
    launched, known, synchronized = [], [], []
    for k in range(steps):
        f = fn(workspace.z[k % 2])
        torch.cuda.synchronize()
        start = time.perf_counter()
        workspace.step(f, k)
        launched.append(time.perf_counter() - start)
        while reported[Progress.STEP] != k + 1:
            pass
        known.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        synchronized.append(time.perf_counter() - start)
    yield {
        "step's launch us": statistics.median(launched[steps // 3 :]) * 1e6,
        "report us": statistics.median(known[steps // 3 :]) * 1e6,
        "synchronized us": statistics.median(synchronized[steps // 3 :]) * 1e6,
    }


def host() -> Iterator[Row]:
    """Time per iteration, from solves of different lengths, without the map's own time on the host."""
    fn, z0 = maps.on_device(*SMALL)
    calls = (maps.CALLS, 3 * maps.CALLS)
    f = (median(returned(lambda: maps.repeat(fn, z0, calls[0])), 20)) / calls[0]
    yield {"f us": f * 1e6}
    for name, solver in SOLVERS.items():
        if name == "gmres":  # ends by itself on a map that is nearly linear
            continue
        seconds = [median(returned(lambda s=solver, c=c: _solve(fn, z0, s, c)), 20) for c in (1, *calls)]
        yield {
            "solver": name,
            "us per iteration": ((seconds[2] - seconds[1]) / (calls[1] - calls[0]) - f) * 1e6,
            "us of a solve of one call": seconds[0] * 1e6,
        }


def _solve(fn: Map, z0: Tensor, solver: Solver, calls: int) -> None:
    made = maps.run_all(fn, z0, solver, calls).nfe
    if made != calls:
        raise RuntimeError(f"a solve that never stops made {made} calls of {calls}")


# A single step


def steps(name: str) -> Iterator[Row]:
    for batch, dim in maps.SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if dim > 8192 else (torch.float32,):
            yield step_row(name, batch, dim, dtype)


def step_row(name: str, batch: int, dim: int, dtype: torch.dtype) -> Row:
    solver, before, vectors = STEPS_TIMED[name]
    step, reset = prepared_step(solver, before, batch, dim, dtype)
    both, alone = (capture(work, STEPS_IN_A_GRAPH) for work in (lambda: (reset(), step()), reset))
    seconds = max((both.seconds() - alone.seconds()) / STEPS_IN_A_GRAPH, 1e-9)
    launches = None
    if both.nodes is not None and alone.nodes is not None:
        launches = (both.nodes - alone.nodes) // STEPS_IN_A_GRAPH
    # Broyden keeps the steps of half states in float32.
    size = 4 if name == "broyden" else dtype.itemsize
    moved = vectors[0 if launches in (None, 1) else 1] * batch * dim * size
    source = torch.randn(max(1, moved // 8), device=DEVICE)
    target = torch.empty_like(source)
    copied = replay_seconds(lambda: target.copy_(source), STEPS_IN_A_GRAPH)
    return {
        "shape": [batch, dim],
        "dtype": str(dtype).removeprefix("torch."),
        "launches": launches,
        "us": seconds * 1e6,
        "MB": moved * 1e-6,
        "GB/s": moved / seconds * 1e-9,
        "copy us": copied * 1e6,
        "share of copy": copied / seconds,
    }


def prepared_step(solver: Solver, before: int, batch: int, dim: int, dtype: torch.dtype):
    """Make a function that takes a step with a full history, and a function that undoes its decisions.

    So in every step each residual is the smallest so far.
    """
    torch.manual_seed(0)
    z0 = torch.zeros(batch, dim, device=DEVICE, dtype=dtype)
    workspace = workspace_of(solver, z0, 4 * STORED)
    f = torch.empty_like(z0)
    for k in range(before + 1):
        torch.add(workspace.z[k % 2], torch.randn_like(z0), out=f)
        if k < before:
            workspace.step(f, k)
    workspace.scalars[:, Scalar.BEST] = torch.inf
    scalars, counters = workspace.scalars.clone(), workspace.counters.clone()
    # Broyden makes room for a step outside of it, and a graph must not: this call does.
    workspace.step(f, before)

    def reset() -> None:
        workspace.scalars.copy_(scalars)
        workspace.counters.copy_(counters)

    return (lambda: workspace.step(f, before)), reset
