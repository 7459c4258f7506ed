"""Newton's method with GMRES and a line search: hard problems, its order, its counts, and what it falls back to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pydeq
from pydeq import NewtonKrylov, Status
from pydeq.testing import CallCounter, Problem, assert_close, assert_identical, linear_map, softsign_map, tanh_map

DOUBLE = torch.float64
MODES = ("jvp", "difference")
every_mode = pytest.mark.parametrize("mode", MODES)
OTHERS = (pydeq.Picard(), pydeq.Anderson(), pydeq.Anderson(memory=10), pydeq.Broyden())


def root_of(function):
    """The map whose fixed points are the roots of ``function``."""
    return lambda z: z + function(z)


# More, Garbow and Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981), by their numbers


def rosenbrock(z):  # 1
    return torch.stack([10.0 * (z[:, 1] - z[:, 0] ** 2), 1.0 - z[:, 0]], 1)


def powell_singular(z):  # 13
    a, b, c, d = z.unbind(1)
    return torch.stack([a + 10.0 * b, 5.0**0.5 * (c - d), (b - 2.0 * c) ** 2, 10.0**0.5 * (a - d) ** 2], 1)


def helical_valley(z):  # 7
    x, y, w = z.unbind(1)
    angle = torch.atan2(y, x) / (2.0 * math.pi)
    return torch.stack([10.0 * (w - 10.0 * angle), 10.0 * ((x * x + y * y).sqrt() - 1.0), w], 1)


def trigonometric(z):  # 26
    n = z.shape[1]
    i = torch.arange(1, n + 1, dtype=z.dtype)
    return n - z.cos().sum(1, keepdim=True) + i * (1.0 - z.cos()) - z.sin()


def brown_almost_linear(z):  # 27
    n = z.shape[1]
    return torch.cat([z[:, :-1] + z.sum(1, keepdim=True) - (n + 1), z.prod(1, keepdim=True) - 1.0], 1)


def boundary_value(z):  # 28
    n = z.shape[1]
    h = 1.0 / (n + 1)
    t = h * torch.arange(1, n + 1, dtype=z.dtype)
    wide = nn.functional.pad(z, (1, 1))
    return 2.0 * z - wide[:, :-2] - wide[:, 2:] + h * h * (z + t + 1.0) ** 3 / 2.0


def tridiagonal(z):  # 30
    wide = nn.functional.pad(z, (1, 1))
    return (3.0 - 2.0 * z) * z - wide[:, :-2] - 2.0 * wide[:, 2:] + 1.0


def starts(*entries):
    return torch.tensor([entries], dtype=DOUBLE)


PLACES = torch.arange(1, 31, dtype=DOUBLE) / 31.0
PROBLEMS = {
    "rosenbrock": (rosenbrock, starts(-1.2, 1.0)),
    "powell_singular": (powell_singular, starts(3.0, -1.0, 0.0, 1.0)),
    "helical_valley": (helical_valley, starts(-1.0, 0.0, 0.0)),
    "trigonometric": (trigonometric, torch.full((1, 10), 0.1, dtype=DOUBLE)),
    "brown_almost_linear": (brown_almost_linear, torch.full((1, 10), 0.5, dtype=DOUBLE)),
    "boundary_value": (boundary_value, (PLACES * (PLACES - 1.0))[None]),
    "tridiagonal": (tridiagonal, -torch.ones(1, 50, dtype=DOUBLE)),
    "arctangent": (torch.atan, starts(3.0)),
    "logarithm": (torch.log, torch.tensor([[5.0], [0.1], [100.0]], dtype=DOUBLE)),
}
# Those that do not find the root with 200 evaluations.
FAIL = {
    "powell_singular": (pydeq.Picard(), pydeq.Broyden()),
    "brown_almost_linear": (pydeq.Picard(), pydeq.Broyden()),
    "helical_valley": (pydeq.Picard(),),
    "boundary_value": (pydeq.Picard(), pydeq.Anderson(memory=10)),
    "tridiagonal": OTHERS,
    "logarithm": OTHERS,
}
TIGHT = {"rtol": 0.0, "atol": 1e-8, "max_steps": 200}


@every_mode
@pytest.mark.parametrize("name", PROBLEMS)
def test_roots(name, mode):
    function, z0 = PROBLEMS[name]
    solution = pydeq.fixed_point(root_of(function), z0, solver=NewtonKrylov(mode=mode), **TIGHT)
    assert solution.converged.all()
    assert (function(solution.value).norm(dim=1) <= 1e-8).all()
    # The roots that are known, as far as the residual says: the Jacobian of Powell's function is singular at its root.
    if name in ("rosenbrock", "logarithm"):
        assert_close(solution.value, torch.ones_like(z0), condition=1e9)
    elif name == "helical_valley":
        assert_close(solution.value, starts(1.0, 0.0, 0.0), condition=1e9)
    elif name == "powell_singular":
        assert float(solution.value.abs().max()) < 1e-3


@pytest.mark.parametrize(("name", "solver"), [(name, solver) for name, few in FAIL.items() for solver in few], ids=str)
def test_where_others_fail(name, solver):
    function, z0 = PROBLEMS[name]
    assert not pydeq.fixed_point(root_of(function), z0, solver=solver, **TIGHT).converged.all()


def test_a_linear_map_that_expands():
    problem = linear_map(5.0, 32, dtype=DOUBLE)
    for solver in (pydeq.Picard(), pydeq.Anderson()):
        assert not problem.solve(solver=solver, **TIGHT).converged.any()
    solution = problem.solve(solver=NewtonKrylov(), **TIGHT)
    assert solution.converged.all()
    assert solution.nfe <= 6
    assert problem.solution is not None
    assert_close(solution.value, problem.solution, condition=1e10)


def dense_newton(problem: Problem, z: torch.Tensor) -> torch.Tensor:
    """Roots near z, by dense Newton steps in float64."""
    found = []
    for b in range(len(z)):
        row, context = z[b].double(), [x[b : b + 1].double() for x in problem.context]

        def residual(z, context=context):
            return (problem.fn(z[None], *context) - z[None])[0]

        for _ in range(10):
            row = row - torch.linalg.solve(torch.func.jacrev(residual)(row), residual(row))
        found.append(row)
    return torch.stack(found)


@every_mode
@pytest.mark.parametrize("seed", range(3))
def test_tanh_maps_where_plain_iteration_fails(seed, mode):
    problem = tanh_map(3.0, 16, batch=2, dtype=DOUBLE, seed=seed)
    assert not problem.solve(solver=pydeq.Picard(), **TIGHT).converged.any()
    solution = problem.solve(solver=NewtonKrylov(mode=mode), **TIGHT)
    assert solution.converged.all()
    assert_close(solution.value, dense_newton(problem, solution.value), condition=1e9)


@given(rho=st.floats(1.5, 20.0), dim=st.integers(2, 24), batch=st.integers(1, 4), seed=st.integers(0, 1000))
def test_any_linear_system(rho, dim, batch, seed):
    """A is symmetric with eigenvalues in [-rho, rho]; I - A may be almost singular, then there is no statement."""
    problem = linear_map(rho, 2 * dim, batch=batch, dtype=DOUBLE, seed=seed)
    solution = problem.solve(solver=NewtonKrylov(products=2 * dim), rtol=1e-9, max_steps=30)
    least = float((1.0 - torch.linspace(-rho, rho, 2 * dim, dtype=DOUBLE)).abs().min())
    if least < 0.01:
        return
    assert solution.converged.all()
    assert problem.solution is not None
    error = (solution.value - problem.solution).norm(dim=1)
    assert (error <= 1.1 * solution.residual / least + 1e-12 * problem.solution.norm(dim=1)).all()


@given(
    rate=st.floats(0.1, 3.0),
    dim=st.integers(1, 20),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
    max_steps=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    mode=st.sampled_from(MODES),
)
def test_what_holds_for_every_solve(rate, dim, batch, seed, max_steps, dtype, mode):
    problem = softsign_map(rate, dim, batch=batch, seed=seed, dtype=dtype)
    counter = CallCounter(problem.fn)
    solver = NewtonKrylov(products=5, mode=mode)
    options = {"solver": solver, "rtol": 1e-4 if dtype.itemsize > 2 else 1e-2, "max_steps": max_steps}
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, **options)
    assert counter.calls == solution.nfe + (solution.products if mode == "difference" else 0)
    assert solution.nfe == int(solution.sample_nfe.max()) <= max_steps
    assert solution.products <= 5 * (solution.nfe - 1)
    image = problem.fn(solution.value, *problem.context)
    assert torch.equal(image, solution.image)
    compute = torch.promote_types(dtype, torch.float32)
    residual = (image.to(compute) - solution.value.to(compute)).double().norm(dim=1)
    assert_close(solution.residual, residual, size=dim, dtype=compute)
    met = residual <= (1.0 + 1e-5) * options["rtol"] * image.double().norm(dim=1)
    assert met[solution.converged].all()
    assert_identical(problem.solve(**options), solution)


def test_convergence_is_nearly_quadratic():
    """Eisenstat and Walker's theorem: the order of choice 2 with exponent 2 is 2 where J is Lipschitz."""
    problem = tanh_map(1.5, 12, batch=1, dtype=DOUBLE)
    solution = problem.solve(solver=NewtonKrylov(mode="jvp"), rtol=1e-13, max_steps=40, trace=True)
    assert solution.converged.all()
    assert solution.trace is not None
    residuals = solution.trace[:, 0]
    close = residuals[(residuals < 1e-1) & (residuals > 1e-12)]
    orders = close[1:].log() / close[:-1].log()
    assert float(orders.max()) > 1.6
    assert solution.nfe <= 15


