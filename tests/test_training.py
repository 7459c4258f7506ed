"""What training code does to a layer: mixed precision, scalers, hooks, copies, modes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

import pydeq


class Cell(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for i, linear in enumerate((self.a, self.b)):
            linear.weight.data.normal_(std=0.08, generator=torch.Generator().manual_seed(i))

    def forward(self, z, x):
        return torch.tanh(self.b(torch.relu(self.a(z))) + x)


@pytest.fixture
def x():
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def deq():
    return pydeq.DEQ(Cell(), rtol=1e-5)


def gradient(deq, x, z0=None, scale=1.0):
    deq.zero_grad()
    z = deq(torch.zeros_like(x) if z0 is None else z0, x)
    (scale * z.float().square().mean()).backward()
    return torch.cat([p.grad.flatten().float() for p in deq.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("adjoint", [pydeq.Implicit(), pydeq.Phantom(3), pydeq.JacobianFree()], ids=str)
def test_gradients_under_autocast_are_close_to_those_of_float32(x, dtype, adjoint):
    deq = pydeq.DEQ(Cell(), adjoint=adjoint)
    expected = gradient(deq, x)
    with torch.autocast("cpu", dtype=dtype):
        got = gradient(deq, x)
    assert cosine_similarity(got, expected, dim=0) > 0.99
    torch.testing.assert_close(got.norm(), expected.norm(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_of_half_states_are_close_to_those_of_float32(x, dtype):
    deq = pydeq.DEQ(Cell())
    expected = gradient(deq, x)
    half = copy.deepcopy(deq).to(dtype)
    assert cosine_similarity(gradient(half, x.to(dtype)), expected, dim=0) > 0.99


def test_second_derivatives_under_autocast_see_its_dtype(x):
    seen = []

    class Spy(Cell):
        def forward(self, z, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(z, x)

    deq = pydeq.DEQ(Spy())
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq(torch.zeros_like(x), x)
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert all(seen)


def test_a_scaler_sees_the_overflow_of_the_adjoint_and_skips_the_step(x):
    # J^T grows what is nearly too large: the loss's gradient is finite, its adjoint is not.
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.9))

        def forward(self, z, x):
            return self.scale * z + x

    deq = pydeq.DEQ(Growing(), solver=pydeq.Broyden(), adjoint=pydeq.Implicit(solver=pydeq.Picard(), max_steps=200))
    optimizer = torch.optim.SGD(deq.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = deq.cell.scale.item()
    z = deq(torch.zeros_like(x), x)
    scaler.scale(z.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert deq.cell.scale.item() == before
    assert scaler.get_scale() == 2.0**126
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(deq(torch.zeros_like(x), x).sum()).backward()
    scaler.step(optimizer)
    assert deq.cell.scale.item() != before


def test_many_forwards_without_backward_keep_nothing(deq, x):
    gc.collect()
    gc.disable()
    try:
        kept = []
        for _ in range(3):
            z, solution = deq(torch.zeros_like(x), x, return_solution=True)
            attached = z.grad_fn.next_functions[0][0]  # behind a copy
            kept += [weakref.ref(z), weakref.ref(solution), weakref.ref(attached)]
            del attached
            del z, solution
        assert all(ref() is None for ref in kept)  # by counting references alone
    finally:
        gc.enable()


def test_a_backward_frees_what_it_used(deq, x):
    gc.collect()
    gc.disable()
    try:
        z, solution = deq(torch.zeros_like(x), x, return_solution=True)
        z.sum().backward()
        kept = [weakref.ref(z), weakref.ref(solution), weakref.ref(solution.backward)]
        del z, solution
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_what_training_saves_does_not_grow_with_the_evaluations(x):
    def saved(max_steps, adjoint):
        deq = pydeq.DEQ(Cell(), adjoint=adjoint, solver=pydeq.Picard(), rtol=0.0, max_steps=max_steps)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            z, solution = deq(torch.zeros_like(x), x, return_solution=True)
        assert solution.nfe == max_steps
        z.sum().backward()
        return sum(sizes)

    for adjoint in (pydeq.Implicit(max_steps=3, solver=pydeq.Picard(), rtol=1.0), pydeq.Phantom(2)):
        assert saved(2, adjoint) == saved(12, adjoint) > 0


def test_hooks_of_modules_and_tensors_run(deq, x):
    calls = []
    deq.register_forward_hook(lambda module, args, output: calls.append("forward"))
    deq.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    deq.cell.a.weight.register_hook(lambda g: calls.append("parameter"))
    x = x.requires_grad_()
    z = deq(torch.zeros_like(x), x)
    z.register_hook(lambda g: 2.0 * g)
    z.sum().backward()
    doubled = x.grad.clone()
    assert calls.count("forward") == calls.count("backward") == 1
    assert "parameter" in calls
    plain = pydeq.DEQ(deq.cell, rtol=1e-5)
    x.grad = None
    plain(torch.zeros_like(x), x).sum().backward()
    torch.testing.assert_close(doubled, 2.0 * x.grad, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_work_alike(deq, x):
    expected = gradient(deq, x)
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert repr(other) == repr(deq)
        assert torch.equal(gradient(other, x), expected)
        other.cell.a.weight.data.zero_()
    assert torch.equal(gradient(deq, x), expected)


def test_a_state_dict_is_the_cells_and_makes_another_layer_alike(deq, x):
    names = [f"cell.{name}" for name in deq.cell.state_dict()]
    deq.adjoint = pydeq.Implicit(warm_start=True)
    expected = gradient(deq, x)  # with something to begin the next adjoint at, which is not saved
    assert list(deq.state_dict()) == names
    other = pydeq.DEQ(Cell(), rtol=1e-5)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert str(other.load_state_dict(deq.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(gradient(other, x), expected)


def test_modes_without_gradients_give_the_same_value(deq, x):
    z0 = torch.zeros_like(x)
    with torch.no_grad():
        expected = deq(z0, x)
    with torch.inference_mode():
        inferred = deq(z0, x)
    assert torch.equal(inferred, expected)
    assert inferred.is_inference()
    assert not expected.requires_grad
    frozen = copy.deepcopy(deq).requires_grad_(False)
    assert not frozen(z0, x).requires_grad
    leaf = x.clone().requires_grad_()
    frozen(z0, leaf).sum().backward()
    assert leaf.grad is not None


def test_a_partly_frozen_cell(deq, x):
    full = gradient(deq, x)
    deq.cell.a.requires_grad_(False)
    deq.zero_grad()
    deq(torch.zeros_like(x), x).square().mean().backward()
    assert deq.cell.a.weight.grad is None
    part = torch.cat([p.grad.flatten() for p in deq.cell.b.parameters()])
    assert torch.equal(part, full[-len(part) :])


def test_one_cell_in_two_layers(x):
    cell = Cell()
    deqs = [pydeq.DEQ(cell, rtol=1e-5) for _ in range(2)]
    z = deqs[1](torch.zeros_like(x), deqs[0](torch.zeros_like(x), x))
    z.square().mean().backward()
    got = cell.a.weight.grad.clone()
    cell.zero_grad()
    z = x
    for _ in range(2):
        x_in, z = z, torch.zeros_like(x)
        for _ in range(60):
            z = cell(z, x_in)
    z.square().mean().backward()
    torch.testing.assert_close(got, cell.a.weight.grad, rtol=2e-3, atol=1e-6)
