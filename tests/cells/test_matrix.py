"""Every use of a DEQ with every cell of the list: one column of tests for each use.

``limits`` lists what torch itself cannot do. There, a DEQ must raise the same error as torch.
"""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cells import CELLS, Case
from limits import FUSED, LIMITS, ONCE_DIFFERENTIABLE, REFUSED, lstm_limit
from table import table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import pydeq
from pydeq.cell.plain_operations import any_order
from pydeq.jacobian import modes
from pydeq.ops import random_probes
from pydeq.ops.constants import Distribution

pytestmark = pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other")

FINE = {"rtol": 1e-11, "max_steps": 200}


# Every cell works in a column, or raises what torch raises.
each = pytest.mark.parametrize("case", CELLS, ids=str)


def layer(case: Case, cell, **options):
    adjoint = pydeq.Implicit(pydeq.Broyden(), rtol=1e-10, max_steps=200)
    return pydeq.DEQ(cell, has_aux=case.has_aux, **{"adjoint": adjoint} | FINE | options)


def parts(state):
    """Concatenate the tensors of a state to [B, D]."""
    return torch.cat([part.flatten(1) for part in tree_leaves(state)], dim=1)


def evaluate(case: Case, cell, z, context):
    y = cell(z, *context)
    return y[0] if case.has_aux else y


def unrolled(case: Case, cell, z, context, digits=1e-11):
    """Iterate plainly until nothing changes."""
    for _ in range(300):
        before, z = z, evaluate(case, cell, z, context)
        if (parts(z) - parts(before)).abs().max() < digits:
            break
    return z


def sources(cell, context):
    """The tensors to take gradients of: x and the parameters."""
    x = context[-1].requires_grad_()
    return [x, *(cell.parameters() if isinstance(cell, torch.nn.Module) else ())]


def loss(z):
    flat = parts(z)
    return (flat * torch.linspace(-1.0, 1.0, flat.shape[1], dtype=flat.dtype)).sum() + 0.1 * flat.pow(3).sum()


def assert_same_type(z, z0):
    assert type(z) is type(z0)
    assert [part.shape for part in tree_leaves(z)] == [part.shape for part in tree_leaves(z0)]


def assert_all_close(found, expected, rtol, atol):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def is_limited(column, case, does, plainly):
    """Whether torch cannot do this; checks that a DEQ and plain torch then raise the same error."""
    limit = LIMITS.get(column, {}).get(case.name)
    if column == "bf16 autocast" and "nn.LSTM " in case.name:
        limit = lstm_limit()
    if limit is not None:
        for call in (does, plainly):
            with pytest.raises(limit.error, match=limit.message):
                call()
    return limit is not None


@each
def test_inference(case):
    cell, z0, context = case.build()
    with torch.inference_mode():
        z, solution = layer(case, cell)(z0, *context, return_solution=True)
        assert solution.converged.all()
        assert_same_type(z, z0)
        assert_all_close([parts(z)], [parts(unrolled(case, cell, z0, context))], 1e-7, 1e-8)


@each
def test_gradients(case):
    """Gradients of Implicit equal those through plain iteration."""
    cell, z0, context = case.build()
    inputs = sources(cell, context)
    z = layer(case, cell)(z0, *context)
    assert_same_type(z, z0)
    found = torch.autograd.grad(loss(z), inputs)
    expected = torch.autograd.grad(loss(unrolled(case, cell, z0, context)), inputs)
    assert_all_close(found, expected, 1e-6, 1e-7)


@each
@pytest.mark.parametrize("solver", [pydeq.NewtonKrylov(), pydeq.TrustRegion()], ids=str)
@pytest.mark.filterwarnings("ignore:products with the Jacobian are formed one by one:RuntimeWarning")
def test_solvers_that_use_the_jacobian(case, solver):
    cell, z0, context = case.build()
    z, solution = layer(case, cell, solver=solver)(z0, *context, return_solution=True)
    assert solution.converged.all()
    assert solution.products > 0
    assert_same_type(z, z0)
    assert_all_close([parts(z)], [parts(unrolled(case, cell, z0, context))], 1e-7, 1e-8)


