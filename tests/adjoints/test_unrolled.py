"""Unrolled differentiation: the same solve as the fused one, with the gradient of what was computed."""

import math

import pytest
import torch
from torch import nn

import pydeq
from pydeq import Anderson, Broyden, Implicit, Picard, Unrolled
from pydeq.ops.constants import Status
from pydeq.testing import linear_map, softsign_map, tanh_map

SOLVERS = [Picard(), Picard(damping=0.7), Anderson(memory=1), Anderson(memory=4), Anderson(memory=3, damping=0.8)]


def layer(fn, solver, adjoint=None, rtol=1e-13, max_steps=400, **options):
    return pydeq.DEQ(fn, solver=solver, adjoint=adjoint or Unrolled(), rtol=rtol, max_steps=max_steps, **options)


def assert_same_solve(problem, solver, **options):
    expected = problem.solve(solver=solver, **options)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(problem.fn, solver=solver, adjoint=Unrolled(), **options)
    z, actual = deq(problem.z0, x, *problem.context[1:], return_solution=True)
    assert actual.nfe == expected.nfe
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.sample_nfe, expected.sample_nfe)
    for one, other in ((actual.value, expected.value), (actual.image, expected.image), (z, expected.image)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)
    # The residual is the difference of nearly equal numbers.
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-5, atol=1e-11)
    assert z.requires_grad
    return actual


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("max_steps", [1, 2, 7, 60])
def test_is_the_solve_of_fixed_point_with_samples_that_stop_at_different_times(solver, max_steps):
    problem = softsign_map([0.1, 0.5, 0.9, 0.97], 9, dtype=torch.float64)
    solution = assert_same_solve(problem, solver, rtol=1e-5, max_steps=max_steps)
    assert max_steps < 60 or len(set(solution.sample_nfe.tolist())) > 2


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_is_the_solve_of_fixed_point_where_it_diverges_or_ends_before_its_best(solver):
    assert_same_solve(linear_map(3.0, 8, dtype=torch.float64), solver, rtol=1e-9, max_steps=9)
    assert_same_solve(tanh_map(2.5, 8, dtype=torch.float64), solver, rtol=1e-9, max_steps=14)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("bad", [[0], [2], [3], [2, 3], [1, 2, 3, 4, 5]])
def test_retries_and_lost_samples_are_those_of_fixed_point_and_spoil_no_other_gradient(solver, bad):
    problem = softsign_map([0.5, 0.9, 0.9], 7, dtype=torch.float64)

    def run(bad):
        calls = -1

        def fn(z, x, r):
            nonlocal calls
            calls += 1
            f = problem.fn(z, x, r)
            return torch.cat([f[:1], f[1:2] + math.nan, f[2:]]) if calls in bad else f

        return type(problem)(fn, problem.z0, problem.context)

    expected = run(bad).solve(solver=solver, rtol=1e-6)
    x = problem.context[0].clone().requires_grad_()
    deq = pydeq.DEQ(run(bad).fn, solver=solver, adjoint=Unrolled(), rtol=1e-6)
    z, actual = deq(problem.z0, x, problem.context[1], return_solution=True)
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.sample_nfe, expected.sample_nfe)
    torch.testing.assert_close(z, expected.image, rtol=1e-9, atol=1e-11, equal_nan=True)
    lost = bool(expected.status[1] == Status.NONFINITE)
    (gradient,) = torch.autograd.grad(z[[0, 2]].sum() if lost else z.sum(), x)
    deq = pydeq.DEQ(run([]).fn, solver=solver, adjoint=Unrolled(), rtol=1e-6)
    (clean,) = torch.autograd.grad(deq(problem.z0, x, problem.context[1]).sum(), x)
    torch.testing.assert_close(gradient[[0, 2]], clean[[0, 2]], rtol=1e-9, atol=1e-11)
    assert bool(gradient.isfinite().all())


def contraction(dim=6):
    problem = tanh_map(0.5, dim, batch=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    weight = (0.2 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)).requires_grad_()
    v = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return weight, problem.z0, problem.context[0].clone().requires_grad_(), v


