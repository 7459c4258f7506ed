import copy
import pickle

import pytest
import torch
from torch import nn

import pydeq


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 10, dtype=torch.float64)
        self.linear.weight.data.normal_(std=0.22, generator=torch.Generator().manual_seed(1))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layer():
    return pydeq.DEQ(Cell(), rtol=1e-9, adjoint=pydeq.Implicit(rtol=1e-8, warm_start=True))


def backward(deq, x, weights):
    deq.zero_grad()
    z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    (z * weights).sum().backward()
    return solution.backward, deq.cell.linear.weight.grad.clone()


def test_the_same_samples_again_cost_one_product(layer):
    x, weights = torch.randn(2, 4, 10, generator=generator(0), dtype=torch.float64)
    first, gradient = backward(layer, x, weights)
    again, same = backward(layer, x, weights)
    assert first.nfe > 4
    assert again.nfe == 1
    torch.testing.assert_close(same, gradient, rtol=1e-6, atol=1e-7)


def test_another_batch_size_starts_cold(layer):
    x, weights = torch.randn(2, 4, 10, generator=generator(0), dtype=torch.float64)
    backward(layer, x, weights)
    cold, _ = backward(layer, x[:3], weights[:3])
    reference, _ = backward(pydeq.DEQ(layer.cell, rtol=1e-9, adjoint=pydeq.Implicit(rtol=1e-8)), x[:3], weights[:3])
    assert cold.nfe == reference.nfe


def test_a_lost_sample_is_forgotten(layer):
    x, weights = torch.randn(2, 4, 10, generator=generator(0), dtype=torch.float64)
    bad = weights.clone()
    bad[1, 2] = torch.nan
    backward(layer, x, bad)
    recovered, gradient = backward(layer, x, weights)
    assert recovered.converged.all()
    _, expected = backward(pydeq.DEQ(layer.cell, rtol=1e-9, adjoint=pydeq.Implicit(rtol=1e-8)), x, weights)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_what_is_remembered_is_neither_copied_nor_pickled(layer):
    x, weights = torch.randn(2, 4, 10, generator=generator(0), dtype=torch.float64)
    backward(layer, x, weights)
    assert layer._memory
    assert not copy.deepcopy(layer)._memory
    assert not pickle.loads(pickle.dumps(layer))._memory
    assert layer._memory