def second(z, inputs):
    (g,) = torch.autograd.grad(loss(z), inputs[0], create_graph=True)
    g.square().sum().backward()
    found = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    return found


@each
def test_second_derivatives(case):
    cell, z0, context = case.build()
    inputs = sources(cell, context)

    def does():
        return second(layer(case, cell)(z0, *context), inputs)

    def plainly():
        return second(unrolled(case, cell, z0, context), inputs)

    if is_limited("second derivatives", case, does, plainly):
        if LIMITS["second derivatives"][case.name] is not FUSED:
            return
        with sdpa_kernel(SDPBackend.MATH):
            found, expected = does(), plainly()
    else:
        found, expected = does(), plainly()
    assert_all_close(found, expected, 1e-5, 1e-6)


@each
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm
@pytest.mark.filterwarnings("ignore:the (backward|forward) solve of:pydeq.ConvergenceWarning")  # the inner layer
def test_autocast(case):
    cell, z0, context = case.build(torch.float32)
    deq = pydeq.DEQ(cell, has_aux=case.has_aux)
    inputs = sources(cell, context)

    def cast(of):
        with torch.autocast("cpu", torch.bfloat16):
            z = of()
        return z, torch.autograd.grad(loss(z), inputs)

    def does():
        return cast(lambda: deq(z0, *context))

    if is_limited("bf16 autocast", case, does, lambda: cast(lambda: evaluate(case, cell, z0, context))):
        return
    with torch.no_grad():
        exact = parts(deq(z0, *context))
    z, gradients = does()
    assert_same_type(z, z0)
    assert parts(z).dtype == torch.float32
    assert (parts(z) - exact).norm() <= 0.1 * exact.norm()
    assert all(g.isfinite().all() for g in gradients)


@each
def test_compiled(case):
    cell, z0, context = case.build()
    inputs = sources(cell, context)
    expected = layer(case, cell)(z0, *context)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about what it looks at
        z = layer(case, torch.compile(cell, backend="eager"))(z0, *context)
        found = torch.autograd.grad(loss(z), inputs)
    assert_same_type(z, z0)
    assert_all_close([parts(z)], [parts(expected)], 1e-8, 1e-9)
    assert_all_close(found, torch.autograd.grad(loss(expected), inputs), 1e-6, 1e-7)


@each
def test_copies(case):
    cell, z0, context = case.build()
    deq = layer(case, cell)
    with torch.no_grad():
        z = deq(z0, *context)
        assert torch.equal(parts(copy.deepcopy(deq)(z0, *context)), parts(z))
        if not case.closure:
            fresh = layer(case, case.build(seed=1)[0])
            fresh.load_state_dict(deq.state_dict())
            assert torch.equal(parts(fresh(z0, *context)), parts(z))


@each
def test_torch_func(case):
    cell, z0, context = case.build()
    (x,) = sources(cell, context)[:1]
    deq = layer(case, cell)

    def does():
        return torch.func.grad(lambda x: loss(deq(z0, *context[:-1], x)))(x.detach())

    def plainly():
        return torch.func.grad(lambda x: loss(evaluate(case, cell, z0, (*context[:-1], x))))(x.detach())

    if not is_limited("torch.func", case, does, plainly):
        (expected,) = torch.autograd.grad(loss(deq(z0, *context)), x)
        assert_all_close([does()], [expected], 1e-6, 1e-7)


def dense(case, cell, z, context):
    """The Jacobian of each sample, [B, D, D]."""
    leaves = [part.detach().requires_grad_() for part in tree_leaves(z)]
    numbers = iter(leaves)
    y = parts(evaluate(case, cell, tree_map(lambda _: next(numbers), z), context))
    rows = [parts(torch.autograd.grad(y[:, i].sum(), leaves, retain_graph=True)) for i in range(y.shape[1])]
    return torch.stack(rows, dim=1)


