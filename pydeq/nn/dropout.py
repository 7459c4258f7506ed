"""Dropout whose mask is drawn once per solve.

Dropout that draws a new mask for each evaluation leaves a DEQ without a fixed point. Here all evaluations of a solve
share one mask, also the evaluations for its gradients. The next solve draws a new mask. Outside of a solve, every call
draws a mask.

    y = x * mask / (1 - p),   mask ~ Bernoulli(1 - p)

Source: Gal and Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, NeurIPS 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeq.arguments import check_number
from pydeq.cell.scope import Scoped, active_scope, outside_inference_mode


class VariationalDropout(Scoped):
    """Dropout with one mask per solve.

    If a module is used twice in a cell, on inputs of the same shape, it drops the same entries both times: use one
    module for each place. In evaluation mode it returns its input.

    Args:
        p: Probability that an entry is dropped, in [0, 1].
        shared_dims: Dimensions along which the mask is the same. With an input of shape (batch, length, features),
            (1,) drops features of whole sequences and (2,) drops whole tokens.

    Raises:
        TypeError, ValueError: If an argument is of the wrong type or out of range.

    Examples:
        >>> dropout = pydeq.nn.VariationalDropout(0.5)
        >>> with pydeq.nn.solve_scope():
        ...     torch.equal(dropout(torch.ones(100)), dropout(torch.ones(100)))
        True
    """

    def __init__(self, p: float = 0.5, shared_dims: Sequence[int] = ()) -> None:
        super().__init__()
        p = check_number("p", p)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be in [0, 1], got {p}")
        if isinstance(shared_dims, int) or not all(type(dim) is int for dim in shared_dims):
            raise TypeError(f"shared_dims must be a sequence of ints, got {shared_dims!r}")
        self.p = p
        self.shared_dims = tuple(shared_dims)

    def has_row_per_sample(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of x, in training mode.

        Raises:
            ValueError: If x does not have the dimensions that the module expects.
        """
        shared = self._shared(x)
        if not self.training or self.p == 0.0:
            return x
        return x * self._mask(x, tuple(1 if dim in shared else size for dim, size in enumerate(x.shape)))

    def _shared(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x along which the mask is the same, counted from the front."""
        for dim in self.shared_dims:
            if not -x.dim() <= dim < x.dim():
                raise ValueError(f"x must have a dimension {dim} to share the mask along, got shape {tuple(x.shape)}")
        return tuple(dim % x.dim() for dim in self.shared_dims)

    def _mask(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """0 or 1 / (1 - p), of ``shape``, on x's device and in its dtype."""
        scope = active_scope()
        if scope is None:
            return self._draw(x, shape)
        key = (self, shape, x.device)
        mask = scope.masks.get(key)
        if mask is None:
            mask = scope.masks[key] = self._draw(x, shape)
        return mask.to(x.dtype)

    def _draw(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        with outside_inference_mode():  # a later evaluation may save the mask for backward
            kept = torch.bernoulli(torch.full(shape, 1.0 - self.p, dtype=x.dtype, device=x.device))
            return kept if self.p == 1.0 else kept / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", shared_dims={self.shared_dims}" if self.shared_dims else "")


class _ChannelDropout(VariationalDropout):
    """Drops whole channels.

    Args:
        p: Probability that a channel is dropped, in [0, 1].
        channels_last: Whether channels are the last dimension instead of the one after the batch.
    """

    spatial: int

    def __init__(self, p: float = 0.5, channels_last: bool = False) -> None:
        first = 1 if channels_last else 2
        super().__init__(p, tuple(range(first, first + self.spatial)))
        self.channels_last = channels_last

    def _shared(self, x: Tensor) -> tuple[int, ...]:
        if x.dim() != self.spatial + 2:
            names = ", ".join(("length",) if self.spatial == 1 else ("depth", "height", "width")[-self.spatial :])
            expected = f"(batch, {names}, channels)" if self.channels_last else f"(batch, channels, {names})"
            raise ValueError(f"x must be of shape {expected}, got {tuple(x.shape)}")
        return self.shared_dims

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", channels_last=True" if self.channels_last else "")


class VariationalDropout1d(_ChannelDropout):
    """Drops whole channels of (batch, channels, length), the same channels in a whole solve.

    Args:
        p: Probability that a channel is dropped, in [0, 1].
        channels_last: For (batch, length, channels).

    Examples:
        >>> y = pydeq.nn.VariationalDropout1d(0.5)(torch.ones(2, 16, 5))
        >>> torch.equal(y, y[:, :, :1].expand(2, 16, 5))
        True
    """

    spatial = 1


class VariationalDropout2d(_ChannelDropout):
    """Drops whole channels of (batch, channels, height, width), the same channels in a whole solve.

    Args:
        p: Probability that a channel is dropped, in [0, 1].
        channels_last: For (batch, height, width, channels).

    Examples:
        >>> y = pydeq.nn.VariationalDropout2d(0.5)(torch.ones(2, 16, 5, 5))
        >>> torch.equal(y, y[:, :, :1, :1].expand(2, 16, 5, 5))
        True
    """

    spatial = 2


class VariationalDropout3d(_ChannelDropout):
    """Drops whole channels of (batch, channels, depth, height, width), the same channels in a whole solve.

    Args:
        p: Probability that a channel is dropped, in [0, 1].
        channels_last: For (batch, depth, height, width, channels).

    Examples:
        >>> y = pydeq.nn.VariationalDropout3d(0.5)(torch.ones(2, 16, 3, 5, 5))
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand(2, 16, 3, 5, 5))
        True
    """

    spatial = 3


class SequenceDropout(VariationalDropout1d):
    """Drops features of whole sequences (batch, length, features): the locked dropout of transformers.

    Args:
        p: Probability that a feature is dropped, in [0, 1].

    Source: Merity, Keskar and Socher, Regularizing and Optimizing LSTM Language Models, ICLR 2018.

    Examples:
        >>> y = pydeq.nn.SequenceDropout(0.5)(torch.ones(2, 5, 16))
        >>> torch.equal(y, y[:, :1].expand(2, 5, 16))
        True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p, channels_last=True)

    def extra_repr(self) -> str:
        return f"p={self.p}"
