"""Sums over states: norms that neither overflow nor underflow early, whole or in parts."""

import numpy as np
import pytest
import torch

from pydeq.ops.reduction import Reduction, host_norm, inner, norm, norms
from pydeq.state import DTYPES
from pydeq.testing import assert_close


class Halves(Reduction):
    """Two processes in one: the last dimension of partial sums holds the first half's, then the second half's."""

    def sum(self, partial):
        first, second = partial.chunk(2, -1)
        return (first + second).repeat(*[1] * (partial.dim() - 1), 2)

    def max(self, partial):
        first, second = partial.chunk(2, -1)
        return torch.maximum(first, second).repeat(*[1] * (partial.dim() - 1), 2)


def halves(x):
    """[B, D] -> [2 B, D / 2]: what each of two processes has of x."""
    return torch.cat(x.chunk(2, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[1] = 0.0
    smallest, largest = 4.0 * torch.finfo(dtype).tiny, torch.finfo(dtype).max / 32.0
    x[2] = x[2].sign() * smallest
    x[3] = x[3].sign() * largest
    exact = torch.tensor([float(sum(float(v) ** 2 for v in row) ** 0.5) for row in x[:2].tolist()], dtype=torch.float64)
    assert norm(x).dtype == torch.float64
    assert_close(norm(x)[:2], exact, size=300)
    for row, unit in ((2, smallest), (3, largest)):
        assert_close(norm(x)[row] / unit, torch.tensor(300.0, dtype=torch.float64).sqrt(), size=300)
    assert_close(torch.from_numpy(host_norm(x.double().numpy())), norm(x), size=300)


def test_norm_of_what_is_not_finite():
    x = torch.ones(3, 4, dtype=torch.float64)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    assert norm(x).isfinite().tolist() == [False, False, True]
    assert norm(torch.ones(3, 0, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]
    with np.errstate(invalid="ignore"):
        assert np.isfinite(host_norm(x.numpy())).tolist() == [False, False, True]
    assert host_norm(np.ones((3, 0))).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 0.0], ids=str)
def test_norms_in_parts(dtype, scale):
    """Also where the halves differ by so much that the scale of one is not that of the other."""
    if dtype != torch.float64 and scale not in (1.0, 0.0):
        scale = 1.0
    x, y = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 32:] *= 1e-3
    y[:, :32] = 0.0
    x, y = (scale * x).to(dtype), (scale * y).to(dtype)
    whole = norms([x, y])
    parts = norms([halves(x), halves(y)], Halves())
    assert whole.shape == (2, 5)
    for part in parts.chunk(2, 1):
        for row in range(2):
            unit = scale or 1.0
            assert_close(part[row] / unit, whole[row] / unit, size=64)
            assert_close(whole[row] / unit, ((x, y)[row].double() / unit).norm(dim=1), size=64)


def test_inner_products_in_parts():
    a, b = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(inner(a, b), (a * b).sum(1), size=40, condition=10.0)
    assert_close(inner(halves(a), halves(b), Halves()), inner(a, b).repeat(2), size=40, condition=10.0)
