"""Newton's method in a trust region: hard systems, its steps, its counts, and what it falls back to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._distributed_c10d import HashStore

import pydeq
from pydeq import Status, TrustRegion
from pydeq.solvers.trust_region import _filtered, _multiplier
from pydeq.testing import CallCounter, assert_close, assert_identical, linear_map, softsign_map, tanh_map

DOUBLE = torch.float64
MODES = ("vjp", "difference")
every_mode = pytest.mark.parametrize("mode", MODES)
TIGHT = {"rtol": 0.0, "atol": 1e-8, "max_steps": 200}


def root_of(function):
    """The map whose fixed points are the roots of ``function``."""
    return lambda z: z + function(z)


# Systems


def chebyquad(z):
    """Moré, Garbow and Hillstrom's 35th: the mean of T_i over the abscissas minus its integral over [0, 1]."""
    before, now, rows = torch.ones_like(z), 2.0 * z - 1.0, []
    for i in range(1, z.shape[1] + 1):
        rows.append(now.mean(1) - (0.0 if i % 2 else -1.0 / (i * i - 1.0)))
        before, now = now, 2.0 * (2.0 * z - 1.0) * now - before
    return torch.stack(rows, 1)


# The abscissas of Chebyshev's quadrature on [-1, 1] (Abramowitz and Stegun, table 25.5), up to their signs.
ABSCISSAS = {5: (0.8324974870, 0.3745414096, 0.0), 6: (0.8662468181, 0.4225186538, 0.2666354015)}
ABSCISSAS[7] = (0.8838617008, 0.5296567753, 0.3239118105, 0.0)


@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("n", ABSCISSAS)
def test_chebyshev_quadrature(n, factor):
    z0 = (factor * torch.arange(1, n + 1, dtype=DOUBLE) / (n + 1))[None]
    solution = pydeq.fixed_point(root_of(chebyquad), z0, solver=TrustRegion(), **TIGHT)
    assert solution.converged.all()
    half = torch.tensor(ABSCISSAS[n], dtype=DOUBLE)
    expected = torch.cat([-half, half]).unique()
    found = (2.0 * solution.value[0] - 1.0).sort().values
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-7)


def test_chebyshev_quadrature_is_hard():
    z0 = (10.0 * torch.arange(1, 6, dtype=DOUBLE) / 6)[None]
    for solver in (pydeq.Anderson(), pydeq.Broyden(line_search=True), pydeq.NewtonKrylov()):
        assert not pydeq.fixed_point(root_of(chebyquad), z0, solver=solver, **TIGHT).converged.any()


def singular(z):
    """La Cruz and Raydan's singular function: its Jacobian is 0 at its root 0."""
    n = z.shape[1]
    i = torch.arange(1, n + 1, dtype=z.dtype)
    square = 0.5 * z * z
    after, own = nn.functional.pad(square[:, 1:], (0, 1)), nn.functional.pad(square[:, 1:], (1, 0))
    return i * z**3 / 3.0 + after - own


@every_mode
def test_a_root_where_the_jacobian_is_zero(mode):
    fn, z0 = root_of(singular), torch.ones(1, 100, dtype=DOUBLE)
    ran = {"rtol": 0.0, "atol": 1e-6, "max_steps": 200}
    for solver in (pydeq.NewtonKrylov(), pydeq.Broyden(line_search=True)):
        assert not pydeq.fixed_point(fn, z0, solver=solver, **ran).converged.any()
    solution = pydeq.fixed_point(fn, z0, solver=TrustRegion(mode=mode), **ran)
    assert solution.converged.all()
    assert float(singular(solution.value).norm()) <= 1e-6


def powell_badly_scaled(z):
    x, y = z.unbind(1)
    return torch.stack([1e4 * x * y - 1.0, torch.exp(-x) + torch.exp(-y) - 1.0001], 1)


