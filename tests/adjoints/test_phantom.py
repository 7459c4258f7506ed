"""Phantom gradients against their defining sum, on a linear map whose Jacobian is known."""

import pytest
import torch
from torch import nn

import pydeq

BATCH, DIM = 3, 5


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(0.3 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))

    def forward(self, z, x):
        return z @ self.A.T + x


def problem():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    return Linear(), torch.zeros(BATCH, DIM, dtype=torch.float64), x, v


def layer(cell, adjoint):
    return pydeq.DEQ(cell, adjoint=adjoint, rtol=1e-13, max_steps=200)


@pytest.mark.parametrize("form", ["unroll", "neumann"])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 1.0), (4, 0.6)])
def test_the_cotangent_is_the_truncated_series(form, steps, damping):
    cell, z0, x, v = problem()
    z = layer(cell, pydeq.Phantom(steps=steps, damping=damping, form=form))(z0, x)
    # df/dx = I, so the gradient of x is u.
    (u,) = torch.autograd.grad((z * v).sum(), x)
    step = damping * cell.A.detach() + (1 - damping) * torch.eye(DIM, dtype=torch.float64)
    expected = damping * sum(v @ torch.linalg.matrix_power(step, i) for i in range(steps))
    torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["unroll", "neumann"])
def test_many_steps_are_the_implicit_gradient(form):
    cell, z0, x, v = problem()
    wanted = [x, cell.A]
    phantom = layer(cell, pydeq.Phantom(steps=150, form=form))
    exact = layer(cell, pydeq.Implicit(rtol=1e-13, max_steps=200))
    for a, b in zip(
        torch.autograd.grad((phantom(z0, x) * v).sum(), wanted),
        torch.autograd.grad((exact(z0, x) * v).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_jacobian_free_is_one_evaluation():
    cell, z0, x, v = problem()
    z, solution = layer(cell, pydeq.JacobianFree())(z0, x, return_solution=True)
    (gradient,) = torch.autograd.grad((z * v).sum(), cell.A)
    torch.testing.assert_close(gradient, v.T @ solution.image, rtol=1e-12, atol=1e-14)
    assert pydeq.JacobianFree() == pydeq.Phantom(steps=1)


@pytest.mark.parametrize("form", ["unroll", "neumann"])
def test_tuple_states(form):
    cell, z0, x, v = problem()

    def pair(z, x):
        y = cell(torch.cat(z, 1), x)
        return y[:, :2], y[:, 2:]

    adjoint = pydeq.Phantom(steps=3, damping=0.7, form=form)
    (one,) = torch.autograd.grad((layer(cell, adjoint)(z0, x) * v).sum(), x)
    parts = layer(pair, adjoint)((z0[:, :2], z0[:, 2:]), x)
    (two,) = torch.autograd.grad((torch.cat(parts, 1) * v).sum(), x)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"damping": 0.0}, ValueError, r"damping must be in \(0, 1\], got 0.0"),
        ({"form": "exact"}, ValueError, "form must be 'unroll' or 'neumann', got 'exact'"),
        ({"tau": 0.5}, TypeError, "did you mean 'damping'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pydeq.Phantom(**arguments)


def test_a_frozen_cell_gives_an_output_without_a_graph():
    deq = pydeq.DEQ(lambda z, x: 0.5 * torch.tanh(z) + x, adjoint=pydeq.Phantom(2, form="neumann"))
    assert not deq(torch.zeros(2, 3), torch.ones(2, 3)).requires_grad