# Samples


RATES = [0.5, 1.5, 3.0, 6.0, 0.9]


@every_mode
def test_threads_change_nothing(threads, mode):
    problem = softsign_map([0.9, 1.5], 20000)
    ran = {"solver": NewtonKrylov(mode=mode)}
    threads(1)
    solution = problem.solve(**ran)
    threads(2)
    assert_identical(problem.solve(**ran), solution)


def test_a_singular_jacobian_leads_to_a_plain_step():
    solution = pydeq.fixed_point(root_of(lambda z: z * z - 1.0), starts(0.0), solver=NewtonKrylov(), **TIGHT)
    assert solution.converged.all()
    assert float(solution.value) == -1.0


def test_no_root():
    """z^2 + 1 has its smallest value at 0."""
    fn = root_of(lambda z: z * z + 1.0)
    solution = pydeq.fixed_point(fn, starts(2.0), solver=NewtonKrylov(), rtol=1e-6, max_steps=60)
    assert solution.status.tolist() == [Status.MAX_STEPS]
    assert 1.0 <= float(solution.residual) < 1.1


def test_statuses():
    problem = softsign_map(0.9, 9, dtype=torch.float32)
    solution = problem.solve(solver=NewtonKrylov(), rtol=0.0, max_steps=60)
    assert torch.equal(solution.status == Status.STALLED, solution.residual > 0)
    assert (solution.status == Status.STALLED).any()
    assert (solution.relative_residual <= 1e-6).all()
    assert (problem.solve(solver=NewtonKrylov(), rtol=1e-6, max_steps=2).status == Status.MAX_STEPS).all()
    first = problem.solve(solver=NewtonKrylov(), max_steps=1)
    assert torch.equal(first.image, problem.fn(problem.z0, *problem.context))
    assert (first.nfe, first.products) == (1, 0)
    zero = pydeq.fixed_point(lambda z: 3.0 * z, torch.zeros(2, 3), solver=NewtonKrylov())
    assert zero.converged.all()
    assert (zero.nfe, zero.products) == (1, 0)
    assert pydeq.fixed_point(lambda z: 3.0 * z, torch.zeros(0, 3), solver=NewtonKrylov()).nfe == 0


