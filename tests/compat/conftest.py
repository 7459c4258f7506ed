"""The contract is checked on pydeq's replacement, and on the original where that is installed."""

import importlib
import warnings

import pytest
import torch

import pydeq.compat.torchdeq
from pydeq.compat import warning


@pytest.fixture(autouse=True)
def nothing_was_said():
    """Give warnings that are given once again in each test."""
    warning._said.clear()


def import_original():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings hold invalid escapes
        return importlib.import_module("torchdeq")


@pytest.fixture
def original():
    """The installed torchdeq."""
    pytest.importorskip("torchdeq", reason="torchdeq, the original, is not installed")
    return import_original()


@pytest.fixture(params=["pydeq", "torchdeq"])
def td(request):
    """pydeq's replacement, and the original."""
    if request.param == "pydeq":
        return pydeq.compat.torchdeq
    return request.getfixturevalue("original")


@pytest.fixture
def new():
    return pydeq.compat.torchdeq


class Tanh:
    """f(z) = tanh(W z + x) on (batch, *shape), from z = 0.

    Args:
        rho: Spectral norm of W.
        radius: Its spectral radius instead.
    """

    def __init__(self, rho=0.7, shape=(12,), batch=3, seed=0, dtype=torch.float64, radius=None):
        generator = torch.Generator().manual_seed(seed)
        dim = torch.Size(shape).numel()
        W = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        scale = rho / torch.linalg.matrix_norm(W, 2)
        if radius is not None:
            scale = radius / torch.linalg.eigvals(W).abs().max()
        self.W = (scale * W).to(dtype).requires_grad_()
        self.x = torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)
        self.z0 = torch.zeros(batch, *shape, dtype=dtype)
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return torch.tanh(z.flatten(1) @ self.W.T + self.x).view_as(z)

    def residual(self, z):
        """||f(z) - z|| of each sample."""
        with torch.no_grad():
            return (self(z) - z).flatten(1).norm(dim=1)

    def solution(self):
        z = self.z0
        with torch.no_grad():
            for _ in range(400):
                z = self(z)
        return z


@pytest.fixture
def tanh():
    return Tanh
