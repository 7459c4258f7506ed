"""The squared Euclidean norm of each sample, averaged over probes: y[b] = 1/K sum_k sum_d x[k, b, d]^2.

It is the last operation in every estimate of a Jacobian's norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydeq.ops.registry import define


def squared_norm_reference(x: Tensor) -> Tensor:  # [K, B, D] -> [B]
    if x.dtype == torch.float64:
        return x.square().sum((0, 2)) / x.shape[0]
    return (x.double().square().sum((0, 2)) / x.shape[0]).float()


def squared_norm_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


_squared_norm = define("squared_norm(Tensor x) -> Tensor", squared_norm_reference, squared_norm_fake)


class _SquaredNorm(torch.autograd.Function):
    """d/dx 1/K sum x^2 = 2/K x, itself differentiable."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _squared_norm(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ((2.0 / x.shape[0]) * gradient[:, None] * x).to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 1)  # [K, N, B, D]: the mapped dimension extends the batch
        return mean_squared_norm(x.flatten(1, 2)).view(x.shape[1:3]), 0


class _WithForwardMode(_SquaredNorm):
    """With forward mode; a separate class, since torch.compile does not trace a Function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        return (2.0 / x.shape[0]) * (x.to(wide) * tangent.to(wide)).sum((0, 2))


def mean_squared_norm(x: Tensor) -> Tensor:
    """Sum the squares of each sample and average over probes.

    Args:
        x: [K, B, D], floating point, at least one probe.

    Returns:
        [B], float64 for float64, else float32. Differentiable to any order, in forward mode and under ``torch.func``.
        Results are the same bits in every run.

    Raises:
        ValueError: If x is not of that shape.

    Examples:
        >>> pydeq.ops.mean_squared_norm(torch.ones(4, 2, 3))
        tensor([3., 3.])
    """
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x must be of shape (probes, batch, state) with at least one probe, got {tuple(x.shape)}")
    function = _SquaredNorm if torch.compiler.is_compiling() else _WithForwardMode
    return function.apply(x.contiguous())  # pyright: ignore[reportReturnType]


def squared_norm(x: Tensor) -> Tensor:
    """Sum the squares of each sample.

    Args:
        x: [B, D] or any shape with the batch first, floating point.

    Returns:
        [B], as :func:`mean_squared_norm` of one probe.

    Raises:
        ValueError: If x has no batch dimension.

    Examples:
        >>> pydeq.ops.squared_norm(torch.ones(2, 3))
        tensor([3., 3.])
    """
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    return mean_squared_norm((x.flatten(1) if x.dim() > 1 else x[:, None])[None])
