"""Hutchinson estimates against exact Jacobians."""

import pytest
import torch

import pydeq


def problem(batch=2, dim=5):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    z = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return (lambda z, x: torch.tanh(z @ weight.T + x)), weight, z, x


def exact(fn, z, x):
    jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x), z, create_graph=True)
    return torch.stack([jacobian[b, :, b] for b in range(len(z))])


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_unbiased_within_its_standard_error(mode, distribution):
    fn, _, z, x = problem()
    jacobian = exact(fn, z, x).detach()
    truth = jacobian.square().sum((1, 2))
    gram = jacobian @ jacobian.mT
    variance = 2 * gram.square().sum((1, 2))
    if distribution == "rademacher":
        gram = gram if mode == "vjp" else jacobian.mT @ jacobian
        variance = variance - 2 * gram.diagonal(dim1=1, dim2=2).square().sum(1)
    probes = 4000
    generator = torch.Generator().manual_seed(1)
    estimate = pydeq.frobenius_norm_squared(
        fn, z, x, probes=probes, distribution=distribution, mode=mode, generator=generator
    )
    error = (estimate.detach() - truth).abs() / (variance / probes).sqrt()
    assert (error < 4).all(), error
    # The estimate must also scatter: an exact value would not be an estimate of this variance.
    once = torch.stack(
        [
            pydeq.frobenius_norm_squared(fn, z, x, distribution=distribution, mode=mode, generator=generator).detach()
            for _ in range(400)
        ]
    )
    assert (once.var(0) / variance).log().abs().max() < 0.6


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_gradient_of_the_penalty_is_that_of_the_exact_norm(mode):
    fn, weight, z, x = problem()
    (expected,) = torch.autograd.grad(exact(fn, z, x).square().sum() / z.numel(), weight)
    penalty = pydeq.jacobian_penalty(fn, z, x, probes=4000, mode=mode, generator=torch.Generator().manual_seed(2))
    assert penalty.shape == ()
    (actual,) = torch.autograd.grad(penalty, weight)
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99
    torch.testing.assert_close(actual.norm(), expected.norm(), rtol=0.1, atol=0)


def test_tuple_states_equal_one_tensor():
    fn, _, z, x = problem()

    def pair(parts, x):
        y = fn(torch.cat(parts, 1), x)
        return y[:, :2], y[:, 2:]

    one = pydeq.frobenius_norm_squared(fn, z, x, generator=torch.Generator().manual_seed(3))
    two = pydeq.frobenius_norm_squared(pair, (z[:, :2], z[:, 2:]), x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(one, two)


def test_z_gets_no_gradient_and_a_constant_has_norm_zero():
    fn, weight, z, x = problem()
    z.requires_grad_()
    pydeq.jacobian_penalty(fn, z, x).backward()
    assert z.grad is None
    assert weight.grad is not None
    assert torch.equal(pydeq.frobenius_norm_squared(lambda z: x, z), torch.zeros(2, dtype=torch.float64))


def test_half_states_give_float32():
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert pydeq.frobenius_norm_squared(lambda z: 0.5 * z, z).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"probes": 1.5}, TypeError, "probes must be an int, got float"),
        ({"distribution": "normal"}, ValueError, "distribution must be 'gaussian' or 'rademacher', got 'normal'"),
        ({"mode": "hvp"}, ValueError, "mode must be 'vjp' or 'jvp', got 'hvp'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    fn, _, z, x = problem()
    with pytest.raises(error, match=message):
        pydeq.frobenius_norm_squared(fn, z, x, **arguments)


def test_a_changed_shape_is_refused():
    with pytest.raises(ValueError, match="fn must return the shape of z0"):
        pydeq.frobenius_norm_squared(lambda z: z[:, :1], torch.randn(2, 3))
