import warnings

import pytest
import torch
from torch import nn

import pydeq
from pydeq.cell.replay_rng import Replayed, random_modules


class Noisy(nn.Module):
    """A contraction with dropout; counts the distinct masks of its calls."""

    def __init__(self, p=0.5):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.linear.weight.data.mul_(0.3)
        self.dropout = nn.Dropout(p)
        self.masks = []

    def forward(self, z, x):
        mask = self.dropout(torch.ones_like(z))
        self.masks.append(mask)
        return torch.tanh(self.linear(z) * mask + x)


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_a_cell_with_dropout_warns_and_names_it():
    with pytest.warns(UserWarning, match=r"\(dropout\).*freeze_rng=True"):
        pydeq.DEQ(Noisy())


def test_a_bound_method_of_a_module_with_dropout_warns():
    with pytest.warns(UserWarning, match=r"\(dropout\)"):
        pydeq.DEQ(Noisy().forward)


@pytest.mark.parametrize("cell", [Noisy(p=0.0), nn.Linear(3, 3)], ids=["p=0", "none"])
def test_no_warning_where_nothing_is_drawn(cell):
    pydeq.DEQ(cell)  # warnings are errors


def test_attention_with_dropout_counts():
    module = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, dropout=0.1), "b": nn.MultiheadAttention(4, 2)})
    assert random_modules(module) == ["a"]


def test_frozen_randomness_gives_one_mask_per_call_and_another_for_the_next(x):
    torch.manual_seed(0)
    cell = Noisy()
    deq = pydeq.DEQ(cell, freeze_rng=True, rtol=1e-5)
    z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    z.sum().backward()
    assert solution.converged.all()
    assert len(cell.masks) == solution.nfe + 1
    assert all(torch.equal(mask, cell.masks[0]) for mask in cell.masks)
    first, cell.masks = cell.masks[0], []
    deq(torch.zeros_like(x), x)
    assert not torch.equal(cell.masks[0], first)


def test_a_second_backward_sees_the_masks_of_the_forward(x):
    torch.manual_seed(0)
    cell = Noisy().double()
    x = x.double().requires_grad_()
    deq = pydeq.DEQ(cell, freeze_rng=True, rtol=1e-10, adjoint=pydeq.Implicit(rtol=1e-10))
    z = deq(torch.zeros_like(x), x)
    torch.rand(100)  # the generator goes on
    (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(torch.equal(mask, cell.masks[0]) for mask in cell.masks)


def test_generators_go_on_as_after_one_call():
    torch.manual_seed(0)
    fn = Replayed(lambda z: z + torch.rand(3), torch.device("cpu"))
    values = [fn(0.0) for _ in range(3)]
    after = torch.rand(2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    assert all(torch.equal(value, expected) for value in values)
    assert torch.equal(after, torch.rand(2))


def test_a_call_that_raises_restores_the_generator():
    calls = []

    def fn(z):
        calls.append(torch.rand(1))
        if len(calls) > 1:
            raise RuntimeError("later")

    replayed = Replayed(fn, torch.device("cpu"))
    replayed(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="later"):
        replayed(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_mode_needs_no_freezing(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deq = pydeq.DEQ(Noisy()).eval()
    _, solution = deq(torch.zeros_like(x), x, return_solution=True)
    assert solution.converged.all()