# Products


class Counted(torch.autograd.Function):
    """The identity, which counts how often its derivative is differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        return CountedBackward.apply(v)


class CountedBackward(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, u):  # pyright: ignore[reportIncompatibleMethodOverride]
        CountedBackward.calls += 1
        return u.clone()


def test_products_are_counted():
    problem = tanh_map(1.5, 12, dtype=DOUBLE)

    def fn(z, x):
        return problem.fn(Counted.apply(z), x)

    CountedBackward.calls = 0
    counter = CallCounter(fn)
    solver = NewtonKrylov(mode="jvp")
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, solver=solver, rtol=1e-8)
    assert solution.converged.all()
    assert solution.products == CountedBackward.calls > 0
    assert counter.calls == solution.nfe
    assert_identical(problem.solve(solver=solver, rtol=1e-8), solution)
    assert problem.solve().products == 0


def test_products_are_limited():
    problem = linear_map(5.0, 40, dtype=DOUBLE)
    solution = problem.solve(solver=NewtonKrylov(products=4), rtol=1e-8, max_steps=6)
    assert solution.products <= 4 * 5
    assert (solution.residual < problem.solve(max_steps=1).residual).all()


class OnlyOnce(torch.autograd.Function):
    """tanh, whose backward pass leaves no graph, and says nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            return v * (1.0 - y * y)


