"""The spectral radius and the spectrum against dense eigenvalues."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq.testing import CallCounter, assert_close

METHODS = ["growth", "arnoldi"]


def linear(matrix):
    return lambda z: z @ matrix.T


def per_sample(matrices):
    return lambda z: torch.einsum("bij,bj->bi", matrices, z)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(angle, scale):
    c, s = math.cos(angle), math.sin(angle)
    return scale * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def sorted_eigenvalues(matrix):
    values = torch.linalg.eigvals(matrix)
    return values.gather(-1, values.abs().argsort(dim=-1, descending=True))


@pytest.mark.parametrize("steps", [2, 60, 200])
@pytest.mark.parametrize("method", METHODS)
def test_a_rotation_scaled_by_nine_tenths(method, steps):
    fn, z = linear(rotation(1.1, 0.9)), torch.zeros(3, 2, dtype=torch.float64)
    radius = pydeq.spectral_radius(fn, z, steps=steps, method=method)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_skewed_rotation(method):
    """The norm of its powers goes up and down for ever."""
    for skew in (5.0, 30.0):
        scale = torch.tensor([1.0, skew], dtype=torch.float64)
        for angle in (0.3, 1.1, 2.0):
            matrix = rotation(angle, 0.9) * scale / scale[:, None]
            value, error, converged = pydeq.spectral_radius(
                linear(matrix), torch.zeros(20, 2, dtype=torch.float64), method=method, steps=400, return_error=True
            )
            assert converged.all() or skew == 30.0
            assert ((value - 0.9).abs() <= 3 * error).all()
            torch.testing.assert_close(value, torch.full_like(value, 0.9), rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_nilpotent_and_constant_maps(method):
    z = torch.zeros(2, 3, dtype=torch.float64)
    nilpotent = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for fn in (linear(torch.zeros(3, 3, dtype=torch.float64)), lambda z: torch.ones_like(z)):
        radius, error, converged = pydeq.spectral_radius(fn, z, method=method, return_error=True)
        assert torch.equal(radius, torch.zeros(2, dtype=torch.float64))
        assert torch.equal(error, torch.zeros(2, dtype=torch.float64))
        assert converged.all()
    radius, error, _ = pydeq.spectral_radius(linear(nilpotent), z, method=method, return_error=True)
    assert (radius <= (0.0 if method == "growth" else 3e-5)).all()  # 6 eps^(1/3)
    assert (radius <= 3 * error).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [2, 4])
def test_defective_eigenvalues(method, order):
    """||J^k|| grows as k^(p-1) rho^k: growth approaches rho as 1 / k, and says so."""
    J = 0.8 * torch.eye(order, dtype=torch.float64) + torch.diag(torch.ones(order - 1, dtype=torch.float64), 1)
    z = torch.zeros(4, order, dtype=torch.float64)
    value, error, _ = pydeq.spectral_radius(linear(J), z, method=method, steps=400, rtol=0.0, return_error=True)
    assert ((value - 0.8).abs() <= 3 * error).all()
    assert ((value - 0.8).abs() < (0.02 if method == "growth" else 5e-4)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [12, 50])
def test_random_matrices_with_complex_dominant_pairs(dim, method):
    """Within the estimated error nearly always; where that is small, the value is right."""
    matrices = random(100, dim, dim) / dim**0.5
    expected = sorted_eigenvalues(matrices)[:, 0].abs()
    steps = 400 if method == "growth" else 40
    z = torch.zeros(100, dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    value, error, converged = pydeq.spectral_radius(
        per_sample(matrices), z, method=method, steps=steps, return_error=True, generator=generator
    )
    off = (value - expected).abs()
    # A few of the hundred have two moduli so close that no window shows their beat.
    assert ((off <= 3 * error).double().mean()) >= 0.9
    assert ((off <= 5e-3 * expected)[converged].double().mean()) >= 0.9
    assert converged.double().mean() > 0.5
    assert off.median() < 1e-3
    if method == "arnoldi" and dim <= steps:
        assert_close(value, expected, size=dim**2, condition=1000)


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_and_whatever_shares_the_batch(method):
    scales = torch.tensor([0.2, 0.0, 1.5, math.nan])
    fn, z = (lambda z: z * scales[: len(z), None]), torch.ones(4, 5)
    radius = pydeq.spectral_radius(fn, z, method=method)
    torch.testing.assert_close(radius[:3], scales[:3])
    assert radius[3].isnan()
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    whole, part = (
        pydeq.spectral_radius(fn, z[:n], method=method, generator=g, rtol=0.0)
        for n, g in zip((3, 2), generators, strict=True)
    )
    torch.testing.assert_close(part, whole[:2])


def test_growth_ends_once_every_sample_has_converged():
    products = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 0.5 * z

        @staticmethod
        def backward(ctx, gradient):
            nonlocal products
            products += 1
            return 0.5 * gradient

    pydeq.spectral_radius(Counted.apply, torch.ones(2, 3), steps=100)
    assert products == 16
    pydeq.spectral_radius(Counted.apply, torch.ones(2, 3), steps=100, rtol=0.0)
    assert products == 116


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(method, dtype):
    matrix = rotation(0.7, 0.8).to(dtype)
    result = pydeq.spectral_radius(linear(matrix), torch.zeros(2, 2, dtype=dtype), method=method, return_error=True)
    assert result.value.dtype == torch.float32
    assert result.error.dtype == torch.float32
    torch.testing.assert_close(result.value, torch.full((2,), 0.8), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_tuple_states_and_one_evaluation(method):
    matrix = random(5, 5)

    def pair(parts):
        y = torch.cat([part.flatten(1) for part in parts], 1) @ matrix.T
        return y[:, :2], y[:, 2:].view(-1, 3, 1)

    counted = CallCounter(pair)
    state = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 3, 1, dtype=torch.float64)
    radius = pydeq.spectral_radius(counted, state, method=method, steps=400)
    assert counted.calls == 1
    expected = sorted_eigenvalues(matrix)[0].abs().expand(2)
    torch.testing.assert_close(radius, expected, rtol=2e-3 if method == "growth" else 1e-10, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2,)], ids=str)
def test_empty_and_scalar_states(method, shape):
    radius = pydeq.spectral_radius(lambda z: 0.5 * z, torch.zeros(shape), method=method)
    assert torch.equal(radius, torch.full(shape[:1], 0.5 if 0 not in shape else 0.0))


def test_in_inference_mode():
    matrix = random(4, 4)
    with torch.inference_mode():
        z = torch.zeros(2, 4, dtype=torch.float64)
        radius = pydeq.spectral_radius(linear(matrix), z, method="arnoldi")
        values = pydeq.jacobian_spectrum(linear(matrix), z)
    assert_close(values.abs()[:, 0], radius, size=16, condition=100)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32))
def test_spectrum_of_any_matrix(dim, batch, seed):
    matrices = random(batch, dim, dim, seed=seed)
    fn, z = per_sample(matrices), torch.zeros(batch, dim, dtype=torch.float64)
    values, error = pydeq.jacobian_spectrum(fn, z, return_error=True)
    assert values.dtype == torch.complex128
    assert (values.abs().diff(dim=1) <= 0).all()
    # The characteristic polynomial's first coefficients, and conjugate pairs.
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    squares = (matrices @ matrices).diagonal(dim1=1, dim2=2).sum(1)
    magnitude = float(matrices.square().sum((1, 2)).max())
    assert ((values.sum(1) - trace).abs() < 1e-12 * (1 + magnitude)).all()
    assert ((values.square().sum(1) - squares).abs() < 1e-12 * (1 + magnitude)).all()
    exact = torch.linalg.eigvals(matrices.mT)
    assert ((values[:, :, None] - exact[:, None]).abs().amin(2) <= 10 * error + 1e-13).all()
    k = (dim + 1) // 2
    some = pydeq.jacobian_spectrum(fn, z, k=k)
    assert some.shape == (batch, k)
    assert ((some.abs() - values[:, :k].abs()).abs() <= 10 * error[:, :k] + 1e-12 * (1 + magnitude)).all()


def test_largest_eigenvalues_of_a_large_map():
    """Few outer eigenvalues over a bulk: found in far fewer products than there are entries."""
    dim, k = 2000, 3
    diagonal = 0.5 * torch.rand(dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagonal[0] = 0.9
    R = rotation(1.0, 0.95)

    def fn(z):
        return torch.cat([z[:, :2] @ R.T, diagonal[: dim - 2] * z[:, 2:]], 1)

    values, error = pydeq.jacobian_spectrum(
        fn, torch.zeros(1, dim, dtype=torch.float64), k=k, steps=40, return_error=True
    )
    expected = torch.tensor([0.95, 0.95, 0.9], dtype=torch.float64)
    assert_close(values.abs()[0], expected, condition=1e4)
    assert_close(values[0, 0].angle().abs(), torch.tensor(1.0, dtype=torch.float64), condition=1e4)
    assert (error < 1e-6).all()


def test_spectrum_of_narrow_empty_and_constant_states():
    assert pydeq.jacobian_spectrum(torch.tanh, torch.zeros(2, 3)).dtype == torch.complex64
    assert torch.equal(pydeq.jacobian_spectrum(torch.tanh, torch.zeros(2, 3).bfloat16()).real, torch.ones(2, 3))
    assert pydeq.jacobian_spectrum(torch.tanh, torch.zeros(2, 0)).shape == (2, 0)
    assert pydeq.jacobian_spectrum(torch.tanh, torch.zeros(0, 3)).shape == (0, 3)
    assert torch.equal(
        pydeq.jacobian_spectrum(lambda z: torch.ones_like(z), torch.zeros(2, 3), k=2).abs(), torch.zeros(2, 2)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 1}, ValueError, "steps must be at least 2, got 1"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"method": "power"}, ValueError, "method must be 'growth' or 'arnoldi', got 'power'"),
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pydeq.spectral_radius(torch.tanh, torch.zeros(1, 2), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 3}, "k must be at most the 2 entries of a sample's state, got 3"),
        ({"steps": 5}, "steps needs k"),
        ({"k": 2, "steps": 1}, "steps must be at least 2, got 1"),
    ],
)
def test_bad_arguments_of_the_spectrum(arguments, message):
    with pytest.raises(ValueError, match=message):
        pydeq.jacobian_spectrum(torch.tanh, torch.zeros(1, 2), **arguments)


def test_a_dense_spectrum_refuses_large_states():
    with pytest.raises(ValueError, match="states of at most 1024 entries per sample, got 1025"):
        pydeq.jacobian_spectrum(torch.tanh, torch.zeros(1, 1025))


@pytest.mark.parametrize("estimate", [pydeq.spectral_radius, pydeq.jacobian_spectrum], ids=lambda f: f.__name__)
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_transforms_are_refused_with_a_hint(estimate, transform):
    with pytest.raises(
        RuntimeError,
        match=f"{estimate.__name__} has no gradient.*make the dimension that vmap maps over part of the batch",
    ):
        transform(lambda z: estimate(torch.tanh, z).real.sum())(torch.ones(2, 3, 4))


def test_keywords_reach_fn():
    """J = scale * diag(mask * [0.9, -0.5, 0.3])."""
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def fn(z, scale, *, mask):
        return scale[:, None] * z * mask * torch.tensor([0.9, -0.5, 0.3], dtype=torch.float64)

    mask = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.5, 0.25], dtype=torch.float64)
    radius = pydeq.spectral_radius(fn, z, scale, mask=mask, method="arnoldi")
    torch.testing.assert_close(radius, expected)
    values = pydeq.jacobian_spectrum(fn, z, scale, mask=mask)
    eigenvalues = torch.tensor([-0.5, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(values, (scale[:, None] * eigenvalues).to(torch.complex128))
    for estimate in (pydeq.spectral_radius, pydeq.jacobian_spectrum):
        with pytest.raises(TypeError, match=f"{estimate.__name__} got an unexpected .*'step': did you mean 'steps'"):
            estimate(fn, z, scale, mask=mask, step=3)
