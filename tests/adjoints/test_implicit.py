"""Implicit differentiation against unrolled solves and finite differences, in float64."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import pydeq

BATCH, DIM = 3, 6
SOLVERS = [pydeq.Picard(), pydeq.Anderson(memory=4), pydeq.Broyden(), pydeq.Broyden(memory=2), pydeq.GMRES()]


class Cell(nn.Module):
    """A contraction on one tensor, with a parameter, a context and a closure."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.25 * weight)
        self.scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * z @ self.weight.T + x)


class PairCell(nn.Module):
    """A contraction on a tuple of two states of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z
        return self.cell(a, x) + 0.1 * b.sum(dim=(1, 2))[:, None], torch.sin(0.3 * b + a[:, :4].view(-1, 2, 2))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    return x, cotangent


def layer(cell: nn.Module, solver: object) -> pydeq.DEQ:
    adjoint = pydeq.Implicit(solver=solver, rtol=1e-13, max_steps=400)
    return pydeq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-13, max_steps=400)


def unrolled(cell, z, x, steps=300):
    for _ in range(steps):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_equal_those_of_an_unrolled_solve(solver):
    cell, (x, cotangent) = Cell(), inputs()
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    wanted = [x, cell.weight, cell.scale]
    expected = torch.autograd.grad((unrolled(cell, z0, x) * cotangent).sum(), wanted)
    z = layer(cell, solver)(z0, x)
    actual = torch.autograd.grad((z * cotangent).sum(), wanted)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_equal_those_of_an_unrolled_solve_for_tuple_states(solver):
    cell, (x, cotangent) = PairCell(), inputs()
    z0 = (torch.zeros(BATCH, DIM, dtype=torch.float64), torch.zeros(BATCH, 2, 2, dtype=torch.float64))
    wanted = [x, cell.cell.weight]
    a, b = unrolled(cell, z0, x)
    expected = torch.autograd.grad((a * cotangent).sum() + b.square().sum(), wanted)
    a, b = layer(cell, solver)(z0, x)
    actual = torch.autograd.grad((a * cotangent).sum() + b.square().sum(), wanted)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_equal_finite_differences(solver):
    cell, (x, _) = Cell(), inputs()
    deq = layer(cell, solver)
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(deq, {"cell.weight": w}, (z0, x)), (x, cell.weight)
    )


def test_only_one_part_of_a_tuple_in_the_loss():
    cell, (x, cotangent) = PairCell(), inputs()
    z0 = (torch.zeros(BATCH, DIM, dtype=torch.float64), torch.zeros(BATCH, 2, 2, dtype=torch.float64))
    (expected,) = torch.autograd.grad((unrolled(cell, z0, x)[0] * cotangent).sum(), x)
    (actual,) = torch.autograd.grad((layer(cell, pydeq.Anderson())(z0, x)[0] * cotangent).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_z0_gets_no_gradient():
    cell, (x, _) = Cell(), inputs()
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    layer(cell, pydeq.Anderson())(z0, x).sum().backward()
    assert z0.grad is None
    assert x.grad is not None


def test_backward_counts_are_on_the_solution_once_backward_has_run():
    cell, (x, _) = Cell(), inputs()
    z, solution = layer(cell, pydeq.Anderson())(torch.zeros(BATCH, DIM, dtype=torch.float64), x, return_solution=True)
    assert solution.backward is None
    z.sum().backward()
    assert bool(solution.backward.converged.all())
    assert solution.backward.nfe > 1


def test_a_zero_cotangent_costs_one_product():
    cell, (x, _) = Cell(), inputs()
    z, solution = layer(cell, pydeq.Anderson())(torch.zeros(BATCH, DIM, dtype=torch.float64), x, return_solution=True)
    (z * 0.0).sum().backward()
    assert solution.backward.nfe == 1
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_nonfinite_cotangent_gives_that_sample_nan_and_leaves_the_others():
    cell, (x, cotangent) = Cell(), inputs()
    deq, z0 = layer(cell, pydeq.Anderson()), torch.zeros(BATCH, DIM, dtype=torch.float64)
    (clean,) = torch.autograd.grad((deq(z0, x) * cotangent).sum(), x)
    cotangent[1, 2] = torch.inf
    (x_gradient,) = torch.autograd.grad((deq(z0, x) * cotangent).sum(), x)
    assert x_gradient[1].isnan().all()
    torch.testing.assert_close(x_gradient[[0, 2]], clean[[0, 2]], rtol=1e-12, atol=0)


def test_backward_twice_needs_retain_graph_and_repeats():
    cell, (x, cotangent) = Cell(), inputs()
    z = layer(cell, pydeq.Anderson())(torch.zeros(BATCH, DIM, dtype=torch.float64), x)
    loss = (z * cotangent).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_two_forwards_before_one_backward():
    cell, (x, cotangent) = Cell(), inputs()
    deq, z0 = layer(cell, pydeq.Anderson()), torch.zeros(BATCH, DIM, dtype=torch.float64)
    one, two = deq(z0, x), deq(z0, 2 * x)
    (both,) = torch.autograd.grad(((one + two) * cotangent).sum(), x)
    (first,) = torch.autograd.grad((deq(z0, x) * cotangent).sum(), x)
    (second,) = torch.autograd.grad((deq(z0, 2 * x) * cotangent).sum(), x)
    torch.testing.assert_close(both, first + second, rtol=1e-10, atol=1e-12)


def second_derivative(z, wanted):
    """The gradient of the squared norm of a gradient; ``z`` is called anew for each use."""
    parts = z()
    parts = parts if isinstance(parts, tuple) else (parts,)
    loss = sum((part.sin() * part).sum() for part in parts)
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_second_derivatives_equal_those_of_an_unrolled_solve(solver):
    cell, (x, _) = Cell(), inputs()
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    wanted = [x, cell.weight, cell.scale]
    expected = second_derivative(lambda: unrolled(cell, z0, x), wanted)
    actual = second_derivative(lambda: layer(cell, solver)(z0, x), wanted)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_second_derivatives_for_tuple_states():
    cell, (x, _) = PairCell(), inputs()
    z0 = (torch.zeros(BATCH, DIM, dtype=torch.float64), torch.zeros(BATCH, 2, 2, dtype=torch.float64))
    wanted = [x, cell.cell.weight]
    expected = second_derivative(lambda: unrolled(cell, z0, x), wanted)
    actual = second_derivative(lambda: layer(cell, pydeq.Anderson())(z0, x), wanted)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_gradgradcheck():
    cell, (x, _) = Cell(), inputs()
    deq, z0 = layer(cell, pydeq.Broyden()), torch.zeros(BATCH, DIM, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(deq, {"cell.weight": w}, (z0, x)), (x, cell.weight)
    )


def test_a_gradient_penalty_on_a_context_that_is_itself_computed():
    cell, (x, cotangent) = Cell(), inputs()
    encoder = nn.Linear(DIM, DIM, dtype=torch.float64)
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)

    def penalty(solve):
        features = encoder(x)
        (gradient,) = torch.autograd.grad((solve(features) * cotangent).sum(), features, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, cell.weight, *encoder.parameters()])

    expected = penalty(lambda features: unrolled(cell, z0, features))
    actual = penalty(lambda features: layer(cell, pydeq.Anderson())(z0, features))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_captured_computed_tensor_gets_its_gradient_but_refuses_a_second_one():
    cell, (x, cotangent) = Cell(), inputs()
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    features = 2.0 * x
    deq = layer(lambda z: cell(z, features), pydeq.Anderson())
    (actual,) = torch.autograd.grad((deq(z0) * cotangent).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((layer(cell, pydeq.Anderson())(z0, 2.0 * x) * cotangent).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="captures a tensor that is computed from others"):
        torch.autograd.grad((deq(z0) * cotangent).sum(), x, create_graph=True)


def test_a_parameter_of_both_the_cell_and_what_made_its_context():
    weight = (0.2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tight = {"rtol": 1e-12, "max_steps": 200}
    deq = pydeq.DEQ(
        lambda z, x: torch.tanh(z @ weight + x), adjoint=pydeq.Implicit(solver=pydeq.Broyden(), **tight), **tight
    )

    def implicit():
        x = torch.sin(data @ weight)
        return deq(torch.zeros_like(x), x)

    def unrolled():
        x = torch.sin(data @ weight)
        z = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(z @ weight + x)
        return z

    derivatives = []
    for solve in (implicit, unrolled):
        (first,) = torch.autograd.grad(solve().square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        derivatives.append((first.detach(), second))
    torch.testing.assert_close(*derivatives, rtol=1e-7, atol=1e-8)


def test_third_and_fourth_derivatives():
    cell, (x, direction) = Cell(), inputs()
    x = x.detach()
    deq = layer(cell, pydeq.Broyden())

    def derivatives(solve):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = solve(x + t * direction).pow(3).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value.detach(), *torch.autograd.grad(value, list(cell.parameters()))

    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    expected = derivatives(lambda x: unrolled(cell, z0, x, steps=100))
    torch.testing.assert_close(derivatives(lambda x: deq(z0, x)), expected, rtol=1e-7, atol=1e-8)


def test_a_forward_without_backward_leaves_nothing_behind():
    cell, (x, _) = Cell(), inputs()
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    z, solution = layer(cell, pydeq.Anderson())(z0, x, return_solution=True)
    alive = [weakref.ref(z), weakref.ref(solution)]
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        del z, solution
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "anderson"}, TypeError, "solver must be a solver like pydeq.Anderson"),
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0, got -1.0"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_iter": 3}, TypeError, "did you mean 'max_steps'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pydeq.Implicit(**arguments)