def through_numpy(z):
    """tanh in place of NumPy's memory: it raises for tensors that require grad."""
    return torch.from_numpy(z.numpy().copy()).tanh()


class OnceByLaw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        return v * (1.0 - y * y)


def buffered():
    """tanh, written to one buffer in every call."""
    buffer = torch.zeros(4, 12, dtype=DOUBLE)

    def tanh(x):
        return torch.tanh(x, out=buffer)

    return tanh


@pytest.mark.parametrize("tanh", [OnlyOnce.apply, OnceByLaw.apply, through_numpy, buffered()])
def test_maps_without_second_derivatives(tanh):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)

    def fn(z, x):  # the problem's fn, with another tanh
        return tanh(torch.atanh(problem.fn(z, x)))

    counter = CallCounter(fn)
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, solver=NewtonKrylov(), rtol=1e-8)
    assert solution.converged.all()
    assert counter.calls == solution.nfe + solution.products
    assert_close(solution.value, dense_newton(problem, solution.value), condition=1e9)
    expected = problem.solve(solver=NewtonKrylov(mode="difference"), rtol=1e-8)
    assert_close(solution.value, expected.value, condition=1e9)


def test_mode_jvp_raises_where_products_do_not_exist():
    with pytest.raises(RuntimeError, match="needs second derivatives of fn, which has none: use mode='auto'"):
        pydeq.fixed_point(lambda z: 2.0 * OnceByLaw.apply(z + 1.0), torch.ones(2, 3), solver=NewtonKrylov(mode="jvp"))


def test_errors_of_fn_are_its_own():
    def broken(z):
        raise KeyError("from fn")

    def in_place(z):
        return z.mul_(0.5)

    with pytest.raises(KeyError, match="from fn"):
        pydeq.fixed_point(broken, torch.ones(2, 3), solver=NewtonKrylov())
    for mode in ("auto", "difference"):
        with pytest.raises(ValueError, match="fn must not modify z in place"):
            pydeq.fixed_point(in_place, torch.ones(2, 3), solver=NewtonKrylov(mode=mode))
        with pytest.raises(ValueError, match="fn must return the shape of z0"):
            pydeq.fixed_point(lambda z: z[:1], torch.ones(2, 3), solver=NewtonKrylov(mode=mode))


# States, layers, options


