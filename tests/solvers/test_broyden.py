"""Broyden in steps only against dense good Broyden, through restarts and vanishing denominators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import Broyden
from pydeq.ops.constants import DENOMINATOR_LIMIT
from pydeq.ops.termination import Rules
from pydeq.testing import Problem, assert_close, linear_map, softsign_map, tanh_map


def dense_broyden(fn, z, memory, count):
    """Good Broyden for g(z) = f(z) - z = 0 with unit steps from H = -I, restarted from the newest pair; in float64.

    H+ = H + theta (s - H y) s^T H / (||s||^2 (1 - theta + theta d)),  d = s^T H y / ||s||^2

    Returns:
        The iterates [count, D] and, for each update, (H, s, y, theta) after it.
    """
    seen, updates = [z], []
    identity = torch.eye(len(z), dtype=torch.float64)
    H, pairs, g = -identity, 0, fn(z) - z
    while len(seen) < count:
        s = -H @ g
        z = z + s
        previous, g = g, fn(z) - z
        y = g - previous
        if pairs == memory:
            H, pairs = -identity, 0
        squared = s @ s
        d = (s @ H @ y) / squared
        sign = -1.0 if d < 0 else 1.0
        theta = 1.0 if abs(d) >= DENOMINATOR_LIMIT else (1.0 - DENOMINATOR_LIMIT * sign) / (1.0 - d)
        H = H + theta * torch.outer(s - H @ y, s @ H) / (squared * (1.0 - theta + theta * d))
        pairs += 1
        seen.append(z)
        updates.append((H, s, y, theta))
    return torch.stack(seen), updates


def iterates(problem, memory, count):
    seen = []

    def fn(z, *context):
        seen.append(z.clone())
        return problem.fn(z, *context)

    pydeq.fixed_point(
        fn, problem.z0, *problem.context, solver=Broyden(memory=memory), rtol=0.0, max_steps=count, stall=False
    )
    return torch.stack(seen, dim=1)


def assert_equals_dense(problem, memory, count, limit=1e-8):
    """Agreement up to the step where rounding has been amplified to ``limit`` of the dense method's own digits."""
    seen = iterates(problem, memory, count)
    thetas = []
    for b in range(len(problem.z0)):
        one = problem.rows([b])
        expected, updates = dense_broyden(
            lambda z, one=one: one.fn(z[None], *one.context)[0], one.z0[0], memory, seen.shape[1]
        )
        thetas += [theta for *_, theta in updates]
        error = (seen[b] - expected).norm(dim=1) / expected.norm(dim=1).amax()
        assert float(error.max()) < limit, (b, error)
    return thetas


@pytest.mark.parametrize("memory", [1, 2, 5, 30])
def test_equals_dense_broyden(memory):
    assert_equals_dense(tanh_map(0.9, 40, batch=3, dtype=torch.float64), memory, 20)
    assert_equals_dense(softsign_map([0.5, 0.95], 12, dtype=torch.float64), memory, 20)


def test_equals_dense_broyden_on_a_linear_map():
    assert_equals_dense(linear_map(0.9, 40, batch=3, dtype=torch.float64), 30, 20)


@given(
    memory=st.integers(1, 6),
    rho=st.sampled_from([0.3, 0.9, 1.2]),
    dim=st.sampled_from([5, 20]),
    seed=st.integers(0, 50),
)
def test_equals_dense_broyden_on_any_map(memory, rho, dim, seed):
    problem = tanh_map(rho, dim, batch=1, dtype=torch.float64, seed=seed)
    assert_equals_dense(problem, memory, 2 * memory + 4, limit=1e-6)


