"""Derivatives of a layer whose cell has norms, for which torch's own formulas are wrong from the third order on."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pydeq

DIM = 4


class Cell(nn.Module):
    """norm(tanh(z W + x)) / 20, by torch's norm or in plain operations."""

    def __init__(self, norm, plain):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) / DIM**0.5)
        self.norm, self.plain = norm, plain

    def forward(self, z, x):
        y = torch.tanh(z @ self.weight + x)
        if self.plain:
            y = y - y.mean(1, keepdim=True)
            y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()
        elif self.norm == "layer":
            y = functional.layer_norm(y, (DIM,))
        else:
            y = functional.instance_norm(y[None])[0]
        return 0.05 * y


def of_weight(norm, plain):
    """A number that the solution gives, as a function of a number that moves the weight."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)
    move = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    cell = Cell(norm, plain)
    weight = cell.weight.detach()
    options = {"rtol": 1e-12, "max_steps": 60}
    deq = pydeq.DEQ(cell, adjoint=pydeq.Implicit(**options), **options)

    def of(t):
        z = torch.func.functional_call(deq, {"cell.weight": weight + t * move}, (torch.zeros_like(x), x))
        return (z * v).sum() + z.pow(3).sum()

    return of


def forward(of):
    return lambda t: torch.func.jvp(of, (t,), (torch.ones_like(t),))[1]


ORDERS = ["rf", "fr", "ff", "rrr", "rrf"]  # the first letter is the innermost derivative: reverse or forward


@pytest.mark.parametrize("modes", ORDERS)
@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_any_order_and_mode_is_that_of_plain_operations(norm, modes):
    found = []
    for plain in (True, False):
        of = of_weight(norm, plain)
        for mode in modes:
            of = torch.func.grad(of) if mode == "r" else forward(of)
        found.append(of(torch.zeros((), dtype=torch.float64)))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_second_derivatives_without_transforms(norm):
    """Autograd's own: formulas of norms are right to second order."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 3, DIM, generator=generator, dtype=torch.float64)
    found = []
    for plain in (True, False):
        cell = Cell(norm, plain)
        options = {"rtol": 1e-12, "max_steps": 60}
        deq = pydeq.DEQ(cell, adjoint=pydeq.Implicit(**options), **options)
        z = deq(torch.zeros_like(x), x)
        (gradient,) = torch.autograd.grad((z * v).sum() + z.pow(3).sum(), cell.weight, create_graph=True)
        found.append(torch.autograd.grad(gradient.sin().sum(), cell.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
