"""The squared Euclidean norm of each sample, what every Jacobian norm estimate ends in: y[b] = sum_d x[b, d]^2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydeq.ops.registry import define


def squared_norm_reference(x: Tensor) -> Tensor:  # [B, D] -> [B]
    if x.dtype == torch.float64:
        return x.square().sum(1)
    return x.double().square().sum(1).float()


def squared_norm_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


_squared_norm = define("squared_norm(Tensor x) -> Tensor", squared_norm_reference, squared_norm_fake)


class _SquaredNorm(torch.autograd.Function):
    """d/dx sum x^2 = 2 x, itself differentiable."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _squared_norm(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2.0 * gradient[:, None] * x).to(x.dtype)


def squared_norm(x: Tensor) -> Tensor:
    """Sum the squares of each sample.

    Args:
        x: [B, D] or any shape with the batch first, floating point.

    Returns:
        [B], float64 for float64, else float32. Differentiable to any order. Runs repeat bit for bit.

    Raises:
        ValueError: If x has no batch dimension.
    """
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    return _SquaredNorm.apply(flat.contiguous())  # pyright: ignore[reportReturnType]
