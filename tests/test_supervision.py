"""States along the way: which ones they are, what gradients they have; and the weights of their losses."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pydeq
from pydeq import Anderson, Broyden, Implicit, JacobianFree, Phantom, Picard, Reversible, Shine, Unrolled
from pydeq.adjoints.base import Problem
from pydeq.cell.prepared import PreparedCell
from pydeq.cell.torch_compile import Compiler
from pydeq.testing import CallCounter, softsign_map, tanh_map

ADJOINTS = [
    (Anderson(), Implicit()),
    (Picard(damping=0.8), JacobianFree()),
    (Broyden(), Shine()),
    (Anderson(), Phantom(steps=2, form="neumann")),
    (Anderson(), Unrolled()),
    (Anderson(), Reversible()),
]


# GMRES closes a cycle with its last evaluation, which a longer solve does later.
SOLVERS = [Picard(), Anderson(), Broyden()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("compact", [False, True])
def test_states_are_the_images_of_shorter_solves(solver, compact):
    """To the last bit, also of samples that were done before."""
    options = {"solver": solver, "rtol": 1e-4, "compact": compact, "batched_context": (True, True)}
    assert_states_are_images(softsign_map([0.1, 0.5, 0.9, 0.98], 9), options)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_states_of_samples_that_are_best_earlier(solver):
    assert_states_are_images(tanh_map(2.5, 9), {"solver": solver, "rtol": 1e-4})


def assert_states_are_images(problem, options):
    counts = (1, 2, 3, 5, 8, 30)
    solution = problem.solve(max_steps=12, states_at=counts, **options)
    for count, state in zip(counts, solution.states, strict=True):
        assert torch.equal(state, problem.solve(max_steps=min(count, 12), **options).image)
    assert torch.equal(solution.image, problem.solve(max_steps=12, **options).image)


def test_states_of_a_solve_that_is_over_early_are_the_solution(solver):
    problem = softsign_map(0.3, 5)
    nfe = problem.solve(solver=solver).nfe
    solution = problem.solve(solver=solver, states_at=[2, nfe, 40, 45])
    assert [torch.equal(state, solution.image) for state in solution.states] == [False, True, True, True]


def test_no_states_unless_asked_for():
    problem = softsign_map(0.3, 5)
    assert problem.solve().states == []
    x = problem.context[0].clone().requires_grad_()
    assert pydeq.DEQ(problem.fn)(problem.z0, x, problem.context[1], return_solution=True)[1].states == []


def test_states_of_tuples():
    problem = tanh_map(0.7, 6)

    def pair(z, x):
        y = problem.fn(torch.cat(z, 1), x)
        return y[:, :2], y[:, 2:]

    z0 = (problem.z0[:, :2], problem.z0[:, 2:])
    states = pydeq.fixed_point(pair, z0, *problem.context, states_at=[2, 4]).states
    plain = problem.solve(states_at=[2, 4]).states
    for state, expected in zip(states, plain, strict=True):
        assert isinstance(state, tuple)
        torch.testing.assert_close(torch.cat(state, 1), expected)


@pytest.mark.parametrize(("solver", "adjoint"), ADJOINTS, ids=repr)
def test_a_layer_returns_attached_states_and_last_its_output(solver, adjoint):
    problem = tanh_map(0.5, 6, dtype=torch.float64)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=solver, adjoint=adjoint, rtol=1e-4, states_at=[2, 4, 49])
    z, solution = deq(problem.z0, x, return_solution=True)
    assert solution.nfe < 49
    assert len(solution.states) == 4
    assert solution.states[3] is z
    last = solution.states[2]  # of a solve that was over by then: with the adjoint's gradient, not another one
    assert torch.equal(last, z)
    (one,) = torch.autograd.grad(last.sum(), x, retain_graph=True)
    (other,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    assert torch.equal(one, other)
    for count, state in zip([2, 4], solution.states, strict=False):
        if isinstance(adjoint, Reversible):
            cell = PreparedCell(problem.fn, problem.z0, compiler=Compiler())
            options = {"rtol": 1e-4, "max_steps": count}
            image = adjoint.evaluate(Problem(cell, problem.context, options)).image
        else:
            image = problem.solve(solver=solver, rtol=1e-4, max_steps=count).image
        (gradient,) = torch.autograd.grad(state.sum(), x, retain_graph=True)
        if isinstance(adjoint, Unrolled):
            torch.testing.assert_close(state, image, rtol=1e-9, atol=1e-11)
            expected, _ = pydeq.DEQ(problem.fn, solver=solver, adjoint=adjoint, rtol=1e-4)(
                problem.z0, x, max_steps=count, return_solution=True
            )
        else:
            expected = problem.fn(image, x)
            torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-9, atol=1e-11)


def test_states_cost_one_evaluation_each_and_none_where_the_solve_was_over():
    problem = tanh_map(0.8, 6)
    fn = CallCounter(problem.fn)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(fn, states_at=[1, 3, 48, 49])
    _, solution = deq(problem.z0, x, return_solution=True)
    assert fn.calls == solution.nfe + 1 + 2
    fn.batches.clear()
    _, solution = deq(problem.z0, x, return_solution=True, max_steps=3)
    assert fn.calls == 3 + 1 + 1
    fn.batches.clear()
    deq(problem.z0, x)  # nobody sees the states
    assert fn.calls < solution.nfe + 20
    deq.eval()
    with torch.no_grad():
        fn.batches.clear()
        z, solution = deq(problem.z0, x, return_solution=True)
    assert fn.calls == solution.nfe
    assert len(solution.states) == 5
    assert solution.states[-1] is z
    assert not any(state.requires_grad for state in solution.states)


def test_backward_statistics_reach_the_solution_with_states():
    problem = tanh_map(0.8, 6)
    x = problem.context[0].clone().requires_grad_()
    z, solution = pydeq.DEQ(problem.fn, states_at=[2])(problem.z0, x, return_solution=True)
    assert solution.backward is None
    z.sum().backward()
    assert solution.backward.nfe > 1


@pytest.mark.parametrize(("solver", "adjoint"), ADJOINTS, ids=repr)
def test_a_solution_with_states_leaves_nothing_behind(solver, adjoint):
    problem = tanh_map(0.8, 6)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=solver, adjoint=adjoint, states_at=[2, 4])
    z, solution = deq(problem.z0, x, return_solution=True)
    alive = [weakref.ref(thing) for thing in (z, solution, *solution.states)]
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        del z, solution
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


def test_training_with_a_correction_fits_earlier_states_too():
    generator = torch.Generator().manual_seed(0)
    cell = nn.Linear(8, 8)
    with torch.no_grad():
        cell.weight.copy_(0.1 * torch.randn(8, 8, generator=generator))
        cell.bias.zero_()
    x, target = torch.randn(16, 8, generator=generator), 0.5 * torch.randn(16, 8, generator=generator).tanh()
    deq = pydeq.DEQ(lambda z, x: torch.tanh(cell(z) + x), states_at=[2, 4], rtol=1e-6)
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        _, solution = deq(torch.zeros(16, 8), x, return_solution=True)
        loss, each = pydeq.fixed_point_correction(nn.functional.mse_loss, solution.states, target, return_losses=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([value.item() for value in each])
    assert all(end < 0.8 * start for start, end in zip(losses[0], losses[-1], strict=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.8**2, 0.8, 1.0]),
        ({"gamma": 0.5}, [0.25, 0.5, 1.0]),
        ({"weights": "linear"}, [1 - 2 / 3 * 0.9, 1 - 1 / 3 * 0.9, 1.0]),
        ({"weights": "linear", "gamma": 0.3}, [0.8, 0.9, 1.0]),
        ({"weights": "constant"}, [1.0, 1.0, 1.0]),
        ({"weights": "constant", "gamma": 0.2}, [0.2, 0.2, 0.2]),
        ({"weights": lambda k, n: k / n}, [0.0, 1 / 3, 2 / 3]),
        ({"weights": [3, 2, 1.5]}, [3.0, 2.0, 1.5]),
    ],
)
def test_weights(arguments, expected):
    states = [torch.tensor([float(i), 1.0], dtype=torch.float64) for i in (1, 10, 100)]
    seen = []

    def criterion(state, a, b):
        seen.append((a, b))
        return state * 2

    loss, losses = pydeq.fixed_point_correction(criterion, states, "a", "b", return_losses=True, **arguments)
    assert seen == [("a", "b")] * 3
    assert all(torch.equal(one, 2 * state) for one, state in zip(losses, states, strict=True))
    wanted = sum(w * 2 * state for w, state in zip(expected, states, strict=True))
    torch.testing.assert_close(loss, wanted)  # one loss per sample stays one per sample
    torch.testing.assert_close(pydeq.fixed_point_correction(criterion, states, 1, 2, **arguments), wanted)


def test_the_last_weight_is_1_whatever_the_number_of_states():
    for n in (1, 2, 7):
        for weights in ("exponential", "linear", "constant"):
            states = [torch.zeros(()) for _ in range(n - 1)] + [torch.ones(())]
            assert pydeq.fixed_point_correction(lambda z: z, states, weights=weights) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criterion": "mse"}, TypeError, "criterion must be callable, got str"),
        ({"states": torch.zeros(3)}, TypeError, "states must be a list of states, got Tensor"),
        ({"states": []}, ValueError, "states must have at least one state, got none: ask the layer"),
        ({"weights": "exp"}, ValueError, "weights must be one of 'exponential', 'linear', 'constant', got 'exp'"),
        ({"weights": [1.0]}, ValueError, "weights must have one entry for each of the 2 states, got 1"),
        ({"weights": 3.0}, TypeError, "weights must be a name, a callable or a list of numbers, got float"),
        ({"weights": [1.0, 2.0], "gamma": 0.5}, ValueError, "gamma belongs to weights given by name, got 0.5"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite, got nan"),
    ],
)
def test_bad_arguments_of_the_correction(arguments, error, message):
    arguments = {"criterion": torch.sum, "states": [torch.zeros(2)] * 2, **arguments}
    with pytest.raises(error, match=message):
        pydeq.fixed_point_correction(**arguments)


@pytest.mark.parametrize(
    ("states_at", "error", "message"),
    [
        (3, TypeError, "states_at must be a list of ints, got int"),
        ([0, 1], ValueError, r"states_at\[0\] must be at least 1, got 0"),
        ([2, 2], ValueError, r"states_at must increase, got \[2, 2\]"),
        ([1, 2.5], TypeError, r"states_at\[1\] must be an int, got float"),
    ],
)
def test_bad_counts(states_at, error, message):
    with pytest.raises(error, match=message):
        pydeq.DEQ(torch.sin, states_at=states_at)
    with pytest.raises(error, match=message):
        pydeq.fixed_point(torch.sin, torch.zeros(2, 3), states_at=states_at)
