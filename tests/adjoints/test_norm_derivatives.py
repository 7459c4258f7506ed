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


class AnyNorm(nn.Module):
    """norm(tanh(z W + x)) / 20."""

    def __init__(self, norm):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) / DIM**0.5)
        self.norm = norm.double()

    def forward(self, z, x):
        return 0.05 * self.norm(torch.tanh(z @ self.weight + x))


class Instance(nn.Module):
    def forward(self, y):
        return functional.instance_norm(y[None])[0]


class Slope:
    """Derivatives by create_graph of a number that the solution gives, along one direction of the input each."""

    def __init__(self, norm):
        generator = torch.Generator().manual_seed(1)
        self.x, self.v, *self.along = torch.randn(6, 3, DIM, generator=generator, dtype=torch.float64)
        options = {"rtol": 1e-13, "max_steps": 60}
        self.deq = pydeq.DEQ(AnyNorm(norm), adjoint=pydeq.Implicit(**options), **options)

    def __call__(self, order, t=0.0):
        x = (self.x + t * self.along[order]).requires_grad_()
        z = self.deq(torch.zeros_like(x), x)
        found = (z * self.v).sum() + z.pow(3).sum()
        for v in self.along[:order]:
            found = (torch.autograd.grad(found, x, create_graph=True)[0] * v).sum()
        return found.detach()


# A batch norm is of coupled samples.
@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "norm",
    [lambda: nn.LayerNorm(DIM), Instance, lambda: nn.BatchNorm1d(DIM, eps=0.1)],
    ids=["layer", "instance", "batch"],
)
def test_derivatives_without_transforms_are_slopes(norm, order):
    """Each order's derivative is the slope of the one before, by central differences of fourth order."""
    slope, h = Slope(norm()), 1e-3
    below = [slope(order - 1, t * h) for t in (-2, -1, 1, 2)]
    expected = (8 * (below[2] - below[1]) - (below[3] - below[0])) / (12 * h)
    torch.testing.assert_close(slope(order), expected, rtol=1e-6, atol=1e-8)


def test_a_third_derivative_of_a_norm_in_torchscript_raises():
    slope = Slope(torch.jit.script(nn.LayerNorm(DIM)))
    assert slope(1).isfinite()
    with pytest.raises(RuntimeError, match=r"third derivative of layer norm .* TorchScript"):
        slope(3)
