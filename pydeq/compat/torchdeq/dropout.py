"""Variational dropout: one mask for all iterations of a solve, drawn again after ``reset_dropout``.

A mask is drawn on the tensor's device and in its dtype. It is drawn again when it no longer fits the tensor's shape.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

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

    A subclass may override ``reset_mask`` and set ``mask`` to anything that broadcasts to its input.

    Args:
        dropout: Probability, in [0, 1].
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout probability must be in [0, 1], got {dropout}")
        self.dropout = dropout
        self.mask: Tensor | None = None
        self._shape: tuple[int, ...] | None = None  # the shape of a mask that was drawn here

    def mask_shape(self, x: Tensor) -> Sequence[int]:
        """The shape of the mask of ``x``: 1 in dimensions along which the mask is the same."""
        return x.shape

    def reset_mask(self, x: Tensor) -> None:
        """Draw the mask for tensors like ``x``."""
        keep = 1.0 - self.dropout
        drawn = torch.empty(*self.mask_shape(x), dtype=x.dtype, device=x.device).bernoulli_(keep)
        self.mask = drawn / keep if keep > 0.0 else drawn
        self._shape = tuple(drawn.shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        if not self._fits(x):
            self._shape = None
            self.reset_mask(x)
            if not torch.compiler.is_compiling():
                _join_original()
        assert self.mask is not None
        return self.mask * x

    def _fits(self, x: Tensor) -> bool:
        """Whether the mask fits ``x``: drawn here for this shape, drawn by a subclass, or given."""
        mask = self.mask
        if mask is None or mask.device != x.device:
            return False
        if self._shape == tuple(mask.shape):
            return self._shape == tuple(self.mask_shape(x))
        return mask.dim() <= x.dim() and all(
            size in (1, of) for size, of in zip(reversed(mask.shape), reversed(x.shape), strict=False)
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class VariationalDropout(_VariationalDropoutNd):
    """Drops single entries of tensors of any shape.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> dropout = torchdeq.VariationalDropout(0.5)
        >>> torch.equal(dropout(torch.ones(100)), dropout(torch.ones(100)))
        True
    """


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
    """Drops features of (B, L, D), or of (B, D, L) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropout1d(0.5)(torch.ones(2, 5, 16))
        >>> torch.equal(y, y[:, :1].expand(2, 5, 16))
        True
    """

    positions, tokens = 1, False


class VariationalDropout2d(_Dimensional):
    """Drops features of (B, H, W, D), or of (B, D, H, W) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropout2d(0.5)(torch.ones(2, 5, 5, 16))
        >>> torch.equal(y, y[:, :1, :1].expand(2, 5, 5, 16))
        True
    """

    positions, tokens = 2, False


class VariationalDropout3d(_Dimensional):
    """Drops features of (B, T, H, W, D), or of (B, D, T, H, W) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropout3d(0.5)(torch.ones(2, 3, 5, 5, 16))
        >>> torch.equal(y, y[:, :1, :1, :1].expand(2, 3, 5, 5, 16))
        True
    """

    positions, tokens = 3, False


class VariationalDropToken1d(_Dimensional):
    """Drops positions of (B, L, D), or of (B, D, L) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropToken1d(0.5)(torch.ones(2, 5, 16))
        >>> torch.equal(y, y[..., :1].expand(2, 5, 16))
        True
    """

    positions, tokens = 1, True


class VariationalDropToken2d(_Dimensional):
    """Drops positions of (B, H, W, D), or of (B, D, H, W) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropToken2d(0.5)(torch.ones(2, 5, 5, 16))
        >>> torch.equal(y, y[..., :1].expand(2, 5, 5, 16))
        True
    """

    positions, tokens = 2, True


class VariationalDropToken3d(_Dimensional):
    """Drops positions of (B, T, H, W, D), or of (B, D, T, H, W) with ``token_first=False``.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> y = torchdeq.VariationalDropToken3d(0.5)(torch.ones(2, 3, 5, 5, 16))
        >>> torch.equal(y, y[..., :1].expand(2, 3, 5, 5, 16))
        True
    """

    positions, tokens = 3, True


def reset_dropout(model: nn.Module) -> None:
    """Drop the masks of all variational dropouts in ``model``, also from an installed torchdeq.

    Examples:
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> dropout = torchdeq.VariationalDropout(0.5)
        >>> first = dropout(torch.ones(100))
        >>> torchdeq.reset_dropout(dropout)
        >>> torch.equal(first, dropout(torch.ones(100)))
        False
    """
    original = sys.modules.get("torchdeq.dropout")
    kinds = (_VariationalDropoutNd, getattr(original, "_VariationalDropoutNd", _VariationalDropoutNd))
    for module in model.modules():
        if isinstance(module, kinds):
            module.mask = None  # pyright: ignore


def _join_original() -> None:
    """Make ``reset_deq`` and ``reset_dropout`` of an imported torchdeq also drop the masks of this module.

    Code that has moved over only in part may call the original's functions on a model with these dropouts.
    """
    for name in ("torchdeq", "torchdeq.core", "torchdeq.dropout"):
        module = sys.modules.get(name)
        theirs: Any = getattr(module, "reset_dropout", None)
        # sys.modules may hold this package under the name torchdeq.
        if theirs is not None and theirs is not reset_dropout and not hasattr(theirs, "_resets_pydeq"):
            module.reset_dropout = _joined(theirs)  # pyright: ignore


def _joined(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def reset(model: nn.Module) -> None:
        theirs(model)
        reset_dropout(model)

    reset._resets_pydeq = True  # pyright: ignore
    return reset
