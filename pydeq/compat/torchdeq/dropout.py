"""Variational dropout: one mask for all iterations of a solve, drawn anew after ``reset_dropout``.

A mask is drawn where the tensor is and in its dtype, and again when the shape no longer fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "reset_dropout",
]


class _VariationalDropoutNd(nn.Module):
    """Zeroes entries with probability ``dropout`` and scales the others by 1 / (1 - dropout).

    Args:
        dropout: Probability, in [0, 1].
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout probability must be in [0, 1], got {dropout}")
        self.dropout = dropout
        self.mask: Tensor | None = None

    def mask_shape(self, x: Tensor) -> Sequence[int]:
        """The shape of the mask of ``x``: 1 in dimensions that share their fate."""
        return x.shape

    def reset_mask(self, x: Tensor) -> None:
        """Draw the mask for tensors like ``x``."""
        keep = 1.0 - self.dropout
        drawn = torch.empty(*self.mask_shape(x), dtype=x.dtype, device=x.device).bernoulli_(keep)
        self.mask = drawn / keep if keep > 0.0 else drawn

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        mask = self.mask
        if mask is None or mask.device != x.device or tuple(mask.shape) != tuple(self.mask_shape(x)):
            self.reset_mask(x)
        assert self.mask is not None
        return self.mask * x

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class VariationalDropout(_VariationalDropoutNd):
    """Drops single entries of tensors of any shape."""


class _Dimensional(_VariationalDropoutNd):
    """Drops whole features or whole tokens.

    Args:
        dropout: Probability, in [0, 1].
        token_first: Whether features come last, (B, *positions, D); else (B, D, *positions).
    """

    positions: int
    tokens: bool

    def __init__(self, dropout: float = 0.5, token_first: bool = True) -> None:
        super().__init__(dropout)
        self.token_first = token_first

    def mask_shape(self, x: Tensor) -> Sequence[int]:
        if x.dim() != self.positions + 2:
            raise ValueError(f"x must have {self.positions + 2} dimensions, got shape {tuple(x.shape)}")
        feature = x.dim() - 1 if self.token_first else 1
        return [
            size if i == 0 or (i == feature) != self.tokens else 1  # features or positions, but never both
            for i, size in enumerate(x.shape)
        ]


class VariationalDropout1d(_Dimensional):
    """Drops features of (B, L, D), or of (B, D, L) where not ``token_first``."""

    positions, tokens = 1, False


class VariationalDropout2d(_Dimensional):
    """Drops features of (B, H, W, D), or of (B, D, H, W) where not ``token_first``."""

    positions, tokens = 2, False


class VariationalDropout3d(_Dimensional):
    """Drops features of (B, T, H, W, D), or of (B, D, T, H, W) where not ``token_first``."""

    positions, tokens = 3, False


class VariationalDropToken1d(_Dimensional):
    """Drops positions of (B, L, D), or of (B, D, L) where not ``token_first``."""

    positions, tokens = 1, True


class VariationalDropToken2d(_Dimensional):
    """Drops positions of (B, H, W, D), or of (B, D, H, W) where not ``token_first``."""

    positions, tokens = 2, True


class VariationalDropToken3d(_Dimensional):
    """Drops positions of (B, T, H, W, D), or of (B, D, T, H, W) where not ``token_first``."""

    positions, tokens = 3, True


def reset_dropout(model: nn.Module) -> None:
    """Forget the masks of all variational dropouts in ``model``."""
    for module in model.modules():
        if isinstance(module, _VariationalDropoutNd):
            module.mask = None
