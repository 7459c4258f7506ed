"""Estimates of ||J||_F^2 against exact Jacobians, within bounds that follow from their variance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq.cell import linearization
from pydeq.testing import CallCounter, assert_close

WAYS = [("hutchinson", 1), ("hutchinson", 4), ("hutch++", 3), ("hutch++", 7), ("hutch++", 8)]


def problem(batch=2, dim=5):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    z = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return (lambda z, x: torch.tanh(z @ weight.T + x)), weight, z, x


def exact(fn, z, x):
    jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x), z, create_graph=True)
    return torch.stack([jacobian[b, :, b] for b in range(len(z))])


def copies(count, dim=5, seed=0, decay=0.0):
    """``count`` copies of one sample, each with a weight of its own: as many independent estimates in one call."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    weight = weight @ torch.diag(torch.exp(-decay * torch.arange(dim)).double())
    z, x = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    weights = weight.expand(count, dim, dim).clone().requires_grad_()

    def fn(z, weights):
        return torch.tanh(torch.einsum("bij,bj->bi", weights, z) + x)

    return fn, z.expand(count, dim), weights


def jacobian_of(fn, z, weights):
    return torch.func.jacrev(lambda z: fn(z[None], weights[:1])[0])(z[0])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("method", "probes"), WAYS)
def test_unbiased_within_its_standard_error(method, probes, distribution, mode, seed):
    fn, z, weights = copies(4000, seed=seed)
    J = jacobian_of(fn, z, weights).detach()
    with torch.no_grad():
        estimates = pydeq.frobenius_norm_squared(
            fn,
            z,
            weights,
            probes=probes,
            distribution=distribution,
            mode=mode,
            method=method,
            generator=torch.Generator().manual_seed(seed),
        )
    truth = float(J.square().sum())
    if method == "hutchinson":
        gram = J @ J.mT if mode == "vjp" else J.mT @ J
        variance = 2.0 * float(gram.square().sum())
        if distribution == "rademacher":
            variance -= 2.0 * float(gram.diagonal().square().sum())
        variance /= probes
        # The estimates must also scatter as they should: their variance is known to about sqrt(15 / n), a sixteenth.
        assert abs(math.log(float(estimates.var()) / variance)) < 0.4
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean()) - truth) < 5 * error


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize(("method", "probes"), [("hutchinson", 2), ("hutch++", 6)])
def test_gradients_are_unbiased(method, probes, mode):
    """Also where a basis is held constant that depends on the weights."""
    fn, z, weights = copies(3000)
    one = weights[:1].detach().requires_grad_()
    (expected,) = torch.autograd.grad(jacobian_of(fn, z, one).square().sum(), one)
    estimates = pydeq.frobenius_norm_squared(
        fn, z, weights, probes=probes, mode=mode, method=method, generator=torch.Generator().manual_seed(3)
    )
    (gradients,) = torch.autograd.grad(estimates.sum(), weights)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - expected[0]).abs() < 5 * error).all()


def test_hutch_plus_plus_has_less_variance_at_equal_cost_where_few_directions_dominate():
    fn, z, weights = copies(500, dim=30, decay=1.0)
    variances = {}
    with torch.no_grad():
        for method in ("hutchinson", "hutch++"):
            generator = torch.Generator().manual_seed(4)
            estimates = pydeq.frobenius_norm_squared(fn, z, weights, probes=12, method=method, generator=generator)
            variances[method] = float(estimates.var())
    assert variances["hutch++"] < 1e-3 * variances["hutchinson"]


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_hutch_plus_plus_of_a_full_basis_is_exact(mode):
    fn, _, z, x = problem()
    truth = exact(fn, z, x).square().sum((1, 2))
    assert_close(pydeq.frobenius_norm_squared(fn, z, x, probes=15, mode=mode, method="hutch++"), truth, condition=20)
    # A Jacobian of lower rank than the basis.
    low = torch.diag(torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    estimate = pydeq.frobenius_norm_squared(lambda z: z @ low, z, probes=9, mode=mode, method="hutch++")
    assert_close(estimate, torch.full((2,), 25.0, dtype=torch.float64), condition=20)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_a_constant_has_norm_zero(mode, method):
    x = torch.ones(2, 3, dtype=torch.float64)
    norms = pydeq.frobenius_norm_squared(lambda z: x, 2 * x, probes=4, mode=mode, method=method)
    assert torch.equal(norms, torch.zeros(2, dtype=torch.float64))


def test_exact_values_and_gradients():
    fn, weight, z, x = problem()
    truth = exact(fn, z, x).square().sum((1, 2))
    norms = pydeq.frobenius_norm_squared(fn, z, x, method="exact")
    assert_close(norms, truth, size=25, condition=4)
    (actual,) = torch.autograd.grad(norms.sum(), weight)
    (expected,) = torch.autograd.grad(truth.sum(), weight)
    assert_close(actual, expected, size=25, condition=4)
    empty = pydeq.frobenius_norm_squared(torch.tanh, torch.zeros(2, 0), method="exact")
    assert torch.equal(empty, torch.zeros(2))


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_one_product_of_all_probes_equals_one_by_one(mode, method, monkeypatch):
    """Eight probes at once and in a loop: the same seed, the same numbers up to the rounding of fn's products."""
    fn, weight, z, x = problem(batch=3, dim=40)

    def estimate():
        generator = torch.Generator().manual_seed(5)
        norms = pydeq.frobenius_norm_squared(fn, z, x, probes=8, mode=mode, method=method, generator=generator)
        return norms, *torch.autograd.grad(norms.sum(), weight)

    batched = estimate()

    def looped(batched, single, v, at_once=None):
        return torch.stack([single(one) for one in v])

    monkeypatch.setattr(linearization, "vectorize", looped)
    monkeypatch.setattr("pydeq.jacobian.functional.vectorize", looped)
    for one, other in zip(batched, estimate(), strict=True):
        assert_close(one, other, size=40, condition=20)


class Doubling(torch.autograd.Function):
    """2 x, with forward mode and without a batching rule."""

    @staticmethod
    def forward(x):
        return 2.0 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent):
        return 2.0 * tangent


