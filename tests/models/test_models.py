"""What all models share: how they are called, copied, saved, differentiated and trained."""

import copy
import dataclasses
import io

import pytest
import torch
from small_models import CASES, EXACT

import pydeq
from pydeq import models


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def naming(name):
    return lambda message: f"{name}: {message}"


def test_implicit_gradients_are_those_of_the_unrolled_iteration(case, generator):
    model, inputs = case.make(), case.inputs(generator)
    output, solution = model(*inputs, return_solution=True)
    assert solution.converged.all(), solution
    implicit = gradients(model, case.loss(output))
    assert solution.backward.converged.all(), solution.backward
    model.deq.solver, model.deq.adjoint = pydeq.Picard(), pydeq.Unrolled()
    output, solution = model(*inputs, return_solution=True, max_steps=400)
    assert solution.converged.all(), solution
    unrolled = gradients(model, case.loss(output))
    # Weights in front of a norm have gradients that cancel: held against the largest of all.
    scale = max(float(gradient.abs().max()) for gradient in unrolled.values())
    for name, gradient in implicit.items():
        torch.testing.assert_close(gradient, unrolled[name], rtol=1e-7, atol=1e-8 * scale, msg=naming(name))


def test_penalty_is_that_of_the_cell_and_reaches_parameters(case, generator):
    model, inputs = case.make(), case.inputs(generator)
    contexts = []
    model.deq.cell.register_forward_pre_hook(lambda _, arguments: contexts.append(arguments[1:]))
    penalty = pydeq.JacobianPenalty(0.7)
    torch.manual_seed(5)
    output, solution = model(*inputs, return_solution=True, penalty=penalty)
    torch.manual_seed(5)
    expected = 0.7 * pydeq.jacobian_penalty(model.deq.cell, solution.image, *contexts[0])
    torch.testing.assert_close(solution.penalty, expected, rtol=1e-10, atol=0.0)
    assert solution.penalty > 0.0
    assert max(gradient.abs().max() for gradient in gradients_of(solution.penalty, model)) > 0.0
    without = model(*inputs, return_solution=True)[0]
    torch.testing.assert_close(case.loss(output), case.loss(without), rtol=1e-9, atol=0.0)
    with pytest.raises(ValueError, match="return_solution=True"):
        model(*inputs, penalty=penalty)


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [gradient for gradient in found if gradient is not None]


def test_max_steps_caps_the_evaluations(case, generator):
    model, inputs = case.make().eval(), case.inputs(generator)
    with torch.no_grad():
        for steps in (1, 3):
            assert model(*inputs, return_solution=True, max_steps=steps, rtol=0.0)[1].nfe == steps
    model.deq.eval_max_steps = 2
    with torch.no_grad():
        assert model(*inputs, return_solution=True, rtol=0.0)[1].nfe == 2


def test_layers_apply_the_cell_so_often(case, generator):
    model, inputs = case.make().eval(), case.inputs(generator)
    calls = []
    model.deq.cell.register_forward_hook(lambda *_: calls.append(1))
    output, solution = model(*inputs, return_solution=True, layers=3)
    assert len(calls) == 3
    model.deq.solver = pydeq.Picard()
    with torch.no_grad():
        # After two steps Picard's third evaluation is of the third layer's input.
        same = model(*inputs, return_solution=True, max_steps=3, rtol=0.0)[1]
    assert solution.status.eq(pydeq.Status.MAX_STEPS).all()
    torch.testing.assert_close(first_part(solution.image), first_part(same.image), rtol=1e-12, atol=1e-12)
    assert all(gradient is not None for gradient in gradients(model, case.loss(output)).values())
    for layers, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="layers must be"):
            model(*inputs, layers=layers)
    with pytest.raises(ValueError, match="layers"):
        model(*inputs, layers=2, max_steps=3)


def first_part(state):
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_copies_and_state_dicts_give_the_same_numbers(case, generator):
    model, inputs = case.make(seed=1), case.inputs(generator)
    twin, other = copy.deepcopy(model), case.make(seed=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    before = case.loss(other.eval()(*inputs))
    other.load_state_dict(torch.load(file))
    expected = case.loss(model.eval()(*inputs))
    assert torch.equal(case.loss(twin.eval()(*inputs)), expected)
    assert torch.equal(case.loss(other.eval()(*inputs)), expected)
    assert not torch.equal(before, expected)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(pointers) == len(set(pointers)), "a state dict that shares memory cannot be saved as safetensors"


@pytest.mark.filterwarnings("ignore::pydeq.ConvergenceWarning")  # training goes on with inexact gradients, too
def test_training_lowers_the_loss(case, generator):
    solver = EXACT | {"rtol": 1e-3, "max_steps": 12, "backward_rtol": 1e-2, "backward_max_steps": 100}
    options = {"dropout": 0.1, "solver": solver}
    model, inputs = case.make(**options), case.inputs(generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        penalty = pydeq.JacobianPenalty(0.1, frequency=0.5)
        output, solution = model.train()(*inputs, return_solution=True, penalty=penalty, layers=2 if step < 3 else None)
        optimizer.zero_grad()
        (case.loss(output) + solution.penalty).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        with torch.no_grad():
            losses.append(float(case.loss(model.eval()(*inputs))))
    assert min(losses[-5:]) < 0.9 * losses[0], losses


def test_configurations_rebuild_the_model(case):
    model = case.make(seed=4)
    again = models.build(dataclasses.replace(model.config))
    assert type(again) is type(model)
    assert again.parameter_count() == model.parameter_count()
