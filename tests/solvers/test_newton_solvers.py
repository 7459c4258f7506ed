"""What holds for NewtonKrylov and TrustRegion alike: samples, states, layers, derivatives of few kinds, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

import pydeq
from pydeq import NewtonKrylov, Status, TrustRegion
from pydeq.testing import CallCounter, assert_close, assert_identical, softsign_map, tanh_map

DOUBLE = torch.float64
ALL = (NewtonKrylov(mode="jvp"), NewtonKrylov(mode="difference"), TrustRegion("vjp"), TrustRegion("difference"))
every_solver = pytest.mark.parametrize("solver", ALL, ids=str)
each_class = pytest.mark.parametrize("solver", [NewtonKrylov(), TrustRegion()], ids=str)
RATES = [0.5, 1.5, 3.0, 6.0, 0.9]


def calls_beside(solver, solution, entries):
    """How often products, or Jacobians, called fn."""
    if solver.mode == "difference":
        return solution.products
    return solution.products // (1 + entries) if isinstance(solver, TrustRegion) else 0


# Samples


@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sample_does_not_depend_on_its_batch(solver, dtype):
    problem = softsign_map(RATES, 17, dtype=dtype)
    ran = {"solver": solver, "rtol": 1e-5, "max_steps": 60}
    solution = problem.solve(**ran)
    assert solution.converged.all()
    assert len(solution.sample_nfe.unique()) > 1  # they are at different places of their searches
    for rows in ([0], [3], [4, 1], [2, 0, 3]):
        assert_identical(problem.rows(rows).solve(**ran), solution, rows)


@every_solver
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_their_sample(solver, value):
    problem = softsign_map(RATES, 9, dtype=DOUBLE)
    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 60}
    others = problem.rows([0, 2]).solve(**ran)
    added = torch.zeros(5, 1, dtype=DOUBLE)
    added[1] = value
    solution = pydeq.fixed_point(lambda z, *x: problem.fn(z, *x) + added, problem.z0, *problem.context, **ran)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, *[Status.CONVERGED] * 3]
    assert_identical(others, solution, [0, 2])
    assert torch.equal(solution.value[1], problem.z0[1])


def exponential(seen):
    """z + exp(z) - 1, which appends the points of its evaluations; from -4 the Newton step leads to 49.6."""

    def fn(z):
        seen.append(float(z.detach()))
        return z + torch.exp(z) - 1.0

    return fn, torch.full((1, 1), -4.0, dtype=DOUBLE)


@each_class
def test_a_trial_far_beyond_the_first_residual_is_taken_back(solver):
    seen: list[float] = []
    fn, z0 = exponential(seen)
    solution = pydeq.fixed_point(fn, z0, solver=solver, rtol=0.0, atol=1e-8, max_steps=200)
    assert math.exp(max(seen)) > 1e6 * 1e6
    assert solution.converged.all()
    assert abs(float(solution.value)) <= 1.1e-8


@pytest.mark.parametrize("solver", [NewtonKrylov(), TrustRegion()], ids=str)
def test_a_last_trial_far_beyond_the_first_residual_is_no_divergence(solver):
    seen: list[float] = []
    fn, z0 = exponential(seen)
    solution = pydeq.fixed_point(fn, z0, solver=solver, rtol=0.0, atol=1e-8, max_steps=2)
    assert math.exp(seen[-1]) > 1e6 * 1e6
    assert solution.status.tolist() == [Status.MAX_STEPS]
    assert torch.equal(solution.value, z0)


@each_class
@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
def test_samples_that_depend_on_each_other_converge_together(solver):
    rate = torch.tensor([[0.1], [3.0]], dtype=DOUBLE)

    def fn(z):
        return rate * z + 1.0 + torch.stack([0.5 * z[1], 0.0 * z[1]])

    solution = pydeq.fixed_point(fn, torch.zeros(2, 1, dtype=DOUBLE), solver=solver, rtol=1e-6, max_steps=100)
    assert solution.converged.all()
    assert_close(solution.value, torch.tensor([[0.75 / 0.9], [-0.5]], dtype=DOUBLE), condition=1e11)


# States and options


@every_solver
def test_tuples_are_like_one_tensor(solver):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)

    def fn(z, x):
        y = problem.fn(torch.cat([z[0].flatten(1), z[1]], 1), x)
        return y[:, :8].reshape(-1, 2, 4), y[:, 8:]

    z0 = torch.zeros(4, 2, 4, dtype=DOUBLE), torch.zeros(4, 4, dtype=DOUBLE)
    ran = {"solver": solver, "rtol": 1e-9}
    solution, expected = pydeq.fixed_point(fn, z0, *problem.context, **ran), problem.solve(**ran)
    assert solution.products == expected.products
    assert torch.equal(solution.value[0].flatten(1), expected.value[:, :8])
    assert torch.equal(solution.value[1], expected.value[:, 8:])


@every_solver
def test_parts_of_different_scale(solver):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    scale = torch.where(torch.arange(12) < 6, 1.0, 1e-4).to(DOUBLE)

    def fn(z, x):
        y = scale * problem.fn(torch.cat(z, 1) / scale, x)
        return y[:, :6], y[:, 6:]

    z0 = torch.zeros(4, 6, dtype=DOUBLE), torch.zeros(4, 6, dtype=DOUBLE)
    counter = CallCounter(fn)
    solution = pydeq.fixed_point(counter, z0, *problem.context, solver=solver, rtol=1e-6, norm="parts")
    assert solution.converged.all()
    assert solution.nfe <= 20  # with a wrong scale of J these would be no Newton steps
    assert counter.calls == solution.nfe + calls_beside(solver, solution, 12)
    for value, image in zip(solution.value, fn(solution.value, *problem.context), strict=True):
        assert ((image - value).norm(dim=1) <= 1e-6 * image.norm(dim=1)).all()


@every_solver
def test_compaction_changes_nothing(solver):
    problem = softsign_map([0.1, 0.1, 6.0, 3.0], 9, dtype=DOUBLE)
    counter = CallCounter(problem.fn)
    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 60}
    solution = pydeq.fixed_point(
        counter, problem.z0, *problem.context, compact=True, batched_context=(True, True), **ran
    )
    assert min(counter.batches) < 4
    assert_identical(problem.solve(**ran), solution)


@each_class
def test_without_freezing(solver):
    problem = softsign_map([0.1, 3.0], 9, dtype=DOUBLE)
    ran = {"solver": solver, "rtol": 1e-8, "max_steps": 60}
    solution, frozen = problem.solve(freeze=False, **ran), problem.solve(**ran)
    assert solution.converged.all()
    assert torch.equal(solution.value, frozen.value)


@every_solver
def test_autocast(solver):
    problem = tanh_map(0.9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        solution = problem.solve(solver=solver)
    assert solution.converged.all()
    assert solution.value.dtype == torch.float32
    exact = problem.solve(solver=solver, rtol=1e-6)
    assert float((solution.value - exact.value).norm() / exact.value.norm()) < 0.1


@every_solver
@pytest.mark.parametrize("rates", [[0.9, 3.0], [3.0]])
def test_inference_mode_is_the_same(solver, rates):
    problem = softsign_map(rates, 9)
    expected = problem.solve(solver=solver)
    with torch.inference_mode():
        assert_identical(problem.solve(solver=solver), expected)


# Layers


class Cell(nn.Module):
    def __init__(self, dim, scale, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=DOUBLE)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.linear.weight, std=scale / dim**0.5)

    def forward(self, z, x):
        return self.dropout(torch.tanh(self.linear(z) + x))


@every_solver
def test_gradients_of_a_layer(solver):
    """By the adjoint, at a fixed point that plain iteration does not reach: the same as by a dense solve."""
    cell, x = Cell(8, 1.5), torch.randn(3, 8, dtype=DOUBLE, requires_grad=True)
    adjoint = pydeq.Implicit(pydeq.GMRES(), rtol=1e-10)
    deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-12)
    z, solution = deq(torch.zeros(3, 8, dtype=DOUBLE), x, return_solution=True)
    assert solution.converged.all()
    assert solution.products > 0
    weight = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((weight * z).sum(), x)
    for b in range(3):
        J = torch.func.jacrev(lambda z, b=b: cell(z, x[b].detach()))(z[b].detach())
        slope = torch.func.jacrev(lambda x, b=b: cell(z[b].detach(), x))(x[b].detach())
        expected = slope.T @ torch.linalg.solve((torch.eye(8, dtype=DOUBLE) - J).T, weight[b])
        assert_close(gradient[b], expected.detach(), condition=1e7)


@each_class
def test_dropout_with_replayed_random_numbers(solver):
    deq = pydeq.DEQ(Cell(8, 1.5, 0.3), solver=solver, rtol=1e-8, freeze_rng=True)
    z, solution = deq(torch.zeros(3, 8, dtype=DOUBLE), torch.randn(3, 8, dtype=DOUBLE), return_solution=True)
    assert solution.converged.all()
    assert (z == 0).any()


@each_class
def test_torch_func_through_a_layer(solver):
    cell = Cell(4, 1.5).requires_grad_(False)
    x = torch.randn(2, 4, dtype=DOUBLE)

    def loss(x, solver):
        adjoint = pydeq.Implicit(pydeq.GMRES(), rtol=1e-10)
        deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-11, max_steps=200)
        return deq(torch.zeros(2, 4, dtype=DOUBLE), x).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        gradient = transform(loss)(x, solver)
        assert_close(gradient, transform(loss)(x, pydeq.Broyden()), condition=1e7)


# What they refuse


@each_class
def test_an_adjoint_system_is_linear(solver):
    name = type(solver).__name__
    with pytest.raises(TypeError, match=rf"not be {name}, since the adjoint system is linear: use pydeq\.GMRES\(\)"):
        pydeq.Implicit(solver=solver)
    for adjoint in (pydeq.Shine(), pydeq.Unrolled()):
        with pytest.raises(TypeError, match=name):
            pydeq.DEQ(nn.Linear(3, 3), solver=solver, adjoint=adjoint)


@each_class
def test_ranks_that_solve_together(solver):
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            with pytest.raises(ValueError, match=r"does not work with process_group: .* use pydeq\.Broyden"):
                pydeq.fixed_point(
                    torch.cos, torch.ones(2, 3), solver=solver, process_group=dist.group.WORLD, sharded=sharded
                )
    finally:
        dist.destroy_process_group()
