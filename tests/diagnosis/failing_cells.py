"""Cells whose layer does not converge by default, as people write them: large initialization, expansive maps, norms.

``FAILING`` has a case for each cell. ``case.build()`` makes a seeded cell, an initial state and a context, as
``tests/cells/cells.py`` does for cells that converge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cells import Case, Map, SelfAttention
from torch import Tensor, nn

import pydeq

FAILING: list[Case] = []
BATCH = 4


def failing(name, **properties):
    def add(make):
        FAILING.append(Case(name, make, **properties))
        return make

    return add


def vectors(width: int, batch: int = BATCH) -> tuple[Tensor, tuple[Tensor]]:
    return torch.zeros(batch, width), (torch.randn(batch, width),)


def images(channels: int, size: int) -> tuple[Tensor, tuple[Tensor]]:
    return torch.zeros(BATCH, channels, size, size), (torch.randn(BATCH, channels, size, size),)


def tokens(batch: int = BATCH, length: int = 6, width: int = 8) -> tuple[Tensor, tuple[Tensor]]:
    return torch.zeros(batch, length, width), (torch.randn(batch, length, width),)


def linear(width: int, radius: float, bias: bool = True) -> nn.Linear:
    """A Gaussian matrix of this spectral radius."""
    layer = nn.Linear(width, width, bias=bias)
    with torch.no_grad():
        matrix = torch.randn(width, width)
        layer.weight.copy_(radius * matrix / torch.linalg.eigvals(matrix).abs().max())
    return layer


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """Multiply all weights of linear maps and convolutions."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.weight.mul_(factor)
    return module


