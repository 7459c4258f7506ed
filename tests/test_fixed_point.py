"""The call itself: its arguments, the autograd and autocast state around it, and what it refuses."""

import re

import pytest
import torch
from torch import nn

import pydeq
from pydeq.testing import assert_close, assert_identical, softsign_map, tanh_map


def half(z, *context):
    return 0.5 * z + 1.0


# Defaults and arguments


def test_defaults():
    """Anderson with memory 5, rtol 1e-3, atol 0, 50 steps; freezing and stalling."""
    problem = tanh_map(0.99, 30, batch=3)
    said = problem.solve(
        solver=pydeq.Anderson(memory=5, damping=1.0, ridge=1e-6),
        rtol=1e-3,
        atol=0.0,
        max_steps=50,
        trace=False,
        throw=False,
        freeze=True,
        stall=True,
        compact=False,
    )
    assert_identical(problem.solve(), said)
    assert pydeq.fixed_point(lambda z: z + 1.0, torch.zeros(2)).nfe == 50


@pytest.mark.parametrize("context", [(), (1.0,), (None, {"key": [1]}, torch.ones(7), "text")], ids=range(3))
def test_context_is_passed_on_as_it_is(solver, context):
    def fn(z, *given):
        assert len(given) == len(context)
        assert all(one is other for one, other in zip(given, context, strict=True))
        return half(z)

    assert pydeq.fixed_point(fn, torch.zeros(2, 3), *context, solver=solver).converged.all()


def test_fn_may_be_a_module(solver):
    torch.manual_seed(0)
    cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    solution = pydeq.fixed_point(cell, torch.zeros(3, 4), solver=solver)
    assert solution.converged.all()
    assert_close(cell(solution.value).detach(), solution.image, size=4)


def test_a_solver_of_ones_own():
    """What a solver is: hyperparameters that start a workspace."""

    class Twice(pydeq.Picard):
        def start(self, flat, rules, max_steps):
            return super().start(2.0 * flat, rules, max_steps)

    solution = pydeq.fixed_point(half, torch.ones(2, 3), solver=Twice(), max_steps=1)
    assert torch.equal(solution.value, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("tolerance", [0, 1, 0.5, float("inf")])
def test_tolerances_may_be_any_number_from_zero(solver, tolerance):
    pydeq.fixed_point(half, torch.ones(2, 3), solver=solver, rtol=tolerance, atol=tolerance)


# Around autograd


@pytest.mark.parametrize("where", ["z0", "context", "closure", "module"])
def test_no_gradient_flows(solver, where):
    z0, x = torch.zeros(3, 4), torch.ones(3, 4)
    cell = nn.Linear(4, 4)
    for tensor in {"z0": [z0], "context": [x], "closure": [x], "module": []}[where]:
        tensor.requires_grad_()

    def fn(z, *context):
        assert not torch.is_grad_enabled()
        return 0.1 * cell(z) + (context[0] if context else x)

    solution = pydeq.fixed_point(fn, z0, *((x,) if where == "context" else ()), solver=solver)
    assert solution.converged.all()
    for tensor in (solution.value, solution.image, solution.residual, solution.relative_residual):
        assert not tensor.requires_grad
    assert torch.is_grad_enabled()


def test_fn_may_turn_gradients_on(solver):
    """A gradient of an energy, say; what it returns has a graph that a solve does not follow."""
    x = torch.ones(3, 4, requires_grad=True)

    def fn(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((0.25 * z.square() + x * z).sum(), z)
            return gradient + 0.0 * x

    solution = pydeq.fixed_point(fn, torch.zeros(3, 4), solver=solver)
    assert solution.converged.all()
    assert not solution.image.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode(solver, context):
    problem = softsign_map(0.9, 9)
    expected = problem.solve(solver=solver, trace=True)
    with context():
        solution = problem.solve(solver=solver, trace=True)
    assert_identical(solution, expected)
    assert "converged" in repr(solution)


def test_inference_tensors_come_in_and_go_out(solver):
    problem = softsign_map(0.9, 9)
    with torch.inference_mode():
        z0 = torch.zeros(4, 9)
        warm = problem.solve(solver=solver, max_steps=2).image
    for start in (z0, warm):
        solution = pydeq.fixed_point(problem.fn, start, *problem.context, solver=solver)
        assert solution.converged.all()
        assert not solution.value.is_inference()


# Under autocast


def test_autocast_casts_what_fn_returns(solver):
    torch.manual_seed(0)
    cell = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    seen = set()

    def fn(z):
        image = cell(z)
        seen.add((z.dtype, image.dtype))
        return image

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = pydeq.fixed_point(fn, torch.zeros(3, 6), solver=solver)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == solution.image.dtype == solution.residual.dtype == torch.float32
    assert solution.converged.all()
    with pytest.raises(ValueError, match=r"fn must return the dtype of z0, torch\.float32, got torch\.bfloat16"):
        pydeq.fixed_point(lambda z: fn(z).bfloat16(), torch.zeros(3, 6), solver=solver)


def test_autocast_loosens_the_default_tolerance(solver):
    problem = softsign_map(0.9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(problem.solve(solver=solver), problem.solve(solver=solver, rtol=1e-2))
        tight = problem.solve(solver=solver, rtol=1e-3)
    assert_identical(tight, problem.solve(solver=solver))
    assert tight.nfe > problem.solve(solver=solver, rtol=1e-2).nfe


def test_autocast_says_what_rounding_explains(solver):
    """A residual that bfloat16 inside fn keeps up is STALLED, though the state is float32."""
    torch.manual_seed(0)
    cell = nn.Linear(16, 16)
    x = torch.randn(4, 16)

    def fn(z):
        return torch.tanh(cell(z) + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = pydeq.fixed_point(fn, torch.zeros(4, 16), solver=solver, rtol=1e-7, max_steps=400)
    assert ((solution.status == pydeq.Status.STALLED) | solution.converged).all()
    assert solution.nfe < 400


def test_autocast_refuses_what_is_not_floating(solver):
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"fn must return the dtype of z0, torch.float32, got torch.int64"),
    ):
        pydeq.fixed_point(lambda z: z.long(), torch.ones(2, 3), solver=solver)


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "anderson"}, TypeError, "solver must be a solver like pydeq.Anderson(), got 'anderson'"),
        (
            {"solver": pydeq.Anderson},
            TypeError,
            "solver must be a solver like pydeq.Anderson(), got the class Anderson, not an",
        ),
        ({"rtol": -1e-3}, ValueError, "rtol must be at least 0, got -0.001"),
        ({"atol": -1.0}, ValueError, "atol must be at least 0, got -1.0"),
        ({"rtol": float("nan")}, ValueError, "rtol must be at least 0, got nan"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a number, got str"),
        ({"atol": None}, TypeError, "atol must be a number, got NoneType"),
        ({"rtol": True}, TypeError, "rtol must be a number, got bool"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_steps": -3}, ValueError, "max_steps must be at least 1, got -3"),
        ({"max_steps": 10.0}, TypeError, "max_steps must be an int, got float"),
        ({"max_steps": True}, TypeError, "max_steps must be an int, got bool"),
    ],
    ids=str,
)
def test_refuses_arguments(arguments, error, message):
    def fn(z):
        raise AssertionError("fn was called")

    with pytest.raises(error, match=re.escape(message)):
        pydeq.fixed_point(fn, torch.ones(2, 3), **arguments)


