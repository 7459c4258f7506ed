"""Variational dropout outside of solves: what is dropped together, how often, and in which dtype."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydeq.nn import (
    SequenceDropout,
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    solve_scope,
)

# module, shape of x, dimensions along which its mask must be the same
CASES = [
    (VariationalDropout(0.5), (5, 40), ()),
    (VariationalDropout(0.5, shared_dims=(1,)), (5, 3, 40), (1,)),
    (VariationalDropout(0.5, shared_dims=(-1,)), (5, 40, 3), (2,)),
    (VariationalDropout1d(0.5), (5, 40, 3), (2,)),
    (VariationalDropout1d(0.5, channels_last=True), (5, 3, 40), (1,)),
    (VariationalDropout2d(0.5), (5, 40, 2, 3), (2, 3)),
    (VariationalDropout2d(0.5, channels_last=True), (5, 2, 3, 40), (1, 2)),
    (VariationalDropout3d(0.5), (5, 40, 2, 3, 2), (2, 3, 4)),
    (VariationalDropout3d(0.5, channels_last=True), (5, 2, 3, 2, 40), (1, 2, 3)),
    (SequenceDropout(0.5), (5, 3, 40), (1,)),
]
IDS = [repr(module) for module, _, _ in CASES]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("module", "shape", "shared"), CASES, ids=IDS)
def test_what_is_dropped_together(module, shape, shared):
    torch.manual_seed(0)
    x = torch.randn(shape)
    mask = module(x) / x
    torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 2.0]))
    assert shared == tuple(dim for dim in range(len(shape)) if shape[dim] > 1 and _constant(mask, dim))


def _constant(mask, dim):
    return bool((mask - mask.narrow(dim, 0, 1)).abs().max() < 1e-5)


@given(p=st.floats(0.0, 1.0), seed=st.integers(0, 2**32 - 1))
def test_the_mean_is_kept(p, seed):
    torch.manual_seed(seed)
    n = 20_000
    y = VariationalDropout(p)(torch.ones(n, dtype=torch.float64))
    if p == 1.0:
        assert (y == 0).all()
        return
    deviation = (p / (1 - p) / n) ** 0.5  # of the mean of n values of variance p / (1 - p)
    # Poisson tails, where nearly all is dropped, are wider than normal ones.
    assert abs(y.mean().item() - 1.0) <= 6 * deviation + 12 / (n * (1 - p))


def test_probabilities_at_the_ends():
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert VariationalDropout(0.0)(x) is x
    assert torch.equal(VariationalDropout(1.0)(x), torch.zeros_like(x))
    x.requires_grad_()
    VariationalDropout(1.0)(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 3))


def test_evaluation_mode_hands_through_also_within_a_scope():
    module, x = VariationalDropout(0.5), torch.ones(1000)
    with solve_scope():
        assert not torch.equal(module(x), x)
        assert module.eval()(x) is x
        assert not torch.equal(module.train()(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_mask_has_the_dtype_of_its_input(dtype):
    with solve_scope():
        module = VariationalDropout(0.25)
        y = module(torch.ones(64, dtype=dtype))
        assert y.dtype == dtype
        assert set(y.tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
        for other in (torch.float64, torch.bfloat16):  # of another evaluation, as under autocast
            again = module(torch.ones(64, dtype=other))
            assert again.dtype == other
            assert torch.equal(again != 0, y != 0)


def test_the_mask_is_on_the_device_of_its_input():
    with solve_scope():
        module = VariationalDropout2d(0.25)
        assert module(torch.ones(2, 3, 4, 4)).device.type == "cpu"
        assert module(torch.ones(2, 3, 4, 4, device="meta")).device.type == "meta"


def test_outside_of_a_scope_every_call_draws():
    module, x = VariationalDropout(0.5), torch.ones(100)
    assert not torch.equal(module(x), module(x))
    with solve_scope():
        first = module(x)
        assert torch.equal(module(x), first)
    with solve_scope():
        assert not torch.equal(module(x), first)


def test_modules_and_shapes_draw_on_their_own():
    one, other, x = VariationalDropout(0.5), VariationalDropout(0.5), torch.ones(100)
    with solve_scope():
        assert not torch.equal(one(x), other(x))
        assert one(torch.ones(50)).shape == (50,)
        assert torch.equal(one(x), one(x))


def test_gradients_pass_the_mask():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    module = VariationalDropout(0.5)
    with solve_scope():
        assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_draw_on_their_own(clone):
    module, x = VariationalDropout1d(0.5), torch.ones(5, 20, 2)
    with solve_scope():
        mask = module(x)
        twin = clone(module)
        assert torch.equal(module(x), mask)
        assert not torch.equal(twin(x), mask)
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VariationalDropout(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: VariationalDropout2d(-0.1), ValueError, r"p must be in \[0, 1\], got -0.1"),
        (lambda: VariationalDropout(float("nan")), ValueError, r"p must be in \[0, 1\], got nan"),
        (lambda: VariationalDropout("0.5"), TypeError, "p must be a number, got str"),
        (lambda: VariationalDropout(0.5, 1), TypeError, "shared_dims must be a sequence of ints, got 1"),
        (
            lambda: VariationalDropout(0.5, (2,))(torch.ones(2, 3)),
            ValueError,
            r"x must have a dimension 2 to share the mask along, got shape \(2, 3\)",
        ),
        (
            lambda: VariationalDropout2d()(torch.ones(2, 3, 4)),
            ValueError,
            r"x must be of shape \(batch, channels, height, width\), got \(2, 3, 4\)",
        ),
        (
            lambda: SequenceDropout()(torch.ones(2, 3)),
            ValueError,
            r"x must be of shape \(batch, length, channels\), got \(2, 3\)",
        ),
        (
            lambda: VariationalDropout3d(channels_last=True).eval()(torch.ones(2, 3)),
            ValueError,
            r"x must be of shape \(batch, depth, height, width, channels\), got \(2, 3\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
