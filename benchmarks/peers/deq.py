"""The two solvers of locuslab/deq (Bai, Kolter and Koltun 2021) in the form that users copied.

They are written here from a description: states (B, D, L), one norm and one best iterate for the whole batch, and the
residual on the host in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.calling import allowed, map_of, refusal_of_history, uniform
from benchmarks.peers.contender import Claim, Contender, Counts, Grids
from benchmarks.problems.base import Problem
from benchmarks.timing import Map


class _Lowest:
    """The best iterate of the batch, and the traces of its residuals."""

    def __init__(self, x0: Tensor, mode: str, shift: float) -> None:
        self.x, self.residual = x0, math.inf
        self.mode, self.shift = mode, shift
        self.traces: dict[str, list[float]] = {"abs": [], "rel": []}

    def add(self, x: Tensor, gx: Tensor) -> float:
        """Take f(x) - x into account; return the residual of the mode."""
        absolute = torch.norm(gx).item()
        relative = absolute / (torch.norm(gx + x).item() + self.shift)
        self.traces["abs"].append(absolute)
        self.traces["rel"].append(relative)
        residual = self.traces[self.mode][-1]
        if residual < self.residual:
            self.x, self.residual = x.clone().detach(), residual
        return residual


def anderson(
    f: Map, x0: Tensor, m: int, lam: float, threshold: int, eps: float, stop_mode: str, beta: float
) -> tuple[Tensor, float]:
    """Anderson mixing with an absolute ridge; the first two evaluations are not tested."""
    batch, d, length = x0.shape
    xs = torch.zeros(batch, m, d * length, dtype=x0.dtype, device=x0.device)
    fs = torch.zeros_like(xs)

    def image(x: Tensor) -> Tensor:
        return f(x.reshape(x0.shape)).reshape(batch, -1)

    xs[:, 0] = x0.reshape(batch, -1)
    fs[:, 0] = image(xs[:, 0])
    xs[:, 1] = fs[:, 0]
    fs[:, 1] = image(xs[:, 1])
    bordered = torch.zeros(batch, m + 1, m + 1, dtype=x0.dtype, device=x0.device)
    bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1
    right = torch.zeros(batch, m + 1, 1, dtype=x0.dtype, device=x0.device)
    right[:, 0] = 1
    lowest = _Lowest(x0, stop_mode, 1e-5)
    for k in range(2, threshold):
        n = min(k, m)
        g = fs[:, :n] - xs[:, :n]
        ridge = lam * torch.eye(n, dtype=x0.dtype, device=x0.device)
        bordered[:, 1 : n + 1, 1 : n + 1] = torch.bmm(g, g.transpose(1, 2)) + ridge
        alpha = torch.linalg.solve(bordered[:, : n + 1, : n + 1], right[:, : n + 1])[:, 1:, 0][:, None]
        row = k % m
        xs[:, row] = beta * (alpha @ fs[:, :n])[:, 0] + (1 - beta) * (alpha @ xs[:, :n])[:, 0]
        fs[:, row] = image(xs[:, row])
        if lowest.add(xs[:, row].view(x0.shape), (fs[:, row] - xs[:, row]).view(x0.shape)) < eps:
            break
    return lowest.x, lowest.residual


def broyden(f: Map, x0: Tensor, threshold: int, eps: float, stop_mode: str) -> tuple[Tensor, float]:
    """Good Broyden with unit steps; 2 ``threshold`` vectors are filled with zeros before the first one."""
    batch, d, length = x0.shape
    us = torch.zeros(batch, d, length, threshold, dtype=x0.dtype, device=x0.device)
    vs = torch.zeros(batch, threshold, d, length, dtype=x0.dtype, device=x0.device)
    x, gx = x0, f(x0) - x0
    update = gx
    lowest = _Lowest(x0, stop_mode, 1e-9)
    protection = (1e6 if stop_mode == "abs" else 1e3) * length
    for step in range(threshold):
        x = x + update
        gx_new = f(x) - x
        dx, dgx, gx = update, gx_new - gx, gx_new
        residual = lowest.add(x, gx)
        trace = lowest.traces[stop_mode]
        if residual < eps:
            break
        if residual < 3 * eps and step >= 30 and max(trace[-30:]) / min(trace[-30:]) < 1.3:
            break
        if residual > trace[0] * protection:
            break
        u, v = us[..., :step], vs[:, :step]
        row = -dx + torch.einsum("bk, bkdl -> bdl", torch.einsum("bdl, bdlk -> bk", dx, u), v)
        product = -dgx + torch.einsum("bdlk, bk -> bdl", u, torch.einsum("bkdl, bdl -> bk", v, dgx))
        column = (dx - product) / torch.einsum("bdl, bdl -> b", row, dgx)[:, None, None]
        row[row != row] = 0
        column[column != column] = 0
        vs[:, step], us[..., step] = row, column
        u, v = us[..., : step + 1], vs[:, : step + 1]
        update = gx - torch.einsum("bdlk, bk -> bdl", u, torch.einsum("bkdl, bdl -> bk", v, gx))
    return lowest.x, lowest.residual


@dataclass(frozen=True, kw_only=True)
class _Contender(Contender):
    """One of the two solvers.

    Tolerance: ``rel`` with rtol / sqrt(B), since it tests the norm of the whole batch. If the problem has an absolute
    tolerance, ``abs`` with the smallest residual that solves a sample.
    """

    solver: str
    library: str = "deq"

    def refusal(self, problem: Problem) -> str | None:
        history = refusal_of_history(problem) if self.solver == "broyden" else None
        return super().refusal(problem) or history

    def prepare(self, problem: Problem, tighten: float = 1.0, counts: Counts | None = None) -> Callable[[], Claim]:
        if problem.atol > 0.0:
            mode, tolerance = "abs", tighten * allowed(problem).min().item()
        else:
            mode, tolerance = "rel", tighten * problem.rtol / len(problem.z0) ** 0.5
        settings, shape, calls = self.settings, problem.z0.shape, problem.max_calls
        x0 = problem.z0.reshape(shape[0], -1, 1) if problem.z0.dim() < 3 else problem.z0.flatten(2)
        fn = map_of(problem, self.compiled, counts)

        def f(x: Tensor) -> Tensor:
            return fn(x.reshape(shape)).reshape(x.shape)

        @torch.no_grad()
        def solve() -> Claim:
            if self.solver == "broyden":
                value, lowest = broyden(f, x0, calls - 1, tolerance, mode, **settings)
            else:
                options = {"m": 6, "lam": 1e-4, "beta": 1.0, **settings}
                value, lowest = anderson(f, x0, threshold=calls, eps=tolerance, stop_mode=mode, **options)
            return uniform(value, lowest < tolerance, problem)

        return solve


# Those named ``best`` are chosen by ``python -m benchmarks.peers.search`` from GRIDS.
CONTENDERS: tuple[Contender, ...] = (
    _Contender(key="deq.anderson.default", title="Anderson", solver="anderson"),
    _Contender(key="deq.anderson.best", title="Anderson", solver="anderson", settings={"lam": 1e-8}),
    _Contender(
        key="deq.anderson.compiled.best",
        title="Anderson, compiled map",
        solver="anderson",
        settings={"lam": 1e-8},
        compiled=True,
    ),
    _Contender(key="deq.broyden", title="Broyden", solver="broyden"),
    _Contender(key="deq.broyden.compiled", title="Broyden, compiled map", solver="broyden", compiled=True),
)

GRIDS: Grids = {
    "deq.anderson": [
        {"m": m, "lam": lam, "beta": beta} for m in (6, 3, 10) for lam in (1e-4, 1e-8) for beta in (1.0, 0.5)
    ],
}
