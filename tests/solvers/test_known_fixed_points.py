"""Every solver finds fixed points that are known, in every dtype, and keeps to its memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import GMRES, Anderson, Broyden, NewtonKrylov, Picard, TrustRegion
from pydeq.ops.termination import Rules
from pydeq.solvers import __all__ as listed
from pydeq.testing import assert_close, linear_map, softsign_map, tanh_map

ALL = (
    Picard(),
    Picard(damping=0.7),
    Anderson(),
    Anderson(memory=1),
    Anderson(memory=2),
    Anderson(damping=0.5),
    Anderson(memory=10, ridge=0.0),
    Broyden(),
    Broyden(memory=1),
    Broyden(memory=2),
    Broyden(memory=5),
    Broyden(line_search=True),
    Broyden(memory=5, line_search=True),
    GMRES(),
    GMRES(restart=5),
    NewtonKrylov(),
    NewtonKrylov(products=3, mode="difference"),
    TrustRegion(),
    TrustRegion(mode="difference"),
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

every_solver = pytest.mark.parametrize("solver", ALL, ids=str)


def test_all_solvers_are_here():
    assert {type(solver).__name__ for solver in ALL} == set(listed) - {"Solver", "CustomSolver"}


@every_solver
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_linear_maps(solver, dtype, rho):
    """||z - z*|| <= ||(I - A)^-1|| (||f(z) - z|| + rounding), and the first factor is 1 / (1 - rho)."""
    problem = linear_map(rho, 20, dtype=dtype)
    rtol = max(1e-8, 32 * torch.finfo(dtype).eps)
    solution = problem.solve(solver=solver, rtol=rtol, max_steps=500)
    assert solution.converged.all()
    condition = 4.0 * rtol / torch.finfo(dtype).eps / (1.0 - rho)
    assert_close(solution.image, problem.solution, size=20, condition=condition)


@every_solver
def test_the_fixed_point_of_the_cosine(solver):
    dottie = 0.7390851332151607  # cos(x) = x
    z0 = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
    solution = pydeq.fixed_point(torch.cos, z0, solver=solver, rtol=1e-12, max_steps=200)
    assert solution.converged.all()
    assert_close(solution.image, torch.full_like(z0, dottie), condition=1e5)


@every_solver
@pytest.mark.parametrize("rho", [0.5, 0.95])
def test_tanh_maps(solver, rho):
    problem = tanh_map(rho, 64, dtype=torch.float64)
    solution = problem.solve(solver=solver, rtol=1e-10, max_steps=1000)
    reference = problem.z0
    for _ in range(2000):
        reference = problem.fn(reference, *problem.context)
    assert solution.converged.all()
    assert_close(solution.image, reference, size=64, condition=1e7)


@every_solver
@given(
    rho=st.floats(0.0, 0.9),
    dim=st.integers(1, 40),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_contractions_converge(solver, rho, dim, batch, seed, dtype):
    problem = softsign_map(rho, dim, batch=batch, seed=seed, dtype=dtype)
    solution = problem.solve(solver=solver, rtol=1e-5, max_steps=300)
    assert solution.converged.all()
    again = problem.fn(solution.image, *problem.context)
    change = (again - solution.image).norm(dim=1)
    assert (change <= 1.01 * rho * solution.residual + 1e-6 * solution.image.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_states_reach_what_their_dtype_allows(solver, dtype):
    problem = tanh_map(0.9, 128, dtype=dtype)
    solution = problem.solve(solver=solver, max_steps=100)
    assert solution.converged.all()
    tightest = problem.solve(solver=solver, rtol=0.0, max_steps=60)
    assert (tightest.relative_residual <= 2.0 * torch.finfo(dtype).eps + 1e-5).all()


@pytest.mark.parametrize("solver", [Picard(), *(Broyden(memory=memory) for memory in (1, 2, 5, 100))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_max_steps_only_cuts_a_run_short(solver, dtype):
    """What a solver allocates depends on max_steps; what it does, does not."""
    problem = softsign_map([0.9, 0.99], 12, dtype=dtype)

    def iterates(max_steps):
        seen = []

        def fn(z, *context):
            seen.append(z.clone())
            return problem.fn(z, *context)

        options = {"solver": solver, "rtol": 0.0, "stall": False, "freeze": False, "max_steps": max_steps}
        pydeq.fixed_point(fn, problem.z0, *problem.context, **options)
        return seen

    longest = iterates(15)
    for max_steps in range(1, 15):
        for got, expected in zip(iterates(max_steps), longest, strict=False):
            assert torch.equal(got, expected)


# What the acceleration is for


@pytest.mark.parametrize("dim", [128, 1024])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
@pytest.mark.parametrize("rho", [0.5, 0.8, 0.95])
def test_acceleration_never_costs_more_than_one_call(rho, rtol, dim):
    problem = tanh_map(rho, dim, batch=2)
    plain = problem.solve(solver=Picard(), rtol=rtol, max_steps=400)
    assert plain.converged.all()
    for solver in (Anderson(), Broyden()):
        fast = problem.solve(solver=solver, rtol=rtol, max_steps=400)
        assert fast.converged.all()
        assert fast.nfe <= plain.nfe + 1


def test_anderson_on_a_symmetric_linear_map():
    problem = linear_map(0.95, 50)
    plain = problem.solve(solver=Picard(), rtol=1e-6, max_steps=1000)
    fast = problem.solve(solver=Anderson(), rtol=1e-6, max_steps=1000)
    assert plain.converged.all()
    assert fast.converged.all()
    assert fast.nfe <= 0.4 * plain.nfe


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
def test_where_plain_iteration_fails(solver):
    problem = tanh_map(1.5, 128, batch=1)
    problem.context[0].mul_(0.5)
    assert not problem.solve(solver=Picard(), rtol=1e-6, max_steps=400).converged.any()
    assert problem.solve(solver=solver, rtol=1e-6, max_steps=120).converged.all()


# Memory, counted in state vectors beside fn's own


def vectors(workspace, batch, dim):
    found = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for entry in value:
                look(entry)

    for value in vars(workspace).values():
        look(value)
    return sum(found.values()) / (batch * dim * 4)


@pytest.mark.parametrize(
    ("solver", "steps", "most"),
    [
        (Picard(), 20, 5),
        (Anderson(memory=6), 20, 2 * 6 + 5),
        (Anderson(memory=1), 20, 2 * 2 + 5),
        (Broyden(), 2, 2 + 7),
        (Broyden(), 9, 9 + 7),
        (Broyden(memory=4), 20, 4 + 7),
        (GMRES(), 3, 3 + 7),
        (GMRES(), 9, 9 + 7),
        (GMRES(restart=4), 20, 4 + 7),
    ],
    ids=str,
)
def test_memory(solver, steps, most):
    batch, dim = 2, 5000
    problem = softsign_map(0.999, dim, batch=batch)
    workspace = solver.start(problem.z0, Rules(0.0, 0.0, 1e-7, True, False), 100)
    for k in range(steps):
        f = problem.fn(workspace.z[k % 2], *problem.context)
        workspace.step(f, k)
    assert math.ceil(vectors(workspace, batch, dim) + 1 - 0.5) <= most  # and f


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=6), Anderson(memory=2)], ids=str)
def test_large_scratch_is_rounded_up_once(solver):
    """To whole huge pages of 2 MiB, one of them for the alignment; the solution keeps none of it."""
    batch, dim = 8, 40000  # 1.22 MiB
    flat = torch.zeros(batch, dim)
    workspace = solver.start(flat, Rules(1e-3, 0.0, torch.finfo(torch.float32).eps, True, True), 20)
    used = (2 + (2 * solver.memory if isinstance(solver, Anderson) else 0)) * flat.nbytes
    allocated = vectors(workspace, batch, dim) * flat.nbytes - workspace.best.untyped_storage().nbytes()
    assert used <= allocated < used + 2 * 2**21 + 2**15  # scalars and the like
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, flat, solver=solver)
    assert solution.image.untyped_storage().nbytes() <= 2 * flat.nbytes
