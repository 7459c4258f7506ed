"""Picard iteration: the sequence itself."""

import pytest
import torch

import pydeq
from pydeq import Picard
from pydeq.testing import assert_close, softsign_map


def iterates(problem, solver, count):
    seen = []

    def fn(z, *context):
        seen.append(z.clone())
        return problem.fn(z, *context)

    pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=0.0, max_steps=count, stall=False)
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_iterates_are_images_to_the_last_bit(dtype):
    problem = softsign_map(0.9, 33, dtype=dtype)
    z = problem.z0
    for seen in iterates(problem, Picard(), 12):
        assert torch.equal(seen, z)
        z = problem.fn(z, *problem.context)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("damping", [0.1, 0.5, 0.9])
def test_damped_iterates(dtype, damping):
    problem = softsign_map(0.9, 33, dtype=dtype)
    z = problem.z0
    for seen in iterates(problem, Picard(damping=damping), 12):
        assert_close(seen, z)
        wide = torch.promote_types(dtype, torch.float32)
        image = problem.fn(seen, *problem.context).to(wide)
        z = (seen.to(wide) + damping * (image - seen.to(wide))).to(dtype)


def test_damping_tames_a_map_that_overshoots():
    def fn(z):
        return -1.5 * z + 1.0

    z0 = torch.zeros(2, 3)
    assert not pydeq.fixed_point(fn, z0, solver=Picard(), max_steps=100).converged.any()
    solution = pydeq.fixed_point(fn, z0, solver=Picard(damping=0.5), max_steps=100)
    assert solution.converged.all()
    assert torch.allclose(solution.image, torch.full((2, 3), 0.4), rtol=1e-2)


def test_the_residual_is_not_scaled_by_the_damping():
    problem = softsign_map(0.9, 9, dtype=torch.float64)
    full, damped = (problem.solve(solver=Picard(damping=d), max_steps=1) for d in (1.0, 0.1))
    assert torch.equal(full.residual, damped.residual)