def test_forward_mode_that_does_not_vectorize_goes_one_by_one(monkeypatch):
    monkeypatch.setattr(linearization, "_warned", set())
    options = {"probes": 3, "mode": "jvp", "distribution": "rademacher"}
    with pytest.warns(RuntimeWarning, match="one by one, since an operator in fn does not vectorize: .*Doubling"):
        norms = pydeq.frobenius_norm_squared(Doubling.apply, torch.ones(2, 3), **options)
    assert torch.equal(norms, torch.full((2,), 12.0))


def test_fn_is_evaluated_once():
    fn, _, z, x = problem()
    for method, probes in (*WAYS, ("exact", 1)):
        for mode in ("vjp", "jvp"):
            counted = CallCounter(fn)
            pydeq.frobenius_norm_squared(counted, z, x, probes=probes, method=method, mode=mode)
            assert counted.calls == 1, (method, probes, mode)


@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(["gaussian", "rademacher"]))
def test_a_sample_is_estimated_alike_in_every_batch(seed, batch, distribution):
    z = torch.randn(5, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]

    def scaled(z, scales):
        return scales * torch.sin(z)

    whole, part = (
        pydeq.frobenius_norm_squared(
            scaled,
            z[:n],
            scales[:n],
            probes=3,
            distribution=distribution,
            generator=torch.Generator().manual_seed(seed),
        )
        for n in (5, batch)
    )
    assert_close(part, whole[:batch], size=210)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_gradient_of_the_penalty_is_that_of_the_exact_norm(mode):
    fn, weight, z, x = problem()
    (expected,) = torch.autograd.grad(exact(fn, z, x).square().sum() / z.numel(), weight)
    penalty = pydeq.jacobian_penalty(fn, z, x, method="exact", mode=mode)
    assert penalty.shape == ()
    (actual,) = torch.autograd.grad(penalty, weight)
    assert_close(actual, expected, size=25, condition=4)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_tuple_states_equal_one_tensor(mode, method):
    fn, _, z, x = problem()

    def pair(parts, x):
        y = fn(torch.cat(parts, 1), x)
        return y[:, :2], y[:, 2:]

    options = {"probes": 4, "mode": mode, "method": method}
    one = pydeq.frobenius_norm_squared(fn, z, x, generator=torch.Generator().manual_seed(3), **options)
    two = pydeq.frobenius_norm_squared(
        pair, (z[:, :2], z[:, 2:]), x, generator=torch.Generator().manual_seed(3), **options
    )
    assert_close(two, one, size=5, condition=20)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_under_transforms(mode, method):
    """Gradients with respect to functional parameters, also mapped over several of them."""
    _, weight, z, x = problem()

    def estimate(weight):
        return pydeq.jacobian_penalty(
            lambda z, x: torch.tanh(z @ weight.T + x),
            z,
            x,
            probes=4,
            mode=mode,
            method=method,
            generator=torch.Generator().manual_seed(7),
        )

    weights = torch.stack([weight.detach(), 0.5 * weight.detach(), weight.detach().T])
    leaves = weights.clone().requires_grad_()
    values = torch.stack([estimate(leaf) for leaf in leaves])
    (expected,) = torch.autograd.grad(values.sum(), leaves)
    gradient, value = torch.func.grad_and_value(estimate)(weights[0])
    assert_close(value, values[0], size=25, condition=20)
    assert_close(gradient, expected[0], size=25, condition=20)
    mapped = torch.func.vmap(torch.func.grad(estimate), randomness="same")(weights)
    assert_close(mapped, expected, size=25, condition=20)