@pytest.mark.parametrize(
    ("solver", "checkpoint"), [*((s, False) for s in SOLVERS), (Picard(damping=0.7), True), (Anderson(memory=4), True)]
)
def test_converged_gradients_are_the_implicit_ones(solver, checkpoint):
    weight, z0, x, v = contraction()

    def cell(z, x):
        return torch.tanh(z @ weight.T + x)

    exact = layer(cell, Anderson(), Implicit(rtol=1e-13, max_steps=200))(z0, x)
    z = layer(cell, solver, Unrolled(checkpoint=checkpoint))(z0, x)
    for actual, expected in zip(
        torch.autograd.grad((z * v).sum(), [x, weight]),
        torch.autograd.grad((exact * v).sum(), [x, weight]),
        strict=True,
    ):
        # Derivatives converge a little behind the iterates.
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_tuple_states(solver):
    weight, z0, x, v = contraction()

    def pair(z, x):
        y = torch.tanh(torch.cat([z[0], z[1].flatten(1)], 1) @ weight.T + x)
        return y[:, :2], y[:, 2:].unflatten(1, (2, 2))

    a, b = layer(pair, solver, max_steps=6)((z0[:, :2], z0[:, 2:].unflatten(1, (2, 2))), x)
    (actual,) = torch.autograd.grad((torch.cat([a, b.flatten(1)], 1) * v).sum(), x)
    z = layer(lambda z, x: torch.tanh(z @ weight.T + x), solver, max_steps=6)(z0, x)
    (expected,) = torch.autograd.grad((z * v).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("solver", "checkpoint"), [*((s, False) for s in SOLVERS), (Picard(damping=0.7), True), (Anderson(memory=4), True)]
)
def test_unconverged_gradients_are_finite_differences_to_second_order(solver, checkpoint):
    """Far from convergence, where only what was computed can be differentiated; z0, context and closure."""
    weight, z0, x, _ = contraction(dim=2)
    z0, x = z0[:2], x.detach()[:2].requires_grad_()
    z0 = (z0 + 0.3).requires_grad_()
    deq = layer(lambda z, x: torch.tanh(z @ weight.T + x), solver, Unrolled(checkpoint=checkpoint), max_steps=4)

    def solve(z0, x, _):
        z, solution = deq(z0, x, return_solution=True)
        assert solution.nfe == 4
        return z

    assert torch.autograd.gradcheck(solve, (z0, x, weight), rtol=1e-5, atol=1e-7)
    if checkpoint == isinstance(solver, Picard):
        assert torch.autograd.gradgradcheck(solve, (z0, x, weight), rtol=1e-4, atol=1e-6)


def count_saved(checkpoint, max_steps):
    """Bytes that autograd keeps of a solve whose cell has a wide hidden layer."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    x = torch.randn(8, 4)
    deq = layer(lambda z, x: hidden(z) + x, Picard(), Unrolled(checkpoint=checkpoint), rtol=0.0, max_steps=max_steps)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = deq(torch.zeros(8, 4), x)
    z.sum().backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_checkpoints_keep_states_instead_of_graphs():
    plain, less = (count_saved(c, 14) - count_saved(c, 6) for c in (False, True))
    hidden = 8 * 2 * 64 * 4 * 8  # bytes of two hidden layers in eight evaluations
    assert plain - less > 0.9 * hidden
    assert less < 0.5 * plain


def test_checkpoints_evaluate_again_in_backward_with_the_same_masks():
    torch.manual_seed(0)
    calls = 0
    weight = (0.1 * torch.randn(16, 16)).requires_grad_()
    x = torch.randn(4, 16)

    def cell(z, x):
        nonlocal calls
        calls += 1
        return nn.functional.dropout(torch.tanh(z @ weight.T + x), 0.3)

    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        calls = 0
        z = layer(cell, Picard(), Unrolled(checkpoint=checkpoint), rtol=0.0, max_steps=5)(torch.zeros(4, 16), x)
        assert calls == 5
        gradients += torch.autograd.grad(z.square().sum(), weight)
        assert calls == (10 if checkpoint else 5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast(checkpoint):
    weight, z0, x, v = contraction()
    weight = weight.detach().float().requires_grad_()
    deq = layer(lambda z, x: torch.tanh(z @ weight.T + x), Anderson(), Unrolled(checkpoint=checkpoint), None, 30)
    with torch.autocast("cpu", torch.bfloat16):
        z, solution = deq(z0.float(), x.float(), return_solution=True)
    assert z.dtype == torch.float32
    assert bool(solution.converged.all())
    (reduced,) = torch.autograd.grad((z * v.float()).sum(), weight)
    (full,) = torch.autograd.grad((deq(z0.float(), x.float()) * v.float()).sum(), weight)
    assert torch.cosine_similarity(reduced.flatten(), full.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_states(dtype):
    problem = tanh_map(0.6, 16, dtype=dtype)
    x = problem.context[0].clone().requires_grad_()
    for solver in (Picard(damping=0.9), Anderson()):
        z, solution = layer(problem.fn, solver, rtol=None, max_steps=30)(problem.z0, x, return_solution=True)
        assert bool(solution.converged.all())
        (gradient,) = torch.autograd.grad(z.sum(), x)
        assert bool(gradient.isfinite().all())


def test_an_empty_batch_and_evaluation():
    deq = layer(lambda z, x: 0.5 * z + x, Picard())
    z, solution = deq(torch.zeros(0, 3), torch.ones(0, 3, requires_grad=True), return_solution=True)
    assert z.shape == (0, 3)
    assert solution.nfe == 0
    with torch.no_grad():
        assert not deq(torch.zeros(2, 3), torch.ones(2, 3)).requires_grad


def test_another_solver_is_refused():
    with pytest.raises(TypeError, match=r"iterations of pydeq.Picard or pydeq.Anderson, got Broyden\("):
        pydeq.DEQ(lambda z: z, solver=Broyden(), adjoint=Unrolled())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint": 1}, TypeError, "checkpoint must be a bool, got int"),
        ({"checkpoints": True}, TypeError, "did you mean 'checkpoint'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Unrolled(**arguments)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_cell_that_modifies_its_state_is_refused(checkpoint):
    deq = pydeq.DEQ(lambda z: z.mul_(0.5).add_(1.0), solver=pydeq.Picard(), adjoint=pydeq.Unrolled(checkpoint))
    with pytest.raises(ValueError, match=r"fn must not modify z in place: work on a copy, z\.clone\(\)"):
        deq(torch.zeros(2, 3))