def test_bad_scales():
    z0 = torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
    solution = pydeq.fixed_point(root_of(powell_badly_scaled), z0, solver=TrustRegion(), **TIGHT)
    assert solution.converged.all()
    # Moré, Garbow and Hillstrom, problem 3: (1.098e-5, 9.106).
    torch.testing.assert_close(solution.value, torch.tensor([[1.098e-5, 9.106]], dtype=DOUBLE), rtol=1e-3, atol=0.0)


def test_a_linear_map_takes_one_step():
    problem = linear_map(5.0, 32, dtype=DOUBLE)
    solution = problem.solve(solver=TrustRegion(), rtol=1e-10)
    assert solution.converged.all()
    assert (solution.nfe, solution.products) == (2, 32)
    assert problem.solution is not None
    assert_close(solution.value, problem.solution, condition=1e6)


def test_convergence_is_quadratic():
    problem = tanh_map(1.5, 12, batch=1, dtype=DOUBLE)
    solution = problem.solve(solver=TrustRegion(), rtol=1e-13, max_steps=40, trace=True)
    assert solution.converged.all()
    assert solution.trace is not None
    residuals = solution.trace[:, 0]
    close = residuals[(residuals < 1e-1) & (residuals > 1e-13)]
    assert float((close[1:].log() / close[:-1].log()).max()) > 1.8


# Steps


