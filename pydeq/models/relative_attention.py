"""Transformer-XL's relative attention. Terms that do not depend on the state are computed outside the iterations.

The L queries belong to the last L of M + L keys. Query i and key j (j counts from the start of the memory) are at the
distance d = M + i - j, and

    score_ij = ((q_i + a) k_j + (q_i + b) r_d) / sqrt(d_head)    for 0 <= d < window, else -inf

with r_d the projected sinusoid of d, a the content bias and b the position bias of each head. The second term is a bias
of the scores, and goes to ``scaled_dot_product_attention`` as its mask.

Source: Dai, Yang, Yang, Carbonell, Le and Salakhutdinov, Transformer-XL, ACL 2019, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pydeq.adjoints.functional import transforms_active
from pydeq.nn import SequenceDropout, VariationalDropout


class RelativeAttention(nn.Module):
    """Causal attention over memory and state within a window.

    Args:
        d_model: Width of the state.
        heads, d_head: Attention heads and the width of each.
        dropout: Probability that a feature of a sequence is dropped from the positions and from the output.
        attention_dropout: Probability that an attention weight is dropped; the mask is fixed during a solve.
        window: Keys at this distance and beyond are not attended to.
    """

    def __init__(
        self, d_model: int, heads: int, d_head: int, dropout: float, attention_dropout: float, window: int
    ) -> None:
        super().__init__()
        self.heads, self.d_head, self.window = heads, d_head, window
        self.qkv = nn.Linear(d_model, 3 * heads * d_head, bias=False)
        self.position = nn.Linear(d_model, heads * d_head, bias=False)
        self.output = nn.Linear(heads * d_head, d_model)
        self.content_bias = nn.Parameter(torch.empty(heads, 1, d_head))
        self.position_bias = nn.Parameter(torch.empty(heads, 1, d_head))
        self.position_dropout = SequenceDropout(dropout)
        self.attention_dropout = VariationalDropout(attention_dropout)
        self.output_dropout = SequenceDropout(dropout)

    def positions(self, length: int, like: Tensor) -> Tensor:
        """Compute r_d for d = length - 1 down to 0, (heads, length, d_head), with ``like``'s dtype and device."""
        sinusoids = self.position_dropout(relative_sinusoids(length, self.qkv.in_features, like))
        return self.position(sinusoids).view(length, self.heads, self.d_head).transpose(0, 1)

    def remember(self, states: Tensor, injection: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of a memory.

        Args:
            states: (batch, M, d_model).
            injection: (batch, M, 3 * heads * d_head).

        Returns:
            Two tensors (batch, heads, M, d_head).
        """
        # Only keys and values: the memory has no queries.
        inner = self.heads * self.d_head
        keys, values = (functional.linear(states, self.qkv.weight[inner:]) + injection[..., inner:]).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(
        self, z: Tensor, injection: Tensor, keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend to memory and state.

        Args:
            z: State, (batch, L, d_model).
            injection: Added to queries, keys and values, (batch, L, 3 * heads * d_head).
            keys, values: Keys and values of the memory, (batch, heads, M, d_head).
            positions: From :meth:`positions`, (heads, M + L, d_head).
            mask: 0 where a query may look and -inf elsewhere, (L, M + L).

        Returns:
            (batch, L, d_model).
        """
        q, k, v = (self._split(part) for part in (self.qkv(z) + injection).chunk(3, dim=-1))
        k, v = torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)
        scale = self.d_head**-0.5
        by_distance = ((q + self.position_bias) * scale) @ positions.mT
        bias = relative_shift(by_distance) + mask
        q = q + self.content_bias
        if torch.is_grad_enabled() or transforms_active() or self._drops():
            # Penalties need second derivatives, which fused kernels lack. Fused kernels also draw new dropout masks.
            weights = self.attention_dropout((q * scale @ k.mT + bias).softmax(-1))
            attended = weights.to(v.dtype) @ v
        else:
            attended = functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), bias.to(q.dtype))
        return self.output_dropout(self.output(attended.transpose(1, 2).flatten(2)))

    def mask(self, memory: int, length: int, like: Tensor, window: int | None = None) -> Tensor:
        """Make the mask: 0 where a query may look, -inf elsewhere, (length, memory + length).

        Args:
            memory, length: Number of keys before the first query, and of queries.
            like: A tensor of the mask's dtype and device.
            window: Another window than the module's.
        """
        distance = memory + torch.arange(length, device=like.device)[:, None]
        distance = distance - torch.arange(memory + length, device=like.device)
        hidden = (distance < 0) | (distance >= (window or self.window))
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)

    def _drops(self) -> bool:
        return self.attention_dropout.training and self.attention_dropout.p > 0.0

    def _split(self, features: Tensor) -> Tensor:
        """(batch, length, heads * d_head) -> (batch, heads, length, d_head)."""
        return features.unflatten(-1, (self.heads, self.d_head)).transpose(1, 2)


def relative_shift(by_distance: Tensor) -> Tensor:
    """Convert one column per distance to one column per key, (..., L, K) both.

    Column c of row i is for the distance K - 1 - c. Key j of query i is at the distance K - L + i - j, so its entry is
    in column L - 1 - i + j: at L - 1 + i (K - 1) + j of the flattened matrix. Each row of the result is therefore a
    window of K entries that begins K - 1 after the previous one: a view. Entries of future keys come from other rows
    and mean nothing.
    """
    length, keys = by_distance.shape[-2:]
    if keys == 1:
        return by_distance
    return by_distance.flatten(-2)[..., length - 1 :].unfold(-1, keys, keys - 1)


def relative_sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids sin(d w_i), cos(d w_i), w_i = 10000^(-2 i / width), d = length - 1 down to 0: (1, length, width)."""
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64, device=like.device)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[None].to(like.dtype)
