"""The reversible adjoint against autograd through the same iteration."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pydeq
from pydeq import Reversible
from pydeq.ops.constants import Status
from pydeq.testing import CallCounter, softsign_map, tanh_map


def iterates(fn, z0, iterations, b, *context):
    """y and f(y) after so many iterations."""
    y = z = z0
    for _ in range(iterations):
        y = (1 - b) * y + b * fn(z, *context)
        z = (1 - b) * z + b * fn(y, *context)
    return y, fn(y, *context)


def iterate(*arguments):
    return iterates(*arguments)[1]


def layer(fn, adjoint=None, rtol=0.0, max_steps=24, **options):
    return pydeq.DEQ(fn, adjoint=adjoint or Reversible(), rtol=rtol, max_steps=max_steps, **options)


class Cell(nn.Module):
    def __init__(self, dim=5, gain=0.35, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = gain * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(dtype))
        self.scale = torch.tensor(0.9, dtype=dtype, requires_grad=True)  # captured, not registered

    def forward(self, z, x):
        return torch.tanh(self.scale * z @ self.weight.T + x)


def inputs(dim=5, dtype=torch.float64, batch=3):
    generator = torch.Generator().manual_seed(1)
    z0, x, v = (torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return (0.3 * z0).requires_grad_(), x.requires_grad_(), v


@pytest.mark.parametrize("checkpoints", [0, 1, 4, 30])
@pytest.mark.parametrize("damping", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_equals_autograd_through_the_same_iteration(iterations, damping, checkpoints):
    cell, (z0, x, v) = Cell(), inputs()
    wanted = [z0, x, cell.weight, cell.scale]
    expected = iterate(cell, z0, iterations, damping, x)
    deq = layer(cell, Reversible(damping=damping, checkpoints=checkpoints), max_steps=2 * iterations + 1)
    actual, solution = deq(z0, x, return_solution=True)
    assert solution.nfe == 2 * iterations
    assert solution.sample_nfe.tolist() == [2 * iterations] * 3
    assert torch.equal(solution.image, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(cell(solution.value, x), actual, rtol=1e-12, atol=1e-13)
    in_a_row = -(-iterations // (checkpoints + 1))
    limit = max(1e-11, 1e-16 * (1.0 - damping) ** (-2 * in_a_row))  # what undoing amplifies eps to
    for one, other in zip(
        torch.autograd.grad((actual * v).sum(), wanted), torch.autograd.grad((expected * v).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


def test_gradcheck():
    cell, (z0, x, _) = Cell(dim=3), inputs(dim=3)
    deq = layer(cell, max_steps=6)
    assert torch.autograd.gradcheck(
        lambda z0, x, w: torch.func.functional_call(deq, {"cell.weight": w}, (z0, x)), (z0, x, cell.weight)
    )


@pytest.mark.parametrize("checkpoints", [0, 3])
def test_samples_that_stop_at_different_times(checkpoints):
    problem = softsign_map([0.1, 0.5, 0.9, 0.6], 9, dtype=torch.float64)
    x, r = (entry.clone().requires_grad_() for entry in problem.context)
    v = torch.randn(4, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    deq = layer(problem.fn, Reversible(checkpoints=checkpoints), rtol=1e-4, max_steps=60)
    z, solution = deq(problem.z0, x, r, return_solution=True)
    iterations = (solution.sample_nfe // 2).tolist()
    assert solution.converged.all()
    assert len(set(iterations)) == 4
    expected = torch.stack([
        iterate(problem.fn, problem.z0[i : i + 1], n, 0.5, x[i : i + 1], r[i : i + 1])[0]
        for i, n in enumerate(iterations)
    ])  # fmt: skip
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad((z * v).sum(), [x, r]), torch.autograd.grad((expected * v).sum(), [x, r]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_ends_at_the_best_iterate_and_differentiates_what_led_there():
    problem = tanh_map(2.5, 6, batch=8, dtype=torch.float64)
    x = problem.context[0].clone().requires_grad_()
    z = layer(problem.fn, max_steps=20)(problem.z0, x)
    best = []
    for i in range(8):
        pairs = [iterates(problem.fn, problem.z0[i : i + 1], n, 0.5, x[i : i + 1]) for n in range(1, 11)]
        images = [image[0] for _, image in pairs]
        n = min(range(10), key=lambda k: float((pairs[k][1] - pairs[k][0]).norm().detach()))
        torch.testing.assert_close(z[i], images[n], rtol=1e-9, atol=1e-10)
        (gradient,) = torch.autograd.grad(z[i].sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(images[n].sum(), x)[0], rtol=1e-6, atol=1e-8)
        best.append(n + 1)
    assert min(best) < 10  # not all of them at the end


def test_the_converged_gradient_is_the_implicit_one():
    cell, (z0, x, v) = Cell(gain=0.2), inputs()
    wanted = [x, cell.weight, cell.scale]
    exact = layer(cell, pydeq.Implicit(rtol=1e-13, max_steps=200), rtol=1e-12, max_steps=100)(z0, x)
    z, solution = layer(cell, rtol=1e-10, max_steps=160)(z0, x, return_solution=True)
    assert solution.converged.all()
    for one, other in zip(
        torch.autograd.grad((z * v).sum(), wanted), torch.autograd.grad((exact * v).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_tuple_states():
    cell, (z0, x, v) = Cell(), inputs()

    def pair(z, x):
        y = cell(torch.cat([z[0], z[1].flatten(1)], 1), x)
        return y[:, :1], y[:, 1:].unflatten(1, (2, 2))

    a, b = layer(pair)((z0[:, :1], z0[:, 1:].unflatten(1, (2, 2))), x)
    one = torch.autograd.grad((torch.cat([a, b.flatten(1)], 1) * v).sum(), [z0, x, cell.weight])
    other = torch.autograd.grad((layer(cell)(z0, x) * v).sum(), [z0, x, cell.weight])
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_computed_context_that_shares_a_parameter_with_the_cell():
    cell, (z0, x, v) = Cell(), inputs()

    def features():
        return torch.sin(x @ cell.weight)

    z = layer(lambda z, context: cell(z, context["x"][0]))(z0, {"x": [features()]})
    expected = iterate(cell, z0, 12, 0.5, features())
    for actual, wanted in zip(
        torch.autograd.grad((z * v).sum(), [x, cell.weight]),
        torch.autograd.grad((expected * v).sum(), [x, cell.weight]),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_a_captured_computed_tensor_is_refused_not_forgotten():
    cell, (z0, x, _) = Cell(), inputs()
    features = 2.0 * x
    with pytest.raises(RuntimeError, match="pass that tensor to the layer as context"):
        layer(lambda z: cell(z, features))(z0)
    with pytest.raises(RuntimeError, match="pass that tensor to the layer as context"):
        layer(lambda z, x: cell(z, features) + x)(z0, features)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_narrow_states_keep_their_digits(dtype, limit):
    exact, (z0, x, v) = Cell(gain=0.3), inputs()
    (expected,) = torch.autograd.grad((layer(exact)(z0, x) * v).sum(), exact.weight)
    cell, (z0, x, v) = Cell(gain=0.3, dtype=dtype), inputs(dtype=dtype)
    z = layer(cell)(z0, x)
    assert z.dtype == dtype
    (actual,) = torch.autograd.grad((z * v).sum(), cell.weight)
    assert (actual.double() - expected).norm() < limit * expected.norm()


def test_evaluates_twice_per_iteration_forward_and_backward():
    cell, (z0, x, _) = Cell(), inputs()
    fn = CallCounter(cell)
    z, solution = layer(fn, max_steps=10)(z0, x, return_solution=True)
    assert fn.calls == solution.nfe == 10
    z.sum().backward()
    assert fn.calls == 20


def test_without_gradients_it_is_the_same_iteration():
    cell, (z0, x, _) = Cell(), inputs()
    deq = layer(cell, rtol=1e-3)
    z, solution = deq(z0, x, return_solution=True)
    with torch.no_grad():
        other, unattached = deq(z0, x, return_solution=True)
    assert torch.equal(z, other)
    assert not other.requires_grad
    assert solution.nfe == unattached.nfe
    assert not layer(lambda z, x: 0.5 * z + x)(torch.zeros(2, 3), torch.ones(2, 3)).requires_grad


def test_autocast_is_forwards_in_backward():
    cell, (z0, x, v) = Cell(dim=16, gain=0.1, dtype=torch.float32), inputs(dim=16, dtype=torch.float32)
    deq = layer(cell, rtol=None)
    dtypes = []
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(lambda z, x: (dtypes.append((z @ z.T).dtype), cell(z, x))[1], rtol=None)(z0, x)
    (reduced,) = torch.autograd.grad((z * v).sum(), cell.weight)
    assert set(dtypes) == {torch.bfloat16}
    (full,) = torch.autograd.grad((deq(z0, x) * v).sum(), cell.weight)
    assert torch.cosine_similarity(reduced.flatten(), full.flatten(), dim=0) > 0.99


def test_lost_samples_end_and_leave_the_others():
    cell, (z0, x, _) = Cell(), inputs()

    def run(bad):
        calls = 0

        def fn(z, x):
            nonlocal calls
            calls += 1
            f = cell(z, x)
            return torch.cat([f[:1], f[1:2] * torch.inf, f[2:]]) if bad <= calls <= 12 else f

        return layer(fn, max_steps=12)(z0, x, return_solution=True)

    clean, _ = run(99)
    (expected,) = torch.autograd.grad(clean[[0, 2]].sum(), x)
    for bad in (1, 2, 5, 6):
        z, solution = run(bad)
        assert solution.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE, Status.MAX_STEPS]
        assert solution.sample_nfe.tolist() == [12, 2 * ((bad + 1) // 2), 12]  # at once
        assert torch.equal(z[[0, 2]], clean[[0, 2]])
        assert bool(solution.value.isfinite().all())
        (gradient,) = torch.autograd.grad(z[[0, 2]].sum(), x)
        torch.testing.assert_close(gradient[[0, 2]], expected[[0, 2]], rtol=1e-10, atol=1e-12)


def saved_bytes(max_steps, adjoint):
    cell, (z0, x, _) = Cell(), inputs()
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(cell, adjoint, max_steps=max_steps)(z0, x)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_memory_does_not_grow_with_the_iterations():
    # Of both so many that all checkpoints are there.
    assert saved_bytes(20, Reversible()) == saved_bytes(80, Reversible()) > saved_bytes(80, Reversible(checkpoints=0))


def test_states_that_cannot_be_undone_warn():
    cell, (z0, x, _) = Cell(gain=0.2), inputs()
    z = layer(cell, Reversible(damping=0.9, checkpoints=0), max_steps=60)(z0, x)
    with pytest.warns(RuntimeWarning, match="undone to states that are off by .* raise checkpoints"):
        z.sum().backward()
    layer(cell, Reversible(damping=0.9, checkpoints=5), max_steps=60)(z0, x).sum().backward()


def test_changed_parameters_are_noticed():
    cell, (z0, x, _) = Cell(), inputs()
    z = layer(cell)(z0, x)
    with torch.no_grad():
        cell.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_second_derivative_is_refused():
    cell, (z0, x, _) = Cell(), inputs()
    (first,) = torch.autograd.grad(layer(cell)(z0, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_forward_without_backward_leaves_nothing_behind():
    cell, (z0, x, _) = Cell(), inputs()
    z, solution = layer(cell)(z0, x, return_solution=True)
    alive = [weakref.ref(z), weakref.ref(solution), weakref.ref(z.grad_fn)]
    gc.disable()
    try:
        del z, solution
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_an_empty_batch():
    z, solution = layer(lambda z, x: 0.5 * z + x)(
        torch.zeros(0, 3), torch.ones(0, 3, requires_grad=True), return_solution=True
    )
    assert z.shape == (0, 3)
    assert solution.nfe == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": 1.0}, ValueError, r"damping must be in \(0, 1\), got 1.0"),
        ({"damping": 0.0}, ValueError, r"damping must be in \(0, 1\), got 0.0"),
        ({"damping": "half"}, TypeError, "damping must be a number, got str"),
        ({"checkpoints": -1}, ValueError, "checkpoints must be at least 0, got -1"),
        ({"checkpoints": True}, TypeError, "checkpoints must be an int, got bool"),
        ({"beta": 0.5}, TypeError, "did you mean 'damping'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Reversible(**arguments)


def test_one_evaluation_is_too_few():
    with pytest.raises(ValueError, match=r"max_steps must be at least 2 for Reversible, .* got 1"):
        layer(Cell(), max_steps=1)(*inputs()[:2])
