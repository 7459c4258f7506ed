"""Anderson mixing against its definition, and where it becomes another method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import Anderson, Picard
from pydeq.testing import assert_close, assert_identical, linear_map, softsign_map, tanh_map


def iterates(problem, solver, count, **options):
    seen = []

    def fn(z, *context):
        seen.append(z.clone())
        return problem.fn(z, *context)

    ran = {"rtol": 0.0, "stall": False, **options}
    pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, max_steps=count, **ran)
    return seen


def dense_anderson(fn, z, memory, damping, ridge, count):
    """Anderson mixing of one sample from its definition, in float64: the iterates, [count, D]."""
    images, residuals, seen = [], [], []
    for _ in range(count):
        seen.append(z)
        images, residuals = [*images, fn(z)][-memory:], [*residuals, fn(z) - z][-memory:]
        G = torch.stack(residuals, dim=1)
        scale = 1.0 / G.norm(dim=0)  # of columns, for the condition of the system
        system = scale[:, None] * (G.T @ G) * scale + ridge * torch.eye(G.shape[1], dtype=G.dtype)
        a = scale * torch.linalg.solve(system, scale)
        a = a / a.sum()
        z = sum(c * (f - (1.0 - damping) * g) for c, f, g in zip(a, images, residuals, strict=True))
    return torch.stack(seen)


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_equals_its_definition(memory, damping, ridge):
    problem = tanh_map(0.9, 30, batch=3, dtype=torch.float64)
    solver = Anderson(memory=memory, damping=damping, ridge=ridge)
    seen = torch.stack(iterates(problem, solver, 10), dim=1)
    for b in range(3):
        one = problem.rows([b])
        expected = dense_anderson(
            lambda z, one=one: one.fn(z[None], *one.context)[0], one.z0[0], memory, damping, ridge, 10
        )
        assert_close(seen[b], expected, size=30, condition=1.0 / ridge)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_memory_1_is_picard(dtype):
    problem = softsign_map([0.3, 0.9, 1.5], 33, dtype=dtype)
    for freeze in (True, False):
        options = {"rtol": 1e-4, "max_steps": 30, "trace": True, "freeze": freeze}
        assert_identical(problem.solve(solver=Anderson(memory=1), **options), problem.solve(solver=Picard(), **options))


def test_memory_1_with_damping_is_damped_picard():
    problem = softsign_map(0.9, 33, dtype=torch.float64)
    one = iterates(problem, Anderson(memory=1, damping=0.3), 10)
    other = iterates(problem, Picard(damping=0.3), 10)
    for here, there in zip(one, other, strict=True):
        assert_close(here, there, condition=10.0)


def test_memory_2_is_the_secant_method_on_scalars():
    """... for f(z) - z = 0, up to the ridge, without which two columns of one entry are dependent."""
    z0 = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    seen = []

    def fn(z):
        seen.append(z.clone())
        return torch.cos(z)

    pydeq.fixed_point(fn, z0, solver=Anderson(memory=2, ridge=1e-9), rtol=0.0, max_steps=5, stall=False)
    for older, newer, got in zip(seen, seen[1:], seen[2:], strict=False):
        g_old, g_new = older.cos() - older, newer.cos() - newer
        assert_close(got, newer - g_new * (newer - older) / (g_new - g_old), condition=1e9)


def test_the_ridge_is_relative():
    """An absolute ridge turns Anderson into averaging once residuals are small: here they are of 1e-3."""
    problem = linear_map(0.9, 50, dtype=torch.float64)
    z0, x = problem.z0, 1e-3 * problem.context[0]
    solution = pydeq.fixed_point(problem.fn, z0, x, solver=Anderson(), rtol=1e-12, max_steps=500)
    large = problem.solve(solver=Anderson(), rtol=1e-12, max_steps=500)
    plain = problem.solve(solver=Picard(), rtol=1e-12, max_steps=500)
    assert solution.converged.all()
    assert abs(solution.nfe - large.nfe) <= 0.1 * large.nfe
    assert solution.nfe < 0.6 * plain.nfe


@given(memory=st.integers(1, 6), seed=st.integers(0, 100), dim=st.integers(1, 4))
def test_more_columns_than_dimensions(memory, seed, dim):
    """Residuals of D entries are dependent from column D + 1 on: the ridge keeps the system solvable."""
    problem = softsign_map([0.5, 0.9], dim, dtype=torch.float64, seed=seed)
    solution = problem.solve(solver=Anderson(memory=memory), rtol=1e-8, max_steps=300)
    assert solution.converged.all()


def test_without_a_ridge_dependent_columns_are_dropped():
    problem = softsign_map([0.5, 0.9], 2, dtype=torch.float64)
    solution = problem.solve(solver=Anderson(memory=8, ridge=0.0), rtol=1e-10, max_steps=200)
    assert solution.converged.all()


def test_a_memory_beyond_the_steps_costs_nothing():
    problem = softsign_map(0.9, 9)
    assert_identical(
        problem.solve(solver=Anderson(memory=10**6), max_steps=8, rtol=1e-6),
        problem.solve(solver=Anderson(memory=8), max_steps=8, rtol=1e-6),
    )
