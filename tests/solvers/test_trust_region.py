"""Newton's method in a trust region: hard systems, its steps, its counts, and what it falls back to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pydeq
from pydeq import TrustRegion
from pydeq.ops.constants import TRUST_ENTRIES, TrustFlag
from pydeq.ops.trust_region_search import TrustRegionSearch, filtered, multiplier, restricted
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


@every_mode
@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("n", ABSCISSAS)
def test_chebyshev_quadrature(n, factor, mode):
    z0 = (factor * torch.arange(1, n + 1, dtype=DOUBLE) / (n + 1))[None]
    solution = pydeq.fixed_point(root_of(chebyquad), z0, solver=TrustRegion(mode), **TIGHT)
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


@every_mode
def test_bad_scales(mode):
    z0 = torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
    solution = pydeq.fixed_point(root_of(powell_badly_scaled), z0, solver=TrustRegion(mode), **TIGHT)
    assert solution.converged.all()
    # Moré, Garbow and Hillstrom, problem 3: (1.098e-5, 9.106).
    torch.testing.assert_close(solution.value, torch.tensor([[1.098e-5, 9.106]], dtype=DOUBLE), rtol=1e-3, atol=0.0)


def test_a_linear_map_takes_one_step():
    problem = linear_map(5.0, 32, dtype=DOUBLE)
    solution = problem.solve(solver=TrustRegion(), rtol=1e-10)
    assert solution.converged.all()
    assert (solution.nfe, solution.products) == (2, 33)
    assert problem.solution is not None
    assert_close(solution.value, problem.solution, condition=1e6)


def test_convergence_is_superlinear():
    problem = tanh_map(1.5, 12, batch=1, dtype=DOUBLE)
    solution = problem.solve(solver=TrustRegion(), rtol=1e-13, max_steps=40, trace=True)
    assert solution.converged.all()
    assert solution.trace is not None
    residuals = solution.trace[:, 0]
    # Two steps with updates do more than one of Newton's with an order of 1.3.
    close = residuals[:-2] < 1e-2
    assert close.any()
    assert (residuals[2:][close] < residuals[:-2][close] ** 1.3 + 1e-13).all()


# Steps


@given(
    entries=st.integers(1, 12),
    spread=st.floats(0.0, 8.0),
    radius=st.floats(1e-6, 1e6),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_multiplier_puts_the_step_on_the_border(entries, spread, radius, zeros, seed):
    generator = np.random.default_rng(seed)
    values = 10.0 ** (spread * (generator.random((3, entries)) - 0.5))
    if zeros:
        values[:, 0] = 0.0
    along = generator.standard_normal((3, entries))
    found = multiplier(values, along, np.full(3, radius))
    full = np.linalg.norm(filtered(values, along, np.zeros(3)), axis=1)
    length = np.linalg.norm(filtered(values, along, found), axis=1)
    inside = full <= (1.1 - 1e-9) * radius
    assert (found[inside] == 0).all()
    assert (abs(length - radius)[~inside] <= (0.1 + 1e-8) * radius).all()


@given(dim=st.integers(1, 8), seed=st.integers(0, 1000), radius=st.floats(0.01, 10.0), scale=st.floats(1e-9, 1e9))
def test_a_step_is_the_best_of_its_length(dim, seed, radius, scale):
    """No random step that is as short has a smaller ||g - A d||, and a Newton step that fits is taken."""
    generator = np.random.default_rng(seed)
    system, g = scale * generator.standard_normal((1, dim, dim)), generator.standard_normal((1, dim))
    radius = radius / scale
    (d,) = restricted(system, g, np.array([radius]))
    others = generator.standard_normal((200, dim))
    others = others / np.linalg.norm(others, axis=1, keepdims=True) * np.linalg.norm(d)
    reached = np.linalg.norm(g - others @ system[0].T, axis=1).min()
    assert np.linalg.norm(g[0] - system[0] @ d) <= reached + 1e-9
    newton = np.linalg.solve(system[0], g[0])
    if np.linalg.norm(newton) <= radius:
        np.testing.assert_allclose(d, newton, rtol=1e-6, atol=1e-6 * radius)
    else:
        assert abs(np.linalg.norm(d) - radius) <= 0.1001 * radius


def test_the_radius_follows_the_model():
    """F is almost level up to 1, and falls steeply beyond: far from the start its linear model is wrong."""
    points: list[float] = []

    def fn(z):
        if not z.requires_grad:  # not for a Jacobian
            points.append(float(z))
        return z + torch.where(z < 1.0, 1.0 - 1e-3 * z, 0.999 - 1e3 * (z - 1.0) ** 3)

    z0 = torch.full((1, 1), 0.5, dtype=DOUBLE)
    solution = pydeq.fixed_point(fn, z0, solver=TrustRegion(), **TIGHT)
    assert solution.converged.all()
    steps = [abs(p - points[0]) for p in points[1:]]
    # The first step is limited to 100 (|z| + |g|); rejected ones miss all that is promised, and shrink to a quarter.
    assert steps[0] == pytest.approx(100.0 * (0.5 + 0.9995), rel=0.1)
    for before, after in pairwise(steps[:4]):
        assert after == pytest.approx(0.25 * before, rel=0.1)


def test_a_singular_sample_beside_regular_ones():
    rates = torch.tensor([[1.0, 3.0], [4.0, -2.0], [1.0, 1.0]], dtype=DOUBLE)
    shift = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=DOUBLE)
    z0 = torch.ones(3, 2, dtype=DOUBLE)
    solution = pydeq.fixed_point(lambda z: rates * z + shift, z0, solver=TrustRegion(), **TIGHT)
    assert solution.converged.all()
    # Where the rate is 1, any z is a fixed point, and the shortest step stays.
    expected = torch.tensor([[1.0, -1.0], [-1.0 / 3.0, 1.0 / 3.0], [1.0, 1.0]], dtype=DOUBLE)
    assert_close(solution.value, expected, condition=1e3)


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
    jacobians, rest = divmod(solution.products, dim + (mode == "vjp"))  # fn(z) is known for differences
    assert rest == 0
    assert jacobians < solution.nfe
    assert counter.calls == solution.nfe + (solution.products if mode == "difference" else jacobians)
    assert solution.nfe == int(solution.sample_nfe.max()) <= max_steps
    image = problem.fn(solution.value, *problem.context)
    assert torch.equal(image, solution.image)
    compute = torch.promote_types(dtype, torch.float32)
    residual = (image.to(compute) - solution.value.to(compute)).double().norm(dim=1)
    assert_close(solution.residual, residual, size=dim, dtype=compute)
    met = residual <= (1.0 + 1e-5) * options["rtol"] * image.double().norm(dim=1)
    assert met[solution.converged].all()
    assert_identical(problem.solve(**options), solution)


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
    if tanh == Once.apply:  # an evaluation and 12 products for each
        jacobians, rest = divmod(solution.products, 13)
        assert rest == 0
        assert counter.calls == solution.nfe + jacobians
    else:  # the call that shows that there is no graph, and 12 differences for each
        assert solution.products % 12 == 1
        assert counter.calls == solution.nfe + solution.products
    expected = problem.solve(solver=TrustRegion("vjp"), rtol=1e-9)
    assert_close(solution.value, expected.value, condition=1e9)
    if tanh != Once.apply:
        with pytest.raises((ValueError, RuntimeError), match=r"needs a graph|numpy"):
            pydeq.fixed_point(fn, problem.z0, *problem.context, solver=TrustRegion("vjp"))


def test_differences_of_a_function_that_returns_the_same_memory():
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    result = torch.empty_like(problem.z0)

    def fn(z, x):
        return result.copy_(problem.fn(z, x))

    ran = {"solver": TrustRegion("difference"), "rtol": 1e-9}
    assert_identical(pydeq.fixed_point(fn, problem.z0, *problem.context, **ran), problem.solve(**ran))


TOGETHER = TrustRegion("difference", vectorize=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dim", [1, 3, 4, 40])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "parts", "aux", "inference", "autocast"])
def test_differences_in_one_call(kind, dim, batch):
    if kind in ("tuple", "parts") and dim == 1:
        pytest.skip("a state of one entry has one part")
    problem = tanh_map(1.5, dim, batch=batch, dtype=DOUBLE)

    def fn(z, x):
        whole = problem.fn(torch.cat(z, 1) if isinstance(z, tuple) else z, x)
        whole = (whole[:, :1], whole[:, 1:]) if isinstance(z, tuple) else whole
        return (whole, whole) if kind == "aux" else whole

    z0 = (problem.z0[:, :1], problem.z0[:, 1:]) if kind in ("tuple", "parts") else problem.z0
    options = {"rtol": 1e-9, "has_aux": kind == "aux", "norm": "parts" if kind == "parts" else "all"}
    counter = CallCounter(fn)
    with torch.inference_mode(kind == "inference"), torch.autocast("cpu", enabled=kind == "autocast"):
        solution = pydeq.fixed_point(counter, z0, *problem.context, solver=TOGETHER, **options)
    assert solution.converged.all()
    found = torch.cat(solution.value, 1) if isinstance(z0, tuple) else solution.value
    expected = problem.solve(solver=TrustRegion("vjp"), rtol=1e-9).value
    assert_close(found, expected, condition=1e9)
    if kind == "aux":
        assert torch.equal(solution.aux, solution.image)
    jacobians, rest = divmod(solution.products, dim if dim <= 3 else dim + 1)  # so few are not mapped
    assert rest == 0
    assert counter.calls == solution.nfe + (jacobians if dim > 3 else solution.products)


def test_differences_in_one_call_are_those_taken_one_by_one():
    problem = softsign_map([0.5, 3.0, 8.0], 12, dtype=DOUBLE)
    ran = {"rtol": 1e-9, "max_steps": 80}
    together = problem.solve(solver=TOGETHER, **ran)
    alone = problem.solve(solver=TrustRegion("difference"), **ran)
    assert together.nfe == alone.nfe
    assert_close(together.value, alone.value, condition=1e6)
    compact = pydeq.fixed_point(
        problem.fn, problem.z0, *problem.context, solver=TOGETHER, compact=True,
        batched_context=(True,) * len(problem.context), **ran,
    )  # fmt: skip
    assert_close(compact.value, alone.value, condition=1e6)


def test_a_map_that_cannot_be_mapped():
    def fn(z):
        return 0.5 * z if bool(z.isfinite().all()) else z

    with pytest.raises(RuntimeError, match=r"vectorize=True needs a map that torch.vmap can map, .*vectorize=False"):
        pydeq.fixed_point(fn, torch.ones(2, 5), solver=TOGETHER)
    assert pydeq.fixed_point(fn, torch.ones(2, 5), solver=TrustRegion("difference"), atol=1e-4).converged.all()


@pytest.mark.parametrize("inside", [False, True], ids=["the map", "inside of the map"])
def test_a_compiled_map_stays_compiled(inside):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    ran = []

    def backend(graph, inputs):
        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(problem.fn, backend=backend)
    fn = (lambda z, x: compiled(z, x)) if inside else compiled
    with torch.no_grad():
        fn(problem.z0, *problem.context)
    ran.clear()
    solution = pydeq.fixed_point(fn, problem.z0, *problem.context, solver=TOGETHER, rtol=1e-9)
    assert_close(solution.value, problem.solve(solver=TrustRegion("vjp"), rtol=1e-9).value, condition=1e9)
    assert len(ran) == solution.nfe  # all evaluations but the mapped ones
    with torch.no_grad():
        fn(problem.z0, *problem.context)
    assert len(ran) == solution.nfe + 1


def test_a_compiled_layer_stays_compiled():
    torch.manual_seed(0)
    cell = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    deq = pydeq.DEQ(lambda z, x: cell(z) + x, solver=TOGETHER, rtol=1e-9)
    x = torch.randn(3, 8, dtype=DOUBLE)
    expected = deq(torch.zeros_like(x), x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(deq, backend=backend)
    for _ in range(2):
        assert_close(compiled(torch.zeros_like(x), x), expected, condition=1e6)
    assert len(graphs) == 2  # the cell for the solve, and for the evaluation with gradients


# States, layers, options


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scales_of_the_state(scale):
    problem = tanh_map(1.5, 12, dtype=DOUBLE)
    expected = problem.solve(solver=TrustRegion(), rtol=1e-9)
    solution = pydeq.fixed_point(
        lambda z, x: scale * problem.fn(z / scale, x), problem.z0, *problem.context, solver=TrustRegion(), rtol=1e-9
    )
    assert solution.converged.all()
    assert_close(solution.value / scale, expected.value, condition=1e9)


def test_half_states():
    problem = softsign_map([0.5, 3.0], 9, dtype=torch.float16)
    solution = problem.solve(solver=TrustRegion(), rtol=1e-2, max_steps=60)
    assert solution.converged.all()
    exact = softsign_map([0.5, 3.0], 9, dtype=DOUBLE).solve(solver=TrustRegion(), rtol=1e-10, max_steps=60)
    torch.testing.assert_close(solution.value.double(), exact.value, rtol=0.1, atol=0.1)


def test_a_diagnosis_limits_products():
    problem = tanh_map(1.5, 8, dtype=DOUBLE)
    deq = pydeq.DEQ(problem.fn, solver=TrustRegion(), rtol=1e-12, max_steps=2)
    report = pydeq.diagnose(deq, problem.z0, *problem.context, max_steps=10)
    (trial,) = (trial for trial in report.trials if trial.solver == TrustRegion())
    assert trial.max_products is not None
    assert 0 < trial.solution.products <= trial.max_products


def wood(z):
    """Half the gradient of Moré, Garbow and Hillstrom's 14th function; it is zero at 1, and near (-1, 1, -1, 1)."""
    a, b, c, d = z.unbind(1)
    left, right = b - a * a, d - c * c
    return torch.stack(
        [
            -200.0 * a * left - (1.0 - a),
            100.0 * left + 10.1 * (b - 1.0) + 9.9 * (d - 1.0),
            -180.0 * c * right - (1.0 - c),
            90.0 * right + 10.1 * (d - 1.0) + 9.9 * (b - 1.0),
        ],
        1,
    )


