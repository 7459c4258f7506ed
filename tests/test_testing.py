"""The helpers that other tests stand on."""

import pytest
import torch

import pydeq
from pydeq.testing import (
    CallCounter,
    assert_close,
    assert_identical,
    linear_map,
    softsign_map,
    tanh_map,
    tolerance,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("make", [linear_map, softsign_map, tanh_map])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_problems(make, dtype):
    problem = make(0.7, 12, batch=3, dtype=dtype, seed=1)
    image = problem.fn(problem.z0, *problem.context)
    assert problem.z0.shape == image.shape == (3, 12)
    assert problem.z0.dtype == image.dtype == dtype
    again = make(0.7, 12, batch=3, dtype=dtype, seed=1)
    assert torch.equal(again.fn(again.z0, *again.context), image)
    other = make(0.7, 12, batch=3, dtype=dtype, seed=2)
    assert not torch.equal(other.fn(other.z0, *other.context), image)
    part = problem.rows([2, 0])
    assert_close(part.fn(part.z0, *part.context), image[[2, 0]], size=12)
    assert problem.solve(max_steps=7, rtol=0.0).nfe == 7


def test_linear_map_knows_its_solution_and_its_radius():
    problem = linear_map(0.9, 12, dtype=torch.float64)
    assert problem.solution is not None
    assert_close(problem.fn(problem.solution, *problem.context), problem.solution, size=12, condition=10.0)
    A = problem.fn(torch.eye(12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(A).abs().max()) == pytest.approx(0.9)
    assert_close(A, A.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softsign_map_does_not_depend_on_its_batch(dtype):
    problem = softsign_map([0.5, 0.9, 0.3], 1000, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 1000, generator=generator, dtype=torch.float64).to(dtype)
    for b in range(3):
        part = problem.rows([b])
        assert torch.equal(part.fn(z[[b]], *part.context)[0], problem.fn(z, *problem.context)[b])


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_softsign_map_contracts(rho):
    problem = softsign_map(rho, 20, batch=1, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda z: problem.fn(z[None], *problem.context)[0], problem.z0[0])
    assert float(torch.linalg.matrix_norm(J, 2)) <= rho
    assert float((J - J.T).abs().max()) > 0.1 * rho


def test_call_counter():
    counter = CallCounter(lambda z, x: z)
    assert counter.calls == 0
    counter(torch.ones(3), None)
    counter((torch.ones(2, 1),), None)
    assert counter.calls == 2
    assert counter.batches == [3, 2]


def test_assert_close_knows_its_tolerance():
    expected = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    error = 1000.0 * tolerance(torch.float64, 9)
    assert_close(expected + 0.9 * error, expected, size=9)
    with pytest.raises(AssertionError, match=r"entry \(0,\) is 1.0.*, expected 1.0: off by .*, allowed"):
        assert_close(expected + torch.tensor([1.1 * error, 0.0]), expected, size=9)
    assert_close(expected + 1.1 * error, expected, size=9, condition=2.0)
    assert_close(expected.bfloat16(), expected)
    assert_close(torch.ones(0), torch.ones(0))
    with pytest.raises(AssertionError, match=r"shapes differ: \(2,\), expected \(1,\)"):
        assert_close(torch.ones(2), torch.ones(1))


@pytest.mark.parametrize("one", [torch.nan, torch.inf, -torch.inf, 1.0])
@pytest.mark.parametrize("other", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_assert_close_on_what_is_not_finite(one, other):
    one, other = torch.tensor([one, 0.0]), torch.tensor([other, 0.0])
    if torch.equal(one.nan_to_num(7.0, 8.0, 9.0), other.nan_to_num(7.0, 8.0, 9.0)):
        assert_close(one, other)
    else:
        with pytest.raises(AssertionError):
            assert_close(one, other)


def test_assert_identical_sees_one_bit():
    problem = softsign_map([0.5, 0.9], 5)
    one, other = problem.solve(), problem.solve()
    assert_identical(one, other)
    assert_identical(problem.rows([1]).solve(), one, [1])
    other.image[1, 2] = torch.nextafter(other.image[1, 2], torch.tensor(9.0))
    with pytest.raises(AssertionError, match=r"image differs in samples \[1\]"):
        assert_identical(one, other)
    assert_identical(problem.rows([0]).solve(), other, [0])
    lost = pydeq.fixed_point(lambda z: z * torch.nan, torch.ones(1, 2))
    assert_identical(lost, lost)