def skew(angle, shift, dim=6, seed=0):
    """f(z) = z - shift z + R z + c with R skew: s^T y = -shift ||s||^2, the first denominator is shift."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    M = (1.0 - shift) * torch.eye(dim, dtype=torch.float64) + angle * (R - R.T)
    c = torch.randn(1, dim, generator=generator, dtype=torch.float64)
    return Problem(lambda z, c: z @ M.T + c, torch.zeros(1, dim, dtype=torch.float64), (c,))


@pytest.mark.parametrize("memory", [1, 2, 5, 30])
@pytest.mark.parametrize("angle", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("shift", [0.03, -0.03])
def test_vanishing_denominators(memory, angle, shift):
    thetas = assert_equals_dense(skew(angle, shift), memory, 9, limit=1e-6)
    assert thetas[0] == pytest.approx((0.9 if shift > 0 else 1.1) / (1.0 - shift))


@pytest.mark.parametrize("angle", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("shift", [0.0, 0.03, -0.03])
def test_vanishing_denominators_end_in_convergence(angle, shift):
    """... where skipping the update never does."""
    solution = skew(angle, shift).solve(solver=Broyden(), rtol=1e-8, max_steps=100)
    assert solution.converged.all()


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_the_secant_condition_holds_after_restarts(memory):
    """H y = s for the newest pair, which the next step shows: s' = -H g, so that with dense H it is the same step."""
    problem = linear_map(0.8, 30, batch=1, dtype=torch.float64)
    count = 3 * memory + 6
    z = iterates(problem, memory, count)[0]
    expected, updates = dense_broyden(lambda z: problem.fn(z[None], *problem.context)[0], problem.z0[0], memory, count)
    for H, s, y, theta in updates:
        assert theta == 1.0
        assert float((H @ y - s).norm() / s.norm()) < 1e-12
    steps = z.diff(dim=0)
    g = torch.stack([problem.fn(row[None], *problem.context)[0] - row for row in z])
    for k, (H, *_) in enumerate(updates[:-1]):
        # The solver's own step from its own iterate, by an H that keeps the secant condition of its newest pair.
        assert float((steps[k + 1] + H @ g[k + 1]).norm() / steps[k + 1].norm()) < 1e-6
    assert_close(z, expected, size=30, condition=1e6)


@pytest.mark.parametrize("memory", [2, 5])
def test_restarts_converge(memory):
    """Where sliding the window or clearing it does not: symmetric, rho .9, rtol 1e-10."""
    problem = linear_map(0.9, 50, batch=1, dtype=torch.float64)
    solution = problem.solve(solver=Broyden(memory=memory), rtol=1e-10, max_steps=150)
    assert solution.converged.all()


def test_full_memory_solves_a_linear_map_in_2_d_steps():
    """Gay 1979: good Broyden on a linear system of D unknowns ends within 2 D steps."""
    for dim in (1, 2, 4, 7):
        problem = linear_map(0.5, dim, dtype=torch.float64)
        solution = problem.solve(solver=Broyden(), rtol=1e-9, max_steps=2 * dim + 1)
        assert solution.converged.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_states_move_by_float32_steps(dtype):
    """What fn sees is the rounding of an iterate in float32, which is the sum of the steps."""
    problem = linear_map(0.8, 30, dtype=dtype)
    workspace = Broyden(memory=20).start(problem.z0, Rules(0.0, 0.0, 1e-3, True, False), 10)
    for k in range(8):
        z = workspace.z[k % 2]
        total = torch.stack([problem.z0.float(), *workspace.steps[:k]]).sum(0)
        assert_close(workspace.iterate, total, size=k)
        assert torch.equal(z, workspace.iterate.to(dtype))
        workspace.step(problem.fn(z, *problem.context), k)
    assert not torch.equal(workspace.iterate, workspace.iterate.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_states_converge_like_float32(dtype):
    """... as far as rounding inside fn allows."""
    narrow = linear_map(0.8, 30, dtype=dtype)
    solution = narrow.solve(solver=Broyden(), max_steps=60)
    assert solution.converged.all()
    assert solution.nfe <= linear_map(0.8, 30).solve(solver=Broyden(), rtol=1e-2, max_steps=60).nfe + 2


def test_steps_are_allocated_as_they_are_taken():
    problem = softsign_map(0.9, 9)
    assert_close(
        problem.solve(solver=Broyden(memory=10**6), max_steps=8, rtol=0.0).image,
        problem.solve(solver=Broyden(memory=8), max_steps=8, rtol=0.0).image,
    )
