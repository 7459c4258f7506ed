"""The squared norm of each sample, averaged over probes, and its derivatives."""

import pytest
import torch
from check_op import DTYPES, SIZES, check_op

import pydeq
from pydeq.ops.squared_norm import squared_norm_reference
from pydeq.testing import assert_close, tolerance

OP = torch.ops.pydeq.squared_norm.default


def allowance(before, after):
    return {"return": tolerance(after["return"].dtype, before["x"].shape[2]) * after["return"].double().abs()}


def inputs(batch, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + dim)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_reference(dtype):
    samples = [(inputs(batch, dim, dtype)[None],) for batch in (0, 1, 3) for dim in (0, *SIZES)]
    samples += [(inputs(probes * 3, dim, dtype).view(probes, 3, dim),) for probes in (2, 5) for dim in (1, 33, 4097)]
    check_op(OP, squared_norm_reference, samples, allowance, opcheck=[0, 2, len(samples) - 1])


def test_mean_over_probes():
    x = inputs(12, 50, torch.float64).view(4, 3, 50)
    assert_close(pydeq.ops.mean_squared_norm(x), x.square().sum(2).mean(0), size=200)
    # Sums of probes are formed in double, so that what is one sum in float32 is not rounded K times.
    assert torch.equal(pydeq.ops.mean_squared_norm(x[:1]), pydeq.ops.squared_norm(x[0]))


def test_value():
    x = inputs(3, 50, torch.float64)
    assert_close(pydeq.ops.squared_norm(x), x.norm(dim=1).square(), size=50)
    assert pydeq.ops.squared_norm(x.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (2, 3, 4), (5,)], ids=str)
def test_shapes(shape):
    x = torch.ones(shape)
    assert torch.equal(pydeq.ops.squared_norm(x), torch.full(shape[:1], float(x[:1].numel())))


def test_non_contiguous():
    x = inputs(40, 33).T
    assert torch.equal(pydeq.ops.squared_norm(x), pydeq.ops.squared_norm(x.contiguous()))
    x = inputs(1, 33).expand(4, 33)
    assert torch.equal(pydeq.ops.squared_norm(x), pydeq.ops.squared_norm(x.contiguous()))


def test_refuses_a_scalar():
    with pytest.raises(ValueError, match="x must have a batch dimension, got a 0-d tensor"):
        pydeq.ops.squared_norm(torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (1, 2, 3, 4)], ids=str)
def test_refuses_what_is_not_probes_of_a_batch(shape):
    with pytest.raises(ValueError, match=r"x must be of shape \(probes, batch, state\) with at least one probe, got"):
        pydeq.ops.mean_squared_norm(torch.ones(shape))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4)], ids=str)
def test_kernel_refuses_what_it_would_misread(shape):
    with pytest.raises(RuntimeError, match="x must "):
        OP(torch.ones(shape))


def test_half_values_do_not_overflow():
    x = torch.full((2, 300), 6e4, dtype=torch.float16)
    assert_close(pydeq.ops.squared_norm(x), torch.full((2,), 300.0 * float(x[0, 0]) ** 2), size=300)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 2, 3)], ids=str)
def test_gradients(shape):
    x = inputs(shape[0], 60, torch.float64).reshape(-1)[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
    assert torch.autograd.gradcheck(pydeq.ops.squared_norm, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(pydeq.ops.squared_norm, x)


def test_gradients_of_the_mean():
    x = inputs(6, 5, torch.float64).view(2, 3, 5).requires_grad_()
    function = pydeq.ops.mean_squared_norm
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("in_dim", [0, 1, 2, 3])
def test_under_vmap_and_grad(in_dim):
    x = inputs(24, 5, torch.float64).view(4, 2, 3, 5)
    mapped = x.movedim(0, in_dim)
    expected = x.square().sum(3).mean(1)
    assert_close(torch.func.vmap(pydeq.ops.mean_squared_norm, in_dim)(mapped), expected, size=10)
    total = torch.func.grad(lambda x: pydeq.ops.mean_squared_norm(x).sum())
    assert_close(torch.func.vmap(total, in_dim)(mapped), x)
    hessian = torch.func.jacfwd(total)(x[0]).view(30, 30)
    assert_close(hessian, torch.eye(30, dtype=torch.float64))
    assert_close(torch.func.jacrev(total)(x[0]).view(30, 30), torch.eye(30, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_dtype_of_its_input(dtype):
    x = inputs(3, 7, dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(pydeq.ops.squared_norm(x).sum(), x)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, 2 * x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_compiles_into_one_graph():
    x = inputs(3, 7).requires_grad_()
    compiled = torch.compile(pydeq.ops.squared_norm, fullgraph=True, backend="aot_eager")
    value = compiled(x)
    assert torch.equal(value, pydeq.ops.squared_norm(x))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], 2 * x)