@given(
    entries=st.integers(1, 12),
    spread=st.floats(0.0, 8.0),
    radius=st.floats(1e-6, 1e6),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_multiplier_puts_the_step_on_the_border(entries, spread, radius, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    values = 10.0 ** (spread * (torch.rand(3, entries, generator=generator, dtype=DOUBLE) - 0.5))
    if zeros:
        values[:, 0] = 0.0
    along = torch.randn(3, entries, generator=generator, dtype=DOUBLE)
    found = _multiplier(values, along, torch.full((3,), radius, dtype=DOUBLE))
    full = _filtered(values, along, torch.zeros(3, 1, dtype=DOUBLE)).norm(dim=1)
    length = _filtered(values, along, found[:, None]).norm(dim=1)
    inside = full <= 1.1 * radius
    assert (found[inside] == 0).all()
    assert ((length - radius).abs()[~inside] <= (0.1 + 1e-9) * radius).all()


@given(dim=st.integers(1, 8), seed=st.integers(0, 1000), radius=st.floats(0.01, 10.0))
def test_a_step_is_the_best_of_its_length(dim, seed, radius):
    """No random step that is as short has a smaller ||g - A d||, and a Newton step that fits is taken."""
    generator = torch.Generator().manual_seed(seed)
    system, g = torch.randn(1, dim, dim, generator=generator, dtype=DOUBLE), torch.randn(1, dim, dtype=DOUBLE)
    left, values, right = torch.linalg.svd(system)
    along = (left.mT @ g.unsqueeze(2)).squeeze(2)
    mu = _multiplier(values, along, torch.tensor([radius], dtype=DOUBLE))
    d = (right.mT @ _filtered(values, along, mu[:, None]).unsqueeze(2)).squeeze(2)[0]
    others = torch.randn(200, dim, generator=generator, dtype=DOUBLE)
    others = others / others.norm(dim=1, keepdim=True) * d.norm()
    reached = (g - others @ system[0].T).norm(dim=1).min()
    assert float((g[0] - system[0] @ d).norm()) <= float(reached) + 1e-9
    newton = torch.linalg.solve(system[0], g[0])
    if float(newton.norm()) <= radius:
        assert_close(d, newton, condition=1e8)


def test_a_trial_far_beyond_the_first_residual_is_taken_back():
    """From -4 the Newton step for exp(z) = 1 leads to 49.6, where the residual is 3e21."""
    seen: list[float] = []

    def fn(z):
        seen.append(float(z.detach()))
        return z + torch.exp(z) - 1.0

    solution = pydeq.fixed_point(fn, torch.full((1, 1), -4.0, dtype=DOUBLE), solver=TrustRegion(), **TIGHT)
    assert math.exp(max(seen)) > 1e6 * 1e6
    assert solution.converged.all()
    assert abs(float(solution.value)) <= 1.1e-8


def test_a_zero_jacobian_leads_to_a_plain_step():
    solution = pydeq.fixed_point(root_of(lambda z: z * z - 1.0), torch.zeros(1, 1), solver=TrustRegion(), rtol=1e-6)
    assert solution.converged.all()
    assert float(solution.value) == -1.0


def test_no_root():
    """z^2 + 1 has its smallest value at 0."""
    fn = root_of(lambda z: z * z + 1.0)
    solution = pydeq.fixed_point(fn, torch.full((1, 1), 2.0), solver=TrustRegion(), rtol=1e-6, max_steps=60)
    assert not solution.converged.any()
    assert float(solution.residual) == pytest.approx(1.0, rel=0.1)


# What holds for every solve


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
    options = {"solver": TrustRegion(mode), "rtol": 1e-4 if dtype.itemsize > 2 else 1e-2, "max_steps": max_steps}
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, **options)
    assert counter.calls == solution.nfe + (solution.products if mode == "difference" else 0)
    assert solution.nfe == int(solution.sample_nfe.max()) <= max_steps
    assert solution.products % dim == 0
    assert solution.products <= dim * (solution.nfe - 1)
    image = problem.fn(solution.value, *problem.context)
    assert torch.equal(image, solution.image)
    compute = torch.promote_types(dtype, torch.float32)
    residual = (image.to(compute) - solution.value.to(compute)).double().norm(dim=1)
    assert_close(solution.residual, residual, size=dim, dtype=compute)
    met = residual <= (1.0 + 1e-5) * options["rtol"] * image.double().norm(dim=1)
    assert met[solution.converged].all()
    assert_identical(problem.solve(**options), solution)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sample_does_not_depend_on_its_batch(mode, dtype):
    problem = softsign_map([0.5, 1.5, 3.0, 6.0, 0.9], 17, dtype=dtype)
    ran = {"solver": TrustRegion(mode), "rtol": 1e-5, "max_steps": 60}
    solution = problem.solve(**ran)
    assert solution.converged.all()
    assert len(solution.sample_nfe.unique()) > 1
    for rows in ([0], [3], [4, 1], [2, 0, 3]):
        assert_identical(problem.rows(rows).solve(**ran), solution, rows)


@every_mode
def test_nan_stays_in_its_sample(mode):
    problem = softsign_map([0.5, 1.5, 3.0], 9, dtype=DOUBLE)
    ran = {"solver": TrustRegion(mode), "rtol": 1e-8, "max_steps": 60}
    alone = problem.rows([0, 2]).solve(**ran)
    problem.context[0][1] = torch.nan
    solution = problem.solve(**ran)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert_identical(alone, solution, [0, 2])
    assert torch.equal(solution.value[1], problem.z0[1])


def test_an_infinite_derivative_leads_to_a_plain_step():
    """The derivative of sqrt(|z|) at 0 is not finite; from there a plain step reaches 2, and Newton's steps 4."""
    fn = lambda z: 2.0 + z.abs().sqrt()  # noqa: E731
    z0 = torch.zeros(1, 1, dtype=DOUBLE)
    solution = pydeq.fixed_point(fn, z0, solver=TrustRegion(), rtol=1e-10)
    assert solution.converged.all()
    assert_close(solution.value, torch.full((1, 1), 4.0, dtype=DOUBLE), condition=1e6)


# Derivatives


class Once(torch.autograd.Function):
    """tanh, whose backward pass cannot be vectorized or differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        return torch.from_numpy(v.numpy() * (1.0 - y * y).numpy())


def through_numpy(z):
    """tanh in place of NumPy's memory: it raises for tensors that require grad."""
    return torch.from_numpy(z.numpy().copy()).tanh()


@pytest.mark.parametrize("tanh", [Once.apply, through_numpy, torch.no_grad()(torch.tanh)])
def test_maps_with_few_derivatives(tanh):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)

    def fn(z, x):  # the problem's fn, with another tanh
        return tanh(torch.atanh(problem.fn(z, x)))

    counter = CallCounter(fn)
    solution = pydeq.fixed_point(counter, problem.z0, *problem.context, solver=TrustRegion(), rtol=1e-9)
    assert solution.converged.all()
    assert counter.calls == solution.nfe + (0 if tanh == Once.apply else solution.products)
    expected = problem.solve(solver=TrustRegion("vjp"), rtol=1e-9)
    assert_close(solution.value, expected.value, condition=1e9)
    if tanh != Once.apply:
        with pytest.raises((ValueError, RuntimeError), match=r"needs a graph|numpy"):
            pydeq.fixed_point(fn, problem.z0, *problem.context, solver=TrustRegion("vjp"))


