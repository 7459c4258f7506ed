"""Broyden's method with a line search for each sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pydeq
from pydeq import Broyden, Status
from pydeq.ops.termination import Rules
from pydeq.solvers.broyden_search import BroydenSearchWorkspace
from pydeq.testing import CallCounter, assert_close, assert_identical, softsign_map, tanh_map

DOUBLE = torch.float64
SEARCHING = Broyden(line_search=True)
TIGHT = {"rtol": 0.0, "atol": 1e-8, "max_steps": 100}


def brown_almost_linear(z):
    n = z.shape[1]
    return torch.cat([z[:, :-1] + z.sum(1, keepdim=True) - (n + 1), z.prod(1, keepdim=True) - 1.0], 1)


@pytest.mark.parametrize(
    ("function", "z0"),
    [
        (brown_almost_linear, torch.full((1, 10), 0.5, dtype=DOUBLE)),
        (torch.atan, torch.tensor([[3.0]], dtype=DOUBLE)),
        (torch.log, torch.tensor([[5.0], [0.1], [100.0]], dtype=DOUBLE)),
    ],
    ids=["brown_almost_linear", "arctangent", "logarithm"],
)
def test_roots_that_full_steps_miss(function, z0):
    def fn(z):
        return z + function(z)

    assert not pydeq.fixed_point(fn, z0, solver=Broyden(), **TIGHT).converged.all()
    solution = pydeq.fixed_point(fn, z0, solver=SEARCHING, **TIGHT)
    assert solution.converged.all()
    assert (function(solution.value).norm(dim=1) <= 1e-8).all()


@pytest.mark.parametrize("memory", [2, 5, 100])
def test_where_full_steps_reduce_the_residual_it_is_the_same_method(memory):
    problem = tanh_map(0.8, 32, dtype=DOUBLE)
    full = problem.solve(solver=Broyden(memory=memory), rtol=1e-8)
    solution = problem.solve(solver=Broyden(memory=memory, line_search=True), rtol=1e-8)
    assert solution.converged.all()
    assert torch.equal(solution.sample_nfe, full.sample_nfe)
    assert_close(solution.value, full.value, condition=1e5)


@pytest.mark.parametrize("memory", [2, 100])
def test_the_secant_condition(memory):
    """After a step s that changes g by y, N y = -s, for every length of the step; N by its factors, as a matrix."""
    problem = softsign_map([4.0, 7.0], 9, dtype=DOUBLE)
    workspace = BroydenSearchWorkspace(problem.z0, Rules(0.0, 0.0, 1e-16, True, False), 60, memory, "Broyden")
    shorter = checked = 0
    for k in range(40):
        base, residual, length = workspace.base.clone(), workspace.residual.clone(), workspace.length.clone()
        counts = workspace.count.clone()
        z = workspace.z[k % 2].clone()
        f = problem.fn(z, *problem.context)
        workspace.step(f, k)
        for b in range(2):
            n = int(workspace.count[b])
            if n == int(counts[b]) and n < memory:  # no update
                continue
            if not torch.equal(workspace.base[b], z[b]) or n == 0:
                continue
            N = torch.eye(9, dtype=DOUBLE)
            for s, w in zip(workspace.steps[:n], workspace.factors[:n], strict=True):
                N = N + torch.outer(w[b], s[b] @ N)
            step, y = z[b] - base[b], f[b] - z[b] - residual[b]
            shorter += int(length[b] < 1.0)
            if float(step.norm()) < 1e-4:  # y is mostly rounding
                continue
            if abs(float(step @ (N @ y)) / float(step @ step) + 1.0) > 1e-6:
                continue  # a damped update
            assert_close(N @ y, -step, condition=1e6)
            checked += 1
    assert checked > 10
    assert shorter > 3


def test_a_sample_does_not_depend_on_its_batch():
    problem = softsign_map([0.5, 1.5, 3.0, 6.0], 17, dtype=DOUBLE)
    counter = CallCounter(problem.fn)
    ran = {"solver": Broyden(memory=6, line_search=True), "rtol": 1e-5, "max_steps": 100}
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, **ran)
    assert counter.calls == solution.nfe <= 100
    assert solution.products == 0
    for rows in ([0], [3], [2, 1]):
        assert_identical(problem.rows(rows).solve(**ran), solution, rows)
    problem.context[0][1] = torch.nan
    spoiled = problem.solve(**ran)
    assert int(spoiled.status[1]) == Status.NONFINITE
    assert_identical(problem.rows([0, 2, 3]).solve(**ran), spoiled, [0, 2, 3])


def test_as_an_adjoint_solver():
    problem, x = tanh_map(0.9, 12, dtype=DOUBLE), torch.randn(4, 12, dtype=DOUBLE, requires_grad=True)
    gradients = []
    for solver in (SEARCHING, pydeq.GMRES()):
        deq = pydeq.DEQ(problem.fn, solver=SEARCHING, adjoint=pydeq.Implicit(solver, rtol=1e-11), rtol=1e-11)
        gradients.append(torch.autograd.grad(deq(problem.z0, x).square().sum(), x)[0])
    assert_close(*gradients, condition=1e7)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="line_search must be a bool, got int"):
        Broyden(line_search=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Shine needs pydeq\.Broyden without a line search"):
        pydeq.DEQ(nn.Linear(3, 3), solver=SEARCHING, adjoint=pydeq.Shine())
