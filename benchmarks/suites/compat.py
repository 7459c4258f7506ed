"""The same user code under torchdeq and under pydeq's replacement for it: time, calls of f, residuals."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor

import pydeq.compat.torchdeq
from benchmarks.problems.base import Problem
from benchmarks.problems.convolution import convolutional
from benchmarks.problems.maps import diagonal, tanh_map
from benchmarks.results import number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import Counted, alternate, ratios, spread, threads

ORIGINAL = "torchdeq"
SOLVERS = ("fixed_point_iter", "anderson", "broyden")
TOL, MAX_ITER = 1e-4, 60
# Residuals are compared after this number of calls of f.
CALLS = 12


def run(context: Context) -> None:
    sides: dict[str, ModuleType] = {BASELINE: pydeq.compat.torchdeq}
    if ORIGINAL in context.peers:
        sides[ORIGINAL] = importlib.import_module(ORIGINAL)
    cheap = [diagonal(32, 512), diagonal(8, 8192)]
    problems = [*cheap, tanh_map(128, 0.95, 0), tanh_map(1024, 0.8, 0), convolutional(0)]
    context.bar.start(len(problems) * len(SOLVERS) + len(SOLVERS))
    rows, slowest = [], {True: [], False: []}
    with threads(1), torch.no_grad():
        for problem in problems:
            for solver in SOLVERS:
                context.bar.show(f"{problem.key}, {solver}")
                row, ratio = _solve(context, sides, problem, solver)
                rows.append(row)
                if ratio is not None:
                    slowest[problem in cheap].append(ratio)
                context.bar.advance()
    with threads(1):
        for solver in SOLVERS:
            context.bar.show(f"training step, {solver}")
            row, ratio = _train(context, sides, solver)
            rows.append(row)
            if ratio is not None:
                slowest[False].append(ratio)
            context.bar.advance()
    names = tuple(sides)
    context.results.table(
        "compat",
        f"The same code with torchdeq and with its replacement, to a residual of {TOL:g}",
        (
            "problem",
            "solver",
            *(f"{name}, ms" for name in names),
            f"{ORIGINAL} / {BASELINE}",
            *(f"{name} NFE" for name in names),
            *(f"{name} residual" for name in names),
            *(f"{name} residual after {CALLS}" for name in names),
        ),
        rows,
        "f counts its calls. Residual: the largest ||f(z) - z|| of the state handed on, evaluated afterwards."
        " The training step is forward, implicit differentiation and backward of tanh(Wz + x), D 512. Diagonal maps,"
        " a z + x, are where f is cheap.",
    )
    every = slowest[True] + slowest[False]
    target = context.results.target
    target(
        "compat.cheap",
        "Replacement of torchdeq: solves where f is cheap, (32, 512)",
        ">=",
        5.0,
        min(slowest[True][: len(SOLVERS)], default=None),
        "x",
    )
    target(
        "compat.never_slower",
        "Replacement of torchdeq: every solve and training step",
        ">=",
        1.0,
        min(every, default=None),
        "x",
    )


def _solve(
    context: Context, sides: Mapping[str, ModuleType], problem: Problem, solver: str
) -> tuple[tuple[str, ...], float | None]:
    """One row of the table, and how many times faster the replacement is."""
    options = {"max_iter": MAX_ITER, "tol": TOL}
    key = f"compat.{problem.key}.{solver}"
    calls, reached, after = {}, {}, {}
    for name, module in sides.items():
        fn = Counted(problem.fn)
        z = module.get_solver(solver)(fn, problem.z0, **options)[0]
        calls[name], reached[name] = fn.calls, _residual(problem, z)
        steps = CALLS - 1 if solver == "broyden" else CALLS  # which does not count its first call
        z = module.get_solver(solver)(problem.fn, problem.z0, max_iter=steps, tol=0.0)[0]
        after[name] = _residual(problem, z)
        context.results.figure(f"{key}.{name}.calls", calls[name], "calls")
        context.results.figure(f"{key}.{name}.residual", reached[name], "1")
        context.results.figure(f"{key}.{name}.residual_after{CALLS}", after[name], "1")
    clock = {
        name: _timed(lambda module=module: module.get_solver(solver)(problem.fn, problem.z0, **options))
        for name, module in sides.items()
    }
    return _row(context, key, problem.title, solver, clock, (calls, reached, after))


def _train(context: Context, sides: Mapping[str, ModuleType], solver: str) -> tuple[tuple[str, ...], float | None]:
    """One row of training steps, and how many times faster the replacement is."""
    problem = tanh_map(512, 0.8, 0)
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    weight = (0.8 * weight / torch.linalg.eigvals(weight).abs().max()).requires_grad_()
    options = {"f_max_iter": MAX_ITER, "f_tol": 1e-3, "f_stop_mode": "rel", "b_max_iter": MAX_ITER, "b_tol": 1e-4}
    calls: dict[str, float] = {}

    def step(module: ModuleType, fn: Callable[[Tensor], Tensor]) -> None:
        deq = module.get_deq(core="indexing", ift=True, f_solver=solver, b_solver=solver, b_stop_mode="rel", **options)
        states, _ = deq(fn, problem.z0)
        weight.grad = None
        states[-1].square().mean().backward()

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + 1.0)

    for name, module in sides.items():
        counted = Counted(fn)
        step(module, counted)
        calls[name] = counted.calls
        context.results.figure(f"compat.training.{solver}.{name}.calls", counted.calls, "calls")
    clock = {name: _timed(lambda module=module: step(module, fn)) for name, module in sides.items()}
    return _row(context, f"compat.training.{solver}", "training step", solver, clock, (calls, {}, {}))


def _row(
    context: Context,
    key: str,
    title: str,
    solver: str,
    clock: Mapping[str, Callable[[], float]],
    others: tuple[Mapping[str, float], ...],
) -> tuple[tuple[str, ...], float | None]:
    measured = alternate(clock, context.profile.compat_repeats, warmup=2, seconds=1.0)
    for name, values in measured.items():
        context.results.figure(f"{key}.{name}.time", spread(values).scaled(1e3), "ms")
    ratio = None
    if ORIGINAL in measured:
        found = ratios(measured[ORIGINAL], measured[BASELINE])
        context.results.figure(f"{key}.{ORIGINAL}_over_{BASELINE}", found, "x")
        ratio = found.median
    cells = [number(spread(values).median * 1e3) for values in measured.values()]
    for values in others:
        cells += [number(values.get(name)) for name in measured]
    return (title, solver, *cells[: len(measured)], times(ratio), *cells[len(measured) :]), ratio


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def _residual(problem: Problem, z: Tensor) -> float:
    return (problem.fn(z) - z).flatten(1).norm(dim=1).max().item()
