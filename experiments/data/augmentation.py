"""Augmentation and normalization of batches of images as tensor operations; each sample has its own random numbers.

Random numbers come from the given generator in a fixed order: the same state of the generator gives the same images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def random_crop(images: Tensor, padding: int = 4, *, generator: torch.Generator | None) -> Tensor:
    """Crop each image, padded with zeros, to its own size at random: a shift by up to ``padding`` pixels each way.

    Args:
        images: (N, C, H, W), of any dtype.
        padding: Pixels on each side, at least 0.
        generator: Generator of the random numbers; None for torch's default one.

    Returns:
        Like ``images``.

    Raises:
        ValueError: If ``images`` are not a batch of images, or padding is negative.
    """
    batch, _, height, width = _shape(images)
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    corners = _draw(2 * padding + 1, (2, batch), images, generator)
    rows = corners[0][:, None] + torch.arange(height, device=images.device)  # [N, H]
    columns = corners[1][:, None] + torch.arange(width, device=images.device)  # [N, W]
    padded = functional.pad(images, (padding,) * 4)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    # Dimensions of advanced indices come first: [N, H, W, C].
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (N, C, H, W), of any dtype.
        generator: Generator of the random numbers; None for torch's default one.

    Returns:
        Like ``images``.

    Raises:
        ValueError: If ``images`` are not a batch of images.
    """
    batch = _shape(images)[0]
    mirrored = _draw(2, (batch,), images, generator).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std of each channel, x in [0, 1] where images are uint8.

    Args:
        images: (N, C, H, W), uint8 or floating.
        mean, std: Of each channel; see :func:`experiments.data.statistics`.

    Returns:
        The same shape, float32 for uint8 images and else their dtype.

    Raises:
        TypeError: If images are of another dtype.
        ValueError: If their shape is wrong, or a deviation is not positive.
    """
    channels = _shape(images)[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std must have {channels} entries, one a channel, got {len(mean)} and {len(std)}")
    if not min(std) > 0:
        raise ValueError(f"std must be positive, got {tuple(std)}")
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) / 255
    elif not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
    shift, scale = (images.new_tensor(tuple(values)).view(1, -1, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def _shape(images: Tensor) -> tuple[int, int, int, int]:
    if images.dim() != 4:
        raise ValueError(f"images must be of shape (N, C, H, W), got {tuple(images.shape)}")
    return images.shape[0], images.shape[1], images.shape[2], images.shape[3]


def _draw(high: int, shape: tuple[int, ...], images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw integers in [0, high) on the generator's device, and move them to the images' device."""
    device = images.device if generator is None else generator.device
    return torch.randint(high, shape, generator=generator, device=device).to(images.device)
