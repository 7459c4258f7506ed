"""``norm="parts"``: every part of a state meets the tolerance, whatever its scale."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pydeq
from pydeq import Status

FINE = {"rtol": 1e-12, "max_steps": 300}
SOLVERS = (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden())


def relative_errors(found, exact):
    """Of each part of each sample, [B, P]."""
    pairs = zip(found, exact, strict=True)
    return torch.stack([(a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in pairs], 1)


def residuals(fn, solution):
    """Relative residuals of each part of each sample, [B, P]."""
    image = fn(solution.value)
    return relative_errors(solution.value, image)


class Cell(nn.Module):
    """A large part and a small one that converges slowly and depends on the direction of the large one."""

    def __init__(self, scales=(1e3, 1e-1), dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scales = scales
        self.first = nn.Parameter(0.2 * torch.randn(6, 6, generator=generator, dtype=dtype))
        noise = torch.randn(4, 4, generator=generator, dtype=dtype)
        self.second = nn.Parameter(0.9 * torch.eye(4, dtype=dtype) + 0.02 * noise)

    def forward(self, z, x):
        big, small = (part / scale for part, scale in zip(z, self.scales, strict=True))
        first = torch.tanh(big @ self.first + 0.1 * small.sum(1, keepdim=True) + x)
        second = torch.tanh(small @ self.second + 0.3 * big[:, :4] * x[:, :4])
        return first * self.scales[0], second * self.scales[1]


def problem(batch=4, dtype=torch.float64):
    x = torch.randn(batch, 6, dtype=dtype)
    return Cell(dtype=dtype), (torch.zeros(batch, 6, dtype=dtype), torch.zeros(batch, 4, dtype=dtype)), x


def fixed_point(cell, z0, x, steps=3000):
    z = z0
    for _ in range(steps):
        z = cell(z, x)
    return z


def test_a_small_part_is_right_where_the_norm_of_all_hides_it():
    x, y = 1e3 * torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    z0 = torch.zeros_like(x), torch.zeros_like(y)

    def fn(z):
        return 0.5 * z[0] + x, 0.95 * z[1] + y

    exact = 2.0 * x, 20.0 * y
    every = pydeq.fixed_point(fn, z0, solver=pydeq.Picard(), max_steps=500)
    assert every.converged.all()  # it says
    assert relative_errors(every.image, exact)[:, 1].min() > 0.39
    parts = pydeq.fixed_point(fn, z0, solver=pydeq.Picard(), max_steps=500, norm="parts")
    assert parts.converged.all()
    assert residuals(fn, parts).max() <= 1e-3
    assert relative_errors(parts.image, exact).max() <= 0.95 / 0.05 * 1.001e-3


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("scales", [(1e3, 1e-1), (1e-6, 1e6), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("rtol", [1e-3, 1e-9])
def test_converged_means_that_every_part_meets_the_tolerance(solver, scales, rtol):
    cell, z0, x = problem()
    cell.scales = scales
    solution = pydeq.fixed_point(cell, z0, x, solver=solver, rtol=rtol, max_steps=500, norm="parts", trace=True)
    found = residuals(lambda z: cell(z, x), solution)
    assert solution.converged.all()
    assert (found <= rtol * (1 + 1e-6)).all()
    torch.testing.assert_close(solution.relative_residual, found.amax(1), rtol=1e-4, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(solution.image, cell(solution.value, x), strict=True))
    assert solution.trace.shape == (solution.nfe, 4)
    torch.testing.assert_close(
        torch.where(solution.trace.isnan(), torch.inf, solution.trace).amin(0), solution.relative_residual
    )
    assert solution.nfe >= solution.sample_nfe.max()


@given(
    exponents=st.lists(st.integers(-12, 12), min_size=2, max_size=4),
    rates=st.lists(st.sampled_from([0.1, 0.5, 0.9, -0.9]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    solver=st.sampled_from(SOLVERS),
)
def test_any_scales(exponents, rates, seed, solver):
    generator = torch.Generator().manual_seed(seed)
    scales = [10.0**e for e in exponents]
    x = [s * torch.randn(3, 2 + i, generator=generator, dtype=torch.float64) for i, s in enumerate(scales)]

    def fn(z):
        return tuple(rate * part + b for rate, part, b in zip(rates, z, x, strict=False))

    z0 = tuple(torch.zeros_like(part) for part in x)
    solution = pydeq.fixed_point(fn, z0, solver=solver, rtol=1e-6, max_steps=400, norm="parts")
    assert solution.converged.all()
    assert residuals(fn, solution).max() <= 1.001e-6


def test_parts_that_grow_apart_during_the_solve_are_scaled_again():
    """The first image tells little of the scale: one part starts a million times too large."""

    def fn(z):
        return 0.5 * z[0] + 1.0, 0.5 * z[1] + 1.0

    z0 = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 1e6, dtype=torch.float64)
    for solver in SOLVERS:
        options = {"max_steps": 200, "trace": True, "states_at": [1, 2, 150]}
        solution = pydeq.fixed_point(fn, z0, solver=solver, norm="parts", **options)
        assert solution.converged.all()
        assert residuals(fn, solution).max() <= 1e-3
        assert solution.nfe == len(solution.trace) == solution.sample_nfe.max()  # both samples are alike
        assert torch.equal(solution.states[0][0], fn(z0)[0])
        assert torch.equal(solution.states[-1][1], solution.image[1])


def test_a_part_that_is_zero_at_first_gets_its_scale_from_the_next_evaluations(solver):
    """Information needs two evaluations to reach the last part, which then is 1e10 times the other parts."""
    a = torch.rand(3, 4, dtype=torch.float64) + 1.0

    def fn(z):
        return a + 0.1 * z[0], 0.5 * z[0], 1e10 * z[1]

    z0 = tuple(torch.zeros(3, 4, dtype=torch.float64) for _ in range(3))
    options = {"norm": "parts", "solver": solver, "trace": True, "states_at": [1, 2, 3], "max_steps": 60}
    solution = pydeq.fixed_point(fn, z0, **options)
    assert solution.converged.all()
    assert residuals(fn, solution).max() <= 1e-3
    assert solution.nfe == len(solution.trace) == solution.sample_nfe.max()
    assert all(torch.equal(one, other) for one, other in zip(solution.states[0], fn(z0), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(solution.states[1], fn(fn(z0)), strict=True))


def test_a_part_without_an_entry_or_at_zero_is_no_obstacle():
    def fn(z):
        return 0.5 * z[0] + 1.0, torch.relu(z[1] - 1.0), z[2]

    z0 = torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 0)
    solution = pydeq.fixed_point(fn, z0, norm="parts")
    assert solution.converged.all()
    assert torch.equal(solution.image[1], torch.zeros(3, 4))


def test_atol_is_what_a_part_near_zero_needs():
    def fn(z):
        return 0.5 * z[0] + 1.0, 0.5 * z[1]

    z0 = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    without = pydeq.fixed_point(fn, z0, norm="parts", solver=pydeq.Picard(), max_steps=60)
    assert not without.converged.any()
    solution = pydeq.fixed_point(fn, z0, norm="parts", solver=pydeq.Picard(), max_steps=60, atol=1e-6)
    assert solution.converged.all()
    for value, image in zip(solution.value, fn(solution.value), strict=True):
        assert ((image - value).norm(dim=1) <= 1e-6 + 1e-3 * image.norm(dim=1)).all()
    absolute = pydeq.fixed_point(fn, z0, norm="parts", rtol=0.0, atol=1e-4, max_steps=60)
    assert absolute.converged.all()


def test_a_sample_does_not_depend_on_others():
    cell, z0, x = problem(6)
    x = x * torch.logspace(-3, 1, 6, dtype=torch.float64)[:, None]
    whole = pydeq.fixed_point(cell, z0, x, norm="parts", max_steps=200)
    for i in range(6):
        one = pydeq.fixed_point(cell, tuple(part[:1] for part in z0), x[i : i + 1], norm="parts", max_steps=200)
        assert whole.sample_nfe[i] == one.sample_nfe[0]
        for a, b in zip(whole.image, one.image, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-9, atol=0.0)


def test_other_ends_keep_their_statuses():
    rate = torch.tensor([0.5, 0.999, -50.0, torch.nan], dtype=torch.float64)[:, None]

    def fn(z):
        return rate * z[0] + 1e4, rate * z[1] + 1e-4

    z0 = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    solution = pydeq.fixed_point(fn, z0, norm="parts", solver=pydeq.Picard(), max_steps=40)
    assert solution.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.DIVERGED, Status.NONFINITE]
    assert solution.residual[3].isinf()


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_max_steps_bounds_all_rounds(max_steps):
    cell, z0, x = problem()
    solution = pydeq.fixed_point(cell, z0, x, norm="parts", max_steps=max_steps)
    assert solution.nfe == max_steps
    assert not solution.converged.any()
    if max_steps == 1:
        assert all(torch.equal(a, b) for a, b in zip(solution.image, cell(z0, x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype):
    def fn(z):
        return 0.5 * z[0] + 300.0, 0.5 * z[1] + 3e-4

    z0 = torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    solution = pydeq.fixed_point(fn, z0, norm="parts")
    assert solution.converged.all()
    for part, exact in zip(solution.image, (600.0, 6e-4), strict=True):
        torch.testing.assert_close(part.float(), torch.full((2, 3), exact), rtol=3e-2, atol=0.0)


def test_a_tensor_has_one_part_and_gets_the_same_bits(solver):
    x = torch.randn(4, 6)

    def fn(z):
        return torch.tanh(0.8 * z.roll(1, 1) + x)

    one, other = (pydeq.fixed_point(fn, torch.zeros(4, 6), solver=solver, norm=norm) for norm in ("all", "parts"))
    assert torch.equal(one.image, other.image)


@pytest.mark.parametrize("adjoint", [pydeq.Implicit(rtol=1e-5, max_steps=300), pydeq.Phantom(250)], ids=repr)
def test_gradients_of_both_parts_are_right(adjoint):
    cell, z0, x = problem()
    x.requires_grad_()
    deq = pydeq.DEQ(cell, adjoint=adjoint, norm="parts", rtol=1e-9, max_steps=400)
    for weigh in ((1.0, 0.0), (0.0, 1.0), (1e-6, 1e6)):
        losses = []
        for z in (deq(z0, x), fixed_point(cell, z0, x, 400)):
            loss = weigh[0] * z[0].pow(2).sum() + weigh[1] * z[1].pow(2).sum()
            losses.append(torch.autograd.grad(loss, (x, *cell.parameters())))
        for a, b in zip(*losses, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()


def test_the_adjoint_is_held_to_the_tolerance_in_every_part():
    """The cotangent of the large part is small: in the norm of all it may be lost."""
    cell, z0, x = problem()
    deq = pydeq.DEQ(cell, norm="parts", rtol=1e-9, max_steps=400, adjoint=pydeq.Implicit(rtol=1e-3, max_steps=300))
    z, solution = deq(z0, x, return_solution=True)
    (z[0].sum() + 1e6 * z[1].sum()).backward()
    backward = solution.backward
    assert backward.converged.all()
    at = [part.detach().requires_grad_() for part in solution.image]
    y = cell(tuple(at), x)
    product = torch.autograd.grad(y, at, backward.value)
    v = torch.ones(4, 6, dtype=torch.float64), 1e6 * torch.ones(4, 4, dtype=torch.float64)
    image = tuple(a + b for a, b in zip(product, v, strict=True))
    assert relative_errors(backward.value, image).max() <= 1.001e-3


def test_it_goes_with_other_types_aux_and_torch_func():
    cell, z0, x = problem()

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, z, x):
            big, small = self.cell((z["big"], z["small"]), x)
            return {"big": big, "small": small}, z["small"].square()

    fn = Other()
    z0 = {"big": z0[0], "small": z0[1]}
    solution = pydeq.fixed_point(fn, z0, x, norm="parts", has_aux=True, max_steps=200)
    assert torch.equal(solution.aux, solution.value["small"].square())
    deq = pydeq.DEQ(fn, norm="parts", has_aux=True, adjoint=pydeq.Implicit(**FINE), **FINE)
    g = torch.func.grad(lambda x: deq(z0, x)["small"].sum())(x)
    leaf = x.clone().requires_grad_()
    deq(z0, leaf)["small"].sum().backward()
    torch.testing.assert_close(g, leaf.grad, rtol=1e-6, atol=1e-12)


def test_an_empty_batch():
    solution = pydeq.fixed_point(lambda z: z, (torch.zeros(0, 2), torch.zeros(0, 3)), norm="parts")
    assert solution.nfe == 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"norm": "max"}, "norm must be 'all' or 'parts', got 'max'"),
        ({"norm": "parts", "adjoint": pydeq.Unrolled()}, "norm='parts' needs pydeq.Implicit or pydeq.Phantom"),
        ({"norm": "parts", "adjoint": pydeq.Reversible()}, "norm='parts' needs pydeq.Implicit or pydeq.Phantom"),
        ({"norm": "parts", "adjoint": pydeq.Shine(), "solver": pydeq.Broyden()}, "norm='parts' needs pydeq.Implicit"),
    ],
)
def test_a_layer_refuses(layer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pydeq.DEQ(Cell(), **layer)


def test_a_solve_refuses():
    z0 = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="norm must be 'all' or 'parts', got 2"):
        pydeq.fixed_point(lambda z: z, z0, norm=2)
    with pytest.raises(ValueError, match="norm='parts' does not work with compact=True"):
        pydeq.fixed_point(lambda z: z, z0, norm="parts", compact=True)