def test_a_sample_that_makes_no_progress_starts_again_alone():
    z0 = torch.tensor([[-600.0, -200.0, -600.0, -200.0], [-3.0, -1.0, -3.0, -1.0]], dtype=DOUBLE)
    seen = []

    def fn(z):
        if not z.requires_grad:  # not for a Jacobian
            seen.append(z.clone())
        return z + wood(z)

    ran = {"solver": TrustRegion(), "rtol": 0.0, "atol": 1e-6, "max_steps": 400}
    solution = pydeq.fixed_point(fn, z0, **ran)
    assert solution.converged.all()
    assert (wood(solution.value).norm(dim=1) <= 1e-6).all()
    begun = list(seen)
    begins = [[torch.equal(z[row], z0[row]) for z in begun].count(True) for row in (0, 1)]
    assert begins == [2, 1]
    for row in ([0], [1]):
        assert_identical(pydeq.fixed_point(fn, z0[row], **ran), solution, row)
    # There would be too few evaluations left.
    again = next(k for k in range(1, len(begun)) if torch.equal(begun[k][0], z0[0]))
    seen.clear()
    pydeq.fixed_point(fn, z0[:1], **ran | {"max_steps": again + 20})
    assert [torch.equal(z, z0[:1]) for z in seen].count(True) == 1