# States, layers, options


@every_mode
def test_tuples_are_like_one_tensor(mode):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)

    def fn(z, x):
        y = problem.fn(torch.cat([z[0].flatten(1), z[1]], 1), x)
        return y[:, :8].reshape(-1, 2, 4), y[:, 8:]

    z0 = torch.zeros(4, 2, 4, dtype=DOUBLE), torch.zeros(4, 4, dtype=DOUBLE)
    ran = {"solver": TrustRegion(mode), "rtol": 1e-9}
    solution, expected = pydeq.fixed_point(fn, z0, *problem.context, **ran), problem.solve(**ran)
    assert solution.products == expected.products
    assert_close(solution.value[0].flatten(1), expected.value[:, :8], condition=1e6)
    assert_close(solution.value[1], expected.value[:, 8:], condition=1e6)


@every_mode
def test_parts_of_different_scale(mode):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    scale = torch.where(torch.arange(12) < 6, 1.0, 1e-4).to(DOUBLE)

    def fn(z, x):
        y = scale * problem.fn(torch.cat(z, 1) / scale, x)
        return y[:, :6], y[:, 6:]

    z0 = torch.zeros(4, 6, dtype=DOUBLE), torch.zeros(4, 6, dtype=DOUBLE)
    counter = CallCounter(fn)
    solution = pydeq.fixed_point(counter, z0, *problem.context, solver=TrustRegion(mode), rtol=1e-6, norm="parts")
    assert solution.converged.all()
    assert solution.nfe <= 20  # the scaled Jacobian is right: a wrong one would give no Newton steps
    assert counter.calls == solution.nfe + (solution.products if mode == "difference" else 0)
    for value, image in zip(solution.value, fn(solution.value, *problem.context), strict=True):
        assert ((image - value).norm(dim=1) <= 1e-6 * image.norm(dim=1)).all()


@every_mode
def test_compaction_changes_nothing(mode):
    problem = softsign_map([0.1, 0.1, 6.0, 3.0], 9, dtype=DOUBLE)
    counter = CallCounter(problem.fn)
    ran = {"solver": TrustRegion(mode), "rtol": 1e-8, "max_steps": 60}
    solution = pydeq.fixed_point(
        counter, problem.z0, *problem.context, compact=True, batched_context=(True, True), **ran
    )
    assert min(counter.batches) < 4
    assert_identical(problem.solve(**ran), solution)


def test_without_freezing():
    problem = softsign_map([0.1, 3.0], 9, dtype=DOUBLE)
    ran = {"solver": TrustRegion(), "rtol": 1e-8, "max_steps": 60}
    solution, frozen = problem.solve(freeze=False, **ran), problem.solve(**ran)
    assert solution.converged.all()
    assert torch.equal(solution.value, frozen.value)


class Cell(nn.Module):
    def __init__(self, dim, scale, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=DOUBLE)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.linear.weight, std=scale / dim**0.5)

    def forward(self, z, x):
        return self.dropout(torch.tanh(self.linear(z) + x))


