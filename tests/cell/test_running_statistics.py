"""Running statistics move once per call of a layer, to those of the evaluation at its output."""

import copy

import pytest
import torch
from torch import nn

import pydeq

pytestmark = pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other")


class Cell(nn.Module):
    def __init__(self, norm, **options):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = norm(6, **options)

    def forward(self, z, x):
        return 0.2 * torch.tanh(self.norm(self.linear(z))) + x


def problem(norm=nn.BatchNorm1d, **options):
    torch.manual_seed(0)
    return Cell(norm, **options).double(), torch.zeros(5, 6).double(), torch.randn(5, 6).double()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("grad", [True, False])
def test_one_call_moves_them_once(momentum, grad):
    cell, z0, x = problem(momentum=momentum)
    cell.norm.running_mean.fill_(0.3)
    reference = copy.deepcopy(cell)
    deq = pydeq.DEQ(cell, rtol=1e-10, max_steps=100)
    with torch.set_grad_enabled(grad):
        z, solution = deq(z0, x, return_solution=True)
    assert solution.converged.all()
    reference(z.detach(), x)  # as one evaluation at the fixed point
    assert int(cell.norm.num_batches_tracked) == 1
    torch.testing.assert_close(cell.norm.running_mean, reference.norm.running_mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(cell.norm.running_var, reference.norm.running_var, rtol=1e-8, atol=1e-10)
    deq(z0, x)
    assert int(cell.norm.num_batches_tracked) == 2


@pytest.mark.parametrize("adjoint", [pydeq.Implicit(rtol=1e-9), pydeq.Phantom(steps=3), pydeq.Unrolled()], ids=str)
def test_gradients_are_as_before(adjoint):
    cell, z0, x = problem()
    plain = copy.deepcopy(cell)
    z = pydeq.DEQ(cell, adjoint=adjoint, rtol=1e-10, max_steps=100)(z0, x)
    z.square().sum().backward()
    state = z0
    for _ in range(60):
        state = plain(state, x)
    state.square().sum().backward()
    assert int(cell.norm.num_batches_tracked) == 1
    torch.testing.assert_close(z, state, rtol=1e-8, atol=1e-9)
    if adjoint != pydeq.Phantom(steps=3):
        # The batch is one system, which a solve of single samples still finds.
        torch.testing.assert_close(cell.linear.weight.grad, plain.linear.weight.grad, rtol=1e-4, atol=1e-6)


def test_second_derivatives_move_nothing():
    cell, z0, x = problem()
    x.requires_grad_()
    deq = pydeq.DEQ(cell, rtol=1e-10, max_steps=100)
    z = deq(z0, x)
    deq(z0, x)  # another call in between
    after = cell.norm.running_mean.clone()
    assert int(cell.norm.num_batches_tracked) == 2
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    assert gradient.isfinite().all()
    assert int(cell.norm.num_batches_tracked) == 2
    assert torch.equal(cell.norm.running_mean, after)


def test_instance_norm():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(3, track_running_stats=True)

        def forward(self, z, x):
            return 0.5 * torch.tanh(self.norm(z + x)) + x

    cell, x = Images().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    reference = copy.deepcopy(cell)
    z = pydeq.DEQ(cell, rtol=1e-10, max_steps=100)(torch.zeros_like(x), x)
    reference(z, x)
    torch.testing.assert_close(cell.norm.running_mean, reference.norm.running_mean, rtol=1e-8, atol=1e-10)


def test_evaluation_mode():
    cell, z0, x = problem()
    cell.eval()
    before = copy.deepcopy(cell.state_dict())
    pydeq.DEQ(cell)(z0, x)
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())


@pytest.mark.filterwarnings("default:the samples of a batch depend on each other")
def test_a_warning_names_the_module():
    cell, *_ = problem()
    with pytest.warns(pydeq.CouplingWarning, match=r"through BatchNorm in training mode \(norm\).*GroupNorm"):
        pydeq.DEQ(cell)
    pydeq.DEQ(cell.eval())  # warnings are errors
