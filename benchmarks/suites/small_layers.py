"""The cost of a small layer compared with a loop written by hand: the fixed cost of every solve.

The loop makes the same evaluations and the same products with the Jacobian as the layer, and nothing else: no Anderson
mixing, no norms, no checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import pydeq
from benchmarks.problems.dense import DenseCell
from benchmarks.results import number, times
from benchmarks.suites.base import BASELINE, Context
from benchmarks.timing import alternate, ratios, spread, threads

BATCH, WIDTH, RADIUS = 4, 16, 0.05  # so contractive that few evaluations are enough
TURNS = 20  # of each side, for each training step that a profile measures
STEP_LIMIT, SOLVE_LIMIT = 1.5, 0.1  # times the loop's time; ms


def measure(context: Context) -> None:
    """Measure a training step and a solve of a small layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell, x = DenseCell(WIDTH, RADIUS), torch.randn(BATCH, WIDTH)
        weights = torch.randn(BATCH, WIDTH)
    z0 = torch.zeros(BATCH, WIDTH)
    deq = pydeq.DEQ(cell)
    z, solution = deq(z0, x, return_solution=True)
    (z * weights).sum().backward()
    evaluations, products = solution.nfe, solution.backward.nfe

    def evaluate() -> Tensor:
        z = z0
        with torch.no_grad():
            for _ in range(evaluations):
                z = cell(z, x)
        return z

    def step() -> None:
        cell.zero_grad()
        (deq(z0, x) * weights).sum().backward()

    def loop() -> None:
        cell.zero_grad()
        _loop(cell, evaluate(), x, weights, products)

    sides = {BASELINE: step, "loop": loop, "solve": lambda: pydeq.fixed_point(cell, z0, x), "evaluations": evaluate}
    with threads(1):
        measured = alternate(
            {name: _timed(side) for name, side in sides.items()}, TURNS * context.profile.training_repeats, warmup=TURNS
        )
    results = context.results
    ratio = ratios(measured[BASELINE], measured["loop"])
    fixed = spread([1e3 * (a - b) for a, b in zip(measured["solve"], measured["evaluations"], strict=True)])
    for name in (BASELINE, "loop"):
        results.figure(f"overhead.small.step.{name}", spread(measured[name]).scaled(1e3), "ms")
    results.figure("overhead.small.step.pydeq_over_loop", ratio, "1")
    results.figure("overhead.small.solve", fixed, "ms")
    results.target(
        "overhead.small.step",
        f"A training step of tanh(Wz + x), ({BATCH}, {WIDTH}): its time over that of a loop written by hand",
        "<=",
        STEP_LIMIT,
        ratio.median,
        "x",
    )
    results.target(
        "overhead.small.solve",
        f"A solve of tanh(Wz + x), ({BATCH}, {WIDTH}), {evaluations} evaluations: its time without that of f",
        "<=",
        SOLVE_LIMIT,
        fixed.median,
        "ms",
    )
    step_ms, loop_ms = (spread(measured[name]).median * 1e3 for name in (BASELINE, "loop"))
    results.table(
        "overhead",
        f"A small layer, tanh(Wz + x), ({BATCH}, {WIDTH}), float32, one thread",
        ("training step, ms", "loop by hand, ms", "ratio", "quartiles", "solve without f, ms"),
        [
            (
                number(step_ms),
                number(loop_ms),
                times(ratio.median),
                f"{number(ratio.low)} to {number(ratio.high)}",
                number(fixed.median),
            )
        ],
        f"{evaluations} evaluations forward and {products} products backward on both sides.",
    )


def _loop(cell: DenseCell, solution: Tensor, x: Tensor, weights: Tensor, products: int) -> None:
    """Backward at a fixed point: u = J^T u + v by plain iteration, then the gradients of the parameters."""
    z = solution.requires_grad_()
    y = cell(z, x)
    output = y.detach().requires_grad_()
    (output * weights).sum().backward()
    v = u = output.grad
    assert v is not None
    for _ in range(products):
        u = torch.autograd.grad(y, z, u, retain_graph=True)[0] + v
    y.backward(u)


def _timed(side: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    return measure
