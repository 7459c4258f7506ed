"""The layer: what it returns in training and evaluation, and what it refuses."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pydeq


class Cell(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.calls = 0
        with torch.no_grad():
            self.linear.weight.copy_(0.1 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.linear(z) + x)


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def z0():
    return torch.zeros(4, 8)


def test_output_without_gradients_is_the_image_and_costs_no_extra_call(z0, x):
    deq = pydeq.DEQ(Cell())
    with torch.no_grad():
        z, solution = deq(z0, x, return_solution=True)
    assert torch.equal(z, solution.image)
    assert not z.requires_grad
    assert deq.cell.calls == solution.nfe


def test_output_with_gradients_is_one_more_evaluation_counted_apart(z0, x):
    deq = pydeq.DEQ(Cell())
    z, solution = deq(z0, x, return_solution=True)
    assert deq.cell.calls == solution.nfe + 1
    torch.testing.assert_close(z, deq.cell(solution.image, x))


def test_eval_max_steps_is_the_hard_stop(z0, x):
    deq = pydeq.DEQ(Cell(), rtol=0.0, max_steps=20, eval_max_steps=3)
    with torch.no_grad():
        assert deq.eval()(z0, x, return_solution=True)[1].nfe == 3
        assert deq.train()(z0, x, return_solution=True)[1].nfe > 3


def test_calls_override_the_layer(z0, x):
    deq = pydeq.DEQ(Cell(), rtol=1e-6)
    with torch.no_grad():
        full = deq(z0, x, return_solution=True)[1].nfe
        assert deq(z0, x, return_solution=True, max_steps=1)[1].nfe == 1
        assert deq(z0, x, return_solution=True, rtol=1e-1)[1].nfe < full
        z = deq(z0, x, max_steps=1)
    assert torch.equal(z, deq.cell(z0, x))


def test_training_fits_a_target(z0, x):
    deq = pydeq.DEQ(Cell())
    target = torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) - 0.5
    optimizer = torch.optim.Adam(deq.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        z = deq(z0, x)
        loss = (z - target).square().mean() + 0.01 * pydeq.jacobian_penalty(deq.cell, z, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_deepcopy_and_state_dict(z0, x):
    deq = pydeq.DEQ(Cell())
    twin = copy.deepcopy(deq)
    assert torch.equal(deq(z0, x), twin(z0, x))
    assert list(deq.state_dict()) == ["cell.linear.weight", "cell.linear.bias"]


def test_print_shows_what_is_set():
    deq = pydeq.DEQ(nn.Linear(2, 2))
    assert repr(deq).splitlines() == [
        "DEQ(",
        "  solver=Anderson(memory=5, damping=1.0, ridge=1e-06)",
        "  adjoint=Implicit(solver=Anderson(memory=5, damping=1.0, ridge=1e-06), rtol=None, max_steps=50,"
        " warm_start=False)",
        "  max_steps=50",
        "  (cell): Linear(in_features=2, out_features=2, bias=True)",
        ")",
    ]
    settings = {
        "rtol": 1e-4, "atol": 1e-6, "eval_max_steps": 8, "freeze_rng": True, "states_at": (2, 4), "has_aux": True,
        "norm": "parts",
    }  # fmt: skip
    deq = pydeq.DEQ(torch.cos, solver=pydeq.Picard(), adjoint=pydeq.JacobianFree(), max_steps=9, **settings)
    shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    assert repr(deq).splitlines() == [
        "DEQ(", "  cell=cos", "  solver=Picard(damping=1.0)", f"  adjoint={pydeq.JacobianFree()!r}",
        f"  max_steps=9, {shown}", ")",
    ]  # fmt: skip


class Model(nn.Module):
    def __init__(self, bind):
        super().__init__()
        self.deq = pydeq.DEQ(bind(self))

    def cell(self, z, x):
        return 0.5 * torch.cos(z) + x


@pytest.mark.parametrize(
    ("bind", "name"),
    [
        (lambda model: model.cell, "cell"),
        (lambda model: functools.partial(model.cell, x=1.0), "partial(cell)"),
        (lambda model: functools.partial(functools.partial(model.cell), x=1.0), "partial(cell)"),
        (lambda model: lambda z, x: model.cell(z, x), "<lambda>"),
        (lambda model: Holds(model), "Holds"),
    ],
)
def test_print_of_a_cell_that_belongs_to_the_model_ends(bind, name):
    model = Model(bind)
    assert repr(model).splitlines()[2] == f"    cell={name}"


@dataclasses.dataclass
class Holds:
    """A callable whose repr shows the model."""

    model: nn.Module

    def __call__(self, z, x):
        return self.model.cell(z, x)


def test_frozen_parameters_and_inputs_give_an_output_without_a_graph(z0, x):
    deq = pydeq.DEQ(Cell()).requires_grad_(False)
    assert not deq(z0, x).requires_grad
    assert deq(z0, x.requires_grad_()).requires_grad


def test_parameters_used_twice_get_both_gradients(z0, x):
    cell = Cell()
    deq = pydeq.DEQ(
        lambda z, x: 0.5 * cell(z, x) + 0.5 * cell(0.5 * z, x), rtol=1e-6, adjoint=pydeq.Implicit(rtol=1e-6)
    )
    deq(z0, x).sum().backward()
    implicit = cell.linear.weight.grad.clone()
    cell.linear.weight.grad = None
    z = z0
    for _ in range(60):
        z = 0.5 * cell(z, x) + 0.5 * cell(0.5 * z, x)
    z.sum().backward()
    torch.testing.assert_close(implicit, cell.linear.weight.grad, rtol=1e-3, atol=1e-4)


def test_bf16_autocast_trains(z0, x):
    deq = pydeq.DEQ(Cell())
    with torch.autocast("cpu", torch.bfloat16):
        z = deq(z0, x)
        assert z.dtype == torch.float32
        loss = z.square().mean()
    loss.backward()
    reduced = deq.cell.linear.weight.grad.clone()
    deq.zero_grad()
    deq(z0, x).square().mean().backward()
    cosine = torch.cosine_similarity(reduced.flatten(), deq.cell.linear.weight.grad.flatten(), dim=0)
    assert cosine > 0.99


def test_a_cell_that_raises_leaves_nothing_behind(z0, x):
    deq = pydeq.DEQ(Cell())
    before = deq(z0, x)
    with pytest.raises(RuntimeError):
        deq(z0, torch.zeros(5, 7))
    assert torch.equal(deq(z0, x), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "broyden"}, TypeError, "solver must be a solver like pydeq.Anderson"),
        ({"solver": pydeq.Broyden}, TypeError, "like pydeq.Anderson\\(\\), got the class Broyden, not an instance"),
        ({"adjoint": True}, TypeError, "adjoint must be an adjoint like pydeq.Implicit"),
        ({"adjoint": pydeq.Phantom}, TypeError, "like pydeq.Implicit\\(\\), got the class Phantom, not an instance"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"eval_max_steps": 0}, ValueError, "eval_max_steps must be at least 1, got 0"),
        ({"atol": -1.0}, ValueError, "atol must be at least 0, got -1.0"),
        ({"f_max_iter": 3}, TypeError, "did you mean 'max_steps'"),
        ({"tol": 1e-3}, TypeError, "did you mean 'rtol'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pydeq.DEQ(Cell(), **arguments)


def test_bad_cell_and_bad_keyword_of_a_call(z0, x):
    with pytest.raises(TypeError, match="cell must be callable, got int"):
        pydeq.DEQ(3)
    with pytest.raises(TypeError, match="did you mean 'max_steps'"):
        pydeq.DEQ(Cell())(z0, x, max_iter=3)


@pytest.mark.parametrize("adjoint", [pydeq.Implicit(), pydeq.Phantom(2), pydeq.Unrolled(), pydeq.Reversible()], ids=str)
def test_a_call_without_z0_tells_the_order_of_arguments(adjoint, z0, x):
    deq = pydeq.DEQ(Cell(), adjoint=adjoint)
    with pytest.raises(TypeError, match=r"fn was called with z and 0 of context: missing .*'x'\. Pass z0 first"):
        deq(x)
    with pytest.raises(TypeError, match=r"fn was called with z and 2 of context: too many .*\. Pass z0 first"):
        deq(z0, x, x)


def test_a_type_error_inside_the_cell_is_not_replaced(z0, x):
    with pytest.raises(TypeError, match="unsupported operand"):
        pydeq.DEQ(lambda z, x: z + x + object())(z0, x)


@pytest.mark.parametrize("adjoint", [pydeq.Implicit(), pydeq.Phantom(2), pydeq.Unrolled(), pydeq.Reversible()], ids=str)
def test_states_without_values_are_refused(adjoint):
    deq = pydeq.DEQ(torch.nn.Linear(4, 4, device="meta"), adjoint=adjoint)
    with pytest.raises(TypeError, match=r"z0 must have values.*got a meta tensor"):
        deq(torch.zeros(2, 4, device="meta"))
    with FakeTensorMode(), pytest.raises(TypeError, match=r"z0 must have values.*got a FakeTensor"):
        pydeq.DEQ(torch.nn.Linear(4, 4), adjoint=adjoint)(torch.zeros(2, 4))


@pytest.mark.parametrize("shape", ["leaf", "expanded"])
def test_a_learned_initial_state_is_warned_about_once(monkeypatch, shape):
    monkeypatch.setattr("pydeq.adjoints.learned_start_warning._warned", set())
    start = torch.nn.Parameter(torch.zeros(1, 4))
    cell = torch.nn.Linear(4, 4)
    cell.weight.data.mul_(0.3)

    def call(adjoint):
        return pydeq.DEQ(cell, adjoint=adjoint)(start if shape == "leaf" else start.expand(3, 4))

    with pytest.warns(
        UserWarning, match=r"Implicit gives z0 no gradient, and DistributedDataParallel waits for one"
    ) as warned:
        call(pydeq.Implicit())
    assert [each.filename for each in warned] == [__file__]
    call(pydeq.Implicit())
    for adjoint in (pydeq.Unrolled(), pydeq.Reversible()):
        assert torch.autograd.grad(call(adjoint).sum(), start)[0].abs().max() > 0
    with torch.no_grad():
        call(pydeq.Phantom(2))


def test_an_initial_state_that_is_data_is_not_warned_about(monkeypatch):
    monkeypatch.setattr("pydeq.adjoints.learned_start_warning._warned", set())
    cell, encoder = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    cell.weight.data.mul_(0.3)
    x = torch.ones(3, 4, requires_grad=True)
    for z0 in (x, 2.0 * x, encoder(x)):
        pydeq.DEQ(cell)(z0).sum().backward()


def test_a_class_of_modules_is_not_a_cell():
    with pytest.raises(TypeError, match="cell must be callable, got the class Linear, not an instance"):
        pydeq.DEQ(torch.nn.Linear)
