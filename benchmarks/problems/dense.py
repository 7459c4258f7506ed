"""A cheap cell, with which the solver's own work dominates."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseCell(nn.Module):
    """f(z, x) = tanh(W z + x), W Gaussian and scaled to a spectral radius.

    Args:
        width: Of z and x, [B, width].
        radius: Spectral radius of the initial W.
        rank: Of the initial W, if not full.
    """

    def __init__(self, width: int, radius: float = 0.9, rank: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        weight = torch.randn(width, width) if rank is None else torch.randn(width, rank) @ torch.randn(rank, width)
        with torch.no_grad():
            self.linear.weight.copy_(radius * weight / torch.linalg.eigvals(weight).abs().max())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)