def symmetric(width: int, low: float, high: float) -> nn.Linear:
    """A symmetric matrix with eigenvalues spread evenly over an interval."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(width, width))[0]
        layer.weight.copy_((basis * torch.linspace(low, high, width)) @ basis.T)
    return layer


@failing("tanh(W z + x) of scale 2")
def tanh_of_scale_2():
    return Map(lambda m, z, x: torch.tanh(m.linear(z) + x), linear=linear(32, 2.0)), *vectors(32)


@failing("tanh(W z + x) of scale 2.2, wide")
def wide_tanh():
    return Map(lambda m, z, x: torch.tanh(m.linear(z) + x), linear=linear(128, 2.2)), *vectors(128)


@failing("a linear cell of radius 1.2")
def expansive_linear():
    return Map(lambda m, z, x: m.linear(z) + x, linear=linear(32, 1.2)), *vectors(32)


@failing("a linear cell with eigenvalues between -3 and 0.9")
def flipping_linear():
    return Map(lambda m, z, x: m.linear(z) + x, linear=symmetric(32, -3.0, 0.9)), *vectors(32)


@failing("a slow symmetric linear cell, 0.9999")
def slow_linear():
    return Map(lambda m, z, x: m.linear(z) + x, linear=symmetric(200, -0.9999, 0.9999)), *vectors(200)


@failing("a rotation by a right angle, scaled by 1.1")
def rotation():
    def cell(m, z, x):
        a, b = z.chunk(2, dim=1)
        return 1.1 * m.linear(torch.cat([b, -a], dim=1)) + x

    return Map(cell, linear=nn.utils.parametrizations.orthogonal(nn.Linear(32, 32))), *vectors(32)


@failing("a solution of 0, where a relative tolerance cannot be met")
def vanishing():
    def cell(m, z, x):
        return torch.tanh(m.linear(z) * torch.sigmoid(x))

    z0, context = vectors(32)
    return Map(cell, linear=linear(32, 0.9, bias=False)), z0 + 1.0, context


@failing("convolutions with GroupNorm and a large initialization")
def group_norm():
    def cell(m, z, x):
        h = m.norms[0](F.relu(m.first(z)))
        return m.norms[2](F.relu(z + m.norms[1](m.second(h) + x)))

    convolutions = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("first", "second")}
    norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(3))
    return scaled(Map(cell, **convolutions, norms=norms), 3.0), *images(4, 3)


@failing("convolutions with BatchNorm in training mode", couples=True)
def batch_norm():
    def cell(m, z, x):
        h = F.relu(m.norms[0](m.first(z)))
        return F.relu(m.norms[1](m.second(h)) + z + x) - z

    convolutions = {name: nn.Conv2d(6, 6, 3, padding=1) for name in ("first", "second")}
    return Map(cell, **convolutions, norms=nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))), *images(6, 4)


@failing("a convolution with tanh and a large initialization")
def convolution():
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    return scaled(Map(lambda m, z, x: torch.tanh(m.conv(z) + x), conv=convolution), 5.0), *images(4, 4)


@failing("attention with LayerNorm after it, three layers deep")
def post_norm():
    def cell(m, z, x):
        h = z + x
        for attention, feed, (first, second) in zip(m.attentions, m.feeds, m.norms, strict=True):
            h = first(h + attention(h))
            h = second(h + feed(h))
        return h

    modules = {
        "attentions": nn.ModuleList(SelfAttention() for _ in range(3)),
        "feeds": nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)),
        "norms": nn.ModuleList(nn.ModuleList(nn.LayerNorm(8) for _ in range(2)) for _ in range(3)),
    }
    return scaled(Map(cell, **modules), 4.0), *tokens()


@failing("nn.TransformerEncoderLayer with sharp attention", twice=False)
def encoder_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
    return scaled(Map(lambda m, z, x: m.layer(z + x), layer=layer), 3.0), *tokens()


@failing("attention before its norm, a residual stream", twice=False)
def pre_norm():
    def cell(m, z, x):
        h = z + m.attention(m.norms[0](z)) + x
        return m.norms[2](h + m.feed(m.norms[1](h)))

    feed = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
    # Most samples converge: with a small batch, it depends on the processor's rounding whether all do.
    return scaled(Map(cell, attention=SelfAttention(), feed=feed, norms=norms), 2.3), *tokens(batch=32)


@failing("a perceptron with a residual of 1")
def residual_perceptron():
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return scaled(Map(lambda m, z, x: z + m.layers(z + x) - 0.3 * z, layers=layers), 1.7), *vectors(32)


@failing("a deep perceptron with ReLU and weights three times as large")
def deep_perceptron():
    layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    return scaled(Map(lambda m, z, x: m.layers(z) + x, layers=layers), 3.0), *vectors(32)


@failing("nn.GRUCell with large weights")
def gru_cell():
    return Map(lambda m, h, x: m.gru(x, h), gru=scaled_cell(nn.GRUCell(16, 16), 12.0)), *vectors(16)


@failing("nn.LSTMCell with large weights, a tuple of states", state="tuple")
def lstm_cell():
    cell = Map(lambda m, hc, x: m.lstm(x, hc), lstm=scaled_cell(nn.LSTMCell(16, 16), 16.0))
    return cell, (torch.zeros(BATCH, 16), torch.zeros(BATCH, 16)), (torch.randn(BATCH, 16),)


def scaled_cell(cell: nn.RNNCellBase, factor: float) -> nn.RNNCellBase:
    with torch.no_grad():
        cell.weight_hh.mul_(factor)
    return cell


@failing("dropout in training mode")
def dropout():
    modules = {"linear": linear(32, 0.9), "dropout": nn.Dropout(0.2)}
    return Map(lambda m, z, x: m.dropout(torch.tanh(m.linear(z) + x)), **modules), *vectors(32)


@failing("two streams of different scale that turn each other, a tuple", state="tuple")
def two_scales():
    def cell(m, z, x):
        a, b = z
        return torch.tanh(m.first(b) / 100.0 + x), 100.0 * torch.tanh(m.second(a))

    modules = {"first": linear(24, 1.8), "second": linear(24, 1.8)}
    z0, (x,) = vectors(24)
    return Map(cell, **modules), (z0, torch.zeros_like(z0)), (x,)


@failing("a gradient step that is too long")
def gradient_step():
    def cell(m, z, x):
        return z - 0.8 * (F.linear(F.softplus(m.linear(z)), m.linear.weight.T) + 0.01 * z - x)

    return scaled(Map(cell, linear=nn.Linear(32, 32)), 6.0), *vectors(32)


@failing("a sine of each entry")
def sines():
    scale = nn.Linear(32, 32)
    return Map(lambda m, z, x: 2.0 * torch.sin(3.0 * z + 2.0 * m.linear(z) + x), linear=scale), *vectors(32)


@failing("spectral norm of 1 after a residual, weights by pydeq.nn")
def normed_residual():
    modules = {name: pydeq.nn.spectral_norm(nn.Linear(32, 32)) for name in ("first", "second")}
    return Map(lambda m, z, x: 2.5 * m.second(torch.sin(2.0 * m.first(z) + x)), **modules).eval(), *vectors(32)