@every_mode
def test_gradients_of_a_layer(mode):
    """By the adjoint, at a fixed point that plain iteration does not reach: the same as by a dense solve."""
    cell, x = Cell(8, 1.5), torch.randn(3, 8, dtype=DOUBLE, requires_grad=True)
    deq = pydeq.DEQ(
        cell, solver=TrustRegion(mode), adjoint=pydeq.Implicit(pydeq.GMRES(), rtol=1e-10), rtol=1e-12, max_steps=100
    )
    z, solution = deq(torch.zeros(3, 8, dtype=DOUBLE), x, return_solution=True)
    assert solution.converged.all()
    assert solution.products > 0
    weight = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((weight * z).sum(), x)
    for b in range(3):
        J = torch.func.jacrev(lambda z, b=b: cell(z, x[b].detach()))(z[b].detach())
        slope = torch.func.jacrev(lambda x, b=b: cell(z[b].detach(), x))(x[b].detach())
        expected = slope.T @ torch.linalg.solve((torch.eye(8, dtype=DOUBLE) - J).T, weight[b])
        assert_close(gradient[b], expected.detach(), condition=1e7)


def test_dropout_with_replayed_random_numbers():
    deq = pydeq.DEQ(Cell(8, 1.5, 0.3), solver=TrustRegion(), rtol=1e-8, freeze_rng=True)
    z, solution = deq(torch.zeros(3, 8, dtype=DOUBLE), torch.randn(3, 8, dtype=DOUBLE), return_solution=True)
    assert solution.converged.all()
    assert (z == 0).any()


@every_mode
def test_autocast(mode):
    problem = tanh_map(0.9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        solution = problem.solve(solver=TrustRegion(mode))
    assert solution.converged.all()
    assert solution.value.dtype == torch.float32
    exact = problem.solve(solver=TrustRegion(mode), rtol=1e-6)
    assert float((solution.value - exact.value).norm() / exact.value.norm()) < 0.1


def test_inference_mode_is_the_same():
    problem = softsign_map([0.9, 3.0], 9)
    expected = problem.solve(solver=TrustRegion("vjp"))
    with torch.inference_mode():
        assert_identical(problem.solve(solver=TrustRegion("vjp")), expected)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_scales_of_the_state(scale):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    expected = problem.solve(solver=TrustRegion(), rtol=1e-9)
    solution = pydeq.fixed_point(
        lambda z, x: scale * problem.fn(z / scale, x), problem.z0, *problem.context, solver=TrustRegion(), rtol=1e-9
    )
    assert solution.converged.all()
    assert_close(solution.value / scale, expected.value, condition=1e9)


# What it refuses


def test_an_adjoint_system_is_linear():
    with pytest.raises(
        TypeError, match=r"not be TrustRegion, since the adjoint system is linear: use pydeq\.GMRES\(\)"
    ):
        pydeq.Implicit(solver=TrustRegion())
    for adjoint in (pydeq.Shine(), pydeq.Unrolled()):
        with pytest.raises(TypeError, match="TrustRegion"):
            pydeq.DEQ(nn.Linear(3, 3), solver=TrustRegion(), adjoint=adjoint)


def test_ranks_that_solve_together():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"TrustRegion does not work with process_group: .* use pydeq\.Broyden"):
            pydeq.fixed_point(torch.cos, torch.ones(2, 3), solver=TrustRegion(), process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_large_states():
    z0 = torch.zeros(2, 1025)
    with pytest.raises(ValueError, match=r"which has 1025 entries here, .* use pydeq\.NewtonKrylov\(\)"):
        pydeq.fixed_point(torch.cos, z0, solver=TrustRegion())
    assert pydeq.fixed_point(torch.cos, z0[:, :0], solver=TrustRegion()).nfe <= 1


def test_arguments():
    with pytest.raises(ValueError, match="mode must be 'auto', 'vjp' or 'difference', got 'jvp'"):
        TrustRegion(mode="jvp")  # pyright: ignore[reportArgumentType]
