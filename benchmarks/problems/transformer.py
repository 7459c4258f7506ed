"""A small transformer's block as a cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TransformerCell(nn.Module):
    """f(z, x) = LN(y + FF(y)) with y = LN(z + attention(z W_qkv + x)): a DEQ-Transformer's block without memory.

    Args:
        width: Of z, [B, L, width]; x is [B, L, 3 width].
        heads: Of the causal attention.
        inner: Width of the feed-forward layer.
        deviation: Of the initial weights; ten times it for the projection after attention, so that attention outweighs
            the residual path. The cell then contracts, as after regularized training; otherwise it hardly contracts.
        fused: Use torch's fused attention, which has no second derivative.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019, section 4.
    """

    def __init__(self, width: int, heads: int, inner: int, deviation: float = 0.02, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        for layer in (self.qkv, self.out, self.first, self.second):
            nn.init.normal_(layer.weight, std=10 * deviation if layer is self.out else deviation)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, length, width = z.shape
        q, k, v = (self.qkv(z) + x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # in plain products, which can be differentiated twice
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            hidden = torch.ones(length, length, dtype=torch.bool, device=z.device).triu(1)
            mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        y = self.norms[0](z + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return self.norms[1](y + self.second(functional.relu(self.first(y))))