def test_a_sample_that_waits_does_not_count_as_stuck():
    search = TrustRegionSearch(torch.zeros(2, 3, dtype=DOUBLE), DOUBLE)
    running, none = np.array([True, False]), np.array([False, False])
    search.flags[TrustFlag.UPDATED] = True
    assert not search.stuck(np.array([True, True]), none, np.array([True, True]), np.array([1.0, 1e-9])).any()
    for _ in range(29):
        assert not search.stuck(running, none, running, np.array([0.9, 1e-9])).any()
    # The first one has run 30 steps without progress. The second one waited, and is moved away.
    stuck = search.stuck(np.array([True, True]), none, np.array([True, True]), np.array([0.9, 1e-2]))
    assert stuck.tolist() == [True, False]


def test_a_decomposition_that_fails_changes_no_other_sample(monkeypatch):
    """LAPACK's error for one matrix is one for the batch: then they are decomposed one by one, to the same bits."""
    problem = softsign_map([3.0, 6.0, 1.5], TRUST_ENTRIES + 1, dtype=DOUBLE)  # too large for the kernel
    ran = {"solver": TrustRegion(), "rtol": 1e-8, "max_steps": 60}
    expected = problem.solve(**ran)

    def only_one(function):
        def call(matrices, *right):
            if len(matrices) > 1:
                raise np.linalg.LinAlgError
            return function(matrices, *right)

        return call

    monkeypatch.setattr(np.linalg, "solve", only_one(np.linalg.solve))
    monkeypatch.setattr(np.linalg, "svd", only_one(np.linalg.svd))
    assert_identical(problem.solve(**ran), expected)


