"""One evaluation and its products with the Jacobian, against dense Jacobians."""

import warnings

import pytest
import torch
from torch import Tensor

from pydeq.cell import linearization
from pydeq.cell.linearization import linearize
from pydeq.testing import CallCounter, assert_close


def tanh_problem(batch=3, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    W, x, z = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (dim, batch, batch))
    W = W.to(dtype).requires_grad_()
    return (lambda z, x: torch.tanh(z @ W.T + x)), W, z.to(dtype), x.to(dtype)


def dense(W, z, x):
    """The Jacobian of each sample, [B, D, D], with a graph."""
    return (1.0 - torch.tanh(z @ W.T + x).square())[:, :, None] * W


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(linearization, "_warned", set())


@pytest.mark.parametrize("probes", [1, 2, 7])
def test_products_with_a_dense_jacobian(probes):
    fn, W, z, x = tanh_problem()
    at, J, v = linearize(fn, z, (x,)), dense(W, z, x), random(probes, 3, 5)
    assert_close(at.flat_vjps(v), torch.einsum("kbi,bij->kbj", v, J), size=5, condition=4)
    assert_close(at.flat_jvps(v), torch.einsum("bij,kbj->kbi", J, v), size=5, condition=4)
    assert_close(at.flat_vjp(v[0]), torch.einsum("bi,bij->bj", v[0], J), size=5, condition=4)
    assert_close(at.vjp(v[0])[0], torch.einsum("bi,bij->bj", v[0], J), size=5, condition=4)
    assert not at.flat_vjps(v).requires_grad
    assert not at.flat_jvps(v).requires_grad


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
@pytest.mark.parametrize("probes", [1, 3])
def test_products_have_a_graph_where_asked(kind, probes):
    fn, W, z, x = tanh_problem()
    v = random(probes, 3, 5)
    products = getattr(linearize(fn, z, (x,)), kind)(v, create_graph=True)
    equation = "kbi,bij->kbj" if kind == "flat_vjps" else "kbj,bij->kbi"
    expected = torch.einsum(equation, v, dense(W, z, x))
    (actual,) = torch.autograd.grad(products.square().sum(), W)
    (wanted,) = torch.autograd.grad(expected.square().sum(), W)
    assert_close(actual, wanted, size=5, condition=20)


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
@pytest.mark.parametrize("probes", [1, 3])
def test_parts_that_do_not_depend_on_each_other(kind, probes):
    """y = (2 b, 0, constant) of z = (a, b, c): rows and columns of zeros, and parts without a graph."""

    def fn(z):
        a, b, c = z
        return 2.0 * b.flatten(1), 0.0 * a.view_as(b), torch.ones_like(c)

    at = linearize(fn, (random(2, 4), random(2, 2, 2), random(2, 3)), ())
    J = torch.zeros(11, 11, dtype=torch.float64)
    J[:4, 4:8] = 2.0 * torch.eye(4)
    v = random(probes, 2, 11)
    expected = v @ J if kind == "flat_vjps" else v @ J.T
    products = getattr(at, kind)(v)
    assert torch.equal(products, expected)
    assert products.is_contiguous()


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
def test_a_constant_has_products_of_zero(kind):
    at = linearize(lambda z: torch.ones_like(z), random(2, 3), ())
    assert torch.equal(getattr(at, kind)(random(4, 2, 3)), torch.zeros(4, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty_states(kind, shape):
    at = linearize(torch.tanh, torch.zeros(shape, dtype=torch.float64), ())
    assert getattr(at, kind)(random(2, *shape)).shape == (2, *shape)


def test_fn_is_evaluated_once():
    fn, _, z, x = tanh_problem()
    fn = CallCounter(fn)
    at = linearize(fn, z, (x,))
    at.flat_vjps(random(4, 3, 5))
    at.flat_jvps(random(4, 3, 5))
    assert fn.calls == 1


class BranchingBackward(torch.autograd.Function):
    """2 x, by a backward pass that looks at numbers: it cannot be vectorized."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, gradient):
        if not bool(gradient.isfinite().all()):
            raise RuntimeError("an overflow")
        return BranchingBackward.apply(gradient)


def branching(z: Tensor) -> Tensor:
    return BranchingBackward.apply(z).sin()  # pyright: ignore


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
def test_what_does_not_vectorize_goes_one_by_one_with_one_warning(kind):
    z, v = random(2, 3), random(4, 2, 3)
    at = linearize(branching, z, ())
    with pytest.warns(RuntimeWarning, match="one by one, since an operator in fn does not vectorize: .*") as warned:
        products = getattr(at, kind)(v)
    assert len(warned) == 1
    assert_close(products, 2.0 * (2.0 * z).cos() * v, condition=2)
    getattr(at, kind)(v)  # a second warning would be an error
    getattr(linearize(branching, z, ()), kind)(v[:1])


@pytest.mark.parametrize("kind", ["flat_vjps", "flat_jvps"])
@pytest.mark.parametrize(
    ("cached", "sizes"),
    [(10**6, [7]), (3 * 120, [3, 3, 1]), (2 * 120 - 1, [1] * 7), (1, [1] * 7)],
    ids=["all", "some", "one by one", "one by one, if too large"],
)
def test_as_many_at_once_as_the_cache_holds(kind, cached, sizes, monkeypatch):
    """Vectors of 120 bytes, and a weight of 200: products, and gradients of them, are the same."""
    fn, W, z, x = tanh_problem()
    at, v = linearize(fn, z, (x,)), random(7, 3, 5)
    monkeypatch.setattr(linearization, "CACHED_BYTES", 10**6)
    expected = getattr(at, kind)(v, create_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), W, retain_graph=True)
    calls = []
    grad = torch.autograd.grad

    def watched(outputs, inputs, seeds=None, **options):
        if options.get("is_grads_batched") or kind == "flat_vjps" or seeds[0].shape == (3, 5):
            calls.append(len(seeds[0]) if options.get("is_grads_batched") else 1)
        return grad(outputs, inputs, seeds, **options)

    monkeypatch.setattr(linearization, "CACHED_BYTES", cached)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    products = getattr(at, kind)(v, create_graph=True)
    assert calls[-len(sizes) :] == sizes
    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert_close(products.detach(), expected.detach(), size=5, condition=4)
    (actual,) = torch.autograd.grad(products.square().sum(), W)
    assert_close(actual, wanted, size=5, condition=20)


def test_large_weights_are_read_for_several_vectors_at_once(monkeypatch):
    monkeypatch.setattr(linearization, "CACHED_BYTES", 100)
    fn, _, z, x = tanh_problem(batch=1, dim=50)  # vectors of 400 bytes, a weight of 20000
    at = linearize(fn, z, (x,))
    assert at._at_once(random(40, 1, 50)) == 25
    assert at._at_once(random(3, 1, 50)) == 3
    assert linearize(torch.tanh, z, ())._at_once(random(3, 1, 50)) == 1


def test_other_errors_are_raised():
    at = linearize(branching, random(2, 3), ())
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="an overflow"):
        at.flat_vjps(torch.full((2, 2, 3), torch.inf, dtype=torch.float64))
    assert not linearization._warned


def test_too_little_memory_is_no_reason_to_go_one_by_one(monkeypatch):
    at = linearize(torch.tanh, random(2, 3), ())

    def full(*arguments, is_grads_batched=False, **options):
        assert is_grads_batched, "went on one by one"
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        at.flat_vjps(random(4, 2, 3))


def test_tensors_of_inference_mode():
    fn, _, z, x = tanh_problem()
    expected = linearize(fn, z, (x,)).flat_vjps(random(2, 3, 5))
    with torch.inference_mode():
        inferred = z.clone(), x.clone()
        inside = linearize(fn, inferred[0], (inferred[1],)).flat_vjps(random(2, 3, 5))
    assert torch.equal(inside, expected)
    outside = linearize(fn, inferred[0], (inferred[1],))
    assert torch.equal(outside.flat_vjps(random(2, 3, 5)), expected)


def test_a_changed_shape_is_refused():
    with pytest.raises(ValueError, match="fn must return the shape of z0"):
        linearize(lambda z: z[:, :1], random(2, 3), ())