def test_aux_has_no_graph():
    weight = torch.full((3,), 2.0, requires_grad=True)

    def fn(z):
        y = torch.tanh(weight * z + 1.0)
        return y, {"twice": 2.0 * y}

    solution = pydeq.fixed_point(fn, torch.zeros(2, 3), solver=NewtonKrylov(), has_aux=True)
    assert not solution.aux["twice"].requires_grad
    assert_close(solution.aux["twice"], 2.0 * solution.image)


# What it refuses


def test_arguments():
    with pytest.raises(ValueError, match="products must be at least 1, got 0"):
        NewtonKrylov(products=0)
    with pytest.raises(TypeError, match="products must be an int, got float"):
        NewtonKrylov(products=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mode must be 'auto', 'jvp' or 'difference', got 'forward'"):
        NewtonKrylov(mode="forward")  # pyright: ignore[reportArgumentType]


def product_on_the_left(matrix, x):
    """u -> u A + x by a vector-Jacobian product, as in an adjoint system: its result has no graph."""

    def fn(u):
        z = torch.zeros_like(u, requires_grad=True)
        with torch.enable_grad():
            y = z @ matrix.T
        return torch.autograd.grad(y, z, u)[0] + x

    return fn


def variably_dimensioned(z):
    n = z.shape[1]
    i = torch.arange(1, n + 1, dtype=z.dtype)
    total = (i * (z - 1.0)).sum(1, keepdim=True)
    return z - 1.0 + i * total * (1.0 + 2.0 * total**2)


def test_a_large_product_is_no_divergence():
    # Burkardt's test_nonlin, problem 12: the norm of the Jacobian at the start is more than 1e6.
    z0 = (1.0 - torch.arange(1, 11, dtype=DOUBLE) / 10.0)[None]
    jacobian = torch.func.jacrev(variably_dimensioned)(z0)[0, :, 0]
    assert torch.linalg.matrix_norm(jacobian, 2) > 1e6
    solution = pydeq.fixed_point(root_of(variably_dimensioned), z0, solver=NewtonKrylov(), rtol=0.0, atol=1e-10)
    assert solution.converged.all()
    assert solution.products > 5
    assert (solution.value - 1.0).abs().max() < 1e-8


@pytest.mark.parametrize(("dim", "limit"), [(10, 40), (100, 100), (200, 128)])
def test_products_by_default(dim, limit):
    # J - I shifts the entries, and g(0) is the first unit vector: GMRES gets nowhere before it has dim vectors.
    identity = torch.eye(dim, dtype=DOUBLE)
    matrix = identity + 5.0 * identity.roll(1, 0)

    def fn(z):
        return z @ matrix.T + identity[0]

    solution = pydeq.fixed_point(fn, torch.zeros(1, dim, dtype=DOUBLE), solver=NewtonKrylov(), max_steps=2)
    assert solution.products == min(dim, limit)
    assert bool((solution.residual < 1e-8).all()) is (dim <= limit)


def test_a_map_without_a_graph_to_z_gets_differences():
    matrix = torch.randn(20, 20, dtype=DOUBLE)
    matrix = 0.9 * matrix / torch.linalg.eigvals(matrix).abs().max()
    x = torch.randn(3, 20, dtype=DOUBLE)
    exact = torch.linalg.solve(torch.eye(20, dtype=DOUBLE) - matrix.T, x.T).T

    def detached(z):
        return z.detach() @ matrix + x

    for fn in (torch.no_grad()(lambda z: z @ matrix + x), detached, product_on_the_left(matrix, x)):
        solution = pydeq.fixed_point(fn, torch.zeros_like(x), solver=NewtonKrylov(), rtol=1e-8)
        assert solution.converged.all()
        assert solution.nfe < 10  # plain iteration needs more than a hundred
        torch.testing.assert_close(solution.image, exact, rtol=0.0, atol=1e-6)
        with pytest.raises(ValueError, match="needs a graph from the result of fn to z"):
            pydeq.fixed_point(fn, torch.zeros_like(x), solver=NewtonKrylov(mode="jvp"))