# What it refuses


def test_large_states():
    z0 = torch.zeros(2, 1025)
    with pytest.raises(ValueError, match=r"which has 1025 entries here, .* use pydeq\.NewtonKrylov\(\)"):
        pydeq.fixed_point(torch.cos, z0, solver=TrustRegion())
    assert pydeq.fixed_point(torch.cos, z0[:, :0], solver=TrustRegion()).nfe <= 1


def test_functions_without_a_derivative():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.tanh()

        @staticmethod
        def backward(ctx, v):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise NotImplementedError("no derivative")

    fn = lambda z: 2.0 * Broken.apply(z + 1.0)  # noqa: E731
    z0 = torch.ones(2, 3, dtype=DOUBLE)
    with pytest.raises(
        RuntimeError, match=r"TrustRegion's mode 'vjp' needs derivatives of fn, which has none: .*no deri"
    ):
        pydeq.fixed_point(fn, z0, solver=TrustRegion("vjp"))
    solution = pydeq.fixed_point(fn, z0, solver=TrustRegion(), rtol=1e-9)
    assert solution.converged.all()
    expected = pydeq.fixed_point(lambda z: 2.0 * torch.tanh(z + 1.0), z0, solver=TrustRegion("vjp"), rtol=1e-9)
    assert_close(solution.value, expected.value, condition=1e8)


def test_arguments():
    with pytest.raises(ValueError, match="mode must be 'auto', 'vjp' or 'difference', got 'jvp'"):
        TrustRegion(mode="jvp")  # pyright: ignore[reportArgumentType]
    for mode in ("auto", "vjp"):
        with pytest.raises(ValueError, match=f"vectorize is for mode='difference', got mode='{mode}'"):
            TrustRegion(mode, vectorize=True)
    with pytest.raises(TypeError, match="vectorize must be a bool, got int"):
        TrustRegion("difference", vectorize=1)  # pyright: ignore[reportArgumentType]
