"""A convolutional cell, and a problem with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems.base import BATCH, Problem


class ConvCell(nn.Module):
    """f(z, x) = GN(relu(z + GN(x + conv(relu(GN(conv(z))))))): a multiscale DEQ's residual block, at one scale.

    Args:
        channels: Of z, x and the hidden layer.
        deviation: Of the initial weights.
        groups: Of the group norms.

    Source: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020, section 3.
    """

    def __init__(self, channels: int, deviation: float = 0.01, groups: int = 4) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(3))
        for convolution in (self.inner, self.outer):
            nn.init.normal_(convolution.weight, std=deviation)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norms[0](self.inner(z)))
        branch = self.norms[1](x + self.outer(hidden))
        return self.norms[2](functional.relu(z + branch))


def convolutional(seed: int, channels: int = 48, size: int = 8, batch: int = BATCH) -> Problem:
    """A freshly initialized cell on standard normal injections, from z = 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = ConvCell(channels)
        x = torch.randn(batch, channels, size, size)

    def fn(z: Tensor) -> Tensor:
        with torch.no_grad():
            return cell(z, x)

    return Problem(f"conv.c{channels}", f"conv cell, {channels} x {size}x{size}", fn, torch.zeros_like(x))