def test_a_call_without_z0_tells_the_order_of_arguments():
    with pytest.raises(
        TypeError, match=r"z and 0 of context: missing .*'x'\. Pass z0 first, then what fn takes after z"
    ):
        pydeq.fixed_point(lambda z, x: z + x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="unsupported operand"):
        pydeq.fixed_point(lambda z, x: z + object(), torch.ones(2, 3), None)


def test_refuses_an_fn_that_is_not_callable():
    with pytest.raises(TypeError, match="fn must be callable, got Tensor"):
        pydeq.fixed_point(torch.ones(2), torch.ones(2))  # pyright: ignore


@pytest.mark.parametrize(
    ("solver", "arguments", "error", "message"),
    [
        (pydeq.Anderson, {"memory": 0}, ValueError, "memory must be at least 1, got 0"),
        (pydeq.Broyden, {"memory": -1}, ValueError, "memory must be at least 1, got -1"),
        (pydeq.Anderson, {"memory": 2.0}, TypeError, "memory must be an int, got float"),
        (pydeq.Broyden, {"memory": True}, TypeError, "memory must be an int, got bool"),
        (pydeq.Anderson, {"damping": 0.0}, ValueError, "damping must be in (0, 1], got 0.0"),
        (pydeq.Picard, {"damping": 1.5}, ValueError, "damping must be in (0, 1], got 1.5"),
        (pydeq.Picard, {"damping": float("nan")}, ValueError, "damping must be in (0, 1], got nan"),
        (pydeq.Anderson, {"ridge": -1e-6}, ValueError, "ridge must be at least 0, got -1e-06"),
        (pydeq.Anderson, {"ridge": float("nan")}, ValueError, "ridge must be at least 0, got nan"),
        (pydeq.Anderson, {"ridge": float("inf")}, ValueError, "ridge must be at least 0"),
    ],
    ids=str,
)
def test_solvers_refuse_hyperparameters(solver, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        solver(**arguments)