def test_z_gets_no_gradient():
    fn, weight, z, x = problem()
    z.requires_grad_()
    pydeq.jacobian_penalty(fn, z, x).backward()
    assert z.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_without_gradients_the_value_is_the_same_and_has_no_graph(mode, method):
    fn, _, z, x = problem()

    def estimate():
        generator = torch.Generator().manual_seed(6)
        return pydeq.frobenius_norm_squared(fn, z, x, probes=4, mode=mode, method=method, generator=generator)

    expected = estimate()
    assert expected.requires_grad
    with torch.no_grad():
        actual = estimate()
    assert not actual.requires_grad
    assert_close(actual, expected.detach())
    with torch.inference_mode():
        assert_close(estimate(), expected.detach())


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_states_give_float32(dtype, method):
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = pydeq.frobenius_norm_squared(lambda z: 0.5 * z, z, probes=12, distribution="rademacher", method=method)
    assert norms.dtype == torch.float32
    # Signs estimate a multiple of the identity exactly; the basis of Hutch++ is rounded.
    torch.testing.assert_close(norms, torch.ones(3), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"probes": 1.5}, TypeError, "probes must be an int, got float"),
        ({"distribution": "normal"}, ValueError, "distribution must be 'gaussian' or 'rademacher', got 'normal'"),
        ({"mode": "hvp"}, ValueError, "mode must be 'auto', 'vjp', 'jvp' or 'difference', got 'hvp'"),
        ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
        ({"step": 0.0}, ValueError, "step must be positive and finite, got 0.0"),
        ({"step": "1"}, TypeError, "step must be a number, got str"),
        ({"mode": "vjp", "order": 1}, ValueError, "order is of mode='difference' and 'auto', got mode='vjp'"),
        ({"method": "dense"}, ValueError, "method must be 'hutchinson', 'hutch[+][+]' or 'exact', got 'dense'"),
        ({"method": "hutch++", "probes": 2}, ValueError, "probes must be at least 3 for method='hutch[+][+]', got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    fn, _, z, x = problem()
    with pytest.raises(error, match=message):
        pydeq.frobenius_norm_squared(fn, z, x, **arguments)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_a_changed_shape_is_refused(mode):
    with pytest.raises(ValueError, match="fn must return the shape of z0"):
        pydeq.frobenius_norm_squared(lambda z: z[:, :1], torch.randn(2, 3), mode=mode)


def test_exact_refuses_large_states():
    with pytest.raises(ValueError, match="states of at most 1024 entries per sample, got 1025"):
        pydeq.frobenius_norm_squared(torch.tanh, torch.zeros(1, 1025), method="exact")


class Masked(torch.nn.Module):
    """Attention to the tokens that a mask leaves."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(0.5 * torch.randn(4, 4, generator=generator, dtype=torch.float64))

    def forward(self, z, x, attention_mask=None, scale=None):
        scores = z @ self.weight @ z.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None, :], -torch.inf)
        return torch.tanh(torch.softmax(scores, dim=-1) @ z * (1.0 if scale is None else scale) + x)


@pytest.mark.parametrize("mode", ["auto", "vjp", "jvp", "difference"])
@pytest.mark.parametrize("method", ["hutchinson", "exact"])
@pytest.mark.parametrize("call", [pydeq.jacobian_penalty, pydeq.frobenius_norm_squared])
def test_keywords_reach_fn_and_get_gradients(call, method, mode):
    """As what is given by its place does."""
    generator = torch.Generator().manual_seed(1)
    z, x = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    cell = Masked()
    options = {"mode": mode, "method": method}

    def gradients(*context, **keywords):
        value = call(cell, z, *context, generator=torch.Generator().manual_seed(3), **options, **keywords)
        return value, torch.autograd.grad(value.sum(), (scale, cell.weight))

    by_name = gradients(x, attention_mask=mask, scale=scale)
    by_place = gradients(x, mask, scale)
    for found, expected in zip(by_name, by_place, strict=True):
        torch.testing.assert_close(found, expected)
    assert by_name[1][0].abs() > 0.01
    without, _ = gradients(x, scale=scale)
    assert ((by_name[0] - without).abs() > 0.01).all()


def test_keywords_with_a_state_of_several_parts_under_a_transform():
    generator = torch.Generator().manual_seed(1)
    z, x, shift = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)

    def fn(z, x, *, shift):
        return {"a": torch.tanh(z["a"] + shift), "b": torch.sin(z["b"] + x)}

    def norms(shift):
        state = {"a": z, "b": 2.0 * z}
        return pydeq.frobenius_norm_squared(fn, state, x, shift=shift, method="exact").sum()

    a = torch.tanh(z + shift)
    torch.testing.assert_close(norms(shift), ((1 - a**2) ** 2).sum() + (2.0 * z + x).cos().square().sum())
    torch.testing.assert_close(torch.func.grad(norms)(shift), -4.0 * a * (1 - a**2) ** 2)


def test_a_keyword_that_nobody_takes_is_named():
    fn, _, z, x = problem()
    with pytest.raises(TypeError, match=r"jacobian_penalty got an unexpected .*'vecs': did you mean 'probes'"):
        pydeq.jacobian_penalty(fn, z, x, vecs=2)
    with pytest.raises(TypeError, match=r"frobenius_norm_squared got an unexpected .*'mask'"):
        pydeq.frobenius_norm_squared(fn, z, x, mask=None)
    # What looks like a misspelt option does not reach an fn that takes anything.
    with pytest.raises(TypeError, match="'probe': did you mean 'probes'"):
        pydeq.jacobian_penalty(lambda z, **keywords: z, z, probe=2)
