"""Heads on multiscale features: classes of images, or of their pixels.

Source: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020, after HRNet (Wang et al., TPAMI 2020).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4
"""Output channels of a bottleneck, as a multiple of its inner channels."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a projected shortcut; only the shortcut's norm has affine parameters.

    Args:
        channels: Channels of the input.
        inner: Channels inside; the output has four times as many.
        momentum: Momentum of the batch norms.
    """

    def __init__(self, channels: int, inner: int, momentum: float) -> None:
        super().__init__()
        out = EXPANSION * inner
        self.path = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner, momentum=momentum, affine=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner, momentum=momentum, affine=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out, momentum=momentum, affine=False),
        )
        self.shortcut = nn.Sequential()
        if channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, momentum=momentum)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.path(x) + self.shortcut(x))


class ClassificationHead(nn.Module):
    """Classifier of images: each resolution is downsampled and added to the next coarser one; the sum is pooled.

    Args:
        channels: Channels of each resolution.
        inner: Inner channels of each resolution's bottleneck.
        final: Channels before the pooling.
        classes: Number of classes.
        momentum: Momentum of the batch norms.
    """

    def __init__(
        self, channels: Sequence[int], inner: Sequence[int], final: int, classes: int, momentum: float
    ) -> None:
        super().__init__()
        self.widen = nn.ModuleList(Bottleneck(c, i, momentum) for c, i in zip(channels, inner, strict=True))
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(EXPANSION * fine, EXPANSION * coarse, 3, stride=2, padding=1),
                nn.BatchNorm2d(EXPANSION * coarse, momentum=momentum),
                nn.ReLU(inplace=True),
            )
            for fine, coarse in itertools.pairwise(inner)
        )
        self.final = nn.Sequential(
            nn.Conv2d(EXPANSION * inner[-1], final, 1), nn.BatchNorm2d(final, momentum=momentum), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(final, classes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """Classify: (batch, channels_i, height_i, width_i) each -> logits (batch, classes)."""
        y = self.widen[0](z[0])
        for widen, down, part in zip(self.widen[1:], self.down, z[1:], strict=True):
            y = widen(part) + down(y)
        return self.classifier(self.final(y).mean((-2, -1)))


class SegmentationHead(nn.Module):
    """Classifier of pixels: two convolutions on all resolutions, interpolated to the finest.

    Args:
        channels: Channels of each resolution.
        classes: Number of classes.
        kernel: Size of the last convolution.
        momentum: Momentum of the batch norm.
    """

    def __init__(self, channels: Sequence[int], classes: int, kernel: int, momentum: float) -> None:
        super().__init__()
        width = sum(channels)
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width, momentum=momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, classes, kernel, padding=kernel // 2),
        )

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """Classify: (batch, channels_i, height_i, width_i) each -> logits (batch, classes, height_0, width_0)."""
        size = z[0].shape[-2:]
        coarse = [functional.interpolate(part, size, mode="bilinear", align_corners=True) for part in z[1:]]
        return self.layers(torch.cat([z[0], *coarse], dim=1))
