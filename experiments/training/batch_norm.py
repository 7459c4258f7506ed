"""Batch norm over the samples of all ranks: results do not depend on the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a model compute their statistics over the samples of all ranks.

    On CUDA this is torch's own module, which does not support CPUs.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is nn.BatchNorm2d:
                setattr(parent, name, SharedBatchNorm2d.of(module))
    return model


class SharedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with mean and variance over all ranks' samples; all ranks must call it equally often."""

    @staticmethod
    def of(norm: nn.BatchNorm2d) -> SharedBatchNorm2d:
        """Make a shared batch norm with the parameters and buffers of ``norm``."""
        shared = SharedBatchNorm2d(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )  # fmt: skip
        shared.weight, shared.bias = norm.weight, norm.bias
        shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
        shared.num_batches_tracked = norm.num_batches_tracked
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (batch, features, height, width)."""
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _Sum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        mean, n = total[:-1] / total[-1], total[-1].detach()
        centered = x - mean[:, None, None]
        variance = _Sum.apply(centered.square().sum((0, 2, 3))) / n
        y = centered * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (n / (n - 1.0))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradients are summed over the ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)
