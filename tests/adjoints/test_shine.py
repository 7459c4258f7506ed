"""Shine: what it makes of the forward solve, what it costs, and how close it comes."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import pydeq
from pydeq import Broyden, Implicit, JacobianFree, Shine
from pydeq.solve.solve import solve_keeping_workspace
from pydeq.testing import tanh_map


class CountedVJP(torch.autograd.Function):
    """The identity; counts how often it is differentiated."""

    count = 0

    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, v):
        CountedVJP.count += 1
        return v


def gradient(adjoint, problem, v, rtol=1e-6, max_steps=50):
    """The gradient of <z, v> with respect to the context, and the solution."""
    (x,) = problem.context
    x = x.clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=Broyden(), adjoint=adjoint, rtol=rtol, max_steps=max_steps)
    z, solution = deq(problem.z0, x, return_solution=True)
    return torch.autograd.grad((z * v).sum(), x)[0], solution


def cotangent(problem, seed=7):
    return torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(seed), dtype=problem.z0.dtype)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_the_cotangent_is_the_transposed_inverse_of_the_forward_solve():
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    v = cotangent(problem)
    actual, solution = gradient(Shine(), problem, v)
    _, workspace = solve_keeping_workspace(problem.fn, problem.z0, problem.context, solver=Broyden(), rtol=1e-6)
    u = workspace.inverse_jacobian().transpose_product(v)
    z = problem.fn(solution.image, *problem.context)
    torch.testing.assert_close(actual, u * (1.0 - z.square()), rtol=1e-12, atol=1e-13)  # tanh' times u
    assert solution.backward is None


@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0, math.inf])
def test_the_correction_is_limited_per_sample(limit):
    # J^T is far from normal: N^T v - v is longer than v for some samples, and shorter for others.
    problem = tanh_map(1.5, 10, dtype=torch.float64)
    v = cotangent(problem)
    actual, solution = gradient(Shine(limit=limit), problem, v, rtol=1e-6)
    _, workspace = solve_keeping_workspace(problem.fn, problem.z0, problem.context, solver=Broyden(), rtol=1e-6)
    correction = workspace.inverse_jacobian().transpose_product(v) - v
    ratios = correction.norm(dim=1) / v.norm(dim=1)
    if 0.0 < limit < math.inf:
        assert ratios.min() < 1.0 < ratios.max() or limit < 1.0
    expected = v + torch.clamp(limit / ratios, max=1.0)[:, None] * correction
    z = problem.fn(solution.image, *problem.context)
    torch.testing.assert_close(actual, expected * (1.0 - z.square()), rtol=1e-11, atol=1e-12)


def test_without_a_correction_it_is_jacobian_free():
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    v = cotangent(problem)
    assert torch.equal(gradient(Shine(limit=0.0), problem, v)[0], gradient(JacobianFree(), problem, v)[0])


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_after_one_evaluation_it_is_jacobian_free():
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    v = cotangent(problem)
    one, _ = gradient(Shine(), problem, v, max_steps=1)
    other, _ = gradient(JacobianFree(), problem, v, max_steps=1)
    assert torch.equal(one, other)


@pytest.mark.parametrize("refine_steps", [0, 1, 3])
def test_costs_one_evaluation_and_no_more_products_than_asked_for(refine_steps):
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    calls = 0

    def fn(z, x):
        nonlocal calls
        calls += 1
        return problem.fn(CountedVJP.apply(z), x)

    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(fn, solver=Broyden(), adjoint=Shine(refine_steps=refine_steps, rtol=0.0), rtol=1e-6)
    z, solution = deq(problem.z0, x, return_solution=True)
    assert calls == solution.nfe + 1
    CountedVJP.count = 0
    z.sum().backward()
    # The last pass through the cell's own graph does not ask for the cotangent of z, which is a leaf there, but
    # forms it along the way.
    assert CountedVJP.count <= refine_steps + 1
    assert calls == solution.nfe + 1
    assert (0 if solution.backward is None else solution.backward.nfe) == refine_steps


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_the_error_is_below_that_of_jacobian_free(rho, rtol):
    """For random cotangents, which is where the forward solve has learned the least: on average over batches of six
    samples of eight maps clearly, and for nearly every map."""
    shine, free = [], []
    for seed in range(8):
        problem = tanh_map(rho, 24, batch=6, dtype=torch.float64, seed=seed)
        v = cotangent(problem, seed)
        exact, _ = gradient(Implicit(rtol=1e-12, max_steps=100), problem, v, rtol)
        shine.append(error(gradient(Shine(), problem, v, rtol)[0], exact))
        free.append(error(gradient(JacobianFree(), problem, v, rtol)[0], exact))
    shine, free = torch.tensor(shine), torch.tensor(free)
    assert shine.mean() < 0.95 * free.mean()
    assert int((shine < free).sum()) >= 7


def test_the_error_is_below_that_of_jacobian_free_on_a_trained_layer():
    generator = torch.Generator().manual_seed(0)
    cell = nn.Linear(12, 12, dtype=torch.float64)
    with torch.no_grad():
        cell.weight.copy_(0.2 * torch.randn(12, 12, generator=generator, dtype=torch.float64))
        cell.bias.zero_()
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    target = 0.8 * torch.randn(16, 12, generator=generator, dtype=torch.float64).tanh()
    z0 = torch.zeros_like(x)

    def loss_of(adjoint, rtol=1e-8):
        deq = pydeq.DEQ(lambda z, x: torch.tanh(cell(z) + x), solver=Broyden(), adjoint=adjoint, rtol=rtol)
        return (deq(z0, x) - target).square().mean()

    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    before = loss_of(Shine()).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(Shine()).backward()
        optimizer.step()
    assert loss_of(Shine()).item() < 0.8 * before
    exact, shine, free = (
        torch.autograd.grad(loss_of(adjoint), cell.weight)[0]
        for adjoint in (Implicit(rtol=1e-12, max_steps=100), Shine(), JacobianFree())
    )
    assert error(shine, exact) < error(free, exact)


def test_refinement_converges_to_the_implicit_gradient():
    problem = tanh_map(0.8, 16, dtype=torch.float64)
    v = cotangent(problem)
    exact, _ = gradient(Implicit(rtol=1e-13, max_steps=200), problem, v, rtol=1e-12, max_steps=100)
    errors = [
        error(gradient(Shine(refine_steps=k, rtol=1e-13), problem, v, rtol=1e-12, max_steps=100)[0], exact)
        for k in (0, 2, 5, 60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_refinement_takes_fewer_products_than_a_solve_from_scratch():
    problem = tanh_map(0.9, 32, dtype=torch.float64)
    v = cotangent(problem)
    _, refined = gradient(Shine(refine_steps=50, rtol=1e-6), problem, v)
    _, solved = gradient(Implicit(solver=Broyden(), rtol=1e-6), problem, v)
    assert bool(refined.backward.converged.all())
    assert refined.backward.nfe < solved.backward.nfe


@pytest.mark.parametrize("refine_steps", [0, 2])
def test_tuple_states(refine_steps):
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    v, x = cotangent(problem), problem.context[0].clone().requires_grad_()

    def pair(z, x):
        y = problem.fn(torch.cat([z[0], z[1].flatten(1)], 1), x)
        return y[:, :4], y[:, 4:].unflatten(1, (2, 3))

    z0 = (problem.z0[:, :4], problem.z0[:, 4:].unflatten(1, (2, 3)))
    adjoint = Shine(refine_steps=refine_steps)
    a, b = pydeq.DEQ(pair, solver=Broyden(), adjoint=adjoint, rtol=1e-6)(z0, x)
    (actual,) = torch.autograd.grad((torch.cat([a, b.flatten(1)], 1) * v).sum(), x)
    expected, _ = gradient(adjoint, problem, v)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_states(dtype):
    problem = tanh_map(0.6, 16, dtype=torch.float64)
    half = tanh_map(0.6, 16, dtype=dtype)
    v = cotangent(problem)
    exact, _ = gradient(Implicit(rtol=1e-10), problem, v)
    shine, _ = gradient(Shine(), half, v.to(dtype), rtol=1e-2)
    free, _ = gradient(JacobianFree(), half, v.to(dtype), rtol=1e-2)
    assert shine.dtype == dtype
    assert error(shine.double(), exact) < error(free.double(), exact)


def test_a_nonfinite_cotangent_stays_with_its_sample():
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    v = cotangent(problem)
    clean, _ = gradient(Shine(), problem, v)
    v[1, 3] = torch.inf
    spoiled, _ = gradient(Shine(), problem, v)
    assert not spoiled[1].isfinite().any()
    torch.testing.assert_close(spoiled[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-12, atol=1e-14)


def test_frozen_everything_gives_no_graph():
    problem = tanh_map(0.7, 10)
    assert not pydeq.DEQ(problem.fn, solver=Broyden(), adjoint=Shine())(problem.z0, *problem.context).requires_grad


def test_a_second_derivative_is_refused():
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    x = problem.context[0].clone().requires_grad_()
    z = pydeq.DEQ(problem.fn, solver=Broyden(), adjoint=Shine())(problem.z0, x)
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_memory_of_the_solve_goes_with_the_graph():
    """Not later than backward, though the output still lives; and not later than the output without a backward."""
    problem = tanh_map(0.7, 10, dtype=torch.float64)
    kept = []

    class Kept:
        """What autograd keeps of one tensor."""

        def __init__(self, tensor):
            self.tensor = tensor.detach()  # else a saved output would keep its own graph
            kept.append(weakref.ref(self))

    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=Broyden(), adjoint=Shine(), rtol=1e-6)
    gc.disable()
    try:
        for backward in (True, False):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                z, solution = deq(problem.z0, x, return_solution=True)
                loss = z.sum()
            assert sum(ref() is not None for ref in kept) > solution.nfe  # a step for every evaluation but one
            if backward:
                loss.backward()
            else:
                del z, loss
            assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_another_solver_is_refused():
    with pytest.raises(TypeError, match=r"Shine needs pydeq.Broyden as the solver, got Anderson\("):
        pydeq.DEQ(lambda z: z, adjoint=Shine())
    deq = pydeq.DEQ(lambda z, x: 0.5 * z + x, solver=Broyden(), adjoint=Shine())
    deq.solver = pydeq.Picard()
    with pytest.raises(TypeError, match=r"Shine needs pydeq\.Broyden"):
        deq(torch.zeros(2, 3), torch.ones(2, 3, requires_grad=True))


def test_a_restart_is_refused():
    problem = tanh_map(0.9, 12, dtype=torch.float64)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=Broyden(memory=3), adjoint=Shine(), rtol=1e-9)
    with pytest.raises(RuntimeError, match="Broyden's memory of 3 was full and restarted; raise its memory to 48"):
        deq(problem.z0, x)
    assert deq(problem.z0, x, rtol=0.5).requires_grad  # over before the memory was full


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"refine_steps": -1}, ValueError, "refine_steps must be at least 0, got -1"),
        ({"refine_steps": 1.0}, TypeError, "refine_steps must be an int, got float"),
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0, got -1.0"),
        ({"tol": 1e-3}, TypeError, "did you mean 'rtol'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Shine(**arguments)