@each
@pytest.mark.filterwarnings("ignore:products with the Jacobian are formed one by one:RuntimeWarning")
def test_the_exact_penalty(case):
    cell, z0, context = case.build()
    penalty = pydeq.JacobianPenalty(1.0, method="exact")

    def penalized():
        with torch.no_grad():
            return layer(case, cell)(z0, *context, return_solution=True, penalty=penalty)

    if case.couples:
        with pytest.raises(ValueError, match="needs an fn that treats samples independently"):
            penalized()
        return
    z, solution = penalized()
    J = dense(case, cell, z, context)
    exact = J.square().sum((1, 2)).mean() / J.shape[1]
    assert_all_close([solution.penalty], [exact], 1e-7, 1e-9)


def products(case, cell, z, context, v, from_right, **graph):
    """J v or v^T J for v [B, D], by plain autograd. J v is the derivative of u^T J v with respect to u.

    If the cell cannot be differentiated twice, J v comes from a difference.
    """
    if from_right and case.name == ONCE_DIFFERENTIABLE:
        h = 1e-3
        return (evaluate(case, cell, z + h * v, context) - evaluate(case, cell, z - h * v, context)) / (2 * h)
    leaves = [part.detach().requires_grad_() for part in tree_leaves(z)]
    numbers = iter(leaves)
    y = parts(evaluate(case, cell, tree_map(lambda _: next(numbers), z), context))
    u = (torch.zeros_like(v) if from_right else v).requires_grad_()
    g = torch.autograd.grad(y, leaves, u, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(parts(g), u, v, **graph)[0] if from_right else parts(g)


def penalized(case, cell, z, context, inputs, mode):
    """The penalty, its gradients, and whether a warning said that it uses differences."""

    def fn(z, *context):
        return evaluate(case, cell, z, context)

    options = {"order": 2, "step": 1e-4} if mode == "difference" else {}
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        penalty = pydeq.jacobian_penalty(
            fn, z, *context, mode=mode, generator=torch.Generator().manual_seed(1), **options
        )
    gradients = torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
    return penalty.detach(), gradients, any("is made of differences of fn" in str(w.message) for w in caught)


@each
@pytest.mark.parametrize("mode", ["vjp", "jvp", "difference", "auto"])
def test_the_penalty_and_its_gradients(case, mode, monkeypatch):
    """They equal those of plain autograd with the same probes, or an error says what to use."""
    monkeypatch.setattr(modes, "_warned", set())
    cell, z, context = case.build()
    z = tree_map(lambda part: part + 0.1 * torch.randn_like(part), z)
    inputs = sources(cell, context)
    like = torch.empty_like(parts(z))
    (v,) = random_probes(like, 1, Distribution.GAUSSIAN, torch.Generator().manual_seed(1))
    limit = REFUSED.get(mode, {}).get(case.name)
    if mode == "vjp" and not case.twice:
        limit = "mode='vjp' needs second derivatives of fn, which has none .*use mode='difference'"
    if limit is not None:
        with pytest.raises(RuntimeError, match=limit):
            penalized(case, cell, z, context, inputs, mode)
        return
    found, gradients, differences = penalized(case, cell, z, context, inputs, mode)
    assert differences == (mode == "auto" and not case.twice)
    if differences:  # of a step that a user would take
        found, gradients, _ = penalized(case, cell, z, context, inputs, "difference")
    from_right = mode in ("jvp", "difference") or differences
    with warnings.catch_warnings(), any_order() if from_right or not case.twice else nullcontext():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        expected = products(case, cell, z, context, v, from_right, create_graph=from_right).square().mean()
        wanted = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    assert_all_close([found], [expected.detach()], 1e-5, 1e-7)
    assert_all_close(gradients, wanted, 1e-4, 1e-5)


def test_the_docs_have_the_table():
    """``python tests/cells/table.py`` writes it."""
    assert table() in (Path(__file__).parents[2] / "docs" / "cells.md").read_text()


def test_limits_and_cells_have_the_same_names():
    names = {case.name for case in CELLS}
    assert names.issuperset(name for column in LIMITS.values() for name in column)
