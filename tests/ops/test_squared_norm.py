"""The squared norm of each sample and its derivatives."""

import pytest
import torch
from check_op import DTYPES, SIZES, check_op

import pydeq
from pydeq.ops.squared_norm import squared_norm_reference
from pydeq.testing import assert_close, tolerance

OP = torch.ops.pydeq.squared_norm.default


def allowance(before, after):
    return {"return": tolerance(after["return"].dtype, before["x"].shape[1]) * after["return"].double().abs()}


def inputs(batch, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + dim)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_reference(dtype):
    samples = [(inputs(batch, dim, dtype),) for batch in (0, 1, 3) for dim in (0, *SIZES)]
    check_op(OP, squared_norm_reference, samples, allowance, opcheck=[0, 2, len(samples) - 1])


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


def test_half_values_do_not_overflow():
    x = torch.full((2, 300), 6e4, dtype=torch.float16)
    assert_close(pydeq.ops.squared_norm(x), torch.full((2,), 300.0 * float(x[0, 0]) ** 2), size=300)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 2, 3)], ids=str)
def test_gradients(shape):
    x = inputs(shape[0], 60, torch.float64).reshape(-1)[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
    assert torch.autograd.gradcheck(pydeq.ops.squared_norm, x)
    assert torch.autograd.gradgradcheck(pydeq.ops.squared_norm, x)


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
